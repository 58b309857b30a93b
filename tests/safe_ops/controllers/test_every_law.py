"""What every control law promises. A new law is one row of LAWS."""

import ast
import copy
import dataclasses
import inspect
import math
import operator
import pickle
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils._pytree import tree_map

from safe_ops.controllers import (
    EMA,
    PID,
    AdaptiveKL,
    Controller,
    EntropyGatedKL,
    Momentum,
    Phase,
    PIDLagrangian,
    TrustRegion,
    flatten_state,
)
from tests.benchmarks.bench_controllers import CountOperations
from tests.benchmarks.measure import resident_bytes

SHORT = EntropyGatedKL(
    momentum=Momentum(window=3),
    velocity=Momentum(window=2),
    kl_integral=PID(ki=0.1, lower=0.0, upper=0.2),
    trend_weight=0.5,
    entropy_floor=0.5,
    entropy_ceiling=0.9,
    phases=Phase(warm_up=4, window=3, dwell=2),
)
GATED = ("kl", "entropy", "reward")
LAWS = {
    "ema": (EMA(decay=0.9), ("value",)),
    "momentum": (Momentum(window=3), ("value",)),
    "pid": (PID(kp=0.5, ki=0.1, kd=0.2, lower=-1.0, upper=1.0, rate_limit=0.3), ("measurement",)),
    "phase": (Phase(warm_up=4, window=3, dwell=2), ("reward",)),
    "adaptive_kl": (AdaptiveKL(), ("kl",)),
    "pid_lagrangian": (PIDLagrangian(limit=0.6, kd=0.2, upper=1.0, rate_limit=0.3), ("cost",)),
    "trust_region": (TrustRegion(limit=0.5, growth=1.5, filter=EMA(decay=0.5)), ("step_kl",)),
    "entropy_gated": (SHORT, GATED),
    "entropy_gated_paper": (EntropyGatedKL.paper(), GATED),
}
every_law = pytest.mark.parametrize(("law", "names"), LAWS.values(), ids=LAWS)
any_float = st.floats(width=32)


def stream(names, length, offset=0):
    """Deterministic, lively measurements: a wave per name."""
    return [
        {
            name: torch.tensor(0.6 + 0.5 * math.sin(0.9 * t + i), dtype=torch.float32)
            for i, name in enumerate(names)
        }
        for t in range(offset, offset + length)
    ]


def run(law, measurements, state=None):
    state = law.init() if state is None else state
    for measured in measurements:
        state = law.update(state, **measured)
    return state


def assert_same(a, b, *, ignore=()):
    a, b = flatten_state(a), flatten_state(b)
    assert a.keys() == b.keys()
    for name in a:
        if name.split("__")[-1] not in ignore:
            assert torch.equal(a[name], b[name]), f"{name}: {a[name]} and {b[name]}"


def assert_as_rounded(a, b, *, ignore=()):
    """The same but for where float64's numbers are rounded to float32, and what comes of it."""
    a, b = flatten_state(a), flatten_state(b)
    assert a.keys() == b.keys()
    for name in a:
        if name.split("__")[-1] not in ignore:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6, msg=name)


@every_law
def test_law_is_frozen_and_pickles(law, names):
    assert pickle.loads(pickle.dumps(law)) == law == eval(repr(law), globals(), {"inf": math.inf})
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(law, dataclasses.fields(law)[0].name, 0.0)


BAD_GAINS = {
    EMA: {"decay": 1.0},
    Momentum: {"window": 0},
    PID: {"kp": -1.0},
    Phase: {"dwell": 0},
    AdaptiveKL: {"target": 0.0},
    PIDLagrangian: {"ki": math.inf},
    TrustRegion: {"limit": math.nan},
    EntropyGatedKL: {"threshold": 0.7},
}


@every_law
def test_gains_are_checked_when_set(law, names):
    [(name, value)] = BAD_GAINS[type(law)].items()
    with pytest.raises(ValueError, match=f"{name} .*{value}"):
        dataclasses.replace(law, **{name: value})


