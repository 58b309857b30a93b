import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch.testing import assert_close

from safe_ops import kl_surrogate_token
from safe_ops.controllers import AdaptiveKL, Controller, EntropyGatedKL
from safe_rl import ControllerModule, GatedKLLoss, PolicyMeasurements, SAFELoss, total_loss
from safe_rl.advantages import whiten_over_ranks
from safe_rl.controllers import one_of, sum_over_ranks
from tests.safe_rl.objectives.batches import TinyNetwork, make_batch

KEYS = ("kl", "entropy", "reward")


def scored_batch() -> TensorDict:
    batch = make_batch()
    batch["score"] = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
    return batch


def measured(kl: float = 0.5, entropy: float = 1.9, reward: float = 0.0) -> TensorDict:
    values = {"kl": kl, "entropy": entropy, "reward": reward}
    return TensorDict(
        {"measurements": {name: torch.full((3,), value) for name, value in values.items()}}, [3]
    )


def test_measurements_are_means_over_tokens_and_sequences():
    batch = PolicyMeasurements()(scored_batch())
    mask = batch["response_mask"]
    log_ratio = (batch["old_log_prob"] - batch["ref_log_prob"])[mask].mean()
    # Rows of 5, 1, 3 and 4 tokens: a mean of the rows' means would be another number.
    row_means = [
        (batch["old_log_prob"] - batch["ref_log_prob"])[row][mask[row]].mean() for row in range(4)
    ]
    assert abs(torch.stack(row_means).mean() - log_ratio) > 0.01
    assert_close(batch["measurements", "kl"], log_ratio.float().expand(4))
    assert_close(batch["measurements", "entropy"], batch["entropy"][mask].mean().float().expand(4))
    assert_close(batch["measurements", "reward"], torch.full((4,), 2.75))
    assert_close(batch["response_tokens_mean"], torch.full((4,), 13 / 4))


def test_measurements_ignore_padding_and_keep_bad_tokens():
    expected, batch = PolicyMeasurements()(scored_batch()), scored_batch()
    batch["old_log_prob"][~batch["response_mask"]] = torch.nan
    batch["entropy"][~batch["response_mask"]] = torch.inf
    result = PolicyMeasurements()(batch)["measurements"]
    assert_close(result.to_dict(), expected["measurements"].to_dict())
    batch["old_log_prob"][0, 0] = torch.nan
    assert PolicyMeasurements()(batch)["measurements", "kl"].isnan().all()


def test_a_rollout_of_nothing_measures_nothing():
    batch = scored_batch()
    batch["response_mask"] = torch.zeros_like(batch["response_mask"])
    batch = PolicyMeasurements()(batch)
    assert batch["measurements", "kl"].isnan().all()
    module = ControllerModule(EntropyGatedKL())
    module(batch)
    assert module.controller.state.non_finite == 1


def test_first_tokens_of_torchrls_generating_path_are_refused():
    batch = scored_batch()
    batch["old_log_prob"][:, 0], batch["entropy"][:, 0] = 0.0, 1.0
    with pytest.raises(ValueError, match=r"'old_log_prob' is 0 at the first token .*see Scores"):
        PolicyMeasurements()(batch.clone())
    # One row that is certain of its token is no such thing, nor are all without entropy.
    some = batch.clone()
    some["old_log_prob"][0, 0] = -0.1
    PolicyMeasurements()(some)
    batch["entropy"][:, 0] = 0.0
    PolicyMeasurements()(batch)


def test_many_small_tokens_are_summed_in_float64():
    shape = (64, 4096)
    small = torch.full(shape, 0.1, dtype=torch.bfloat16)
    batch = TensorDict(
        {
            "old_log_prob": small,
            "ref_log_prob": torch.zeros(shape, dtype=torch.bfloat16),
            "entropy": small,
            "response_mask": torch.ones(shape, dtype=torch.bool),
            "score": torch.zeros(64),
        },
        [64],
    )
    result = PolicyMeasurements()(batch)["measurements", "kl"][0].item()
    assert result == pytest.approx(small[0, 0].item(), rel=1e-7)


