"""The default keys of a batch, in one table.

B sequences, T response tokens, K critic heads. Nats are per token and at the sampling temperature.

| key | shape | unit | written by | read by |
|---|---|---|---|---|
| ``("tokens", "prompt")`` | [B, P] | ids | rollout | actor-critic |
| ``("tokens", "response")`` | [B, T] | ids | rollout | actor-critic |
| ``response_mask`` | [B, T] | bool, True counts, EOS included | rollout | all |
| ``response_tokens_mean`` | [B] | tokens | rollout | objectives |
| ``old_log_prob`` | [B, T] | nats | scoring, before the update | objectives, measurements |
| ``ref_log_prob`` | [B, T] | nats | scoring, adapters off | objectives, measurements |
| ``log_prob`` | [B, T] | nats | actor-critic, every minibatch | objectives |
| ``entropy`` | [B, T] | nats | actor-critic | objectives, measurements |
| ``state_values`` | [B, T, K] | reward | actor-critic, *before* token t | objectives, advantages |
| ``bootstrap_values`` | [B, K] | reward, after the last token | scoring | advantages |
| ``score`` | [B] | reward | scoring | measurements |
| ``reward`` | [B, T, 1] | reward, on the last valid token | scoring | advantages |
| ``terminated``, ``truncated``, ``done`` | [B, T, 1] | bool | scoring | advantages |
| ``advantage``, ``value_target`` | [B, T, 1] | reward | advantages | objectives |
| ``kl_threshold``, ``entropy_gate``, ``kl_coef`` … | [B] | see the law | controller | objectives |

``log_prob`` and ``old_log_prob`` are two keys because both are in the batch at once: the ratio of
the fresh one to the stored one is the importance weight.
"""

from tensordict import TensorDictBase
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


def read_per_token(batch: TensorDictBase, key: NestedKey, mask: Tensor) -> Tensor:
    """An entry [B, T] or [B, T, 1], as [B, T].

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
    return value
