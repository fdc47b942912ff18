"""Edge cases of learned masks: empty masks, nan for one clip, regions with per-frame areas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from captum_staa import SpatioTemporalPerturbation, VideoFeatureAblation
from captum_staa.feature_masks import grid
from captum_staa.perturbation import PRESETS, Ellipsoid, PerturbationConfig, Separate
from captum_staa.perturbation.blends import BlurPyramid

OPTIONS = {"areas": (0.1, 0.3), "iterations": 30, "perturbations_per_eval": 4}


class Net(nn.Module):
    """A random 3D network that returns nan for marked clips, from call ``nan_from`` on."""

    def __init__(self, nan_from: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = nn.Sequential(nn.Conv3d(3, 6, 3, padding=1), nn.GELU(), nn.AdaptiveAvgPool3d(2))
            self.head = nn.Linear(48, 3)
        self.calls, self.nan_from = 0, nan_from

    def forward(self, clip: Tensor, marked: Tensor) -> Tensor:
        self.calls += 1
        logits = self.head(self.features(clip).flatten(1))
        fails = self.nan_from is not None and self.calls >= self.nan_from
        return logits.masked_fill(marked[:, None].bool(), float("nan")) if fails else logits


def clips(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 4, 8, 6, generator=torch.Generator().manual_seed(1))


def test_nan_for_one_clip_stops_only_this_clip() -> None:
    clip, marked = clips(), torch.tensor([0.0, 1.0])

    def learned(which: slice, nan_from: int | None):
        method = SpatioTemporalPerturbation(Net(nan_from), "BCTHW", preset=PRESETS["nested"].changed(scale="logit"))
        return method.attribute_maps(clip[which], target=1, additional_forward_args=marked[which], **OPTIONS)

    whole, alone = learned(slice(None), None), learned(slice(0, 1), None)
    with pytest.warns(UserWarning, match=r"nan or infinity for perturbations of clip 1 at step \d+. The best masks"):
        beside = learned(slice(None), 30)
    torch.testing.assert_close(beside.joint[0], alone.joint[0], rtol=1e-4, atol=1e-6)
    assert beside.history.steps.tolist() == alone.history.steps.tolist() == [0, 10, 20, 30]
    assert beside.joint[1].isfinite().all() and beside.kept.isfinite().all()
    assert not torch.allclose(beside.joint[1], whole.joint[1])  # without nan, the optimization continued
    with pytest.raises(ValueError, match=r"perturbations of clips \[1\], before the first step"):
        learned(slice(None), 1)


def test_empty_masks_give_zeros_without_nan() -> None:
    """The rate is so high that the first step removes everything. The papers' descent can do this for large cells."""
    preset = PerturbationConfig(Separate(rate=1e4, weight=0.0), iterations=10)
    method = SpatioTemporalPerturbation(lambda clip: -clip.square().mean((1, 2, 3, 4)), "BCTHW", preset=preset)
    parts = method.attribute_maps(clips(), 0, objective="preserve", areas=0.25)
    assert parts.visible.eq(0).all() and all(m.eq(0).all() for m in (parts.joint, parts.spatial, parts.temporal))


def test_per_frame_preset_with_feature_mask_raises_value_error() -> None:
    clip = clips(1)
    method = SpatioTemporalPerturbation(lambda clip: clip.mean((2, 3, 4)), "BCTHW", preset="2d-ep")
    with pytest.raises(ValueError, match=r"same area in every frame.*8 regions.*'3d-ep'"):
        method.attribute(clip, target=0, feature_mask=grid(clip, "BCTHW", (2, 4, 3)), iterations=1)


def test_mask_slightly_above_one_returns_the_clip() -> None:
    levels = [torch.full((1, 1, 1, 1, 1), value) for value in (0.0, 4.0, 5.0)]
    kept = BlurPyramid(levels)(torch.tensor([1.0, 1 + 1e-6, 1 - 1e-6]).view(3, 1, 1, 1, 1))
    torch.testing.assert_close(kept.flatten(), torch.full((3,), 5.0), rtol=0, atol=1e-4)


def test_ellipsoid_scales_with_its_weight() -> None:
    masks = torch.rand(2, 2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    areas = torch.tensor([0.2, 0.5])
    torch.testing.assert_close(Ellipsoid(weight=300.0)(masks, areas), 300 * Ellipsoid()(masks, areas))


def test_fractional_baseline_for_integer_input_raises_value_error() -> None:
    clip = torch.ones(1, 3, 4, 8, 6, dtype=torch.int64)
    method = VideoFeatureAblation(lambda clip: clip.float().mean((2, 3, 4)))
    with pytest.raises(ValueError, match=r"torch.int64 must be integers.*got 0.5.*float\(\)"):
        method.attribute(clip, baselines=0.5, target=0)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 4, 8, 6\) with values from 0.25 to 0.25"):
        method.attribute(clip, baselines=torch.full(clip.shape, 0.25), target=0)


@pytest.mark.parametrize("preset", ["nested", "step"])
def test_clip_with_fewer_regions_starts_as_it_does_alone(preset: str) -> None:
    clip, init = clips(), torch.rand(2, 4, 8, 6, generator=torch.Generator().manual_seed(2))
    regions = grid(clip, "BCTHW", (2, 4, 3)).expand(2, 1, -1, -1, -1).clone()
    regions[0] = regions[0] % 3  # the other clip has eight regions
    logit = PRESETS[preset].changed(scale="logit")
    method = SpatioTemporalPerturbation(lambda clip: clip.mean((2, 3, 4)), "BCTHW", preset=logit)
    options = {"target": 0, "iterations": 0, "areas": (0.3,)}
    both = method.attribute_maps(clip, feature_mask=regions, init=init, **options).joint
    for at in range(2):
        alone = method.attribute_maps(
            clip[at : at + 1], feature_mask=regions[at : at + 1], init=init[at : at + 1], **options
        ).joint
        torch.testing.assert_close(both[at : at + 1], alone, rtol=1e-5, atol=1e-8)
