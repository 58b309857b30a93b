import re

import pytest
import torch
from tensordict import TensorDict

import safe_rl.keys
from safe_rl import KLReward, PolicyMeasurements, SAFELoss, SoftMinGAE
from safe_rl.keys import at_least_float32, read, read_coefficient, read_heads, read_per_token
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
