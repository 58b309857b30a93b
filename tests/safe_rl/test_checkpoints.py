"""A checkpoint is written whole or not at all, and read whole or refused."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from safe_ops.controllers import Controller, EntropyGatedKL
from safe_rl import checkpoints
from safe_rl.checkpoints import (
    RandomStates,
    Stateful,
    TrainableParameters,
    load_checkpoint,
    save_checkpoint,
)
from tests.strategies import PROPERTY

ROOT = Path(__file__).parents[2]
WITH_FILE = hypothesis_settings(
    PROPERTY, suppress_health_check=[*HealthCheck], max_examples=PROPERTY.max_examples
)


def run(seed: int = 0) -> dict[str, Stateful]:
    """The parts of a run after two updates: base and adapter, critic, optimizer, law, draws."""
    torch.manual_seed(seed)
    policy = nn.Sequential(nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3))
    critic = nn.Linear(3, 2)
    optimizer = torch.optim.Adam([*policy[1].parameters(), *critic.parameters()], lr=0.1)
    controller = Controller(EntropyGatedKL())
    for kl in (0.4, 0.9):
        optimizer.zero_grad()
        critic(policy(torch.randn(4, 3))).square().sum().backward()
        optimizer.step()
        controller(kl=kl, entropy=2.0, reward=float(seed))
    return {
        "adapters": TrainableParameters(policy),
        "critic": critic,
        "optimizer": optimizer,
        "controller": controller,
        "random": RandomStates(order=torch.Generator().manual_seed(seed)),
    }


def states(parts: dict[str, Stateful]) -> dict[str, object]:
    """Copied, since a module's state is its own tensors."""
    return checkpoints.copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def same(first: object, second: object) -> None:
    assert_close(first, second, rtol=0, atol=0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


# --- saving and loading -------------------------------------------------------------------------


def test_save_load(path: Path):
    saved, other = run(seed=0), run(seed=1)
    save_checkpoint(path, 7, saved)
    expected = states(saved)
    assert load_checkpoint(path, other) == 7
    same(states(other), expected)


def test_saving_replaces_and_leaves_no_other_file(path: Path):
    for step in range(3):
        save_checkpoint(path, step, run(seed=step))
    assert list(path.parent.iterdir()) == [path]
    parts = run(seed=5)
    assert load_checkpoint(str(path), parts) == 2
    same(states(parts)["critic"], states(run(seed=2))["critic"])


def test_the_parts_keep_what_they_are_after_saving(path: Path):
    parts = run()
    before = states(parts)
    save_checkpoint(path, 0, parts)
    same(states(parts), before)


class Counted:
    """A part that counts how often it was asked, and can fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked = 0
        self.error = error

    def state_dict(self) -> dict[str, int]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return {"asked": self.asked}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.asked = state_dict["asked"]


def test_without_write_states_are_collected_and_no_file_is_made(path: Path):
    part = Counted()
    save_checkpoint(path, 0, {"part": part}, write=False)
    assert part.asked == 1
    assert not list(path.parent.iterdir())


# --- written whole or not at all ----------------------------------------------------------------


def test_a_part_that_cannot_be_saved_leaves_the_old_file(path: Path):
    save_checkpoint(path, 3, {"part": Counted()})
    before = path.read_bytes()
    with pytest.raises(OSError, match="gone"):
        save_checkpoint(path, 4, {"part": Counted(OSError("gone"))})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    save_checkpoint(path, 3, run())
    before = path.read_bytes()

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoints.os, call, full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, 4, run(seed=1))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


KILLED = """
import os, signal, sys, torch
from safe_rl.checkpoints import save_checkpoint
moment, path = sys.argv[1:]
layer = torch.nn.Linear(64, 64)
save_checkpoint(path, 3, {"layer": layer})
def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
def half(value, file):
    file.write(open(path, "rb").read()[:1000])
    file.flush()
    kill()
if moment == "while writing":
    torch.save = half
else:
    os.replace = kill
torch.nn.init.zeros_(layer.weight)
save_checkpoint(path, 4, {"layer": layer})
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["while writing", "before the rename"])
def test_a_killed_process_leaves_the_old_file(path: Path, moment: str):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(path)], cwd=ROOT, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    layer = nn.Linear(64, 64)
    assert load_checkpoint(path, {"layer": layer}) == 3
    assert layer.weight.any()
    # What it left behind is taken over by the next save.
    assert len(list(path.parent.iterdir())) == 2
    save_checkpoint(path, 5, {"layer": layer})
    assert list(path.parent.iterdir()) == [path]


