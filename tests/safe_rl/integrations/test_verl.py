"""The policy loss in verl's registry and KLCoefficient in its KL penalty."""

import doctest
import inspect
import math
import os
import subprocess
import sys

import pytest
import tensordict
import torch
import verl
from verl import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from examples import verl_controller as example
from safe_ops.controllers import AdaptiveKL, Controller
from safe_rl.integrations import verl as adapter
from safe_rl.integrations.kl_coefficient import KLCoefficient
from safe_rl.integrations.verl import safe_clipped

pytestmark = pytest.mark.slow


def config(**settings):
    return ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **settings)


def tensors(seed=0, rows=6, length=5):
    generator = torch.Generator().manual_seed(seed)
    old, new, advantage = torch.randn(3, rows, length, generator=generator)
    mask = torch.arange(length) < torch.arange(1, rows + 1)[:, None]
    return old, (old + 0.3 * new).requires_grad_(), advantage, mask.float()


def both(mode="token-mean", settings=None, **more):
    """Loss and gradient of verl's vanilla and of ours."""
    out = []
    for name in ("vanilla", "safe_clipped"):
        old, new, advantage, mask = tensors()
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            old_log_prob=old, log_prob=new, advantages=advantage, response_mask=mask,
            loss_agg_mode=mode, config=config(**(settings or {})), **more,
        )  # fmt: skip
        loss.backward()
        out.append((loss.detach(), new.grad, metrics))
    return out


def test_pinned_versions():
    # The newest tensordict that verl takes; torchrl needs a newer one, and so does most of safe_rl.
    assert (verl.__version__, tensordict.__version__) == ("0.9.1", "0.10.0")


def test_example_of_the_docstring():
    # Collected nowhere else: the module cannot be imported without verl.
    done = doctest.testmod(adapter, extraglobs={"torch": torch})
    assert done.attempted > 0
    assert done.failed == 0


def test_registered():
    assert core_algos.get_policy_loss_fn("safe_clipped") is safe_clipped
    theirs = inspect.signature(core_algos.compute_policy_loss_vanilla).parameters
    assert list(inspect.signature(safe_clipped).parameters) == list(theirs)


def test_external_module_registers_it_without_torchrl():
    code = (
        "import sys, verl; from verl.trainer.ppo.core_algos import get_policy_loss_fn as get\n"
        "print(get('safe_clipped').__module__, 'torchrl' in sys.modules)"
    )
    name = "safe_rl.integrations.verl"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"VERL_USE_EXTERNAL_MODULES": name}, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout.split() == [name, "False"]


