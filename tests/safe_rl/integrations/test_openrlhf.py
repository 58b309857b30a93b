"""KLCoefficient beside the installed OpenRLHF's own controller, and as its trainer calls it.

Its trainer and experience maker import flash-attn, deepspeed and vllm, which need a GPU: the calls
that they make are read from their source.
"""

import ast
import importlib.metadata
import inspect
from pathlib import Path

import pytest
from openrlhf.trainer.ppo_utils import AdaptiveKLController

from safe_ops.controllers import AdaptiveKL, Controller
from safe_rl.integrations.kl_coefficient import KLCoefficient

pytestmark = pytest.mark.slow

DISTRIBUTION = importlib.metadata.distribution("openrlhf")
TRAINER = Path(str(DISTRIBUTION.locate_file("openrlhf/trainer")))
HOLDERS = [TRAINER / "ppo_trainer.py", TRAINER / "ppo_utils" / "experience_maker.py"]


@pytest.fixture
def ours():
    return KLCoefficient(Controller(AdaptiveKL(target=0.1, initial_coef=0.5, gain=0.5)))


def test_pinned_version():
    assert DISTRIBUTION.version == "0.11.2"


def test_same_interface(ours):
    other = AdaptiveKLController(0.5, 0.1, horizon=128)
    assert ours.value == other.value
    # By position: their trainer gives no names, and verl's names are others.
    assert len(inspect.signature(ours.update).parameters) == len(
        inspect.signature(other.update).parameters
    )


def test_same_coefficients_as_theirs(ours):
    # horizon = samples / gain makes the two laws one.
    other = AdaptiveKLController(0.5, 0.1, horizon=128)
    for kl in (0.3, 0.11, 0.0, 0.09, 0.1):
        ours.update(kl, 64)
        other.update(kl, 64)
        assert ours.value == pytest.approx(other.value, rel=1e-6)


def test_one_nan_poisons_theirs_and_not_ours(ours):
    other = AdaptiveKLController(0.5, 0.1, horizon=128)
    for kl in (float("nan"), 0.3):
        ours.update(kl, 64)
        other.update(kl, 64)
    assert other.value != other.value
    assert ours.value == pytest.approx(0.5 * 1.1)


@pytest.mark.parametrize("path", HOLDERS, ids=lambda path: path.name)
def test_their_code_uses_nothing_else(path, ours):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self.kl_ctl"
    }
    assert "value" in used
    assert used <= {"value", "update"}
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.kl_ctl.update"
    ]
    assert bool(calls) == (path.name == "ppo_trainer.py")
    for call in calls:
        words = {keyword.arg: 0 for keyword in call.keywords}
        inspect.signature(ours.update).bind(*call.args, **words)


def test_both_holders_take_it():
    # The line of the docstring assigns these two.
    trainer = ast.unparse(ast.parse(HOLDERS[0].read_text(encoding="utf-8")))
    assert "self.kl_ctl = AdaptiveKLController(" in trainer
    assert "self.experience_maker = RemoteExperienceMaker(" in trainer
    maker = ast.unparse(ast.parse(HOLDERS[1].read_text(encoding="utf-8")))
    assert "self.kl_ctl = kl_controller" in maker
