"""STAAStream against plain loops over windows, and on a planted object that moves through a long stream."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest
import torch
from covering import in_one_case
from torch import nn

from captum_staa import STAA, STAAStream, VideoClassifier
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.stream.run import WindowExplainer
from captum_staa.stream.sources import Arrived

MODEL = "tiny-videomae-pattern"
W = 16


@pytest.fixture(scope="module")
def clf() -> VideoClassifier:
    return VideoClassifier.from_pretrained(MODEL)


def planted(total: int, index: int = 0, evidence_alone: bool = False):
    """Frames ``(N, 48, 48, 3)`` in which one patterned patch moves, and where it is.

    It shows evidence for a while, and twins before or after it; then it is hidden if ``evidence_alone``.
    """
    clips = PlantedClips(99, index + 1, scene=SceneOptions(num_frames=total, rivals=0))
    truth, twins = clips[index][2], clips.rivals(index)
    if not evidence_alone:
        return clips.frames(index), truth | twins
    return ((clips.without_rivals(index) / 2 + 0.5) * 255).round().byte().movedim(1, -1).numpy(), truth


@pytest.fixture(scope="module")
def wide() -> np.ndarray:
    """42 frames of 60 x 100 pixels, which preprocessing resizes and crops."""
    frames, _ = planted(42)
    return np.random.default_rng(0).integers(0, 255, (42, 60, 100, 3), dtype=np.uint8) // 8 + np.pad(
        frames // 2, ((0, 0), (6, 6), (26, 26), (0, 0))
    )


def slow(explainer: STAA, frames: np.ndarray, stride: int, unit: float, target: int | None = None):
    """Return the documented rule frame by frame: ``[(map, temporal, probabilities, number of windows)]``."""
    clf, total = explainer.forward_func, len(frames)
    starts = [start for start in range(0, total, stride) if start + W <= total]
    found = {}
    for start in {*starts, total - W}:
        clip = clf.preprocess(frames[start : start + W])
        with torch.no_grad():
            logits = clf(clip)
        parts = explainer.attribute_maps(clip, target=int(logits.argmax()) if target is None else target)
        found[start] = (parts.joint[0] * unit, parts.temporal[0] * unit, logits[0].softmax(0))
    rows = []
    for i in range(total):
        seen = [start for start in starts if start <= i < start + W]
        if i >= starts[-1] + stride and total - W not in starts:  # not given out when the stream ended
            seen.append(total - W)
        rows.append(
            (
                sum(found[start][0][i - start] for start in seen) / len(seen),
                float(sum(found[start][1][i - start] for start in seen) / len(seen)),
                sum(found[start][2] for start in seen) / len(seen),
                len(seen),
            )
        )
    return rows


def check(results, frames, expected) -> None:
    assert [result.index for result in results] == list(range(len(frames)))
    for result, (joint, temporal, probabilities, count) in zip(results, expected, strict=True):
        assert result.windows == count and result.explained
        np.testing.assert_array_equal(result.frame, frames[result.index])
        torch.testing.assert_close(result.joint, joint)
        assert result.temporal == pytest.approx(temporal, rel=1e-4)
        torch.testing.assert_close(result.probabilities, probabilities)


@pytest.mark.parametrize("stride", [4, 6, 16])  # 42 frames: ends between steps, on a step, and between
def test_attention_is_the_mean_over_windows(clf, wide, stride):
    results = list(STAAStream(clf, W, stride, mode="attention")(iter(wide)))
    check(results, wide, slow(STAA(clf, mode="attention"), wide, stride, unit=W))
    assert {result.crop for result in results} == {clf.crop_box(60, 100)} != {(0, 0, 60, 100)}
    best = int(results[7].probabilities.argmax())
    assert results[7].label == clf.labels[best] == results[7].top(2)[0][0]
    assert results[7].top(2)[0][1] == pytest.approx(float(results[7].probabilities[best]))


@pytest.mark.parametrize(("rule", "target"), [("decomposition", None), ("chefer", "bright-bottom")])
def test_relevance_with_an_staa_instance(clf, wide, rule, target):
    explainer = STAA(clf, mode="relevance", rule=rule)
    stream = STAAStream(explainer, stride=8, target=target)
    index = None if target is None else clf.class_index(target)
    check(list(stream(wide)), wide, slow(explainer, wide, 8, unit=1, target=index))


def test_the_default_is_relevance_of_the_most_likely_class(clf, wide):
    assert STAAStream(clf).explainer.get_name() == "STAA (relevance)"


def test_other_layouts_and_tensors_give_the_same_numbers(clf, wide):
    """Clips in another layout, and frames as tensors."""
    other = VideoClassifier(clf.module, layout="BCTHW", preprocessing=clf.preprocessing)
    mine = list(STAAStream(other, W, 8)(torch.from_numpy(frame) for frame in wide))
    for one, two in zip(mine, STAAStream(clf, W, 8)(wide), strict=True):
        torch.testing.assert_close(one.joint, two.joint)
        np.testing.assert_array_equal(one.frame, two.frame)


def test_frames_are_preprocessed_once_with_the_same_result(clf, wide, monkeypatch):
    arrived = [Arrived(i, frame, 0.0) for i, frame in enumerate(wide)]
    explain = WindowExplainer(STAA(clf, mode="attention"), None)
    for start in (0, 4, 20):
        assert torch.equal(explain.clip(arrived[start : start + W]), clf.preprocess(wide[start : start + W]))
    prepared, original = [], Preprocessing.__call__

    def counting(self, frames):
        prepared.append(len(frames))
        return original(self, frames)

    monkeypatch.setattr(Preprocessing, "__call__", counting)
    list(STAAStream(clf, W, 4)(wide))
    assert prepared == [1] * len(wide)


def test_custom_preprocessing_gets_the_whole_window(clf, wide):
    class Centerd(Preprocessing):
        def __call__(self, frames):
            clip = super().__call__(frames)
            return clip - clip.mean(1, keepdim=True)  # over time: one frame alone would be zero

    own = VideoClassifier(clf.module, preprocessing=Centerd(**vars(clf.preprocessing)))
    check(list(STAAStream(own, W, 8)(wide)), wide, slow(STAA(own), wide, 8, unit=1))


def test_one_forward_per_window_and_no_hooks_remain(clf, wide):
    module, forwards = clf.module, []
    handle = module.register_forward_hook(lambda *args: forwards.append(1))
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    configs = [id(getattr(m, "config", None)) for m in module.modules()]
    expected = [result.joint for result in STAAStream(clf, W, 4)(wide)]
    assert len(forwards) == 8  # starts 0, 4, ..., 24, and 26
    module.train()
    module.videomae.embeddings.eval()
    modes = [m.training for m in clf.modules()]
    try:
        for result, joint in zip(STAAStream(clf, W, 4)(wide), expected, strict=True):
            torch.testing.assert_close(result.joint, joint)
            assert [m.training for m in clf.modules()] == modes
    finally:
        module.eval()
        handle.remove()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()] == [hooks[0] - 1, *hooks[1:]]
    assert [id(getattr(m, "config", None)) for m in module.modules()] == configs
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("stride", [1, 5, 16])
def test_latency_equals_the_documented_bounds(clf, wide, stride):
    stream = STAAStream(clf, W, stride)
    fewest, most = stream.latency
    pulled: list[int] = []
    results = stream(pulled.append(i) or frame for i, frame in enumerate(wide))
    for result in results:
        assert result.latency_frames == len(pulled) - 1 - result.index  # what the source really gave meanwhile
        assert result.latency > 0
        steps = (len(wide) - W) // stride * stride + stride  # of the frames before the end of the stream
        if result.index < steps:
            assert result.latency_frames == W - 1 - result.index % stride
            assert fewest <= result.latency_frames <= most
    assert results.stats.frames == len(wide) and results.stats.unexplained == results.stats.skipped == 0


def auroc(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the probability that a pixel of the object scores above a pixel outside it."""
    inside, outside = scores[truth].sort().values, scores[~truth]
    return float((len(inside) - torch.searchsorted(inside, outside, right=True)).double().mean() / len(inside))