def test_workers_loss_hands_it_what_it_needs():
    old, new, advantage, mask = tensors(rows=3)
    mask[:] = 1.0
    prompt = torch.zeros(3, 2, dtype=torch.long)
    flat = torch.nn.functional.pad(new, (1, 1)).flatten()  # one log-prob per token, shifted left
    out = []
    for name in ("vanilla", "safe_clipped"):
        data = tensordict_utils.get_tensordict(
            {
                "prompts": prompt, "responses": torch.zeros(3, 5, dtype=torch.long),
                "attention_mask": torch.ones(3, 7, dtype=torch.long), "response_mask": mask,
                "old_log_probs": old, "advantages": advantage,
            },
            {"dp_size": 1, "batch_num_tokens": 20, "global_batch_size": None},
        )  # fmt: skip
        actor = config(policy_loss=PolicyLossConfig(loss_mode=name), clip_ratio_c=1e6)
        out.append(ppo_loss(actor, {"log_probs": flat}, data))
    (theirs, _), (ours, metrics) = out
    torch.testing.assert_close(ours, theirs)
    assert metrics["actor/ratio_max"].aggregate() == pytest.approx((new - old).exp().max().item())


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"clip_ratio_low": 0.1, "clip_ratio_high": 0.4}, {"global_batch_info": {"dp_size": 1}}],
)
def test_equals_vanilla_where_its_second_clip_is_off(mode, settings):
    (theirs, their_gradient, their_metrics), (ours, our_gradient, metrics) = both(
        mode, settings | {"clip_ratio_c": 1e6}
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(their_metrics["actor/pg_clipfrac"]) != 0
    assert {"actor/ratio_max", "actor/effective_sample_size"} <= metrics.keys()
    assert all(isinstance(value, float) for value in metrics.values())


def test_rollout_weights_count():
    weights = torch.linspace(0.5, 1.5, 30).reshape(6, 5)
    (theirs, their_gradient, _), (ours, our_gradient, _) = both(
        settings={"clip_ratio_c": 1e6}, rollout_is_weights=weights
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(our_gradient, their_gradient)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum"])
def test_padding_may_hold_nan(mode):
    out = []
    for padding in (0.0, math.nan):
        old, new, advantage, mask = tensors()
        weights = torch.full_like(old, 0.5)
        old, advantage, weights = (
            x.masked_fill(mask == 0, padding) for x in (old, advantage, weights)
        )
        loss, _ = safe_clipped(
            old, new, advantage, mask, mode, config(), rollout_is_weights=weights
        )
        loss.backward()
        out.append((loss.detach(), new.grad))
    torch.testing.assert_close(out[1], out[0])


def test_config_is_needed():
    with pytest.raises(ValueError, match="safe_clipped needs verl's actor config"):
        safe_clipped(*tensors())


def kl_batch(log_ratio):
    ones = torch.ones(4, 3)
    return DataProto.from_dict(
        {
            "response_mask": ones,
            "token_level_scores": torch.zeros(4, 3),
            "old_log_probs": ones * log_ratio,
            "ref_log_prob": torch.zeros(4, 3),
        }
    )


def test_penalty_uses_the_value_and_moves_the_law():
    kl_ctrl = KLCoefficient(Controller(AdaptiveKL(target=0.1, initial_coef=0.5)))
    coefs = []
    for kl in (0.3, math.nan, 0.0):
        data, metrics = apply_kl_penalty(kl_batch(kl), kl_ctrl=kl_ctrl)
        coefs.append(metrics["actor/reward_kl_penalty_coeff"])
        if kl == 0.3:
            torch.testing.assert_close(
                data.batch["token_level_rewards"], torch.full((4, 3), -0.5 * 0.3)
            )
    assert [*coefs, kl_ctrl.value] == pytest.approx([0.5, 0.51, 0.51, 0.51 * 0.98])


def test_one_nan_poisons_theirs():
    kl_ctrl = core_algos.AdaptiveKLController(0.5, 0.1, 1000)
    for kl in (math.nan, 0.3):
        apply_kl_penalty(kl_batch(kl), kl_ctrl=kl_ctrl)
    assert math.isnan(kl_ctrl.value)


def test_kl_settles_at_its_target():
    def last(gain):
        rows = example.main(["--target", "0.1", "--gain", gain])[-60:]
        names = ("actor/reward_kl_penalty", "actor/reward_kl_penalty_coeff")
        return [sum(row[name] for row in rows) / len(rows) for name in names]

    # The optimum tilts the uniform reference by exp(1/8 / coef) towards the token that is paid.
    def tilted_kl(coef):
        odds = math.exp(1 / 8 / coef)
        paid = odds / (odds + 5)
        return paid * math.log(6 * paid) + (1 - paid) * math.log(6 * (1 - paid) / 5)

    # Over three seeds: KL 0.1002 to 0.1008, coefficient 0.1242 to 0.1256.
    held, coef = last("0.2")
    assert held == pytest.approx(0.1, rel=0.05)
    assert coef == pytest.approx(0.1252, rel=0.05)
    assert tilted_kl(0.1252) == pytest.approx(0.1, rel=1e-3)
    # Fixed at its start: 0.723 to 0.726.
    assert last("0") == pytest.approx([tilted_kl(0.05), 0.05], rel=0.05)
