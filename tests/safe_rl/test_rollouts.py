"""Masks by position, one score a row, and every row once an epoch."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torch.testing import assert_close

from safe_rl import SoftMinGAE, SoftMinValueLoss
from safe_rl.rollouts import (
    last_valid,
    left_pad,
    mark_partial,
    minibatches,
    pack_rollout,
    place_score,
    response_mask,
)
from tests.safe_rl.objectives.batches import ragged_mask
from tests.strategies import PROPERTY

EOS, PAD = torch.tensor([1]), 1
PROMPT, PROMPT_MASK = torch.tensor([[1, 1, 5]]), torch.tensor([[False, False, True]])
WIDTH = 5

responses = st.integers(1, 4).flatmap(
    lambda rows: st.integers(0, WIDTH).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 4), min_size=length, max_size=length),
            min_size=rows,
            max_size=rows,
        )
    )
)
eos_sets = st.sets(st.integers(0, 4), max_size=3).map(sorted)
lengths = st.lists(st.integers(0, WIDTH), min_size=1, max_size=6)


def pack(rows: list[list[int]], eos_ids: Tensor = EOS, pad_id: int = PAD) -> TensorDict:
    prompt = PROMPT.expand(len(rows), -1)
    mask = PROMPT_MASK.expand(len(rows), -1)
    response = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)
    return pack_rollout(prompt, mask, response, eos_ids, width=WIDTH, pad_id=pad_id)


def masked(mask: Tensor) -> TensorDict:
    return TensorDict({"response_mask": mask}, mask.shape[:1])


def kept(row: list[int], eos_ids: list[int]) -> list[int]:
    """The response itself, token by token: up to and including its first EOS."""
    response = []
    for token in row:
        response.append(token)
        if token in eos_ids:
            break
    return response


# --- left_pad -----------------------------------------------------------------------------------


def test_prompts_end_at_the_right_edge():
    tokens, mask = left_pad([[7], [3, 4, 5], [6, 1]], width=3, pad_id=1)
    assert tokens.tolist() == [[1, 1, 7], [3, 4, 5], [1, 6, 1]]
    assert mask.int().tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 1]]
    assert (tokens.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_no_prompts_are_an_empty_block():
    tokens, mask = left_pad([], width=3, pad_id=0)
    assert tokens.shape == mask.shape == (0, 3)


@pytest.mark.parametrize(("sequence", "length"), [([], 0), ([1, 2, 3], 3)])
def test_a_prompt_that_is_empty_or_too_long_is_named(sequence, length):
    message = f"sequences[1] must have 1 to width=2 tokens, got {length}"
    with pytest.raises(ValueError, match=re.escape(message)):
        left_pad([[1], sequence], width=2, pad_id=0)


# --- response_mask, last_valid ------------------------------------------------------------------


def test_several_tokens_may_end_a_response():
    response = torch.tensor([[4, 2, 3, 3], [4, 3, 2, 4], [4, 4, 4, 4]])
    mask = response_mask(response, torch.tensor([2, 3]))
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert response_mask(response, torch.tensor([], dtype=torch.int64)).all()


def test_a_response_of_one_token():
    mask = response_mask(torch.tensor([[1], [4]]), EOS)
    assert mask.tolist() == [[True], [True]]
    assert last_valid(mask).tolist() == [[True], [True]]


def test_a_response_without_tokens():
    mask = response_mask(torch.zeros(2, 0, dtype=torch.int64), EOS)
    assert mask.shape == last_valid(mask).shape == (2, 0)


@PROPERTY
@given(lengths)
def test_the_last_valid_token_is_one_and_the_last(counts: list[int]):
    last = last_valid(ragged_mask(tuple(counts), WIDTH))
    assert last.nonzero().tolist() == [[row, n - 1] for row, n in enumerate(counts) if n]


# --- pack_rollout -------------------------------------------------------------------------------


def test_a_finished_response_keeps_its_eos_where_pad_is_eos():
    # Drawn by generate(): rows that end early are padded with the EOS itself.
    batch = pack([[4, 1, 1], [4, 3, 1], [4, 3, 2]])
    assert batch["response_mask"].int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
    ]
    assert batch["tokens", "response"].tolist() == [
        [4, 1, 1, 1, 1],
        [4, 3, 1, 1, 1],
        [4, 3, 2, 1, 1],
    ]
    assert batch["length_stop"].tolist() == [False, False, True]
    assert batch["response_tokens_mean"].tolist() == [pytest.approx(8 / 3)] * 3


def test_what_follows_the_end_is_ignored():
    clean, dirty = pack([[4, 1, 1, 1]], pad_id=0), pack([[4, 1, 3, 9]], pad_id=0)
    assert dirty["tokens", "response"].tolist() == [[4, 1, 0, 0, 0]]
    assert (clean == dirty).all()


def test_a_response_that_is_only_an_eos():
    batch = place_score(pack([[1]]), torch.tensor([0.5]))
    assert batch["response_mask"].sum() == 1
    assert not batch["length_stop"].any()
    assert batch["reward"].flatten().tolist() == [0.5, 0, 0, 0, 0]


def test_a_response_without_tokens_is_packed_as_padding():
    batch = pack([[], []])
    assert not batch["response_mask"].any()
    assert batch["length_stop"].all()
    assert not batch["response_tokens_mean"].any()


@PROPERTY
@given(responses, eos_sets, st.integers(0, 4))
@example([[1, 1, 1]], [1], 1)
@example([[4, 4]], [1], 1)  # padding with the EOS does not finish what was cut
def test_packing_keeps_each_response(rows: list[list[int]], eos_ids: list[int], pad_id: int):
    batch = pack(rows, torch.tensor(eos_ids, dtype=torch.int64), pad_id)
    mask, tokens = batch["response_mask"], batch["tokens", "response"]
    assert (mask[:, :-1] >= mask[:, 1:]).all()  # a prefix
    expected = [kept(row, eos_ids) for row in rows]
    assert [t[m].tolist() for t, m in zip(tokens, mask, strict=True)] == expected
    assert (tokens[~mask] == pad_id).all()
    finished = [bool(row) and row[-1] in eos_ids for row in expected]
    assert batch["length_stop"].tolist() == [not ended for ended in finished]
    mean = sum(map(len, expected)) / len(expected)
    assert_close(batch["response_tokens_mean"], torch.full((len(rows),), mean))
    assert batch["prompt_mask"].shape == batch["tokens", "prompt"].shape


def test_a_response_longer_than_the_width_is_refused():
    with pytest.raises(ValueError, match="response must have at most width=5 tokens, got 6"):
        pack([[4] * 6])


# --- place_score, mark_partial ------------------------------------------------------------------


def test_a_cut_and_scored_response_is_terminal():
    batch = place_score(pack([[4, 3, 2, 2, 2], [4, 1, 1, 1, 1]]), torch.tensor([0.5, -1.0]))
    assert batch["length_stop"].tolist() == [True, False]
    last = [[0, 0, 0, 0, 1], [0, 1, 0, 0, 0]]
    assert batch["terminated"].squeeze(-1).int().tolist() == last
    assert batch["done"].squeeze(-1).int().tolist() == last
    assert not batch["truncated"].any()
    assert batch["reward"].squeeze(-1).tolist() == [[0, 0, 0, 0, 0.5], [0, -1, 0, 0, 0]]
    assert batch["score"].tolist() == [0.5, -1.0]


@PROPERTY
@given(lengths, st.data())
def test_each_row_is_paid_once_or_bootstraps(counts: list[int], data: st.DataObject):
    rows = len(counts)
    finite = st.floats(-10, 10, width=32)
    score = torch.tensor(data.draw(st.lists(finite, min_size=rows, max_size=rows)))
    partial = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    batch = place_score(masked(ragged_mask(tuple(counts), WIDTH)), score)
    some = torch.tensor(counts) > 0
    assert_close(batch["reward"].sum((1, 2)), torch.where(some, score, 0), rtol=0, atol=0)
    assert_close(batch["terminated"].sum((1, 2)), some.long())

    batch = mark_partial(batch, partial)
    paid = some & ~partial
    assert_close(batch["reward"].sum((1, 2)), torch.where(paid, score, 0), rtol=0, atol=0)
    assert_close(batch["terminated"].sum((1, 2)), paid.long())
    assert_close(batch["truncated"].sum((1, 2)), (some & partial).long())
    assert not (batch["terminated"] & batch["truncated"]).any()
    assert (batch["done"] == (batch["terminated"] | batch["truncated"])).all()
    assert (batch["done"].squeeze(-1) == last_valid(batch["response_mask"])).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_rewards_are_float32_whatever_the_score(dtype):
    batch = place_score(masked(torch.ones(1, 2).bool()), torch.ones(1, dtype=dtype))
    assert batch["reward"].dtype == torch.float32
    assert batch["reward"].shape == batch["done"].shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (torch.zeros(3), r"score must be \[B\] = \(2,\), got \(3,\)"),
        (torch.zeros(2, 1), r"score must be \[B\] = \(2,\), got \(2, 1\)"),
        (torch.tensor([0.0, torch.nan]), r"must be finite, got \[nan\] for samples \[1\]"),
        (torch.tensor([-torch.inf, torch.inf]), r"got \[-inf, inf\] for samples \[0, 1\]"),
    ],
)
def test_a_bad_score_is_named_and_nothing_is_written(score: Tensor, message: str):
    batch = masked(torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match=message):
        place_score(batch, score)
    assert list(batch.keys()) == ["response_mask"]


@pytest.mark.parametrize(
    ("partial", "message"),
    [
        (torch.zeros(2), r"partial must be bool \[B\], got torch.float32 \(2,\)"),
        (torch.zeros(3).bool(), r"partial must be bool \[B\], got torch.bool \(3,\)"),
    ],
)
def test_a_bad_partial_is_named(partial: Tensor, message: str):
    batch = place_score(masked(torch.ones(2, 3).bool()), torch.zeros(2))
    with pytest.raises(ValueError, match=message):
        mark_partial(batch, partial)


def fitted_constant(batch: TensorDict, start: float, steps: int) -> list[float]:
    """A critic that is one number, after each step on the targets that it makes itself."""
    heads = nn.Parameter(torch.full((2,), start))
    estimate = SoftMinGAE(gae_lambda=0.95, average_gae=False)
    objective = SoftMinValueLoss(huber_delta=None, value_coef=1.0)
    values = []
    for _ in range(steps):
        batch["state_values"] = heads.expand(*batch["response_mask"].shape, 2)
        batch["bootstrap_values"] = heads.detach().expand(batch.batch_size[0], 2)
        (slope,) = torch.autograd.grad(objective(estimate(batch))["loss_value"], heads)
        heads.data -= 0.8 * slope
        values.append(heads[0].item())
    return values


def cut_rollout() -> TensorDict:
    """Two responses, cut at the length limit and worth .5."""
    return place_score(pack([[4, 3, 2, 2, 2]] * 2), torch.full((2,), 0.5))


def test_a_constant_critic_on_scored_length_stops_goes_to_the_score():
    assert fitted_constant(cut_rollout(), 3.0, 30)[-1] == pytest.approx(0.5, abs=1e-3)


def test_a_constant_critic_on_partial_rollouts_stays_at_the_truth():
    all_cut = mark_partial(cut_rollout(), torch.ones(2).bool())
    assert fitted_constant(all_cut, 0.5, 20) == pytest.approx([0.5] * 20, abs=1e-6)
    # Where some rows are scored the value goes to the truth from anywhere.
    half = mark_partial(cut_rollout(), torch.tensor([True, False]))
    assert fitted_constant(half, 3.0, 60)[-1] == pytest.approx(0.5, abs=1e-3)
    # Without the bootstrap the same rows would pull it to 0, which is not what they are worth.
    all_cut["terminated"], all_cut["truncated"] = all_cut["truncated"], all_cut["terminated"]
    assert fitted_constant(all_cut, 0.5, 30)[-1] == pytest.approx(0.0, abs=1e-3)


def test_paying_and_bootstrapping_at_once_has_no_fixed_point():
    batch = cut_rollout()
    batch["terminated"], batch["truncated"] = batch["truncated"], batch["terminated"]
    values = fitted_constant(batch, 0.5, 60)
    assert values[-1] > 10
    assert values[59] - values[39] == pytest.approx(values[39] - values[19], rel=1e-2)


# --- minibatches --------------------------------------------------------------------------------


@PROPERTY
@given(lengths, st.integers(1, 6), st.integers(0, 9))
def test_every_valid_token_comes_once_an_epoch(counts: list[int], size: int, seed: int):
    counts = (counts * size)[: len(counts) // size * size or size]
    mask = ragged_mask(tuple(counts), WIDTH)
    batch = masked(mask)
    batch["id"] = torch.arange(mask.numel()).reshape(mask.shape)
    batch["x"] = torch.arange(mask.numel(), dtype=torch.float64).sin().reshape(mask.shape)
    pieces = list(minibatches(batch, size=size, generator=torch.Generator().manual_seed(seed)))
    assert [piece.batch_size for piece in pieces] == [(size,)] * (len(counts) // size)
    seen = torch.cat([piece["id"][piece["response_mask"]] for piece in pieces])
    assert seen.sort().values.tolist() == batch["id"][mask].tolist()
    # Of one size, so that the mean over pieces is the mean over the batch.
    assert_close(torch.stack([piece["x"].mean() for piece in pieces]).mean(), batch["x"].mean())


def test_the_order_is_that_of_the_generator_and_new_each_epoch():
    batch = TensorDict({"row": torch.arange(16)}, [16])

    def epochs(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            torch.cat([p["row"] for p in minibatches(batch, size=4, generator=generator)]).tolist()
            for _ in range(2)
        ]

    first, second = epochs(0)
    assert epochs(0) == [first, second]
    assert len({tuple(first), tuple(second), tuple(epochs(1)[0]), tuple(range(16))}) == 4


def test_rows_stay_together():
    batch = TensorDict({"a": torch.arange(6), "b": {"c": torch.arange(6) * 10}}, [6])
    for piece in minibatches(batch, size=2):
        assert (piece["b", "c"] == 10 * piece["a"]).all()


@pytest.mark.parametrize("size", [0, -2, 3, 8])
def test_a_size_that_does_not_divide_is_refused(size):
    with pytest.raises(ValueError, match=f"must divide the batch of 4 rows, got {size}"):
        next(minibatches(TensorDict({"x": torch.zeros(4)}, [4]), size=size))
