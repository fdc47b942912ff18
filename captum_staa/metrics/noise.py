"""Perturbations of videos in space and time, for Captum's ``infidelity`` and ``sensitivity_max``.

Each function returns a :class:`Perturbation`. Each clip of a batch gets a separate draw. Half precision is computed in
float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa._utils.captum import BaselineType, _format_output, _is_tuple
from captum_staa._utils.checks import check_count, check_sides, generator_or_seeded, is_number
from captum_staa._utils.tensors import wide
from captum_staa.feature_masks import frames as frame_ids
from captum_staa.feature_masks import grid
from captum_staa.layout import WORKING, VideoLayout
from captum_staa.result import as_tuple

Inputs = Tensor | tuple[Tensor, ...]
Alter = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor | None]]
Baseline = float | Callable[[Tensor, VideoLayout], Tensor]


@dataclass(frozen=True)
class Perturbation:
    """A perturbation of clips, in the two forms that Captum's metrics need.

    Example:
        >>> import torch
        >>> from captum.attr import IntegratedGradients
        >>> from captum.metrics import infidelity, sensitivity_max
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 8 * 8, 2))
        >>> clip = torch.rand(1, 3, 4, 8, 8)
        >>> method = IntegratedGradients(model, multiply_by_inputs=False)  # the mean gradient
        >>> attributions = method.attribute(clip, target=1)
        >>> noise = tubelet_noise("BCTHW", cells=(2, 4, 4), std=0.1)
        >>> local = noise.for_infidelity(multiply_by_inputs=method.multiplies_by_inputs)
        >>> bool(infidelity(model, local, clip, attributions, target=1) < 1e-6)  # exact for a linear model
        True
        >>> change = sensitivity_max(method.attribute, clip, noise.for_sensitivity(), perturb_radius=0.02, target=1)
        >>> bool(change < 1e-5)  # the gradients of a linear model are constant
        True

    Args:
        layout: order of the axes of the clips.
        alter: function of the frames ``(T, C, H, W)`` of one clip, in float32 or float64, and of a generator. Returns
            the perturbed frames and None. If it replaces voxels, it returns the replaced share of each voxel,
            broadcastable to the frames, instead of None.
        generator: draws the perturbations. None uses a new generator with seed 0 for each ``perturb_func``. A
            ``perturb_func`` continues to draw from its generator, so Captum's samples also differ if
            ``max_examples_per_batch`` splits them into several calls.
    """

    layout: VideoLayout
    alter: Alter
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        generator_or_seeded(self.generator)  # raises here if it is not a generator

    def for_infidelity(self, *, multiply_by_inputs: bool) -> Callable[..., tuple[Inputs, Inputs]]:
        """Return the ``perturb_func`` for ``captum.metrics.infidelity``.

        Captum compares ``sum(perturbation * attribution)`` with ``f(inputs) - f(perturbed inputs)``. The perturbation
        therefore depends on the kind of attribution.

        Args:
            multiply_by_inputs: the ``multiplies_by_inputs`` of the attribution method.

                - False, for gradients: the perturbation is ``inputs - perturbed``.
                - True, for parts of the output, such as Integrated Gradients or occlusion: the perturbation is the
                  share of each voxel that was removed. It is 1 where :func:`frame_drop` replaces a frame. For all other
                  perturbations it is ``(inputs - perturbed) / (inputs - baselines)``, with the ``baselines`` passed to
                  infidelity (0 if none are passed), and 0 where inputs and baselines are equal. This fits attributions
                  that are a multiple of ``inputs - baselines``. For occlusion, use :func:`frame_drop`.

        Returns:
            Function of inputs, and of baselines if infidelity has them, that returns (perturbations, perturbed inputs):
            tensors if the inputs are a tensor, tuples if they are a tuple, contiguous and detached.

        Raises:
            TypeError: ``multiply_by_inputs`` is not a bool.
        """
        if not isinstance(multiply_by_inputs, bool):
            raise TypeError(
                f"multiply_by_inputs must be a bool, got {multiply_by_inputs!r}. Pass method.multiplies_by_inputs."
            )
        generator = generator_or_seeded(self.generator)

        def perturb(inputs: Inputs, baselines: BaselineType = None) -> tuple[Inputs, Inputs]:
            clips = self._clips(inputs)
            values = (0,) * len(clips) if baselines is None else baselines if _is_tuple(baselines) else (baselines,)
            perturbations, perturbed = [], []
            for clip, baseline in zip(clips, values, strict=True):
                altered, replaced = self._altered(clip, generator)
                change = clip - altered
                if multiply_by_inputs and replaced is not None:
                    if baselines is not None:
                        raise ValueError(
                            "baselines of infidelity must be None for a perturbation that already has a baseline, got "
                            f"{type(baselines).__name__}. Pass the baseline to frame_drop(..., baseline=...) only."
                        )
                    change = replaced.to(clip.dtype)
                elif multiply_by_inputs:
                    whole = clip - baseline
                    change = torch.where(whole == 0, 0, change / whole)
                perturbations.append(change.contiguous())
                perturbed.append(altered)
            is_tuple = _is_tuple(inputs)
            return _format_output(is_tuple, tuple(perturbations)), _format_output(is_tuple, tuple(perturbed))

        return perturb

    def for_sensitivity(self) -> Callable[[Inputs, float], Inputs]:
        """Return the ``perturb_func`` for ``captum.metrics.sensitivity_max``.

        Returns:
            Function of inputs and ``perturb_radius`` that returns perturbed inputs. If the largest change in a clip
            exceeds the radius, the change of the whole clip is scaled so that its largest value equals the radius. A
            smaller change is not scaled.
        """
        generator = generator_or_seeded(self.generator)

        def perturb(inputs: Inputs, perturb_radius: float) -> Inputs:
            if not (is_number(perturb_radius) and 0 < perturb_radius < math.inf):
                raise ValueError(f"perturb_radius must be positive and finite, got {perturb_radius!r}.")
            near = []
            for clip in self._clips(inputs):
                exact = wide(clip)
                change = wide(self._altered(clip, generator)[0]) - exact
                largest = change.abs().amax((1, 2, 3, 4), keepdim=True).clamp(min=perturb_radius)
                near.append((exact + change * (perturb_radius / largest)).to(clip.dtype))
            return _format_output(_is_tuple(inputs), tuple(near))

        return perturb

    def _clips(self, inputs: Inputs) -> tuple[Tensor, ...]:
        clips = tuple(clip.detach() for clip in as_tuple(inputs))
        for i, clip in enumerate(clips):
            self.layout.check_values(clip, f"inputs[{i}]" if _is_tuple(inputs) else "inputs")
        return clips

    def _altered(self, clip: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return the perturbed clips and the replaced share, both in the shape and dtype of ``clip``."""
        frames = self.layout.to_working(wide(clip))
        altered, replaced = zip(*(self.alter(one, generator) for one in frames), strict=True)
        shares = None if replaced[0] is None else torch.stack([r.expand_as(frames[0]) for r in replaced])
        return self._like(clip, torch.stack(altered)), None if shares is None else self._like(clip, shares)

    def _like(self, clip: Tensor, frames: Tensor) -> Tensor:
        return self.layout.from_working(frames).to(clip.dtype).contiguous()


