"""The controller among accelerate's own checkpoint, by way of the example."""

import torch
from accelerate import Accelerator

from examples.accelerate_loop import main
from safe_ops.controllers import AdaptiveKL, Controller, EntropyGatedKL


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


def test_every_law_passes_through_save_state_bit_for_bit(tmp_path):
    accelerator = Accelerator(cpu=True)
    gated, adaptive = Controller(EntropyGatedKL()), Controller(AdaptiveKL())
    accelerator.register_for_checkpointing(gated, adaptive)
    for update in range(12):
        gated(kl=0.1 * update, entropy=2.0 / (1 + update), reward=update / 3)
        adaptive(kl=float("nan") if update == 3 else 0.1 * update)
    accelerator.save_state(tmp_path)
    saved = [{k: v.clone() for k, v in c.state_dict().items()} for c in (gated, adaptive)]
    gated(kl=9.0, entropy=0.0, reward=-1.0)
    adaptive(kl=9.0)
    accelerator.load_state(tmp_path)
    for controller, before in zip((gated, adaptive), saved, strict=True):
        for name, buffer in controller.state_dict().items():
            assert torch.equal(buffer, before[name]), name
    assert adaptive.state.non_finite == 1
