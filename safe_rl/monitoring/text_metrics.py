"""Cheap signs that generated text has collapsed, from token ids alone."""

from collections.abc import Iterable, Sequence
from operator import index


def distinct_ngrams(sequences: Iterable[Sequence[int]], n: int) -> float:
    """Fraction of n-grams that are different from each other: near 0, the policy repeats itself.

        distinct = |set of n-grams| / |all n-grams|,  pooled over the sequences

    N-grams do not cross from one sequence into the next. With no n-gram at all (every response
    shorter than ``n``) the value is 0.0: a policy that has stopped talking has collapsed too.

    Args:
        sequences: Token ids, one sequence per response, without padding.
        n: Length of the n-grams, in tokens; 2 for distinct bigrams.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: ``n`` is less than 1.
        TypeError: A token id is not an integer.

    Source: Li et al. 2016 (arXiv 1510.03055), distinct-1 and distinct-2.

    Example:
        >>> distinct_ngrams([[1, 2, 1, 2], [7, 8]], 2)  # (1, 2) twice, (2, 1), (7, 8)
        0.75
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    seen: set[tuple[int, ...]] = set()
    total = 0
    for sequence in sequences:
        # index() makes an int of an element of a tensor or an array, which would hash by identity.
        tokens = [index(token) for token in sequence]
        ngrams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
        seen.update(ngrams)
        total += len(ngrams)
    return len(seen) / total if total else 0.0
