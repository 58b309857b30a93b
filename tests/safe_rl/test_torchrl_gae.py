"""Our recursion behind TorchRL's signature, over the cases of TorchRL's own tests of theirs.

Where the two do not agree, and on purpose:

- ``terminated`` without ``done``: theirs lets the recursion go on behind it, ours stops. TorchRL's
  environments set ``done`` wherever they set ``terminated``.
- float64: a discount given as a float is rounded to float32 by theirs, 1e-7, and their vectorised
  form drops terms below 1e-7 besides, 5e-6. The loop is compared with discounts as tensors.
- half precision: their vectorised form returns float32, ours what it was given.
- lambda 0: their vectorised form raises IndexError.
"""

import itertools

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate as torchrl_loop,
)
from torchrl.objectives.value.functional import (
    vec_generalized_advantage_estimate as torchrl_vectorised,
)

from safe_ops import generalized_advantage_estimate


def adapter(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """TorchRL's [*B, T, *F] as our [B, T]: every feature is a row of its own."""
    terminated = done if terminated is None else terminated

    def rows(x: Tensor) -> Tensor:
        x = x.movedim(time_dim, -1)
        return x.reshape(-1, x.shape[-1])

    def per_step(x: float | Tensor) -> float | Tensor:
        return rows(x.expand_as(reward)) if isinstance(x, Tensor) and x.ndim else x

    found = generalized_advantage_estimate(
        rows(reward),
        rows(state_value),
        mask=torch.ones_like(rows(done)),
        terminated=rows(terminated),
        truncated=rows(done & ~terminated),
        next_value=rows(next_state_value),
        discount=per_step(gamma),
        gae_lambda=per_step(lmbda),
    )
    shape = reward.movedim(time_dim, -1).shape
    advantage, value_target = (x.reshape(shape).movedim(-1, time_dim) for x in found)
    return advantage, value_target


def exact_floats(*values: float) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def case(
    batch: tuple[int, ...],
    steps: int,
    features: int | tuple[int, ...],
    ends: str,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = (features,) if isinstance(features, int) else features
    shape = (*batch, steps, *features)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    done = torch.zeros(shape, dtype=torch.bool)
    terminated = torch.zeros(shape, dtype=torch.bool)
    if ends == "random":
        done = torch.rand(shape, generator=generator) < 0.15
        terminated = done & (torch.rand(shape, generator=generator) < 0.5)
    elif ends == "middle":
        time = len(batch)
        done.select(time, steps // 2).fill_(True)
        terminated.select(time, steps // 2).fill_(True)
        done.select(time, -1).fill_(True)
    return {
        "state_value": normal(),
        "next_state_value": normal(),
        "reward": normal(),
        "done": done,
        "terminated": terminated,
    }


# As test_gae and test_gae_multidim of TorchRL have them, and 1 beside their discounts.
NUMBERS = (0.1, 0.5, 0.99, 1.0)
SIZES = [((1,), steps) for steps in (1, 3, 5, 200)]
SIZES += [(features, steps) for features in ((5,), (2, 5)) for steps in (3, 100)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ends", ["none", "middle", "random"])
@pytest.mark.parametrize("batch", [(1,), (3,), (7, 3)])
@pytest.mark.parametrize(("features", "steps"), SIZES)
def test_one_discount(features, steps, batch, ends, dtype):
    given = case(batch, steps, features, ends, dtype)
    exact = {"rtol": 0, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    time = {"time_dim": -1 - len(features)}
    for gamma, lmbda in itertools.product(NUMBERS, NUMBERS):
        found = adapter(gamma, lmbda, **given, **time)
        vectorised = torchrl_vectorised(gamma, lmbda, **given, **time)
        assert_close(found, vectorised, rtol=1e-4, atol=1e-4)
        # Their loop takes its time: all of its lengths with one lambda, the short ones with all.
        if steps <= 5 or lmbda == gamma:
            looped = torchrl_loop(*exact_floats(gamma, lmbda), **given, **time)
            assert_close(found, tuple(x.to(dtype) for x in looped), **exact)


# As test_gae_param_as_tensor of TorchRL has them.
KINDS = {
    "scalar": lambda x, like: x,
    "tensor": lambda x, like: torch.full_like(like, x),
    "tensor_single_element": lambda x, like: torch.tensor([x], dtype=like.dtype),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ends", ["none", "random"])
@pytest.mark.parametrize("batch", [(1,), (8,), (7, 3)])
@pytest.mark.parametrize("lmbda_kind", KINDS)
@pytest.mark.parametrize("gamma_kind", KINDS)
def test_a_discount_as_a_tensor(gamma_kind, lmbda_kind, batch, ends, dtype):
    given = case(batch, 200, 1, ends, dtype)
    gamma = KINDS[gamma_kind](0.95, given["reward"])
    lmbda = KINDS[lmbda_kind](0.9, given["reward"])
    found = adapter(gamma, lmbda, **given)
    assert_close(found, torchrl_vectorised(0.95, 0.9, **given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ends", ["none", "middle", "random"])
@pytest.mark.parametrize("features", [1, 3])
@pytest.mark.parametrize("batch", [(1,), (4,), (2, 3)])
@pytest.mark.parametrize("which", ["gamma", "lmbda", "both"])
def test_a_discount_per_step(which, batch, features, ends):
    given = case(batch, 50, features, ends)
    generator = torch.Generator().manual_seed(1)
    shape = given["reward"].shape
    per_step = [torch.rand(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    gamma = 0.99 if which == "lmbda" else per_step[0]
    lmbda = 0.95 if which == "gamma" else per_step[1]
    found = adapter(gamma, lmbda, **given)
    # Theirs want both as tensors, or neither.
    together = [torch.as_tensor(x, dtype=torch.float64).expand(shape) for x in (gamma, lmbda)]
    assert_close(found, torchrl_loop(*together, **given), rtol=0, atol=1e-12)
    assert_close(found, torchrl_vectorised(*together, **given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("time_dim", [-2, -3, 0])
def test_time_anywhere(time_dim):
    given = case((4, 6), 6, 2, "random")
    found = adapter(0.9, 0.8, time_dim=time_dim, **given)
    assert_close(found, torchrl_loop(*exact_floats(0.9, 0.8), time_dim=time_dim, **given))


def test_terminated_may_be_left_out():
    given = case((4,), 20, 1, "random")
    given.pop("terminated")
    assert_close(adapter(0.9, 0.8, **given), torchrl_loop(*exact_floats(0.9, 0.8), **given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes(dtype):
    given = case((4,), 50, 1, "random", dtype)
    found = adapter(0.99, 0.95, **given)
    assert found[0].dtype == found[1].dtype == dtype
    expected = torchrl_loop(*exact_floats(0.99, 0.95), **given)
    assert_close(found, [x.to(dtype) for x in expected])


# --- where they do not agree --------------------------------------------------------------------


def test_terminated_ends_the_recursion_whatever_done_says():
    given = case((1,), 4, 1, "none")
    given["terminated"][:, 1] = True
    ours = adapter(0.9, 0.8, **given)[0]
    theirs = torchrl_loop(*exact_floats(0.9, 0.8), **given)[0]
    assert_close(ours[:, 2:], theirs[:, 2:])
    delta = given["reward"][:, 1] - given["state_value"][:, 1]
    assert_close(ours[:, 1], delta)
    assert_close(theirs[:, 1], delta + 0.9 * 0.8 * theirs[:, 2])


def test_bfloat16_stays():
    given = case((4,), 50, 1, "random", torch.bfloat16)
    ours, vectorised = adapter(0.99, 0.95, **given)[0], torchrl_vectorised(0.99, 0.95, **given)[0]
    assert (ours.dtype, vectorised.dtype) == (torch.bfloat16, torch.float32)
    exact = torchrl_loop(0.99, 0.95, **{k: v.double() if v.is_floating_point() else v
                                        for k, v in given.items()})[0]  # fmt: skip
    # Half a unit of the last of its eight bits.
    assert_close(ours.double(), exact, rtol=2**-8, atol=1e-6)


def test_float64_is_float64():
    given = case((4,), 50, 1, "none")
    ours = adapter(0.99, 0.95, **given)[0]
    exact = torchrl_loop(*exact_floats(0.99, 0.95), **given)[0]
    assert (ours - exact).abs().max() < 1e-13
    assert (torchrl_loop(0.99, 0.95, **given)[0] - exact).abs().max() > 1e-8
    assert (torchrl_vectorised(0.99, 0.95, **given)[0] - exact).abs().max() > 1e-8


def test_lambda_0_is_the_one_step_error():
    given = case((4,), 20, 1, "random")
    assert_close(adapter(0.9, 0.0, **given), torchrl_loop(*exact_floats(0.9, 0.0), **given))
    with pytest.raises(IndexError):
        torchrl_vectorised(0.9, 0.0, **given)
