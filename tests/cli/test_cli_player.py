"""The HTML player of an explanation: its frames, its maps and its size."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from covering import in_one_case
from PIL import Image

from captum_staa.cli import output
from captum_staa.cli.explanation import Explanation, Masks, MethodUsed, Prediction, SampledVideo, report
from captum_staa.io import VideoInfo
from captum_staa.result import VideoAttribution
from captum_staa.visualization import Frames
from captum_staa.visualization.saliency import saliency

T, H, W = 30, 40, 60
CROP = (0.0, 10.0, 40.0, 40.0)
FRAMES = np.random.default_rng(0).integers(0, 255, (T, H, W, 3), dtype=np.uint8)
LABELS = [f"class {k}" for k in range(8)]


def explanation(**changes) -> Explanation:
    """An explanation of every third frame of a file; positions 4, 13 and 22 are the strongest."""
    joint = torch.rand(1, T, 8, 8, generator=torch.Generator().manual_seed(0))
    for at in (4, 13, 22):
        joint[0, at] += 10
    indices = list(range(0, 3 * T, 3))
    probabilities = [0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.04, 0.01]
    given = {
        "video": SampledVideo(
            path=Path("a clip.mp4"),
            info=VideoInfo(90, 25.0, H, W),
            indices=indices,
            times=[index / 25 for index in indices],
            description="",
            crop=CROP,
            frames=FRAMES,
        ),
        "prediction": Prediction("some-model", "BCTHW", LABELS, probabilities),
        "method": MethodUsed("some method", {}, class_specific=True, apart=1),
        "target": 1,
        "target_given": True,
        "maps": VideoAttribution.from_joint(joint),
    }
    return Explanation(**{**given, **changes})


def held(shown: Explanation, truth: torch.Tensor | None = None, frames: np.ndarray = FRAMES) -> dict:
    """Return the data of the page, and its length."""
    clip = Frames(frames, CROP, shown.video.indices, shown.video.constant_fps)
    text = output.page(shown, range(T), clip, truth)
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    assert found is not None
    return {**json.loads(found[1]), "length": len(text)}


def shown(data: dict) -> list[int]:
    """Return the positions of the frames by their pixels; small frames are stored losslessly."""
    found = []
    for uri in data["frames"]:
        picture = np.asarray(Image.open(BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
        found.append(int(np.flatnonzero((picture == FRAMES).all((1, 2, 3)))[0]))
    return found


def test_page_contains_all_frames_of_a_short_clip():
    truth = torch.zeros(T, dtype=torch.bool)
    truth[5:9] = True
    data = held(explanation(), truth)
    assert shown(data) == list(range(T))
    assert data["crop"] == list(CROP) and (data["height"], data["width"]) == (H, W)
    assert data["labels"][:2] == ["frame 0, 0.00 s", "frame 3, 0.12 s"]
    assert [entry["name"] for entry in data["explanations"]] == ["some method"]
    assert data["truth"] == [[5, 8]]
    assert [label for label, _ in data["predictions"]] == LABELS[:5]
    assert data["explanations"][0]["bars"] == {"1": 0}
    assert data["fps"] == pytest.approx(25 / 3)


def test_each_mask_is_a_separate_explanation():
    masks = torch.zeros(2, T, 8, 8)
    masks[0, 7], masks[1, 7:9] = 1, 1
    learned = Masks(masks, [0.05, 0.5], "probability", [0.05, 0.5], 0.9, [0.8, 0.9], [0.2, 0.1], 30)
    found = held(explanation(masks=learned))["explanations"]
    assert [entry["name"] for entry in found] == ["some method", "mask, area 0.05", "mask, area 0.5"]
    curves = [entry["panels"][0]["curves"]["all"] for entry in found]
    assert [np.flatnonzero(curve).tolist() for curve in curves[1:]] == [[7], [7, 8]]


def test_two_classes_stand_beside_each_other_with_one_scale():
    for_one = explanation().maps
    against = VideoAttribution.from_joint(3 * for_one.joint.flip(1) - 1)
    used = MethodUsed("some method", {"versus": "class 6"}, class_specific=True, apart=1)
    data = held(explanation(method=used, other=6, other_maps=against))
    assert data["predictions"][5:] == [["class 6", 0.04]]  # not among the five most probable
    (entry,) = data["explanations"]
    assert entry["name"] == "some method" and [panel["name"] for panel in entry["panels"]] == ["class 1", "class 6"]
    assert entry["bars"] == {"1": 0, "5": 1}
    for panel, maps in zip(entry["panels"], (for_one, against), strict=True):
        positive = maps.joint[0].clamp(min=0).sum((1, 2))  # what the colors show, not what is left of it
        np.testing.assert_allclose(panel["curves"]["positive"], positive, rtol=1e-5)
    each = [saliency(maps.joint[0].double().numpy(), "positive").scale for maps in (for_one, against)]
    assert entry["scales"]["positive"] == pytest.approx(max(each)) and min(each) < max(each)
    assert (
        output.title_of(explanation(method=used, other=6))
        == "class 1 (20%) rather than class 6, some method, a clip.mp4"
    )
    rest = explanation(method=MethodUsed("some method", {"versus": "rest"}, class_specific=True, apart=1))
    assert "class 1 (20%) rather than the rest" in output.title_of(rest) and rest.classes == {}


def test_predictions_include_the_target_of_class_specific_maps():
    unlikely = held(explanation(target=7))
    assert unlikely["predictions"][5] == ["class 7", 0.01] and unlikely["explanations"][0]["bars"] == {"5": 0}
    without_class = held(explanation(method=MethodUsed("some method", {}, class_specific=False, apart=1)))
    assert without_class["explanations"][0]["bars"] == {}


def test_long_clip_is_reduced_to_the_strongest_frames(monkeypatch):
    monkeypatch.setattr(output, "PAGE_FRAMES", 3)
    data = held(explanation())
    assert shown(data) == [4, 13, 22]
    assert data["labels"][1] == "frame 39, 1.56 s"


def test_large_page_gets_smaller_frames_and_then_fewer_frames(monkeypatch):
    whole = held(explanation())["length"]
    monkeypatch.setattr(output, "PAGE_EDGE", 20)
    bare = held(
        explanation(video=dataclasses.replace(explanation().video, frames=FRAMES[:1])), frames=np.zeros_like(FRAMES)
    )["length"]
    monkeypatch.setattr(output, "PAGE_BYTES", whole - 1)
    smaller = held(explanation())
    assert (len(smaller["frames"]), smaller["height"], smaller["width"]) == (T, 20, 30)
    assert smaller["crop"] == [0, 5, 20, 20] and smaller["length"] < whole

    monkeypatch.setattr(output, "PAGE_BYTES", (bare + smaller["length"]) // 2)
    fewer = held(explanation())
    assert fewer["length"] <= (bare + smaller["length"]) // 2
    assert 1 < len(fewer["frames"]) < T and fewer["height"] == 20

    monkeypatch.setattr(output, "PAGE_BYTES", 1)
    assert len(held(explanation())["frames"]) == 1  # the loop ends


@in_one_case()
@pytest.mark.parametrize(
    ("temporal", "said"),
    [
        ([-5.0, 3.0, 1.0, 0.0], "strongest: 0.12 s (1.3 times the average magnitude of a frame)"),
        ([1.0, 5.0, 1.0, 1.0], "strongest: 0.12 s (2.5 times the average frame)"),
        ([5.0, 0.0, 3.0, 0.0], "strongest: 0.00 s (2.5 times the average frame), 0.24 s (1.5 times)"),
        ([5.0, 3.9, 2.6, 5.0], "strongest: 0.00 s (1.2 times the average frame), 0.36 s (1.2 times)"),  # 2.6 is not
        ([-5.0, -3.0, -1.0, 0.0], "strongest: no frame has evidence for class 1, according to this method"),
        ([0.0, 0.0, 0.0, 0.0], "strongest: no frame; the attributions are zero everywhere"),
    ],
)
def test_report_distinguishes_signed_maps_from_zero_maps(temporal, said):
    joint = torch.tensor(temporal)[None, :, None, None].expand(1, 4, 2, 2) / 4
    parts = VideoAttribution(joint, joint.sum(1), torch.tensor([temporal]))
    video = dataclasses.replace(explanation().video, indices=[0, 3, 6, 9], times=[0.0, 0.12, 0.24, 0.36])
    changed = explanation(maps=parts, video=video)
    assert report(changed, 3).splitlines()[-1] == said
