"""Control maps have known values and known scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from covering import in_one_case

from captum_staa import VideoAttribution
from captum_staa._utils.tensors import gaussian
from captum_staa.metrics import auroc, pointing_game, smoothness
from captum_staa.metrics.controls import SMOOTHING, controls, model_free_controls
from captum_staa.metrics.map_properties import complexity, sparsity


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@in_one_case()
@pytest.mark.parametrize("layout", ["BTCHW", "BCTHW", "BTHWC", "BWHTC"])
def test_all_layouts_give_the_same_maps(layout):
    clip, attributions = drawn(2, 5, 3, 6, 7), drawn(2, 5, 3, 6, 7, seed=1)  # (B, T, C, H, W)
    order = ["BTCHW".index(axis) for axis in layout]
    expected = controls(clip, "BTCHW", attributions)
    found = controls(clip.permute(order), layout, attributions.permute(order))
    assert list(found) == ["random", "uniform", "center", "inverted"]
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
        assert part.abs().max() < 0.02  # neighbors are independent
    correlation = torch.corrcoef(values.flatten(1)) - torch.eye(3)
    assert correlation.abs().max() < 0.02  # clips are independent


def test_random_is_chance_on_average():
    truth = torch.zeros(200, 4, 8, 8, dtype=torch.bool)
    truth[:, 1, 2:5, 3:6] = True  # 9 of 256
    chance = auroc(controls(torch.zeros(200, 4, 1, 8, 8), "BTCHW")["random"], truth)
    error = math.sqrt((9 + 247 + 1) / (12 * 9 * 247))  # Mann and Whitney's
    assert abs(chance.mean().item() - 0.5) < 3 * error / math.sqrt(200)
    assert chance.std().item() == pytest.approx(error, rel=0.2)


def test_a_seed_repeats_maps_and_a_generator_continues():
    clip, state = torch.zeros(4, 3, 1, 2, 5), torch.get_rng_state()
    first = controls(clip, "BTCHW")["random"]
    assert controls(drawn(4, 3, 1, 2, 5), "BTCHW")["random"].equal(first)
    assert controls(clip, "BTCHW", generator=seeded(0))["random"].equal(first)
    assert not controls(clip, "BTCHW", generator=seeded(1))["random"].equal(first)
    assert controls(clip[:2], "BTCHW")["random"].equal(first[:2])  # the map of a clip does not depend on later clips
    generator = seeded(0)  # or on the batch size
    batches = [controls(part, "BTCHW", generator=generator)["random"] for part in (clip[:1], clip[1:3], clip[3:])]
    assert torch.cat(batches).equal(first)
    assert torch.get_rng_state().equal(state)


def test_uniform_scores_as_a_constant_map():
    uniform = controls(torch.zeros(2, 4, 3, 5, 6), "BTCHW")["uniform"]
    assert (uniform == 1).all()
    assert sparsity(uniform).tolist() == [0, 0] and complexity(uniform).tolist() == [1, 1]


@in_one_case()
@pytest.mark.parametrize(("frames", "height", "width"), [(4, 5, 6), (1, 3, 8), (7, 1, 1), (1, 1, 1)])
def test_center_equals_its_formula(frames, height, width):
    center = controls(torch.zeros(2, frames, 3, height, width), "BTCHW")["center"]
    for b, t, y, x in np.ndindex(*center.shape):
        steps = [(t + 0.5 - frames / 2) / (frames / 2), (y + 0.5 - height / 2) / (height / 2)]
        steps.append((x + 0.5 - width / 2) / (width / 2))
        expected = 1 - math.dist(steps, (0, 0, 0)) / math.sqrt(3)
        assert center[b, t, y, x].item() == pytest.approx(expected, abs=1e-12)
    assert center.min() > 0 and center.max() <= 1
    for axis in (1, 2, 3):
        torch.testing.assert_close(center.flip(axis), center)


def test_center_is_highest_in_the_middle():
    center = controls(torch.zeros(1, 3, 5, 7, 9), "BCTHW")["center"]
    assert (center == center.max()).nonzero().tolist() == [[0, 2, 3, 4]] and center.max() == 1


def test_inverted_reverses_the_order():
    clip, attributions = torch.zeros(2, 3, 4, 5, 6), drawn(2, 3, 4, 5, 6)
    truth = drawn(2, 4, 5, 6, seed=1) > 1
    joint = VideoAttribution.from_attributions(attributions.double(), "BCTHW").joint
    for given in (attributions, attributions.numpy(), joint, joint.numpy()):
        inverted = controls(clip, "BCTHW", given)["inverted"]
        torch.testing.assert_close(inverted, -joint)
        torch.testing.assert_close(auroc(inverted, truth), 1 - auroc(joint, truth))
    assert not controls(clip, "BCTHW", attributions.requires_grad_())["inverted"].requires_grad
    assert set(controls(clip, "BCTHW")) == {"random", "uniform", "center"}


def test_maps_do_not_share_memory():
    clip, attributions = torch.zeros(2, 2, 1, 3, 3), drawn(2, 2, 3, 3).double()
    before = attributions.clone()
    for control in controls(clip, "BTCHW", attributions).values():
        second = control[1].clone()
        control[0] = 5
        assert control[1].equal(second)
    assert attributions.equal(before) and not clip.any()


@in_one_case()
@pytest.mark.parametrize(
    ("clip", "layout", "options", "error", "message"),
    [
        (torch.zeros(1, 8, 3, 4, 4), "BCTHW", {}, ValueError, "layout='BTCHW'"),
        (torch.zeros(8, 3, 4, 4), "BTCHW", {}, ValueError, "(8, 3, 4, 4)"),
        (torch.zeros(1, 8, 3, 4, 4).byte(), "BTCHW", {}, TypeError, "uint8"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHX", {}, ValueError, "'BTCHX'"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"generator": 7}, TypeError, "got 7"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"attributions": torch.zeros(1, 4, 2, 2)}, ValueError, "(1, 4, 2, 2)"),
        (torch.zeros(2, 8, 3, 4, 4), "BTCHW", {"attributions": torch.zeros(1, 8, 4, 4)}, ValueError, "(2, 8, 4, 4)"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"attributions": torch.zeros(1, 8, 4)}, ValueError, "(1, 8, 4)"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"attributions": [1.0]}, TypeError, "list"),
        (torch.zeros(1, 1, 1, 1, 1), "BTCHW", {"attributions": torch.full((1, 1, 1, 1), math.nan)}, ValueError, "nan"),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHW", {"seed": 1}, TypeError, "seed"),
    ],
)
def test_invalid_arguments_raise(clip, layout, options, error, message):
    with pytest.raises(error) as caught:
        controls(clip, layout, **options)
    assert message in str(caught.value)


def test_an_invalid_call_does_not_draw_from_the_generator():
    generator = seeded(3)
    state = generator.get_state()
    with pytest.raises(ValueError):
        controls(torch.zeros(1, 8, 3, 4, 4), "BTCHW", torch.zeros(1, 4, 2, 2), generator)
    assert generator.get_state().equal(state)


# --- controls from the inputs ------------------------------------------------------------------------------------

NAMES = ["absolute input", "difference from mean frame", "image gradient", "frame difference", "optical flow"]
NAMES += ["spectral residual", "center"]


def smoothed(raw: np.ndarray) -> torch.Tensor:
    return gaussian(torch.from_numpy(raw), SMOOTHING)


def slow_maps(clip: np.ndarray) -> dict[str, np.ndarray]:
    """Maps (B, T, H, W) of a clip (B, T, C, H, W) before smoothing, by loops over pixels."""
    batch, frames, _, height, width = clip.shape
    names = ("absolute input", "difference from mean frame", "image gradient", "frame difference")
    found = {name: np.zeros((batch, frames, height, width)) for name in names}
    for b, t, c, y, x in np.ndindex(*clip.shape):
        value = clip[b, t, c, y, x]
        found["absolute input"][b, t, y, x] += abs(value)
        mean = sum(clip[b, i, c, y, x] for i in range(frames)) / frames
        found["difference from mean frame"][b, t, y, x] += abs(value - mean)
        above, below, left, right = max(y - 1, 0), min(y + 1, height - 1), max(x - 1, 0), min(x + 1, width - 1)
        down = (clip[b, t, c, below, x] - clip[b, t, c, above, x]) / (below - above)
        across = (clip[b, t, c, y, right] - clip[b, t, c, y, left]) / (right - left)
        found["image gradient"][b, t, y, x] += math.hypot(down, across)
        steps = [abs(value - clip[b, i, c, y, x]) for i in (t - 1, t + 1) if 0 <= i < frames]
        found["frame difference"][b, t, y, x] += sum(steps) / len(steps) if steps else 0
    return found


def slow_spectral_residual(frame: np.ndarray) -> np.ndarray:
    """Spectral residual of one gray frame (H, W) between 0 and 1, with the transforms as sums."""
    height, width = frame.shape
    rows, columns = (np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) for n in (height, width))
    spectrum = rows @ frame @ columns
    amplitude = np.maximum(abs(spectrum), math.sqrt(height * width / 12) / 255)
    kept = np.zeros_like(spectrum)
    for v, u in np.ndindex(height, width):
        near = [math.log(amplitude[(v + i) % height, (u + j) % width]) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        kept[v, u] = math.exp(math.log(amplitude[v, u]) - sum(near) / 9) * spectrum[v, u] / amplitude[v, u]
    kept[0, 0] = 0
    return abs(rows.conj() @ kept @ columns.conj() / (height * width)) ** 2


def test_model_free_controls_equal_slow_formulas():
    clip = drawn(2, 4, 3, 5, 6).double()
    found = model_free_controls(clip, "BTCHW")
    assert list(found) == NAMES
    for name, raw in slow_maps(clip.numpy()).items():
        torch.testing.assert_close(found[name], smoothed(raw), rtol=1e-12, atol=1e-12, msg=name)
    gray = clip.mean(2).numpy()
    residual = np.zeros_like(gray)
    for b, t in np.ndindex(*gray.shape[:2]):
        low, high = gray[b].min(), gray[b].max()
        residual[b, t] = slow_spectral_residual((gray[b, t] - low) / (high - low))
    torch.testing.assert_close(found["spectral residual"], smoothed(residual), rtol=1e-9, atol=1e-12)
    assert torch.equal(found["center"], controls(clip, "BTCHW")["center"])


@pytest.mark.parametrize("layout", ["BCTHW", "BTHWC", "BWHTC"])
def test_model_free_controls_do_not_depend_on_the_layout(layout):
    clip = drawn(2, 5, 3, 8, 9)  # (B, T, C, H, W)
    expected = model_free_controls(clip, "BTCHW")
    found = model_free_controls(clip.permute(["BTCHW".index(axis) for axis in layout]).contiguous(), layout)
    assert list(found) == list(expected) == NAMES
    for name, control in found.items():
        assert control.shape == (2, 5, 8, 9) and control.dtype == torch.float64 and control.is_contiguous(), name
        assert torch.equal(control, expected[name]), name
        assert control.min() >= 0, name


def test_model_free_controls_of_clips_are_independent():
    clip = drawn(3, 4, 3, 8, 9)
    whole = model_free_controls(clip.requires_grad_(), "BTCHW")
    for i in range(3):
        for name, control in model_free_controls(clip[i : i + 1], "BTCHW").items():
            torch.testing.assert_close(control, whole[name][i : i + 1], rtol=1e-12, atol=1e-14, msg=name)
            assert not control.requires_grad
    assert clip.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_static_clips_have_no_motion_and_blank_clips_are_zero(dtype):
    still = drawn(1, 1, 3, 8, 9).to(dtype).expand(2, 7, 3, 8, 9)
    found = model_free_controls(still, "BTCHW")
    for name in ("difference from mean frame", "frame difference", "optical flow"):
        assert not found[name].any(), name
    for name in ("absolute input", "image gradient", "spectral residual"):
        torch.testing.assert_close(found[name], found[name][:, :1].expand(2, 7, 8, 9), rtol=1e-12, atol=0, msg=name)
        assert found[name].std() > 0, name
    blank = model_free_controls(torch.full((1, 4, 3, 8, 9), 0.1, dtype=dtype), "BTCHW")
    for name in ("difference from mean frame", "image gradient", "frame difference", "optical flow"):
        assert not blank[name].any(), name
    assert not blank["spectral residual"].any()
    bright = blank["absolute input"]
    torch.testing.assert_close(bright, torch.full_like(bright, 0.3), rtol=2e-3, atol=0)


def test_a_blank_frame_has_no_spectral_residual():
    clip = drawn(1, 9, 3, 12, 10)
    clip[:, 4:] = 0.7
    found = model_free_controls(clip, "BTCHW")["spectral residual"][0]
    assert found[:4].amin((1, 2)).min() > 0
    assert found[7:].max() < 1e-20 * found[0].max()  # outside the range of the smoothing


def test_a_single_frame_has_no_motion():
    found = model_free_controls(drawn(2, 1, 3, 6, 7), "BTCHW")
    for name in NAMES:
        moving = name in ("difference from mean frame", "frame difference", "optical flow")
        assert found[name].shape == (2, 1, 6, 7) and bool(found[name].any()) is not moving, name


def texture(height: int, width: int, seed: int) -> torch.Tensor:
    """A smooth texture (3, H, W)."""
    coarse = torch.rand(1, 3, height // 4 + 2, width // 4 + 2, generator=seeded(seed))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0]


def moving_patch(size: int = 12, step: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A textured patch moves to the right over a background of the same texture: clip and truth (1, T, ..., H, W)."""
    clip, truth = texture(40, 48, 0).expand(6, 3, 40, 48).clone(), torch.zeros(6, 40, 48, dtype=torch.bool)
    for t in range(6):
        x = 8 + step * t
        clip[t, :, 16 : 16 + size, x : x + size] = texture(size, size, 1)
        truth[t, 16 : 16 + size, x : x + size] = True
    return clip[None], truth[None]


