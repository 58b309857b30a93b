"""The default keys of a batch, in one table, and how its entries are read.

B sequences, T response tokens, K critic heads. Nats are per token and at the sampling temperature.

| key | shape | unit | written by | read by |
|---|---|---|---|---|
| ``("tokens", "prompt")`` | [B, P] | ids, left-padded | rollout | actor-critic |
| ``("tokens", "response")`` | [B, T] | ids, right-padded | rollout | actor-critic |
| ``prompt_mask`` | [B, P] | bool, True counts | rollout | actor-critic |
| ``response_mask`` | [B, T] | bool, True counts, EOS included | rollout | all |
| ``response_tokens_mean`` | [B], alike | tokens per entry | measurements | objectives |
| ``old_log_prob`` | [B, T] | nats | scoring, before the update | objectives, measurements |
| ``ref_log_prob`` | [B, T] | nats | scoring, adapters off | objectives, measurements |
| ``log_prob`` | [B, T] | nats | actor-critic, every minibatch | objectives |
| ``entropy`` | [B, T] | nats | actor-critic | objectives, measurements |
| ``state_values`` | [B, T, K] | reward | actor-critic, *before* token t | objectives, advantages |
| ``old_state_values`` | [B, T, K] | reward | scoring | the value loss, if it clips |
| ``bootstrap_values`` | [B, K] | reward, after the last token | scoring | advantages |
| ``("next", "state_values")`` | [B, T, K] | reward, after step t | environments | advantages |
| ``shifted_valid`` | [B, T] | bool, True counts | advantages, if ``shifted`` | objectives |
| ``score`` | [B] | reward | scoring | measurements |
| ``reward`` | [B, T, 1] | reward, on the last valid token | scoring, ``KLReward`` | advantages |
| ``terminated``, ``truncated``, ``done`` | [B, T, 1] | bool | scoring | advantages |
| ``state_value`` | [B, T, 1] | reward, soft-min of the heads | advantages | logs |
| ``advantage``, ``value_target`` | [B, T, 1] | reward (or [B, T, K]) | advantages | objectives |
| ``("measurements", "kl")`` | [B], alike | nats per token | measurements | controller |
| ``("measurements", "entropy")`` | [B], alike | nats per token | measurements | controller |
| ``("measurements", "reward")`` | [B], alike | reward per sequence | measurements | controller |
| ``kl_coef`` | [B], alike | per nat per token: f'(KL) | controller | KL loss |
| ``kl_baseline`` | [B, T] | nats | ``KLBaseline`` | KL loss |
| ``kl_threshold`` | [B], alike | nats per token | controller | token KL loss |
| ``entropy_gate`` | [B], alike | none | controller | token KL loss |
| ``kl_momentum`` | [B], alike | nats per token per update | controller | logs |
| ``kl_reward_coef`` | [B], alike | reward per nat | controller | ``KLReward`` |

``log_prob`` and ``old_log_prob`` are two keys because both are in the batch at once: the ratio of
the fresh one to the stored one is the importance weight. For the values one key is enough, the
target critic's at the rollout and the network's in the loss, unless the loss clips their change.

In a batch of an environment, [N] frames or [B, T] steps as TorchRL's collectors give them, every
step counts unless a mask says otherwise, and ``response_mask`` may be missing. A batch [B] of
sequences needs it: there an entry cannot tell its tokens from its padding.

Of lazily stacked rows of unequal lengths a module that writes into the batch returns a padded copy,
with what it wrote; the rows are left as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import (
    LazyStackedTensorDict,
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_leaf_nontensor,
)
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

RESPONSE_MASK = "response_mask"
RESPONSE_TOKENS_MEAN = "response_tokens_mean"
LEFT_PADDED: tuple[NestedKey, ...] = (("tokens", "prompt"), "prompt_mask")


def read(batch: TensorDictBase, key: NestedKey) -> Tensor:
    """An entry that must be there.

    Raises:
        ValueError: it is not; the message lists the keys that are.

    Example:
        >>> from tensordict import TensorDict
        >>> read(TensorDict({"x": torch.ones(2)}, [2]), "x")
        tensor([1., 1.])
    """
    value = batch.get(key, None)
    if value is None:
        present = sorted(map(str, batch.keys(True, True)))
        raise ValueError(f"batch must hold {key!r}, got {present}")
    return value


def at_least_float32(value: Tensor) -> Tensor:
    """Half precision as float32, in which losses are computed; all else as it is.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    if not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32))


