"""Images for models whose positions have three dimensions (Qwen2-VL and what came after it).

Such a model gives the patches of an image their place in time, height and width, and goes on behind
it at the largest: counting tokens would be another model. It takes the patches of all rows as one
list, where a batch has them row by row.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PATCHES = {"image_grid_thw": "pixel_values", "video_grid_thw": "pixel_values_videos"}
"""Name of the sizes of the images to that of their patches."""


def positions_are_the_models(
    language_model: nn.Module, backbone: nn.Module, names: Collection[str]
) -> bool:
    """Whether the backbone makes the positions of the inputs of those names itself.

    Args:
        language_model: The whole model.
        backbone: Its part that is called.
        names: Of the arguments that the backbone gets beside tokens and mask.

    Raises:
        ValueError: its positions have three dimensions, and it does not make them.

    Example:
        >>> positions_are_the_models(nn.Identity(), nn.Identity(), ["pixel_values"])
        False
    """
    has_images = any("pixel_values" in name or name in PATCHES for name in names)
    if "position_ids" in names or not has_images:
        return False
    if hasattr(backbone, "get_rope_index"):
        return True
    config: Any = getattr(language_model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rope = getattr(text, "rope_parameters", None) or {}
    if hasattr(language_model, "get_rope_index") or "mrope_section" in rope:
        raise ValueError(
            f"language_model is a {type(language_model).__name__}, whose positions of images have "
            "three dimensions and are not made by its backbone: give them, [B, 3, P + T], as "
            "'position_ids' among model_inputs"
        )
    return False


def as_the_model_takes_them(
    config: Any, given: dict[str, Tensor], prompt: Tensor, response: Tensor
) -> dict[str, Tensor]:
    """Patches and sizes of all rows in one list, and which tokens stand for an image.

    Args:
        config: The model's, for ``image_token_id``.
        given: Row by row: sizes [B, 3] or [B, I, 3] (time, height, width, in patches; 0 for no
            image), patches [B, N, D] (what a row has too many of is left out), and
            ``mm_token_type_ids`` [B, P], where there are any; anything else is passed on. Sizes and
            patches are left out where no row has an image.
        prompt: Token ids, [B, P].
        response: Token ids, [B, T]; they are text: a sampler must not draw the ids of images.

    Raises:
        ValueError: a row has fewer patches than its sizes say, shapes are others, or videos come
            without ``mm_token_type_ids``.

    Example:
        >>> patches = {"pixel_values": torch.ones(2, 6, 1), "image_grid_thw": torch.tensor(
        ...     [[1, 2, 2], [1, 2, 3]]), "mm_token_type_ids": torch.ones(2, 1).int()}
        >>> ids = torch.zeros(2, 1).long()
        >>> taken = as_the_model_takes_them(None, patches, ids, ids)
        >>> taken["pixel_values"].shape, taken["mm_token_type_ids"].tolist()
        (torch.Size([10, 1]), [[1, 0], [1, 0]])
    """
    taken = dict(given)
    for sizes, values in PATCHES.items():
        if sizes in given and values in given:
            taken[sizes], taken[values] = _in_one_list(sizes, given[sizes], values, given[values])
            if taken[sizes].shape[0] == 0:
                del taken[sizes], taken[values]
    types = given.get("mm_token_type_ids")
    if types is None:
        if "video_grid_thw" in given:
            raise ValueError("model_inputs must name mm_token_type_ids where it names videos")
        types = (prompt == config.image_token_id).int()
    if types.shape != prompt.shape:
        raise ValueError(
            "'mm_token_type_ids' must have the shape of the prompt's tokens "
            f"{tuple(prompt.shape)}, got {tuple(types.shape)}"
        )
    taken["mm_token_type_ids"] = F.pad(types, (0, response.shape[1]))
    return taken


def _in_one_list(sizes: str, grid: Tensor, name: str, patches: Tensor) -> tuple[Tensor, Tensor]:
    grid = grid.unsqueeze(1) if grid.ndim == 2 else grid
    if grid.ndim != 3 or grid.shape[-1] != 3 or patches.ndim != 3:
        raise ValueError(
            f"{sizes!r} must be [B, 3] or [B, I, 3] and {name!r} [B, N, D], "
            f"got {tuple(grid.shape)} and {tuple(patches.shape)}"
        )
    of_images = grid.prod(-1)
    count = of_images.sum(1, keepdim=True)
    if (count > patches.shape[1]).any():
        raise ValueError(
            f"{name!r} must have the patches that {sizes!r} says, {count.squeeze(1).tolist()} "
            f"a row, got {patches.shape[1]}"
        )
    places = torch.arange(patches.shape[1], device=patches.device) < count
    return grid[of_images > 0], patches[places]