@pytest.fixture(scope="module")
def followed(clf):
    """Return maps (N, 48, 48) and truth by stride, for objects that move through a stream of 64 frames."""
    return {
        stride: [
            (torch.stack([r.joint for r in STAAStream(clf, W, stride, mode="attention")(frames)]), truth)
            for frames, truth in (planted(64, index) for index in range(3))
        ]
        for stride in (4, 16)
    }


def test_the_map_follows_a_moving_object(followed):
    elsewhere = []
    for maps, truth in followed[4]:
        scores = [auroc(maps[t], truth[t]) for t in range(64)]
        assert min(scores) > 0.75 and np.mean(scores) > 0.93
        moved = [(t, past) for t in range(64) for past in range(t) if not (truth[t] & truth[past]).any()]
        elsewhere += [auroc(maps[t], truth[past]) for t, past in moved[::9]]  # where it was, and is no more
    assert len(elsewhere) > 50 and np.mean(elsewhere) < 0.6


def test_attention_has_a_mean_of_one_per_frame(followed):
    for maps, _ in followed[4]:
        assert maps.sum((1, 2)).mean() == pytest.approx(1, abs=0.02)  # no special tokens, so no share is lost


def test_overlapping_windows_reduce_jumps_between_windows(followed):
    """Maps and the temporal signal jump between windows; overlap removes most of the jump."""

    def jumps(maps: torch.Tensor, stride: int) -> tuple[float, float]:
        border = torch.arange(1, 64) % stride == 0
        timeline, change = maps.sum((1, 2)).diff().abs(), maps.diff(dim=0).abs().sum((1, 2))
        return float(timeline[border].mean()), float(change[border].mean())

    apart, overlapping = (np.mean([jumps(maps, stride) for maps, _ in followed[stride]], 0) for stride in (16, 4))
    assert (overlapping < apart / 2).all(), (overlapping, apart)


