"""Baselines for video: reference clips without the evidence, for the ``baselines`` argument of every method.

Each function takes a clip, a float tensor of five axes, and its layout, such as ``"BTCHW"``. It returns a new tensor of
the clip's shape, dtype and device, contiguous and detached. The baseline of a clip depends on this clip only. Random
numbers are drawn clip by clip, so the baseline of a clip does not depend on the clips after it in the batch. Half
precision is computed in float32. Each function raises a TypeError if the clip is not a float tensor, and a ValueError
if it does not have five axes or contains nan or infinity.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from captum_staa._utils.checks import generator_or_seeded, is_number
from captum_staa._utils.gaussian import gaussian
from captum_staa.layout import VideoLayout


def zero(clip: Tensor, layout: VideoLayout | str) -> Tensor:
    """Return zeros.

    After the usual preprocessing, which subtracts a mean color, zero is that mean color. If pixels are only divided by
    255, zero is black. Pixels of this color get no attribution from methods that multiply by ``clip - baseline``.

    Example:
        >>> clip = torch.rand(1, 3, 8, 4, 4)
        >>> baseline = zero(clip, "BCTHW")
        >>> baseline.shape == clip.shape, int(baseline.count_nonzero())
        (True, 0)

    Args:
        clip: float tensor of five axes.
        layout: order of the axes, such as ``"BTCHW"``.

    Returns:
        Zeros like ``clip``, as Captum uses if ``baselines`` is None.
    """
    _check(clip, layout)
    return torch.zeros_like(clip, memory_format=torch.contiguous_format)


def mean_frame(clip: Tensor, layout: VideoLayout | str) -> Tensor:
    """Return each clip's mean over time, repeated for all frames. It keeps static content and averages out motion.

    Example:
        >>> clip = torch.tensor([0.0, 1.0, 5.0]).reshape(1, 3, 1, 1, 1)  # three frames of one pixel
        >>> mean_frame(clip, "BTCHW").flatten()
        tensor([2., 2., 2.])

    Args:
        clip: float tensor of five axes.
        layout: order of the axes, such as ``"BTCHW"``.

    Returns:
        Like ``clip``.
    """
    layout = _check(clip, layout)
    frames = _wide(clip, layout)
    return _like(clip, layout, frames.mean(1, keepdim=True).expand_as(frames))


def blur(clip: Tensor, layout: VideoLayout | str, space: float | None = None, time: float = 0.0) -> Tensor:
    """Return the clip after a Gaussian blur in space, in time, or both. It removes detail and keeps large shapes.

    Example:
        >>> clip = torch.zeros(1, 3, 9, 32, 32)
        >>> clip[:, :, 4, 16, 16] = 1.0  # a flash
        >>> frame = blur(clip, "BCTHW")[0, 0, :, 16, 16]  # spreads within its frame
        >>> frame.nonzero().flatten().tolist(), bool(frame[4] < 0.02)
        ([4], True)
        >>> blur(clip, "BCTHW", space=0, time=1)[0, 0, :, 16, 16].nonzero().flatten().tolist()  # or over frames
        [1, 2, 3, 4, 5, 6, 7]

    Args:
        clip: float tensor of five axes.
        layout: order of the axes, such as ``"BTCHW"``.
        space: standard deviation along height and width, in pixels; 0 means no blur in space. None means a tenth of
            the shorter side, which removes patterns with a period of up to a quarter of that side.
        time: standard deviation along time, in frames; 0 means no blur in time, so large objects keep their motion.

    Returns:
        Like ``clip``. At the borders, the kernel is renormalized over the clip, so a constant clip does not change.

    Raises:
        ValueError: A deviation is negative or not finite, or both are 0, which would return the clip itself.

    Reference:
        Fong and Vedaldi, "Interpretable Explanations of Black Boxes by Meaningful Perturbation", ICCV 2017, use a
        blurred image as the baseline.
    """
    layout = _check(clip, layout)
    sizes = layout.size(clip)
    space = min(sizes["H"], sizes["W"]) / 10 if space is None else space
    if not (all(is_number(width) and 0 <= width < math.inf for width in (space, time)) and space + time > 0):
        raise ValueError(
            f"standard deviations must be finite, at least 0 and not both 0, got {space = } pixels, {time = } frames "
            f"for a clip of shape {tuple(clip.shape)}. Omit them to use a tenth of the shorter side in space."
        )
    channels = _wide(clip, layout).transpose(1, 2)  # (B, C, T, H, W)
    blurred = gaussian(channels.flatten(0, 1), (time, space, space)).view(channels.shape)
    return _like(clip, layout, blurred.transpose(1, 2))


def freeze(clip: Tensor, layout: VideoLayout | str, frame: int | None = None) -> Tensor:
    """Return one frame of each clip, repeated for all frames. It removes motion, order and all other frames.

    Example:
        >>> clip = torch.arange(5.0).reshape(1, 5, 1, 1, 1)  # five frames of one pixel
        >>> freeze(clip, "BTCHW").flatten()
        tensor([2., 2., 2., 2., 2.])
        >>> freeze(clip, "BTCHW", frame=-1).flatten()
        tensor([4., 4., 4., 4., 4.])

    Args:
        clip: float tensor of five axes.
        layout: order of the axes, such as ``"BTCHW"``.
        frame: index of the frame; a negative index counts from the end. None means the middle frame, ``T // 2``.

    Returns:
        Like ``clip``.

    Raises:
        ValueError: ``frame`` is out of range.
        TypeError: ``frame`` is not an integer.
    """
    layout = _check(clip, layout)
    count = layout.size(clip)["T"]
    if not (frame is None or hasattr(type(frame), "__index__")):
        raise TypeError(f"frame must be an integer index, got {frame!r} of type {type(frame).__name__}")
    chosen = count // 2 if frame is None else operator.index(frame)
    if not -count <= chosen < count:
        raise ValueError(
            f"frame must be in {-count} .. {count - 1}, got {frame} for a clip of shape {tuple(clip.shape)} in layout "
            f"{layout.axes}. Omit it to use the middle frame."
        )
    return _in_order(clip, layout, torch.full((count,), chosen))


def shuffle(clip: Tensor, layout: VideoLayout | str, generator: torch.Generator | None = None) -> Tensor:
    """Return each clip's frames in a random order, drawn per clip. It removes motion and order, and keeps all frames.

    The order is drawn uniformly from all orders in which no two neighboring frames stay neighbors, in either direction.
    Three frames have no such order, so the result is any order except forward and reverse. Two frames are swapped.

    Example:
        >>> clip = torch.arange(8.0).reshape(1, 8, 1, 1, 1)  # eight frames of one pixel
        >>> order = shuffle(clip, "BTCHW").flatten()
        >>> sorted(order.tolist()) == clip.flatten().tolist(), bool((order.diff().abs() > 1).all())
        (True, True)

    Args:
        clip: float tensor of five axes.
        layout: order of the axes, such as ``"BTCHW"``.
        generator: draws the orders. None means a new generator with seed 0 for each call. Pass a generator to get
            different orders in repeated calls.

    Returns:
        Like ``clip``.

    Raises:
        ValueError: The clip has only one frame.
        TypeError: ``generator`` is not a torch.Generator.

    Note:
        Each order is as likely as its reverse, so no direction of time is favored. If only the pairs in forward
        direction were excluded, reversed pairs would be more likely.
    """
    layout = _check(clip, layout)
    generator = generator_or_seeded(generator)
    count = layout.size(clip)["T"]
    if count == 1:
        raise ValueError(
            f"a clip must have at least two frames to be shuffled, got shape {tuple(clip.shape)} in layout "
            f"{layout.axes}. Check the layout, or use a spatial baseline such as blur."
        )
    return _in_order(clip, layout, torch.stack([_order_without_neighbors(count, generator) for _ in clip]))


def reverse(clip: Tensor, layout: VideoLayout | str) -> Tensor:
    """Return each clip reversed in time. It keeps all frames and inverts their order and the direction of motion.

    The reversed clip is a counter-example and not the absence of evidence: a motion to the left becomes a motion to the
    right. Attributions against this baseline explain the difference between two predictions.

    Example:
        >>> clip = torch.arange(4.0).reshape(1, 4, 1, 1, 1)  # four frames of one pixel
        >>> reverse(clip, "BTCHW").flatten()
        tensor([3., 2., 1., 0.])

    Args:
        clip: float tensor of five axes.
        layout: order of the axes, such as ``"BTCHW"``.

    Returns:
        Like ``clip``.
    """
    layout = _check(clip, layout)
    return _in_order(clip, layout, torch.arange(layout.size(clip)["T"]).flip(0))


def noise(
    clip: Tensor,
    layout: VideoLayout | str,
    std: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return Gaussian noise with each clip's mean and standard deviation in every channel.

    All values are independent, so only the mean and the deviation of the clip remain. NoiseTunnel adds noise to a clip,
    and this function replaces the clip. Several draws give the distribution of baselines that GradientShap requires.

    Example:
        >>> clip = 5 + 2 * torch.rand(1, 3, 8, 32, 32)
        >>> baseline = noise(clip, "BCTHW")
        >>> abs(round(float(baseline.mean() - clip.mean()), 1)), abs(round(float(baseline.std() - clip.std()), 1))
        (0.0, 0.0)
        >>> draw = torch.Generator().manual_seed(1)
        >>> distribution = torch.cat([noise(clip, "BCTHW", generator=draw) for _ in range(4)])
        >>> distribution.shape
        torch.Size([4, 3, 8, 32, 32])

    Args:
        clip: float tensor of five axes.
        layout: order of the axes, such as ``"BTCHW"``.
        std: standard deviation in the clip's units, for all channels. None means the deviation of each channel, which
            is 0 for a constant channel.
        generator: draws the noise. None means a new generator with seed 0 for each call.

    Returns:
        Like ``clip``. The values are the same in every layout and, except for rounding, in every dtype.

    Raises:
        ValueError: ``std`` is not positive and finite.
        TypeError: ``generator`` is not a torch.Generator.
    """
    layout = _check(clip, layout)
    generator = generator_or_seeded(generator)
    if std is not None and not (is_number(std) and 0 < std < math.inf):
        raise ValueError(f"std must be positive and finite, got {std!r}. Omit it to use the deviation of each channel.")
    frames = _wide(clip, layout)
    over = (1, 3, 4)  # time, height and width
    deviation = frames.std(over, correction=0, keepdim=True) if std is None else std
    draws = torch.stack(
        [torch.randn(frames.shape[1:], generator=generator, device=generator.device) for _ in frames]
    )  # (B, T, C, H, W)
    return _like(clip, layout, frames.mean(over, keepdim=True) + deviation * draws.to(frames))


