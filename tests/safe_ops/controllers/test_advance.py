"""How a step is given its state; that both ways give the same is in test_every_law.py."""

from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops.controllers import EMA
from safe_ops.controllers.advance import advance


class Counts(NamedTuple):
    step: Tensor
    non_finite: Tensor


class Held(NamedTuple):
    value: Tensor
    history: Tensor
    inner: Counts


HELD = Held(
    torch.tensor(0.1), torch.tensor([1.0, 2.0]), Counts(torch.tensor(2**40), torch.tensor(0))
)


def test_a_step_is_given_numbers_and_lists_and_tensors_come_back():
    seen = []

    def step(state, kl, reward):
        seen.append((state, kl, reward))
        return state._replace(value=kl, history=[reward, 7.0])

    new = advance(step, HELD, kl=torch.tensor(0.3), reward=2)
    [(state, kl, reward)] = seen
    # As float32 holds them.
    assert state.value == float(torch.tensor(0.1)) != 0.1
    assert kl == float(torch.tensor(0.3)) != 0.3
    assert isinstance(reward, float)
    assert state.history == [1.0, 2.0]
    assert state.inner == Counts(2**40, 0)
    assert isinstance(new, Held)
    assert torch.equal(new.value, torch.tensor(0.3))
    assert torch.equal(new.history, torch.tensor([2.0, 7.0]))
    assert (new.inner.step.dtype, int(new.inner.step)) == (torch.int64, 2**40)


def test_the_new_state_shares_no_memory_with_the_old_one():
    new = advance(lambda state: state, HELD)
    new.value.fill_(9.0)
    new.history.fill_(9.0)
    assert torch.equal(HELD.value, torch.tensor(0.1))
    assert torch.equal(HELD.history, torch.tensor([1.0, 2.0]))


def test_a_state_of_counts_alone():
    new = advance(lambda state: state._replace(step=state.step + 1), HELD.inner)
    assert int(new.step) == 2**40 + 1


def test_tensors_are_given_where_a_number_may_not_be_read():
    kinds = []

    def step(state, kl):
        kinds.extend([type(state.value), type(kl)])
        return state._replace(value=kl)

    stacked = Held(
        *(torch.stack([x, x]) for x in HELD[:2]), Counts(*(x.expand(2) for x in HELD[2]))
    )
    new = torch.func.vmap(lambda state, kl: advance(step, state, kl=kl))(stacked, torch.ones(2))
    assert torch.equal(new.value, torch.ones(2))
    meta = Held(*(x.to("meta") for x in HELD[:2]), Counts(*(x.to("meta") for x in HELD[2])))
    assert advance(step, meta, kl=0.3).value.device.type == "meta"
    assert kinds == [Tensor] * 4


def test_each_number_may_be_written_to_without_the_others():
    law = EMA()
    new = law.update(law.init(), value=3.0)
    factor = torch.tensor(2.0, requires_grad=True)
    loss = factor * new.value
    new.weight.zero_()
    loss.backward()
    assert factor.grad == 3.0


def test_a_state_of_another_dtype_stays_what_it_is():
    double = HELD._replace(value=torch.tensor(0.1, dtype=torch.float64))
    assert advance(lambda state: state, double).value.dtype == torch.float64
