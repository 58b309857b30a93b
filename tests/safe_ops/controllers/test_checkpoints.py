"""Save, load, continue: bit for bit, through the ways in which a trainer saves."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from safe_ops.controllers import PID, Controller, EntropyGatedKL, Momentum, Phase, flatten_state
from tests.safe_ops.controllers.test_every_law import assert_same, every_law, run, stream

LAW = EntropyGatedKL(
    trend_weight=0.5,
    momentum=Momentum(window=3),
    velocity=Momentum(window=2),
    kl_integral=PID(ki=0.1, lower=0.0, upper=0.2),
    phases=Phase(warm_up=4, window=3, dwell=2),
)


class Model(torch.nn.Module):
    """A policy and its controller, as a trainer holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = torch.nn.Linear(2, 2)
        self.controller = Controller(LAW)


def move(controller: Controller, first: int, last: int) -> None:
    wave = torch.arange(3 * last).sin().add(1.0).reshape(last, 3)
    for kl, entropy, reward in wave[first:last]:
        controller(kl=kl, entropy=entropy, reward=reward)


def assert_uninterrupted(controller: Controller, steps: int) -> None:
    whole = Controller(LAW)
    move(whole, 0, steps)
    expected = flatten_state(whole.state)
    for name, leaf in flatten_state(controller.state).items():
        assert leaf.dtype == expected[name].dtype
        assert torch.equal(leaf, expected[name]), name


def test_through_a_cast_of_the_model(tmp_path):
    model = Model()
    move(model.controller, 0, 9)
    model.bfloat16()
    move(model.controller, 9, 14)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = Model().bfloat16()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    move(other.controller, 14, 20)
    assert_uninterrupted(other.controller, 20)


# Without a process group it says that it saves from one process.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@every_law
def test_every_law_passes_through_torch_distributed_checkpoint(law, names, tmp_path):
    def model():
        parts = {"policy": torch.nn.Linear(2, 2), "controller": Controller(law)}
        return torch.nn.ModuleDict(parts).bfloat16()

    measured = stream(names, 14)
    measured[3] = dict.fromkeys(names, float("nan"))
    first, second = model(), model()
    for values in measured[:9]:
        first["controller"](**values)
    dcp.save({"model": first.state_dict()}, checkpoint_id=tmp_path)
    state = {"model": second.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    second.load_state_dict(state["model"])
    assert_same(second["controller"].state, first["controller"].state)
    for values in measured[9:]:
        second["controller"](**values)
    assert_same(second["controller"].state, run(law, measured))


@pytest.fixture
def _no_accelerator_left() -> Iterator[None]:
    yield
    # Its state belongs to the process: the next test would inherit it.
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_no_accelerator_left")
@pytest.mark.parametrize("registered", [False, True])
def test_through_accelerate(registered, tmp_path):

    def prepared() -> tuple[Accelerator, Controller]:
        accelerator, model = Accelerator(cpu=True), Model()
        if registered:
            # A controller beside the model.
            accelerator.register_for_checkpointing(model.controller)
            accelerator.prepare(model.policy)
        else:
            # A controller inside the model.
            model = accelerator.prepare(model.bfloat16())
        return accelerator, model.controller

    accelerator, controller = prepared()
    move(controller, 0, 9)
    accelerator.save_state(str(tmp_path))
    move(controller, 9, 12)
    accelerator, controller = prepared()
    accelerator.load_state(str(tmp_path))
    move(controller, 9, 20)
    assert_uninterrupted(controller, 20)