def test_the_temporal_signal_rises_where_the_object_is(clf):
    """The object is visible for 16 to 31 of 64 frames, across borders of windows."""
    scores: dict[int, list[float]] = {4: [], 16: []}
    for index in range(4):
        frames, truth = planted(64, index, evidence_alone=True)
        for stride, found in scores.items():
            timeline = torch.tensor([result.temporal for result in STAAStream(clf, W, stride)(frames)])
            found.append(auroc(timeline, truth.flatten(1).any(1)))
    assert np.mean(scores[4]) > 0.7
    assert np.mean(scores[4]) > np.mean(scores[16])  # which cannot compare frames of different windows as well


@in_one_case()
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"window": 8}, ValueError, "window must be 16, .* got 8"),
        ({"stride": 17}, ValueError, "stride must be at most window=16, .* got 17"),
        ({"stride": 0}, ValueError, "stride"),
        ({"window": 16.0}, TypeError, "window"),
        ({"mode": "gradcam"}, ValueError, "mode must be one of"),
        ({"policy": "skip"}, ValueError, "policy must be one of 'wait', 'drop', got 'skip'"),
        (
            {"target": "bright-bottom", "mode": "attention"},
            ValueError,
            "target must be None for mode='attention'.*got 'bright-bottom'",
        ),
        ({"target": "walking"}, ValueError, "walking"),
        ({"layers": [0]}, TypeError, "layers"),
    ],
)
def test_invalid_options_raise_at_once(clf, options, error, message):
    with pytest.raises(error, match=message):
        STAAStream(clf, **options)


def test_unsuitable_models_raise_at_once(clf):
    with pytest.raises(ValueError, match="must have its preprocessing"):
        STAAStream(VideoClassifier(clf.module))
    with pytest.raises(ValueError, match="must have its preprocessing"):
        STAAStream(VideoClassifier(nn.Conv3d(3, 2, 3), layout="BCTHW"), 16, 4)
    with pytest.raises(ValueError, match="'relevance' of the STAA, got 'attention'"):
        STAAStream(STAA(clf), mode="attention")


@in_one_case()
@pytest.mark.parametrize("policy", ["wait", "drop"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda frame: frame[..., 0], ValueError, r"frame 17 of the stream must be .*\(H, W, 3\).*\(60, 100\).*gray"),
        (lambda frame: frame / 255, TypeError, "frame 17 of the stream must be uint8.*float64"),
        (lambda frame: frame[:40], ValueError, "frame 17 of the stream must be 60 x 100 pixels .* got 40 x 100"),
        (lambda frame: "frame.png", TypeError, "frame 17 of the stream must be a uint8 array.*got.*str"),
    ],
)
def test_invalid_frames_raise_with_their_index(clf, wide, policy, change, error, message):
    """They raise after the results of the frames before them; in drop mode, all 20 frames may be read first."""
    frames: list = list(wide[:20])
    frames[17] = change(frames[17])
    results = STAAStream(clf, W, 8, policy=policy)(frames)
    with pytest.raises(error, match=message):
        deque(results, maxlen=0)
    assert results.stats.frames == 17
    assert next(results, None) is None


@in_one_case()
@pytest.mark.parametrize("total", [0, 5, 15])
@pytest.mark.parametrize("policy", ["wait", "drop"])
def test_a_stream_shorter_than_a_window_raises(clf, wide, total, policy):
    with pytest.raises(ValueError, match=f"at least window=16 frames, got {total}"):
        list(STAAStream(clf, W, 4, policy=policy)(iter(wide[:total])))


@pytest.mark.parametrize("frames", ["clip.mp4", 7])
def test_arguments_that_are_not_frames_raise(clf, frames):
    with pytest.raises(TypeError, match="iterable of uint8"):
        STAAStream(clf)(frames)
