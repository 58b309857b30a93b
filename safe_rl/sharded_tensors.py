"""Parameters that FSDP2 has divided over ranks: read whole, and written from what is whole."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is divided over ranks, any other as it is.

    Where it is divided, every rank must call: each gives its part and gets all of them.

    Args:
        tensor: Any; not changed.

    Returns:
        A plain tensor of the same shape.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_on_cpu(tensor: Tensor) -> Tensor:
    """``whole``, and on the CPU where it was divided: no GPU is to hold the whole of all of them.

    Example:
        >>> whole_on_cpu(torch.ones(2))
        tensor([1., 1.])
    """
    return whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This rank's part of a whole tensor, where ``model`` is divided; else the tensor itself.

    Args:
        tensor: Plain, alike on all ranks: nothing is sent.
        model: Whose division is taken over.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> divided_like(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if tensor.shape != model.shape:
        raise ValueError(
            f"tensor must have the shape of model {tuple(model.shape)}, got {tuple(tensor.shape)}"
        )
    if not isinstance(model, DTensor):
        return tensor
    local = tensor.to(model.device)
    return distribute_tensor(local, model.device_mesh, model.placements, src_data_rank=None)
