"""Spatio-temporal perturbation: learn masks of the parts of a clip that determine the model's prediction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor, nn

from captum_staa._utils import notebook
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
from captum_staa._utils.model_state import frozen_parameters, in_eval_mode
from captum_staa._utils.networks import lost_gradient
from captum_staa._utils.tensors import short_repr
from captum_staa.attr._base import VideoMethod, call_bar, one_clip, refuse_inference_mode
from captum_staa.layout import VideoLayout, layout_of
from captum_staa.masking.arguments import (
    TargetScore,
    baselines_for,
    check_perturbations_per_eval,
    units_for,
)
from captum_staa.models.outputs import kind_of, minus_other
from captum_staa.perturbation.blends import blends_of
from captum_staa.perturbation.config import PRESETS, Objective, PerturbationConfig, Regularizer, Scale
from captum_staa.perturbation.learning import Evaluation, NoGradientError, OptimizationState, Problem, learn
from captum_staa.perturbation.mask_grid import CellGrid, MaskGrid, RegionGrid
from captum_staa.result import VideoAttribution, maps_of

FEWEST_SLICES = 8  # cells along time of a short clip, if it has as many frames


class History(NamedTuple):
    """Energies and scores of the masks at the requested areas, at each evaluation during the optimization.

    Attributes:
        steps: ``(S,)`` int64, number of steps before each evaluation.
        energy: ``(S, B)``, the minimized quantity: the mean over areas of loss, regularizer and area penalty, with the
            penalty's weight at the first step.
        kept: ``(S, B, A)``, as in :class:`MaskAttribution`.
        removed: ``(S, B, A)``, as in :class:`MaskAttribution`.
    """

    steps: Tensor
    energy: Tensor
    kept: Tensor
    removed: Tensor


@dataclass(frozen=True, kw_only=True)
class MaskAttribution(VideoAttribution):
    """Attribution by learned masks: the map, the mask of each area, its scores, and the history of the optimization.

    A score is the target's probability, in [0, 1]; or its output, if the scale of the options is ``"logit"`` or the
    model has no probabilities. Scores of masks are means over the blends with all baselines: means of the log odds, if
    they are probabilities.

    Attributes:
        joint: ``(B, T, H, W)``, not negative. The sum over a clip is 1, or 0 if no mask keeps anything.
        spatial: ``(B, H, W)``, the sum of ``joint`` over frames.
        temporal: ``(B, T)``, the sum of ``joint`` over the pixels of each frame.
        logits: None.
        masks: ``(B, A, T, H, W)`` in [0, 1], one per area; 1 keeps a voxel, 0 removes it.
        areas: ``(A,)``, the requested areas: fractions of the clip's volume, in (0, 1).
        visible: ``(B, A)`` in [0, 1], the fraction of the clip's volume that each mask keeps: its mean.
        whole: ``(B,)``, the score of the unperturbed clip.
        kept: ``(B, A)``, the score if only what the mask selects is kept.
        removed: ``(B, A)``, the score if what the mask selects is removed.
        history: energies and scores during the optimization, every ten steps.
        interrupted: whether a KeyboardInterrupt (Ctrl-C) ended the optimization early.
    """

    masks: Tensor
    areas: Tensor
    visible: Tensor
    whole: Tensor
    kept: Tensor
    removed: Tensor
    history: History
    interrupted: bool

    __repr__ = short_repr

    def _repr_html_(self) -> str:
        means = [values.nanmean(0).tolist() for values in (self.visible, self.kept, self.removed)]
        learned = notebook.table(
            ("area", "visible", "kept", "removed"), list(zip(self.areas.tolist(), *means, strict=True))
        )
        energies = list(zip(self.history.steps.tolist(), self.history.energy.nanmean(1).tolist(), strict=True))
        whole = notebook.number(float(self.whole.nanmean()))
        title = f"masks, means over clips; the score of the unperturbed clip is {whole}"
        title += "; interrupted early" if self.interrupted else ""
        more = notebook.block(title, learned, notebook.curves({"energy": energies}, "step", "minimized energy"))
        return f"<div>{super()._repr_html_()}{more}</div>"


class SpatioTemporalPerturbation(VideoMethod, PerturbationAttribution):
    """Attribution by learned masks: the parts of a clip, in space and time, that determine the model's score.

    Each mask keeps a given fraction of the clip's volume and removes the rest. The masks are learned by gradient
    descent on the model's score, so that what they select is sufficient for the score, necessary for it, or both. The
    model must be differentiable.

    The mask of ``"nested"`` is a grid of square cells: 16 along the shorter side of a frame, and 2 frames long. Clips
    of fewer than 16 frames have 8 cells along time, or one per frame. So the resolution in time does not depend on the
    length of the clip, and long clips can name a frame.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> clip = clf.layout.from_working(clip)  # the 3D network takes (B, C, T, H, W)
        >>> parts = SpatioTemporalPerturbation(clf).attribute_maps(clip, target=label, perturbations_per_eval=8)
        >>> parts.masks.shape, bool((parts.visible[0] - parts.areas).abs().max() < 1e-3)
        (torch.Size([1, 4, 16, 48, 48]), True)
        >>> kept, removed = parts.kept[0, 0], parts.removed[0, 0]  # scores of the smallest area
        >>> parts.joint.shape
        torch.Size([1, 16, 48, 48])

    Args:
        forward_func: a :class:`VideoClassifier`, or any differentiable function that takes a clip and returns one row
            of outputs per example.
        layout: order of the clip's axes, such as ``"BCTHW"``. Optional for a :class:`VideoClassifier`, which has its
            own layout.
        preset: name of a preset, or a :class:`captum_staa.perturbation.PerturbationConfig`, such as
            ``PRESETS["nested"].changed(scale="logit")``.

            - ``"nested"``, 249 forward passes per clip: this library's own. One score per cell, whose thresholds give
              the masks of all areas. What the masks select is both sufficient and necessary.
            - ``"step"``, 15370 forward passes: the method of the STEP paper. One mask per area, which preserves the
              prediction, with the ellipsoid regularizer.
            - ``"3d-ep"``, 15370 forward passes: the same without the regularizer. Extremal Perturbation with areas over
              the volume.
            - ``"2d-ep"``, 15370 forward passes: Extremal Perturbation with areas in each frame.

            A backward pass counts as two forward passes. ``PRESETS[name].changed(...).forwards()`` returns the cost of
            other options. The progress bar shows it, too.

    Raises:
        ValueError: The layout is missing or differs from the classifier's layout, or the preset is unknown.

    Note:
        The papers expand the values of cells by a smooth maximum over neighbors, and also learn cells outside the
        frame. Here the values are interpolated linearly, so the areas refer to the visible volume
        (docs/perturbation.md).

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
        objective: Objective | None = None,
        regularizer: str | Regularizer | None = None,
        iterations: int | None = None,
        init: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the clip's shape, equal in all channels.

        ``areas``, ``objective``, ``regularizer`` and ``iterations`` replace the field of this name in the preset for
        this call. None means as the preset says. Other fields are set by ``preset=`` of the class.

        Args:
            inputs: clip, or a tuple of one clip.
            baselines: replaces removed voxels, in place of the preset's blends: a number, or a tensor of the clip's
                shape or with a first axis of size 1, such as those of ``captum_staa.baselines``.
            target: as in Captum, or a label that the classifier knows. Required if the model has several outputs.
            additional_forward_args: further positional arguments of the model.
            feature_mask: regions that a mask keeps or removes as a whole: ids 0 .. n-1, broadcastable to the clip, the
                same for all channels, such as ``frames``, ``tubelets`` or ``supervoxels`` of
                ``captum_staa.feature_masks``. None learns a grid of cells.
            perturbations_per_eval: perturbations of the batch per call of the model. A step of ``"nested"`` needs one
                if the objective is ``"preserve"`` or ``"delete"``, and two if it is ``"dual"``; those of the papers
                need as many per area. It changes memory and speed, not the result.
            show_progress: if True, show a progress bar of the model's calls, with the cost in forward passes and the
                scores of the best masks.
            areas: fractions of the clip's volume that the masks keep, in (0, 1).
            objective: ``"preserve"``, ``"delete"`` or ``"dual"``.
            regularizer: ``"tv"``, ``"squared"``, ``"ellipsoid"`` or ``"none"``; or an instance with other weights, such
                as ``captum_staa.perturbation.TotalVariation(space=1, time=3)``.
            iterations: number of steps. 0 returns the initial masks.
            init: attributions of another method to start from, of the clip's shape or as maps ``(B, T, H, W)``. They
                should be signed: magnitudes mark evidence for any class. Without it, ``"nested"`` starts from the mean
                gradient at 20 random masks, and from 27 windows that are removed and kept, which costs 114 forward
                passes.

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
            regularizer=regularizer,
            iterations=iterations,
            init=init,
        )
        attributions = self.layout.expand(parts.joint, one_clip(inputs, self.layout, self.get_name()))
        return _format_output(_is_tuple(inputs), (attributions,))

    @in_eval_mode
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
        objective: Objective | None = None,
        regularizer: str | Regularizer | None = None,
        iterations: int | None = None,
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
        inputs = one_clip(inputs, self.layout, self.get_name()).detach()
        config = self.preset.changed(areas=areas, objective=objective, regularizer=regularizer, iterations=iterations)
        check_perturbations_per_eval(perturbations_per_eval)
        wide = inputs.new_empty(0, dtype=torch.promote_types(inputs.dtype, torch.float32))
        # the axes are converted here; from now on they are (B, T, C, H, W), and (B, T, H, W) for regions and maps
        regions = None if feature_mask is None else units_for(inputs, feature_mask, self.layout)
        start = None if init is None else maps_of(init, inputs, self.layout).to(wide)
        baseline = None if baselines is None else self.layout.to_working(baselines_for((inputs,), baselines)[0])
        forward_func = self.layout.forward_from_working(self.forward_func)
        inputs = self.layout.to_working(inputs)
        grid = _grid(inputs, config, regions, wide)
        start = None if start is None else grid.gather(start)
        blends = blends_of(config.blends, inputs, baseline)
        frozen = frozen_parameters(self.forward_func) if isinstance(self.forward_func, nn.Module) else nullcontext()
        with frozen, torch.enable_grad():
            score, whole, scale = _score(
                self.forward_func, forward_func, inputs, target, additional_forward_args, config.scale
            )
            problem = Problem(
                config=replace(config, scale=scale),
                score=score,
                blends=blends,
                grid=grid,
                areas=torch.tensor(config.areas).to(wide),
                batch=len(inputs),
                perturbations_per_eval=int(perturbations_per_eval),
                tick=lambda: bar.update(),
            )
            count = 1 + problem.calls(init is not None)
            with call_bar(self.get_name(), count, show_progress) as bar:
                bar.update()  # for the unperturbed clip
                try:
                    cost = config.forwards(len(blends), init is not None)
                    learned = learn(problem, start, _progress(bar, scale, cost))
                except NoGradientError as error:
                    leaf = inputs.clone().requires_grad_()
                    extra = _format_additional_forward_args(additional_forward_args)
                    where = lost_gradient(self.forward_func, lambda: _run_forward(forward_func, leaf, target, extra))
                    raise ValueError(f"{error} {where}".rstrip()) from None
        return _result(problem, learned, whole)

    def get_name(self) -> str:
        """Return the name of the method: ``"STEP"`` only for the preset of the paper.

        The names are ``"STEP"``, ``"STEP (nested)"``, ``"Extremal perturbation (3D)"`` and ``"Extremal perturbation
        (2D)"`` for the presets, and ``"STEP (custom)"`` for other options. Captum's default is the class name.
        """
        return self.preset.name


