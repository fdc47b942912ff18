"""Find a layer of a model by name, and upsample values of its cells to pixels."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa._utils.model_state import uncompiled
from captum_staa.grid import TokenGrid
from captum_staa.models.classifier import classifier_of

# The "nearest" mode of F.interpolate is shifted by half a cell, "nearest-exact" is not.
MODES = {"trilinear": "trilinear", "nearest": "nearest-exact"}


def network_of(model: nn.Module) -> nn.Module:
    """Return the network inside a compiled module, a classifier, or a compiled classifier."""
    classifier = classifier_of(model)
    return uncompiled(model if classifier is None else classifier.module)


def find_layer(forward_func: nn.Module, layer: nn.Module | str) -> tuple[nn.Module, str]:
    """Return a layer and its name in ``named_modules()`` of a model, or of a classifier's ``.module``.

    Args:
        forward_func: the model or classifier.
        layer: the layer, or its name.

    Raises:
        ValueError: the layer does not exist. The message lists similar names.
        TypeError: ``layer`` is neither a module nor a name.
    """
    model = network_of(forward_func)
    names = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, str):
        if layer not in names:
            close = ", ".join(map(repr, get_close_matches(layer, names, cutoff=0.3)))
            hint = f"Similar names: {close}" if close else "See model.named_modules() for all names."
            raise ValueError(f"{type(model).__name__} has no layer {layer!r}. {hint}")
        return names[layer], layer
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a module or its name, got {type(layer).__name__}")
    for name, module in names.items():
        if module is layer:
            return layer, name
    raise ValueError(
        f"layer must be a part of this {type(model).__name__}, got a {type(layer).__name__} that is not. Check that it "
        f"is not a layer of a copy of the model."
    )


def to_pixels(
    cells: Tensor,
    size: tuple[int, int, int],
    grid: TokenGrid | None = None,
    upsampling: Literal["trilinear", "nearest"] = "trilinear",
) -> Tensor:
    """Upsample values of cells ``(B, t, h, w)`` to values per pixel ``(B, T, H, W)``.

    Args:
        cells: one value per cell of a layer.
        size: ``(T, H, W)`` of the clip.
        grid: the grid of the tokens, if the cells are tokens. The tokens may not cover all pixels.
        upsampling: ``"trilinear"`` interpolates between the centers of the cells. ``"nearest"`` does not interpolate.
    """
    if grid is not None and tuple(cells.shape[1:]) == grid.shape:
        return grid.to_pixels(cells, upsampling, size)
    return F.interpolate(cells[:, None], size=size, mode=MODES[upsampling])[:, 0]


def covered(cells: Tensor, size: tuple[int, int, int], grid: TokenGrid | None = None) -> tuple[int, int, int]:
    """Return ``(T, H, W)`` of the pixels that the cells ``(B, t, h, w)`` cover in :func:`to_pixels`."""
    return grid.pixels if grid is not None and tuple(cells.shape[1:]) == grid.shape else size
