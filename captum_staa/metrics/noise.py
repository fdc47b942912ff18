"""Ways to disturb a video, for Captum's ``infidelity`` and ``sensitivity_max``, which know nothing of time.

Each function makes a :class:`Perturbation`. Every clip of a batch is disturbed by a draw of its own, and in half
precision the arithmetic is done in float32.
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
from captum_staa._utils.checks import check_count, check_sides, is_number
from captum_staa._utils.generators import generator_or_seeded
from captum_staa.feature_masks import frames as frame_ids
from captum_staa.feature_masks import grid
from captum_staa.layout import WORKING, VideoLayout
from captum_staa.result import as_tuple

Inputs = Tensor | tuple[Tensor, ...]
Alter = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor | None]]
Baseline = float | Callable[[Tensor, VideoLayout], Tensor]


@dataclass(frozen=True)
class Perturbation:
    """One way to disturb a clip, in the two forms that Captum's metrics call.

    Example:
        >>> import torch
        >>> from captum.attr import IntegratedGradients
        >>> from captum.metrics import infidelity, sensitivity_max
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 8 * 8, 2))
        >>> clip = torch.rand(1, 3, 4, 8, 8)
        >>> method = IntegratedGradients(model, multiply_by_inputs=False)  # a mean of gradients
        >>> attributions = method.attribute(clip, target=1)
        >>> noise = tubelet_noise("BCTHW", cells=(2, 4, 4), std=0.1)
        >>> local = noise.for_infidelity(multiply_by_inputs=method.multiplies_by_inputs)
        >>> bool(infidelity(model, local, clip, attributions, target=1) < 1e-6)  # exact for a linear model
        True
        >>> change = sensitivity_max(method.attribute, clip, noise.for_sensitivity(), perturb_radius=0.02, target=1)
        >>> bool(change < 1e-5)  # of the gradients of a linear model
        True

    Args:
        layout: the order of a clip's axes.
        alter: frames ``(T, C, H, W)`` of one clip, in float32 at least, and a generator, to the frames disturbed. With
            them, None, or where it replaces voxels, what share of each voxel was replaced, broadcastable to the frames.
        generator: draws; None is one seeded with 0 whenever a form is made. That form then goes on drawing, so that
            Captum's samples differ also where ``max_examples_per_batch`` parts them into several calls.
    """

    layout: VideoLayout
    alter: Alter
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        generator_or_seeded(self.generator)  # what is no generator is refused now

    def for_infidelity(self, *, multiply_by_inputs: bool) -> Callable[..., tuple[Inputs, Inputs]]:
        """The ``perturb_func`` of ``captum.metrics.infidelity``.

        Captum compares ``sum(perturbation * attribution)`` with ``f(inputs) - f(perturbed inputs)``, so what the
        perturbation is depends on what the attribution is.

        Args:
            multiply_by_inputs: pass the attribution method's own ``multiplies_by_inputs``. False for a gradient: the
                perturbation is ``inputs - perturbed``. True for a part of the output (Integrated Gradients, occlusion):
                it is the share of each voxel's evidence that was taken, 1 where a frame is dropped. The others have no
                such share, so there it is ``(inputs - perturbed) / (inputs - baselines)``, with what is passed to
                infidelity as ``baselines``, zero if nothing, and 0 where both are equal. That suits attributions
                that are themselves a multiple of ``inputs - baselines``; for occlusion take :func:`frame_drop`.

        Returns:
            A function of inputs, and of baselines where infidelity has some, to (perturbations, perturbed inputs):
            tensors for a tensor, tuples for a tuple, contiguous, detached, like the inputs.

        Raises:
            TypeError: ``multiply_by_inputs`` is no bool.
        """
        if not isinstance(multiply_by_inputs, bool):
            raise TypeError(f"multiply_by_inputs is True or False, got {multiply_by_inputs!r}")
        generator = generator_or_seeded(self.generator)

        def perturb(inputs: Inputs, baselines: BaselineType = None) -> tuple[Inputs, Inputs]:
            clips = self._clips(inputs)
            each = (0,) * len(clips) if baselines is None else baselines if _is_tuple(baselines) else (baselines,)
            perturbations, perturbed = [], []
            for clip, baseline in zip(clips, each, strict=True):
                altered, replaced = self._altered(clip, generator)
                change = clip - altered
                if multiply_by_inputs and replaced is not None:
                    if baselines is not None:
                        raise ValueError(
                            "this perturbation replaces voxels by a baseline of its own, so infidelity takes no "
                            "baselines beside it; pass it there: frame_drop(..., baseline=...)"
                        )
                    change = replaced.to(clip.dtype)
                elif multiply_by_inputs:
                    whole = clip - baseline
                    change = torch.where(whole == 0, 0, change / whole)
                perturbations.append(change.contiguous())
                perturbed.append(altered)
            form = _is_tuple(inputs)
            return _format_output(form, tuple(perturbations)), _format_output(form, tuple(perturbed))

        return perturb

    def for_sensitivity(self) -> Callable[[Inputs, float], Inputs]:
        """The ``perturb_func`` of ``captum.metrics.sensitivity_max``.

        Returns:
            A function of inputs and ``perturb_radius`` to perturbed inputs. Where a clip's change is anywhere larger
            than the radius, the whole of it is shrunk until its largest value is the radius: no value moves farther,
            and the change keeps its form. A smaller one is left as it is.
        """
        generator = generator_or_seeded(self.generator)

        def perturb(inputs: Inputs, perturb_radius: float) -> Inputs:
            if not (is_number(perturb_radius) and 0 < perturb_radius < math.inf):
                raise ValueError(f"perturb_radius is positive and finite, got {perturb_radius!r}")
            near = []
            for clip in self._clips(inputs):
                wide = _wide(clip)
                change = _wide(self._altered(clip, generator)[0]) - wide
                largest = change.abs().amax((1, 2, 3, 4), keepdim=True).clamp(min=perturb_radius)
                near.append((wide + change * (perturb_radius / largest)).to(clip.dtype))
            return _format_output(_is_tuple(inputs), tuple(near))

        return perturb

    def _clips(self, inputs: Inputs) -> tuple[Tensor, ...]:
        clips = tuple(clip.detach() for clip in as_tuple(inputs))
        for i, clip in enumerate(clips):
            self.layout.check_values(clip, f"inputs[{i}]" if _is_tuple(inputs) else "inputs")
        return clips

    def _altered(self, clip: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Of the clip's shape: the clips disturbed, in its dtype, and the share that was replaced."""
        frames = self.layout.to_working(_wide(clip))
        altered, replaced = zip(*(self.alter(one, generator) for one in frames), strict=True)
        shares = None if replaced[0] is None else torch.stack([r.expand_as(frames[0]) for r in replaced])
        return self._like(clip, torch.stack(altered)), None if shares is None else self._like(clip, shares)

    def _like(self, clip: Tensor, frames: Tensor) -> Tensor:
        return self.layout.from_working(frames).to(clip.dtype).contiguous()


