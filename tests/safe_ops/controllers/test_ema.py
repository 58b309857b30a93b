import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from safe_ops.controllers import EMA

numbers = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12)


def run(law, values):
    state = law.init()
    for value in values:
        state = law.update(state, value=value)
    return state


def test_by_hand():
    # d = 0.5: weights 1/2, 1/4, 1/8 of newest to oldest, over their sum 7/8.
    assert run(EMA(decay=0.5), [8.0, 4.0, 1.0]).value == pytest.approx((1 / 2 + 1 + 1) / (7 / 8))


@settings(max_examples=40, deadline=None)
@given(numbers, st.floats(0, 0.99))
def test_is_the_bias_corrected_average(values, decay):
    raw = 0.0
    for x in values:
        raw = decay * raw + (1 - decay) * x
    expected = raw / (1 - decay ** len(values))
    assert float(run(EMA(decay=decay), values).value) == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.9, 0.999])
def test_exact_from_the_first_and_constant_on_a_constant(decay):
    for count in (1, 2, 30):
        assert torch.equal(run(EMA(decay=decay), [0.3] * count).value, torch.tensor(0.3))


@settings(max_examples=40, deadline=None)
@given(numbers)
def test_stays_within_what_it_saw(values):
    value = float(run(EMA(decay=0.9), values).value)
    assert min(values) - 1e-4 <= value <= max(values) + 1e-4


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_is_checked(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got"):
        EMA(decay=decay)