@pytest.mark.parametrize("key", PolicyMeasurements().in_keys)
def test_missing_keys(key):
    with pytest.raises(ValueError, match=f"batch must hold '{key}'"):
        PolicyMeasurements()(scored_batch().exclude(key))


def test_steps_of_an_environment_need_no_mask():
    """[B, T] as a collector gives them, flattened to frames: the same numbers and the same loss."""
    generator = torch.Generator().manual_seed(0)
    steps = {
        key: torch.randn(2, 6, generator=generator)
        for key in ("log_prob", "old_log_prob", "ref_log_prob", "entropy", "advantage")
    }
    rows = TensorDict(steps | {"score": torch.full((2, 6), 3.0)}, [2, 6])
    rows = ControllerModule(EntropyGatedKL(coef=1.0))(PolicyMeasurements()(rows))
    assert_close(rows["measurements", "kl"], (rows["old_log_prob"] - rows["ref_log_prob"]).mean()
                 .expand(2, 6))  # fmt: skip
    assert rows["measurements", "reward"].unique().tolist() == [3.0]
    frames = rows.reshape(-1)
    again = PolicyMeasurements()(frames.exclude("measurements"))
    assert_close(again["measurements"].to_dict(), frames["measurements"].to_dict())
    loss = GatedKLLoss(surrogate=kl_surrogate_token)
    expected = loss(rows)
    assert_close(loss(frames).to_dict(), expected.to_dict())
    shares = torch.stack([loss(part)["loss_kl"] for part in frames.split(4)])
    assert_close(shares.mean(), expected["loss_kl"])


def test_a_score_per_token_is_refused():
    batch = scored_batch()
    batch["score"] = torch.zeros(4, 5)
    with pytest.raises(
        ValueError, match=r"one score per entry of the batch, got \(4, 5\) and mask \(4, 5\)"
    ):
        PolicyMeasurements()(batch)


def test_the_module_does_what_the_law_does():
    law = EntropyGatedKL(coef=1.0)
    module, state = ControllerModule(Controller(law)), law.init()
    for kl in (0.5, 0.9, 1.4):
        batch = module(measured(kl))
        state = law.update(state, kl=kl, entropy=1.9, reward=0.0)
        for key in ("kl_threshold", "entropy_gate", "kl_momentum", "kl_coef"):
            assert_close(batch[key], getattr(state, key).expand(3))
    assert module.controller.state.step == 3
    assert batch["kl_coef"].stride() == (0,)


def test_the_batch_feeds_the_loss():
    """Controller to objective by keys alone, in a batch [B] and in one [B, T]."""
    losses = []
    for size in (torch.Size([4]), torch.Size([4, 5])):
        given = scored_batch()
        given["ref_log_prob"] = given["ref_log_prob"] - 1
        per_token = {key: v for key, v in given.items() if v.shape[: len(size)] == size}
        batch = TensorDict(per_token, size)
        batch["score"] = given["score"].reshape(4, *[1] * (len(size) - 1)).expand(size)
        batch = ControllerModule(EntropyGatedKL(coef=1.0))(PolicyMeasurements()(batch))
        assert batch["kl_coef"].shape == size
        # Tokens of an entry: of a sequence, or whether a step counts.
        assert_close(batch["response_tokens_mean"], torch.full(size, 13 / size.numel()))
        losses.append(SAFELoss()(batch))
    assert losses[0]["loss_kl"] != 0
    assert_close(losses[0].to_dict(), losses[1].to_dict())


def test_another_law_names_its_own_keys():
    module = ControllerModule(AdaptiveKL(target=0.1), out_keys={"kl_reward_coef": "coef"})
    assert module.in_keys == [("measurements", "kl")]
    assert module.out_keys == ["kl_reward_coef"]
    batch = module(measured(kl=1.0))
    assert batch["kl_reward_coef"][0] > 0.1
    assert batch["kl_reward_coef"].shape == (3,)


def test_nested_fields_and_other_measurement_keys():
    module = ControllerModule(
        EntropyGatedKL(),
        in_keys={name: ("logged", name) for name in KEYS},
        out_keys={("control", "step"): "kl_filter__step"},
    )
    batch = module(measured().rename_key_("measurements", "logged"))
    assert batch["control", "step"].tolist() == [1, 1, 1]


