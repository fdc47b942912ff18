"""The HTML player as text: its data, its errors and its file. test_html.py runs it in a browser."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from covering import in_one_case
from PIL import Image

from captum_staa import io
from captum_staa.result import VideoAttribution
from captum_staa.visualization import Frames, Style, to_html
from captum_staa.visualization.figure import DIVERGING
from captum_staa.visualization.saliency import saliency

T, H, W = 5, 24, 32
CLIP = np.random.default_rng(0).integers(0, 255, (T, H, W, 3), dtype=np.uint8)
SIGNED = np.random.default_rng(1).normal(size=(T, 6, 8)).astype(np.float32)


def held(page: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def frames(data: dict) -> np.ndarray:
    pictures = [Image.open(BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in data["frames"]]
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def unpacked(explanation: dict) -> np.ndarray:
    """(T, h, w), signed."""
    (panel,) = explanation["panels"]
    planes = np.frombuffer(zlib.decompress(base64.b64decode(panel["packed"])), np.uint8)
    planes = planes.reshape(2, -1, *panel["size"]) / 255.0
    return panel["peaks"][0] * planes[0] ** 2 - panel["peaks"][1] * planes[1] ** 2


def test_small_frames_are_lossless_and_large_frames_are_reduced():
    assert np.array_equal(frames(held(to_html(SIGNED, CLIP))), CLIP)
    levels = np.linspace(30, 220, T).astype(np.uint8)
    large = np.broadcast_to(levels[:, None, None, None], (T, 300, 400, 3)).copy()
    large[:, :, 200:] = 0
    data = held(to_html(SIGNED, Frames(large, crop=(0, 100, 300, 200)), max_size=150))
    shown = frames(data)
    assert shown.shape == (T, 150, 200, 3)
    assert (data["height"], data["width"]) == (150, 200)
    assert data["crop"] == [0, 50, 150, 100]
    np.testing.assert_allclose(shown[:, :, :90].mean((1, 2, 3)), levels, atol=2)
    assert shown[:, :, 110:].max() < 5


def test_packed_map_has_small_rounding_error():
    (explanation,) = held(to_html(SIGNED, CLIP, style=Style(outlier_perc=0)))["explanations"]
    np.testing.assert_allclose(unpacked(explanation), SIGNED, atol=0.004 * np.abs(SIGNED).max())


@pytest.mark.parametrize("unit", [1e-50, 1e50])
def test_values_beyond_float32_are_kept(unit):
    (explanation,) = held(to_html(unit * SIGNED.astype(np.float64), CLIP, style=Style(outlier_perc=0)))["explanations"]
    np.testing.assert_allclose(unpacked(explanation) / unit, SIGNED, atol=0.004 * np.abs(SIGNED).max())
    assert explanation["scales"]["all"] / unit == pytest.approx(float(np.abs(SIGNED).max()))


def test_small_values_stay_distinguishable_next_to_large_ones():
    """The positive scale is 1/100 of the negative one; half of the positive scale is still stored as half."""
    maps = np.zeros((T, H, W), np.float32)
    maps[:, 0], maps[:, 1], maps[0, 5, 5] = 1.0, 0.5, -100.0
    (explanation,) = held(to_html(maps, CLIP))["explanations"]
    assert explanation["scales"]["positive"] == 1
    assert explanation["scales"]["negative"] == 100
    np.testing.assert_allclose(unpacked(explanation)[:, 1], 0.5, atol=0.01)


@pytest.mark.parametrize("sign", ["absolute_value", "positive", "negative", "all"])
def test_scales_and_curves_equal_saliency(sign):
    maps = {"a": SIGNED, "b": SIGNED[::-1] * 1000}
    data = held(to_html(maps, CLIP, style=Style(outlier_perc=10)))
    for (name, values), entry in zip(maps.items(), data["explanations"], strict=True):
        assert entry["name"] == name
        assert entry["scales"][sign] == saliency(values.astype(np.float64), sign, 10).scale
        kept = {"absolute_value": abs(values), "positive": values.clip(0), "negative": (-values).clip(0), "all": values}
        np.testing.assert_allclose(entry["panels"][0]["curves"][sign], kept[sign].sum((1, 2)), rtol=1e-4)


def test_colors_are_the_default_of_the_sign_or_cmap():
    colors = held(to_html(SIGNED, CLIP))["colors"]
    assert np.array_equal(np.reshape(colors["all"], (256, 3)), (DIVERGING(np.arange(256), bytes=True)[:, :3]))
    asked = held(to_html(SIGNED, CLIP, style=Style(cmap="cividis")))["colors"]
    assert len({tuple(asked[sign]) for sign in asked}) == 1
    assert asked["all"] != colors["all"]


def test_curve_is_the_temporal_part_and_page_begins_at_its_maximum():
    parts = VideoAttribution(torch.ones(1, T, 6, 8), torch.ones(1, 6, 8), torch.tensor([[0.0, 1, 2, 9, 3]]))
    data = held(to_html(parts, CLIP))
    assert data["explanations"][0]["panels"][0]["curves"]["all"] == [0, 1, 2, 9, 3]
    assert data["start"] == 3


def test_zero_map_makes_a_page():
    data = held(to_html(np.zeros((T, H, W)), CLIP))
    assert set(data["explanations"][0]["scales"].values()) == {0}
    assert not unpacked(data["explanations"][0]).any()


def test_page_is_complete_and_escaped():
    page = to_html({"</script><script>alert(1)": SIGNED}, CLIP, title="<b>&$title", predictions=[("</SCRIPT>", 1)])
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert len(re.findall(r"<script", page)) == len(re.findall(r"</script", page)) == 2
    assert "</SCRIPT" not in page
    assert page.count("&lt;b&gt;&amp;$title") == 2
    shown = page._repr_html_()
    assert "<script" not in shown
    assert 'sandbox="allow-scripts"' in shown


def test_page_is_written_atomically(tmp_path):
    path = tmp_path / "page.html"
    page = to_html(SIGNED, CLIP, path, title="Größe")
    assert path.read_text("utf-8") == page
    assert os.listdir(tmp_path) == ["page.html"]
    with pytest.raises(FileExistsError, match=r"page\.html already exists.*overwrite=True"):
        to_html(SIGNED, CLIP, path)
    assert path.read_text("utf-8") == page
    assert to_html(SIGNED, CLIP, path, overwrite=True) == path.read_text("utf-8")
    with pytest.raises(FileNotFoundError, match="folder"):
        to_html(SIGNED, CLIP, tmp_path / "nowhere" / "page.html")


@in_one_case()
@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            {"attributions": torch.zeros(4, H, W)},
            ValueError,
            "^attributions must have as many frames as the clip, 5, got 4",
        ),
        (
            {"attributions": {"a": SIGNED, "b": SIGNED * np.nan}},
            ValueError,
            "^b: attributions must be finite, got nan or inf at 240 of 240 pixels",
        ),
        ({"attributions": {}}, TypeError, "at least one name"),
        (
            {"style": Style(method="original_image"), "attributions": torch.zeros(4, H, W)},
            ValueError,
            "got 4",
        ),
        ({"play_fps": 0}, ValueError, "play_fps .* 0"),
        ({"attributions": None}, TypeError, "^attributions must be a tensor or array, got None"),
        (
            {"attributions": (torch.zeros(1, T, H, W),)},
            TypeError,
            "attributions must .*, got a tuple of tensors. If Captum returned a tuple",
        ),
        ({"max_size": 0}, ValueError, "max_size .* 0"),
        ({"truth": [(3, 9)]}, ValueError, r"truth windows .* \(3, 9\)"),
        ({"predictions": [("a", 2.0)]}, ValueError, "probability"),
    ],
)
def test_invalid_arguments_raise(options, error, says):
    with pytest.raises(error, match=says):
        to_html(**{"attributions": SIGNED, "frames": CLIP, **options})


def test_page_of_a_real_clip_is_small(shared_videos, tmp_path):
    video = io.read_video(shared_videos / "flipping_a_pancake.mkv", num_frames=16)
    maps = torch.nn.functional.interpolate(torch.rand(1, 16, 14, 14), size=(224, 224), mode="bilinear")
    path = tmp_path / "real.html"
    to_html(maps, replace(Frames.from_video(video), crop=(0, 93, 240, 240)), path)
    assert 100_000 < path.stat().st_size < 1_500_000
    decoded = frames(held(path.read_text("utf-8"))).astype(int)
    assert np.abs(decoded - video.frames).mean() < 6