def test_motion_controls_find_a_moving_patch():
    clip, truth = moving_patch(step=2)
    found = model_free_controls((clip - 0.45) / 0.225, "BTCHW")  # normalized as for models
    for name in ("difference from mean frame", "frame difference", "optical flow"):
        assert auroc(found[name], truth).item() > 0.93, name
    for name in ("absolute input", "image gradient"):
        assert auroc(found[name], truth).item() < 0.85, name


def test_optical_flow_is_measured_in_pixels_per_frame():
    wide = texture(32, 48, 2)
    clip = torch.stack([wide[:, :, 8 - t : 40 - t] for t in range(5)])[None]  # everything moves right by 1 pixel
    flow = model_free_controls(clip, "BTCHW")["optical flow"]
    assert flow.median().item() == pytest.approx(1, abs=0.1)
    assert flow[:, :, 8:-8, 8:-8].mean().item() == pytest.approx(1, abs=0.15)
    doubled = model_free_controls(clip * 5 - 3, "BTCHW")["optical flow"]  # contrast and brightness do not matter
    torch.testing.assert_close(doubled, flow, rtol=0.01, atol=0.01)


def test_image_gradient_finds_edges_and_absolute_input_brightness():
    clip = torch.zeros(1, 3, 3, 24, 40)
    clip[..., 20:] = 1.0
    found = model_free_controls(clip, "BTCHW")
    edge = found["image gradient"].sum((0, 1, 2))
    assert edge.argmax().item() in (19, 20) and not edge[:10].any() and not edge[30:].any()
    bright = found["absolute input"].sum((0, 1, 2))
    assert not bright[:10].any() and (bright[30:] > 0).all()


