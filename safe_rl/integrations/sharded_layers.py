"""A language model with adapters, its layers divided over all ranks with FSDP2."""

from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def shard_layers(language_model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Divide every decoder layer, frozen weights and adapters, over all ranks, in place.

    A rank keeps a part of each weight, of its gradient and of its Adam state; a layer is whole
    while it runs. Gradients are averaged over ranks, as by ``DistributedDataParallel``. Embedding,
    last norm and head stay whole on every rank: each step of decoding reads them, so they would be
    gathered nearly all the time, and ``linear_log_probs`` reads the head after the backbone ran.

    Parameters are replaced: take lists of them, and build the optimizer, afterwards. The model may
    come on the CPU; then a GPU holds one whole layer at a time, and never the whole model.

    FSDP2 is called directly, since accelerate 1.15 hears of its FSDP plugin on accelerators only
    and prepares DDP on CPUs; this is one way for both.

    Args:
        language_model: Alike on all ranks. Its class names its layers, as those of transformers do.
        accelerator: Of the run, started by torchrun.

    Raises:
        ValueError: there is one process, the class names no layers, or a parameter outside of the
            layers is trained, whose gradient nobody would average.
    """
    processes = accelerator.num_processes
    if processes == 1:
        raise ValueError("sharding needs at least 2 processes, got 1: start them with torchrun")
    names = set(language_model._no_split_modules or ())
    # From the inside out, as fully_shard asks for.
    layers = [m for m in reversed(list(language_model.modules())) if type(m).__name__ in names]
    if not layers:
        raise ValueError(
            f"language_model must name its layers in _no_split_modules, got {sorted(names)} in "
            f"{type(language_model).__name__}"
        )
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    for name, parameter in language_model.named_parameters():
        if parameter.requires_grad and parameter not in inside:
            raise ValueError(
                f"only parameters of the layers may be trained, got {name}: leave it out of the "
                "adapters' targets"
            )
    mesh = init_device_mesh(accelerator.device.type, (processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    left = {p for p in language_model.parameters() if not isinstance(p, DTensor)}
    for tensor in (*left, *language_model.buffers()):
        tensor.data = tensor.data.to(accelerator.device)
    # A root that divides nothing itself: it lets a layer be gathered while the one before runs.
    fully_shard(language_model.base_model, mesh=mesh, ignored_params=left)
