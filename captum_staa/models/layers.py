"""Layers of a model: finding one by name, the axes of its output, and the way from its cells to pixels."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa._utils.model_state import uncompiled
from captum_staa.grid import TokenGrid
from captum_staa.models.classifier import classifier_of

Cells = tuple[int, int, int]
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


# --- the axes of a layer's output -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerAxes:
    """The order of the axes of a layer's output, to convert it to ``(B, C, t, h, w)`` and back.

    Example:
        >>> import torch
        >>> axes = LayerAxes("(BT)HWC", cells=(8, 7, 7))  # a 2D Swin transformer over the frames of all clips
        >>> features = axes.fold(torch.zeros(16, 7, 7, 96))
        >>> features.shape, axes.unfold(features, torch.zeros(16, 7, 7, 96)).shape
        (torch.Size([2, 96, 8, 7, 7]), torch.Size([16, 7, 7, 96]))

    Args:
        pattern: one letter per axis: B, C, T, H, W, or N for flattened positions. Axes that are folded into one are in
            parentheses, outer axis first. N counts h * w positions if there is a T, and t * h * w if there is not. Axes
            without a letter have size 1.
        cells: ``(t, h, w)``, which split folded axes and positions.
        prefix: number of tokens before the positions (or before the frames, if there are no positions).
        order: order of the positions, ``"thw"`` or ``"hwt"``.

    Raises:
        ValueError: the pattern is not of this form.
    """

    pattern: str
    cells: Cells
    prefix: int = 0
    order: Literal["thw", "hwt"] = "thw"

    def __post_init__(self) -> None:
        letters = "".join(self.groups)
        positions = set(letters) & set("THWN")
        wrong = "N" in letters and (set("HW") & positions)
        if "".join(f"({g})" if len(g) > 1 else g for g in self.groups) != self.pattern or (
            len(set(letters)) != len(letters)
            or not {"B", "C"} <= set(letters) <= set("BCTHWN")
            or wrong
            or not positions
        ):
            raise ValueError(
                f"layer_axes must name each axis of the layer's output once, with B, C and some of T, H, W (or N for "
                f"flattened positions), and folded axes in parentheses, got {self.pattern!r}. Examples: 'BCTHW', "
                f"'BTHWC', 'BNC', '(BT)CHW', '(BT)HWC', '(BT)NC'."
            )

    @property
    def groups(self) -> list[str]:
        """The letters of each axis of the output."""
        return [folded or single for folded, single in re.findall(r"\(([A-Z]+)\)|([A-Z])", self.pattern)]

    @property
    def channel(self) -> int:
        """Index of the channel axis of the output."""
        return self.groups.index("C")

    def fold(self, output: Tensor) -> Tensor:
        """Return the output of the layer as ``(B, C, t, h, w)``, without the prefix.

        Raises:
            ValueError: the output does not have these axes, or not these cells.
        """
        letters = self._letters
        if not self._fits(output):
            raise ValueError(f"the output must have the axes of {self}, got shape {tuple(output.shape)}.")
        if self.prefix:
            axis = self._tokens
            output = output.narrow(axis, self.prefix, output.shape[axis] - self.prefix)
        sizes = [-1 if letter == "B" else size for letter, size in self._sizes(output, letters)]
        value = output.reshape(sizes)
        value = value.permute([letters.index(letter) for letter in "BCTHW" if letter in letters])
        for axis, letter in enumerate("BCTHW"):
            if letter not in letters:
                value = value.unsqueeze(axis)
        return value

    def unfold(self, features: Tensor, output: Tensor) -> Tensor:
        """Return a tensor of the shape of ``output`` with these features ``(B, C, t, h, w)``: the inverse of fold.

        The prefix of ``output`` is kept.
        """
        letters = self._letters
        present = [letter for letter in "BCTHW" if letter in letters]
        for axis, letter in reversed(list(enumerate("BCTHW"))):
            if letter not in letters:
                features = features.squeeze(axis)
        value = features.permute([present.index(letter) for letter in letters])
        axis = self._tokens
        shape = list(output.shape)
        if not self.prefix:
            return value.reshape(shape)
        shape[axis] -= self.prefix
        return torch.cat([output.narrow(axis, 0, self.prefix), value.reshape(shape)], axis)

    def _fits(self, output: Tensor) -> bool:
        if output.ndim != len(self.groups):
            return False
        t, h, w = self.cells
        places = h * w if "T" in "".join(self.groups) else t * h * w
        sizes = {"T": t, "H": h, "W": w, "N": places}
        for group, size in zip(self.groups, output.shape, strict=True):
            if len(group) > 1 and size % prod(sizes.get(letter, 1) for letter in group):
                return False
            if group == "N" and size != places + self.prefix:
                return False
        return True

    @property
    def _letters(self) -> str:
        """The letters of all axes after folded axes and positions are split."""
        split = "".join(self.groups)
        rest = "HW" if "T" in split else "THW"
        return split.replace("N", "HWT" if rest == "THW" and self.order == "hwt" else rest)

    @property
    def _tokens(self) -> int:
        """Index of the axis that begins with the prefix."""
        return next(self.groups.index(name) for name in ("N", "T") if name in self.groups) if self.prefix else -1

    def _sizes(self, output: Tensor, letters: str) -> Iterator[tuple[str, int]]:
        known = dict(zip("THW", self.cells, strict=True))
        single = {group: size for group, size in zip(self.groups, output.shape, strict=True) if len(group) == 1}
        for letter in letters:
            yield letter, single.get(letter, known.get(letter, -1))


# --- which arrangement it is ------------------------------------------------------------------------------------


def axes_of(
    output: Tensor,
    batch: int,
    size: Cells,
    grid: TokenGrid | None,
    witness: ChannelWitness,
    *,
    name: str,
    stated: str | None = None,
    recurrent: nn.RNNBase | None = None,
    other_way: str = "",
) -> LayerAxes:
    """Return the arrangement of a layer's output.

    Args:
        output: the output of the layer.
        batch: B, number of clips.
        size: ``(T, H, W)`` of the clips.
        grid: the grid of the tokens, or None.
        witness: it has watched the forward.
        name: what the layer is called in error messages, such as ``"layer 'stem'"``.
        stated: the pattern that the caller states, or None.
        recurrent: the layer, if it is a recurrent one.
        other_way: how to state another order besides ``layer_axes=``, for the error message.

    Raises:
        ValueError: the order of the axes is unknown or ambiguous, or the stated pattern does not fit.
    """
    if stated is not None:
        return _stated(stated, output, size, grid)
    channel = witness.channel(output)
    fits = [
        axes
        for axes in _candidates(tuple(output.shape), batch, size, grid, witness.cells, recurrent)
        if (channel is None or output.ndim < 4 or axes.channel == channel)
        and all(map(int.__le__, _cells_of(axes, output), size))
    ]
    proportioned = [axes for axes in fits if _proportioned(_cells_of(axes, output), size)]
    if len(fits) > 1 and channel is None:  # cells of one layer have the proportions of the frame
        fits = proportioned or fits
    stretched = bool(fits) and not proportioned and channel is not None and channel == output.ndim - 1 > 2
    if stretched:  # a linear layer or layer norm shows the channels, but also those of (B*T, heads, N, C)
        fits = []
    received = f"got shape {tuple(output.shape)} for {batch} clips of {size} (T, H, W)"
    if len(fits) == 1 and grid is None and fits[0].prefix > 1:
        t, h, w = fits[0].cells
        count = fits[0].prefix
        raise ValueError(
            f"the places of the patches among the tokens of {name} must be known, {received}: {h} x {w} patches per "
            f"frame and {count} other tokens, which may be before or after them. If they are before them, pass "
            f"grid=TokenGrid(t={t}, h={h}, w={w}, prefix={count}, tubelet=(1, {size[1] // h}, {size[2] // w}))."
            f"{f' Otherwise, pass {other_way}.' if other_way else ''}"
        )
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ValueError(
            f"the order of the axes of {name} must be known, {received}, which can be "
            f"{' or '.join(axes.pattern for axes in fits)}. Pass layer_axes={fits[0].pattern!r} or "
            f"layer_axes={fits[1].pattern!r}."
        )
    tokens = grid or (
        "a grid. Pass grid=captum_staa.models.inspect(model, inputs).grid, grid=TokenGrid(...), or a VideoClassifier "
        "around a known transformer"
    )
    seen = f" with channels in axis {channel}" if channel is not None and output.ndim > 3 else ""
    if stretched:
        seen += " and other axes that do not have the proportions of the frame"
    raise ValueError(
        f"the output of {name} must be (B, C, t, h, w), (B, t, h, w, C), (B*T, C, h, w) or (B*T, h, w, C), or tokens "
        f"(B, N, D), (B*t, h*w, D) or (B*h*w, t, D), {received}{seen}. Tokens need {tokens}. For another order, pass "
        f"layer_axes, such as layer_axes='BTHWC'{f' or {other_way}' if other_way else ''}."
    )


def _stated(pattern: str, output: Tensor, size: Cells, grid: TokenGrid | None) -> LayerAxes:
    """Return the arrangement that a caller states.

    Args:
        pattern: as for :class:`LayerAxes`.
        output: the output of the layer.
        size: ``(T, H, W)`` of the clips.
        grid: the grid of the tokens, which splits folded axes and flattened positions, or None.

    Raises:
        ValueError: the pattern does not fit the output, or needs a grid.
    """
    t, h, w = grid.shape if grid else (size[0], 1, 1)
    axes = LayerAxes(pattern, (t, h, w), 0, grid.order if grid else "thw")
    if "N" in "".join(axes.groups) and grid is None:
        raise ValueError(
            f"layer_axes={pattern!r} needs the grid of the positions N, got grid=None. Pass grid=TokenGrid(...)."
        )
    expected = h * w if "T" in "".join(axes.groups) else t * h * w
    counts = dict(zip(axes.groups, output.shape, strict=False))
    prefix = counts["N"] - expected if "N" in counts else 0
    if len(axes.groups) != output.ndim or prefix < 0:
        raise ValueError(
            f"layer_axes must have one entry per axis of the layer's output and fit the grid, got {pattern!r} for "
            f"shape {tuple(output.shape)} and {grid}."
        )
    return LayerAxes(pattern, (t, h, w), prefix, axes.order)


def _candidates(
    shape: tuple[int, ...],
    batch: int,
    size: Cells,
    grid: TokenGrid | None,
    cells: Cells | None,
    recurrent: nn.RNNBase | None,
) -> Iterator[LayerAxes]:
    rows, frames = shape[0], size[0]
    if recurrent is not None:
        if len(shape) == 3:
            yield LayerAxes("BTC" if recurrent.batch_first else "TBC", (shape[recurrent.batch_first], 1, 1))
    elif len(shape) == 5 and rows == batch:
        yield LayerAxes("BCTHW", (shape[2], shape[3], shape[4]))
        yield LayerAxes("BTHWC", (shape[1], shape[2], shape[3]))
    elif len(shape) == 4:
        for t in sorted({frames} | ({grid.t} if grid else set())):
            if rows == batch * t:
                yield LayerAxes("(BT)CHW", (t, shape[2], shape[3]))
                yield LayerAxes("(BT)HWC", (t, shape[1], shape[2]))
    elif len(shape) == 3 and cells is not None:
        yield from _with_prefix("BNC", cells, shape[1] - cells[0] * cells[1] * cells[2], batch == rows)
    elif len(shape) == 3 and grid is not None:
        count = shape[1]
        if rows == batch and count in (grid.num_patches, grid.num_tokens):
            yield LayerAxes("BNC", grid.shape, count - grid.num_patches, grid.order)
        positions = grid.h * grid.w
        if rows == batch * grid.t and count in (positions, grid.prefix + positions):
            yield LayerAxes("(BT)NC", grid.shape, count - positions)
        if rows == batch * positions and count in (grid.t, grid.prefix + grid.t):
            yield LayerAxes("(BN)TC", grid.shape, count - grid.t)
    elif len(shape) == 3:
        if rows == batch and shape[1] == frames:
            yield LayerAxes("BTC", (frames, 1, 1))
        if rows == batch * frames and frames > 1:
            yield from _patches_of_frames(shape[1], size)
    elif len(shape) == 2 and rows == batch * frames and frames > 1:
        yield LayerAxes("(BT)C", (frames, 1, 1))


def _with_prefix(pattern: str, cells: Cells, prefix: int, fits: bool) -> Iterator[LayerAxes]:
    if fits and prefix >= 0:
        yield LayerAxes(pattern, cells, prefix)


def _patches_of_frames(count: int, size: Cells) -> Iterator[LayerAxes]:
    """Yield the grids of square patches, with at most 8 other tokens, that have ``count`` tokens per frame.

    A single other token is a class token, the first one. Grids with more are yielded only if there is no such grid.
    """
    frames, height, width = size
    found = []
    for side in range(1, min(height, width) + 1):
        h, w = height // side, width // side
        if height % side == 0 and width % side == 0 and 0 <= count - h * w <= 8 and h * w > 1:
            found.append(LayerAxes("(BT)NC", (frames, h, w), count - h * w))
    yield from [axes for axes in found if axes.prefix <= 1] or found


def _cells_of(axes: LayerAxes, output: Tensor) -> Cells:
    known = dict(zip(axes.groups, output.shape, strict=True))
    t, h, w = (known.get(letter, cells) for letter, cells in zip("THW", axes.cells, strict=True))
    return t, h, w


def _proportioned(cells: Cells, size: Cells) -> bool:
    """Return whether cells have the height to width ratio of the frame, up to one cell of padding or rounding."""
    (_, h, w), (_, height, width) = cells, size
    return abs(h - w * height / width) <= 1 or abs(w - h * width / height) <= 1


class ChannelWitness:
    """Finds the channel axis of a layer's output from the modules that compute it and that read it.

    A convolution, pooling or batch norm has its channels in axis 1, a linear layer or layer norm in the last one. A
    module of these kinds that reads the output decides. If there is none, the last module of these kinds inside the
    layer decides, among those whose result has the shape of the layer's output.
    """

    def __init__(self) -> None:
        self.cells: Cells | None = None
        self._watched: list[Tensor] = []
        self._readers: set[int] = set()
        self._produced: list[tuple[int, tuple[int, ...]]] = []

    def watch(self, tensor: Tensor, output: Any) -> None:
        """State the tensor that the layer passes on, and all that it returned."""
        self._watched.append(tensor)
        self.cells = _cells_in(output)

    def channel(self, output: Tensor) -> int | None:
        """Return the channel axis of the layer's output, or None if no module shows it."""
        if len(self._readers) == 1:
            return next(iter(self._readers)) % output.ndim
        shape = tuple(output.shape[1:])  # a layer that is called once per frame has another number of rows
        made = [axis for axis, produced in self._produced if produced[1:] == shape]
        return made[-1] % output.ndim if made and not self._readers else None

    @contextmanager
    def watching(self, network: nn.Module, layer: nn.Module) -> Iterator[ChannelWitness]:
        """Watch the modules of the network in the forward passes inside the block."""
        inside = set(layer.modules())
        handles: list[Any] = []

        def reads(module: nn.Module, args: tuple[Any, ...]) -> None:
            value = args[0] if args else None
            if isinstance(value, Tensor) and any(_same(value, watched) for watched in self._watched):
                axis = _channel_axis(module, value, "in")
                if axis is not None:
                    self._readers.add(axis)

        def makes(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and (axis := _channel_axis(module, output, "out")) is not None:
                self._produced.append((axis, tuple(output.shape)))

        for module in network.modules():
            if isinstance(module, _FIRST + _LAST):
                if module in inside:
                    handles.append(module.register_forward_hook(makes))
                else:
                    handles.append(module.register_forward_pre_hook(reads))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


_FIRST: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_LAST: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm)


