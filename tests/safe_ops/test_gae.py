"""Against a float64 loop from the equations, and against what a critic must converge to."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from safe_ops import gae, generalized_advantage_estimate, set_compile_backend
from safe_ops._gae_rows import can_estimate
from safe_ops.compilation import compile_backend
from safe_ops.gae import BLOCK
from tests.reference.gae_loop import gae_loop
from tests.strategies import PROPERTY, bool_tensors, tensors

B, T = 2, 5
EXACT = {"rtol": 1e-12, "atol": 1e-12}

grids, flags, rows = tensors(B, T), bool_tensors(B, T), tensors(B)
units = st.floats(0.0, 1.0)


@pytest.fixture(autouse=True, params=["torch", "C"])
def way(request: pytest.FixtureRequest, eager_bodies: None) -> None:
    """With torch's operations, and in C."""
    if request.param == "C":
        set_compile_backend("inductor")
        if not can_estimate(torch.float32):
            pytest.skip("no C compiler")


def no_flags(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


def last_step(batch: int, steps: int) -> Tensor:
    flag = no_flags(batch, steps)
    flag[:, -1] = True
    return flag


# --- against the loop ---------------------------------------------------------------------------


@PROPERTY
@given(
    reward=grids,
    value=grids,
    mask=flags,
    terminated=flags,
    truncated=st.none() | flags,
    bootstrap_value=st.none() | rows,
    discount=units | tensors(B, T, low=0.0, high=1.0),
    gae_lambda=units | tensors(B, T, low=0.0, high=1.0),
)
def test_gae_is_the_loop(**arguments: Tensor) -> None:
    found = generalized_advantage_estimate(**arguments)
    advantage, target = gae_loop(**arguments)
    torch.testing.assert_close(found.advantage, advantage, **EXACT)
    torch.testing.assert_close(found.value_target, target, **EXACT)


@PROPERTY
@given(
    reward=grids,
    value=grids,
    mask=flags,
    terminated=flags,
    truncated=st.none() | flags,
    next_value=grids,
    discount=units,
    gae_lambda=units,
)
def test_gae_with_next_value_is_the_loop(**arguments: Tensor) -> None:
    found = generalized_advantage_estimate(**arguments)
    advantage, target = gae_loop(**arguments)
    torch.testing.assert_close(found.advantage, advantage, **EXACT)
    torch.testing.assert_close(found.value_target, target, **EXACT)


@PROPERTY
@given(
    reward=tensors(B, T, dtype=torch.float32),
    value=tensors(B, T, dtype=torch.float32),
    mask=flags,
    terminated=flags,
    discount=units,
    gae_lambda=units,
)
def test_gae_in_float32(**arguments: Tensor) -> None:
    found = generalized_advantage_estimate(**arguments)
    advantage, target = gae_loop(**arguments)
    assert found.advantage.dtype == torch.float32
    # Sums of up to 5 terms of size up to 30: 1e-5 is some ten units in the last place.
    torch.testing.assert_close(found.advantage, advantage.float(), rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(found.value_target, target.float(), rtol=1e-5, atol=3e-5)


def long_row(steps: int, dtype: torch.dtype = torch.float64, *, rows: int = 3) -> dict[str, Tensor]:
    """Holes and ends everywhere, but in the second row one step that counts, in the third none."""
    generator = torch.Generator().manual_seed(steps)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def sometimes(share: float) -> Tensor:
        return torch.rand(rows, steps, generator=generator) < share

    mask = sometimes(0.8)
    mask[1:2], mask[2:3] = torch.arange(steps) == steps // 2, False
    return {
        "reward": normal(rows, steps),
        "value": normal(rows, steps),
        "mask": mask,
        "terminated": sometimes(0.02),
        "bootstrap_value": normal(rows),
    }


# Around the size of a block, of a block of blocks, and beyond.
LENGTHS = (BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3, BLOCK**2 - 1, BLOCK**2 + 9, 700)


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("kind", ["plain", "truncated", "each_step", "next_value"])
def test_gae_of_many_blocks_is_the_loop(steps: int, kind: str) -> None:
    arguments: dict[str, Any] = long_row(steps) | {"discount": 0.99, "gae_lambda": 0.95}
    unit = torch.rand(3, steps, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if kind == "truncated":
        arguments["truncated"] = unit < 0.02
    if kind == "each_step":
        arguments |= {"discount": unit, "gae_lambda": unit.flip(1).round(decimals=1)}
    if kind == "next_value":
        arguments |= {"bootstrap_value": None, "next_value": unit}
    found = generalized_advantage_estimate(**arguments)
    for a, b in zip(found, gae_loop(**arguments), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("rows", [1, 4, 6, 9])
@pytest.mark.parametrize("steps", [127, 128, 129, 300])
def test_gae_of_any_number_of_rows_is_the_loop(rows: int, steps: int) -> None:
    arguments: dict[str, Any] = long_row(steps, rows=rows) | {"discount": 0.99}
    arguments["mask"][-1, steps // 2 :] = True
    found = generalized_advantage_estimate(**arguments)
    for a, b in zip(found, gae_loop(**arguments), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("truncated", [None, no_flags(3, 700)])
def test_gae_of_many_blocks_in_less_precision(dtype: torch.dtype, truncated: Tensor | None) -> None:
    arguments: dict[str, Any] = long_row(700, dtype) | {"truncated": truncated, "discount": 0.99}
    found = generalized_advantage_estimate(**arguments)
    # Sums of some twenty terms of size 1: a few units in the last place of float32, and one
    # rounding of the result.
    for a, b in zip(found, gae_loop(**arguments), strict=True):
        assert a.dtype == dtype
        tolerance = 5e-6 + torch.finfo(dtype).eps
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_gae_of_more_rows_than_are_worked_on_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = long_row(40)
    for discount in (0.9, torch.rand(40), torch.rand(3, 1), torch.rand(3, 40), torch.tensor(0.9)):
        arguments["discount"] = discount
        whole = generalized_advantage_estimate(**arguments)
        for cached in (1, 80):
            monkeypatch.setattr(gae, "CACHED", cached)
            parts = generalized_advantage_estimate(**arguments)
            torch.testing.assert_close(parts, whole, rtol=0, atol=0)
        monkeypatch.undo()


def test_gae_with_lambda_as_a_number_of_the_run() -> None:
    arguments: dict[str, Any] = long_row(40)
    found = generalized_advantage_estimate(**arguments, gae_lambda=torch.tensor(0.9))
    expected = generalized_advantage_estimate(**arguments, gae_lambda=torch.tensor(0.9).item())
    torch.testing.assert_close(found, expected)


def test_gae_leaves_its_arguments_alone() -> None:
    following = {"bootstrap_value": None, "next_value": torch.ones(3, 40).double()}
    for extra in ({}, {"truncated": no_flags(3, 40)}, following):
        arguments: dict[str, Any] = long_row(40) | extra | {"discount": torch.rand(3, 40).double()}
        arguments = {name: x for name, x in arguments.items() if x is not None}
        before = {name: x.clone() for name, x in arguments.items()}
        generalized_advantage_estimate(**arguments)
        torch.testing.assert_close(arguments, before, rtol=0, atol=0)


def test_gae_scan_is_a_torch_op() -> None:
    x, factor = torch.randn(3, 20), torch.rand(3, 20)
    torch.library.opcheck(torch.ops.safe_ops.gae_following.default, (x, factor, torch.ones(3)))


def test_gae_by_hand() -> None:
    # delta = (0 + .5*2 - 1, 3 - 2) = (0, 1); A = (0 + .5*.5*1, 1)
    found = generalized_advantage_estimate(
        torch.tensor([[0.0, 3.0]]),
        torch.tensor([[1.0, 2.0]]),
        mask=torch.ones(1, 2).bool(),
        terminated=last_step(1, 2),
        discount=0.5,
        gae_lambda=0.5,
    )
    torch.testing.assert_close(found.advantage, torch.tensor([[0.25, 1.0]]))
    torch.testing.assert_close(found.value_target, torch.tensor([[1.25, 3.0]]))


# --- special cases ------------------------------------------------------------------------------


@PROPERTY
@given(reward=grids, value=grids, bootstrap_value=rows, discount=units)
def test_gae_with_lambda_zero_is_the_one_step_error(
    reward: Tensor, value: Tensor, bootstrap_value: Tensor, discount: float
) -> None:
    found = generalized_advantage_estimate(
        reward,
        value,
        mask=torch.ones(B, T).bool(),
        terminated=no_flags(B, T),
        bootstrap_value=bootstrap_value,
        discount=discount,
        gae_lambda=0.0,
    )
    following = torch.cat([value[:, 1:], bootstrap_value.unsqueeze(1)], 1)
    torch.testing.assert_close(found.advantage, reward + discount * following - value, **EXACT)


@PROPERTY
@given(reward=grids, value=grids, discount=units)
def test_gae_with_lambda_one_is_the_return_over_the_value(
    reward: Tensor, value: Tensor, discount: float
) -> None:
    found = generalized_advantage_estimate(
        reward,
        value,
        mask=torch.ones(B, T).bool(),
        terminated=last_step(B, T),
        discount=discount,
        gae_lambda=1.0,
    )
    powers = torch.tensor(
        [[discount ** (u - t) if u >= t else 0.0 for t in range(T)] for u in range(T)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(found.value_target, reward @ powers, **EXACT)


@PROPERTY
@given(reward=grids, value=grids, mask=flags, units=units)
def test_gae_steps_over_what_is_masked(
    reward: Tensor, value: Tensor, mask: Tensor, units: float
) -> None:
    found = generalized_advantage_estimate(
        reward, value, mask=mask, terminated=no_flags(B, T), gae_lambda=units
    ).advantage
    assert (found[~mask] == 0).all()
    for row in range(B):
        kept = mask[row]
        count = int(kept.sum())
        alone = generalized_advantage_estimate(
            reward[row, kept].reshape(1, count),
            value[row, kept].reshape(1, count),
            mask=torch.ones(1, count).bool(),
            terminated=no_flags(1, count),
            gae_lambda=units,
        ).advantage
        torch.testing.assert_close(found[row, kept], alone[0], rtol=0, atol=0)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_gae_ignores_garbage_where_nothing_counts(garbage: float) -> None:
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])
    terminated = torch.tensor([[False, True, True, False], [True, False, False, False]])
    clean = torch.arange(8.0).reshape(2, 4)
    dirty = torch.where(mask, clean, torch.full_like(clean, garbage))
    # The first row has ended, so that nothing may be read from its bootstrap value either.
    found = generalized_advantage_estimate(
        dirty,
        dirty,
        mask=mask,
        terminated=terminated,
        bootstrap_value=torch.tensor([garbage, 2.0]),
    )
    expected = gae_loop(
        clean, clean, mask=mask, terminated=terminated, bootstrap_value=torch.tensor([0.0, 2.0])
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["reward", "value"])
def test_gae_what_is_not_finite_reaches_the_steps_before_it(name: str, bad: float) -> None:
    arguments: dict[str, Any] = long_row(300, rows=6)
    arguments["terminated"][4] = torch.arange(300) == 50
    arguments["mask"][4] = True
    clean = generalized_advantage_estimate(**arguments).advantage
    arguments[name][4, 200] = bad
    found = generalized_advantage_estimate(**arguments).advantage
    assert not found[4, 51:201].isfinite().any()
    # In C an end stops it; with torch's operations all steps before it are spoilt.
    spoilt = torch.zeros(6, 300).bool()
    spoilt[4, (51 if compile_backend() == "inductor" else 0) : 201] = True
    torch.testing.assert_close(found[~spoilt], clean[~spoilt], rtol=0, atol=0)


def test_gae_episodes_in_one_row_do_not_mix() -> None:
    terminated = torch.tensor([[False, True, False, True]])
    arguments = {"mask": torch.ones(1, 4).bool(), "terminated": terminated}
    reward, value = torch.tensor([[0.0, 1.0, 0.0, 5.0]]), torch.zeros(1, 4)
    before = generalized_advantage_estimate(reward, value, **arguments).advantage
    after = generalized_advantage_estimate(10 * reward, value, **arguments).advantage
    changed = generalized_advantage_estimate(
        torch.tensor([[0.0, 1.0, 0.0, 50.0]]), value, **arguments
    ).advantage
    torch.testing.assert_close(changed[:, :2], before[:, :2])
    torch.testing.assert_close(changed[:, 2:], after[:, 2:])


def test_gae_truncation_bootstraps_and_stops_the_recursion() -> None:
    truncated = torch.tensor([[False, True, False]])
    next_value = torch.tensor([[0.0, 7.0, 0.0]])
    found = generalized_advantage_estimate(
        torch.zeros(1, 3),
        torch.tensor([[0.0, 0.0, 100.0]]),
        mask=torch.ones(1, 3).bool(),
        terminated=torch.tensor([[False, False, True]]),
        truncated=truncated,
        next_value=next_value,
        gae_lambda=1.0,
    ).advantage
    torch.testing.assert_close(found, torch.tensor([[7.0, 7.0, -100.0]]))


def test_gae_is_detached() -> None:
    value = torch.ones(1, 2, requires_grad=True)
    found = generalized_advantage_estimate(
        torch.ones(1, 2, requires_grad=True),
        value,
        mask=torch.ones(1, 2).bool(),
        terminated=no_flags(1, 2),
        bootstrap_value=torch.ones(1, requires_grad=True),
    )
    assert not found.advantage.requires_grad
    assert not found.value_target.requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (1, 1), (7, 13)])
def test_gae_weird_shapes(shape: tuple[int, int]) -> None:
    found = generalized_advantage_estimate(
        torch.ones(shape),
        torch.ones(shape),
        mask=torch.ones(shape).bool(),
        terminated=no_flags(*shape),
    )
    assert found.advantage.shape == found.value_target.shape == shape


# --- what a critic converges to (facts 3.5) -----------------------------------------------------

STEPS = 8
SCORE = 0.5


def fit_constant_critic(start: float, updates: int, *, paid: bool, bootstraps: bool) -> float:
    """One number as critic, moved towards the mean target of responses that all hit the limit."""
    critic = start
    mask = torch.ones(4, STEPS).bool()
    end = last_step(4, STEPS)
    reward = SCORE * end.double() if paid else torch.zeros(4, STEPS).double()
    for _ in range(updates):
        found = generalized_advantage_estimate(
            reward,
            torch.full((4, STEPS), critic, dtype=torch.float64),
            mask=mask,
            terminated=no_flags(4, STEPS) if bootstraps else end,
            truncated=end if bootstraps else None,
            bootstrap_value=torch.full((4,), critic, dtype=torch.float64) if bootstraps else None,
        )
        critic += 0.5 * (found.value_target.mean().item() - critic)
    return critic


def test_constant_critic_of_scored_cut_responses_stays_at_the_truth() -> None:
    for updates in (1, 50):
        critic = fit_constant_critic(SCORE, updates, paid=True, bootstraps=False)
        assert critic == pytest.approx(SCORE, abs=1e-12)
    assert fit_constant_critic(0.0, 50, paid=True, bootstraps=False) == pytest.approx(SCORE)


def test_constant_critic_drifts_when_the_score_is_paid_and_bootstrapped_as_well() -> None:
    reached = [
        fit_constant_critic(SCORE, updates, paid=True, bootstraps=True)
        for updates in (50, 200, 400)
    ]
    # Each update adds the same amount: there is no fixed point.
    drift = [critic - SCORE for critic in reached]
    assert drift[0] > 5 * SCORE
    assert drift[1] == pytest.approx(4 * drift[0])
    assert drift[2] == pytest.approx(8 * drift[0])


def test_constant_critic_of_partial_rollouts_stays_at_the_truth_by_bootstrapping() -> None:
    assert fit_constant_critic(SCORE, 50, paid=False, bootstraps=True) == pytest.approx(SCORE)
    assert fit_constant_critic(SCORE, 50, paid=False, bootstraps=False) < 1e-3


# --- in C ---------------------------------------------------------------------------------------


def test_the_default_backend_goes_through_a_users_graph() -> None:
    set_compile_backend("auto")
    arguments: dict[str, Any] = long_row(40)
    compiled = torch.compile(
        generalized_advantage_estimate, backend="eager", fullgraph=True, dynamic=True
    )
    torch.testing.assert_close(compiled(**arguments), generalized_advantage_estimate(**arguments))
    torch.compiler.reset()


def test_what_is_traced_is_not_read_where_it_lies() -> None:
    arguments: dict[str, Any] = long_row(40)
    names, tensors = zip(*arguments.items(), strict=True)

    def advantage(*tensors: Tensor) -> Tensor:
        return generalized_advantage_estimate(**dict(zip(names, tensors, strict=True))).advantage

    expected = advantage(*tensors)
    traced = make_fx(advantage)(*[torch.zeros_like(x) for x in tensors])
    torch.testing.assert_close(traced(*tensors), expected)
