"""Feature ablation for video with the regions of any feature mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_staa._utils.captum import BaselineType, TargetType, _format_output, _is_tuple, log_usage
from captum_staa._utils.model_state import in_eval_mode
from captum_staa._utils.networks import sizes_explained
from captum_staa.attr._base import VideoMethod, attribution_dtype, clips_of, evaluations
from captum_staa.layout import VideoLayout, layout_if_known
from captum_staa.masking.ablation import Features, ablate
from captum_staa.masking.arguments import TargetScore, baselines_for, check_perturbations_per_eval, masks_for


class VideoFeatureAblation(VideoMethod, PerturbationAttribution):
    """Attribution method that measures how much the target's output falls when a region of a feature mask is replaced.

    The values equal those of Captum's FeatureAblation. Captum compares the whole mask with every id and copies the clip
    each time. This class finds the voxels of each region once and replaces only them.

    Example:
        >>> from captum_staa import VideoClassifier, VideoFeatureAblation, feature_masks
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> mask = feature_masks.tubelets(clip, clf)
        >>> maps = VideoFeatureAblation(clf).attribute_maps(
        ...     clip, target=label, feature_mask=mask, perturbations_per_eval=8)
        >>> bool(truth[0, maps.temporal[0].argmax()].any())
        True

    Args:
        forward_func: a :class:`VideoClassifier`, or any function that returns one row of outputs per example.
        layout: the order of the clips' axes, such as ``"BCTHW"``, against which clips are checked. Optional for a
            classifier, which has a layout. Without a layout, inputs may have any shape.

    Raises:
        ValueError: the layout differs from the classifier's.

    Reference:
        Captum's FeatureAblation.
    """

    def __init__(self, forward_func: Callable[..., Any], layout: VideoLayout | str | None = None) -> None:
        super().__init__(forward_func)
        self.layout = layout_if_known(forward_func, layout)

    @log_usage(part_of_slo=True)
    @in_eval_mode
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
        """Return attributions of the shape of the input.

        Args:
            inputs: clip, or a tuple of clips (RGB and flow).
            baselines: values that replace a region: a number, a tensor of the input's shape or with a first axis of
                1 (as functions of ``captum_staa.baselines`` return), or a tuple of these for several inputs. None is 0.
            target: as in Captum, or a label that the classifier knows. Required if the model has several outputs.
            additional_forward_args: further positional arguments of the model.
            feature_mask: integer ids 0 .. n-1 without gaps, broadcastable to the input, such as a result of
                ``captum_staa.feature_masks``. For several inputs, a tuple. An id that occurs in several inputs is
                replaced in all of them at once. With None, every element of the input is a feature, as in Captum.
            perturbations_per_eval: number of regions per call of the model, at least 1. Each needs a copy of the whole
                batch in memory. It changes the speed, not the result.
            show_progress: whether to show a progress bar over the calls of the model.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), in units of the output, contiguous and detached. At
            each voxel it is the decrease of the output without the region of the voxel. Positive values are evidence
            for the target.

        Raises:
            ValueError: a mask or a baseline has the wrong shape, a mask has gaps, a clip has the wrong rank or holds
                nan, or the target is missing.
            TypeError: an argument has the wrong type or is unknown.
        """
        clips = clips_of(inputs, self.layout)
        masks = masks_for(clips, feature_mask)
        covers = baselines_for(clips, baselines)
        check_perturbations_per_eval(perturbations_per_eval)
        features = Features(masks, [tuple(clip.shape) for clip in clips])
        forward = sizes_explained(self.forward_func, len(clips))
        score = TargetScore(forward, target, additional_forward_args, len(clips[0]))
        with evaluations(self.get_name(), len(features), perturbations_per_eval, show_progress) as tick:
            falls = ablate(score, clips, covers, features, perturbations_per_eval, tick)
        attributions = (
            values.to(attribution_dtype(clip)) for values, clip in zip(features.spread(falls), clips, strict=True)
        )
        return _format_output(_is_tuple(inputs), tuple(attributions))
