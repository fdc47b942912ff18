"""Feature ablation for video: the regions of any feature mask, at almost no cost outside the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_staa._captum import BaselineType, TargetType, _format_output, _is_tuple, log_usage
from captum_staa.attr._arguments import (
    as_attributions,
    baselines_for,
    check_perturbations_per_eval,
    clips_of,
    evaluations,
    layout_if_known,
)
from captum_staa.layout import VideoLayout
from captum_staa.perturbation.ablation import ablate
from captum_staa.perturbation.regions import Features
from captum_staa.perturbation.scores import TargetScore


class VideoFeatureAblation(PerturbationAttribution):
    """How much the target's output falls when a region of a feature mask is replaced.

    The numbers are those of Captum's FeatureAblation. Captum compares the whole mask with every id and copies the clip
    for it; here a region's own voxels are looked up once and written.

    Example:
        >>> from captum_staa import VideoClassifier, VideoFeatureAblation, feature_masks, space_time
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> mask = feature_masks.tubelets(clip, clf)
        >>> attributions = VideoFeatureAblation(clf).attribute(
        ...     clip, target=label, feature_mask=mask, perturbations_per_eval=8)
        >>> when = space_time(attributions, clf.layout).temporal[0].argmax()
        >>> bool(truth[0, when].any())
        True

    Args:
        forward_func: a :class:`VideoClassifier`, or any function that gives one row of outputs per example.
        layout: the order of the clips' axes, so that a clip of another kind is refused. A classifier knows its own;
            without one, inputs may have any shape.

    Raises:
        ValueError: another layout than the classifier's.

    Reference:
        Captum's FeatureAblation.
    """

    def __init__(self, forward_func: Callable[..., Any], layout: VideoLayout | str | None = None) -> None:
        super().__init__(forward_func)
        self.layout = layout_if_known(forward_func, layout)

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | tuple[Tensor, ...] | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attributions of the input's own shape.

        Args:
            inputs: clip, or a tuple of clips (RGB and flow).
            baselines: what replaces a region: a number, a tensor of the input's shape or with a first axis of 1, one of
                ``captum_staa.baselines``, a tuple of such for several inputs. None is 0.
            target: as in Captum; needed where the model has several outputs.
            additional_forward_args: further positional arguments of the model.
            feature_mask: ids 0 .. n-1 without gaps, whole numbers, broadcastable to the input, one of
                ``captum_staa.feature_masks``; a tuple for several inputs, where one id may span several and is then
                replaced in all at once. None makes every number of the input a feature, as in Captum.
            perturbations_per_eval: regions per call of the model, each a copy of the whole batch in memory. Changes
                speed, no number.
            show_progress: draw a bar of the model's calls.

        Returns:
            Like ``inputs`` (float32 where they are of half precision), in units of the output: at each voxel the fall
            of the output without its region. Positive is evidence for the target. Contiguous, detached.

        Raises:
            ValueError: a mask or a baseline of another shape, a mask with gaps, a clip of the wrong rank or with nan,
                a missing target.
            TypeError: an argument of the wrong type, or an unknown one.
        """
        clips = clips_of(inputs, self.layout)
        masks = _masks_for(clips, feature_mask)
        covers = baselines_for(clips, baselines)
        check_perturbations_per_eval(perturbations_per_eval)
        features = Features(masks, [tuple(clip.shape) for clip in clips])
        score = TargetScore(self.forward_func, target, additional_forward_args, len(clips[0]))
        with evaluations(self.get_name(), len(features), perturbations_per_eval, show_progress) as tick:
            falls = ablate(score, clips, covers, features, perturbations_per_eval, tick)
        return _format_output(_is_tuple(inputs), as_attributions(features.spread(falls), clips))

    def attribute_future(self) -> NoReturn:
        """Not offered: Captum's futures are for remote models."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")


def _masks_for(clips: tuple[Tensor, ...], feature_mask: Tensor | tuple[Tensor, ...] | None) -> list[Tensor]:
    """One mask per input, of as many axes."""
    if feature_mask is None:
        return _every_number(clips)
    given: tuple[Any, ...] = feature_mask if isinstance(feature_mask, tuple) else (feature_mask,)
    if len(given) != len(clips):
        raise ValueError(f"feature_mask must be one per input, {len(clips)}, but {len(given)} came")
    masks = []
    for mask, clip in zip(given, clips, strict=True):
        if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.is_complex():
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"a feature mask is a tensor of whole numbers, but {kind} came; convert it with .long()")
        sides = (1,) * (clip.ndim - mask.ndim) + tuple(mask.shape)
        if len(sides) != clip.ndim or any(side not in (1, size) for side, size in zip(sides, clip.shape, strict=True)):
            raise ValueError(
                f"a feature mask must be broadcastable to its input of shape {tuple(clip.shape)}, but its shape is "
                f"{tuple(mask.shape)}; captum_staa.feature_masks makes some"
            )
        masks.append(mask.detach().to(clip.device, torch.long).view(sides))
    _refuse_gaps(masks)
    return masks


def _refuse_gaps(masks: list[Tensor]) -> None:
    ids = torch.cat([mask.flatten() for mask in masks])
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest == 0 and highest < len(ids) and bool(torch.bincount(ids).all()):
        return
    raise ValueError(
        f"ids of a feature mask run from 0 to n-1 without gaps, but {len(ids.unique())} ids from {lowest} to {highest} "
        f"came; mask.unique(return_inverse=True)[1] renumbers them"
    )


def _every_number(clips: tuple[Tensor, ...]) -> list[Tensor]:
    """Ids for every number of an example, one input after the other."""
    masks, first = [], 0
    for clip in clips:
        count = clip[0].numel()
        masks.append(torch.arange(first, first + count, device=clip.device).view(1, *clip.shape[1:]))
        first += count
    return masks
