"""What docs/torchrl.md says of TorchRL's names, and the loop that it changes."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.modules import OneHotCategorical, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import safe_rl
from examples.torchrl_loop import gym_environment
from safe_rl import (
    ActorCritic,
    ClippedPolicyLoss,
    GatedKLLoss,
    PPOLoss,
    SoftMinGAE,
    SoftMinValueLoss,
    TokenKLLoss,
)

PAGE = (Path(__file__).parents[2] / "docs" / "torchrl.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    table = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in table[1:]]


# --- the loop -----------------------------------------------------------------------------------


def program(*, ours: bool) -> str:
    """The lines of the diff that stand before the change, or after it."""
    (diff,) = re.findall(r"```diff\n(.*?)```", section("The lines that change"), re.S)
    lines = [line for line in diff.splitlines() if not line.startswith("-" if ours else "+")]
    return "\n".join(line[1:] for line in lines)


def parts() -> tuple[ProbabilisticActor, nn.Module]:
    torch.manual_seed(0)
    logits = TensorDictModule(nn.Linear(4, 2), ["observation"], ["logits"])
    actor = ProbabilisticActor(
        logits, ["logits"], distribution_class=OneHotCategorical, return_log_prob=True
    )
    return actor, nn.Linear(4, 1)


@pytest.fixture
def learnt() -> list[list[torch.Tensor]]:
    """Parameters after the loop, TorchRL's and ours."""
    found = []
    for ours in (False, True):
        actor, net = parts()
        environment = gym_environment("CartPole-v1", 2)
        environment.set_seed(0)
        collector = Collector(
            environment,
            actor,
            frames_per_batch=64,
            total_frames=192,
            auto_register_policy_transforms=False,
        )
        names: dict[str, Any] = {"actor": actor, "net": net, "torch": torch}
        names |= {name: getattr(safe_rl, name) for name in safe_rl.__all__}
        names |= {"GAE": GAE, "ClipPPOLoss": ClipPPOLoss, "ValueOperator": ValueOperator}
        exec(program(ours=ours), {**names, "collector": collector})
        collector.shutdown()
        found.append([p.detach() for module in (actor, net) for p in module.parameters()])
    return found


def test_the_loop_learns_what_it_learnt_before(learnt):
    theirs, ours = learnt
    actor, net = parts()
    start = [p.detach() for module in (actor, net) for p in module.parameters()]
    for before, reference, got in zip(start, theirs, ours, strict=True):
        assert (reference - before).abs().max() > 1e-3
        assert_close(got, reference, rtol=1e-4, atol=1e-6)


def test_the_two_programs_are_two():
    theirs, ours = program(ours=False), program(ours=True)
    assert "ClipPPOLoss" in theirs
    assert "PPOLoss(ActorCritic" not in theirs
    assert "ClipPPOLoss" not in ours
    assert "losses[" not in ours


# --- the tables ---------------------------------------------------------------------------------


def defaults(*makers: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for maker in makers:
        for name, parameter in inspect.signature(maker.__init__).parameters.items():
            found.setdefault(name, parameter.default)
    return found


def test_names_and_defaults_are_those_of_torchrl():
    actor, net = parts()
    critic = ValueOperator(net, in_keys=["observation"])
    there = ClipPPOLoss(actor, critic)
    arguments = defaults(ClipPPOLoss, ClipPPOLoss.__mro__[1], GAE)
    own = defaults(PPOLoss, SoftMinGAE, ActorCritic)
    known = {*arguments, *there.out_keys, *vars(there.tensor_keys)}
    ours = {*own, *PPOLoss().out_keys, *vars(PPOLoss().tensor_keys)}
    source = inspect.getsource(ClipPPOLoss)
    table = rows("Names")
    assert len(table) == 25
    for theirs, here, default_there, default_here, _ in table:
        # The explained variance is given, though out_keys of theirs lack it.
        assert theirs in known or f'td_out.set("{theirs}"' in source, theirs
        assert here in ours, here
        for written, signature, name in (
            (default_there, arguments, theirs),
            (default_here, own, here),
        ):
            if written:
                value = signature[name]
                assert written.replace('"', "'") == repr(value), (name, value)


def test_every_diagnostic_has_a_row():
    of = {
        "clipped policy": ClippedPolicyLoss,
        "value": SoftMinValueLoss,
        "KL": GatedKLLoss,
        "token KL": TokenKLLoss,
    }
    written = {name: (unit, part) for name, unit, part, _ in rows("Diagnostics")}
    expected = {
        key: part
        for part, make in of.items()
        for key in make().out_keys
        if not key.startswith("loss_")
    }
    assert {name: part for name, (_, part) in written.items()} == expected
    for name, (unit, _) in written.items():
        assert unit
        assert ("nats per token" in unit) is name.endswith("nats_per_token"), name
        assert ("share" in unit) is bool(re.search("fraction|effective|explained", name)), name
