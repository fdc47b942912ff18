"""Baselines for video: clips that lack what an explanation asks about, for every method's ``baselines=``.

Each function takes a clip, floats of five axes, and its layout, such as ``"BTCHW"``. It returns a tensor of the clip's
shape, dtype and device: contiguous, detached, a new one. Each clip of a batch gets a baseline of its own, made from
itself alone; what is random is drawn clip after clip, so a clip's baseline does not depend on those that follow it.
Half precision is computed in float32. A clip that is no such tensor, or holds nan or infinity, is a TypeError or
ValueError.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor

from captum_staa._utils.checks import is_number
from captum_staa._utils.gaussian import gaussian
from captum_staa._utils.generators import generator_or_seeded
from captum_staa.layout import VideoLayout


def zero(clip: Tensor, layout: VideoLayout | str) -> Tensor:
    """Nothing at all: the zero of the clip's own scale.

    After a usual preprocessing, which subtracts a mean color, zero is that color; it is black where pixels were only
    divided by 255. Whatever has this color gets no attribution from a method that multiplies by ``clip - baseline``.

    Example:
        >>> clip = torch.rand(1, 3, 8, 4, 4)
        >>> baseline = zero(clip, "BCTHW")
        >>> baseline.shape == clip.shape, int(baseline.count_nonzero())
        (True, 0)

    Args:
        clip: floats of five axes.
        layout: the order of its axes.

    Returns:
        Zeros like ``clip``: what Captum takes where ``baselines`` is None.
    """
    _check(clip, layout)
    return torch.zeros_like(clip, memory_format=torch.contiguous_format)


def mean_frame(clip: Tensor, layout: VideoLayout | str) -> Tensor:
    """Each clip's mean over time, shown all along: the still parts stay, what moves or passes fades.

    Example:
        >>> clip = torch.tensor([0.0, 1.0, 5.0]).reshape(1, 3, 1, 1, 1)  # three frames of one pixel
        >>> mean_frame(clip, "BTCHW").flatten()
        tensor([2., 2., 2.])

    Args:
        clip: floats of five axes.
        layout: the order of its axes.

    Returns:
        Like ``clip``.
    """
    layout = _check(clip, layout)
    frames = _wide(clip, layout)
    return _like(clip, layout, frames.mean(1, keepdim=True).expand_as(frames))


def blur(clip: Tensor, layout: VideoLayout | str, space: float | None = None, time: float = 0.0) -> Tensor:
    """A Gaussian blur of each frame, and along time: detail goes, large shapes and slow changes stay.

    Example:
        >>> clip = torch.zeros(1, 3, 9, 32, 32)
        >>> clip[:, :, 4, 16, 16] = 1.0  # a flash
        >>> frame = blur(clip, "BCTHW")[0, 0, :, 16, 16]  # spreads within its frame ...
        >>> frame.nonzero().flatten().tolist(), bool(frame[4] < 0.02)
        ([4], True)
        >>> blur(clip, "BCTHW", space=0, time=1)[0, 0, :, 16, 16].nonzero().flatten().tolist()  # ... or over frames
        [1, 2, 3, 4, 5, 6, 7]

    Args:
        clip: floats of five axes.
        layout: the order of its axes.
        space: standard deviation along height and width, pixels; 0 leaves them alone. None takes a tenth of the
            shorter side, which wipes out what repeats within a quarter of that side.
        time: standard deviation along time, frames; 0 leaves it alone, and so leaves large things moving.

    Returns:
        Like ``clip``. At its borders the kernel is renormalized over what it covers, so a constant stays constant.

    Raises:
        ValueError: a deviation is negative or not finite, or both are 0, which would be the clip itself.

    Reference:
        A blurred picture as what is left without the evidence: Fong and Vedaldi, "Interpretable Explanations of Black
        Boxes by Meaningful Perturbation", ICCV 2017.
    """
    layout = _check(clip, layout)
    sizes = layout.size(clip)
    space = min(sizes["H"], sizes["W"]) / 10 if space is None else space
    if not (all(is_number(width) and 0 <= width < math.inf for width in (space, time)) and space + time > 0):
        raise ValueError(
            f"standard deviations are finite, at least 0 and not both 0, got {space = } pixels, {time = } frames "
            f"for a clip of shape {tuple(clip.shape)}; leave them out for a tenth of the shorter side in space"
        )
    channels = _wide(clip, layout).transpose(1, 2)  # (B, C, T, H, W)
    blurred = gaussian(channels.flatten(0, 1), (time, space, space)).view(channels.shape)
    return _like(clip, layout, blurred.transpose(1, 2))


def freeze(clip: Tensor, layout: VideoLayout | str, frame: int | None = None) -> Tensor:
    """One frame shown all along: movement, order and every other moment go, what this frame shows stays.

    Example:
        >>> clip = torch.arange(5.0).reshape(1, 5, 1, 1, 1)  # five frames of one pixel
        >>> freeze(clip, "BTCHW").flatten()
        tensor([2., 2., 2., 2., 2.])
        >>> freeze(clip, "BTCHW", frame=-1).flatten()
        tensor([4., 4., 4., 4., 4.])

    Args:
        clip: floats of five axes.
        layout: the order of its axes.
        frame: index of the frame, negative from the end. None takes the middle one, ``T // 2``.

    Returns:
        Like ``clip``.

    Raises:
        ValueError: there is no such frame.
        TypeError: ``frame`` is no integer.
    """
    layout = _check(clip, layout)
    count = layout.size(clip)["T"]
    if not (frame is None or hasattr(type(frame), "__index__")):
        raise TypeError(f"frame is the index of one, a whole number, got {frame!r} of type {type(frame).__name__}")
    chosen = count // 2 if frame is None else operator.index(frame)
    if not -count <= chosen < count:
        raise ValueError(
            f"frame is one of {-count} .. {count - 1}, got {frame} for a clip of shape {tuple(clip.shape)} in "
            f"layout {layout.axes}; leave it out for the middle frame"
        )
    return _in_order(clip, layout, torch.full((count,), chosen))


def shuffle(clip: Tensor, layout: VideoLayout | str, generator: torch.Generator | None = None) -> Tensor:
    """The frames in a random order, another one per clip: movement and order go, what each frame shows stays.

    Of all orders in which no two neighboring frames stay neighbors, forwards or backwards, each is equally likely.
    Three frames must keep one pair, so they take any order but forwards and backwards; two change places.

    Example:
        >>> clip = torch.arange(8.0).reshape(1, 8, 1, 1, 1)  # eight frames of one pixel
        >>> order = shuffle(clip, "BTCHW").flatten()
        >>> sorted(order.tolist()) == clip.flatten().tolist(), bool((order.diff().abs() > 1).all())
        (True, True)

    Args:
        clip: floats of five axes.
        layout: the order of its axes.
        generator: draws the orders; None is one seeded with 0, for this call alone. Pass one and call again for
            further draws.

    Returns:
        Like ``clip``.

    Raises:
        ValueError: the clip has one frame, which has no other order.
        TypeError: ``generator`` is no torch.Generator.

    Note:
        Each of these orders is as likely as its reverse, so neither direction is favored. If frames were parted
        from their successors alone, and not from their predecessors, backwards would be favored.
    """
    layout = _check(clip, layout)
    generator = generator_or_seeded(generator)
    count = layout.size(clip)["T"]
    if count == 1:
        raise ValueError(
            f"a clip of one frame has no other order, got shape {tuple(clip.shape)} in layout {layout.axes}; if "
            f"the axes are named right, use a baseline of space, such as blur"
        )
    return _in_order(clip, layout, torch.stack([_parted(count, generator) for _ in clip]))


def reverse(clip: Tensor, layout: VideoLayout | str) -> Tensor:
    """Time backwards: what each frame shows stays, and direction and order turn into their opposites.

    It is a counter-example rather than an absence: backwards, a movement to the left is one to the right. The
    difference to this baseline is then that between the two answers, not that to no answer.

    Example:
        >>> clip = torch.arange(4.0).reshape(1, 4, 1, 1, 1)  # four frames of one pixel
        >>> reverse(clip, "BTCHW").flatten()
        tensor([3., 2., 1., 0.])

    Args:
        clip: floats of five axes.
        layout: the order of its axes.

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
    """Gaussian noise in place of the clip, with its colors: each clip's own mean and deviation in every channel.

    Every value is drawn by itself, so nothing of the clip is left but these. NoiseTunnel adds noise to a clip; this
    replaces it, and several draws are the distribution that GradientShap asks for.

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
        clip: floats of five axes.
        layout: the order of its axes.
        std: standard deviation in the clip's own units, for all channels. None takes each channel's own, which is 0
            where a channel has one value throughout.
        generator: draws the noise; None is one seeded with 0, for this call alone.

    Returns:
        Like ``clip``, the same numbers in every layout and, but for rounding, every dtype.

    Raises:
        ValueError: ``std`` is not positive and finite.
        TypeError: ``generator`` is no torch.Generator.
    """
    layout = _check(clip, layout)
    generator = generator_or_seeded(generator)
    if std is not None and not (is_number(std) and 0 < std < math.inf):
        raise ValueError(f"std is positive and finite, got {std!r}; leave it out for the clip's own deviation")
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
    """``(B, T, C, H, W)`` in float32 at least."""
    return layout.to_working(clip.detach().to(torch.promote_types(clip.dtype, torch.float32)))


def _like(clip: Tensor, layout: VideoLayout, frames: Tensor) -> Tensor:
    """``(B, T, C, H, W)`` in the clip's layout and dtype."""
    return layout.from_working(frames).to(clip.dtype).contiguous()


def _in_order(clip: Tensor, layout: VideoLayout, order: Tensor) -> Tensor:
    """The clip's frames in an order ``(T,)``, or in one per clip ``(B, T)``."""
    frames = layout.to_working(clip.detach())
    rows = torch.arange(len(frames))[:, None]  # (B, 1)
    return _like(clip, layout, frames[rows, order])


def _parted(count: int, generator: torch.Generator) -> Tensor:
    """A random order ``(count,)`` that parts neighbors, by drawing until one does: 7 draws on average."""
    together = 1 if count < 4 else 0  # pairs that must stay
    while True:
        order = torch.randperm(count, generator=generator, device=generator.device).cpu()
        if int((order.diff().abs() == 1).sum()) <= together and not torch.equal(order, torch.arange(count)):
            return order