def _check(clip: Tensor, layout: VideoLayout | str) -> VideoLayout:
    layout = VideoLayout.of(layout)
    layout.check_values(clip, "clip")
    return layout


def _wide(clip: Tensor, layout: VideoLayout) -> Tensor:
    """Return the clip as ``(B, T, C, H, W)`` in float32 or wider."""
    return layout.to_working(clip.detach().to(torch.promote_types(clip.dtype, torch.float32)))


def _like(clip: Tensor, layout: VideoLayout, frames: Tensor) -> Tensor:
    """Return frames ``(B, T, C, H, W)`` in the clip's layout and dtype."""
    return layout.from_working(frames).to(clip.dtype).contiguous()


def _in_order(clip: Tensor, layout: VideoLayout, order: Tensor) -> Tensor:
    """Return the clip with its frames in an order ``(T,)``, or in one order per clip ``(B, T)``."""
    frames = layout.to_working(clip.detach())
    rows = torch.arange(len(frames))[:, None]  # (B, 1)
    return _like(clip, layout, frames[rows, order])


def _order_without_neighbors(count: int, generator: torch.Generator) -> Tensor:
    """Return a random order ``(count,)`` that separates neighbors, by rejection sampling: 7 draws on average."""
    together = 1 if count < 4 else 0  # pairs that have to stay neighbors
    while True:
        order = torch.randperm(count, generator=generator, device=generator.device).cpu()
        if int((order.diff().abs() == 1).sum()) <= together and not torch.equal(order, torch.arange(count)):
            return order