@every_law
def test_every_part_of_the_state_says_what_it_is(law, names):
    """A docstring under the field, with its unit, or the unit of all in that of the class."""
    kind = type(law.init())
    [described] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(described, ast.ClassDef)
    fields = [x.target.id for x in described.body if isinstance(x, ast.AnnAssign)]
    assert tuple(fields) == kind._fields
    texts = [
        node.value.value
        for node in ast.walk(described)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    assert any(re.search(r"unit|[Nn]ats", text) for text in texts), kind


@every_law
def test_update_is_pure(law, names):
    state = run(law, stream(names, 6))
    before = copy.deepcopy(state)
    [measured] = stream(names, 1, offset=6)
    new = law.update(state, **measured)
    kept = copy.deepcopy(new)
    assert_same(law.update(state, **measured), new)
    assert_same(state, before)
    # What it was given is not what it keeps.
    for value in measured.values():
        value.fill_(7.0)
    assert_same(new, kept)


@every_law
def test_state_shapes_and_dtypes_are_fixed(law, names):
    first = flatten_state(law.init())
    assert {"step", "non_finite"} <= first.keys()
    for measured in (*stream(names, 9), dict.fromkeys(names, math.nan)):
        state = flatten_state(run(law, [measured]))
        for name, leaf in first.items():
            assert leaf.dtype in (torch.float32, torch.int64)
            assert leaf.ndim <= 1
            assert (state[name].dtype, state[name].shape) == (leaf.dtype, leaf.shape), name


@every_law
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(law, names, dtype):
    expected = run(law, stream(names, 30))
    torch.set_default_dtype(dtype)
    try:
        found = run(law, [{k: float(v) for k, v in m.items()} for m in stream(names, 30)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(found, expected)
    assert {leaf.dtype for leaf in flatten_state(found).values()} == {torch.float32, torch.int64}


@every_law
def test_floats_and_tensors_are_the_same(law, names):
    floats = [{k: float(v) for k, v in measured.items()} for measured in stream(names, 6)]
    assert_same(run(law, floats), run(law, stream(names, 6)))


@every_law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_at_once_under_vmap(law, names, dtype):
    """Nothing is known there, as on a GPU and in a graph: whatever looks at a value fails."""
    measured = [*stream(names, 20), dict.fromkeys(names, torch.tensor(math.nan))]
    measured += [dict.fromkeys(names, torch.tensor(0.7))] * 15 + stream(names, 20)
    expected = [run(law, measured[start:]) for start in (0, 1, 2)]
    torch.set_default_dtype(dtype)
    try:
        states = [flatten_state(law.init()).values() for _ in expected]
        stacked = iter([torch.stack(leaves) for leaves in zip(*states, strict=True)])
        state = tree_map(lambda _: next(stacked), law.init())
        step = torch.func.vmap(lambda state, measured: law.update(state, **measured))
        longest = len(measured)
        for t in range(longest):
            # The shorter ones begin later: their first calls are refused.
            now = {
                name: torch.stack(
                    [
                        measured[t][name] if t >= start else torch.tensor(math.nan)
                        for start in (0, 1, 2)
                    ]
                )
                for name in names
            }
            state = step(state, now)
    finally:
        torch.set_default_dtype(torch.float32)
    for index, one in enumerate(expected):
        found = tree_map(operator.itemgetter(index), state)
        assert_as_rounded(found, one, ignore=("non_finite",))


@every_law
def test_gradients_end_at_the_law(law, names):
    leaf = torch.tensor(0.7, requires_grad=True)
    state = law.update(law.init(), **dict.fromkeys(names, leaf))
    assert not any(tensor.requires_grad for tensor in flatten_state(state).values())


@every_law
def test_controller_moves_once_per_call_as_the_law_does(law, names):
    controller = Controller(law)
    for t, measured in enumerate(stream(names, 7), 1):
        new = controller(**measured)
        assert int(new.step) == t
        assert_same(new, controller.state)
        assert_same(new, run(law, stream(names, t)))


@every_law
def test_compiled_is_eager_and_never_recompiles(law, names):
    eager, inner = Controller(law), Controller(law)
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(inner, fullgraph=True, backend=backend)
    hole = {name: torch.tensor(math.nan) for name in names}
    for t, measured in enumerate([*stream(names, 9), hole, *stream(names, 9)]):
        assert_as_rounded(eager(**measured), compiled(**measured))
        if t == 12:
            inner.load_state_dict(eager.state_dict())
    assert_as_rounded(eager.state, inner.state)
    assert len(graphs) == 1


@every_law
def test_save_load_continue_is_uninterrupted(law, names, tmp_path):
    whole, first, second = Controller(law), Controller(law), Controller(law)
    measured = stream(names, 14)
    for m in measured:
        whole(**m)
    for m in measured[:7]:
        first(**m)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for m in measured[7:]:
        second(**m)
    assert_same(whole.state, second.state)


@every_law
def test_update_never_waits_for_the_device(law, names):
    # On the meta device a value cannot be read: .item(), bool() and indexing by a tensor all raise.
    controller = Controller(law).to("meta")
    state = controller(**{name: torch.tensor(0.5, device="meta") for name in names})
    for name, leaf in flatten_state(state).items():
        assert leaf.device.type == "meta", name


@every_law
def test_a_cpu_computes_in_pythons_numbers(law, names):
    # An operation on a tensor of one number takes as long as fifty of Python.
    state, [measured] = law.init(), stream(names, 1)
    with CountOperations() as counter:
        law.update(state, **measured)
    assert counter.count <= 5


@every_law
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_cast_leaves_the_state(law, names, cast):
    controller = Controller(law)
    for measured in stream(names, 5):
        controller(**measured)
    before = controller.state
    model = torch.nn.ModuleDict({"policy": torch.nn.Linear(2, 2), "controller": controller})
    getattr(model, cast)()
    model.to(torch.bfloat16)
    assert model["policy"].weight.dtype == torch.bfloat16
    assert_same(controller.state, before)
    assert {b.dtype for b in controller.buffers()} == {torch.float32, torch.int64}


@every_law
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_non_finite_holds_is_counted_and_is_forgotten(law, names, bad):
    state = run(law, stream(names, 6))
    held = run(law, [dict.fromkeys(names, bad)] * 2, state)
    # What follows from the held is made of it again.
    assert_as_rounded(held, state, ignore=["non_finite"])
    assert int(held.non_finite) == 2
    after = stream(names, 1, offset=6)
    assert_same(run(law, after, held), run(law, after, state), ignore=["non_finite"])


@every_law
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_stream_leaves_finite_numbers_and_counts_add_up(law, names, data):
    state, calls = law.init(), data.draw(st.integers(1, 8))
    for _ in range(calls):
        state = law.update(state, **{name: data.draw(any_float) for name in names})
    for name, leaf in flatten_state(state).items():
        assert leaf.isfinite().all(), name
    assert int(state.step + state.non_finite) == calls


@every_law
def test_wrong_measurements_are_named(law, names):
    controller = Controller(law)
    good = dict.fromkeys(names, 0.5)
    name, kind = names[-1], type(law).__name__
    for target in (controller, lambda **m: law.update(law.init(), **m)):
        with pytest.raises(TypeError, match=f"{name} must be a float or a 0-d tensor, got bool"):
            target(**good | {name: True})
        with pytest.raises(TypeError, match=f"{name} must be a float or a real 0-d tensor, got"):
            target(**good | {name: torch.tensor(True)})
        with pytest.raises(TypeError, match=f"{name} must be a float or a 0-d tensor, got str"):
            target(**good | {name: "0.5"})
        with pytest.raises(ValueError, match=rf"{name} must be one number.*\(2, 3\): reduce it"):
            target(**good | {name: torch.ones(2, 3)})
        with pytest.raises(TypeError, match=rf"{kind}.*\b{name}\b"):
            target(**{k: v for k, v in good.items() if k != name})
        with pytest.raises(TypeError, match=rf"{kind}.*\b{name}s\b"):
            target(**good | {f"{name}s": 0.5})
    assert int(controller.state.step) == 0


@pytest.mark.slow
@every_law
def test_a_hundred_thousand_updates_of_bad_data_leave_the_law_sound(law, names):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, len(names), generator=generator) * 3
    bad = torch.rand(values.shape, generator=generator)
    values[bad < 0.025] = torch.nan
    values[(bad >= 0.025) & (bad < 0.05)] = torch.inf
    state, memory = law.init(), 0
    for t, rows in enumerate(values.split(1000)):
        states = [state]
        for row in rows.tolist():
            states.append(law.update(states[-1], **dict(zip(names, row, strict=True))))
        state = states[-1]
        every = tree_map(lambda *leaves: torch.stack(leaves), *states)
        del states
        for name, leaf in flatten_state(every).items():
            assert leaf.isfinite().all(), (t, name)
        assert_within_clamps(law, every)
        if t == 10:
            memory = resident_bytes()
    clean = int(values.isfinite().all(1).sum())
    assert (int(state.step), int(state.non_finite)) == (clean, 100_000 - clean)
    # A leak of one state an update would be some 500 MiB.
    assert resident_bytes() - memory < 50 * 2**20
    # After the last bad value it acts again within one update.
    state = law.update(state, **dict.fromkeys(names, math.nan))
    good = law.update(state, **dict.fromkeys(names, 2.5))
    assert int(good.step) == int(state.step) + 1
    assert any(
        not torch.equal(a, b)
        for name, a, b in zip(
            flatten_state(good),
            flatten_state(good).values(),
            flatten_state(state).values(),
            strict=True,
        )
        if name.split("__")[-1] not in ("step", "non_finite")
    )


def assert_between(lower, x, upper):
    """As float32 holds the limits."""
    assert torch.tensor(lower) <= x.min()
    assert x.max() <= torch.tensor(upper)


def assert_within_clamps(law, states):
    """Of states one after the other, every leaf with the time as its first dimension."""
    if isinstance(law, EntropyGatedKL):
        assert_between(law.threshold_lower, states.kl_threshold, law.threshold_upper)
        assert float(states.kl_threshold.diff().abs().max()) <= law.threshold_rate + 1e-6
        assert_between(law.gate_lower, states.entropy_gate, law.gate_upper)
        authority = law.pid_authority * (law.threshold_upper - law.threshold_lower)
        assert_between(-authority - 1e-6, states.threshold_shift, authority + 1e-6)
        assert_between(law.kl_integral.lower, states.kl_offset, law.kl_integral.upper)
        for name in ("kl_coef", "kl_penalty", "kl_lead"):
            assert_between(0.0, getattr(states, name), math.inf)
        assert_within_clamps(law.phases, states.phases)
        assert_within_clamps(law.pid, states.pid)
    elif isinstance(law, PID):
        assert_between(law.lower, states.output, law.upper)
        assert float(states.output.diff().abs().max()) <= law.rate_limit + 1e-6
    elif isinstance(law, Phase):
        assert set(states.factor.tolist()) <= set(torch.tensor(law.factors).tolist())
        assert_between(0, states.phase, 3)
        assert_between(0.0, states.rise_error, math.inf)
        assert bool((states.lowest <= states.highest).all())
    elif isinstance(law, AdaptiveKL):
        assert_between(law.lower * 0.999, states.coef, law.upper * 1.001)
    elif isinstance(law, PIDLagrangian):
        assert_between(0.0, states.multiplier, law.upper)
    elif isinstance(law, TrustRegion):
        assert_between(0.0, states.scale, 1.0)
    elif isinstance(law, EMA):
        assert_between(0.0, states.weight, (1 + 1e-4) / (1 - law.decay))
    else:
        assert isinstance(law, Momentum)
        # No faster than from one end of the data to the other within the window.
        extent = float(states.history.max() - states.history.min())
        assert_between(-extent / law.window, states.momentum, extent / law.window)


# The backend of torch itself still scripts a method.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.slow
def test_compiled_for_real_is_eager_over_a_thousand_updates():
    eager, inner = Controller(SHORT), Controller(SHORT)
    torch.compiler.reset()
    compiled = torch.compile(inner, fullgraph=True)
    measured = stream(GATED, 1000)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for t, m in enumerate(measured):
        compiled(**m)
        eager(**m)
        if t % 50 == 0:
            for name, a in flatten_state(eager.state).items():
                b = flatten_state(inner.state)[name]
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=f"{t} {name}")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