def read_mask(
    batch: TensorDictBase, key: NestedKey, *, like: NestedKey, way_out: str = ""
) -> Tensor:
    """The mask of the steps that count; all, where the batch dimensions are the steps themselves.

    Args:
        batch: With ``key``, or with one entry a step: [N] or [B, T].
        key: Of the mask.
        like: An entry of the shape of the mask, which tells steps from sequences.
        way_out: What else the caller takes in the place of a mask, for the message.

    Raises:
        ValueError: it is missing in a batch of sequences, or is not bool.

    Example:
        >>> from tensordict import TensorDict
        >>> read_mask(TensorDict({"x": torch.ones(2, 1)}, [2]), "mask", like="x")
        tensor([True, True])
    """
    mask = batch.get(key, None)
    if mask is None:
        steps = read(batch, like)
        shape = batch.batch_size
        if shape and steps.shape in (shape, (*shape, 1)):
            return torch.ones(shape, dtype=torch.bool, device=steps.device)
        present = sorted(map(str, batch.keys(True, True)))
        size = list(every_step(batch, like).shape)
        raise ValueError(
            f"batch must hold {key!r}, got {present}: {like!r} is {tuple(steps.shape)} in a batch "
            f"{list(shape)}, and its rows may end in padding. Give {key!r} {size}; or, where every "
            f"step counts, batch_size={size}{way_out}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"{key!r} must be bool (True = counts), got {mask.dtype}")
    return mask


def every_step(batch: TensorDictBase, like: NestedKey) -> Tensor:
    """The mask where all steps of an entry count, though the batch dimensions are fewer.

    A last dimension of one is no step, unless it is a batch dimension.

    Raises:
        ValueError: there is no such entry.

    Example:
        >>> from tensordict import TensorDict
        >>> every_step(TensorDict({"reward": torch.ones(2, 3, 1)}, [2]), "reward").shape
        torch.Size([2, 3])
    """
    steps = read(batch, like)
    shape = steps.shape
    if len(shape) > batch.ndim and shape[-1] == 1:
        shape = shape[:-1]
    return torch.ones(shape, dtype=torch.bool, device=steps.device)


def dense(batch: TensorDictBase, keys: list[NestedKey], *, mask: NestedKey) -> TensorDictBase:
    """Those entries of a lazily stacked batch, padded to one length; any other is left as it is.

    Padding is 0, or False in a mask, on the right, and on the left of a prompt. Where the steps are
    batch dimensions of unequal length, and there is no mask, one is made of those lengths.

    Args:
        batch: Rows of unequal lengths, stacked lazily; any other batch is returned as it is.
        keys: What is needed; a key that is missing is left out.
        mask: Key of the mask.

    Example:
        >>> from tensordict import TensorDict, lazy_stack
        >>> rows = lazy_stack([TensorDict({"x": torch.ones(n)}, [n]) for n in (1, 2)])
        >>> dense(rows, ["x"], mask="mask")["x"]
        tensor([[1., 0.],
                [1., 1.]])
    """
    if not isinstance(batch, LazyStackedTensorDict):
        return batch
    rows = [dense(row, keys, mask=mask) for row in batch.unbind(batch.stack_dim)]
    found: dict[NestedKey, list[Tensor]] = {}
    for key in keys:
        values = [row.get(key, None) for row in rows]
        present = [value for value in values if value is not None]
        if len(present) == len(rows):
            found[key] = present
    if -1 in batch.batch_size and mask not in found:
        found[mask] = [torch.ones(row.shape, dtype=torch.bool, device=batch.device) for row in rows]
    longest = [max(sizes) for sizes in zip(*(row.shape for row in rows), strict=True)]
    size = (*longest[: batch.stack_dim], len(rows), *longest[batch.stack_dim :])
    padded = TensorDict(batch_size=size, device=batch.device)
    for key, values in found.items():
        stacked = _stack_padded(values, batch.stack_dim, left=key in LEFT_PADDED)
        padded.set(key, stacked)
    return padded


def padded(batch: TensorDictBase, *, mask: NestedKey) -> TensorDictBase:
    """All of a batch, padded where its rows are ragged; else the batch itself.

    What a module that writes into the batch begins with: of ragged rows it returns another batch,
    a dense one. An entry that some rows lack is left out, and text of every step.

    Args:
        batch: Any; rows of unequal lengths, stacked lazily, are padded as ``dense`` pads them.
        mask: Key of the mask.

    Example:
        >>> from tensordict import TensorDict, lazy_stack
        >>> rows = [TensorDict({"x": torch.ones(n)}, []) for n in (1, 2)]
        >>> padded(lazy_stack(rows), mask="mask")["x"]
        tensor([[1., 0.],
                [1., 1.]])
    """
    if not isinstance(batch, LazyStackedTensorDict) or not _is_ragged(batch):
        return batch
    found = dense(batch, _common_keys(batch), mask=mask)
    for key in _common_keys(batch, is_leaf=is_leaf_nontensor):
        if found.get(key, None) is None and -1 not in batch.batch_size:
            text = batch.get(key)
            if isinstance(text, (NonTensorData, NonTensorStack)):
                found.set(key, text)
    if any(batch.names):
        found.names = batch.names
    return found


def _is_ragged(batch: TensorDictBase) -> bool:
    if not isinstance(batch, LazyStackedTensorDict):
        return False
    if -1 in batch.batch_size:
        return True
    rows = batch.unbind(batch.stack_dim)
    if any(_is_ragged(row) for row in rows):
        return True
    return any(
        row.get(key).shape != rows[0].get(key).shape
        for key in _common_keys(batch)
        for row in rows[1:]
    )


def _common_keys(
    batch: LazyStackedTensorDict, is_leaf: Callable[[type], bool] | None = None
) -> list[NestedKey]:
    """Those that every row has; the stack's own ``keys`` fail on text that a row lacks."""
    rows = batch.unbind(batch.stack_dim)
    first, *others = (row.keys(True, True, is_leaf=is_leaf) for row in rows)
    others = [set(keys) for keys in others]
    return [key for key in first if all(key in keys for keys in others)]


def _stack_padded(values: list[Tensor], dim: int, *, left: bool) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    padded = []
    for value in values:
        block = value.new_zeros(shape)
        places = zip(value.shape, shape, strict=True)
        block[tuple(slice(n - m, n) if left else slice(m) for m, n in places)] = value
        padded.append(block)
    return torch.stack(padded, dim)


def read_per_token(batch: TensorDictBase, key: NestedKey, mask: Tensor) -> Tensor:
    """An entry [B, T] or [B, T, 1], as [B, T]; half precision becomes float32.

    Raises:
        ValueError: it is missing or has another shape; both shapes are shown.

    Example:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"x": torch.ones(2, 3, 1)}, [2])
        >>> read_per_token(batch, "x", torch.ones(2, 3).bool()).shape
        torch.Size([2, 3])
    """
    value = read(batch, key)
    if value.ndim == mask.ndim + 1 and value.shape[-1] == 1:
        value = value.squeeze(-1)
    if value.shape != mask.shape:
        raise ValueError(
            f"{key!r} must have the shape of the mask, "
            f"got {tuple(value.shape)} and mask {tuple(mask.shape)}"
        )
    return at_least_float32(value)


def read_heads(batch: TensorDictBase, key: NestedKey, mask: Tensor) -> Tensor:
    """Values [B, T, K], or [B, T] of a single head, as [B, T, K]; at least float32.

    Raises:
        ValueError: they are missing or have another shape; both shapes are shown.

    Example:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"x": torch.ones(2, 3)}, [2])
        >>> read_heads(batch, "x", torch.ones(2, 3).bool()).shape
        torch.Size([2, 3, 1])
    """
    found = read(batch, key)
    value = found.unsqueeze(-1) if found.ndim == mask.ndim else found
    if value.shape[:-1] != mask.shape:
        raise ValueError(
            f"{key!r} must have the shape of the mask and one entry a head, "
            f"got {tuple(found.shape)} and mask {tuple(mask.shape)}"
        )
    return at_least_float32(value)


def read_coefficient(batch: TensorDictBase, key: NestedKey, mask: Tensor) -> Tensor:
    """A coefficient, 0-d, [B], [B, 1], [B, T] or [B, T, 1], as [B, T]; detached.

    Raises:
        ValueError: it is missing or does not broadcast; both shapes are shown.

    Example:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"x": torch.ones(2)}, [2])
        >>> read_coefficient(batch, "x", torch.ones(2, 3).bool()).shape
        torch.Size([2, 3])
    """
    found = at_least_float32(read(batch, key)).detach()
    value = found
    if value.ndim == mask.ndim + 1 and value.shape[-1] == 1:
        value = value.squeeze(-1)
    value = value.reshape(*value.shape, *[1] * (mask.ndim - value.ndim))
    fits = value.ndim == mask.ndim and all(
        have in (1, want) for have, want in zip(value.shape, mask.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{key!r} must be one number, or one per sequence or token, "
            f"got {tuple(found.shape)} and mask {tuple(mask.shape)}"
        )
    return value.expand(mask.shape)


class KeyedModule(TensorDictModuleBase):
    """A module whose keys can be set, as those of a TorchRL loss.

    A subclass has a dataclass ``default_keys`` and makes ``in_keys`` and ``out_keys`` from
    ``self.tensor_keys`` in ``_set_in_out_keys``.
    """

    default_keys: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.tensor_keys = self.default_keys()
        self._set_in_out_keys()

    def _set_in_out_keys(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} must define _set_in_out_keys")

    def set_keys(self, **kwargs: NestedKey) -> None:
        """Read or write other keys than the default ones.

        Raises:
            ValueError: a name is not one of ``default_keys``.
        """
        accepted = sorted(vars(self.tensor_keys))
        for name, key in kwargs.items():
            if name not in accepted:
                raise ValueError(f"{name} is not an accepted tensordict key, accepted: {accepted}")
            setattr(self.tensor_keys, name, key)
        self._set_in_out_keys()
