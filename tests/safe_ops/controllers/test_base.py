"""The Controller shell; what holds for every law is in test_every_law.py."""

import copy
import subprocess
import sys

import torch

from safe_ops.controllers import EMA, PID, AdaptiveKL, Controller, EntropyGatedKL, flatten_state


def test_state_dict_reads_as_the_flat_state():
    controller = Controller(EntropyGatedKL())
    flat = flatten_state(controller.state)
    assert list(controller.state_dict()) == list(flat)
    assert {"kl_threshold", "kl_coef", "pid__integral", "phases__history"} <= flat.keys()


def test_state_is_a_copy():
    controller = Controller(AdaptiveKL(target=0.1, initial_coef=1.0))
    before = controller.state
    new = controller(kl=1.0)
    assert before.coef == 1.0
    new.coef.zero_()
    assert controller.state.coef > 1.0


def test_two_controllers_of_one_law_are_apart():
    law = EMA()
    first, second = Controller(law), Controller(law)
    first(value=3.0)
    assert second.state.value == 0
    assert copy.deepcopy(first).state.value == 3.0


def test_a_new_state_takes_part_in_a_loss():
    # The coefficient is a constant of the loss, and later updates do not disturb the backward.
    controller = Controller(AdaptiveKL(target=0.1, initial_coef=1.0))
    kl = torch.tensor(0.5, requires_grad=True)
    loss = controller(kl=kl).coef * kl
    controller(kl=0.9)
    loss.backward()
    assert torch.equal(kl.grad, torch.tensor(1.02))


def test_moves_to_a_device():
    controller = Controller(EMA()).to("meta")
    assert {buffer.device.type for buffer in controller.buffers()} == {"meta"}
    assert {buffer.dtype for buffer in controller.buffers()} == {torch.float32, torch.int64}


def test_prints_its_law():
    assert "EMA(decay=0.5)" in repr(Controller(EMA(decay=0.5)))


def test_optional_measurements_are_known_to_the_controller():
    controller = Controller(PID(kp=1.0))
    assert controller.measurements == ("measurement",)
    assert controller.optional == ("setpoint", "lower", "upper")
    assert controller(measurement=1.0, setpoint=3.0).output == 2.0


def test_an_overflow_of_finite_measurements_is_refused():
    law = PID(kp=10.0)
    state = law.update(law.init(), measurement=1.0)
    after = law.update(state, measurement=3e38)
    assert torch.equal(after.output, state.output)
    assert (int(after.step), int(after.non_finite)) == (1, 1)


def test_a_number_that_float32_cannot_hold_is_refused_and_counted():
    for large in (1e300, 10**300):
        assert EMA().update(EMA().init(), value=large).non_finite == 1
    assert EMA().update(EMA().init(), value=2**70).value == 2.0**70


def test_needs_torch_alone():
    code = (
        "import sys, safe_ops.controllers; "
        "bad = {'tensordict', 'torchrl', 'transformers', 'safe_rl'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
