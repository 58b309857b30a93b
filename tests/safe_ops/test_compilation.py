"""What compiling with a backend, or with none, gives."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from safe_ops.compilation import compile_with

GRAPHS: list[torch.fx.GraphModule] = []


@torch._dynamo.register_backend(name="safe_ops_test_counting")
def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
    GRAPHS.append(graph)
    return graph.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    GRAPHS.clear()
    yield
    torch.compiler.reset()


def shifted(x: Tensor) -> Tensor:
    return x.exp() + x.shape[0]


def test_none_is_the_function_itself() -> None:
    module = nn.Linear(2, 2)
    assert compile_with(shifted, None) is shifted
    assert compile_with(module, None) is module


# Inductor's own import of torch.utils.mkldnn warns.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", "safe_ops_test_counting"])
def test_a_backend_gives_what_the_function_gives(backend: str) -> None:
    compiled = compile_with(shifted, backend)
    for size in (2, 5):
        x = torch.arange(float(size))
        torch.testing.assert_close(compiled(x), shifted(x))


def test_a_module_is_compiled_with_its_parameters() -> None:
    module = nn.Linear(2, 3)
    x = torch.ones(4, 2)
    torch.testing.assert_close(compile_with(module, "safe_ops_test_counting")(x), module(x))
    assert len(GRAPHS) == 1


@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2), (False, 4)])
def test_dynamic_is_the_number_of_graphs(dynamic: bool | None, graphs: int) -> None:
    compiled = compile_with(shifted, "safe_ops_test_counting", dynamic=dynamic)
    for size in (2, 3, 4, 5):
        compiled(torch.ones(size))
    assert len(GRAPHS) == graphs


def test_what_cannot_be_captured_is_an_error_unless_a_cut_is_allowed() -> None:
    def looks(x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    x = torch.ones(3)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_with(looks, "safe_ops_test_counting")(x)
    torch.compiler.reset()
    cut = compile_with(looks, "safe_ops_test_counting", fullgraph=False)
    torch.testing.assert_close(cut(x), looks(x))


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(
        ValueError, match=r"registered backend, got 'inducter', registered: .*'aot_eager'.*inductor"
    ):
        compile_with(shifted, "inducter")