def tubelet_noise(
    layout: VideoLayout | str, cells: Sequence[int], std: float, generator: torch.Generator | None = None
) -> Perturbation:
    """Gaussian noise, one number for each cell of space and time: what a transformer's tokens see, not mere grain.

    Example:
        >>> noise = tubelet_noise("BCTHW", cells=(2, 4, 4), std=0.1)
        >>> perturbed = noise.for_sensitivity()(torch.zeros(1, 3, 4, 8, 8), 1.0)
        >>> perturbed.unique().numel()  # 2 x 2 x 2 cells
        8

    Args:
        layout: the order of a clip's axes.
        cells: ``(t, h, w)``, the sides of a cell in frames and pixels; all its channels move alike. The last cells of
            an axis are cut off where it does not divide.
        std: standard deviation, in the clip's own units.
        generator: as in :class:`Perturbation`.

    Raises:
        TypeError: a side of ``cells`` is no whole number.
        ValueError: ``cells`` is not three of at least 1 (and, later, no larger than the clip), or ``std`` is not
            positive and finite.
    """
    check_sides("cells", cells)
    sides = [int(side) for side in cells]
    return _noise(layout, lambda clip: grid(clip, WORKING, sides), std, generator)


def brightness_flicker(layout: VideoLayout | str, std: float, generator: torch.Generator | None = None) -> Perturbation:
    """Frames that are brighter or darker as a whole, each by a Gaussian number of its own.

    Example:
        >>> flicker = brightness_flicker("BCTHW", std=0.1)
        >>> perturbed = flicker.for_sensitivity()(torch.zeros(1, 3, 4, 8, 8), 1.0)
        >>> [frame.unique().numel() for frame in perturbed[0].unbind(1)]
        [1, 1, 1, 1]

    Args:
        layout: the order of a clip's axes.
        std: standard deviation, in the clip's own units.
        generator: as in :class:`Perturbation`.

    Raises:
        ValueError: ``std`` is not positive and finite.
    """
    return _noise(layout, lambda clip: frame_ids(clip, WORKING), std, generator)


