"""Control maps: what each says of a clip is known beforehand, and so is what metrics make of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from captum_staa import space_time
from captum_staa.metrics import auroc, smoothness
from captum_staa.metrics.controls import controls
from captum_staa.metrics.statistics import complexity, sparsity


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("layout", ["BTCHW", "BCTHW", "BTHWC", "BWHTC"])
def test_every_layout_gives_the_same_maps(layout):
    clip, attributions = drawn(2, 5, 3, 6, 7), drawn(2, 5, 3, 6, 7, seed=1)  # (B, T, C, H, W)
    order = ["BTCHW".index(axis) for axis in layout]
    expected = controls(clip, "BTCHW", attributions)
    found = controls(clip.permute(order), layout, attributions.permute(order))
    assert list(found) == ["random", "uniform", "centre", "inverted"]
    for name, control in found.items():
        assert control.shape == (2, 5, 6, 7) and control.dtype == torch.float64 and control.is_contiguous(), name
        torch.testing.assert_close(control, expected[name], rtol=1e-12, atol=1e-12)


def test_random_is_uniform_noise_without_ties():
    values = controls(torch.zeros(3, 16, 3, 60, 60), "BTCHW")["random"]
    n = values[0].numel()
    for clip in values:
        ordered = clip.flatten().sort().values
        assert ordered[0] >= 0 and ordered[-1] < 1
        expected = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        assert (ordered - expected).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov's bound of one in a thousand
        assert (ordered.diff() > 0).all()  # in float32, 57600 draws of 2 ** 24 values hold about a hundred ties
    for part in smoothness(values):
        assert part.abs().max() < 0.02  # neighbours know nothing of each other
    correlation = torch.corrcoef(values.flatten(1)) - torch.eye(3)
    assert correlation.abs().max() < 0.02  # nor do clips


def test_random_is_chance_on_average():
    truth = torch.zeros(200, 4, 8, 8, dtype=torch.bool)
    truth[:, 1, 2:5, 3:6] = True  # 9 of 256
    chance = auroc(controls(torch.zeros(200, 4, 1, 8, 8), "BTCHW")["random"], truth)
    error = math.sqrt((9 + 247 + 1) / (12 * 9 * 247))  # Mann and Whitney's
    assert abs(chance.mean().item() - 0.5) < 3 * error / math.sqrt(200)
    assert chance.std().item() == pytest.approx(error, rel=0.2)


def test_a_seed_is_a_map_and_a_generator_goes_on():
    clip, state = torch.zeros(4, 3, 1, 2, 5), torch.get_rng_state()
    first = controls(clip, "BTCHW")["random"]
    assert controls(drawn(4, 3, 1, 2, 5), "BTCHW")["random"].equal(first)
    assert controls(clip, "BTCHW", generator=seeded(0))["random"].equal(first)
    assert not controls(clip, "BTCHW", generator=seeded(1))["random"].equal(first)
    assert controls(clip[:2], "BTCHW")["random"].equal(first[:2])  # what follows a clip does not change its map
    generator = seeded(0)  # nor does the size of the batches
    batches = [controls(part, "BTCHW", generator=generator)["random"] for part in (clip[:1], clip[1:3], clip[3:])]
    assert torch.cat(batches).equal(first)
    assert torch.get_rng_state().equal(state)


def test_uniform_has_nothing_to_say():
    uniform = controls(torch.zeros(2, 4, 3, 5, 6), "BTCHW")["uniform"]
    assert (uniform == 1).all()
    assert sparsity(uniform).tolist() == [0, 0] and complexity(uniform).tolist() == [1, 1]


@pytest.mark.parametrize(("frames", "height", "width"), [(4, 5, 6), (1, 3, 8), (7, 1, 1), (1, 1, 1)])
def test_centre_is_a_distance(frames, height, width):
    centre = controls(torch.zeros(2, frames, 3, height, width), "BTCHW")["centre"]
    for b, t, y, x in np.ndindex(*centre.shape):
        steps = [(t + 0.5 - frames / 2) / (frames / 2), (y + 0.5 - height / 2) / (height / 2)]
        steps.append((x + 0.5 - width / 2) / (width / 2))
        expected = 1 - math.dist(steps, (0, 0, 0)) / math.sqrt(3)
        assert centre[b, t, y, x].item() == pytest.approx(expected, abs=1e-12)
    assert centre.min() > 0 and centre.max() <= 1
    for axis in (1, 2, 3):
        torch.testing.assert_close(centre.flip(axis), centre)


def test_centre_is_highest_in_the_middle_frame_and_pixel():
    centre = controls(torch.zeros(1, 3, 5, 7, 9), "BCTHW")["centre"]
    assert (centre == centre.max()).nonzero().tolist() == [[0, 2, 3, 4]] and centre.max() == 1


def test_inverted_turns_every_comparison_round():
    clip, attributions = torch.zeros(2, 3, 4, 5, 6), drawn(2, 3, 4, 5, 6)
    truth = drawn(2, 4, 5, 6, seed=1) > 1
    joint = space_time(attributions.double(), "BCTHW").joint
    for given in (attributions, attributions.numpy(), joint, joint.numpy()):
        inverted = controls(clip, "BCTHW", given)["inverted"]
        torch.testing.assert_close(inverted, -joint)
        torch.testing.assert_close(auroc(inverted, truth), 1 - auroc(joint, truth))
    assert not controls(clip, "BCTHW", attributions.requires_grad_())["inverted"].requires_grad
    assert set(controls(clip, "BCTHW")) == {"random", "uniform", "centre"}


def test_the_maps_share_no_memory():
    clip, attributions = torch.zeros(2, 2, 1, 3, 3), drawn(2, 2, 3, 3).double()
    before = attributions.clone()
    for control in controls(clip, "BTCHW", attributions).values():
        second = control[1].clone()
        control[0] = 5
        assert control[1].equal(second)
    assert attributions.equal(before) and not clip.any()


@pytest.mark.parametrize(
    ("clip", "layout", "options", "error", "message"),
    [
        (torch.zeros(1, 8, 3, 4, 4), "BCTHW", {}, ValueError, "layout='BTCHW'"),
        (torch.zeros(8, 3, 4, 4), "BTCHW", {}, ValueError, "(8, 3, 4, 4)"),
        (torch.zeros(1, 8, 3, 4, 4).byte(), "BTCHW", {}, TypeError, "uint8"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHX", {}, ValueError, "'BTCHX' came"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"generator": 7}, TypeError, "7 came"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"attributions": torch.zeros(1, 4, 2, 2)}, ValueError, "(1, 4, 2, 2)"),
        (torch.zeros(2, 8, 3, 4, 4), "BTCHW", {"attributions": torch.zeros(1, 8, 4, 4)}, ValueError, "(2, 8, 4, 4)"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"attributions": torch.zeros(1, 8, 4)}, ValueError, "(1, 8, 4)"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"attributions": [1.0]}, TypeError, "list"),
        (torch.zeros(1, 1, 1, 1, 1), "BTCHW", {"attributions": torch.full((1, 1, 1, 1), math.nan)}, ValueError, "nan"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"seed": 1}, TypeError, "seed"),
    ],
)
def test_wrong_arguments_are_named(clip, layout, options, error, message):
    with pytest.raises(error) as caught:
        controls(clip, layout, **options)
    assert message in str(caught.value)


def test_a_refused_call_draws_nothing():
    generator = seeded(3)
    state = generator.get_state()
    with pytest.raises(ValueError):
        controls(torch.zeros(1, 8, 3, 4, 4), "BTCHW", torch.zeros(1, 4, 2, 2), generator)
    assert generator.get_state().equal(state)
