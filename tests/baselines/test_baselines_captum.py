"""Captum's and our methods accept every baseline, and baselines remove the documented evidence from trained models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    GradientShap,
    IntegratedGradients,
    KernelShap,
    Lime,
    Occlusion,
    ShapleyValueSampling,
)
from covering import in_one_case
from torch import Tensor, nn

from captum_staa import VideoClassifier, VideoFeatureAblation, VideoOcclusion, baselines
from captum_staa.benchmark import PlantedClips

NAMES = ("zero", "mean_frame", "blur", "freeze", "shuffle", "reverse", "noise")
every_baseline = pytest.mark.parametrize("name", NAMES)
SHAPE = (2, 2, 4, 5, 6)  # (B, C, T, H, W)
FRAMES = torch.arange(4).reshape(1, 1, 4, 1, 1).repeat(1, 2, 1, 5, 6)  # a feature mask: one feature per frame


@pytest.fixture(autouse=True)
def _global_draws() -> Iterator[None]:
    """Captum's sampling methods draw from PyTorch's global generator, and so do new layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def cnn(activation: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1), activation, nn.Conv3d(4, 3, 2), activation, nn.Flatten(), nn.LazyLinear(3)
    ).double()


def compared(name: str, model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """A clip, its baseline, and the difference (B,) of the model's outputs for class 1."""
    clip = torch.randn(SHAPE, dtype=torch.float64) + 0.3
    baseline = getattr(baselines, name)(clip, "BCTHW")
    with torch.no_grad():
        difference = (model(clip) - model(baseline))[:, 1]
    assert difference.abs().min() > 1e-3  # otherwise the tests below would be trivial
    return clip, baseline, difference


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:  # ablations are stored in float32
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.captum
@every_baseline
def test_integrated_gradients_are_complete(name):
    clip, baseline, difference = compared(name, model := cnn(nn.Softplus()))
    attributions = IntegratedGradients(model).attribute(clip, baselines=baseline, target=1, n_steps=30)
    close(attributions.flatten(1).sum(1), difference, 1e-8)


@in_one_case()
@every_baseline
def test_ablating_everything_leaves_the_baseline(name):
    clip, baseline, difference = compared(name, model := cnn(nn.ReLU()))
    expected = difference.reshape(2, 1, 1, 1, 1).expand(SHAPE)
    whole = torch.zeros(1, *SHAPE[1:], dtype=torch.long)
    for method in (FeatureAblation(model), VideoFeatureAblation(model)):
        close(method.attribute(clip, baselines=baseline, target=1, feature_mask=whole), expected)
    for method, window in ((Occlusion(model), SHAPE[1:]), (VideoOcclusion(model, "BCTHW"), SHAPE[2:])):
        close(method.attribute(clip, window, baselines=baseline, target=1), expected)


@pytest.mark.captum
@every_baseline
def test_ablating_one_frame_inserts_the_frame_of_the_baseline(name):
    clip, baseline, _ = compared(name, model := cnn(nn.ReLU()))
    found = FeatureAblation(model).attribute(clip, baselines=baseline, target=1, feature_mask=FRAMES)
    for t in range(4):
        without = clip.clone()
        without[:, :, t] = baseline[:, :, t]
        with torch.no_grad():
            expected = (model(clip) - model(without))[:, 1]
        close(found[:, :, t], expected.reshape(2, 1, 1, 1).expand(2, 2, 5, 6))


@pytest.mark.captum
@every_baseline
def test_shapley_values_sum_to_the_difference(name):
    clip, baseline, difference = compared(name, model := cnn(nn.ReLU()))
    shares = ShapleyValueSampling(model).attribute(clip, baselines=baseline, target=1, feature_mask=FRAMES, n_samples=2)
    close(shares[:, 0, :, 0, 0].sum(1), difference)


@pytest.mark.captum
@every_baseline
def test_lime_and_kernel_shap_sum_to_the_difference_for_linear_models(name):
    """Exact for linear models: each frame's coefficient is its contribution."""
    pytest.importorskip("sklearn")
    from captum._utils.models.linear_model import SkLearnLinearRegression

    clip, baseline, difference = compared(name, model := cnn(nn.Identity()))
    options = {"target": 1, "feature_mask": FRAMES, "n_samples": 60}
    for method in (KernelShap(model), Lime(model, interpretable_model=SkLearnLinearRegression())):
        for i in range(2):
            found = method.attribute(clip[i : i + 1], baselines=baseline[i : i + 1], **options)
            close(found[0, 0, :, 0, 0].sum(), difference[i], 1e-3)  # Captum solves in float32


@pytest.mark.captum
@every_baseline
def test_gradient_shap_takes_several_baselines(name):
    """Exact for linear models: the mean over the drawn baselines of this clip."""
    model = cnn(nn.Identity())
    clip, _, _ = compared(name, model)
    clip, generator = clip[:1], torch.Generator().manual_seed(1)
    random = {"generator": generator} if name in ("shuffle", "noise") else {}
    several = torch.cat([getattr(baselines, name)(clip, "BCTHW", **random) for _ in range(3)])
    found = GradientShap(model).attribute(clip, baselines=several, target=1, n_samples=30).sum()
    with torch.no_grad():
        each = (model(clip) - model(several))[:, 1]
    assert each.min() - 1e-9 <= found <= each.max() + 1e-9
    assert (len({round(float(value), 9) for value in each}) > 1) == bool(random)


# --- trained models, on clips with planted evidence ------------------------------------------------------------------

COUNT = 48
CHANCE = 3 * (0.25 / COUNT) ** 0.5  # three standard errors of the accuracy of random guesses
families = pytest.mark.parametrize(
    "family",
    ["videomae", "resnet3d", *(pytest.param(f, marks=pytest.mark.slow) for f in ("timesformer", "vivit", "vjepa2"))],
)


def accuracies(family: str, task: str, *names: str) -> dict[str, float]:
    """Accuracy for the clips and for the named baselines of them."""
    clf = VideoClassifier.from_pretrained(f"tiny-{family}-{task}")
    clips, labels, truth = PlantedClips(seed=31_000, n=COUNT, task=task)[:]
    clips = clf.layout.from_working(clips)
    variants = {"clean": clips, **{name: getattr(baselines, name)(clips, clf.layout) for name in names}}
    seen = truth.flatten(2).any(2).int().argmax(1).tolist()  # the first frame with evidence
    variants["freeze seen"] = torch.cat(
        [baselines.freeze(clips[i : i + 1], clf.layout, frame=frame) for i, frame in enumerate(seen)]
    )
    with torch.no_grad():
        return {name: float((clf(own).argmax(1) == labels).float().mean()) for name, own in variants.items()}


@families
def test_motion_models_are_at_chance_without_motion_and_wrong_in_reverse(family):
    found = accuracies(family, "motion", "freeze", "shuffle", "mean_frame", "reverse")
    assert found["clean"] >= 0.85
    for name in ("freeze", "freeze seen", "shuffle", "mean_frame"):
        assert abs(found[name] - 0.5) <= CHANCE, name
    assert found["reverse"] <= 0.15  # a motion to the left becomes a motion to the right


@families
def test_pattern_models_work_without_motion_but_not_without_detail(family):
    found = accuracies(family, "pattern", "shuffle", "reverse", "blur")
    assert found["clean"] >= 0.85
    # Reversed time keeps all pairs of neighboring frames. Shuffled time mixes different phases of the objects.
    assert found["reverse"] >= found["clean"] - 0.06
    assert found["shuffle"] >= 0.7
    assert found["freeze seen"] >= 0.7  # static clips are out of the training distribution
    assert found["blur"] <= 1 / 3 + CHANCE


@families
@pytest.mark.slow
@pytest.mark.parametrize("task", ["pattern", "motion", "order"])
def test_models_are_at_chance_for_zero_and_noise(family, task):
    found = accuracies(family, task, "zero", "noise")
    for name in ("zero", "noise"):
        assert abs(found[name] - (0.25 if task == "pattern" else 0.5)) <= CHANCE, (task, name)
