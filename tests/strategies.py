"""What the Hypothesis tests draw: values, never seeds, so that a failure shrinks."""

import math

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

# No deadline: the machine is shared, and the first call into torch is slow. No database: a found
# failure is written down as @example, where the next reader sees it.
PROPERTY = settings(
    deadline=None,
    max_examples=50,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def tensors(
    *shape: int, low: float = -10.0, high: float = 10.0, dtype: torch.dtype = torch.float64
) -> st.SearchStrategy[Tensor]:
    """Tensors of one shape with finite entries in [low, high], rounded to the dtype."""
    width = 32 if dtype == torch.float32 else 64
    low, high = torch.tensor([low, high], dtype=dtype).tolist()
    count = math.prod(shape)
    entries = st.floats(low, high, width=width)
    return st.lists(entries, min_size=count, max_size=count).map(
        lambda flat: torch.tensor(flat, dtype=dtype).reshape(shape)
    )


def bool_tensors(*shape: int) -> st.SearchStrategy[Tensor]:
    """Masks and flags of one shape, holes anywhere."""
    count = math.prod(shape)
    return st.lists(st.booleans(), min_size=count, max_size=count).map(
        lambda flat: torch.tensor(flat, dtype=torch.bool).reshape(shape)
    )


def log_uniform(low: float, high: float) -> st.SearchStrategy[float]:
    """Positive floats, evenly spread over the orders of magnitude from low to high."""
    return st.floats(math.log10(low), math.log10(high)).map(
        lambda exponent: min(max(10.0**exponent, low), high)
    )
