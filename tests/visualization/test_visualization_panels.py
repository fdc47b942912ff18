"""Figures with several panels: comparison of methods, summary of an explanation, space-time slices."""

from __future__ import annotations

import itertools
from dataclasses import replace
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from captum_staa.result import VideoAttribution
from captum_staa.visualization import (
    Frames,
    Style,
    compare_methods,
    overlay,
    show_slices,
    show_summary,
    show_timeline,
)

T, H, W = 8, 24, 32
PIXELS = np.random.default_rng(0).integers(0, 255, (T, H, W, 3), dtype=np.uint8)
CLIP = Frames(PIXELS, layout="BTCHW")


def block() -> torch.Tensor:
    """(1, T, 3, H, W): in rows 4..7, columns 20..27, 1 per pixel in frame 2 and half of that against in frame 5."""
    attributions = torch.zeros(1, T, 3, H, W)
    attributions[:, 2, :, 4:8, 20:28] = 1 / 3
    attributions[:, 5, :, 4:8, 20:28] = -1 / 6
    return attributions


def rendered(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def pictures(axes) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in axes.images]


def words(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def overlaps(figure, texts) -> list[tuple[str, str]]:
    """Return pairs of texts that overlap, and texts that exceed the figure."""
    rendered(figure)
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    found = [(a, b) for i, (a, one) in enumerate(boxes) for b, two in boxes[:i] if one.overlaps(two)]
    edge = figure.bbox.padded(1)
    return found + [(a, "edge") for a, box in boxes if not (edge.x0 <= box.x0 and box.x1 <= edge.x1)]


# Methods beside each other.


def test_comparison_has_a_row_and_a_scale_per_method():
    maps = {"small": block() / 1000, "large": 1000 * block().flip(1), "none": torch.zeros(1, T, H, W)}
    clip = Frames(PIXELS, indices=range(0, 80, 10), fps=10, layout="BTCHW")
    figure, axes = compare_methods(maps, clip, num_frames=4, use_pyplot=False)
    found = pictures(axes)
    chosen = [1, 3, 5, 7]
    for column, frame in enumerate(chosen):
        assert np.array_equal(found[column], PIXELS[frame])
        for row, values in enumerate(maps.values(), start=1):
            expected = overlay(values, CLIP).picture(frame)
            assert np.array_equal(found[4 * row + column], expected)
    assert words(axes)[:4] == ["frame 10\n1.00 s", "frame 30\n3.00 s", "frame 50\n5.00 s", "frame 70\n7.00 s"]
    assert words(axes)[4:] == [
        "clip",
        "small\nfull color = 0.001",
        "large\nfull color = 1e+03",
        "none\nzero everywhere",
    ]
    assert overlaps(figure, axes.texts) == []


def test_frames_of_a_comparison_are_aligned_in_rows_and_columns():
    _, axes = compare_methods({"a": block(), "b": block()}, CLIP, num_frames=None, use_pyplot=False)
    corners = np.array([image.get_extent() for image in axes.images]).reshape(3, T, 4)
    assert (np.diff(corners[:, :, 0], axis=1) > 0).all()  # to the right
    assert (np.ptp(corners[:, :, 0], axis=0) < 1e-9).all()  # in columns
    assert (np.diff(corners[:, :, 3], axis=0) > 0).all()  # and down, on a sheet whose y axis points down
    assert axes.yaxis_inverted()
    aspect = (corners[..., 1] - corners[..., 0]) / (corners[..., 2] - corners[..., 3])
    np.testing.assert_allclose(aspect, W / H)


def test_long_names_and_many_frames_do_not_overlap():
    maps = {f"a rather long name, the {n}th of its kind": block() for n in range(4)}
    figure, axes = compare_methods(maps, CLIP, title="A title", use_pyplot=False)
    assert overlaps(figure, [axes.title, *axes.texts]) == []


LONG = [
    "IntegratedGradients",
    "SpatioTemporalPerturbation of five areas",
    "NoiseTunnel(IntegratedGradients, smoothgrad)",
    "a_snake_case_name_that_goes_on_to_45_letters_",
    "GuidedGradCAM++/layer4.2.conv3",
    "w" * 45,
]


@pytest.mark.parametrize("count", [2, 8, pytest.param(20, marks=pytest.mark.slow)])
def test_names_break_between_words_and_fit_their_rows(count):
    names = [f"{LONG[at % len(LONG)]}{at or ''}" for at in range(count)]
    maps = {name: block() for name in names}
    figure, axes = compare_methods(maps, CLIP, num_frames=2, use_pyplot=False)
    assert overlaps(figure, axes.texts) == []
    labels = [text.get_text().split("\n") for text in axes.texts[-count:]]
    for name, (*lines, scale) in zip(names, labels, strict=True):
        assert scale == "full color = 1"
        assert "".join(lines).replace(" ", "") == name.replace(" ", "")
        for before, after in itertools.pairwise(lines):
            joined = f"{before[-1]}{after[0]}"
            camel = joined[0].islower() and joined[1].isupper()
            assert camel or f"{before} {after}" in name or joined[0] in "-_/,.:", (before, after)


def test_error_begins_with_the_name_of_the_method():
    with pytest.raises(ValueError, match=r"^second: attributions must have as many frames as the clip, 8, got 4"):
        compare_methods({"first": torch.zeros(T, H, W), "second": torch.zeros(4, H, W)}, CLIP, use_pyplot=False)
    with pytest.raises(TypeError, match=r"must be a dict .*, got Tensor. .*show_frames"):
        compare_methods(torch.zeros(T, H, W), CLIP, use_pyplot=False)
    with pytest.raises(TypeError, match="at least one"):
        compare_methods({}, CLIP, use_pyplot=False)


# One page per explanation.


def summary(attributions, clip=CLIP, **options):
    figure, axes = show_summary(attributions, clip, use_pyplot=False, **options)
    return figure, axes, dict(zip(("rows", "key", "where", "when", "answer"), axes.child_axes, strict=False))


def test_summary_draws_the_strongest_frames_of_equal_parts():
    _, _, panels = summary(block(), num_frames=2)
    assert words(panels["rows"])[:2] == ["frame 2", "frame 5"]
    clip_2, clip_5, map_2, map_5 = pictures(panels["rows"])
    assert np.array_equal(clip_2, PIXELS[2])
    assert np.array_equal(clip_5, PIXELS[5])
    expected = overlay(block(), CLIP)
    assert np.array_equal(map_2, expected.picture(2))
    assert np.array_equal(map_5, expected.picture(5))


def test_summary_draws_the_spatial_map_on_the_average_frame():
    style = Style(alpha_overlay=0.0)  # the frame alone
    _, _, panels = summary(block(), style=style)
    (shown,) = pictures(panels["where"])
    average = Frames(PIXELS.mean(0).round().astype(np.uint8)[None])
    assert np.array_equal(shown, overlay(np.ones((1, H, W)), average, style=style).picture(0))


def test_summary_draws_sums_over_time_and_space():
    """The spatial map is the sum over frames; the timeline draws evidence against the class below the axis."""
    _, _, panels = summary(block(), style=Style(method="heat_map", outlier_perc=0))
    (where,) = pictures(panels["where"])
    lit = (where != where[0, 0]).any(-1)
    assert np.argwhere(lit).min(0).tolist() == [4, 20]
    assert np.argwhere(lit).max(0).tolist() == [7, 27]
    assert panels["where"].get_xlabel() == "sum over frames\nfull color = 0.5"
    np.testing.assert_allclose(panels["when"].lines[0].get_ydata(), [0, 0, 32, 0, 0, -16, 0, 0], atol=1e-4)
    _, _, panels = summary(block(), style=Style(sign="negative"))
    np.testing.assert_allclose(panels["when"].lines[0].get_ydata(), [0, 0, 0, 0, 0, 16, 0, 0], atol=1e-4)


def test_summary_uses_spatial_and_temporal_parts_of_video_attribution():
    """For STAA, the spatial and temporal parts are not sums of the joint part."""
    joint = VideoAttribution.from_attributions(block(), "BTCHW").joint
    spatial, temporal = torch.zeros(2, H, W), torch.arange(2.0 * T).view(2, T)
    spatial[1, 20, 3] = 5
    parts = VideoAttribution(torch.cat([0 * joint, joint]), spatial, temporal)
    _, _, panels = summary(parts, Frames(PIXELS, index=1), style=Style(method="heat_map", outlier_perc=0))
    (where,) = pictures(panels["where"])
    assert np.argwhere((where != where[0, 0]).any(-1)).tolist() == [[20, 3]]
    np.testing.assert_allclose(panels["when"].lines[0].get_ydata(), np.arange(T, 2 * T))


def test_the_curve_of_a_sign_sums_the_pixels_that_are_drawn():
    """The net value of a frame, the temporal part of most methods, is drawn for both signs only."""
    maps = VideoAttribution.from_attributions(block() + block().flip(-1).roll(3, 1), "BTCHW")
    for sign, expected in (("positive", [32, 32]), ("negative", [0, 16]), ("all", [32, 16])):
        when = summary(maps, style=Style(sign=sign))[2]["when"]
        np.testing.assert_allclose(when.lines[0].get_ydata()[[2, 5]], expected, atol=1e-4)


def test_prediction_bars_have_the_length_of_the_probability():
    answer = [("a label that is by far too long for this panel", 0.5), ("b", 0.3), *[(f"c{n}", 0.02) for n in range(8)]]
    figure, axes, panels = summary(block(), replace(CLIP, fps=5), predictions=answer, target="b", title="t")
    bars = panels["answer"].patches
    assert [bar.get_width() for bar in bars] == [0.5, 0.3, 0.02, 0.02, 0.02]
    colors = [bar.get_facecolor() for bar in bars]
    assert colors.count(colors[1]) == 1  # the explained class alone
    texts = [
        text for panel in axes.child_axes for text in (*panel.texts, panel.title, panel.xaxis.label, panel.yaxis.label)
    ]
    assert overlaps(figure, [axes.title, *texts]) == []
    assert len(summary(block())[2]) == 4
    with pytest.raises(ValueError, match=r"probability in \[0, 1\].*\('b', 30\)"):
        summary(block(), predictions=[("b", 30)])


def test_summary_of_two_classes_has_one_scale_and_a_panel_for_each():
    maps = {"waving": block(), "clapping": 4 * block().roll(3, 1)}
    style = Style(method="heat_map", outlier_perc=0, sign="positive")
    answer = [("jumping", 0.5), ("clapping", 0.3), ("waving", 0.2)]
    _, axes = show_summary(maps, CLIP, style=style, num_frames=2, predictions=answer, use_pyplot=False)
    rows, key, *where, predictions, when = axes.child_axes
    assert words(rows) == ["frame 2", "frame 5", "clip", "waving", "clapping"]
    strongest = 4 * block()  # has the color 1 in the map of its class
    for at, (name, factor) in enumerate((("waving", 1), ("clapping", 4)), start=1):
        joint = np.clip(maps[name][0].sum(1).numpy() / float(strongest.sum(2).max()), 0, 1)
        expected = [(style.colors(joint[frame])[..., :3] * 255).round() for frame in (2, 5)]
        shown = pictures(rows)[2 * at : 2 * at + 2]
        assert all(np.abs(a - b).max() <= 1 for a, b in zip(shown, expected, strict=True)), (name, factor)
    assert "full color = 4, in all frames and classes" in key.get_xlabel()
    assert [panel.get_title() for panel in where] == ["where: waving", "where: clapping"]
    assert len({panel.get_xlabel() for panel in where}) == 1
    np.testing.assert_allclose(when.lines[0].get_ydata(), [0, 0, 32, 0, 0, 0, 0, 0], atol=1e-4)
    curves = {line.get_label(): line for line in when.lines if not line.get_label().startswith("_")}
    np.testing.assert_allclose(curves["clapping"].get_ydata(), [0, 0, 0, 0, 0, 128, 0, 0], atol=1e-4)
    colors = [matplotlib.colors.to_hex(bar.get_facecolor()) for bar in predictions.patches]
    assert colors[1:] == [curves["clapping"].get_color(), curves["waving"].get_color()] and colors[0] not in colors[1:]
    with pytest.raises(ValueError, match=r"^clapping: attributions must have as many frames"):
        show_summary(maps | {"clapping": torch.zeros(4, H, W)}, CLIP, use_pyplot=False)


@pytest.mark.parametrize(
    "names", [("a", "b"), ("a class with a label that is far too long", "another of its kind", "c")]
)
def test_summary_of_several_classes_has_no_overlapping_text(names):
    maps = {name: torch.rand(T, H, W) for name in names}
    answer = [(name, 0.3) for name in names]
    options = {"predictions": answer, "truth": [(2, 4)], "title": "t", "use_pyplot": False}
    figure, axes = show_summary(maps, Frames(PIXELS, fps=5), **options)
    texts = [
        text for panel in axes.child_axes for text in (*panel.texts, panel.title, panel.xaxis.label, panel.yaxis.label)
    ]
    legend = axes.child_axes[-1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [*names, "frames with evidence"]
    assert overlaps(figure, [axes.title, *texts, *legend.get_texts()]) == []


@pytest.mark.parametrize("size", [(40, 24), (24, 90)])
def test_summary_of_tall_or_wide_frames_has_no_overlapping_text(size):
    clip = Frames(np.zeros((T, *size, 3), dtype=np.uint8), fps=30)
    maps = torch.rand(T, *size)
    figure, axes = show_summary(maps, clip, predictions=[("b", 0.3)], truth=[(2, 4)], use_pyplot=False)
    texts = [
        text for panel in axes.child_axes for text in (*panel.texts, panel.title, panel.xaxis.label, panel.yaxis.label)
    ]
    assert overlaps(figure, texts) == []


def test_plt_fig_axis_is_used():
    figure = Figure(figsize=(10, 20))
    upper, middle, lower = figure.subplots(3)
    assert show_summary(block(), CLIP, plt_fig_axis=(figure, upper)) == (figure, upper)
    assert compare_methods({"a": block()}, CLIP, plt_fig_axis=(figure, middle)) == (figure, middle)
    assert show_slices(block(), CLIP, plt_fig_axis=(figure, lower)) == (figure, lower)
    assert len(matplotlib.pyplot.get_fignums()) == 0
    assert upper.child_axes
    assert middle.images
    assert lower.child_axes


# Cuts through space and time.


def test_slices_are_a_row_and_a_column_over_time():
    _, axes = show_slices(block(), CLIP, at=(2, 5, 22), use_pyplot=False)
    over = overlay(block(), CLIP).pictures
    for group, frames in ((0, PIXELS), (3, over)):
        (frame,), (x_t,), (y_t,) = (pictures(panel) for panel in axes.child_axes[group : group + 3])
        assert np.array_equal(frame, frames[2])
        assert np.array_equal(x_t, frames[:, 5])
        assert np.array_equal(y_t, frames[:, :, 22].swapaxes(0, 1))
    frame, x_t, y_t = axes.child_axes[:3]
    assert x_t.get_xlim() == frame.get_xlim() == (0, W)  # so that places stand below each other
    assert y_t.get_ylim() == frame.get_ylim() == (H, 0)
    assert x_t.get_ylim() == (T, 0)  # time runs down
    assert y_t.get_xlim() == (0, T)  # and to the right
    assert [line.get_xdata()[0] for line in frame.lines[:1]] == [22.5]
    assert [line.get_ydata()[0] for line in x_t.lines[1:]] == [2.5]


def test_default_slices_pass_through_the_strongest_pixel():
    maps = torch.zeros(T, 4, 4)
    maps[6, 1, 2] = -1.0
    _, axes = show_slices(maps, Frames(PIXELS, (4, 8, 16, 16), fps=2), style=Style(sign="all"), use_pyplot=False)
    frame = axes.child_axes[0]
    column, row = frame.lines[0].get_xdata()[0], frame.lines[1].get_ydata()[0]
    assert 4 + 4 <= row <= 4 + 8
    assert 8 + 8 <= column <= 8 + 12
    assert frame.get_title() == "clip, 3.00 s"
    assert [tick.get_text() for tick in axes.child_axes[1].get_yticklabels()] == ["0.00", "2.00", "3.50"]


def test_motion_is_a_slanted_line_in_a_slice():
    clip = np.zeros((T, H, W, 3), dtype=np.uint8)
    for t in range(T):
        clip[t, 10, 3 * t] = 255
    _, axes = show_slices(torch.ones(T, H, W), clip, at=(0, 10, 0), use_pyplot=False)
    (x_t,) = pictures(axes.child_axes[1])
    assert np.argwhere(x_t[..., 0]).tolist() == [[t, 3 * t] for t in range(T)]


@pytest.mark.parametrize("at", [(T, 0, 0), (0, H, 0), (0, 0, W), (-1, 0, 0)])
def test_slices_outside_of_the_clip_raise(at):
    with pytest.raises(ValueError, match=r"at must be \(frame, row, column\) within \(8, 24, 32\), got"):
        show_slices(block(), CLIP, at=at, use_pyplot=False)


# Timelines of many frames.


@pytest.mark.parametrize(("total", "dots"), [(40, 40), (300, 6)])
def test_dots_do_not_overlap(total, dots):
    values = torch.sin(torch.arange(float(total)))
    figure, axes = show_timeline(values, np.zeros((total, 4, 4, 3), dtype=np.uint8), use_pyplot=False)
    rendered(figure)
    (marks,) = axes.collections[-1:]
    spots = axes.transData.transform(marks.get_offsets())[:, 0]
    assert len(spots) == dots
    diameter = np.sqrt(marks.get_sizes()[0]) * figure.dpi / 72
    assert np.diff(np.sort(spots)).min() > diameter


# What a notebook shows of a result.


def test_notebook_repr_shows_spatial_and_temporal_parts():
    parts = VideoAttribution.from_attributions(torch.cat([block()] * 6), "BTCHW")
    text = parts._repr_html_()
    assert text.startswith("<div>VideoAttribution: 6 clips of 8 frames, 24 × 32;")
    assert "in the first 4 clips" in text
    assert text.count("<svg") == 2 * 4
    where, when = ElementTree.fromstring(text).findall(".//svg")[:2]
    cells = [(float(r.get("x")), float(r.get("y")), r.get("fill")) for r in where.findall("rect")]
    assert where.get("viewBox") == "0 0 24 24"
    assert {fill for *_, fill in cells} == {"#d47801"}  # 1 - 0.5: for
    assert min(x for x, *_ in cells) == 20 * 24 // 32
    assert max(x for x, *_ in cells) == 27 * 24 // 32
    assert {y for _, y, _ in cells} == {4, 5, 6, 7}
    bars = [(float(r.get("y")), float(r.get("height")), r.get("fill")) for r in when.findall("rect")]
    assert bars[2] == (0, 1, "#d47801")
    assert bars[5] == (1, 0.5, "#0298db")
    assert len(bars) == T
    assert when.get("viewBox") == "0 0 8 1.5"
    assert (
        "nan" in VideoAttribution.from_attributions(torch.full((1, T, 3, H, W), torch.nan), "BTCHW")._repr_html_()
    )  # shown, not raised
