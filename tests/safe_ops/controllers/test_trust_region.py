import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from safe_ops.controllers import EMA, TrustRegion, trust_region_scale


def run(law, values):
    states = [law.init()]
    for step_kl in values:
        states.append(law.update(states[-1], step_kl=step_kl))
    return states[1:]


def test_by_hand():
    # Filter: 2, then (0.5*0.5 + 0.25*2)/0.75 = 1; growth holds the third at 1.2 * sqrt(0.5).
    law = TrustRegion(limit=0.5, growth=1.2, filter=EMA(decay=0.5))
    states = run(law, [2.0, 0.5, 0.0])
    assert float(states[0].scale) == pytest.approx(0.5)
    assert float(states[1].predicted_kl) == pytest.approx(1.0)
    assert float(states[1].scale) == pytest.approx(0.6)
    assert float(states[1].scaled_kl) == pytest.approx(0.36 * 0.5)
    assert float(states[2].scale) == pytest.approx(0.72)
    assert [int(s.limited) for s in states] == [1, 2, 3]


def test_a_scaled_step_has_the_kl_of_the_limit():
    # A real step of a softmax policy: KL before and after scaling.
    logits = torch.tensor([0.5, -0.2, 0.1, 0.0], dtype=torch.float64)
    change = torch.tensor([0.30, -0.10, 0.20, -0.30], dtype=torch.float64)

    def kl(scale):
        before, after = logits.log_softmax(0), (logits + scale * change).log_softmax(0)
        return (before.exp() * (before - after)).sum()

    limit = 0.25 * float(kl(1.0))
    scale = trust_region_scale(kl(1.0), limit)
    assert float(scale) == pytest.approx(0.5)
    assert float(kl(scale)) == pytest.approx(limit, rel=0.05)
    # The paper's linear scale would leave a quarter of what was allowed.
    assert float(kl(scale.square())) == pytest.approx(limit / 4, rel=0.05)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.9]),
    st.sampled_from([1.5, math.inf]),
)
def test_no_accepted_step_exceeds_the_limit(values, decay, growth):
    law = TrustRegion(limit=0.5, growth=growth, filter=EMA(decay=decay))
    for state in run(law, values):
        assert 0 <= float(state.scale) <= 1
        assert float(state.scaled_kl) <= 0.5 * (1 + 1e-5)


def test_the_default_forgets_an_outlier_and_a_filter_does_not():
    assert run(TrustRegion(), [50.0, 0.1])[-1].scale == 1.0
    assert run(TrustRegion(filter=EMA(decay=0.9)), [50.0, 0.1])[-1].scale < 0.2


def test_scale_is_differentiable_where_it_acts_and_where_it_does_not():
    kl = torch.tensor([0.0, 0.25, 2.0], dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(trust_region_scale(kl, 0.5).sum(), kl)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, -0.125], dtype=torch.float64))


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        ({"limit": 0.0}, "limit must be positive and finite, got 0.0"),
        ({"limit": math.inf}, "limit must be positive and finite"),
        ({"growth": 1.0}, "growth must be above 1, got 1.0"),
    ],
)
def test_parameters_are_checked(gains, message):
    with pytest.raises(ValueError, match=message):
        TrustRegion(**gains)
