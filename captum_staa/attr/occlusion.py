"""Occlusion for video with sliding windows in space and time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_staa._utils.captum import BaselineType, TargetType, _format_output, _is_tuple, log_usage
from captum_staa._utils.checks import check_count
from captum_staa._utils.model_state import in_eval_mode
from captum_staa.attr._base import VideoMethod, attribution_dtype, clips_of, evaluations
from captum_staa.layout import WORKING, VideoLayout, layout_of
from captum_staa.masking.ablation import Windows, ablate
from captum_staa.masking.arguments import TargetScore, baselines_for, check_perturbations_per_eval

logger = logging.getLogger(__name__)
Sides = tuple[int, ...]
MANY = 1000  # calls of the model that are announced


class VideoOcclusion(VideoMethod, PerturbationAttribution):
    """Attribution method that measures how much the target's output falls when a space-time window is occluded.

    The values equal those of Captum's Occlusion. Captum builds a mask of the whole clip for every window. This class
    replaces only the voxels of the window.

    Example:
        >>> from captum_staa import VideoClassifier, VideoOcclusion
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> clip = clf.layout.from_working(clip)  # the 3D network takes (B, C, T, H, W)
        >>> maps = VideoOcclusion(clf).attribute_maps(
        ...     clip, (4, 12, 12), strides=(2, 6, 6), target=label, perturbations_per_eval=8)
        >>> bool(truth[0, maps.temporal[0].argmax()].any())
        True

    Args:
        forward_func: a :class:`VideoClassifier`, or any function of clips that returns one row of outputs per example.
        layout: the order of the clips' axes, such as ``"BCTHW"``. Optional for a classifier, which has a layout.

    Raises:
        ValueError: the layout is missing, or differs from the classifier's.

    Reference:
        Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2.
    """

    def __init__(self, forward_func: Callable[..., Any], layout: VideoLayout | str | None = None) -> None:
        super().__init__(forward_func)
        self.layout = layout_of(forward_func, layout)

    @log_usage(part_of_slo=True)
    @in_eval_mode
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        sliding_window_shapes: Sides | tuple[Sides, ...],
        strides: int | Sides | tuple[int | Sides, ...] | None = None,
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the shape of the clip.

        Args:
            inputs: clip, or a tuple of clips (RGB and flow), which are occluded one at a time.
            sliding_window_shapes: ``(t, h, w)`` in frames and pixels, for windows over all channels; or, as in Captum,
                one side for each axis after the batch, in the layout's order. For several inputs, a tuple of these.
            strides: step of the window along each axis, in the same order. An int is used for all axes. None means half
                a window. (In Captum it means 1, which gives tens of thousands of windows for a video.) A stride must
                not be longer than the window.
            baselines: values that replace a window: a number, a tensor of the clip's shape or with a first axis of 1
                (as functions of ``captum_staa.baselines`` return), or a tuple of these for several inputs. None is 0.
            target: as in Captum, or a label that the classifier knows. Required if the model has several outputs.
            additional_forward_args: further positional arguments of the model.
            perturbations_per_eval: number of windows per call of the model, at least 1. Each needs a copy of the whole
                batch in memory. It changes the speed, not the result.
            show_progress: whether to show a progress bar over the calls of the model. Without it, the number of calls
                is logged as a warning if there are more than 1000.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), in units of the output, contiguous and detached. At
            each voxel it is the mean decrease of the output over all windows that cover the voxel. Positive values are
            evidence for the target.

        Raises:
            ValueError: a window is larger than the clip, a stride is below 1 or longer than the window, a baseline has
                the wrong shape, a clip has the wrong rank or holds nan, or the target is missing.
            TypeError: an argument has the wrong type or is unknown.
        """
        clips = clips_of(inputs, self.layout)
        sides = self._sides(sliding_window_shapes, clips)
        steps = self._strides(strides, sides, clips)
        covers = baselines_for(clips, baselines)
        check_perturbations_per_eval(perturbations_per_eval)
        forward = self.layout.forward_from_working(self.forward_func, len(clips))
        score = TargetScore(forward, target, additional_forward_args, len(clips[0]))
        clips, covers = (tuple(map(self.layout.to_working, tensors)) for tensors in (clips, covers))
        windows = Windows([clip.shape[1:] for clip in clips], sides, steps)
        calls = 1 + -(-len(windows) // perturbations_per_eval)
        if calls > MANY and not show_progress:
            logger.warning(
                "VideoOcclusion calls the model %d times, for %d windows. Pass larger strides or a larger "
                "perturbations_per_eval to call it less often, and show_progress=True to see its progress.",
                calls,
                len(windows),
            )
        with evaluations(self.get_name(), len(windows), perturbations_per_eval, show_progress) as tick:
            falls = ablate(score, clips, covers, windows, perturbations_per_eval, tick)
        attributions = (
            self.layout.from_working(values).to(attribution_dtype(clip)).contiguous()
            for values, clip in zip(windows.spread(falls), clips, strict=True)
        )
        return _format_output(_is_tuple(inputs), tuple(attributions))

    def _sides(self, windows: Any, clips: tuple[Tensor, ...]) -> list[Sides]:
        """Return the sides ``(T, C, H, W)`` of one window per clip."""
        result = []
        for window, clip in zip(_per_input("sliding_window_shapes", windows, len(clips)), clips, strict=True):
            sides = self._along_axes("sliding_window_shapes", window, clip)
            sizes = self.layout.size(clip)
            if any(side > sizes[axis] for side, axis in zip(sides, WORKING[1:], strict=True)):
                raise ValueError(
                    f"sliding_window_shapes must not be larger than the clip, got {window!r} for a clip of shape "
                    f"{tuple(clip.shape)} in layout {self.layout.axes}. Use (t, h, w) of at most "
                    f"{tuple(sizes[axis] for axis in 'THW')}."
                )
            result.append(sides)
        return result

    def _strides(self, strides: Any, windows: list[Sides], clips: tuple[Tensor, ...]) -> list[Sides]:
        """Return one stride ``(T, C, H, W)`` per clip."""
        result = []
        for stride, window, clip in zip(_per_input("strides", strides, len(clips)), windows, clips, strict=True):
            if stride is None:
                result.append(tuple(-(-side // 2) for side in window))
                continue
            steps = self._along_axes("strides", stride if isinstance(stride, (tuple, list)) else (stride,) * 4, clip)
            sizes = self.layout.size(clip)
            for axis, step, side in zip(WORKING[1:], steps, window, strict=True):
                if step > side < sizes[axis]:
                    raise ValueError(
                        f"strides must not be longer than the window, got strides {stride!r} with a window of "
                        f"{side} along {axis}. Voxels between windows would get none. Use at most {side} "
                        f"there."
                    )
            result.append(steps)
        return result

    def _along_axes(self, name: str, sides: Any, clip: Tensor) -> Sides:
        """Return sides along ``(T, C, H, W)``, from ``(t, h, w)`` or from four sides in the layout's order."""
        if not (isinstance(sides, tuple) and len(sides) in (3, 4)):
            raise ValueError(
                f"{name} must be integers (t, h, w), or one for each of {self.layout.axes[1:]}, got {sides!r} for a "
                f"clip of shape {tuple(clip.shape)}. Pass a tuple, such as (4, 16, 16)."
            )
        letters = "THW" if len(sides) == 3 else self.layout.axes[1:]
        for axis, side in zip(letters, sides, strict=True):
            check_count(f"{axis} of {name} {sides!r}", side)
        named = {"C": clip.shape[self.layout.channel]} | dict(zip(letters, map(int, sides), strict=True))
        return tuple(named[axis] for axis in WORKING[1:])


def _per_input(name: str, value: Any, inputs: int) -> tuple[Any, ...]:
    """Return one value per input."""
    if not isinstance(value, tuple):
        return (value,) * inputs
    if inputs == 1 and not (len(value) == 1 and isinstance(value[0], tuple)):
        return (value,)
    if len(value) != inputs:
        raise ValueError(
            f"{name} must have one item per input, {inputs} here, got {value!r}. Pass a tuple of {inputs}."
        )
    return value