def tubelet_noise(
    layout: VideoLayout | str, cells: Sequence[int], std: float, generator: torch.Generator | None = None
) -> Perturbation:
    """Return a perturbation that adds one Gaussian number to each cell of space and time, such as each tubelet.

    Example:
        >>> noise = tubelet_noise("BCTHW", cells=(2, 4, 4), std=0.1)
        >>> perturbed = noise.for_sensitivity()(torch.zeros(1, 3, 4, 8, 8), 1.0)
        >>> perturbed.unique().numel()  # 2 x 2 x 2 cells
        8

    Args:
        layout: order of the axes of the clips.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels. All channels of a cell get the same number.
            Cells at the end of an axis are cut off.
        std: standard deviation, in the units of the clip.
        generator: as in :class:`Perturbation`.

    Raises:
        TypeError: a side of ``cells`` is not an int.
        ValueError: ``cells`` is not three sides of at least 1, or ``std`` is not positive and finite. When called: a
            side is larger than the clip.
    """
    check_sides("cells", cells)
    sides = [int(side) for side in cells]
    return _noise(layout, lambda clip: grid(clip, WORKING, sides), std, generator)


def brightness_flicker(layout: VideoLayout | str, std: float, generator: torch.Generator | None = None) -> Perturbation:
    """Return a perturbation that adds one Gaussian number to each frame, which makes it brighter or darker.

    Example:
        >>> flicker = brightness_flicker("BCTHW", std=0.1)
        >>> perturbed = flicker.for_sensitivity()(torch.zeros(1, 3, 4, 8, 8), 1.0)
        >>> [frame.unique().numel() for frame in perturbed[0].unbind(1)]
        [1, 1, 1, 1]

    Args:
        layout: order of the axes of the clips.
        std: standard deviation, in the units of the clip.
        generator: as in :class:`Perturbation`.

    Raises:
        ValueError: ``std`` is not positive and finite.
    """
    return _noise(layout, lambda clip: frame_ids(clip, WORKING), std, generator)


