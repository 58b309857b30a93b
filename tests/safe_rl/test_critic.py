import pytest
import torch
from torch.testing import assert_close

from safe_ops import soft_min
from safe_rl import SoftMinCritic


def critic(**arguments) -> SoftMinCritic:
    torch.manual_seed(0)
    return SoftMinCritic(16, **arguments)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16), (0, 16)])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_shapes(shape, heads):
    hidden = torch.randn(shape)
    assert critic(num_heads=heads)(hidden).shape == (*shape[:-1], heads)
    assert critic(num_heads=heads).value(hidden).shape == shape[:-1]


def test_heads_start_near_zero_and_differ():
    values = critic()(torch.randn(1000, 16))
    assert values.abs().max() < 0.5
    difference = (values[:, 0] - values[:, 1]).abs()
    assert (difference > 1e-6).all()
    assert difference.mean() > 1e-3


def test_value_is_the_soft_min_of_the_heads():
    hidden = torch.randn(4, 16)
    module = critic(temperature=0.1)
    assert_close(module.value(hidden), soft_min(module(hidden), 0.1), rtol=0, atol=0)


def test_against_the_equation():
    """LayerNorm, then H -> H/4 -> 1 with a GELU, head by head, written out in float64."""
    module = critic().double()
    hidden = torch.randn(3, 16, dtype=torch.float64)
    normed = (hidden - hidden.mean(-1, keepdim=True)) / (
        hidden.var(-1, correction=0, keepdim=True) + module.norm.eps
    ).sqrt()
    columns = []
    for k in range(2):
        own = slice(4 * k, 4 * (k + 1))
        inner = normed @ module.first.weight[own].T + module.first.bias[own]
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        columns.append(inner @ module.last_weight[k] + module.last_bias[k])
    assert module.first.weight.shape == (8, 16)
    assert_close(module(hidden), torch.stack(columns, -1))


def test_each_head_has_parameters_of_its_own():
    module = critic()
    values = module(torch.randn(4, 16))
    values[:, 0].sum().backward()
    stacked = (*module.first.parameters(), module.last_weight, module.last_bias)
    for first, second in (p.grad.chunk(2) for p in stacked):
        assert first.any()
        assert not second.any()


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_hidden_states_of_any_scale(scale):
    hidden = torch.randn(4, 16)
    module = critic()
    assert_close(module(scale * hidden), module(hidden), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("given", "made"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_dtypes(given, made):
    assert critic()(torch.randn(2, 16).to(given)).dtype == torch.float32
    assert critic().to(given)(torch.randn(2, 16).to(given)).dtype == made


def test_tiny_hidden_size():
    assert SoftMinCritic(2)(torch.randn(3, 2)).shape == (3, 2)


def test_one_graph():
    module, hidden = critic(), torch.randn(2, 3, 16)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_close(compiled(hidden), module(hidden))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 0}, "must be positive, got 0, 2"),
        ({"hidden_size": 8, "num_heads": 0}, "must be positive, got 8, 0"),
        ({"hidden_size": 8, "temperature": 0.0}, r"temperature must be positive, got 0\.0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        SoftMinCritic(**arguments)
