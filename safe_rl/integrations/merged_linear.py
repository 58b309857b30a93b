"""Linear layers with their LoRA adapters merged in, in memory of their own: the base stays."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from safe_rl.integrations.packed_linear import can_pack, pack, packed_linear, packed_shape


def is_mergeable(projection: nn.Module) -> bool:
    """Whether the weight of a projection can be written as W + sum of scale * B A.

    Args:
        projection: Any module.

    Returns:
        True for a plain linear layer and for a plain LoRA layer over one; False for variants
        (DoRA and others), adapters with a bias and quantised or other base layers.

    Example:
        >>> is_mergeable(torch.nn.Linear(2, 3)), is_mergeable(torch.nn.Embedding(2, 3))
        (True, False)
    """
    if type(projection) is not LoraLinear:
        return type(projection) is nn.Linear
    return (
        type(projection.base_layer) is nn.Linear
        and not projection.lora_variant
        and not any(projection.lora_bias.values())
    )


class MergedLinear(nn.Module):
    """Several linear layers of one input as one, adapters included, on weights of its own.

        y = x [W_1 + c_1 B_1 A_1; W_2 + c_2 B_2 A_2; ...]^T + [b_1; b_2; ...]

    The weights of the sources are read, never written: a merge in place rounds them at every
    update, and with them the reference policy. ``refresh`` takes over what has changed; adapters
    that are switched off are left out. In float32 on a CPU the weights are packed, where there is a
    C compiler, and the product is that of ``packed_linear``, which has no gradient.

    Args:
        projections: Linear layers of one input width, with or without LoRA.

    Raises:
        ValueError: a projection is neither a plain linear layer nor plain LoRA over one.

    Example:
        >>> first, second = torch.nn.Linear(2, 3), torch.nn.Linear(2, 1)
        >>> merged = MergedLinear([first, second])
        >>> merged.refresh()
        >>> with torch.no_grad():
        ...     merged(torch.ones(5, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, projections: Sequence[nn.Module]) -> None:
        super().__init__()
        for projection in projections:
            if not is_mergeable(projection):
                raise ValueError(
                    "projections must be plain linear layers or plain LoRA over one, got "
                    f"{type(projection).__name__}: sample with merged=False"
                )
        # Held in a tuple, the sources are not registered a second time.
        self._sources = tuple(projections)
        bases = [_base(projection) for projection in projections]
        self.in_features = bases[0].in_features
        self.out_features = self._height()
        self.packed = False
        """Whether ``weight`` is in the order of ``packed_linear``; of the last ``refresh``."""
        self.weight: Tensor
        self.bias: Tensor | None
        has_bias = any(base.bias is not None for base in bases)
        self.register_buffer("weight", bases[0].weight.new_empty(0), persistent=False)
        bias = bases[0].weight.new_zeros(self.out_features) if has_bias else None
        self.register_buffer("bias", bias, persistent=False)

    def refresh(self) -> None:
        """Write the sources' present weights, adapters merged, into the own ones."""
        like = _base(self._sources[0]).weight
        # What is made in inference mode could not be written outside of it; leaving it, gradients
        # are recorded.
        with torch.inference_mode(False), torch.no_grad():
            self.to(like.device, like.dtype)  # does nothing unless the sources have been moved
            self._write(like)

    def _write(self, like: Tensor) -> None:
        shape = self.out_features, _ = self._height(), like.shape[1]
        self.packed = can_pack(like)
        held = packed_shape(*shape) if self.packed else shape
        own = self.weight if self.weight.shape == held else None
        if not self.packed:
            self.weight = self._merge(like.new_empty(shape) if own is None else own)
        elif len(self._sources) == 1 and type(self._sources[0]) is nn.Linear:
            self.weight = pack(like, own)
        else:
            self.weight = pack(self._merge(like.new_empty(shape)), own)
        if self.bias is None:
            return
        if len(self.bias) != self.out_features or self.bias.is_inference():
            self.bias = self.bias.new_empty(self.out_features)
        for rows, source in self._rows():
            bias = _base(source).bias
            self.bias[rows] = 0 if bias is None else bias

    def _merge(self, out: Tensor) -> Tensor:
        for rows, source in self._rows():
            _write_merged(source, out[rows])
        return out

    def _height(self) -> int:
        """Outputs of all sources together, now: a vocabulary may grow."""
        return sum(len(_base(source).weight) for source in self._sources)

    def _rows(self) -> Iterator[tuple[slice, nn.Module]]:
        start = 0
        for source in self._sources:
            end = start + len(_base(source).weight)
            yield slice(start, end), source
            start = end

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out of all sources, one after the other]."""
        if not self.packed:
            return F.linear(x, self.weight, self.bias)
        # Under autocast attention makes half precision of it; the product stays in float32.
        y = packed_linear(x.to(self.weight.dtype), self.weight, width=self.out_features)
        return y if self.bias is None else y.add_(self.bias)


class MergedAdapters:
    """Every LoRA layer of a model, merged; in force inside ``with merged.in_place():``.

    The model's layers are exchanged for merged ones and put back afterwards, so that its own
    forward runs without adapters and none of its tensors is written.

    Args:
        model: With or without LoRA layers.

    Raises:
        ValueError: a LoRA layer cannot be merged; the message names it.

    Example:
        >>> merged = MergedAdapters(torch.nn.Sequential(torch.nn.Linear(2, 3)))
        >>> with merged.in_place():
        ...     pass
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[nn.Module, str, nn.Module, MergedLinear]] = []
        modules = dict(model.named_modules())
        for name, module in modules.items():
            if not isinstance(module, LoraLayer):
                continue
            if not is_mergeable(module):
                raise ValueError(
                    f"{name} is no plain LoRA layer over a linear one ({type(module).__name__}) "
                    "and cannot be merged: sample with merged=False"
                )
            parent, _, child = name.rpartition(".")
            self._places.append((modules[parent], child, module, MergedLinear([module])))

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Merge the present weights and let the model compute with them."""
        for _, _, _, merged in self._places:
            merged.refresh()
        try:
            for parent, child, _, merged in self._places:
                setattr(parent, child, merged)
            yield
        finally:
            for parent, child, module, _ in self._places:
                setattr(parent, child, module)


def _base(projection: Any) -> nn.Linear:
    return projection.base_layer if isinstance(projection, LoraLayer) else projection


def _write_merged(projection: nn.Module, out: Tensor) -> None:
    weight = _base(projection).weight
    out.copy_(weight)
    # With `merged`, peft itself has put the adapters into the base weight.
    if not isinstance(projection, LoraLinear) or projection.disable_adapters or projection.merged:
        return
    for name in projection.active_adapters:
        if name not in projection.lora_A:
            continue
        up, down = projection.lora_B[name].weight, projection.lora_A[name].weight
        scale = projection.scaling[name]
        if up.dtype == out.dtype:
            out.addmm_(up, down, alpha=scale)
        else:
            # Adapters in float32 over a half-precision base: round once, at the end.
            out.copy_(out.to(up.dtype).addmm_(up, down, alpha=scale))
