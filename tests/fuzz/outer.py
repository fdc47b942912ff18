"""Calls from pixels to clips and from maps to pictures: preprocessing, planted clips, comparisons, figures, files."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from captum_staa import VideoClassifier, benchmark, io, visualization
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.models.preprocessing import Preprocessing

from . import values
from .calls import Call
from .hostile import malformed
from .models import anything
from .tensors import _call
from .twins import malformed_call


def _pictures(draw: Any, most: int = 9) -> np.ndarray:
    shape = [draw(st.integers(1, 5)), draw(st.integers(1, most)), draw(st.integers(1, most)), 3]
    frames = np.random.default_rng(draw(values.seeds)).integers(0, 256, shape, dtype=np.uint8)
    return draw(st.sampled_from([frames, frames[:, ::-1], frames[::-1], frames * 0, np.asfortranarray(frames)]))


def preprocess(draw: Any) -> Call:
    frames = _pictures(draw)
    edge = draw(st.sampled_from([None, 4, (3, 5)]))
    crop = draw(st.sampled_from([None, (2, 2), (9, 4)]))
    steps = Preprocessing(resize=edge, crop=crop, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.5))
    axes = draw(values.layouts)
    model = VideoClassifier(anything(axes), layout=axes, preprocessing=steps)

    def check(clip: torch.Tensor) -> None:
        assert clip.dtype == torch.float32 and clip.is_contiguous() and bool(clip.isfinite().all())
        found = values.working(clip, axes)
        assert found.shape[:3] == (1, len(frames), 3)
        if edge is None and crop is None:
            wanted = (frames / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.5])
            assert np.allclose(found[0].movedim(1, -1).numpy(), wanted, atol=1e-5), "other colors"
        twin = model.preprocess(torch.from_numpy(frames.copy()))
        assert torch.equal(twin, clip), "a tensor of frames gives another clip"

    # The frames are at least 1 pixel along each axis after the resize.
    return _call(draw, "preprocess", model.preprocess, {"frames": frames}, {"frames": "frames"}, check=check)


def planted(draw: Any) -> Call:
    task = draw(st.sampled_from(["pattern", "motion", "order"]))
    good: dict[str, Any] = {"seed": draw(st.integers(-5, 2**40)), "n": draw(st.integers(1, 4)), "task": task}
    scene = {"num_frames": draw(st.sampled_from([12, 16])), "image_size": draw(st.sampled_from([28, 31])), "noise": 0.0}
    good |= scene
    index = draw(st.integers(0, good["n"] - 1))

    def run(**made: Any) -> Any:
        options = {name: made.pop(name) for name in scene if name in made}
        clips = PlantedClips(**made, scene=SceneOptions(**options))
        return clips, clips[index], clips[: index + 1]

    def check(found: Any) -> None:
        clips, (clip, label, truth), several = found
        assert torch.equal(clip, several[0][index]) and torch.equal(truth, several[2][index]), "a slice is another clip"
        assert int(label) == int(several[1][index]) < len(clips.labels) and bool(truth.any())
        changed = (clips.without_evidence(index) != clip).any(1)
        assert not bool((changed & ~truth).any()), "evidence outside of the truth"

    kinds = dict.fromkeys(("n", "num_frames", "image_size", "patch_size"), "size")
    return _call(draw, "PlantedClips", run, good, kinds, check=check)


@cache
def _clips() -> list[tuple[torch.Tensor, int]]:
    return [(torch.randn(1, 2, 1, 4, 3, generator=torch.Generator().manual_seed(0)), 1)]


def compared(draw: Any) -> Call:
    model = VideoClassifier(anything("BTCHW"), layout="BTCHW")
    good: dict[str, Any] = {"classifier": model, "clips": _clips(), "methods": ["Saliency"], "metrics": ["deletion"]}
    good |= {"metric_options": benchmark.MetricOptions(steps=2), "show_progress": False}
    kinds = {"perturbations_per_eval": "count"}

    def check(found: Any) -> None:
        assert found.methods[0] == "Saliency" and not found.failures, found.reasons()

    args, argument, bad = malformed(draw, good, kinds)
    run = lambda: benchmark.compare(**args)  # noqa: E731
    if draw(st.integers(0, 9)) == 0:
        return Call("compare", lambda: benchmark.compare(**good), check, models=(model,))
    return malformed_call("compare", run, argument, bad, lambda found: None, models=(model,))


def pictures(draw: Any) -> Call:
    name = draw(st.sampled_from(["show_frames", "show_timeline", "compare_methods", "show_slices"]))
    frames = _pictures(draw)
    t, h, w = frames.shape[:3]
    maps = values.normal(draw, 1, t, h, w)
    spread = [maps, maps[0], maps * 0, maps.half(), maps.double() * 1e300, maps * 1e-30, maps.numpy(), maps.abs()]
    maps = draw(st.sampled_from([*spread, maps[:, :, None].expand(1, t, 3, h, w)]))
    axes = "BTCHW" if maps.ndim == 5 else None
    good: dict[str, Any] = {"pixels": frames, "attributions": maps, "layout": axes}
    kinds = {"pixels": "frames", "attributions": "pictured", "sign": "word"}
    if name != "show_timeline":
        good["method"] = draw(st.sampled_from(["blended_heat_map", "heat_map", "masked_image"]))
        kinds |= {"method": "word", "outlier_perc": "percent"}
    if name in ("show_frames", "compare_methods"):
        kinds |= {"num_frames": "count?"}
    if maps.ndim == 5:
        kinds["layout"] = "layout"
    function = getattr(visualization, name)

    def run(attributions: Any = maps, pixels: Any = frames, layout: Any = axes, **rest: Any) -> Any:
        clip = visualization.Frames(pixels, layout=layout)
        if name != "show_timeline":
            fields = {key: rest.pop(key) for key in ("method", "sign", "outlier_perc") if key in rest}
            rest["style"] = visualization.Style(**fields)
        given = {"one": attributions} if name == "compare_methods" else attributions
        return function(given, clip, use_pyplot=False, **rest)

    def check(found: Any) -> None:
        figure, main = found
        figure.canvas.draw()
        if name == "show_frames":
            assert len(main.images) == t
            heat = np.asarray(main.images[0].get_array())
            assert heat.shape == (h, w, 3)

    return _call(draw, name, run, good, kinds, check=check, sane=lambda found: found[0].canvas.draw())


def files(draw: Any) -> Call:
    frames = _pictures(draw, most=20)
    fps = draw(st.sampled_from([1, 25, 29.97, 0.5, 240]))
    ask: dict[str, Any] = {"num_frames": draw(st.integers(1, len(frames)))}
    reading, writing = {"sampling": "word"}, {"frames": "frames"}

    def run(frames: Any = frames, fps: Any = fps, crf: Any = None, **asked: Any) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clip.mkv")
            try:
                io.write_video(path, frames, fps, crf=crf)
                return io.read_video(path, **asked)
            finally:
                left = [one.name for one in Path(folder).iterdir() if one != path]
                assert not left, f"files left behind: {left}"

    def check(video: Any) -> None:
        height, width = frames.shape[1] + frames.shape[1] % 2, frames.shape[2] + frames.shape[2] % 2
        assert video.frames.shape == (ask["num_frames"], height, width, 3), video.frames.shape
        assert video.indices.max() < len(frames) and bool((np.diff(video.indices) > 0).all())

    good = {"frames": frames, "fps": fps, **ask}
    refusals = ("encode", "fps")
    return _call(draw, "write_video, read_video", run, good, reading | writing, check=check, refusals=refusals)


ENTRIES = {
    "preprocess": preprocess,
    "PlantedClips": planted,
    "compare": compared,
    "visualization": pictures,
    "video files": files,
}
