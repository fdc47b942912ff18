"""Saliency maps: sign, outliers, one scale per clip; conversion of clips to frames; placement of maps in a crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import visualization as captum_visualization
from covering import in_one_case

from captum_staa.io import Video
from captum_staa.models import VideoClassifier
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.result import VideoAttribution
from captum_staa.visualization import Frames
from captum_staa.visualization.frames import place
from captum_staa.visualization.saliency import Maps, saliency

T, H, W = 8, 24, 32
GRAY = np.full((T, H, W, 3), 128, dtype=np.uint8)


def block() -> torch.Tensor:
    """(1, T, 3, H, W): evidence in rows 4..7, columns 20..27; 1 per pixel in frame 2, half of that in frame 5."""
    attributions = torch.zeros(1, T, 3, H, W)
    attributions[:, 2, :, 4:8, 20:28] = 1 / 3
    attributions[:, 5, :, 4:8, 20:28] = 1 / 6
    return attributions


@in_one_case()
@pytest.mark.parametrize("sign", ["absolute_value", "positive", "negative", "all"])
@pytest.mark.parametrize("outlier_perc", [0, 2, 30])
def test_normalization_equals_captum_on_a_sheet_of_frames(sign, outlier_perc):
    maps = torch.randn(1, T, H, W, generator=torch.Generator().manual_seed(0))
    sheet = maps.reshape(T * H, W).double().numpy()  # the whole clip as one image
    _, axes = captum_visualization.visualize_image_attr(
        sheet, method="heat_map", sign=sign, outlier_perc=outlier_perc, use_pyplot=False
    )
    expected = np.asarray(axes.images[0].get_array()).reshape(T, H, W)
    found = saliency(Maps.of(maps).joint, sign, outlier_perc)
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    inner = (np.abs(expected) > 0) & (np.abs(expected) < 1)  # what was scaled but not cut off
    np.testing.assert_allclose(np.abs(maps[0].numpy()[inner]), found.scale * np.abs(expected[inner]), rtol=1e-5)


def test_all_frames_share_one_scale():
    values, scale = saliency(Maps.of(block(), Frames(GRAY, layout="BTCHW")).joint, outlier_perc=0)
    assert scale == pytest.approx(1)
    assert values[2, 5, 22] == pytest.approx(1)
    assert values[5, 5, 22] == pytest.approx(0.5)
    assert values[[0, 1, 3, 4, 6, 7]].max() == 0


def test_outliers_are_clipped_over_the_whole_clip():
    maps = np.ones((2, 1, 50))
    maps[1, 0, 0] = 100  # half of all there is
    assert saliency(maps, outlier_perc=0).scale == 100
    values, scale = saliency(maps, outlier_perc=51)
    assert scale == 1
    assert values.max() == 1


def test_all_forms_of_attributions_give_the_same_map():
    attributions = block()
    maps = attributions.sum(2)
    one, second, last = Frames(GRAY), Frames(GRAY, index=1), Frames(GRAY, index=-1)
    ways = [
        Maps.of(attributions, Frames(GRAY, layout="BTCHW")),
        Maps.of(attributions.movedim(1, 2), Frames(GRAY, layout="BCTHW")),
        Maps.of(maps),
        Maps.of(maps[0], one),
        Maps.of(maps.numpy(), one),
        Maps.of(maps[0].flip(1).numpy()[:, ::-1], one),
        Maps.of(VideoAttribution.from_attributions(attributions, "BTCHW"), one),
        Maps.of(torch.cat([maps * 0, maps]), second),
        Maps.of(torch.cat([maps * 0, maps]), last),
        Maps.of(maps.requires_grad_(), one),
    ]
    for way in ways:
        np.testing.assert_allclose(way.joint, ways[0].joint, atol=1e-6)
        np.testing.assert_allclose(way.spatial, ways[0].joint.sum(0), atol=1e-6)
        np.testing.assert_allclose(way.per_frame(), ways[0].joint.sum((1, 2)), atol=1e-4)


@in_one_case()
@pytest.mark.parametrize(
    ("attributions", "options", "says"),
    [
        (torch.zeros(1, T, 3, H, W), {}, r"layout must be given .* \(1, 8, 3, 24, 32\)"),
        (torch.zeros(2, T, H, W), {}, r"2 clips \(shape \(2, 8, 24, 32\)\). Pass index="),
        (torch.zeros(2, T, H, W), {"index": 2}, "index must select one of the 2 clips .* got 2"),
        (torch.zeros(H, W), {}, r"got shape \(24, 32\)"),
        (torch.zeros(0, H, W), {}, r"must not be empty.*\(0, 24, 32\)"),
        (torch.full((T, H, W), torch.nan), {}, "attributions .* nan or inf at 6144 of 6144 pixels"),
        (torch.zeros(T - 1, H, W), {}, "as many frames as the clip, 8, got 7"),
        (
            VideoAttribution(torch.zeros(1, T, H, W), torch.zeros(1, H, W), torch.zeros(1, 3)),
            {},
            "as many frames as the clip, 8, got 3 and 8",
        ),
    ],
)
def test_invalid_attributions_raise_value_error(attributions, options, says):
    with pytest.raises(ValueError, match=says):
        Maps.of(attributions, Frames(GRAY, **options))


# Frames.


def test_inputs_are_rescaled_or_denormalized_with_mean_and_std():
    clip = torch.zeros(1, 3, 2, 4, 4)
    clip[:, 0], clip[:, 1], clip[:, 2, 1] = -1, 1, 3
    pixels = Frames.from_inputs(clip, layout="BCTHW").pixels
    assert pixels[:, 0, 0].tolist() == [[0, 128, 64], [0, 128, 255]]
    undone = Frames.from_inputs(clip, layout="BCTHW", mean=[0.5, 0.25, 0], std=[0.5, 0.25, 0.2]).pixels
    assert undone[:, 0, 0].tolist() == [[0, 128, 0], [0, 128, 153]]
    gray = Frames.from_inputs(torch.full((1, 1, 1, 2, 2), 7, dtype=torch.uint8), layout="BTCHW").pixels
    assert gray.tolist() == [[[[7] * 3] * 2] * 2]


@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5)),
        Preprocessing(factor=1 / 127.5, offset=True),
        Preprocessing(factor=None, flip_channels=True, mean=(100, 110, 120), std=(50, 60, 70)),
        Preprocessing(),
    ],
)
def test_frames_of_inputs_undo_the_preprocessing_of_the_classifier(preprocessing):
    clf = VideoClassifier(torch.nn.Flatten(), layout="BCTHW", preprocessing=preprocessing)
    pixels = np.random.default_rng(0).integers(50, 200, (T, H, W, 3), dtype=np.uint8)
    inputs = clf.preprocess(pixels)
    found = Frames.from_inputs(torch.cat([inputs * 0, inputs]), clf, index=1)
    np.testing.assert_array_equal(found.pixels, pixels)
    assert (found.layout, found.index) == (clf.layout, 1)


def test_frames_of_a_video_have_its_times_and_the_crop_of_the_classifier():
    clf = VideoClassifier(torch.nn.Flatten(), layout="BCTHW", preprocessing=Preprocessing(resize=24, crop=(24, 24)))
    found = Frames.from_video(Video(GRAY, 25.0, np.arange(T) * 10), clf)
    assert (found.crop, found.layout) == (clf.crop_box(H, W), clf.layout)
    assert found.captions(join=", ")[2] == "frame 20, 0.80 s"
    assert found[[5, 2]].captions() == ["2.00 s", "0.80 s"]
    assert Frames.from_video(Video(GRAY, float("nan"), np.arange(T))).captions()[2] == "frame 2"


@in_one_case()
@pytest.mark.parametrize(
    ("inputs", "options", "error", "says"),
    [
        (torch.zeros(1, T, 3, H, W), {}, ValueError, "layout must be given for inputs"),
        (torch.zeros(1, T, 2, H, W), {"layout": "BTCHW"}, ValueError, r"1 or 3 channels.*\(1, 8, 2, 24, 32\)"),
        (torch.zeros(1, T, 3, H, W), {"layout": "BTCHW", "mean": 0.5}, ValueError, "mean = 0.5, std = None"),
        (torch.full((1, T, 3, H, W), torch.inf), {"layout": "BTCHW"}, ValueError, "nan or inf"),
        (torch.zeros(1, T, 3, H, W), {"classifier": torch.nn.Flatten()}, TypeError, "VideoClassifier, got Flatten"),
    ],
)
def test_inputs_that_cannot_be_drawn_raise(inputs, options, error, says):
    with pytest.raises(error, match=says):
        Frames.from_inputs(inputs, **options)


@in_one_case()
@pytest.mark.parametrize(
    ("pixels", "options", "error", "says"),
    [
        (GRAY / 255, {}, TypeError, r"uint8.*float64 of shape \(8, 24, 32, 3\).*attributions first"),
        (GRAY[0], {}, ValueError, r"\(24, 32, 3\)"),
        (GRAY, {"labels": ["a"]}, ValueError, "labels must .* 8 frames, got 1"),
        (GRAY, {"indices": range(9)}, ValueError, "indices must .* 8 frames, got 9"),
        (GRAY, {"fps": 0}, ValueError, "fps .* 0"),
        (GRAY, {"crop": (0, 0, 5)}, TypeError, "crop must be four numbers"),
        (GRAY, {"crop": (0, 40, 5, 5)}, ValueError, "crop must be .* contains no pixel"),
        (GRAY, {"crop": (3, 3, 0, 5)}, ValueError, "crop must be .* contains no pixel"),
        (GRAY, {"crop": (-9, 0, 5, 5)}, ValueError, "crop must be .* contains no pixel"),
    ],
)
def test_invalid_frames_raise(pixels, options, error, says):
    with pytest.raises(error, match=says):
        Frames(pixels, **options)


# Placing a map.


def test_map_is_placed_in_the_crop():
    """A 4 x 4 map over a crop of 16 x 16: one cell is 4 x 4 pixels, and its center keeps its value."""
    values = np.zeros((1, 4, 4), np.float32)
    values[0, 1, 2] = 1
    laid, seen = place(values, (H, W), crop=(6, 10, 16, 16))
    assert np.argwhere(seen).min(0).tolist() == [6, 10]
    assert np.argwhere(seen).max(0).tolist() == [21, 25]
    assert laid[0, ~seen].max() == 0
    rows, columns = np.nonzero(laid[0] > 0.7)
    assert (rows.mean() + 0.5, columns.mean() + 0.5) == (6 + 1.5 * 4, 10 + 2.5 * 4)
    # Between two cells, bilinear: half-way from the center of one to the next it is half.
    assert laid[0, 11:13, 19:21].mean() == pytest.approx((1 - 1 / 8) ** 2)
    assert laid[0, 11, [21, 22]].mean() == pytest.approx(0.5 * (1 - 1 / 8), abs=1e-6)


def test_crop_can_be_fractional_or_exceed_the_frame():
    values = np.ones((1, 5, 5), np.float32)
    _, seen = place(values, (10, 10), crop=(1.4, 2.6, 4, 4))
    assert np.flatnonzero(seen.any(1)).tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(seen.any(0)).tolist() == [3, 4, 5, 6]
    laid, seen = place(values, (10, 10), crop=(-2, 0, 14, 10))
    assert seen.all()
    assert laid.min() == pytest.approx(1)


def test_reducing_a_map_keeps_a_single_pixel():
    values = np.zeros((1, 64, 64), np.float32)
    values[0, 21, 21] = 1
    laid, _ = place(values, (16, 16))
    assert laid.sum() * 16 == pytest.approx(1, abs=0.05)
