"""Control maps that do not depend on the model. Every attribution method must score better than they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.checks import check_choice, generator_or_seeded
from captum_staa._utils.tensors import gaussian
from captum_staa.layout import VideoLayout
from captum_staa.result import Array, Inputs, clips_in, for_each, maps_for

SMOOTHING = (1.0, 2.0, 2.0)  # standard deviations of model-free controls: frames, pixels down, pixels right
FLOW_WINDOW = (0.0, 2.0, 2.0)  # standard deviations of the neighborhood in which motion is assumed equal
SPECTRUM_SIDE = 64  # pixels along the shorter side of a frame at which the spectral residual is defined


def controls(
    inputs: Inputs,
    layout: VideoLayout | str,
    attributions: Array | tuple[Array, ...] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Inputs]:
    """Return control maps for a clip: random, uniform, center and, if attributions are passed, their inverse.

    Example:
        >>> inputs = torch.rand(2, 3, 8, 16, 16)
        >>> maps = controls(inputs, "BCTHW", attributions=torch.randn(2, 3, 8, 16, 16))
        >>> {name: tuple(control.shape) for name, control in maps.items()}
        {'random': (2, 8, 16, 16), 'uniform': (2, 8, 16, 16), 'center': (2, 8, 16, 16), 'inverted': (2, 8, 16, 16)}
        >>> from captum_staa import metrics
        >>> truth = torch.zeros(2, 8, 16, 16, dtype=torch.bool)
        >>> truth[:, 3:5, 6:10, 6:10] = True  # the subject is in the middle
        >>> metrics.auroc(maps["uniform"], truth), metrics.auroc(maps["center"], truth) > 0.9
        (tensor([0.5000, 0.5000], dtype=torch.float64), tensor([True, True]))

    - ``random``: each voxel is drawn uniformly from [0, 1). Shows the chance level of a metric without ties.
    - ``uniform``: 1 everywhere. Shows how a metric scores ties.
    - ``center``: ``1 - d / sqrt(3)``, where ``d`` is the distance of the voxel's center from the center of the clip, in
      units of half the clip's length, height and width. Values are in (0, 1]. If evidence tends to lie in the middle,
      a method must score better than this map, not only better than the random one.
    - ``inverted``: the negative of the map. A metric that gives it the same score as the map ignores the order.

    Args:
        inputs: clips, a 5-D tensor of floats, or a tuple of them (RGB and flow). Only shape and device are used.
        layout: order of the axes of ``inputs``, such as ``"BTCHW"``.
        attributions: what to invert, in the shape of ``inputs`` (channels are summed), or maps ``(B, T, H, W)``.
        generator: draws the random maps. None uses a new generator with seed 0 in each call. Clips are drawn one after
            the other: with one generator for several calls, the map of a clip does not depend on the batch size.

    Returns:
        Maps ``(B, T, H, W)`` by name, float64 on the device of ``inputs``. In float32, voxels would often tie. For a
        tuple, each name has a tuple of maps.

    Raises:
        TypeError: ``inputs`` or ``attributions`` is not a tensor of floats, or ``generator`` is not a torch.Generator.
        ValueError: shapes do not fit the layout or each other, or values are nan or infinite.

    Reference:
        The center as a baseline: Judd, Ehinger, Durand and Torralba, "Learning to Predict Where Humans Look", ICCV
        (2009).
    """
    layout = VideoLayout.of(layout)
    clips = clips_in(inputs, layout)
    draw = generator_or_seeded(generator)
    maps = () if attributions is None else maps_for(attributions, clips, layout)

    def random(clip: Tensor, layout: VideoLayout) -> Tensor:
        size = layout.extent(clip)
        drawn = [torch.rand(size, generator=draw, dtype=torch.float64, device=draw.device) for _ in clip]
        return torch.stack(drawn).to(clip.device)

    def uniform(clip: Tensor, layout: VideoLayout) -> Tensor:
        return clip.new_ones(len(clip), *layout.extent(clip), dtype=torch.float64)

    def center(clip: Tensor, layout: VideoLayout) -> Tensor:
        return _center(*layout.extent(clip)).to(clip.device).repeat(len(clip), 1, 1, 1)

    made = {make.__name__: for_each(inputs, layout, make) for make in (random, uniform, center)}
    if maps:
        left = iter(maps)
        made["inverted"] = for_each(inputs, layout, lambda clip, _: -next(left).to(clip.device))
    return made


def model_free_controls(
    inputs: Inputs, layout: VideoLayout | str, names: Sequence[str] | None = None
) -> dict[str, Inputs]:
    """Return maps that depend on the clip but not on the model: detectors of contrast, edges and motion.

    Example:
        >>> inputs, truth = torch.zeros(1, 6, 3, 24, 24), torch.zeros(1, 6, 24, 24, dtype=torch.bool)
        >>> for t in range(6):
        ...     truth[:, t, 12:20, 2 * t : 2 * t + 8] = True  # a gray square that moves to the right
        >>> inputs += 0.4 * truth[:, :, None]
        >>> inputs[..., 2:8, 2:8] = 1.0  # a brighter square that does not move
        >>> maps = model_free_controls(inputs, "BTCHW")
        >>> list(maps)
        ['absolute input', 'difference from mean frame', 'image gradient', 'frame difference', 'optical flow',
         'spectral residual', 'center']
        >>> from captum_staa import metrics
        >>> [metrics.auroc(maps[name], truth).item() > 0.9 for name in ("frame difference", "image gradient")]
        [True, False]

    A method that explains the model must beat these maps; a benchmark on which one of them does well can be solved
    without the model. All are at least 0.

    - ``absolute input``: ``|x|``, summed over channels. Where inputs are normalized, this is the distance from the
      mean color.
    - ``difference from mean frame``: ``|x - mean of x over time|``, summed over channels.
    - ``image gradient``: length of the spatial gradient by central differences, summed over channels.
    - ``frame difference``: mean of ``|x_t - x_(t-1)|`` and ``|x_(t+1) - x_t|``, summed over channels. The first and
      the last frame have only one neighbor.
    - ``optical flow``: length of the motion in pixels per frame by Lucas and Kanade's method, mean of the flow from the
      frame before and to the frame after.
    - ``spectral residual``: Hou and Zhang's detector of salient objects, frame by frame on the mean of the channels.
      Frames are reduced to about 64 pixels along the shorter side, as in the paper. Amplitudes below the rounding noise
      of 8-bit frames are raised to it, and the frequency 0 is left out, so that a blank frame is 0.
    - ``center``: how near a voxel is to the middle of the clip, as in :func:`controls`.

    All but ``center`` are smoothed with a Gaussian, sigma = 1 frame and 2 pixels.

    Args:
        inputs: floats, 5-D; frames of at least 2 x 2 pixels. Or a tuple of such clips, each with its own maps.
        layout: order of the axes of ``inputs``, such as ``"BTCHW"``.
        names: the maps to compute. None computes all of them.

    Returns:
        Maps ``(B, T, H, W)`` by name, float64 on the device of ``inputs``. ``frame difference`` and ``optical flow``
        of a single frame are 0. For a tuple, each name has a tuple of maps.

    Raises:
        TypeError: ``inputs`` is not a tensor of floats.
        ValueError: ``inputs`` does not fit the layout, contains nan or infinity, or its frames are too small.

    Reference:
        Hou and Zhang, "Saliency Detection: A Spectral Residual Approach", CVPR (2007). Lucas and Kanade, "An Iterative
        Image Registration Technique with an Application to Stereo Vision", IJCAI (1981).
    """
    layout = VideoLayout.of(layout)
    several = isinstance(inputs, tuple)
    each: list[Any] = [_model_free(clip, layout, names) for clip in clips_in(inputs, layout)]
    made: Any = {name: tuple(maps[name] for maps in each) for name in each[0]} if several else each[0]
    return made


def _model_free(clip: Tensor, layout: VideoLayout, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Return the maps of :func:`model_free_controls` for one input."""
    extent = layout.extent(clip)
    if min(extent[1:]) < 2:
        raise ValueError(
            f"frames must have at least 2 x 2 pixels, because gradient and optical flow compare neighbors, got inputs "
            f"of shape {tuple(clip.shape)} in layout {layout.axes}. Use controls for such clips."
        )
    frames = layout.to_working(clip.detach()).double().contiguous()  # (B, T, C, H, W)
    change = frames - frames[:, :1]  # exactly 0 in a static clip, whose mean can have a rounding error
    steps = frames.diff(dim=1).abs().sum(2)  # (B, T - 1, H, W)

    def smoothed(values: Tensor) -> Tensor:
        return gaussian(values, SMOOTHING).contiguous()

    maps: dict[str, Callable[[], Tensor]] = {
        "absolute input": lambda: smoothed(frames.abs().sum(2)),
        "difference from mean frame": lambda: smoothed((change - change.mean(1, keepdim=True)).abs().sum(2)),
        "image gradient": lambda: smoothed(torch.hypot(*torch.gradient(frames, dim=(3, 4))).sum(2)),
        "frame difference": lambda: smoothed(_both_sides(steps, steps)),
        "optical flow": lambda: smoothed(_flow_speed(frames.mean(2))),
        "spectral residual": lambda: smoothed(_spectral_residual(frames.mean(2))),
        "center": lambda: _center(*extent).to(clip.device).repeat(len(clip), 1, 1, 1),
    }
    for name in maps if names is None else names:
        check_choice("names", name, maps)
    return {name: maps[name]() for name in (maps if names is None else names)}


