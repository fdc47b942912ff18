"""Spatio-temporal perturbation: masks that learn which part of a clip carries the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NoReturn

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor, nn

from captum_staa._utils.captum import (
    BaselineType,
    TargetType,
    _format_additional_forward_args,
    _format_output,
    _is_tuple,
    _run_forward,
    log_usage,
)
from captum_staa._utils.checks import check_choice
from captum_staa._utils.model_state import frozen_parameters
from captum_staa.attr._arguments import call_bar, one_clip, refuse_inference_mode
from captum_staa.attr._hiding import OF_SEVERAL_FRAMES, blend_of
from captum_staa.attr._perturbation_result import MaskAttribution, probability, result_of
from captum_staa.layout import VideoLayout
from captum_staa.masking.arguments import baselines_for, check_perturbations_per_eval, units_for
from captum_staa.masking.scores import TargetScore, over_classes
from captum_staa.models.layouts import layout_of
from captum_staa.perturbation.blends import BlurPyramid
from captum_staa.perturbation.learning import Check, Task, learn
from captum_staa.perturbation.mask_grid import Field, GridField, RegionField
from captum_staa.perturbation.objective import Aim, Objective, Scale
from captum_staa.perturbation.presets import PRESETS, PerturbationConfig
from captum_staa.perturbation.regularizers import Regularizer
from captum_staa.result import maps_of


class SpatioTemporalPerturbation(PerturbationAttribution):
    """Which part of the clip, in space and time, suffices for the answer, and is needed for it.

    Masks that show a given part of the clip's volume, and hide the rest, are learned by gradient descent on the model's
    answer. Any model will do through which a gradient flows.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> clip = clf.layout.from_working(clip)  # the 3D network takes (B, C, T, H, W)
        >>> parts = SpatioTemporalPerturbation(clf).attribute_maps(clip, target=label, perturbations_per_eval=8)
        >>> parts.masks.shape, bool((parts.visible[0] - parts.areas).abs().max() < 1e-3)
        (torch.Size([1, 4, 16, 48, 48]), True)
        >>> kept, deleted = parts.kept[0, 0], parts.deleted[0, 0]  # of the smallest area: with it alone, without it
        >>> parts.joint.shape
        torch.Size([1, 16, 48, 48])

    Args:
        forward_func: a :class:`VideoClassifier`, or any differentiable function of a clip that gives one row of outputs
            per example.
        layout: the order of the clip's axes; may be left out for a classifier, which knows its own.
        preset: ``"nested"``, one score per cell whose thresholds give all masks, for the two aims at once; ``"step"``,
            the paper's: a mask for each area, to preserve the answer, smoothed by ellipsoids; ``"3d-ep"``, the same
            without that, which is Extremal Perturbation over the volume; ``"2d-ep"``, over each frame. Or a
            :class:`captum_staa.perturbation.presets.PerturbationConfig` of your own.

    Raises:
        ValueError: no layout, or another than the classifier's; an unknown preset.

    Note:
        The papers spread a cell's number by a smooth maximum over its neighbors, and also learn cells beyond the
        frame. Here it is interpolated linearly, so that areas are those of the visible volume. Their regularizer has no
        weight for 100 steps and 300 after them; here it has 1 throughout (docs/perturbation.md).

    Reference:
        Li, Wang, Li, Huang and Sato, "Spatio-Temporal Perturbations for Video Attribution", IEEE TCSVT (2021), arXiv
        2109.00222; Fong, Patrick and Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth
        Masks", ICCV 2019.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layout: VideoLayout | str | None = None,
        *,
        preset: str | PerturbationConfig = "nested",
    ) -> None:
        super().__init__(forward_func)
        self.layout = layout_of(forward_func, layout)
        if not isinstance(preset, PerturbationConfig):
            check_choice("preset", preset, PRESETS)
        self.preset = preset if isinstance(preset, PerturbationConfig) else PRESETS[preset]

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        *,
        areas: Sequence[float] | float | None = None,
        objective: Aim | None = None,
        scale: Scale | None = None,
        regularizer: str | Regularizer | None = None,
        iterations: int | None = None,
        tolerance: float | None = None,
        init: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attributions of the clip's own shape, spread evenly over channels. None of an option takes the preset's.

        Args:
            inputs: clip, or a tuple of one.
            baselines: what hidden voxels fade to, and to nothing else then: a number, a tensor of the clip's shape or
                with a first axis of 1, one of ``captum_staa.baselines``. None takes what the preset says: by turns
                zero, a blur, the mean frame and shuffled frames, or the paper's blur.
            target: as in Captum; needed where the model has several outputs.
            additional_forward_args: further positional arguments of the model.
            feature_mask: regions that a mask shows or hides as a whole, ids 0 .. n-1 broadcastable to the clip with
                channels alike: ``frames``, ``tubelets`` or ``supervoxels`` of ``captum_staa.feature_masks``. None
                learns a grid of cells.
            perturbations_per_eval: altered copies of the batch per call of the model: of as many areas, once for
                ``"preserve"`` or ``"delete"``, twice for ``"dual"``. Changes memory and speed, no number.
            show_progress: draw a bar of the model's calls, with the score that is kept.
            areas: parts of the volume that masks leave, each in (0, 1).
            objective: ``"preserve"``, ``"delete"`` or ``"dual"``.
            scale: of the objective: ``"odds"``, ``"log_probability"``, ``"margin"`` or ``"logit"``. A model of one
                output always takes ``"logit"``.
            regularizer: ``"tv"``, ``"squared"``, ``"ellipsoid"``, ``"none"``, or one with weights of its own, such as
                ``captum_staa.perturbation.regularizers.TotalVariation(space=1, time=3)``.
            iterations: most steps; 0 hands out the start.
            tolerance: a clip is done once it has not gained more than this for 30 steps.
            init: attributions of another method to begin with: of the clip's shape, or maps ``(B, T, H, W)``.

        Returns:
            Like ``inputs`` (float32 where it is of half precision), not negative; the sum over a clip is 1, or 0 where
            the masks came to show nothing, as the papers' may for large cells. Contiguous, detached. The same call
            gives the same numbers: nothing is drawn at random.

        Raises:
            ValueError: no gradient leads to the clip, an option out of range, a missing target, nan, shapes that do
                not fit, ``torch.inference_mode()``.
            TypeError: an argument of the wrong type, or an unknown one.

        Warns:
            UserWarning: Ctrl-C, or nan from the model for some clip after the first step; the best masks until then
                are returned, and the other clips go on.
        """
        parts = self.attribute_maps(
            inputs,
            baselines,
            target,
            additional_forward_args,
            feature_mask,
            perturbations_per_eval,
            show_progress,
            areas=areas,
            objective=objective,
            scale=scale,
            regularizer=regularizer,
            iterations=iterations,
            tolerance=tolerance,
            init=init,
        )
        clip = one_clip(inputs, self.layout, self.get_name())
        return _format_output(_is_tuple(inputs), (self.layout.expand(parts.joint, clip),))

    def attribute_maps(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        baselines: BaselineType = None,
        target: TargetType = None,
        additional_forward_args: object = None,
        feature_mask: Tensor | None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        *,
        areas: Sequence[float] | float | None = None,
        objective: Aim | None = None,
        scale: Scale | None = None,
        regularizer: str | Regularizer | None = None,
        iterations: int | None = None,
        tolerance: float | None = None,
        init: Tensor | None = None,
    ) -> MaskAttribution:
        """The map with its parts, the masks of each area, and how learning went.

        Args:
            inputs: this, and all else, as for :meth:`attribute`.

        Returns:
            :class:`MaskAttribution`.

        Raises:
            ValueError, TypeError: as for :meth:`attribute`.
        """
        refuse_inference_mode(self.get_name())
        clip = one_clip(inputs, self.layout, self.get_name()).detach()
        preset = self.preset.changed(
            areas=areas, aim=objective, scale=scale, regularizer=regularizer, iterations=iterations, tolerance=tolerance
        )
        check_perturbations_per_eval(perturbations_per_eval)
        wide = clip.new_empty(0, dtype=torch.promote_types(clip.dtype, torch.float32))
        field = self._field(clip, preset, feature_mask, wide)
        start = None if init is None else field.gather(maps_of(init, clip, self.layout).to(wide))
        blends = self._blends(clip, preset, baselines)
        frozen = frozen_parameters(self.forward_func) if isinstance(self.forward_func, nn.Module) else nullcontext()
        with frozen, torch.enable_grad():
            score, whole, aim = self._score(clip, target, additional_forward_args, preset.objective)
            task = Task(
                score=score,
                blends=blends,
                field=field,
                parametrization=preset.parametrization,
                objective=aim,
                regularizer=preset.regularizer,
                areas=torch.tensor(preset.areas).to(wide),
                batch=len(clip),
                perturbations_per_eval=int(perturbations_per_eval),
                tick=lambda: bar.update(),
            )
            count = 1 + task.calls(preset.iterations, init is not None)
            with call_bar(self.get_name(), count, show_progress) as bar:
                bar.update()  # the whole clip
                learned = learn(task, start, preset.iterations, preset.tolerance, _shown(bar, aim))
        return result_of(task, learned, whole, preset.blur)

    def attribute_future(self) -> NoReturn:
        """Not offered: Captum's futures are for remote models."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    @classmethod
    def get_name(cls) -> str:
        """``"Spatio-temporal perturbation"``; Captum would leave the hyphen out."""
        return "Spatio-temporal perturbation"

    # --- what a call needs --------------------------------------------------------------------------------------

    def _field(self, clip: Tensor, preset: PerturbationConfig, feature_mask: Tensor | None, like: Tensor) -> Field:
        size = self.layout.extent(clip)
        if feature_mask is not None:
            if preset.parametrization.per_frame:
                raise ValueError(
                    f"the preset asks for the same area in every frame, but regions of a feature_mask of shape "
                    f"{tuple(feature_mask.shape)} may span frames; leave the mask out, or take preset='3d-ep'"
                )
            return RegionField(units_for(clip, feature_mask, self.layout), like)
        cells = (-(-size[0] // preset.frames), min(size[1], preset.across), min(size[2], preset.across))
        return GridField(size, cells, like)

    def _blends(self, clip: Tensor, preset: PerturbationConfig, baselines: BaselineType) -> list[BlurPyramid]:
        (baseline,) = baselines_for((clip,), baselines)
        names = preset.blends if baselines is None else ("fade",)
        if self.layout.size(clip)["T"] == 1:  # nothing can be hidden by other frames
            names = tuple(name for name in names if name not in OF_SEVERAL_FRAMES) or ("fade",)
        return [blend_of(name, clip, self.layout, baseline, preset.levels) for name in names]

    def _score(
        self, clip: Tensor, target: TargetType, additional_forward_args: object, objective: Objective
    ) -> tuple[TargetScore, Tensor, Objective]:
        """The score of altered clips, that of the whole one ``(B,)``, and the objective that fits the model."""
        function, batch = self.forward_func, len(clip)
        extra = _format_additional_forward_args(additional_forward_args)
        with torch.no_grad():
            answer = _run_forward(function, clip.clone(), None, extra)
            if isinstance(answer, Tensor) and answer.numel() == batch:  # one output, which is no class among others
                objective = replace(objective, scale="logit")
            if objective.scale != "logit":
                way_out = "pass scale='logit' to take the target's output as it is"
                function = over_classes(function, lambda logits: logits.log_softmax(1), way_out)
                answer = over_classes(lambda known: known, lambda logits: logits.log_softmax(1), way_out)(answer)
            (whole,) = TargetScore(lambda known: known, target, None, batch)((answer,))
        return TargetScore(function, target, additional_forward_args, batch), whole, objective


def _shown(bar: Any, objective: Objective) -> Callable[[Check], None]:
    """Writes on a bar what the best masks keep, as a mean over clips and areas."""

    def show(best: Check) -> None:
        if hasattr(bar, "set_postfix_str"):  # Captum's own bar, where tqdm is missing, has none
            kept, deleted = (probability(objective)(part).mean() for part in (best.kept, best.deleted))
            bar.set_postfix_str(f"kept {kept:.3f}, left {deleted:.3f}")

    return show
