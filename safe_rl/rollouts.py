"""On-policy batches from a causal language model: pack, score, cut into minibatches. No replay."""

from collections.abc import Iterator, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor


def left_pad(
    sequences: Sequence[Sequence[int]], *, width: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Token ids of prompts as one block, padded on the left.

    Args:
        sequences: B lists of token ids, none empty.
        width: P, at least the longest sequence. One width for a whole run keeps log-probs
            bitwise comparable.
        pad_id: What stands in the padding; it may be the EOS, masks go by position.

    Returns:
        (tokens int64 [B, P], mask bool [B, P]).

    Raises:
        ValueError: a sequence is empty or longer than ``width``.

    Example:
        >>> left_pad([[5], [6, 7]], width=2, pad_id=0)[0]
        tensor([[0, 5],
                [6, 7]])
    """
    tokens = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        if not 0 < len(sequence) <= width:
            raise ValueError(
                f"sequences[{row}] must have 1 to width={width} tokens, got {len(sequence)}"
            )
        tokens[row, width - len(sequence) :] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, width - len(sequence) :] = True
    return tokens, mask


def response_mask(response: Tensor, eos_ids: Tensor) -> Tensor:
    """True up to and including the first EOS, by position.

    A mask of ``token != pad`` would drop the EOS of every finished answer where pad and EOS are
    one token.

    Args:
        response: int64 [B, T], right-padded after the EOS with anything.
        eos_ids: int64 [E], the tokens that end a response.

    Returns:
        bool [B, T].

    Example:
        >>> response_mask(torch.tensor([[4, 2, 2]]), torch.tensor([2]))
        tensor([[ True,  True, False]])
    """
    ends = torch.isin(response, eos_ids)
    return ends.cumsum(1) - ends.long() == 0


def pack_rollout(
    prompt: Tensor,
    prompt_mask: Tensor,
    response: Tensor,
    eos_ids: Tensor,
    *,
    width: int,
    pad_id: int,
) -> TensorDict:
    """Prompt and response as the batch that every later step reads and writes.

    The response is padded to ``width``; ``length_stop`` marks those cut without an EOS.

    Args:
        prompt: int64 [B, P], left-padded.
        prompt_mask: bool [B, P].
        response: int64 [B, t], t at most ``width``; what follows the first EOS is ignored.
        eos_ids: int64 [E].
        width: T, one for a whole run.
        pad_id: Stands after the end.

    Returns:
        TensorDict [B] with ``("tokens", "prompt" | "response")``, ``prompt_mask``,
        ``response_mask``, ``length_stop`` and ``response_tokens_mean`` (float32, expanded to [B]).

    Raises:
        ValueError: the response is longer than ``width``.

    Example:
        >>> ids, ones = torch.tensor([[4, 5]]), torch.ones(1, 2).bool()
        >>> pack_rollout(ids, ones, ids, torch.tensor([5]), width=3, pad_id=0)["response_mask"]
        tensor([[ True,  True, False]])
    """
    batch, length = response.shape
    if length > width:
        raise ValueError(f"response must have at most width={width} tokens, got {length}")
    padding = response.new_full((batch, width - length), pad_id)
    padded = torch.cat([response, padding], 1)
    within = torch.arange(width, device=response.device) < length
    mask = response_mask(padded, eos_ids) & within
    ended = (torch.isin(padded, eos_ids) & mask).any(1)
    tokens = torch.where(mask, padded, torch.full_like(padded, pad_id))
    # Held, detached, as the denominator of the whole rollout: minibatch losses then add up.
    tokens_mean = mask.sum().float() / max(batch, 1)
    return TensorDict(
        {
            "tokens": {"prompt": prompt, "response": tokens},
            "prompt_mask": prompt_mask,
            "response_mask": mask,
            "length_stop": ~ended,
            "response_tokens_mean": tokens_mean.expand(batch),
        },
        [batch],
    )


def place_score(batch: TensorDictBase, score: Tensor) -> TensorDictBase:
    """Pay the score of a whole response on its last valid token, the EOS included, and end there.

    A response cut at its length limit *and scored* is terminal like one with an EOS: paying the
    score and bootstrapping as well has no fixed point at discount 1.

    Writes ``reward`` [B, T, 1], ``terminated``, ``truncated`` and ``done`` [B, T, 1] and
    ``score`` [B].

    Args:
        batch: With ``response_mask`` [B, T].
        score: [B], in reward units.

    Returns:
        ``batch``.

    Raises:
        ValueError: ``score`` is not [B] or not finite.

    Example:
        >>> batch = TensorDict({"response_mask": torch.tensor([[True, True, False]])}, [1])
        >>> place_score(batch, torch.tensor([0.5]))["reward"].squeeze(-1)
        tensor([[0.0000, 0.5000, 0.0000]])
    """
    mask = batch["response_mask"]
    if score.shape != mask.shape[:1]:
        raise ValueError(f"score must be [B] = {tuple(mask.shape[:1])}, got {tuple(score.shape)}")
    if not torch.isfinite(score).all():
        rows = (~torch.isfinite(score)).nonzero().flatten().tolist()
        raise ValueError(f"score must be finite, got {score[rows].tolist()} for samples {rows}")
    last = last_valid(mask)
    zero = torch.zeros_like(last).unsqueeze(-1)
    batch.set("score", score)
    batch.set("reward", torch.where(last, score.float().unsqueeze(-1), 0.0).unsqueeze(-1))
    batch.set("terminated", last.unsqueeze(-1))
    batch.set("truncated", zero)
    batch.set("done", last.unsqueeze(-1))
    return batch


def mark_partial(batch: TensorDictBase, partial: Tensor) -> TensorDictBase:
    """Mark rollouts that were stopped half-way and not scored: they bootstrap, nothing is paid.

    Args:
        batch: After ``place_score``.
        partial: bool [B].

    Returns:
        ``batch`` with ``reward``, ``terminated`` and ``truncated`` changed in those rows.

    Raises:
        ValueError: ``partial`` is not bool [B].

    Example:
        >>> batch = TensorDict({"response_mask": torch.ones(1, 2).bool()}, [1])
        >>> batch = mark_partial(place_score(batch, torch.ones(1)), torch.tensor([True]))
        >>> batch["truncated"].squeeze(-1), batch["reward"].sum()
        (tensor([[False,  True]]), tensor(0.))
    """
    if partial.dtype != torch.bool or partial.shape != batch["response_mask"].shape[:1]:
        raise ValueError(f"partial must be bool [B], got {partial.dtype} {tuple(partial.shape)}")
    rows = partial[:, None, None]
    batch.set("truncated", batch["terminated"] & rows)
    batch.set("terminated", batch["terminated"] & ~rows)
    batch.set("reward", torch.where(rows, 0.0, batch["reward"]))
    return batch


def last_valid(mask: Tensor) -> Tensor:
    """True on the last True of each row; nowhere in an empty row.

    Args:
        mask: bool [B, T], True first, then False.

    Returns:
        bool [B, T].

    Example:
        >>> last_valid(torch.tensor([[True, True, False]]))
        tensor([[False,  True, False]])
    """
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return mask & ~following


def minibatches(
    batch: TensorDictBase, *, size: int, generator: torch.Generator | None = None
) -> Iterator[TensorDictBase]:
    """The rollout once, in random order, in pieces of one size.

    Args:
        batch: TensorDict [B].
        size: Rows a piece; divides B, so that the mean over pieces is the mean over the batch.
        generator: Of the order.

    Yields:
        TensorDict [size].

    Raises:
        ValueError: ``size`` does not divide B.

    Example:
        >>> batch = TensorDict({"x": torch.arange(4)}, [4])
        >>> sum(int(piece["x"].sum()) for piece in minibatches(batch, size=2))
        6
    """
    rows = batch.batch_size[0]
    if size < 1 or rows % size:
        raise ValueError(f"size must divide the batch of {rows} rows, got {size}")
    for chosen in torch.randperm(rows, generator=generator).split(size):
        yield batch[chosen]