def test_frame_difference_finds_the_frames_of_a_flash():
    clip = torch.zeros(1, 16, 3, 8, 8)
    clip[:, 6:] = 1.0
    when = model_free_controls(clip, "BTCHW")["frame difference"].sum((0, 2, 3))
    assert when.topk(2).indices.sort().values.tolist() == [5, 6]
    assert not when[:2].any() and not when[10:].any()


@pytest.mark.parametrize("scale", [1, 3])
def test_spectral_residual_finds_what_breaks_a_regular_texture(scale):
    """A large frame is reduced to about 64 pixels first, and the map is resized to the frame."""
    rows, columns = torch.meshgrid(torch.arange(60), torch.arange(64), indexing="ij")
    frame = 0.5 + 0.2 * torch.sin(rows * 0.7) * torch.sin(columns * 0.7)
    frame += 0.02 * torch.rand(60, 64, generator=seeded(0))
    truth = torch.zeros(60, 64, dtype=torch.bool)
    truth[38:46, 12:20] = True
    frame[truth] = 0.9
    frame, truth = (each.repeat_interleave(scale, 0).repeat_interleave(scale, 1) for each in (frame, truth))
    clip = frame.expand(1, 2, 3, *frame.shape)
    residual = model_free_controls(clip, "BTCHW")["spectral residual"]
    assert residual.shape == (1, 2, *frame.shape)
    assert auroc(residual, truth.expand(1, 2, *truth.shape)).item() > 0.9
    assert pointing_game(residual, truth.expand(1, 2, *truth.shape), tolerance=(0, 3, 3)).item() == 1
    torch.testing.assert_close(
        model_free_controls(clip * 4 - 7, "BTCHW")["spectral residual"], residual, rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize("shift", [(0, 5), (3, 0), (-4, 7)])
def test_a_shift_of_the_clip_shifts_the_maps(shift):
    """The clip is shifted cyclically. The border is ignored, because of smoothing and one-sided differences there."""
    clip, truth = moving_patch()
    moved = model_free_controls(clip.roll(shift, (3, 4)), "BTCHW")
    found = model_free_controls(clip, "BTCHW")
    inside = (slice(None), slice(None), slice(12, -12), slice(14, -14))
    for name in ("absolute input", "difference from mean frame", "image gradient", "frame difference"):
        torch.testing.assert_close(
            moved[name][inside], found[name].roll(shift, (2, 3))[inside], rtol=1e-12, atol=1e-12, msg=name
        )
    residual, expected = moved["spectral residual"][inside], found["spectral residual"].roll(shift, (2, 3))[inside]
    torch.testing.assert_close(residual, expected, rtol=1e-6, atol=1e-12)
    where = truth.roll(shift, (2, 3))
    here, elsewhere = (auroc(maps["optical flow"], where).item() for maps in (moved, found))
    assert here > 0.97 and here > elsewhere + 0.005


@in_one_case()
@pytest.mark.parametrize(
    ("clip", "layout", "error", "parts"),
    [
        ([1.0], "BTCHW", TypeError, ["inputs must be a tensor or", "list"]),
        (torch.zeros(8, 3, 4, 4), "BTCHW", ValueError, ["inputs must be", "(8, 3, 4, 4)"]),
        (torch.zeros(1, 8, 3, 4, 4).byte(), "BTCHW", TypeError, ["inputs must be a floating-point tensor", "uint8"]),
        (torch.full((1, 8, 3, 4, 4), math.nan), "BTCHW", ValueError, ["nan", "torch.nan_to_num"]),
        (torch.zeros(1, 8, 3, 4, 4), "BTCHX", ValueError, ["'BTCHX'"]),
        (torch.zeros(1, 8, 3, 4, 1), "BTCHW", ValueError, ["at least 2 x 2 pixels", "(1, 8, 3, 4, 1)", "Use controls"]),
    ],
)
def test_invalid_arguments_of_model_free_controls_raise(clip, layout, error, parts):
    with pytest.raises(error) as caught:
        model_free_controls(clip, layout)
    for part in parts:
        assert part in str(caught.value)
