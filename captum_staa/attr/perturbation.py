"""Spatio-temporal perturbation: learn masks of the parts of a clip that determine the model's prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

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
from captum_staa.attr._base import VideoMethod, call_bar, one_clip, refuse_inference_mode
from captum_staa.attr._hiding import OF_SEVERAL_FRAMES, blend_of
from captum_staa.attr._perturbation_result import MaskAttribution, probability, result_of
from captum_staa.layout import VideoLayout
from captum_staa.masking.arguments import baselines_for, check_perturbations_per_eval, units_for
from captum_staa.masking.scores import TargetScore, over_classes
from captum_staa.models.layouts import layout_of
from captum_staa.perturbation.blends import BlurPyramid
from captum_staa.perturbation.learning import Evaluation, Problem, learn
from captum_staa.perturbation.mask_grid import CellGrid, MaskGrid, RegionGrid
from captum_staa.perturbation.objective import Aim, Objective, Scale
from captum_staa.perturbation.presets import PRESETS, PerturbationConfig
from captum_staa.perturbation.regularizers import Regularizer
from captum_staa.result import maps_of


class SpatioTemporalPerturbation(VideoMethod, PerturbationAttribution):
    """Attribution by learned masks: the parts of a clip, in space and time, that determine the model's score.

    Each mask keeps a given fraction of the clip's volume and removes the rest. The masks are learned by gradient
    descent on the model's score, so that what they select is sufficient for the score, necessary for it, or both. The
    model must be differentiable.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> clip = clf.layout.from_working(clip)  # the 3D network takes (B, C, T, H, W)
        >>> parts = SpatioTemporalPerturbation(clf).attribute_maps(clip, target=label, perturbations_per_eval=8)
        >>> parts.masks.shape, bool((parts.visible[0] - parts.areas).abs().max() < 1e-3)
        (torch.Size([1, 4, 16, 48, 48]), True)
        >>> kept, deleted = parts.kept[0, 0], parts.deleted[0, 0]  # scores of the smallest area
        >>> parts.joint.shape
        torch.Size([1, 16, 48, 48])

    Args:
        forward_func: a :class:`VideoClassifier`, or any differentiable function that takes a clip and returns one row
            of outputs per example.
        layout: order of the clip's axes, such as ``"BCTHW"``. Optional for a :class:`VideoClassifier`, which has its
            own layout.
        preset: name of a preset, or a :class:`captum_staa.perturbation.presets.PerturbationConfig`.

            - ``"nested"``: one score per cell, whose thresholds give the masks of all areas. Objective ``"dual"``.
            - ``"step"``: the method of the STEP paper. One mask per area, objective ``"preserve"``, with the ellipsoid
              regularizer.
            - ``"3d-ep"``: the same without the regularizer: Extremal Perturbation with areas over the volume.
            - ``"2d-ep"``: Extremal Perturbation with areas in each frame.

    Raises:
        ValueError: The layout is missing or differs from the classifier's layout, or the preset is unknown.

    Note:
        The papers expand the values of cells by a smooth maximum over neighbors, and also learn cells outside the
        frame. Here the values are interpolated linearly, so the areas refer to the visible volume. The papers'
        regularizer has weight 0 for 100 steps and 300 afterwards. Here its weight is always 1 (docs/perturbation.md).

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
        """Return attributions of the clip's shape, equal in all channels. An option that is None is the preset's.

        Args:
            inputs: clip, or a tuple of one clip.
            baselines: replaces removed voxels, in place of the preset's baselines: a number, or a tensor of the clip's
                shape or with a first axis of size 1, such as those of ``captum_staa.baselines``. None takes the
                preset's: zero, blur, mean frame and shuffled frames in turn for ``"nested"``; blur for the others.
            target: as in Captum. Required if the model has several outputs.
            additional_forward_args: further positional arguments of the model.
            feature_mask: regions that a mask keeps or removes as a whole: ids 0 .. n-1, broadcastable to the clip, the
                same for all channels, such as ``frames``, ``tubelets`` or ``supervoxels`` of
                ``captum_staa.feature_masks``. None learns a grid of cells.
            perturbations_per_eval: perturbed copies of the batch per call of the model. A step needs one copy per area
                for ``"preserve"`` or ``"delete"``, and two for ``"dual"``. It changes memory and speed, not the result.
            show_progress: if True, show a progress bar of the model's calls, with the kept and deleted scores.
            areas: fractions of the clip's volume that the masks keep, in (0, 1).
            objective: ``"preserve"``, ``"delete"`` or ``"dual"``.
            scale: scale of the objective: ``"odds"``, ``"log_probability"``, ``"margin"`` or ``"logit"``. A model with
                one output always uses ``"logit"``.
            regularizer: ``"tv"``, ``"squared"``, ``"ellipsoid"`` or ``"none"``; or an instance with other weights, such
                as ``captum_staa.perturbation.regularizers.TotalVariation(space=1, time=3)``.
            iterations: maximum number of steps. 0 returns the initial masks.
            tolerance: a clip is done if its energy has not decreased by more than this within 30 steps.
            init: attributions of another method to start from, of the clip's shape or as maps ``(B, T, H, W)``.

        Returns:
            Attributions like ``inputs`` (float32 for half precision), not negative, contiguous and detached. The sum
            over a clip is 1, or 0 if no mask keeps anything, which can happen with the papers' presets and large cells.
            The result is deterministic.

        Raises:
            ValueError: The model's output has no gradient with respect to the clip, an option is out of range, the
                target is missing, the clip contains nan, shapes do not fit, or ``torch.inference_mode()`` is on.
            TypeError: An argument has the wrong type or is unknown.

        Warns:
            UserWarning: After Ctrl-C, or if the model returns nan for a clip after the first step. The best masks until
                then are returned. The optimization continues for the other clips.
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
        """Return the map, its spatial and temporal parts, the masks of each area, and the history of the optimization.

        The arguments are those of :meth:`attribute`.

        Returns:
            :class:`MaskAttribution`.

        Raises:
            ValueError, TypeError: As for :meth:`attribute`.
        """
        refuse_inference_mode(self.get_name())
        clip = one_clip(inputs, self.layout, self.get_name()).detach()
        preset = self.preset.changed(
            areas=areas, aim=objective, scale=scale, regularizer=regularizer, iterations=iterations, tolerance=tolerance
        )
        check_perturbations_per_eval(perturbations_per_eval)
        wide = clip.new_empty(0, dtype=torch.promote_types(clip.dtype, torch.float32))
        grid = self._grid(clip, preset, feature_mask, wide)
        start = None if init is None else grid.gather(maps_of(init, clip, self.layout).to(wide))
        blends = self._blends(clip, preset, baselines)
        frozen = frozen_parameters(self.forward_func) if isinstance(self.forward_func, nn.Module) else nullcontext()
        with frozen, torch.enable_grad():
            score, whole, adapted = self._score(clip, target, additional_forward_args, preset.objective)
            problem = Problem(
                score=score,
                blends=blends,
                grid=grid,
                parametrization=preset.parametrization,
                objective=adapted,
                regularizer=preset.regularizer,
                areas=torch.tensor(preset.areas).to(wide),
                batch=len(clip),
                perturbations_per_eval=int(perturbations_per_eval),
                tick=lambda: bar.update(),
            )
            count = 1 + problem.calls(preset.iterations, init is not None)
            with call_bar(self.get_name(), count, show_progress) as bar:
                bar.update()  # for the unperturbed clip
                learned = learn(problem, start, preset.iterations, preset.tolerance, _progress(bar, adapted))
        return result_of(problem, learned, whole, preset.blur)

    @classmethod
    def get_name(cls) -> str:
        """Return ``"Spatio-temporal perturbation"``. Captum's default would omit the hyphen."""
        return "Spatio-temporal perturbation"

    # --- parts of the optimization problem ----------------------------------------------------------------------

    def _grid(self, clip: Tensor, preset: PerturbationConfig, feature_mask: Tensor | None, like: Tensor) -> MaskGrid:
        size = self.layout.extent(clip)
        if feature_mask is not None:
            if preset.parametrization.per_frame:
                raise ValueError(
                    f"feature_mask must be None for a preset that requires the same area in every frame, because "
                    f"regions may span frames, got a mask of shape {tuple(feature_mask.shape)}. Omit the mask, or use "
                    f"preset='3d-ep'."
                )
            return RegionGrid(units_for(clip, feature_mask, self.layout), like)
        cells = (-(-size[0] // preset.frames), min(size[1], preset.across), min(size[2], preset.across))
        return CellGrid(size, cells, like)

    def _blends(self, clip: Tensor, preset: PerturbationConfig, baselines: BaselineType) -> list[BlurPyramid]:
        (baseline,) = baselines_for((clip,), baselines)
        names = preset.blends if baselines is None else ("fade",)
        if self.layout.size(clip)["T"] == 1:  # there are no other frames to use as a baseline
            names = tuple(name for name in names if name not in OF_SEVERAL_FRAMES) or ("fade",)
        return [blend_of(name, clip, self.layout, baseline, preset.levels) for name in names]

    def _score(
        self, clip: Tensor, target: TargetType, additional_forward_args: object, objective: Objective
    ) -> tuple[TargetScore, Tensor, Objective]:
        """Return the score of perturbed clips, the scores ``(B,)`` of the clips, and the objective for this model."""
        function, batch = self.forward_func, len(clip)
        extra = _format_additional_forward_args(additional_forward_args)
        with torch.no_grad():
            answer = _run_forward(function, clip.clone(), None, extra)
            if isinstance(answer, Tensor) and answer.numel() == batch:  # one output: there are no classes
                objective = replace(objective, scale="logit")
            if objective.scale != "logit":
                fix = "pass scale='logit' to use the target's output directly"
                function = over_classes(function, lambda logits: logits.log_softmax(1), fix)
                answer = over_classes(lambda known: known, lambda logits: logits.log_softmax(1), fix)(answer)
            (whole,) = TargetScore(lambda known: known, target, None, batch)((answer,))
        return TargetScore(function, target, additional_forward_args, batch), whole, objective


def _progress(bar: Any, objective: Objective) -> Callable[[Evaluation], None]:
    """Return a function that shows the best scores on a progress bar, as means over clips and areas."""

    def show(best: Evaluation) -> None:
        if hasattr(bar, "set_postfix_str"):  # Captum's fallback bar, without tqdm, does not have it
            kept, deleted = (probability(objective)(part).mean() for part in (best.kept, best.deleted))
            bar.set_postfix_str(f"kept {kept:.3f}, left {deleted:.3f}")

    return show
