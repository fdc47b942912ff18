"""SpatioTemporalPerturbation: planted evidence, areas, best state, interruption, errors, scores and progress bar."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from covering import in_one_case
from torch import Tensor, nn

from captum_staa import SpatioTemporalPerturbation, VideoClassifier, VideoLayout, baselines, feature_masks
from captum_staa.attr.perturbation import MaskAttribution
from captum_staa.benchmark import PlantedClips
from captum_staa.benchmark.registry import METHODS
from captum_staa.metrics import auroc, deletion, insertion
from captum_staa.perturbation import PRESETS, Ellipsoid, Nested, SquaredDifferences, TotalVariation
from captum_staa.perturbation.config import OBJECTIVES

SIZE = (4, 8, 6)


class Net(nn.Module):
    """A random 3D network of ``(B, 3, T, H, W)``, which applies a function to its logits before it returns them."""

    def __init__(self, then: Callable[[Tensor], Tensor] = lambda logits: logits, outputs: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.Conv3d(3, 6, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool3d(2))
            self.head = nn.Linear(48, outputs)
        self.then = then
        with torch.no_grad():
            self.head.weight.mul_(20)

    def forward(self, clip: Tensor) -> Tensor:
        return self.then(self.head(self.features(clip).flatten(1)))


def on_call(number: int, act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that applies ``act`` to the logits from call ``number`` of the model on."""
    calls = 0

    def then(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return act(logits) if calls >= number else logits

    return then


def interrupt(logits: Tensor) -> Tensor:
    raise KeyboardInterrupt


def clip_of(batch: int = 2, size: tuple[int, int, int] = SIZE) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def strongest_class(model: Callable[[Tensor], Tensor], clip: Tensor) -> Tensor:
    """The classes whose outputs increase most from black clips to these clips."""
    with torch.no_grad():
        return (model(clip) - model(torch.zeros_like(clip))).argmax(1)


def result_of(
    model: nn.Module | None = None,
    clip: Tensor | None = None,
    preset: Any = "nested",
    scale: str | None = None,
    **options: Any,
) -> MaskAttribution:
    """The result of a few steps. ``scale`` is an option of the preset only."""
    if scale is not None:
        preset = (PRESETS[preset] if isinstance(preset, str) else preset).changed(scale=scale)
    options = {"target": 1, "areas": (0.1, 0.3), "iterations": 5, "perturbations_per_eval": 4, **options}
    method = SpatioTemporalPerturbation(Net() if model is None else model, "BCTHW", preset=preset)
    return method.attribute_maps(clip_of() if clip is None else clip, **options)


@pytest.mark.parametrize("kind", ["resnet3d", pytest.param("timesformer", marks=pytest.mark.slow)])
def test_planted_evidence_is_found_and_map_beats_random_and_inverted_maps(kind: str) -> None:
    clf = VideoClassifier.from_pretrained(f"tiny-{kind}-pattern")
    clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
    clip = clf.layout.from_working(clip)
    options: Any = {"target": label, "areas": (0.05, 0.15), "iterations": 16, "perturbations_per_eval": 4}
    parts = SpatioTemporalPerturbation(clf).attribute_maps(clip, **options)
    assert auroc(parts.joint, truth) > 0.9 and auroc(parts.joint, truth, axis="time") > 0.9
    assert (parts.kept > parts.removed + 0.3).all(), "the selection is sufficient and necessary"
    noise = torch.rand(parts.joint.shape, generator=torch.Generator().manual_seed(0))
    options = {"target": label, "layout": clf.layout, "cells": (8, 8, 8), "steps": 12}
    for metric, sign in ((insertion, 1), (deletion, -1)):
        own, *others = (sign * metric(clf, clip, maps, **options).score for maps in (parts.joint, noise, -parts.joint))
        assert all((own > other).all() for other in others), metric


def test_voxels_equal_to_the_baseline_get_almost_no_attribution() -> None:
    """The clip is black except for a gray patch in two frames. The model is a CNN and an LSTM."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cnn = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        lstm, head = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 3)

    def model(clip: Tensor) -> Tensor:
        return 20 * head(lstm(cnn(clip.flatten(0, 1)).unflatten(0, clip.shape[:2]))[0][:, -1])

    clip = torch.zeros(1, 6, 3, 12, 12)
    clip[:, 2:4, :, 4:8, :6] = 1
    options: Any = {"baselines": 0, "target": strongest_class(model, clip), "areas": (0.03, 0.06), "iterations": 15}
    parts = SpatioTemporalPerturbation(model, "BTCHW").attribute_maps(clip, **options)
    assert parts.spatial[:, 4:8, :6].sum() > 0.93, "cells are one pixel wide"
    assert parts.temporal[:, 2:4].sum() > 0.95, "and one frame long"


@pytest.mark.parametrize("iterations", [0, 1, 5])
def test_nested_masks_have_exact_areas_and_are_nested(iterations: int) -> None:
    parts = result_of(iterations=iterations, areas=(0.05, 0.3, 0.6))
    assert (parts.visible - parts.areas).abs().max() < 1e-4
    torch.testing.assert_close(parts.visible, parts.masks.mean((2, 3, 4)))
    torch.testing.assert_close(parts.areas, torch.tensor([0.05, 0.3, 0.6]))
    assert (parts.masks.diff(dim=1) >= -1e-5).all() and parts.masks.min() >= 0 and parts.masks.max() <= 1


def test_clip_alone_equals_clip_in_a_batch() -> None:
    clip = clip_of(size=(8, 8, 6))
    together, alone = result_of(clip=clip).joint[1:], result_of(clip=clip[1:]).joint
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3 * float(alone.max()))


def test_model_with_one_output_uses_the_logit_scale() -> None:
    parts, other = result_of(Net(outputs=1), target=None), result_of(Net(outputs=1), target=None, scale="logit")
    assert torch.equal(parts.joint, other.joint)
    torch.testing.assert_close(parts.whole, Net(outputs=1)(clip_of())[:, 0].detach())


def test_constant_start_favors_no_frame() -> None:
    """If all frames are equal and the model averages over them, the masks are almost equal in all frames."""
    still, net = clip_of()[:, :, :1].expand(-1, -1, 4, -1, -1), Net()
    method = SpatioTemporalPerturbation(lambda clip: net(clip.mean(2, keepdim=True)), "BCTHW", preset="step")
    masks = method.attribute_maps(still, target=1, areas=(0.3,), regularizer="none", iterations=6).masks
    frames = masks.mean((3, 4))
    assert frames.max() < 0.95 and (frames - frames.mean(2, keepdim=True)).abs().max() < 0.02


def test_separate_masks_converge_to_their_areas() -> None:
    before, after = (result_of(preset="step", iterations=n, areas=(0.2, 0.5)) for n in (2, 60))
    assert ((before.visible - before.areas).abs() > 0.2).all()
    assert ((after.visible - after.areas).abs() < 0.05).all()


@pytest.mark.parametrize("name", ["nested", "2d-ep"])
def test_per_frame_every_frame_has_the_area(name: str) -> None:
    own = replace(PRESETS["nested"], parametrization=Nested(per_frame=True), cells=(1, 16))
    parts = result_of(preset=own if name == "nested" else name, iterations=5 if name == "nested" else 60)
    shown = parts.masks.mean((3, 4)) - parts.areas[:, None]
    assert shown.abs().max() < (1e-4 if name == "nested" else 0.1)
    assert result_of(preset="nested").masks.mean((3, 4)).std() > 0.01, "over the volume, frames differ"


def test_feature_mask_of_frames_keeps_whole_frames() -> None:
    clip = clip_of()
    clip[:, :, [0, 1, 3]] = 0  # all evidence is in one frame
    options: Any = {"baselines": 0, "target": strongest_class(Net(), clip), "areas": (0.25,)}
    parts = result_of(clip=clip, feature_mask=feature_masks.frames(clip, "BCTHW"), **options)
    assert (parts.masks == parts.masks[..., :1, :1]).all()
    assert (parts.temporal.argmax(1) == 2).all() and (parts.masks[:, 0, 2] > 0.8).all()
    assert (parts.visible - 0.25).abs().max() < 1e-4


def test_feature_mask_of_supervoxels_keeps_whole_supervoxels() -> None:
    clip = clip_of(size=(4, 12, 12))
    regions = feature_masks.supervoxels(clip, "BCTHW", 12)
    parts = result_of(clip=clip, feature_mask=regions)
    for masks, ids in zip(parts.masks, regions[:, 0].expand(2, -1, -1, -1), strict=True):
        assert all(masks[:, ids == region].std(1).max() < 1e-6 for region in ids.unique())
    assert parts.masks.std() > 0.1


@pytest.mark.parametrize("preset", ["nested", "step"])
def test_zero_iterations_return_a_map_like_init(preset: str) -> None:
    init = torch.zeros(2, *SIZE)
    init[0, :2, 2:6, 1:4], init[1, 2:, 4:, :3] = 1, 1
    parts = result_of(preset=preset, iterations=0, init=init)
    assert (auroc(parts.joint, init.bool()) > 0.97).all()
    spread = (init / 3)[:, None].expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(result_of(preset=preset, iterations=0, init=spread).joint, parts.joint)
    assert parts.history.steps.tolist() == [0]


@pytest.mark.parametrize("rate", [0.1, 3.0])
def test_best_state_is_returned(rate: float) -> None:
    """Also for steps so large that later states are worse. Each clip has its own best state."""
    own = replace(PRESETS["nested"], parametrization=Nested(path=45 * rate))
    parts = result_of(preset=own, iterations=45, scale="logit", regularizer="tv")
    steps, energy, kept, removed = parts.history
    assert steps.tolist() == [0, 10, 20, 30, 40, 45] and energy.shape == (6, 2) and kept.shape == (6, 2, 2)
    best = energy.argmin(0)
    assert rate < 1 or (best < 5).any(), "no state got worse, so nothing was tested"
    for clip, at in enumerate(best):
        assert torch.equal(parts.kept[clip], kept[at, clip]) and torch.equal(parts.removed[clip], removed[at, clip])
        rough = TotalVariation()(parts.masks[clip : clip + 1], parts.areas)[0]
        torch.testing.assert_close((rough - parts.kept[clip] + parts.removed[clip]).mean(), energy[at, clip])


def calls_until(step: int) -> int:
    """Calls of the model up to this step (at least 10): clip, baselines, gradients, windows, two evaluations, steps."""
    return 1 + 2 + 2 * 3 + 2 * 7 + 2 * 2 + step


BROKEN = {
    "Ctrl-C": (interrupt, r"^interrupted at step 12 of 40. The best masks so far"),
    "nan": (lambda logits: logits * float("nan"), r"for perturbations of clip 0 at step 12.*The best"),
    "infinity": (lambda logits: logits / 0, r"nan or infinity.*at step 12"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_interruption_or_nan_returns_the_best_masks_so_far(how: str) -> None:
    act, message = BROKEN[how]
    model = Net(on_call(calls_until(13), act)).train()
    model.head.bias.requires_grad_(False)
    with pytest.warns(UserWarning, match=message):
        parts = result_of(model, iterations=40, scale="logit")
    steps, energy, kept, _ = result_of(iterations=40, scale="logit").history
    assert parts.history.steps.tolist() == steps[:2].tolist() == [0, 10]
    torch.testing.assert_close(parts.history.energy, energy[:2])
    torch.testing.assert_close(parts.kept, kept[energy[:2].argmin(0), [0, 1]])
    assert parts.joint.isfinite().all() and parts.masks.isfinite().all() and model.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False] and torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    assert parts.interrupted is (how == "Ctrl-C")


@pytest.mark.parametrize("call", [1, 3, 8, 11, 20, 25])
def test_nan_before_the_first_step_raises_value_error(call: int) -> None:
    with pytest.raises(ValueError, match=r"nan or infinity.*before the first step"):
        result_of(Net(on_call(call, lambda logits: logits * float("nan"))))


class NoGrad(Net):
    def forward(self, clip: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(clip)


CUTS = {
    "no_grad": NoGrad(),
    "detach": Net(lambda logits: logits.detach()),
    "detach of a part": Net(lambda logits: logits.detach() + logits.new_zeros(1, requires_grad=True)),
    "argmax": Net(lambda logits: nn.functional.one_hot(logits.argmax(1), 3).float()),
}


@in_one_case()
@pytest.mark.parametrize("preset", ["nested", "step"])
@pytest.mark.parametrize("cut", CUTS)
def test_missing_gradient_raises_value_error_with_causes(cut: str, preset: str) -> None:
    with pytest.raises(ValueError, match=r"must have a gradient.*no_grad.*\.detach\(\).*argmax.*VideoOcclusion"):
        result_of(CUTS[cut], preset=preset)


WRONG = {
    "areas of nothing": ({"areas": (0.0, 0.5)}, r"areas.*\(0, 1\).*got \(0\.0, 0\.5\)"),
    "no areas": ({"areas": ()}, r"areas.*at least one, got \(\)"),
    "an objective": ({"objective": "keep"}, "objective.*'preserve', 'delete', 'dual'.*got 'keep'"),
    "a scale": ({"scale": "probability"}, "scale.*'logit'.*got 'probability'"),
    "a regularizer": ({"regularizer": "soft"}, "regularizer.*'ellipsoid'.*got 'soft'"),
    "fewer steps than none": ({"iterations": -1}, "iterations.*at least 0, got -1"),
    "a map of another clip": ({"init": torch.zeros(2, 4, 8, 5)}, r"\(2, 4, 8, 6\).*\(2, 4, 8, 5\)"),
    "a target": ({"target": 3}, r"target must be a valid index.*\(2, 3\), got 3"),
    "no target": ({"target": None}, r"\(2, 3\), got None. Pass target="),
    "four axes": ({"clip": torch.zeros(3, 4, 8, 6)}, r"\(3, 4, 8, 6\)"),
    "a preset": ({"preset": "nest"}, "preset.*'nested', 'step', '3d-ep', '2d-ep'.*got 'nest'"),
}


@in_one_case()
@pytest.mark.parametrize("kind", WRONG)
def test_invalid_argument_raises_value_error_with_the_value(kind: str) -> None:
    options, message = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        result_of(**options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_attributions_equal_the_map_divided_among_channels(dtype: torch.dtype) -> None:
    model, clip, layout = Net().to(dtype), clip_of().to(dtype), VideoLayout("BCTHW")
    parts = result_of(model, clip)
    method = SpatioTemporalPerturbation(model, layout)
    found = method.attribute(clip, target=1, areas=(0.1, 0.3), iterations=5, perturbations_per_eval=4)
    assert torch.equal(found, layout.expand(parts.joint, clip)) and found.dtype == parts.masks.dtype
    torch.testing.assert_close(parts.joint.sum((1, 2, 3)), torch.ones(2).to(found))
    torch.testing.assert_close(parts.spatial, parts.joint.sum(1))
    torch.testing.assert_close(parts.temporal, parts.joint.sum((2, 3)))
    assert (parts.joint >= 0).all() and (parts.joint.flatten(1).std(1) > 0).all()


@pytest.mark.parametrize("scale", ["odds", "logit"])
def test_scores_equal_those_of_manually_blended_clips(scale: Any) -> None:
    """Means over the blends, of log odds or of outputs."""
    clip, layout, parts = clip_of(), "BCTHW", result_of(scale=scale, target=[2, 0])
    others = [torch.zeros_like(clip), torch.cat([baselines.noise(one, layout) for one in clip[:, None]])]

    def score(clips: Tensor) -> Tensor:
        logits = Net()(clips)
        return (logits if scale == "logit" else logits.softmax(1).logit())[[0, 1], [2, 0]]

    converted = (lambda scores: scores) if scale == "logit" else torch.sigmoid
    with torch.no_grad():
        torch.testing.assert_close(parts.whole, converted(score(clip)))
        for area in range(2):
            mask = parts.masks[:, area, None]
            for found, share in ((parts.kept, mask), (parts.removed, 1 - mask)):
                mean = torch.stack([score(share * clip + (1 - share) * other) for other in others]).mean(0)
                torch.testing.assert_close(found[:, area], converted(mean), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("term", [TotalVariation(5, 5), SquaredDifferences(20, 20), Ellipsoid(3, 0.5, 10)], ids=repr)
def test_regularizers_make_masks_smoother_with_the_same_area(term: Any) -> None:
    rough, smooth = (result_of(iterations=30, regularizer=name) for name in ("none", term))
    torch.testing.assert_close(smooth.visible, rough.visible, rtol=0, atol=1e-3)
    before, after = (term(parts.masks, parts.areas).mean(1) for parts in (rough, smooth))
    assert (after < 0.9 * before).all()


def test_each_objective_improves_its_own_score_most() -> None:
    """ "preserve" has the highest kept score, "delete" the lowest removed score, "dual" the largest difference."""
    preset = replace(PRESETS["nested"], parametrization=Nested(path=2.4))
    runs = [result_of(preset=preset, iterations=30, objective=name, scale="logit") for name in OBJECTIVES]
    kept, removed = (torch.stack([getattr(run, name).mean(1) for run in runs]) for name in ("kept", "removed"))
    for row, wanted in enumerate((kept, -removed, kept - removed)):  # (objectives, B)
        assert (wanted[row] >= wanted.amax(0) - 0.05).all()
    assert kept[0].sum() > kept[1].sum() + 0.1 and removed[0].sum() > removed[1].sum() + 0.1


def test_progress_bar_shows_cost_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    parts = result_of(iterations=10, show_progress=True)
    shown = re.findall(r"(\d+) forwards per clip, kept (\d\.\d{3}), removed (\d\.\d{3})", capsys.readouterr().err)
    cost = PRESETS["nested"].changed(iterations=10, areas=(0.1, 0.3)).forwards()
    assert shown[-1] == (str(cost), f"{parts.kept.mean():.3f}", f"{parts.removed.mean():.3f}")


@pytest.mark.parametrize("preset", PRESETS)
def test_docstring_and_comparison_name_the_cost_of_every_preset(preset: str) -> None:
    """Nobody should have to start an optimization to learn that it takes 15000 forward passes."""
    cost = f"{PRESETS[preset].forwards()} forward passes"
    assert f'``"{preset}"``, {cost}' in (SpatioTemporalPerturbation.__doc__ or "")
    assert METHODS[PRESETS[preset].name].description.endswith(cost)
