"""From hidden states to the sum of the losses, controller and advantages included: one graph."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from safe_ops import linear_log_probs
from safe_ops.compilation import compile_with
from safe_ops.controllers import EntropyGatedKL
from safe_rl import (
    ControllerModule,
    PolicyMeasurements,
    SAFELoss,
    SoftMinCritic,
    SoftMinGAE,
    total_loss,
)
from safe_rl.controllers import one_of

HIDDEN, VOCABULARY = 16, 32
# Sums in another order, in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class LossPart(nn.Module):
    """All of an update that is ours, on the hidden states of a language model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Parameter(torch.randn(VOCABULARY, HIDDEN))
        self.critic = SoftMinCritic(HIDDEN)
        self.measure = PolicyMeasurements()
        self.control = ControllerModule(EntropyGatedKL(coef=1.0))
        self.advantages = SoftMinGAE(discount=0.99)
        self.loss = SAFELoss(token_kl_coef=0.1)

    def forward(self, hidden: Tensor, entries: dict[str, Tensor]) -> tuple[Tensor, TensorDict]:
        batch = TensorDict(entries, [hidden.shape[0]])
        # Without the mask: on a GPU, to leave rows out is to wait for their number.
        scored = linear_log_probs(hidden, self.head, batch["tokens"])
        batch["log_prob"], batch["entropy"] = scored
        batch["state_values"] = self.critic(hidden)
        batch = self.advantages(self.control(self.measure(batch)))
        return total_loss(self.loss(batch)), batch.select(
            "kl_coef", "kl_threshold", "advantage"
        ).detach()


