"""Frames and timelines: colors of known pixels, order and labels of frames, values of curves."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from covering import in_one_case
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from captum_staa import io
from captum_staa.result import VideoAttribution
from captum_staa.visualization import Frames, Style, overlay, show_frames, show_timeline
from captum_staa.visualization.figure import DIVERGING
from captum_staa.visualization.overlay import UNSEEN
from captum_staa.visualization.saliency import saliency

T, H, W = 8, 24, 32
PIXELS = np.full((T, H, W, 3), 128, dtype=np.uint8)
GRAY = Frames(PIXELS, layout="BTCHW")


def block() -> torch.Tensor:
    """(1, T, 3, H, W): evidence in rows 4..7, columns 20..27; 1 per pixel in frame 2, half of that in frame 5."""
    attributions = torch.zeros(1, T, 3, H, W)
    attributions[:, 2, :, 4:8, 20:28] = 1 / 3
    attributions[:, 5, :, 4:8, 20:28] = 1 / 6
    return attributions


def drawn(attributions, frames=GRAY, **style) -> np.ndarray:
    """Return the images (T, H, W, 3) that show_frames draws."""
    _, axes = show_frames(attributions, frames, style=Style(**style), use_pyplot=False)
    return np.stack([np.asarray(image.get_array()) for image in axes.images])


# Colors.


@in_one_case()
@pytest.mark.parametrize("sign", ["absolute_value", "positive", "negative", "all"])
@pytest.mark.parametrize("method", ["blended_heat_map", "heat_map"])
def test_zero_map_is_drawn_in_one_color(sign, method):
    assert saliency(np.zeros((T, H, W)), sign).scale == 0
    pictures = drawn(torch.zeros(1, T, 3, H, W), sign=sign, method=method)
    assert len(np.unique(pictures.reshape(-1, 3), axis=0)) == 1


def test_different_number_of_frames_raises():
    with pytest.raises(ValueError, match=r"as many frames as the clip, 8, got 4 \(shape \(4, 24, 32\)\)"):
        show_frames(torch.zeros(4, H, W), GRAY, use_pyplot=False)
    with pytest.raises(ValueError, match="as many frames as the clip, 8, got 4"):
        show_timeline(torch.zeros(4), GRAY, use_pyplot=False)


def test_colors_at_known_pixels():
    pictures = drawn(block(), outlier_perc=0, alpha_overlay=0.6)
    inferno = matplotlib.colormaps["inferno"]
    for frame, value in ((2, 1.0), (5, 0.5)):
        expected = 0.4 * 128 + 0.6 * 255 * np.array(inferno(value)[:3])
        np.testing.assert_allclose(pictures[frame, 5, 22], expected, atol=2)
    untouched = np.ones((T, H, W), dtype=bool)
    untouched[[2, 5], 4:8, 20:28] = False
    assert (pictures[untouched] == 128).all()


def test_signs_use_the_two_sides_of_the_diverging_map():
    attributions = block()
    attributions[:, 5] *= -2
    pictures = drawn(attributions, sign="all", method="heat_map", outlier_perc=0)
    for frame, value in ((2, 1.0), (5, 0.0), (0, 0.5)):
        np.testing.assert_allclose(pictures[frame, 5, 22], 255 * np.array(DIVERGING(value)[:3]), atol=2)
    pictures = drawn(attributions, sign="all", outlier_perc=0, alpha_overlay=0.6)
    np.testing.assert_allclose(pictures[5, 5, 22], 0.4 * 128 + 0.6 * 255 * np.array(DIVERGING(0.0)[:3]), atol=2)


def test_diverging_map_is_perceptually_uniform_with_neutral_zero():
    rgb = DIVERGING(np.linspace(0, 1, 65))[:, :3]
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16
    assert np.ptp(rgb[32]) < 0.01
    np.testing.assert_allclose(lightness, lightness[::-1], atol=2)
    np.testing.assert_allclose(np.diff(lightness[32:]), 66 / 32, atol=0.7)


def test_masked_image_is_the_frame_times_the_map():
    pictures = drawn(block(), method="masked_image", outlier_perc=0)
    assert pictures[2, 5, 22].tolist() == [128] * 3
    assert pictures[5, 5, 22].tolist() == [64] * 3
    assert pictures[0].max() == 0


def test_alpha_scaling_fades_to_white():
    pictures = drawn(block(), method="alpha_scaling", outlier_perc=0)
    assert pictures[2, 5, 22].tolist() == [128] * 3
    assert pictures[5, 5, 22].tolist() == [192] * 3
    assert pictures[0].min() == 255


@pytest.mark.parametrize("method", ["blended_heat_map", "heat_map", "masked_image", "alpha_scaling"])
def test_pixels_outside_of_the_crop_are_gray(method):
    small = torch.ones(T, 4, 4)
    pictures = drawn(small, Frames(PIXELS, crop=(2, 8, 16, 16)), method=method)
    inside = np.zeros((H, W), dtype=bool)
    inside[2:18, 8:24] = True
    outside = 0.35 * 128 + 0.65 * 255 * UNSEEN if method == "blended_heat_map" else 255 * UNSEEN
    assert np.abs(pictures[:, ~inside] - outside).max() <= 1
    assert np.abs(pictures[:, inside] - outside).min(-1).max() > 20


def test_color_bar_matches_the_blended_frames():
    style = Style(outlier_perc=0)
    result = overlay(block(), GRAY, style=style)
    assert np.abs(np.array(style.bar_colors(0.5)[:3]) * 255 - result.picture(5)[5, 22]).max() <= 3
    assert result.caption == "|attribution|; full color = 1, in all frames"


@in_one_case()
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "alpha"}, "'alpha'"),
        ({"sign": "both"}, "'both'"),
        ({"alpha_overlay": 1.5}, "1.5"),
        ({"outlier_perc": 101}, "101"),
        ({"cmap": "none of these"}, "none of these"),
        ({"method": "masked_image", "sign": "all"}, "sign must be .*masked_image.*got 'all'"),
        ({"method": "alpha_scaling", "sign": "all"}, "sign must be .*alpha_scaling.*got 'all'"),
    ],
)
def test_invalid_styles_raise_value_error(options, says):
    with pytest.raises(ValueError, match=says):
        Style(**options)


@pytest.mark.parametrize(
    ("options", "says"), [({"columns": 0}, "columns .* 0"), ({"num_frames": -1}, "num_frames .* -1")]
)
def test_invalid_counts_raise_before_a_figure_is_created(options, says):
    with pytest.raises(ValueError, match=says):
        show_frames(block(), GRAY, **options)
    assert pyplot.get_fignums() == []


def test_only_original_image_works_without_attributions():
    with pytest.raises(ValueError, match=r"attributions must be given .* got None"):
        show_frames(None, GRAY, use_pyplot=False)
    _, axes = show_frames(None, GRAY, style=Style(method="original_image"), use_pyplot=False)
    assert (np.asarray(axes.images[3].get_array()) == 128).all()


# Contact sheets and timelines as figures.


def rendered(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def test_frames_are_in_reading_order_with_labels_above():
    levels = np.linspace(20, 230, T).astype(np.uint8)
    clip = np.broadcast_to(levels[:, None, None, None], (T, H, W, 3)).copy()
    clip[:, H // 2 :] = 0  # the lower half is black
    figure, axes = show_frames(None, clip, style=Style(method="original_image"), columns=3, use_pyplot=False)
    assert [text.get_text() for text in axes.texts] == [f"frame {i}" for i in range(T)]
    picture = rendered(figure)
    positions = []
    for image, text, level in zip(axes.images, axes.texts, levels, strict=True):
        left, right, *ends = image.get_extent()
        top, bottom = sorted(ends)  # the sheet's y axis points down
        for part, color in ((0.25, level), (0.75, 0)):  # the frame is where the sheet says, and upright
            x, y = axes.transData.transform(((left + right) / 2, top + part * (bottom - top)))
            assert picture[len(picture) - int(y), int(x)].tolist() == [color] * 3
        assert text.get_position()[0] == left
        assert text.get_position()[1] < top  # above
        positions.append((round(len(picture) - y), round(x)))
    assert positions == sorted(positions)
    assert len({row for row, _ in positions}) == 3


def test_labels_use_frame_numbers_and_times_of_the_file():
    def labels(num_frames=None, **known):
        _, axes = show_frames(block(), replace(GRAY, **known), num_frames=num_frames, use_pyplot=False)
        return [text.get_text() for text in axes.texts]

    indices = range(5, 85, 10)
    assert labels(indices=indices)[:2] == ["frame 5", "frame 15"]
    assert labels(indices=indices, fps=25)[:2] == ["0.20 s", "0.60 s"]
    assert labels(num_frames=4) == ["frame 1", "frame 3", "frame 5", "frame 7"]
    assert labels(labels="abcdefgh", num_frames=2) == ["c", "g"]


def test_use_pyplot_false_creates_no_pyplot_figure():
    from matplotlib import pyplot

    show_frames(block(), GRAY, use_pyplot=False)
    show_timeline(torch.ones(T), use_pyplot=False)
    assert pyplot.get_fignums() == []
    figure, _ = show_frames(block(), GRAY)
    assert pyplot.get_fignums() == [figure.number]


def test_plt_fig_axis_is_used():
    figure = Figure()
    upper, lower = figure.subplots(2)
    assert show_frames(block(), GRAY, plt_fig_axis=(figure, upper)) == (figure, upper)
    assert show_timeline(torch.ones(T), plt_fig_axis=(figure, lower)) == (figure, lower)
    assert len(upper.images) == T
    assert lower.lines


def test_timeline_sums_over_the_pixels_of_each_frame():
    attributions = block()
    attributions[:, 6, :, 0, 0] = -1
    _, axes = show_timeline(attributions, replace(GRAY, fps=4), use_pyplot=False)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0, 0, 32, 0, 0, 16, -3, 0], atol=1e-4)
    np.testing.assert_allclose(axes.lines[0].get_xdata(), np.arange(T) / 4)
    _, axes = show_timeline(attributions, GRAY, sign="negative", use_pyplot=False)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [0, 0, 0, 0, 0, 0, 3, 0], atol=1e-4)
    parts = VideoAttribution.from_attributions(attributions, "BTCHW")
    with pytest.raises(ValueError, match=r"indices must be strictly increasing.*\[3, 3"):
        show_timeline(parts, Frames(PIXELS, indices=np.full(8, 3)), use_pyplot=False)
    _, axes = show_timeline(parts, Frames(PIXELS, indices=range(0, 80, 10)), use_pyplot=False)
    np.testing.assert_allclose(axes.lines[0].get_ydata(), parts.temporal[0])
    np.testing.assert_allclose(axes.lines[0].get_xdata(), np.arange(0, 80, 10))


@pytest.mark.parametrize("truth", [[(2, 3), (6, 6)], torch.tensor([0, 0, 1, 1, 0, 0, 1, 0]).bool()])
def test_truth_is_shaded(truth):
    _, axes = show_timeline(torch.ones(T), truth=truth, use_pyplot=False)
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert edges == [(1.5, 3.5), (5.5, 6.5)]


@pytest.mark.parametrize("truth", [[(3, 8)], [(4, 2)], [1, 2, 3], np.zeros(9, dtype=bool)])
def test_invalid_truth_raises_value_error(truth):
    with pytest.raises(ValueError, match="truth"):
        show_timeline(torch.ones(T), truth=truth, use_pyplot=False)


def test_key_frames_are_the_strongest_of_equal_parts():
    values = torch.tensor([0.0, 3, 1, 2, -5, 1, 0, 1])
    figure, axes = show_timeline(values, GRAY, num_key_frames=4, title="a clip", use_pyplot=False)
    ties = [artist for artist in axes.artists if hasattr(artist, "xyann")]
    assert [tuple(float(value) for value in tie.xy) for tie in ties] == [(1, 3), (3, 2), (4, -5), (7, 1)]
    rendered(figure)
    height = figure.bbox.height
    title = axes.title.get_window_extent()
    for tie in ties:  # above the curve, below the title, and nothing is cut off
        box = tie.offsetbox.get_window_extent()
        assert axes.bbox.y1 < box.y0
        assert box.y1 < title.y0
        assert title.y1 <= height


def test_real_clip_with_center_crop(shared_videos):
    """A clip of 426 x 240 with a center crop of 240 x 240: one token of a 14 x 14 grid is drawn at its place."""
    video = io.read_video(shared_videos / "flipping_a_pancake.mkv", num_frames=8)
    frames = replace(Frames.from_video(video), crop=(0, 93, 240, 240))
    maps = torch.zeros(8, 14, 14)
    maps[3, 4, 9] = 1
    found = overlay(maps, frames, style=Style(method="masked_image", outlier_perc=0))
    rows, columns = np.nonzero(found.picture(3)[:, 93:333].max(-1))
    cell = 240 / 14
    assert rows.min() >= 3.4 * cell - 1
    assert rows.max() <= 5.6 * cell + 1
    assert columns.min() >= 8.4 * cell - 1
    assert columns.max() <= 10.6 * cell + 1
    figure, axes = show_frames(maps, frames, use_pyplot=False)
    assert axes.texts[0].get_text() == "0.63 s"
    assert rendered(figure).std() > 10