def _both_sides(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean ``(..., T, H, W)`` of the differences to the frames before and after, ``(..., T - 1, H, W)``."""
    total = F.pad(before, (0, 0, 0, 0, 1, 0)) + F.pad(after, (0, 0, 0, 0, 0, 1))
    total[..., 1:-1, :, :] /= 2  # the first and the last frame have one difference only
    return total


def _flow_speed(gray: Tensor) -> Tensor:
    """Return the length of the optical flow in pixels per frame, ``(B, T, H, W)``, of gray clips ``(B, T, H, W)``.

    Method of Lucas and Kanade: the motion d that fits ``gradient . d = -change`` best in a neighborhood, by least
    squares.
    """
    down, right = torch.gradient(gray, dim=(2, 3))
    squares = [gaussian(part, FLOW_WINDOW) for part in (down * down, right * right, down * right)]
    change = gray.diff(dim=1)
    speeds = []
    for at in (slice(1, None), slice(None, -1)):  # with the frame before, and with the frame after
        yy, xx, yx = (part[:, at] for part in squares)
        yt, xt = (gaussian(part[:, at] * change, FLOW_WINDOW) for part in (down, right))
        # A small value relative to the clip's contrast is added to the diagonal, so a blank neighborhood has motion 0.
        ridge = 1e-3 * (yy + xx).mean((1, 2, 3), keepdim=True) + torch.finfo(gray.dtype).tiny
        yy, xx = yy + ridge, xx + ridge
        determinant = (yy * xx - yx * yx).clamp_min(torch.finfo(gray.dtype).tiny)  # 0 for a blank clip
        speeds.append(torch.hypot(xx * yt - yx * xt, yy * xt - yx * yt) / determinant)
    return _both_sides(*speeds)


def _spectral_residual(gray: Tensor) -> Tensor:
    """Return the saliency of each frame, ``(B, T, H, W)``, of gray clips ``(B, T, H, W)``."""
    low, high = gray.amin((1, 2, 3), keepdim=True), gray.amax((1, 2, 3), keepdim=True)
    gray = (gray - low) / torch.where(high > low, high - low, 1)  # scales normalized inputs to 0 .. 1
    height, width = gray.shape[2:]
    by = -(-min(height, width) // SPECTRUM_SIDE)
    small = F.interpolate(gray, size=(-(-height // by), -(-width // by)), mode="area")
    spectrum = torch.fft.fft2(small)
    rounding = math.sqrt(small[0, 0].numel() / 12) / 255  # amplitude of the rounding to 8 bits
    amplitude = spectrum.abs().clamp_min(rounding)
    log = amplitude.log()
    residual = log - F.avg_pool2d(F.pad(log, (1, 1, 1, 1), mode="circular"), 3, stride=1)
    whitened = residual.exp() * spectrum / amplitude
    whitened[..., 0, 0] = 0
    saliency = torch.fft.ifft2(whitened).abs().square()
    return F.interpolate(saliency, size=(height, width), mode="bilinear") if by > 1 else saliency


def _center(*sizes: int) -> Tensor:
    """Return the center map ``(T, H, W)``."""
    middles = [(2 * torch.arange(size, dtype=torch.float64) + 1) / size - 1 for size in sizes]  # each in (-1, 1)
    squares = torch.stack(torch.meshgrid(*middles, indexing="ij")).square()  # (3, T, H, W)
    return 1 - squares.sum(0).sqrt() / math.sqrt(len(sizes))
