"""A layer of a model by name, its output as features over space and time and back, and from its cells to pixels."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa._utils.model_state import uncompiled
from captum_staa.grid import TokenGrid
from captum_staa.models.classifier import classifier_of

# F.interpolate's "nearest" looks half a cell to the left.
MODES = {"trilinear": "trilinear", "nearest": "nearest-exact"}


def network_of(model: nn.Module) -> nn.Module:
    """The network that runs inside a compiled module, a classifier, or a compiled classifier."""
    classifier = classifier_of(model)
    return uncompiled(model if classifier is None else classifier.module)


def find_layer(forward_func: nn.Module, layer: nn.Module | str) -> tuple[nn.Module, str]:
    """A layer and its name among the ``named_modules()`` of a model, or of a classifier's ``.module``.

    Raises:
        ValueError: there is no such layer; close names are listed.
        TypeError: ``layer`` is neither a module nor a name.
    """
    model = network_of(forward_func)
    names = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, str):
        if layer not in names:
            close = ", ".join(map(repr, get_close_matches(layer, names, cutoff=0.3))) or "see model.named_modules()"
            raise ValueError(f"{type(model).__name__} has no layer {layer!r}; perhaps {close}")
        return names[layer], layer
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer is a module or its name, got {type(layer).__name__}")
    for name, module in names.items():
        if module is layer:
            return layer, name
    raise ValueError(f"the layer {type(layer).__name__} is no part of this {type(model).__name__}; is it of a copy?")


def to_features(output: Tensor, grid: TokenGrid | None) -> Tensor | None:
    """``(B, C, t, h, w)`` of a layer's output; None where its shape does not say how.

    Args:
        output: ``(B, C, t, h, w)``; or with a grid ``(B, N, C)`` tokens, with or without the prefix, which is dropped,
            or ``(B*t, C, h, w)``, a 2D convolution's over the frames of all clips, clip after clip.
        grid: where the tokens stand.
    """
    if output.ndim == 5:
        return output
    if grid is None:
        return None
    if output.ndim == 3 and output.shape[1] in (grid.num_patches, grid.num_tokens):
        return grid.to_grid(output.transpose(1, 2))
    if output.ndim == 4 and len(output) % grid.t == 0:
        return output.unflatten(0, (-1, grid.t)).transpose(1, 2)
    return None


def from_features(features: Tensor, output: Tensor, grid: TokenGrid | None) -> Tensor:
    """The inverse: a tensor of ``output``'s shape with these features, the prefix of its tokens untouched."""
    if output.ndim == 5:
        return features
    if output.ndim == 4:
        return features.transpose(1, 2).flatten(0, 1)
    assert grid is not None
    tokens = grid.to_tokens(features).transpose(1, 2)  # (B, N, C)
    prefix = output[:, : output.shape[1] - grid.num_patches]
    return torch.cat([prefix, tokens], 1) if prefix.shape[1] else tokens


def to_pixels(
    cells: Tensor,
    size: tuple[int, int, int],
    grid: TokenGrid | None = None,
    upsampling: Literal["trilinear", "nearest"] = "trilinear",
) -> Tensor:
    """``(B, t, h, w)`` values of cells to ``(B, T, H, W)`` values of the pixels behind them.

    Args:
        cells: one value per cell of a layer.
        size: ``(T, H, W)`` of the clip.
        grid: its tokens' places, where the cells are tokens: they may leave pixels over.
        upsampling: ``"trilinear"`` between the cells' centers, or ``"nearest"``.
    """
    if grid is not None and tuple(cells.shape[1:]) == grid.shape:
        return grid.to_pixels(cells, upsampling, size)
    return F.interpolate(cells[:, None], size=size, mode=MODES[upsampling])[:, 0]


def covered(cells: Tensor, size: tuple[int, int, int], grid: TokenGrid | None = None) -> tuple[int, int, int]:
    """``(T, H, W)`` of the pixels behind cells ``(B, t, h, w)`` as :func:`to_pixels` draws them."""
    return grid.pixels if grid is not None and tuple(cells.shape[1:]) == grid.shape else size
