"""RISE is its formula, sum by sum; its expectation on a linear model is known, and planted evidence is found."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import NoiseTunnel
from covering import in_one_case
from torch import Tensor, nn

from captum_staa import VideoClassifier, VideoLayout
from captum_staa.attr.rise import RISE
from captum_staa.benchmark import PlantedClips
from captum_staa.metrics import auroc


def net(seed: int = 0, channels: int = 3) -> nn.Module:
    """A random network of (B, C, T, H, W) with 4 outputs, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        conv = nn.Conv3d(channels, 5, (2, 3, 3))
        return nn.Sequential(conv, nn.GELU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(40, 4)).double().eval()


def clip_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CLIP = clip_of(2, 3, 5, 7, 6)
CELLS = (2, 3, 2)  # of 3, 3 and 3 voxels: they divide the width alone


def hats(pixels: int, side: int, shift: int, count: int) -> Tensor:
    """(pixels, count): what a voxel takes of each cell along one axis, by its distance from the cell's center."""
    share = torch.zeros(pixels, count, dtype=torch.float64)
    for pixel in range(pixels):
        for cell in range(count):
            share[pixel, cell] = max(0.0, 1 - abs((pixel + shift) / side - cell))
    return share


def drawn(size: tuple[int, ...], cells: tuple[int, ...], keep: float, generator: torch.Generator) -> Tensor:
    """One mask (T, H, W): cells first, then a shift per axis."""
    coarse = (torch.rand([count + 2 for count in cells], generator=generator) < keep).double()
    sides = [math.ceil(pixels / count) for pixels, count in zip(size, cells, strict=True)]
    shifts = [int(torch.randint(side, (), generator=generator)) for side in sides]
    shares = [hats(*axis) for axis in zip(size, sides, shifts, coarse.shape, strict=True)]
    return torch.einsum("abc,ta,hb,wc->thw", coarse, *shares)


def variance(size: tuple[int, ...], cells: tuple[int, ...], keep: float) -> float:
    """Of a mask at any voxel: that of a cell, times what interpolation leaves of it, over all shifts."""
    left = keep * (1 - keep)
    for pixels, count in zip(size, cells, strict=True):
        side = math.ceil(pixels / count)
        each = torch.stack([(hats(pixels, side, shift, count + 2) ** 2).sum(1) for shift in range(side)]).mean(0)
        torch.testing.assert_close(each, each[:1].expand(pixels))  # the same at the border as inside
        left *= float(each[0])
    return left


def slow(
    model: Callable[..., Tensor],
    clips: tuple[Tensor, ...],
    hidden: tuple[Tensor, ...],
    target: int,
    n: int,
    cells: tuple[int, int, int],
    keep: float,
) -> list[Tensor]:
    """The formula for one example (C, T, H, W) per input: all masks, all scores, then covariance over variance."""
    generator = seeded(0)
    masks, scores = [], []
    for _ in range(n):
        masks.append([drawn(clip.shape[1:], cells, keep, generator) for clip in clips])
        parts = zip(clips, hidden, masks[-1], strict=True)
        scores.append(float(model(*[(m * x + (1 - m) * b)[None] for x, b, m in parts]).detach()[0, target]))
    mean, maps = sum(scores) / n, []
    for i, clip in enumerate(clips):
        total = torch.zeros(clip.shape[1:], dtype=torch.float64)
        for score, mask in zip(scores, masks, strict=True):
            total += (score - mean) * (mask[i] - keep)
        slopes = total / (n - 1) / variance(clip.shape[1:], cells, keep)
        maps.append((slopes / len(clip)).expand(clip.shape))
    return maps


@pytest.mark.parametrize(("n", "cells", "keep"), [(2, (2, 3, 2), 0.5), (9, (2, 3, 2), 0.7), (7, (1, 4, 6), 0.2)])
def test_rise_equals_the_formula_mask_by_mask(n, cells, keep):
    model, hidden = net(), clip_of(2, 3, 5, 7, 6, seed=2)
    ours = RISE(model, "BCTHW").attribute(
        CLIP, hidden, [3, 1], perturbations_per_eval=3, n_samples=n, n_cells=cells, keep=keep
    )
    assert ours.is_contiguous() and ours.dtype == torch.float64
    for i, target in enumerate([3, 1]):
        (expected,) = slow(model, (CLIP[i],), (hidden[i],), target, n, cells, keep)
        assert expected.abs().max() > 0
        torch.testing.assert_close(ours[i], expected, rtol=1e-9, atol=1e-12)


def two_streams() -> Callable[..., Tensor]:
    rgb, flow = net(3), net(4, channels=2)
    return lambda a, b, scale=None: rgb(a) * flow(b) * (1 if scale is None else scale[:, None])


