"""RISE for video: attributions from random masks over space and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_staa._utils.captum import BaselineType, TargetType, log_usage
from captum_staa._utils.checks import check_count, check_sides, generator_or_seeded
from captum_staa._utils.model_state import in_eval_mode
from captum_staa.attr._base import VideoMethod, attribution_dtype, clips_of, evaluations, extent, like_inputs
from captum_staa.layout import VideoLayout, layout_of
from captum_staa.masking.arguments import TargetScore, baselines_for, check_perturbations_per_eval

Sides = tuple[int, int, int]


class RISE(VideoMethod, PerturbationAttribution):
    """Attribution method that measures how the target's output changes with random masks of the clip.

    Each mask is a coarse grid of cells. A cell is shown with probability ``keep`` and hidden otherwise. The grid is
    interpolated trilinearly to the size of the clip, with a random shift of up to one cell in time, height and width.
    The method needs no gradient and no access to layers.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> clip = clf.layout.from_working(clip)  # the 3D network takes (B, C, T, H, W)
        >>> maps = RISE(clf).attribute_maps(clip, target=label, perturbations_per_eval=16, n_samples=320)
        >>> bool(truth[0, maps.temporal[0].argmax()].any())
        True

    Args:
        forward_func: a :class:`VideoClassifier`, or any function of clips that returns one row of outputs per example.
        layout: the order of the clips' axes, such as ``"BCTHW"``. Optional for a classifier, which has a layout.

    Raises:
        ValueError: the layout is missing, or differs from the classifier's.

    Note:
        With scores s_i of masks M_i, i = 1 .. N, a voxel's attribution is ``sum_i (s_i - mean(s)) M_i / ((N - 1)
        Var M)``: the unbiased sample covariance of score and mask, divided by the known variance of the mask. This is
        the slope of the score with respect to the mask at the voxel. The paper's ``sum_i s_i M_i / (N keep)`` ranks
        voxels in the same order for large N, but it adds the mean score to all of them, and thus the noise of the mean
        of M_i. Here both are removed, so the attribution of a constant model is zero.

        Neighboring voxels are shown together, so a slope describes a neighborhood of about one cell, and slopes do not
        sum to the output. Their standard error decreases with the square root of ``n_samples``.

    Reference:
        Petsiuk, Das and Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018,
        section 3. Time is masked in the same way as height and width.
    """

    def __init__(self, forward_func: Callable[..., Any], layout: VideoLayout | str | None = None) -> None:
        super().__init__(forward_func)
        self.layout = layout_of(forward_func, layout)

    @log_usage(part_of_slo=True)
    @in_eval_mode
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        *,
        n_samples: int = 1000,
        n_cells: Sides = (4, 7, 7),
        keep: float = 0.5,
        generator: torch.Generator | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the shape of the clip, spread evenly over channels.

        Args:
            inputs: clip, or a tuple of clips (RGB and flow), each with its own masks.
            baselines: values of hidden voxels: a number, a tensor of the clip's shape or with a first axis of 1
                (as functions of ``captum_staa.baselines`` return), or a tuple of these for several inputs. None is 0.
            target: as in Captum, or a label that the classifier knows. Required if the model has several outputs.
            additional_forward_args: further positional arguments of the model.
            perturbations_per_eval: number of masks per call of the model, at least 1. Each needs a copy of the whole
                batch in memory. It changes the speed, not the result.
            show_progress: whether to show a progress bar over the calls of the model.
            n_samples: N, the number of masks, at least 2. All clips of a batch get the same masks.
            n_cells: ``(t, h, w)``, number of cells along time, height and width.
            keep: probability that a cell is shown, between 0 and 1 (exclusive).
            generator: draws the masks. None uses a new generator with seed 0 in each call.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), contiguous and detached. Summed over channels, it
            is the mean increase of the output when the voxel, with its neighborhood, changes from hidden to shown.
            Positive values are evidence for the target.

        Raises:
            ValueError: an option is out of range, a baseline has the wrong shape, a clip has the wrong rank or holds
                nan, or the target is missing.
            TypeError: an argument has the wrong type or is unknown.
        """
        clips = clips_of(inputs, self.layout)
        hidden = baselines_for(clips, baselines)
        check_perturbations_per_eval(perturbations_per_eval)
        _check_options(n_samples, n_cells, keep)
        draw = generator_or_seeded(generator)
        # NumPy integers overflow and have no negative powers
        cells, n_samples = tuple(map(int, n_cells)), int(n_samples)
        forward = self.layout.forward_from_working(self.forward_func, len(clips))
        score = TargetScore(forward, target, additional_forward_args, len(clips[0]))
        clips, hidden = (tuple(map(self.layout.to_working, tensors)) for tensors in (clips, hidden))
        slopes = [_Slope(clip, cells, keep) for clip in clips]
        with torch.no_grad(), evaluations(self.get_name(), n_samples, perturbations_per_eval, show_progress) as tick:
            # Use differences to the score of the whole clip, so that a large constant in the scores costs no precision.
            whole = score(tuple(clip.clone() for clip in clips))
            tick()
            for first in range(0, n_samples, perturbations_per_eval):
                count = min(perturbations_per_eval, n_samples - first)
                masks = [[slope.mask(draw) for slope in slopes] for _ in range(count)]
                stacked = [torch.stack(column) for column in zip(*masks, strict=True)]  # (count, T, H, W) per input
                altered = (_blend(*parts) for parts in zip(clips, hidden, stacked, strict=True))
                gains = score(tuple(altered), count) - whole  # (count, B)
                for slope, column in zip(slopes, stacked, strict=True):
                    slope.add(gains, column)
                tick()
        return like_inputs(inputs, self.layout, *(slope.value() for slope in slopes))


