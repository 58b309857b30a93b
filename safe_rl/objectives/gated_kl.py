"""The KL penalty, with the gradient it should have."""

from dataclasses import dataclass

from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from safe_ops import fill_masked, kl_k1, kl_k3, kl_surrogate, masked_mean
from safe_rl.keys import read, read_per_token
from safe_rl.objectives.base import Objective


class GatedKLLoss(Objective):
    """The penalty that the controller asks for, as a loss that is linear in the tokens.

        loss_kl = kl_coef * sum_t s_t / (B * N)        s: kl_surrogate, N: mean response tokens

    ``kl_coef`` is f'(KL), made once per rollout by the controller with gate, threshold and lead
    in it, so the gradient is f'(KL) / N * grad KL(pi || ref), with importance weights in later
    epochs.

    Args:
        network: See ``Objective``.

    Raises:
        ValueError: a key is missing or of the wrong shape.

    Source: SAFE (arXiv 2602.04651); gradient: Tang & Munos (arXiv 2506.09477).

    Example:
        >>> from tensordict import TensorDict
        >>> one = torch.ones(1, 2)
        >>> batch = TensorDict({"log_prob": -one, "old_log_prob": -one, "ref_log_prob": -2 * one,
        ...     "kl_coef": torch.tensor([0.5]), "response_mask": one.bool()}, [1])
        >>> GatedKLLoss()(batch)["loss_kl"]
        tensor(0.5000)
    """

    @dataclass
    class _AcceptedKeys(Objective._AcceptedKeys):
        log_prob: NestedKey = "log_prob"
        old_log_prob: NestedKey = "old_log_prob"
        ref_log_prob: NestedKey = "ref_log_prob"
        kl_coef: NestedKey = "kl_coef"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    reads = ("log_prob", "old_log_prob", "ref_log_prob", "kl_coef", "response_mask")
    writes = ("loss_kl", "kl_k1_nats_per_token", "kl_k3_nats_per_token")

    def terms(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """See the class."""
        mask, keys = self.mask_of(batch), self.tensor_keys
        log_prob = read_per_token(batch, keys.log_prob, mask)
        ref_log_prob = read_per_token(batch, keys.ref_log_prob, mask)
        coef = read(batch, keys.kl_coef).detach()
        surrogate = kl_surrogate(
            log_prob,
            ref_log_prob,
            mask=mask,
            old_log_prob=read_per_token(batch, keys.old_log_prob, mask),
        )
        held = fill_masked(log_prob.detach(), mask), fill_masked(ref_log_prob, mask)
        # [B], [B, 1] and [B, T] coefficients all stand for one per row or token.
        coef = coef.reshape(*coef.shape, *[1] * (mask.ndim - coef.ndim))
        return {
            "loss_kl": self.token_mean(coef * surrogate, mask, batch),
            "kl_k1_nats_per_token": masked_mean(kl_k1(*held), mask),
            "kl_k3_nats_per_token": masked_mean(kl_k3(*held), mask),
        }
