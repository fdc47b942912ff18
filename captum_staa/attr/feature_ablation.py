"""Feature ablation for video: the regions of any feature mask, at almost no cost outside the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_staa._utils.captum import BaselineType, TargetType, _format_output, _is_tuple, log_usage
from captum_staa.attr._arguments import as_attributions, clips_of, evaluations
from captum_staa.layout import VideoLayout
from captum_staa.masking.ablation import ablate
from captum_staa.masking.arguments import baselines_for, check_perturbations_per_eval, masks_for
from captum_staa.masking.regions import Features
from captum_staa.masking.scores import TargetScore
from captum_staa.models.layouts import layout_if_known


class VideoFeatureAblation(PerturbationAttribution):
    """How much the target's output falls when a region of a feature mask is replaced.

    The numbers are those of Captum's FeatureAblation. Captum compares the whole mask with every id and copies the clip
    for it; here a region's own voxels are looked up once and written.

    Example:
        >>> from captum_staa import VideoClassifier, VideoFeatureAblation, feature_masks, VideoAttribution
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> mask = feature_masks.tubelets(clip, clf)
        >>> attributions = VideoFeatureAblation(clf).attribute(
        ...     clip, target=label, feature_mask=mask, perturbations_per_eval=8)
        >>> when = VideoAttribution.from_attributions(attributions, clf.layout).temporal[0].argmax()
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
        masks = masks_for(clips, feature_mask)
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