# --- parts of the optimization problem, and its result: all clips are (B, T, C, H, W) ---------------------------------


def _grid(inputs: Tensor, config: PerturbationConfig, regions: Tensor | None, like: Tensor) -> MaskGrid:
    """Return the grid of the regions ``(1 or B, T, H, W)`` int64, or a grid of equal cells if there are none."""
    frames, _, height, width = inputs.shape[1:]
    if regions is None:
        length, across = config.cells
        slices = min(frames, max(FEWEST_SLICES, -(-frames // length)))
        side = max(1.0, min(height, width) / across)
        return CellGrid((frames, height, width), (slices, round(height / side), round(width / side)), like)
    if config.parametrization.per_frame:
        raise ValueError(
            f"feature_mask must be None for a preset that requires the same area in every frame, because regions may "
            f"span frames, got a mask of {int(regions.max()) + 1} regions. Omit the mask, or use preset='3d-ep'."
        )
    return RegionGrid(regions, like)


def _score(
    model: object,
    forward_func: Callable[..., Any],
    inputs: Tensor,
    target: TargetType,
    additional_forward_args: object,
    scale: Scale,
) -> tuple[TargetScore, Tensor, Scale]:
    """Return the score of perturbed clips, the scores ``(B,)`` of the inputs, and the scale for this model."""
    extra = _format_additional_forward_args(additional_forward_args)
    with torch.no_grad():
        outputs = _run_forward(forward_func, inputs.clone(), None, extra)
        if isinstance(outputs, Tensor) and kind_of(model, outputs) == "score":
            scale = "logit"
        convert = (lambda outputs: outputs) if scale == "logit" else _log_odds(model)
        (whole,) = TargetScore(convert, target, None, len(inputs))((outputs,))
    score = TargetScore(lambda *args: convert(forward_func(*args)), target, additional_forward_args, len(inputs))
    return score, whole, scale


def _log_odds(model: object) -> Callable[[Any], Any]:
    """Return the function that returns the log odds of each class or label from outputs of the model.

    Their gradient does not vanish where the model is certain, as that of a probability does.
    """

    def convert(outputs: Any) -> Any:
        if not isinstance(outputs, Tensor):  # TargetScore raises an error for it
            return outputs
        try:
            return minus_other(outputs, kind_of(model, outputs), "rest", getattr(model, "num_classes", None))
        except ValueError as error:
            fix = "Or use the target's output directly: preset=PRESETS['nested'].changed(scale='logit')."
            raise ValueError(f"{error} {fix}") from None

    return convert


def _progress(bar: Any, scale: Scale, cost: int) -> Callable[[Evaluation], None]:
    """Return a function that shows the cost and the best scores on a progress bar, as means over clips and areas."""

    def show(best: Evaluation) -> None:
        if hasattr(bar, "set_postfix_str"):  # Captum's fallback bar, without tqdm, does not have it
            kept, removed = (_reported(part, scale).mean() for part in (best.kept, best.removed))
            bar.set_postfix_str(f"{cost} forwards per clip, kept {kept:.3f}, removed {removed:.3f}")

    return show


@torch.no_grad()
def _result(problem: Problem, learned: OptimizationState, whole: Tensor) -> MaskAttribution:
    """Return the result for the best state of the optimization; ``whole`` are the scores ``(B,)`` of the inputs."""
    config, grid = problem.config, problem.grid
    masks = grid.spread(config.parametrization.final(learned.values, grid, problem.areas))
    joint = config.parametrization.combined(learned.values, grid, problem.areas)
    total = joint.sum((1, 2, 3), keepdim=True)
    parts = VideoAttribution.from_joint(joint / total.clamp_min(torch.finfo(joint.dtype).tiny))
    steps, energy, *scores = zip(*learned.evaluations, strict=True)
    kept, removed = (_reported(torch.stack(part), config.scale) for part in scores)
    return MaskAttribution(
        joint=parts.joint,
        spatial=parts.spatial,
        temporal=parts.temporal,
        masks=masks,
        areas=problem.areas,
        visible=masks.mean((2, 3, 4)),
        whole=_reported(whole, config.scale),
        kept=_reported(learned.best.kept, config.scale),
        removed=_reported(learned.best.removed, config.scale),
        history=History(torch.tensor(steps), torch.stack(energy), kept, removed),
        interrupted=learned.interrupted,
    )


def _reported(scores: Tensor, scale: Scale) -> Tensor:
    """Return log odds as probabilities, and outputs of the scale ``"logit"`` unchanged."""
    return scores if scale == "logit" else scores.sigmoid()
