"""The laws and the whole loss part on a GPU: what a CPU gives, and no wait."""

import math

import pytest
import torch
from packaging.version import Version
from torch.testing import assert_close

from safe_ops.compilation import compile_with
from safe_ops.controllers import Controller, flatten_state
from tests.safe_ops.controllers.test_every_law import every_law, run, stream
from tests.safe_rl.test_one_graph import CLOSE, LossPart, entries, gradients, sizes


@every_law
def test_law_gives_what_it_gives_on_a_cpu_and_does_not_wait(law, names, gpu, no_waits) -> None:
    measured = [*stream(names, 40), dict.fromkeys(names, math.nan), *stream(names, 5, offset=40)]
    expected = flatten_state(run(law, measured))
    for floats in (True, False):
        there = [
            {k: float(v) if floats else torch.as_tensor(v).to(gpu) for k, v in m.items()}
            for m in measured
        ]
        controller = Controller(law).to(gpu)
        controller(**there[0])
        with no_waits():
            for m in there[1:]:
                controller(**m)
        found = flatten_state(controller.state)
        for name, value in expected.items():
            assert found[name].device.type == gpu.type
            assert_close(found[name].cpu(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_whole_loss_part_is_one_graph_that_does_not_wait(backend, gpu, no_waits) -> None:
    if backend == "inductor" and Version(torch.__version__) < Version("2.13"):
        pytest.skip("inductor does not view bool tensors before torch 2.13")
    torch.compiler.reset()
    LossPart()(*entries(2, 2, seed=0))
    module, eager = LossPart().to(gpu), LossPart().to(gpu)
    compiled = compile_with(module, backend)
    for step in range(30):
        rows, length = sizes(step)
        hidden, batch = entries(rows + 5, length + 5, seed=step)
        hidden, batch = hidden.to(gpu), {k: v.to(gpu) for k, v in batch.items()}
        for each in (module, eager):
            each.loss.entropy_coef = 0.01 / (1 + step)
        if step < 2:
            loss, _ = compiled(hidden, batch)
            loss.backward()
        else:
            with torch._dynamo.config.patch(error_on_recompile=True), no_waits():
                loss, _ = compiled(hidden, batch)
                loss.backward()
        expected, _ = eager(hidden, batch)
        expected.backward()
        assert_close(loss, expected, **CLOSE)
        assert_close(gradients(module), gradients(eager), **CLOSE)
        module.zero_grad()
        eager.zero_grad()
    assert module.control.controller.state.step == 30
    torch.compiler.reset()
