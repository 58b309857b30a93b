import re

import pytest
import torch
from tensordict import NonTensorData, TensorDict, lazy_stack

import safe_rl.keys
from safe_rl import KLReward, PolicyMeasurements, SAFELoss, SoftMinGAE
from safe_rl.keys import (
    at_least_float32,
    dense,
    padded,
    read,
    read_coefficient,
    read_heads,
    read_mask,
    read_per_token,
)
from tests.safe_rl.objectives.batches import TinyNetwork

MASK = torch.ones(2, 3, dtype=torch.bool)


def batch(value: torch.Tensor) -> TensorDict:
    return TensorDict({"x": value}, [])


def test_the_table_lists_every_key_that_is_read_or_written():
    documented = set(re.findall(r"``(.+?)``", safe_rl.keys.__doc__ or ""))
    modules = [
        SAFELoss(TinyNetwork(), value_clip=0.2, token_kl_coef=0.1),
        SoftMinGAE(),
        KLReward(),
        PolicyMeasurements(),
    ]
    for module in modules:
        for key in module.in_keys:
            name = key if isinstance(key, str) else str(key).replace("'", '"')
            assert name in documented, f"{name} of {type(module).__name__}"


def test_a_missing_key_lists_what_there_is():
    with pytest.raises(ValueError, match=r"batch must hold \('a', 'b'\), got \['x'\]"):
        read(batch(torch.ones(1)), ("a", "b"))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1)])
def test_per_token(shape):
    assert read_per_token(batch(torch.ones(shape)), "x", MASK).shape == (2, 3)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 2), (2, 1)])
def test_per_token_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape} and mask (2, 3)")):
        read_per_token(batch(torch.ones(shape)), "x", MASK)


@pytest.mark.parametrize(("shape", "heads"), [((2, 3), 1), ((2, 3, 1), 1), ((2, 3, 4), 4)])
def test_heads(shape, heads):
    assert read_heads(batch(torch.ones(shape)), "x", MASK).shape == (2, 3, heads)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 2, 2)])
def test_heads_refuse_other_shapes(shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape} and mask (2, 3)")):
        read_heads(batch(torch.ones(shape)), "x", MASK)


@pytest.mark.parametrize("size", [(6,), (2, 3)])
@pytest.mark.parametrize("trailing", [(), (1,)])
def test_every_step_of_an_environment_counts(size, trailing):
    steps = TensorDict({"x": torch.ones(*size, *trailing)}, size)
    mask = read_mask(steps, "mask", like="x")
    assert mask.all()
    assert mask.shape == size
    steps["mask"] = torch.zeros(size, dtype=torch.bool)
    assert not read_mask(steps, "mask", like="x").any()


@pytest.mark.parametrize(("size", "shape"), [((2,), (2, 3)), ((2,), (2, 3, 1)), ((), (2, 3))])
def test_sequences_need_a_mask(size, shape):
    with pytest.raises(ValueError, match=r"batch must hold 'mask', got \['x'\]"):
        read_mask(TensorDict({"x": torch.ones(shape)}, size), "mask", like="x")


def test_a_dense_batch_is_left_as_it_is():
    rows = batch(torch.ones(2, 3))
    assert dense(rows, ["x"], mask="mask") is rows


def test_ragged_rows_are_padded_on_the_right_and_prompts_on_the_left():
    rows = lazy_stack(
        [
            TensorDict(
                {
                    "tokens": {"prompt": torch.full((p,), 7), "response": torch.full((t,), 8)},
                    "prompt_mask": torch.ones(p, dtype=torch.bool),
                    "mask": torch.ones(t, dtype=torch.bool),
                    "values": torch.ones(t, 2),
                    "coef": torch.tensor(0.5),
                },
                [],
            )
            for p, t in ((1, 3), (2, 0), (3, 1))
        ]
    )
    keys = [("tokens", "prompt"), ("tokens", "response"), "prompt_mask", "mask", "values", "coef"]
    padded = dense(rows, [*keys, "missing"], mask="mask")
    assert padded["tokens", "prompt"].tolist() == [[0, 0, 7], [0, 7, 7], [7, 7, 7]]
    assert padded["tokens", "response"].tolist() == [[8, 8, 8], [0, 0, 0], [8, 0, 0]]
    assert padded["prompt_mask"].sum(1).tolist() == [1, 2, 3]
    assert padded["mask"].tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert padded["values"].sum(-1).tolist() == [[2, 2, 2], [0, 0, 0], [2, 0, 0]]
    assert padded["coef"].tolist() == [0.5] * 3
    assert padded.batch_size == (3,)
    assert "missing" not in set(padded.keys())


def test_a_key_that_some_rows_lack_is_missing():
    rows = lazy_stack([TensorDict({"x": torch.ones(1)}, []), TensorDict({}, [])])
    assert not set(dense(rows, ["x"], mask="mask").keys())


@pytest.mark.parametrize("given", [False, True])
def test_the_lengths_of_batch_dimensions_are_the_mask(given):
    rows = [TensorDict({"x": torch.ones(n, 1)}, [n]) for n in (1, 3)]
    if given:
        rows[1]["mask"] = torch.tensor([True, False, True])
        rows[0]["mask"] = torch.tensor([True])
    padded = dense(lazy_stack(rows), ["x", "mask"], mask="mask")
    assert padded.batch_size == (2, 3)
    assert padded["x"].shape == (2, 3, 1)
    assert padded["mask"].tolist() == [[True, False, False], [True, not given, True]]


def test_rows_along_another_dimension():
    rows = lazy_stack([TensorDict({"x": torch.ones(2, n)}, [2]) for n in (1, 3)], 1)
    padded = dense(rows, ["x"], mask="mask")
    assert padded.batch_size == (2, 2)
    assert padded["x"].sum(-1).tolist() == [[1, 3], [1, 3]]


def test_coefficient_per_row_is_not_one_per_column():
    square = torch.ones(3, 3, dtype=torch.bool)
    value = read_coefficient(batch(torch.tensor([1.0, 2.0, 3.0])), "x", square)
    assert value[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert value[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 3, 2), (1, 2, 3, 1)])
def test_coefficient_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape} and mask (2, 3)")):
        read_coefficient(batch(torch.ones(shape)), "x", MASK)


def test_coefficient_is_detached():
    assert not read_coefficient(batch(torch.ones(2).requires_grad_()), "x", MASK).requires_grad


def test_half_precision_is_widened_and_the_rest_kept():
    for given, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bool, torch.bool),
        (torch.int64, torch.int64),
    ):
        assert at_least_float32(torch.ones(1, dtype=given)).dtype == kept


def test_set_keys_refuses_a_misspelt_name():
    module = PolicyMeasurements()
    module.set_keys(score=("next", "score"))
    assert ("next", "score") in module.in_keys
    with pytest.raises(ValueError, match="scores is not an accepted tensordict key"):
        module.set_keys(scores="x")


@pytest.mark.parametrize("lengths", [(2, 2), (1, 2)])
@pytest.mark.parametrize("where", [0, 1])
def test_text_that_a_row_lacks_is_left_out_of_ragged_rows(lengths, where):
    rows = [
        TensorDict({"x": torch.ones(n), "mask": torch.ones(n).bool(), "all": NonTensorData("a")})
        for n in lengths
    ]
    rows[where].set_non_tensor("text", "only here")
    found = padded(lazy_stack(rows), mask="mask")
    assert found["x"].sum(1).tolist() == list(lengths)
    if lengths[0] != lengths[1]:
        assert "text" not in set(found.keys())
        assert found["all"] == ["a", "a"]