class _Slope:
    """Class that draws the masks of one clip ``(B, T, C, H, W)`` and computes the slope of the score in them."""

    def __init__(self, clip: Tensor, cells: Sequence[int], keep: float) -> None:
        self.size = extent(clip)
        self.cells, self.keep = cells, keep
        self.sides = [-(-pixels // count) for pixels, count in zip(self.size, cells, strict=True)]
        self.like = torch.empty(0, dtype=attribution_dtype(clip), device=clip.device)
        self.count = 0
        self.gained = self.like.new_zeros(len(clip))
        self.shown = self.like.new_zeros(self.size)
        self.together = self.like.new_zeros(len(clip), *self.size)

    def mask(self, generator: torch.Generator) -> Tensor:
        """Return a random mask ``(T, H, W)``, with values from 0 (hidden) to 1 (shown)."""
        # One additional cell for the shift, and one for the far corner of the last cell.
        coarse = torch.rand([count + 2 for count in self.cells], generator=generator, device=generator.device)
        mask = (coarse < self.keep).to(self.like)
        for axis, (pixels, side) in enumerate(zip(self.size, self.sides, strict=True)):
            shift = int(torch.randint(side, (), generator=generator, device=generator.device))
            place = torch.arange(shift, shift + pixels, device=mask.device)
            low = place // side
            share = (place % side).to(mask.dtype).view([-1 if i == axis else 1 for i in range(3)]) / side
            mask = torch.lerp(mask.index_select(axis, low), mask.index_select(axis, low + 1), share)
        return mask

    def add(self, gains: Tensor, masks: Tensor) -> None:
        """Add scores ``(n, B)`` of masks ``(n, T, H, W)`` one at a time, so that chunks do not change the sums."""
        for gain, mask in zip(gains.to(self.like), masks, strict=True):
            self.count += 1
            self.gained += gain
            self.shown += mask
            self.together += gain[:, None, None, None] * mask

    def value(self) -> Tensor:
        """Return the covariance of score and mask divided by the variance of the mask, ``(B, T, H, W)``."""
        mean = self.gained / self.count
        covariance = (self.together - mean[:, None, None, None] * self.shown) / (self.count - 1)
        # A voxel at position k/c between two cells is interpolated linearly. Along each axis, its variance averaged
        # over the shifts k = 0 .. c-1 is the mean of (1 - k/c)^2 + (k/c)^2 = (2 + 1/c^2) / 3, times
        # the variance of a cell.
        variance = self.keep * (1 - self.keep) * prod((2 + side**-2) / 3 for side in self.sides)
        return covariance / variance


def _blend(clip: Tensor, hidden: Tensor, masks: Tensor) -> Tensor:
    """Return clips ``(B, T, C, H, W)`` under masks ``(n, T, H, W)``, batch after batch: ``(n * B, T, C, H, W)``."""
    shares = masks[:, None, :, None]  # (n, 1, T, 1, H, W)
    return torch.lerp(hidden.to(masks.dtype), clip.to(masks.dtype), shares).flatten(0, 1).to(clip.dtype)


def _check_options(n_samples: object, n_cells: object, keep: object) -> None:
    check_count("n_samples", n_samples, least=2)
    check_sides("n_cells", n_cells)
    if not (isinstance(keep, float) and 0 < keep < 1):
        raise ValueError(
            f"keep must be a float between 0 and 1 (exclusive), got {keep!r}. Pass a probability such as 0.5."
        )
