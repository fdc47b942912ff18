"""Occlusion for video: windows in space and time, at almost no cost outside the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_staa._utils.captum import BaselineType, TargetType, _format_output, _is_tuple, log_usage
from captum_staa._utils.checks import check_count
from captum_staa.attr._arguments import as_attributions, clips_of, evaluations
from captum_staa.layout import VideoLayout
from captum_staa.masking.ablation import ablate
from captum_staa.masking.arguments import baselines_for, check_perturbations_per_eval
from captum_staa.masking.regions import Windows
from captum_staa.masking.scores import TargetScore
from captum_staa.models.layouts import layout_of

Sides = tuple[int, ...]


class VideoOcclusion(PerturbationAttribution):
    """How much the target's output falls when a window of space and time is covered.

    The numbers are those of Captum's Occlusion. Captum builds a mask of the whole clip for every window; here only the
    window's own voxels are written.

    Example:
        >>> from captum_staa import VideoClassifier, VideoOcclusion, VideoAttribution
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> clip = clf.layout.from_working(clip)  # the 3D network takes (B, C, T, H, W)
        >>> attributions = VideoOcclusion(clf).attribute(
        ...     clip, (4, 12, 12), strides=(2, 6, 6), target=label, perturbations_per_eval=8)
        >>> when = VideoAttribution.from_attributions(attributions, clf.layout).temporal[0].argmax()
        >>> bool(truth[0, when].any())
        True

    Args:
        forward_func: a :class:`VideoClassifier`, or any function of clips that gives one row of outputs per example.
        layout: the order of the clips' axes; may be left out for a classifier, which knows its own.

    Raises:
        ValueError: there is no layout, or another than the classifier's.

    Reference:
        Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2.
    """

    def __init__(self, forward_func: Callable[..., Any], layout: VideoLayout | str | None = None) -> None:
        super().__init__(forward_func)
        self.layout = layout_of(forward_func, layout)

    @log_usage(part_of_slo=True)
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
        """Attributions of the clip's own shape.

        Args:
            inputs: clip, or a tuple of clips of which one at a time is occluded (RGB and flow).
            sliding_window_shapes: ``(t, h, w)``, frames and pixels, through all channels; or, as in Captum, one side
                for each axis after the batch, in the layout's order. For several inputs a tuple of such.
            strides: steps of the window, in the same order; an int holds for all axes. None is 1, as in Captum, which
                for whole videos means millions of windows. No stride may be longer than its side of the window.
            baselines: what covers: a number, a tensor of the clip's shape or with a first axis of 1, one of
                ``captum_staa.baselines``, a tuple of such for several inputs. None is 0.
            target: as in Captum; needed where the model has several outputs.
            additional_forward_args: further positional arguments of the model.
            perturbations_per_eval: windows per call of the model, each a copy of the whole batch in memory. Changes
                speed, no number.
            show_progress: draw a bar of the model's calls.

        Returns:
            Like ``inputs`` (float32 where they are of half precision), in units of the output: at each voxel the mean
            fall of the output over all windows that cover it. Positive is evidence for the target. Contiguous and
            detached.

        Raises:
            ValueError: a window larger than the clip, a stride below 1 or longer than the window, a baseline of
                another shape, a clip of the wrong rank or with nan, a missing target.
            TypeError: an argument of the wrong type, or an unknown one.
        """
        clips = clips_of(inputs, self.layout)
        sides = self._sides(sliding_window_shapes, clips)
        steps = self._strides(strides, sides, clips)
        covers = baselines_for(clips, baselines)
        check_perturbations_per_eval(perturbations_per_eval)
        sizes = [tuple(clip.shape[1:]) for clip in clips]
        windows = Windows(sizes, sides, steps)
        score = TargetScore(self.forward_func, target, additional_forward_args, len(clips[0]))
        with evaluations(self.get_name(), len(windows), perturbations_per_eval, show_progress) as tick:
            falls = ablate(score, clips, covers, windows, perturbations_per_eval, tick)
        return _format_output(_is_tuple(inputs), as_attributions(windows.spread(falls), clips))

    def attribute_future(self) -> NoReturn:
        """Not offered: Captum's futures are for remote models."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _sides(self, windows: Any, clips: tuple[Tensor, ...]) -> list[Sides]:
        """One window per clip, over its axes after the batch."""
        found = []
        for window, clip in zip(_each("sliding_window_shapes", windows, len(clips)), clips, strict=True):
            sides = self._whole("sliding_window_shapes", window, clip)
            if any(side > size for side, size in zip(sides, clip.shape[1:], strict=True)):
                sizes = self.layout.size(clip)
                raise ValueError(
                    f"a window may not be larger than the clip, got sliding_window_shapes {window!r} for a clip "
                    f"of shape {tuple(clip.shape)} in layout {self.layout.axes}; make (t, h, w) at most "
                    f"{tuple(sizes[axis] for axis in 'THW')}"
                )
            found.append(sides)
        return found

    def _strides(self, strides: Any, windows: list[Sides], clips: tuple[Tensor, ...]) -> list[Sides]:
        """One stride per clip, over its axes after the batch."""
        found = []
        for stride, window, clip in zip(_each("strides", strides, len(clips)), windows, clips, strict=True):
            same = 1 if stride is None else stride
            steps = self._whole("strides", stride if isinstance(same, (tuple, list)) else (same,) * 4, clip)
            for step, side, size in zip(steps, window, clip.shape[1:], strict=True):
                if step > side < size:
                    raise ValueError(
                        f"a stride longer than the window leaves voxels without an attribution, but strides {stride!r} "
                        f"came with a window of {window} (axes {self.layout.axes[1:]}); make it at most {side} there"
                    )
            found.append(steps)
        return found

    def _whole(self, name: str, sides: Any, clip: Tensor) -> Sides:
        """``(t, h, w)``, or four sides as they are, along the axes after the batch."""
        if not (isinstance(sides, tuple) and len(sides) in (3, 4)):
            raise ValueError(
                f"{name} are whole numbers, (t, h, w) or one for each of {self.layout.axes[1:]}, got {sides!r} "
                f"for a clip of shape {tuple(clip.shape)}"
            )
        letters = "THW" if len(sides) == 3 else self.layout.axes[1:]
        for axis, side in zip(letters, sides, strict=True):
            check_count(f"{axis} of {name} {sides!r}", side)
        named = {"C": clip.shape[self.layout.channel]} | dict(zip(letters, map(int, sides), strict=True))
        return tuple(named[axis] for axis in self.layout.axes[1:])


def _each(name: str, value: Any, inputs: int) -> tuple[Any, ...]:
    """One value per input."""
    if not isinstance(value, tuple):
        return (value,) * inputs
    if inputs == 1 and not (len(value) == 1 and isinstance(value[0], tuple)):
        return (value,)
    if len(value) != inputs:
        raise ValueError(f"{name} must be one per input, {inputs}, got {value!r}")
    return value