def test_two_inputs_have_separate_masks():
    model, inputs = two_streams(), (clip_of(2, 3, 4, 5, 6), clip_of(2, 2, 5, 4, 6))
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    ours = RISE(model, "BCTHW").attribute(inputs, (0.0, 0.3), 1, scale, 4, n_samples=6, n_cells=CELLS)
    assert isinstance(ours, tuple)
    for i in range(2):
        hidden = (torch.zeros_like(inputs[0][i]), torch.full_like(inputs[1][i], 0.3))
        expected = slow(model, (inputs[0][i], inputs[1][i]), hidden, 1, 6, CELLS, 0.5)
        for found, wanted in zip(ours, expected, strict=True):
            torch.testing.assert_close(found[i], wanted * scale[i], rtol=1e-9, atol=1e-12)


def test_linear_model_gives_weights_smoothed_by_the_masks():
    """Without bias: over many runs the mean lies within its standard error of the known covariance."""
    size, keep, runs = (4, 6, 5), 0.3, 150
    weight = clip_of(1, *size, seed=3)
    clip, hidden = clip_of(1, 1, *size), clip_of(1, 1, *size, seed=2)
    method = RISE(lambda x: (x * weight).flatten(1).sum(1) + 5, "BCTHW")

    def run(seed: int) -> Tensor:
        return method.attribute(
            clip, hidden, perturbations_per_eval=12, n_samples=12, n_cells=CELLS, keep=keep, generator=seeded(seed)
        )

    found = torch.stack([run(seed) for seed in range(runs)])[:, 0, 0]
    expected = (weight * (clip - hidden)[0, 0])[0]
    for pixels, count in zip(size, CELLS, strict=True):
        side = math.ceil(pixels / count)
        shares = [hats(pixels, side, shift, count + 2) for shift in range(side)]
        together = torch.stack([share @ share.T for share in shares]).mean(0)  # two voxels' covariance along an axis
        expected = torch.tensordot(expected, together, dims=([0], [0]))  # the first axis, done, goes last
    expected = expected * keep * (1 - keep) / variance(size, CELLS, keep)
    error = found.std(0) / math.sqrt(runs)
    away = (found.mean(0) - expected) / error
    assert away.abs().max() < 4.5  # of 120 voxels
    assert 0.3 < away.square().mean() < 2.5
    assert expected.abs().max() > 8 * error.mean()  # else it would prove nothing


def test_constant_output_gives_zero_and_a_constant_offset_costs_no_precision():
    assert not RISE(lambda x: x.new_full((len(x),), 7.3), "BCTHW").attribute(CLIP, n_samples=5).any()
    small, clip = net().float(), CLIP.float()
    plain = RISE(small, "BCTHW").attribute(clip, target=1, n_samples=20)
    shifted = RISE(lambda x: small(x).double() + 1e9, "BCTHW").attribute(clip, target=1, n_samples=20)
    torch.testing.assert_close(shifted, plain, rtol=0, atol=1e-3 * plain.abs().max().item())


@pytest.mark.parametrize("chunk", [2, 3, 1000])
def test_perturbations_per_eval_does_not_change_the_result(chunk):
    model, seen = net(), []

    def watched(x: Tensor) -> Tensor:
        seen.append(len(x))
        assert not torch.is_grad_enabled()
        return model(x)

    one = RISE(model, "BCTHW").attribute(CLIP, target=[3, 1], n_samples=7)
    found = RISE(watched, "BCTHW").attribute(CLIP, target=[3, 1], n_samples=7, perturbations_per_eval=chunk)
    torch.testing.assert_close(found, one, rtol=1e-10, atol=1e-13)
    assert max(seen) == 2 * min(chunk, 7) and sum(seen) == 2 * 8


def test_result_does_not_depend_on_the_layout_or_the_batch():
    model = net()
    first = RISE(model, "BCTHW").attribute(CLIP, 0.4, [3, 1], n_samples=6)
    twin = RISE(lambda x: model(x.transpose(1, 2)), VideoLayout("BTCHW"))
    second = twin.attribute((CLIP.transpose(1, 2),), 0.4, [3, 1], n_samples=6)[0]
    assert second.is_contiguous() and torch.equal(second.transpose(1, 2), first)
    alone = [RISE(model, "BCTHW").attribute(CLIP[i : i + 1], 0.4, t, n_samples=6) for i, t in enumerate([3, 1])]
    torch.testing.assert_close(torch.cat(alone), first, rtol=1e-10, atol=1e-13)


def test_random_numbers_come_from_the_generator_only():
    explain, before = RISE(net(), "BCTHW").attribute, torch.get_rng_state()
    plain = explain(CLIP, target=0, n_samples=6)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(explain(CLIP, target=0, n_samples=6), plain)
    generator = seeded(0)
    assert torch.equal(explain(CLIP, target=0, n_samples=6, generator=generator), plain)
    again = explain(CLIP, target=0, n_samples=6, generator=generator)  # it goes on where it was
    assert not torch.allclose(again, plain)