def entries(rows: int, steps: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states, and a rollout of responses of other lengths at every call."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lengths = torch.randint(1, steps + 1, (rows, 1), generator=generator)
    mask = torch.arange(steps) < lengths
    last = torch.arange(steps) == lengths - 1
    reference = -3.0 + 0.1 * normal(rows, steps)
    return normal(rows, steps, HIDDEN), {
        "tokens": torch.randint(VOCABULARY, (rows, steps), generator=generator),
        "response_mask": mask,
        "ref_log_prob": reference,
        "old_log_prob": reference + torch.rand((), generator=generator),
        "score": normal(rows),
        "reward": (last * normal(rows, 1)).unsqueeze(-1),
        "terminated": last.unsqueeze(-1),
        "truncated": torch.zeros(rows, steps, 1, dtype=torch.bool),
    }


def sizes(step: int) -> tuple[int, int]:
    """From 2, as torch makes graphs of their own for 0 and 1; the first two differ, as it takes
    sizes that are equal at first for equal ever after."""
    return 2 + step % 7, 3 + (5 * step) % 41


class HostLooks(TorchDispatchMode):
    """Counts what makes the host wait for a value or for a shape that depends on values."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operations += 1
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


class Counting:
    """A backend that runs forward and backward graphs op by op, counting graphs and looks.

    After AOTAutograd: before it, each hyper-parameter that is a Python float stands in the graph as
    a tensor and its ``item``, which are gone afterwards.
    """

    def __init__(self) -> None:
        self.forwards = self.backwards = 0
        self.looks = HostLooks()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        return aot_autograd(fw_compiler=self.forward, bw_compiler=self.backward)(graph, inputs)

    def forward(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.forwards += 1
        return self.watched(graph)

    def backward(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.backwards += 1
        return self.watched(graph)

    def watched(self, graph: torch.fx.GraphModule) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with self.looks:
                return graph(*arguments)

        return make_boxed_func(run)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    # tensordict remembers the types it has met, and a graph guards the number of them.
    LossPart()(*entries(2, 2, seed=0))
    yield
    torch.compiler.reset()


def run(
    module: LossPart,
    compiled: Callable[..., Any],
    *,
    steps: int,
    compared: int,
    more: int = 0,
) -> None:
    """``steps`` updates, after the first under an error on recompilation.

    Some are compared with eager mode; sizes are larger by ``more``. In the first update the bodies
    inside ``linear_log_probs``, compiled for eager callers, are compiled for graphs too.
    """
    eager = LossPart()
    for step in range(steps):
        rows, length = sizes(step)
        hidden, batch = entries(rows + more, length + more, seed=step)
        for each in (module, eager):
            each.loss.entropy_coef = 0.01 / (1 + step)
            each.loss.clip = 0.2 / (1 + step % 5)
            each.loss.token_kl_coef = 0.1 * (1 + step % 3)
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss, decided = compiled(hidden, batch)
        loss.backward()
        if step < compared:
            expected, expected_decided = eager(hidden, batch)
            expected.backward()
            assert_close(loss, expected, **CLOSE)
            assert_close(decided.to_dict(), expected_decided.to_dict(), **CLOSE)
            assert_close(gradients(module), gradients(eager), **CLOSE)
            assert_close(module.state_dict(), eager.state_dict(), **CLOSE)
        module.zero_grad()
        eager.zero_grad()
    assert module.control.controller.state.step == steps


def gradients(module: LossPart) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def test_one_graph() -> None:
    graphs = []

    def capture(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    module = LossPart()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=capture)
    run(module, compiled, steps=15, compared=5)
    assert len(graphs) == 1


@pytest.mark.slow
def test_one_graph_and_no_look_at_a_value_in_a_thousand_steps() -> None:
    module, backend = LossPart(), Counting()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    run(module, compiled, steps=1000, compared=50)
    assert (backend.forwards, backend.backwards) == (1, 1)
    assert backend.looks.operations > 100 * 1000
    assert backend.looks.count == 0


def test_a_look_at_a_value_is_counted() -> None:
    looks = HostLooks()
    with looks:
        assert torch.ones(()).item() == 1
        assert torch.ones(2).any()
    assert looks.count == 2


@pytest.mark.slow
def test_aot_eager_gives_what_eager_gives() -> None:
    module = LossPart()
    run(module, compile_with(module, "aot_eager"), steps=4, compared=4)


@pytest.mark.slow
# Inductor's own import of torch.utils.mkldnn warns.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_gives_what_eager_gives() -> None:
    module = LossPart()
    # Below 32 tokens inductor multiplies in another way, with a graph of its own.
    run(module, compile_with(module, "inductor"), steps=6, compared=6, more=5)


@pytest.mark.slow
# Inductor's own import of torch.utils.mkldnn warns.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_makes_the_advantages_that_eager_makes() -> None:
    estimate = SoftMinGAE(discount=0.99)

    def advantage(entries: dict[str, Tensor]) -> Tensor:
        return estimate(TensorDict(entries, entries["reward"].shape[:1]))["advantage"]

    compiled = compile_with(advantage, "inductor")
    # From 3 rows: at first they must not be as many as the two heads.
    for step in range(1, 4):
        hidden, batch = entries(*sizes(step), seed=step)
        batch["state_values"] = hidden[..., :2]
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_close(compiled(batch), advantage(batch), **CLOSE)


def test_in_a_graph_a_measurement_that_was_not_reduced_is_refused_by_the_law() -> None:
    compiled = torch.compile(lambda x: one_of("kl", x), fullgraph=True, backend="eager")
    assert compiled(torch.tensor([0.1, 0.2, 0.3])).isnan()
    assert compiled(torch.full((3,), 0.5)) == 0.5


def test_in_a_graph_a_truncated_row_without_a_value_is_nan() -> None:
    hidden, batch = entries(3, 5, seed=0)
    batch["state_values"] = hidden[..., :2]
    batch["truncated"] = batch["terminated"] & torch.tensor([True, False, False]).reshape(3, 1, 1)
    batch["terminated"] = batch["terminated"] & ~batch["truncated"]
    estimate = SoftMinGAE(average_gae=False)

    @torch.compile(fullgraph=True, backend="eager")
    def advantage(entries: dict[str, Tensor]) -> Tensor:
        return estimate(TensorDict(entries, [3]))["advantage"].squeeze(-1)

    found, mask = advantage(batch), batch["response_mask"]
    assert found[0][mask[0]].isnan().all()
    assert found[1:].isfinite().all()


def chain() -> TensorDictSequential:
    """From a scored rollout to the losses, TensorDict to TensorDict."""
    return TensorDictSequential(
        PolicyMeasurements(),
        ControllerModule(EntropyGatedKL(coef=1.0)),
        SoftMinGAE(discount=0.99),
        SAFELoss(clip=(0.2, 0.3), value_clip=0.2, token_kl_coef=0.1),
    )


def scored(step: int) -> TensorDict:
    """Keys in another order at every step, in a batch of another size."""
    hidden, given = entries(*sizes(step), seed=step)
    given["log_prob"] = given["old_log_prob"] + 0.01 * hidden[..., 0]
    given["entropy"] = hidden[..., 1].abs()
    given["state_values"] = hidden[..., 2:4].clone()
    given["old_state_values"] = hidden[..., 4:6].clone()
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(step)).tolist()
    names = list(given)
    batch = TensorDict({names[place]: given[names[place]] for place in order}, [hidden.shape[0]])
    batch.pop("tokens")
    return batch


def test_the_chain_of_modules_is_one_graph() -> None:
    graphs, orders = [], set()

    def capture(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    eager, module = chain(), chain()
    # tensordict remembers what it has met, and a graph guards it.
    chain()(scored(1))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=capture)
    # From 3 rows: at first they must not be as many as the two heads.
    for step in range(1, 9):
        for each in (eager, module):
            each[-1].entropy_coef = 0.01 / (1 + step)
            each[-1].value_coef = 0.5 * (1 + step)
            each[-1].clip = (0.2 / step, 0.3 / step)
            each[-1].value_clip = 0.5 / step
        batch = scored(step)
        orders.add(tuple(batch.keys()))
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(batch)
        assert_close(found.to_dict(), eager(scored(step)).to_dict(), **CLOSE)
    assert len(orders) == 8
    assert len(graphs) == 1
    assert module[1].controller.state.step == 8
