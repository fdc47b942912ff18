"""Baselines for video: reference clips without the evidence, for the ``baselines`` argument of every method.

Each function takes clips, a float tensor of five axes, and their layout, such as ``"BTCHW"``. It returns a new tensor
of the same shape, dtype and device, contiguous and detached. For a tuple of inputs (RGB and optical flow), it returns a
tuple. The baseline of a clip depends on this clip only. Random numbers are drawn clip by clip, so the baseline of a
clip does not depend on the clips after it in the batch. Half precision is computed in float32. Each function raises a
TypeError if ``inputs`` is not a float tensor or a tuple of them, and a ValueError if one does not have five axes or
contains nan or infinity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_staa._utils.checks import generator_or_seeded, is_integer, is_number
from captum_staa._utils.tensors import gaussian, wide
from captum_staa.layout import VideoLayout
from captum_staa.result import Inputs, clips_in, for_each


def zero(inputs: Inputs, layout: VideoLayout | str) -> Inputs:
    """Return zeros.

    After the usual preprocessing, which subtracts a mean color, zero is that mean color. If pixels are only divided by
    255, zero is black. Pixels of this color get no attribution from methods that multiply by ``inputs - baseline``.

    Example:
        >>> inputs = torch.rand(1, 3, 8, 4, 4)
        >>> baseline = zero(inputs, "BCTHW")
        >>> baseline.shape == inputs.shape, int(baseline.count_nonzero())
        (True, 0)

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.

    Returns:
        Zeros like ``inputs``, as Captum uses if ``baselines`` is None.
    """
    return for_each(inputs, layout, lambda clip, _: torch.zeros_like(clip, memory_format=torch.contiguous_format))


def mean_frame(inputs: Inputs, layout: VideoLayout | str) -> Inputs:
    """Return each clip's mean over time, repeated for all frames. It keeps static content and averages out motion.

    Example:
        >>> inputs = torch.tensor([0.0, 1.0, 5.0]).reshape(1, 3, 1, 1, 1)  # three frames of one pixel
        >>> mean_frame(inputs, "BTCHW").flatten()
        tensor([2., 2., 2.])

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.

    Returns:
        Like ``inputs``.
    """

    def mean(clip: Tensor, layout: VideoLayout) -> Tensor:
        frames = _wide(clip, layout)
        return _like(clip, layout, frames.mean(1, keepdim=True).expand_as(frames))

    return for_each(inputs, layout, mean)


def blur(inputs: Inputs, layout: VideoLayout | str, space: float | None = None, time: float = 0.0) -> Inputs:
    """Return the clip after a Gaussian blur in space, in time, or both. It removes detail and keeps large shapes.

    Example:
        >>> inputs = torch.zeros(1, 3, 9, 32, 32)
        >>> inputs[:, :, 4, 16, 16] = 1.0  # a flash
        >>> frame = blur(inputs, "BCTHW")[0, 0, :, 16, 16]  # spreads within its frame
        >>> frame.nonzero().flatten().tolist(), bool(frame[4] < 0.02)
        ([4], True)
        >>> blur(inputs, "BCTHW", space=0, time=1)[0, 0, :, 16, 16].nonzero().flatten().tolist()  # or over frames
        [1, 2, 3, 4, 5, 6, 7]

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.
        space: standard deviation along height and width, in pixels; 0 means no blur in space. None means a tenth of
            the shorter side, which removes patterns with a period of up to a quarter of that side.
        time: standard deviation along time, in frames; 0 means no blur in time, so large objects keep their motion.

    Returns:
        Like ``inputs``. At the borders, the kernel is renormalized over the clip, so a constant clip does not change.

    Raises:
        ValueError: A deviation is negative or not finite, or both are 0, which would return the clip itself.

    Reference:
        Fong and Vedaldi, "Interpretable Explanations of Black Boxes by Meaningful Perturbation", ICCV 2017, use a
        blurred image as the baseline.
    """

    def blurred(clip: Tensor, layout: VideoLayout) -> Tensor:
        sizes = layout.size(clip)
        across = min(sizes["H"], sizes["W"]) / 10 if space is None else space
        if not (all(is_number(width) and 0 <= width < math.inf for width in (across, time)) and across + time > 0):
            raise ValueError(
                f"standard deviations must be finite, at least 0 and not both 0, got {space = } pixels, {time = } "
                f"frames for a clip of shape {tuple(clip.shape)}. Omit them: a tenth of the shorter side in space."
            )
        channels = _wide(clip, layout).transpose(1, 2)  # (B, C, T, H, W)
        smooth = gaussian(channels.flatten(0, 1), (time, across, across)).view(channels.shape)
        return _like(clip, layout, smooth.transpose(1, 2))

    return for_each(inputs, layout, blurred)


def freeze(inputs: Inputs, layout: VideoLayout | str, frame: int | None = None) -> Inputs:
    """Return one frame of each clip, repeated for all frames. It removes motion, order and all other frames.

    Example:
        >>> inputs = torch.arange(5.0).reshape(1, 5, 1, 1, 1)  # five frames of one pixel
        >>> freeze(inputs, "BTCHW").flatten()
        tensor([2., 2., 2., 2., 2.])
        >>> freeze(inputs, "BTCHW", frame=-1).flatten()
        tensor([4., 4., 4., 4., 4.])

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.
        frame: index of the frame; a negative index counts from the end. None means the middle frame, ``T // 2``.

    Returns:
        Like ``inputs``.

    Raises:
        ValueError: ``frame`` is out of range.
        TypeError: ``frame`` is not an integer.
    """
    if not (frame is None or is_integer(frame)):
        raise TypeError(f"frame must be an integer index, got {frame!r} of type {type(frame).__name__}")

    def frozen(clip: Tensor, layout: VideoLayout) -> Tensor:
        count = layout.size(clip)["T"]
        chosen = count // 2 if frame is None else int(frame)
        if not -count <= chosen < count:
            raise ValueError(
                f"frame must be in {-count} .. {count - 1}, got {frame} for a clip of shape {tuple(clip.shape)} in "
                f"layout {layout.axes}. Omit it to use the middle frame."
            )
        return _in_order(clip, layout, torch.full((count,), chosen))

    return for_each(inputs, layout, frozen)


def shuffle(inputs: Inputs, layout: VideoLayout | str, generator: torch.Generator | None = None) -> Inputs:
    """Return each clip's frames in a random order, drawn per clip. It removes motion and order, and keeps all frames.

    The order is drawn uniformly from all orders in which no two neighboring frames stay neighbors, in either direction.
    Three frames have no such order, so the result is any order except forward and reverse. Two frames are swapped.

    Example:
        >>> inputs = torch.arange(8.0).reshape(1, 8, 1, 1, 1)  # eight frames of one pixel
        >>> order = shuffle(inputs, "BTCHW").flatten()
        >>> sorted(order.tolist()) == inputs.flatten().tolist(), bool((order.diff().abs() > 1).all())
        (True, True)

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.
        generator: draws the orders. None means a new generator with seed 0 for each call. Pass a generator to get
            different orders in repeated calls.

    Returns:
        Like ``inputs``. All inputs of a tuple are shuffled in the same order.

    Raises:
        ValueError: The clip has only one frame, or inputs have different numbers of frames.
        TypeError: ``generator`` is not a torch.Generator.

    Note:
        Each order is as likely as its reverse, so no direction of time is favored. If only the pairs in forward
        direction were excluded, reversed pairs would be more likely.
    """
    layout, draw = VideoLayout.of(layout), generator_or_seeded(generator)
    clips = clips_in(inputs, layout)
    counts = [layout.size(clip)["T"] for clip in clips]
    if len(set(counts)) > 1 or counts[0] == 1:
        raise ValueError(
            f"clips must have at least two frames to be shuffled, and all inputs the same number, got shapes "
            f"{[tuple(clip.shape) for clip in clips]} in layout {layout.axes}. Check the layout, or use a spatial "
            f"baseline such as blur."
        )
    orders = torch.stack([_order_without_neighbors(counts[0], draw) for _ in clips[0]])  # (B, T)
    return for_each(inputs, layout, lambda clip, layout: _in_order(clip, layout, orders))


def reverse(inputs: Inputs, layout: VideoLayout | str) -> Inputs:
    """Return each clip reversed in time. It keeps all frames and inverts their order and the direction of motion.

    The reversed clip is a counter-example and not the absence of evidence: a motion to the left becomes a motion to the
    right. Attributions against this baseline explain the difference between two predictions. Frames of optical flow
    come in reversed order like others, but their vectors keep their sign.

    Example:
        >>> inputs = torch.arange(4.0).reshape(1, 4, 1, 1, 1)  # four frames of one pixel
        >>> reverse(inputs, "BTCHW").flatten()
        tensor([3., 2., 1., 0.])

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.

    Returns:
        Like ``inputs``.
    """
    return for_each(
        inputs, layout, lambda clip, layout: _in_order(clip, layout, torch.arange(layout.size(clip)["T"]).flip(0))
    )


def noise(
    inputs: Inputs,
    layout: VideoLayout | str,
    std: float | None = None,
    generator: torch.Generator | None = None,
) -> Inputs:
    """Return Gaussian noise with each clip's mean and standard deviation in every channel.

    All values are independent, so only the mean and the deviation of the clip remain. NoiseTunnel adds noise to a clip,
    and this function replaces the clip. Several draws give the distribution of baselines that GradientShap requires.

    Example:
        >>> inputs = 5 + 2 * torch.rand(1, 3, 8, 32, 32)
        >>> baseline = noise(inputs, "BCTHW")
        >>> abs(round(float(baseline.mean() - inputs.mean()), 1)), abs(round(float(baseline.std() - inputs.std()), 1))
        (0.0, 0.0)
        >>> draw = torch.Generator().manual_seed(1)
        >>> distribution = torch.cat([noise(inputs, "BCTHW", generator=draw) for _ in range(4)])
        >>> distribution.shape
        torch.Size([4, 3, 8, 32, 32])

    Args:
        inputs: clips, a float tensor of five axes, or a tuple of them (RGB and flow).
        layout: order of the axes, such as ``"BTCHW"``.
        std: standard deviation in the clip's units, for all channels. None means the deviation of each channel, which
            is 0 for a constant channel.
        generator: draws the noise. None means a new generator with seed 0 for each call.

    Returns:
        Like ``inputs``. The values are the same in every layout and, except for rounding, in every dtype.

    Raises:
        ValueError: ``std`` is not positive and finite.
        TypeError: ``generator`` is not a torch.Generator.
    """
    drawing = generator_or_seeded(generator)
    if std is not None and not (is_number(std) and 0 < std < math.inf):
        raise ValueError(f"std must be positive and finite, got {std!r}. Omit it to use the deviation of each channel.")
    over = (1, 3, 4)  # time, height and width

    def drawn(clip: Tensor, layout: VideoLayout) -> Tensor:
        frames = _wide(clip, layout)
        deviation = frames.std(over, correction=0, keepdim=True) if std is None else std
        draws = torch.stack(
            [torch.randn(frames.shape[1:], generator=drawing, device=drawing.device) for _ in frames]
        )  # (B, T, C, H, W)
        return _like(clip, layout, frames.mean(over, keepdim=True) + deviation * draws.to(frames))

    return for_each(inputs, layout, drawn)


def _wide(inputs: Tensor, layout: VideoLayout) -> Tensor:
    """Return the clip as ``(B, T, C, H, W)`` in float32 or wider."""
    return layout.to_working(wide(inputs.detach()))


def _like(inputs: Tensor, layout: VideoLayout, frames: Tensor) -> Tensor:
    """Return frames ``(B, T, C, H, W)`` in the clip's layout and dtype."""
    return layout.from_working(frames).to(inputs.dtype).contiguous()


def _in_order(inputs: Tensor, layout: VideoLayout, order: Tensor) -> Tensor:
    """Return the clip with its frames in an order ``(T,)``, or in one order per clip ``(B, T)``."""
    frames = layout.to_working(inputs.detach())
    rows = torch.arange(len(frames))[:, None]  # (B, 1)
    return _like(inputs, layout, frames[rows, order])


def _order_without_neighbors(count: int, generator: torch.Generator) -> Tensor:
    """Return a random order ``(count,)`` that separates neighbors, by rejection sampling: 7 draws on average."""
    together = 1 if count < 4 else 0  # pairs that have to stay neighbors
    while True:
        order = torch.randperm(count, generator=generator, device=generator.device).cpu()
        if int((order.diff().abs() == 1).sum()) <= together and not torch.equal(order, torch.arange(count)):
            return order
