import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from safe_rl.monitoring.text_metrics import distinct_ngrams

SEQUENCES = st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=5)


@pytest.mark.parametrize(
    ("sequences", "n", "expected"),
    [
        ([[1, 2, 3]], 2, 1.0),
        ([[5, 5, 5, 5]], 2, 1 / 3),
        ([[1, 2], [1, 2]], 2, 0.5),
        ([[1, 2], [3, 4]], 1, 1.0),
        ([[1, 2], [2, 1]], 2, 1.0),  # (2, 2) across the border would not change this, (1, 2) would
        ([[1], [1]], 2, 0.0),
        ([], 2, 0.0),
        ([[]], 1, 0.0),
    ],
)
def test_distinct_ngrams_by_hand(sequences, n, expected):
    assert distinct_ngrams(sequences, n) == pytest.approx(expected)


@given(sequences=SEQUENCES, n=st.integers(1, 4))
def test_distinct_ngrams_against_a_plain_count(sequences, n):
    ngrams = [
        tuple(sequence[start : start + n])
        for sequence in sequences
        for start in range(len(sequence) - n + 1)
    ]
    expected = len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    assert distinct_ngrams(sequences, n) == expected


@given(sequences=SEQUENCES)
def test_saying_everything_twice_halves_the_value(sequences):
    once = distinct_ngrams(sequences, 2)
    assert distinct_ngrams(sequences + sequences, 2) == pytest.approx(once / 2)


def test_tensors_of_tokens_count_like_lists():
    assert distinct_ngrams(torch.tensor([[5, 5, 5, 5]]), 2) == pytest.approx(1 / 3)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct_ngrams([[1]], 0)
    with pytest.raises(TypeError):
        distinct_ngrams([[0.5, 1.0]], 2)