def _channel_axis(module: nn.Module, value: Tensor, side: Literal["in", "out"]) -> int | None:
    """Return the channel axis of what a module takes or returns: 1, -1, or None if the module does not show it."""
    if isinstance(module, _FIRST):
        return 1
    if isinstance(module, nn.Linear):
        return -1 if value.shape[-1] == (module.in_features if side == "in" else module.out_features) else None
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1:
        fits = [axis for axis in (1, -1) if value.shape[axis] == module.normalized_shape[0]]
        if fits == [1, -1] and type(module) is nn.LayerNorm:
            return -1
        return fits[0] if len(fits) == 1 else None  # subclasses such as timm's LayerNorm2d move the channels
    return None


def _same(value: Tensor, watched: Tensor) -> bool:
    return value is watched or (value.shape == watched.shape and value.data_ptr() == watched.data_ptr())


def first_tensor(output: Any) -> tuple[Any, Callable[[Tensor], Any]]:
    """Return the first item of what a layer returns, and a function that returns the same with this item replaced."""
    if isinstance(output, Mapping) and output:
        name = next(iter(output))

        def replaced(value: Tensor) -> Any:
            changed = copy.copy(output)
            changed[name] = value  # type: ignore[index]
            return changed

        return output[name], replaced
    if isinstance(output, (tuple, list)) and output:
        make = getattr(output, "_make", type(output))
        return output[0], lambda value: make((value, *output[1:]))
    return output, lambda value: value


def _cells_in(output: Any) -> Cells | None:
    """Return ``(t, h, w)`` if a layer returns it after its tokens, as the blocks of MViT do."""
    if isinstance(output, (tuple, list)):
        for item in output[1:]:
            if isinstance(item, Sequence) and len(item) == 3 and all(isinstance(side, int) for side in item):
                return item[0], item[1], item[2]
    return None
