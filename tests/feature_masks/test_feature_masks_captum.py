"""Captum's methods with every feature mask, on planted and real clips, equal direct computations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import FeatureAblation, KernelShap, Lime, ShapleyValueSampling
from torch import Tensor, nn

from captum_staa import feature_masks
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.io import read_video

LAYOUT = "BCTHW"
FILES = ("mmaction2_demo_arm_wrestling.mp4", "flipping_a_pancake.mkv")
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "frames": lambda clip: feature_masks.frames(clip, LAYOUT),
    "segments": lambda clip: feature_masks.segments(clip, LAYOUT, 3),
    "grid": lambda clip: feature_masks.grid(clip, LAYOUT, (4, 24, 32)),
    "supervoxels": lambda clip: feature_masks.supervoxels(clip, LAYOUT, 12),
    "flow_tubes": lambda clip: feature_masks.flow_tubes(clip, LAYOUT, 6),
}


def planted() -> Tensor:
    return (
        PlantedClips(seed=5, n=4, task="motion", scene=SceneOptions(num_frames=12))[:2][0][:, ::2]
        .transpose(1, 2)
        .contiguous()
    )


def real(folder: Path) -> Tensor:
    """Two clips of 8 frames of 48 x 64 pixels, ``(2, 3, 8, 48, 64)`` in -1 .. 1."""
    clips = [torch.from_numpy(read_video(folder / name, num_frames=8).frames) for name in FILES]
    small = [F.interpolate(clip.movedim(-1, 1).float(), size=(48, 64), mode="area") for clip in clips]
    return (torch.stack(small).transpose(1, 2) / 127.5 - 1).contiguous()


@pytest.fixture(scope="module", params=["planted", "real"])
def clips(request) -> Tensor:
    return planted() if request.param == "planted" else real(request.getfixturevalue("shared_videos"))


@pytest.fixture(scope="module", params=MASKS)
def case(request, clips) -> tuple[Tensor, Tensor]:
    """A batch of two clips and its mask."""
    return clips, MASKS[request.param](clips)


def cnn() -> nn.Module:
    """A tiny random nonlinear network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv3d(3, 4, 3, stride=(2, 4, 4)), nn.Tanh(), nn.AdaptiveAvgPool3d((2, 2, 2)), nn.Flatten()
        )
        return nn.Sequential(net, nn.Linear(32, 3)).eval()


def per_region(attributions: Tensor, mask: Tensor) -> list[list[float]]:
    """The attribution of each region of each clip. All voxels of a region must have the same value."""
    found = []
    for values, ids in zip(attributions, mask.expand_as(attributions), strict=True):
        regions = [values[ids == i] for i in range(int(ids.max()) + 1)]
        assert all((region == region[0]).all() for region in regions)
        found.append([float(region[0]) for region in regions])
    return found


@pytest.mark.captum
@torch.no_grad()
def test_feature_ablation_equals_the_decrease_without_the_region(case):
    clips, mask = case
    net, target = cnn(), [2, 0]
    found = per_region(FeatureAblation(net).attribute(clips, target=target, feature_mask=mask), mask)
    for clip, ids, label, values in zip(clips, mask.expand_as(clips), target, found, strict=True):
        falls = [
            float(net(clip[None])[0, label] - net(torch.where(ids == i, 0.0, clip)[None])[0, label])
            for i in range(int(ids.max()) + 1)
        ]
        assert values == pytest.approx(falls, abs=1e-6)
        assert max(map(abs, falls)) > 1e-4


@pytest.mark.captum
def test_shapley_values_sum_to_the_difference(case):
    clips, mask = case
    net = cnn()
    torch.manual_seed(0)  # Captum draws permutations from the global generator
    found = per_region(
        ShapleyValueSampling(net).attribute(clips, target=1, feature_mask=mask, n_samples=2, perturbations_per_eval=4),
        mask,
    )
    whole = (net(clips) - net(torch.zeros_like(clips)))[:, 1].tolist()
    assert [sum(values) for values in found] == pytest.approx(whole, abs=1e-5)


@pytest.mark.captum
@pytest.mark.filterwarnings("ignore:You are providing multiple inputs for Lime / Kernel SHAP:UserWarning")
def test_kernel_shap_and_lime_find_the_coefficients_of_a_linear_model(case):
    """The model is a weighted sum of region means. A region's contribution is its weight times its mean."""
    clips, mask = case
    count = int(mask.max()) + 1
    weights = torch.linspace(-2, 3, count)
    ids = mask.expand_as(clips).flatten(1)
    sizes = torch.zeros(2, count).scatter_add_(1, ids, torch.ones(ids.shape)).clamp_min(1)

    def means(x: Tensor, which: int) -> Tensor:
        return torch.zeros(len(x), count).scatter_add_(1, ids[which].expand(len(x), -1), x.flatten(1)) / sizes[which]

    def model(x: Tensor, which: Tensor) -> Tensor:
        return torch.stack([means(one[None], int(i))[0] @ weights for one, i in zip(x, which, strict=True)])

    expected = [(means(clip[None], i)[0] * weights).tolist() for i, clip in enumerate(clips)]
    for method in (KernelShap(model), Lime(model, interpretable_model=SkLearnLinearRegression())):
        torch.manual_seed(0)
        attributions = method.attribute(
            clips, additional_forward_args=(torch.arange(2),), feature_mask=mask, n_samples=4 * count + 20
        )
        for found, wanted in zip(per_region(attributions, mask), expected, strict=True):
            assert found == pytest.approx(wanted[: len(found)], abs=1e-3), type(method).__name__


def test_clips_of_a_batch_may_have_different_regions(clips):
    """Each clip has its own ids from 0. The clip with fewer regions uses a prefix of the other's ids."""
    mask = feature_masks.supervoxels(clips, LAYOUT, 30)
    counts = [int(ids.max()) + 1 for ids in mask]
    assert mask.unique().tolist() == list(range(max(counts)))
    together = FeatureAblation(cnn()).attribute(clips, target=0, feature_mask=mask, perturbations_per_eval=8)
    for i in range(2):
        alone = FeatureAblation(cnn()).attribute(clips[i : i + 1], target=0, feature_mask=mask[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=1e-5)