def test_the_file_is_on_disk_before_it_is_renamed(path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def replaced(old: Path, new: Path) -> None:
        calls.append("replace")
        assert load_checkpoint(old, run()) == 3
        replace(old, new)

    monkeypatch.setattr(checkpoints.os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(checkpoints.os, "replace", replaced)
    save_checkpoint(path, 3, run())
    assert calls == ["fsync", "replace"]


# --- read whole or refused ----------------------------------------------------------------------


def refused(path: Path, parts: dict[str, Stateful], *words: str) -> None:
    """One line that names the file, and no part has changed."""
    before = states(parts)
    with pytest.raises(ValueError, match="checkpoint") as caught:
        load_checkpoint(path, parts)
    for word in (str(path), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    same(states(parts), before)


@WITH_FILE
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_cut_file_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float):
    path = tmp_path_factory.getbasetemp() / "cut.pt"
    parts = {"layer": nn.Linear(3, 3), "random": RandomStates()}
    save_checkpoint(path, 1, parts)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refused(path, parts, "it may be cut")


@WITH_FILE
@given(content=st.binary(max_size=40) | st.binary(max_size=40).map(lambda b: b"\x80\x02" + b))
def test_any_other_file_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    path = tmp_path_factory.getbasetemp() / "other.pt"
    path.write_bytes(content)
    refused(path, {"layer": nn.Linear(1, 1)})


@pytest.mark.parametrize(
    "saved",
    [
        3,
        None,
        "text",
        [1],
        torch.ones(2),
        {"step": 1},
        {"parts": {}},
        {"step": 1, "parts": 3},
        {"step": 1, "parts": ["layer"]},
        {"step": "1", "parts": {"layer": {}}},
        {"weight": torch.ones(1, 1), "bias": torch.ones(1)},
    ],
    ids=str,
)
def test_what_torch_saved_but_is_none_of_ours_is_refused(path: Path, saved: object):
    torch.save(saved, path)
    refused(path, {"layer": nn.Linear(1, 1)}, "none of ours")


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["PAYLOAD_FOLDER"],)


def test_a_pickled_object_is_refused_and_not_run(path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = path.parent / "made"
    monkeypatch.setenv("PAYLOAD_FOLDER", str(folder))
    torch.save({"step": 1, "parts": {"layer": Payload()}}, path)
    refused(path, {"layer": nn.Linear(1, 1)}, "cannot be read")
    assert not folder.exists()


def test_a_missing_file_and_a_folder(path: Path):
    with pytest.raises(FileNotFoundError, match=path.name):
        load_checkpoint(path, run())
    path.mkdir()
    refused(path, run(), "cannot be read")


def test_other_parts_are_refused(path: Path):
    save_checkpoint(path, 1, run())
    fewer = run(seed=1)
    del fewer["critic"]
    refused(path, fewer, "holds", "critic", "this run needs")
    more = run(seed=1) | {"target_critic": nn.Linear(3, 2)}
    refused(path, more, "holds", "this run needs", "target_critic")


def adam(count: int) -> torch.optim.Adam:
    return torch.optim.Adam([nn.Parameter(torch.zeros(1)) for _ in range(count)])


@pytest.mark.parametrize(
    ("name", "part", "word"),
    [
        ("adapters", TrainableParameters(nn.Linear(3, 3)), "'weight'"),
        ("critic", nn.Linear(3, 5), "size mismatch for weight"),
        ("critic", nn.Bilinear(3, 3, 2), "size mismatch for weight"),
        ("optimizer", adam(2), "parameter group"),
        ("controller", nn.Linear(1, 1), "Missing key"),
        ("random", RandomStates(order=torch.Generator(), other=torch.Generator()), "other"),
    ],
)
def test_where_one_part_does_not_fit_nothing_is_loaded(
    path: Path, name: str, part: Stateful, word: str
):
    save_checkpoint(path, 1, run())
    refused(path, run(seed=1) | {name: part}, f"part {name!r} does not fit", word)


# --- parts --------------------------------------------------------------------------------------


def test_trainable_parameters_are_the_trained_ones():
    layer = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    part = TrainableParameters(layer)
    state = part.state_dict()
    assert list(state) == ["1.weight", "1.bias"]
    assert not any(value.requires_grad for value in state.values())
    frozen = layer[0].weight.clone()
    part.load_state_dict({"1.weight": torch.ones(1, 2), "1.bias": torch.zeros(1)})
    assert layer(torch.zeros(1, 2)).item() == pytest.approx(layer[0].bias.sum().item())
    assert (layer[0].weight == frozen).all()
    assert layer[1].weight.requires_grad


@pytest.mark.parametrize(
    ("saved", "word"),
    [
        ({"weight": torch.ones(1, 2)}, "bias"),
        ({"weight": torch.ones(1, 2), "bias": torch.ones(1), "more": torch.ones(1)}, "more"),
        ({"weight": torch.ones(1, 2), "bias": torch.ones(2)}, r"'bias', \(2,\)"),
        ({"weights": torch.ones(1, 2), "bias": torch.ones(1)}, "weights"),
    ],
)
def test_other_parameters_are_refused_and_none_is_copied(saved, word):
    layer = nn.Linear(2, 1)
    before = checkpoints.copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=f"not those of this model; they differ in .*{word}"):
        TrainableParameters(layer).load_state_dict(saved)
    same(layer.state_dict(), before)


def test_random_states_restore_the_draws():
    order = torch.Generator().manual_seed(3)
    part = RandomStates(order=order)
    torch.manual_seed(4)
    state = part.state_dict()

    def draws() -> list[torch.Tensor]:
        return [torch.rand(3), torch.randperm(9, generator=order), torch.randn(2)]

    first, later = draws(), draws()
    assert (first[0] != later[0]).any()
    part.load_state_dict(state)
    same(draws(), first)


@pytest.mark.parametrize("names", [(), ("order", "other"), ("orders",)])
def test_other_generators_are_refused(names: tuple[str, ...]):
    state = RandomStates(order=torch.Generator()).state_dict()
    before = torch.random.get_rng_state()
    part = RandomStates(**{name: torch.Generator() for name in names})
    with pytest.raises(ValueError, match=r"saved are of \[.*'order', 'torch'\], this run has"):
        part.load_state_dict(state)
    same(torch.random.get_rng_state(), before)
