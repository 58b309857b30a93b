"""The default keys of a batch, in one table, and how its entries are read.

B sequences, T response tokens, K critic heads. Nats are per token and at the sampling temperature.

| key | shape | unit | written by | read by |
|---|---|---|---|---|
| ``("tokens", "prompt")`` | [B, P] | ids, left-padded | rollout | actor-critic |
| ``("tokens", "response")`` | [B, T] | ids, right-padded | rollout | actor-critic |
| ``prompt_mask`` | [B, P] | bool, True counts | rollout | actor-critic |
| ``response_mask`` | [B, T] | bool, True counts, EOS included | rollout | all |
| ``response_tokens_mean`` | [B] | tokens per sequence | measurements, over ranks | objectives |
| ``old_log_prob`` | [B, T] | nats | scoring, before the update | objectives, measurements |
| ``ref_log_prob`` | [B, T] | nats | scoring, adapters off | objectives, measurements |
| ``log_prob`` | [B, T] | nats | actor-critic, every minibatch | objectives |
| ``entropy`` | [B, T] | nats | actor-critic | objectives, measurements |
| ``state_values`` | [B, T, K] | reward | actor-critic, *before* token t | objectives, advantages |
| ``old_state_values`` | [B, T, K] | reward | scoring | the value loss, if it clips |
| ``bootstrap_values`` | [B, K] | reward, after the last token | scoring | advantages |
| ``("next", "state_values")`` | [B, T, K] | reward, after step t | environments | advantages |
| ``score`` | [B] | reward | scoring | measurements |
| ``reward`` | [B, T, 1] | reward, on the last valid token | scoring, ``KLReward`` | advantages |
| ``terminated``, ``truncated``, ``done`` | [B, T, 1] | bool | scoring | advantages |
| ``state_value`` | [B, T, 1] | reward, soft-min of the heads | advantages | logs |
| ``advantage``, ``value_target`` | [B, T, 1] | reward | advantages | objectives |
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
"""

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

RESPONSE_MASK = "response_mask"
RESPONSE_TOKENS_MEAN = "response_tokens_mean"


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
    """A module without parameters whose keys can be set, as those of a TorchRL loss.

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