def test_fields_that_the_state_lacks_are_refused():
    with pytest.raises(ValueError, match=r"state of AdaptiveKL, got 'kl_threshold', known: .*coef"):
        ControllerModule(AdaptiveKL())
    with pytest.raises(ValueError, match="got 'kl_coeff'"):
        ControllerModule(EntropyGatedKL(), out_keys={"kl_coef": "kl_coeff"})


def test_what_was_not_reduced_is_refused():
    batch = measured()
    batch["measurements", "kl"] = torch.tensor([0.1, 0.2, 0.3])
    module = ControllerModule(EntropyGatedKL())
    with pytest.raises(ValueError, match=r"\('measurements', 'kl'\) must hold one number"):
        module(batch)
    assert module.controller.state.step == 0
    with pytest.raises(ValueError, match=r"got shape \(0,\)"):
        one_of("kl", torch.zeros(0))
    assert one_of("kl", torch.full((3,), math.nan)).isnan()
    assert one_of("kl", torch.tensor(2.0)) == 2


def test_a_bad_measurement_holds_the_decisions():
    module = ControllerModule(EntropyGatedKL(coef=1.0))
    before = module(measured(1.0))["kl_coef"]
    after = module(measured(math.nan))["kl_coef"]
    assert before.all()
    assert_close(after, before, rtol=0, atol=0)


def test_state_dict_resumes():
    first, second = (ControllerModule(EntropyGatedKL()) for _ in range(2))
    for kl in (0.5, 0.9):
        first(measured(kl))
    second.load_state_dict(first.state_dict())
    assert_close(first(measured(1.0)).to_dict(), second(measured(1.0)).to_dict(), rtol=0, atol=0)


def test_dispatch():
    batch = measured(1.0)
    module = ControllerModule(EntropyGatedKL())
    values = module(**{f"measurements_{name}": batch["measurements", name] for name in KEYS})
    expected = ControllerModule(EntropyGatedKL())(batch)
    for value, key in zip(values, module.out_keys, strict=True):
        assert_close(value, expected[key])


def test_without_a_process_group_sums_are_local():
    assert [s.item() for s in sum_over_ranks(torch.tensor(1), torch.tensor(2.5))] == [1.0, 2.5]


def on_rank(rank: int, folder: str) -> None:
    """One of two ranks: rows 0 and 1, or rows 2 and 3."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    rows = slice(2 * rank, 2 * rank + 2)
    batch = PolicyMeasurements()(scored_batch()[rows])
    white = whiten_over_ranks(batch["advantage"].squeeze(-1), batch["response_mask"])
    batch = ControllerModule(EntropyGatedKL(coef=1.0))(batch)
    network = TinyNetwork()
    loss = total_loss(SAFELoss(network)(batch))
    loss.backward()
    torch.save(
        {
            "measured": batch.select("measurements", "response_tokens_mean", "kl_coef").to_dict(),
            "white": white,
            "loss": loss.detach(),
            "gradients": [p.grad for p in network.parameters()],
        },
        f"{folder}/rank{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(on_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    whole = PolicyMeasurements()(scored_batch())
    white = whiten_over_ranks(whole["advantage"].squeeze(-1), whole["response_mask"])
    whole = ControllerModule(EntropyGatedKL(coef=1.0))(whole)
    expected = whole.select("measurements", "response_tokens_mean", "kl_coef")[:2].to_dict()
    network = TinyNetwork()
    loss = total_loss(SAFELoss(network)(whole))
    loss.backward()
    for rank in ranks:
        assert_close(rank["measured"], expected, rtol=0, atol=0)
    assert_close(torch.cat([rank["white"] for rank in ranks]), white)
    assert_close(sum(rank["loss"] for rank in ranks) / 2, loss.detach())
    for parameter, *shares in zip(
        network.parameters(), *[rank["gradients"] for rank in ranks], strict=True
    ):
        assert_close(sum(shares) / 2, parameter.grad)