def frame_drop(
    layout: VideoLayout | str, share: float, baseline: Baseline = 0.0, generator: torch.Generator | None = None
) -> Perturbation:
    """Return a perturbation that replaces whole frames, drawn at random.

    Example:
        >>> from captum_staa import baselines
        >>> clip = torch.arange(4.0).reshape(1, 4, 1, 1, 1)  # four frames of one pixel
        >>> drop = frame_drop("BTCHW", share=0.5, baseline=baselines.mean_frame).for_infidelity(multiply_by_inputs=True)
        >>> dropped, perturbed = drop(clip)
        >>> dropped.flatten(), perturbed.flatten()
        (tensor([1., 1., 0., 0.]), tensor([1.5000, 1.5000, 2.0000, 3.0000]))

    Args:
        layout: order of the axes of the clips.
        share: share of the frames to replace, above 0 and at most 1, rounded to a number of frames of at least one.
        baseline: value of replaced frames: a number, or a function of a clip and its layout, such as those of
            :mod:`captum_staa.baselines`. The function gets one clip at a time, in layout BTCHW. Use the baseline of the
            attribution method.
        generator: as in :class:`Perturbation`.

    Raises:
        TypeError: ``baseline`` is neither a number nor a function.
        ValueError: ``share`` is out of range, or ``baseline`` is not finite. When called: a baseline does not have the
            shape of the clip.
    """
    if not (is_number(share) and 0 < share <= 1):
        raise ValueError(
            f"share must be above 0 and at most 1, got {share!r}. share=0.25 replaces a quarter of the frames."
        )
    value: Any = baseline
    if not callable(value) or isinstance(value, type):
        if not isinstance(value, (int, float, np.integer, np.floating)):
            raise TypeError(
                f"baseline must be a number or a function of (clip, layout), got {type(value).__name__}. Use a "
                f"function of captum_staa.baselines, or lambda clip, layout: value for a tensor."
            )
        if not math.isfinite(value):
            raise ValueError(f"baseline must be finite, got {baseline}.")

    def alter(frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = max(1, round(share * len(frames)))
        order = torch.randperm(len(frames), generator=generator, device=generator.device).to(frames.device)
        dropped = (order < count).view(-1, 1, 1, 1)
        return torch.where(dropped, _replacement(baseline, frames), frames), dropped

    return Perturbation(VideoLayout.of(layout), alter, generator)


def frame_shuffle(layout: VideoLayout | str, window: int, generator: torch.Generator | None = None) -> Perturbation:
    """Return a perturbation that shuffles the frames within each window.

    Example:
        >>> clip = torch.arange(6.0).reshape(1, 6, 1, 1, 1)  # six frames of one pixel
        >>> shuffle = frame_shuffle("BTCHW", window=3).for_infidelity(multiply_by_inputs=False)
        >>> perturbed = shuffle(clip)[1].flatten()
        >>> sorted(perturbed[:3].tolist()), sorted(perturbed[3:].tolist())
        ([0.0, 1.0, 2.0], [3.0, 4.0, 5.0])

    Args:
        layout: order of the axes of the clips.
        window: number of frames per window, at least 2. The last window is shorter if it does not divide the clip. All
            orders are equally likely, including the original one.
        generator: as in :class:`Perturbation`.

    Raises:
        TypeError: ``window`` is not an int.
        ValueError: ``window`` is less than 2. When called: ``window`` is larger than the clip.
    """
    check_count("window", window, least=2, of="frames")

    def alter(frames: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        if window > len(frames):
            raise ValueError(
                f"window must be at most the number of frames, {len(frames)}, got {window}. Use a smaller window "
                f"or longer clips."
            )
        windows = torch.arange(len(frames)).split(int(window))
        orders = [torch.randperm(len(part), generator=generator, device=generator.device).cpu() for part in windows]
        return frames[torch.cat([part[order] for part, order in zip(windows, orders, strict=True)])], None

    return Perturbation(VideoLayout.of(layout), alter, generator)


def _noise(
    layout: VideoLayout | str, ids: Callable[[Tensor], Tensor], std: float, generator: torch.Generator | None
) -> Perturbation:
    """Return a perturbation that adds one Gaussian number to all voxels with the same id."""
    if not (is_number(std) and 0 < std < math.inf):
        raise ValueError(f"std must be positive and finite, in the units of the clip, got {std!r}.")

    def alter(frames: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        mask = ids(frames[None])[0]  # (T, 1, H, W) or (T, 1, 1, 1)
        draws = torch.randn(int(mask.max()) + 1, generator=generator, device=generator.device)
        return frames + std * draws.to(frames)[mask], None

    return Perturbation(VideoLayout.of(layout), alter, generator)


def _replacement(baseline: Baseline, frames: Tensor) -> Tensor:
    if not callable(baseline):
        return torch.full_like(frames, baseline)
    value = baseline(frames[None], VideoLayout(WORKING))
    if value.shape != frames[None].shape or not bool(value.isfinite().all()):
        raise ValueError(
            f"baseline must return finite values in the clip's shape {tuple(frames[None].shape)}, got shape "
            f"{tuple(value.shape)} with {int(value.isfinite().sum())} finite values."
        )
    return value[0].to(frames)