def test_model_that_modifies_its_input_does_not_change_the_result():
    model, before = net(), CLIP.clone()
    rude = RISE(lambda x: model(x.sub_(0.5)), "BCTHW")
    ours = rude.attribute(CLIP, target=0, n_samples=5, perturbations_per_eval=2)
    assert torch.equal(CLIP, before)
    polite = RISE(lambda x: model(x - 0.5), "BCTHW")
    torch.testing.assert_close(ours, polite.attribute(CLIP, target=0, n_samples=5), rtol=1e-10, atol=1e-13)
    with torch.inference_mode():
        assert torch.equal(rude.attribute(CLIP, target=0, n_samples=5, perturbations_per_eval=2), ours)


def test_half_precision_gives_float32_and_noise_tunnel_works():
    model = net().half()
    half = RISE(model, "BCTHW").attribute(CLIP.half(), target=0, n_samples=12)
    wide = RISE(net(), "BCTHW").attribute(CLIP, target=0, n_samples=12)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half.double().flatten(), wide.flatten(), 0) > 0.99
    tunnel = NoiseTunnel(RISE(net(), "BCTHW"))
    found = tunnel.attribute(CLIP, nt_samples=2, stdevs=0.0, target=0, n_samples=12)
    torch.testing.assert_close(found, wide, rtol=1e-9, atol=1e-12)


def test_progress_bar_counts_calls_of_the_model(capsys):
    RISE(net(), "BCTHW").attribute(CLIP, target=0, n_samples=5, perturbations_per_eval=2, show_progress=True)
    assert "RISE attribution: 100%" in (shown := capsys.readouterr().err) and "4/4" in shown


@pytest.mark.parametrize(
    ("name", "n", "joint", "time"),
    [
        ("tiny-resnet3d-pattern", 96, 0.9, 0.8),
        pytest.param("tiny-resnet3d-pattern", 1000, 0.97, 0.93, marks=pytest.mark.slow),
        pytest.param("tiny-videomae-pattern", 1000, 0.93, 0.93, marks=pytest.mark.slow),
    ],
)
def test_planted_evidence_is_found(name, n, joint, time):
    clf = VideoClassifier.from_pretrained(name)
    clips, labels, truth = PlantedClips(seed=77, n=4)[:4]
    clips = clf.layout.from_working(clips).contiguous()
    found = RISE(clf).attribute(clips, target=labels, perturbations_per_eval=8, n_samples=n, n_cells=(4, 6, 6))
    maps = clf.layout.reduce(found)
    assert auroc(maps, truth).mean() > joint
    assert auroc(maps, truth, axis="time").mean() > time


@in_one_case()
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n_samples": 1}, ValueError, "at least 2, got 1"),
        ({"n_samples": 10.0}, TypeError, "n_samples.*got 10.0"),
        ({"n_cells": 4}, ValueError, r"n_cells.*\(t, h, w\), .*, got 4"),
        ({"n_cells": (4, 7)}, ValueError, r"got \(4, 7\)"),
        ({"n_cells": (4, 0, 7)}, ValueError, "h of n_cells = .*at least 1"),
        ({"n_cells": (4, 7, True)}, TypeError, "w of n_cells = .*True"),
        ({"n_cells": "777"}, ValueError, "'777'"),
        ({"keep": 0.0}, ValueError, "between 0 and 1.* got 0.0"),
        ({"keep": 1}, ValueError, "between 0 and 1"),
        ({"keep": math.nan}, ValueError, "got nan"),
        ({"generator": 3}, TypeError, "Generator.*got 3"),
        ({"perturbations_per_eval": 0}, ValueError, "at least 1, got 0"),
        ({"baselines": torch.zeros(2, 3, 5, 7, 5)}, ValueError, r"\(2, 3, 5, 7, 5\)"),
        ({"baselines": "blur"}, TypeError, "got str"),
        ({"inputs": CLIP[0]}, ValueError, r"\(3, 5, 7, 6\)"),
        ({"inputs": CLIP / 0}, ValueError, "nan"),
        ({"inputs": (CLIP, CLIP[:1])}, ValueError, "same batch size"),
        ({"cell": (4, 7, 7)}, TypeError, "unexpected keyword"),
    ],
)
def test_invalid_arguments_raise_before_the_model_is_called(arguments: dict[str, Any], error, message):
    calls = []
    method = RISE(lambda *inputs: calls.append(inputs), "BCTHW")
    with pytest.raises(error, match=message):
        method.attribute(**{"inputs": CLIP, "target": 0, **arguments})
    assert not calls


def test_missing_target_or_layout_raises():
    with pytest.raises(ValueError, match=r"outputs of shape \(2, 4\).*target="):
        RISE(net(), "BCTHW").attribute(CLIP)
    with pytest.raises(ValueError, match="layout="):
        RISE(net())
    with pytest.raises(ValueError, match=r"[Ll]eave (the )?layout out"):
        RISE(VideoClassifier(net(), layout="BCTHW"), "BTCHW")