def frame_drop(
    layout: VideoLayout | str, share: float, baseline: Baseline = 0.0, generator: torch.Generator | None = None
) -> Perturbation:
    """Whole frames are replaced, drawn without regard to their order.

    Example:
        >>> from captum_staa import baselines
        >>> clip = torch.arange(4.0).reshape(1, 4, 1, 1, 1)  # four frames of one pixel
        >>> drop = frame_drop("BTCHW", share=0.5, baseline=baselines.mean_frame).for_infidelity(multiply_by_inputs=True)
        >>> dropped, perturbed = drop(clip)
        >>> dropped.flatten(), perturbed.flatten()
        (tensor([1., 1., 0., 0.]), tensor([1.5000, 1.5000, 2.0000, 3.0000]))

    Args:
        layout: the order of a clip's axes.
        share: of the frames, above 0 and up to 1; their number is rounded, and at least one.
        baseline: what takes their place: a number, or a function of a clip and its layout such as those of
            :mod:`captum_staa.baselines`, which gets each clip by itself, in layout BTCHW. Use the attribution's own.
        generator: as in :class:`Perturbation`.

    Raises:
        TypeError: ``baseline`` is neither.
        ValueError: ``share`` is out of range, ``baseline`` not finite or, later, not of the clip's shape.
    """
    if not (is_number(share) and 0 < share <= 1):
        raise ValueError(f"share of the frames is above 0 and up to 1, got {share!r}; share=0.25 drops a quarter")
    given: Any = baseline
    if not callable(given) or isinstance(given, type):
        if not isinstance(given, (int, float, np.integer, np.floating)):
            raise TypeError(
                f"baseline is a number or a function of (clip, layout), got {type(given).__name__}; "
                f"captum_staa.baselines has some, and lambda clip, layout: value makes one of a tensor"
            )
        if not math.isfinite(given):
            raise ValueError(f"baseline must be finite, got {baseline}")

    def alter(frames: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        count = max(1, round(share * len(frames)))
        order = torch.randperm(len(frames), generator=generator, device=generator.device).to(frames.device)
        dropped = (order < count).view(-1, 1, 1, 1)
        return torch.where(dropped, _replacement(baseline, frames), frames), dropped

    return Perturbation(VideoLayout.of(layout), alter, generator)


def frame_shuffle(layout: VideoLayout | str, window: int, generator: torch.Generator | None = None) -> Perturbation:
    """Frames change places with their neighbors: every run of ``window`` frames gets a random order.

    Example:
        >>> clip = torch.arange(6.0).reshape(1, 6, 1, 1, 1)  # six frames of one pixel
        >>> shuffle = frame_shuffle("BTCHW", window=3).for_infidelity(multiply_by_inputs=False)
        >>> perturbed = shuffle(clip)[1].flatten()
        >>> sorted(perturbed[:3].tolist()), sorted(perturbed[3:].tolist())
        ([0.0, 1.0, 2.0], [3.0, 4.0, 5.0])

    Args:
        layout: the order of a clip's axes.
        window: frames per run, at least 2; the last run is shorter where it does not divide the clip. Every order is
            equally likely, the one that was there too.
        generator: as in :class:`Perturbation`.

    Raises:
        TypeError: ``window`` is no whole number.
        ValueError: it is below 2 or, later, larger than the clip.
    """
    check_count("window", window, least=2, of="frames")

    def alter(frames: Tensor, generator: torch.Generator) -> tuple[Tensor, None]:
        if window > len(frames):
            raise ValueError(f"window is {window} frames, but a clip has {len(frames)}; take one of 2 to {len(frames)}")
        runs = torch.arange(len(frames)).split(int(window))
        orders = [torch.randperm(len(run), generator=generator, device=generator.device).cpu() for run in runs]
        return frames[torch.cat([run[order] for run, order in zip(runs, orders, strict=True)])], None

    return Perturbation(VideoLayout.of(layout), alter, generator)


def _noise(
    layout: VideoLayout | str, ids: Callable[[Tensor], Tensor], std: float, generator: torch.Generator | None
) -> Perturbation:
    """One draw for each id, given to all its voxels."""
    if not (is_number(std) and 0 < std < math.inf):
        raise ValueError(f"std is positive and finite, in the clip's own units, got {std!r}")

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
            f"baseline must give finite values of the clip's shape {tuple(frames[None].shape)}, but shape "
            f"{tuple(value.shape)} came, with {int(value.isfinite().sum())} finite values"
        )
    return value[0].to(frames)


def _wide(clip: Tensor) -> Tensor:
    return clip.to(torch.promote_types(clip.dtype, torch.float32))
