"""The controller among accelerate's own checkpoint, by way of the example."""

from accelerate import Accelerator

from examples.accelerate_loop import main
from safe_ops.controllers import Controller
from tests.safe_ops.controllers.test_every_law import assert_same, every_law, run, stream


def test_kl_stays_near_its_threshold(tmp_path):
    def last(threshold):
        arguments = ["--output", str(tmp_path / threshold), "--threshold", threshold]
        rewards, kls, _ = zip(*main(arguments)[-50:], strict=True)
        return sum(rewards) / 50, sum(kls) / 50

    reward, kl = last("0.3")
    free_reward, free_kl = last("100")
    # Above the threshold by drift over gain.
    assert 0.3 < kl < 0.45
    assert free_kl > 1.0
    assert 1 / 16 + 0.05 < reward < free_reward


def test_resume_equals_no_interruption(tmp_path):
    whole = main(["--output", str(tmp_path / "whole"), "--steps", "40"])
    first = main(["--output", str(tmp_path / "cut"), "--steps", "15"])
    second = main(["--output", str(tmp_path / "cut"), "--steps", "40", "--resume"])
    assert first + second == whole


@every_law
def test_every_law_passes_through_save_state_bit_for_bit(law, names, tmp_path):
    accelerator, controller = Accelerator(cpu=True), Controller(law)
    accelerator.register_for_checkpointing(controller)
    measured = stream(names, 14)
    measured[3] = dict.fromkeys(names, float("nan"))
    for values in measured[:9]:
        controller(**values)
    accelerator.save_state(tmp_path)
    saved = controller.state
    assert saved.non_finite == 1
    controller(**measured[9])
    assert controller.state.step == saved.step + 1
    accelerator.load_state(tmp_path)
    assert_same(controller.state, saved)
    for values in measured[9:]:
        controller(**values)
    assert_same(controller.state, run(law, measured))
