import math

import pytest
import torch

from safe_ops.controllers import PID, AdaptiveKL, Controller, EntropyGatedKL
from safe_rl.integrations.kl_coefficient import KLCoefficient


def test_follows_the_law_whatever_the_number_of_samples():
    coefficient = KLCoefficient(Controller(AdaptiveKL(target=0.1, initial_coef=2.0)))
    values = []
    for kl, samples in [(0.5, 1), (torch.tensor(0.11), 4096), (0.0, 16)]:
        coefficient.update(kl, samples)
        values.append(coefficient.value)
    assert values == pytest.approx([2.0 * 1.02, 2.0 * 1.02 * 1.01, 2.0 * 1.02 * 1.01 * 0.98])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_kl_is_held(bad):
    coefficient = KLCoefficient(Controller(AdaptiveKL(target=0.1, initial_coef=2.0)))
    coefficient.update(bad, 1)
    assert coefficient.value == 2.0
    coefficient.update(0.5, 1)
    assert coefficient.value == pytest.approx(2.04)


def test_state_passes_through_a_file(tmp_path):
    def new():
        return KLCoefficient(Controller(PID(kp=1.0, setpoint=0.5)), coef="output")

    first, second = new(), new()
    first.update(0.2, 1)
    torch.save(first.state_dict(), tmp_path / "kl.pt")
    second.load_state_dict(torch.load(tmp_path / "kl.pt"))
    assert second.value == first.value == pytest.approx(0.3)


def test_a_law_of_several_measurements_is_refused():
    with pytest.raises(ValueError, match="EntropyGatedKL needs kl, entropy, reward"):
        KLCoefficient(Controller(EntropyGatedKL()), coef="kl_coef")


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="state of AdaptiveKL, got 'output'"):
        KLCoefficient(Controller(AdaptiveKL()), coef="output")


@pytest.mark.parametrize(("convert", "graphs"), [(torch.tensor, [1, 1, 1]), (float, [1, 2, 3])])
def test_a_compiled_law_makes_one_graph_more_of_floats(convert, graphs):
    torch.compiler.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    law = AdaptiveKL(target=0.1, initial_coef=0.5)
    eager, inner = Controller(law), Controller(law)
    compiled = torch.compile(inner, fullgraph=True, backend=backend)
    seen = []
    # One value; others, 0 and 1 among them; one that is not a number, and what follows it.
    for values in ([0.3], [0.2, 0.1, 0.0, 1.0, 7.0], [math.nan, 0.4, math.nan]):
        for value in values:
            assert compiled(kl=convert(value)).coef == pytest.approx(float(eager(kl=value).coef))
        seen.append(len(made))
    assert seen == graphs
