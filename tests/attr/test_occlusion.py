"""VideoOcclusion gives Captum's Occlusion's numbers, for every window, stride, baseline and chunk."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Occlusion
from covering import in_one_case
from torch import Tensor, nn

from captum_staa import (
    RISE,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoClassifier,
    VideoFeatureAblation,
    VideoLayout,
    VideoOcclusion,
    feature_masks,
    metrics,
)
from captum_staa.attr import occlusion
from captum_staa.benchmark import PlantedClips
from captum_staa.metrics import auroc


def net(seed: int = 0, channels: int = 3) -> nn.Module:
    """A random network of (B, C, T, H, W) with 4 outputs, in float64."""
    torch.manual_seed(seed)
    conv = nn.Conv3d(channels, 5, (2, 3, 3))
    return nn.Sequential(conv, nn.GELU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(40, 4)).double().eval()


def clip_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_captums(ours: Tensor, theirs: Tensor) -> None:
    """Captum's Occlusion gives float32 also for float64 models."""
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=1e-7)


def slow(model: Callable[..., Tensor], clip: Tensor, window: Any, stride: Any, baseline: Tensor, target: int) -> Tensor:
    """By the definition, for one clip (C, T, H, W): every window, its fall, and the mean at each voxel."""
    whole = model(clip[None])[0, target]
    total, count = torch.zeros_like(clip), torch.zeros_like(clip)
    starts = [
        range(0, size - side + step, step) for size, side, step in zip(clip.shape[1:], window, stride, strict=True)
    ]
    for corner in itertools.product(*starts):
        box = (slice(None), *(slice(a, a + side) for a, side in zip(corner, window, strict=True)))
        covered = clip.clone()
        covered[box] = baseline[box]
        total[box] += (whole - model(covered[None])[0, target]).detach()
        count[box] += 1
    return total / count


# divides and does not, overlaps and does not, whole axes, single voxels
PRESETS = [
    ((2, 3, 3), (2, 3, 3)),
    ((2, 4, 3), (1, 2, 3)),
    ((3, 4, 4), (2, 3, 3)),
    ((5, 3, 2), (5, 3, 2)),
    ((1, 7, 6), (1, 7, 6)),
    ((5, 7, 6), (9, 9, 9)),
    ((2, 5, 5), (2, 4, 4)),
]


@in_one_case()
@pytest.mark.parametrize(("window", "stride"), PRESETS)
def test_occlusion_equals_captum_and_the_definition(window, stride):
    model, clip, baseline = net(), clip_of(2, 3, 5, 7, 6), clip_of(2, 3, 5, 7, 6, seed=2)
    ours = VideoOcclusion(model, "BCTHW").attribute(clip, window, stride, baseline, [3, 1], perturbations_per_eval=3)
    theirs = Occlusion(model).attribute(clip, (3, *window), (3, *stride), baseline, [3, 1])
    assert_captums(ours, theirs)
    for i, target in enumerate([3, 1]):
        expected = slow(model, clip[i], window, stride, baseline[i], target)
        torch.testing.assert_close(ours[i], expected, rtol=1e-12, atol=1e-12)


def test_single_precision_is_within_a_millionth_of_captum():
    model, clip = net().float(), clip_of(1, 3, 5, 7, 6).float()
    ours = VideoOcclusion(model, "BCTHW").attribute(clip, (2, 3, 3), (1, 2, 2), target=0, perturbations_per_eval=4)
    theirs = Occlusion(model).attribute(clip, (3, 2, 3, 3), (3, 1, 2, 2), target=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_default_stride_is_half_a_window_and_an_int_is_used_for_all_axes():
    model, clip = net(), clip_of(1, 3, 3, 5, 4)
    explain = VideoOcclusion(model, "BCTHW").attribute
    theirs = Occlusion(model).attribute(clip, (3, 2, 3, 3), target=0)
    assert_captums(explain(clip, (2, 3, 3), 1, target=0), theirs)
    theirs = Occlusion(model).attribute(clip, (3, 2, 3, 3), (3, 1, 2, 2), target=0)
    assert_captums(explain(clip, (2, 3, 3), target=0), theirs)
    theirs = Occlusion(model).attribute(clip, (3, 2, 3, 3), (3, 2, 2, 2), target=0)
    assert_captums(explain(clip, (2, 3, 3), 2, target=0), theirs)


def test_many_calls_are_announced_unless_progress_is_shown(monkeypatch, caplog, capsys):
    monkeypatch.setattr(occlusion, "MANY", 9)
    model, clip = net(), clip_of(1, 3, 3, 5, 4)  # 3 x 3 x 3 windows of (1, 2, 2) with strides (1, 2, 1)
    explain = VideoOcclusion(model, "BCTHW").attribute
    explain(clip, (1, 2, 2), (1, 2, 1), target=0, perturbations_per_eval=4)
    explain(clip, (1, 2, 2), (1, 2, 1), target=0, show_progress=True)
    assert not caplog.records
    assert "/28" in capsys.readouterr().err  # the total is known from the start
    explain(clip, (1, 2, 2), (1, 2, 1), target=0)
    (record,) = caplog.records
    assert record.message.startswith("VideoOcclusion calls the model 28 times, for 27 windows.")


def test_window_over_all_axes_as_in_captum():
    model, clip = net(), clip_of(2, 3, 4, 5, 6)
    ours = VideoOcclusion(model, "BCTHW").attribute(clip, (1, 2, 3, 3), (1, 2, 2, 3), 0.5, 2, perturbations_per_eval=5)
    theirs = Occlusion(model).attribute(clip, (1, 2, 3, 3), (1, 2, 2, 3), 0.5, 2)
    assert_captums(ours, theirs)
    assert not torch.equal(ours[:, 0], ours[:, 1])  # channel by channel


@in_one_case()
@pytest.mark.parametrize(
    "baseline",
    [None, 0.7, -2, clip_of(1, 3, 5, 7, 6, seed=5), clip_of(2, 3, 5, 7, 6, seed=6)],
    ids=["none", "float", "int", "one for all", "per clip"],
)
def test_baselines_of_every_kind(baseline):
    model, clip = net(), clip_of(2, 3, 5, 7, 6)
    ours = VideoOcclusion(model, "BCTHW").attribute(clip, (2, 4, 3), (1, 2, 3), baseline, 1)
    theirs = Occlusion(model).attribute(clip, (3, 2, 4, 3), (3, 1, 2, 3), baseline, 1)
    assert_captums(ours, theirs)


@in_one_case()
@pytest.mark.parametrize("chunk", [2, 3, 7, 1000])
def test_perturbations_per_eval_does_not_change_the_result(chunk):
    model, clip = net(), clip_of(2, 3, 5, 7, 6)
    explain = VideoOcclusion(model, "BCTHW").attribute
    one = explain(clip, (2, 4, 3), (1, 2, 3), target=(1,))
    torch.testing.assert_close(
        explain(clip, (2, 4, 3), (1, 2, 3), target=(1,), perturbations_per_eval=chunk), one, rtol=1e-12, atol=1e-14
    )


def test_result_does_not_depend_on_the_layout():
    model, clip = net(), clip_of(2, 3, 5, 7, 6)
    first = VideoOcclusion(model, "BCTHW").attribute(clip, (2, 4, 3), (1, 2, 3), target=0)
    twin = VideoOcclusion(lambda x: model(x.transpose(1, 2)), VideoLayout("BTCHW"))
    second = twin.attribute(clip.transpose(1, 2), (2, 4, 3), (1, 2, 3), target=0)
    assert second.is_contiguous()
    assert torch.equal(second, first.transpose(1, 2))


def two_streams() -> Callable[..., Tensor]:
    rgb, flow = net(3), net(4, channels=2)
    return lambda a, b, scale: scale[:, None] * rgb(a) * flow(b)


def test_two_inputs_with_different_windows():
    model, inputs = two_streams(), (clip_of(2, 3, 4, 5, 6), clip_of(2, 2, 5, 4, 6))
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    windows, strides = ((2, 3, 3), (2, 2, 3)), ((2, 1, 3), 2)
    ours = VideoOcclusion(model, "BCTHW").attribute(
        inputs, windows, strides, (0.0, 0.3), 1, scale, perturbations_per_eval=4
    )
    theirs = Occlusion(model).attribute(
        inputs, ((3, 2, 3, 3), (2, 2, 2, 3)), ((3, 2, 1, 3), (2, 2, 2, 2)), (0.0, 0.3), 1, scale
    )
    assert isinstance(ours, tuple)
    for a, b in zip(ours, theirs, strict=True):
        assert_captums(a, b)


def test_model_that_modifies_its_input_does_not_change_the_result():
    model, clip = net(), clip_of(2, 3, 5, 7, 6)
    before = clip.clone()

    def rude(x: Tensor) -> Tensor:
        return model(x.sub_(0.5).div_(0.5))

    def polite(x: Tensor) -> Tensor:
        return model((x - 0.5) / 0.5)

    ours = VideoOcclusion(rude, "BCTHW").attribute(clip, (2, 4, 3), (2, 2, 3), target=0, perturbations_per_eval=3)
    assert torch.equal(clip, before)
    torch.testing.assert_close(
        ours, VideoOcclusion(polite, "BCTHW").attribute(clip, (2, 4, 3), (2, 2, 3), target=0), rtol=1e-12, atol=1e-12
    )
    with torch.inference_mode():
        again = VideoOcclusion(rude, "BCTHW").attribute(clip, (2, 4, 3), (2, 2, 3), target=0, perturbations_per_eval=3)
    torch.testing.assert_close(again, ours, rtol=1e-12, atol=1e-12)


def test_model_whose_output_is_a_view_of_its_input():
    clip = clip_of(1, 1, 2, 2, 2)
    ours = VideoOcclusion(lambda x: x.flatten(1), "BCTHW").attribute(clip, (1, 1, 1), (1, 1, 1), target=5)
    expected = torch.zeros(8, dtype=torch.float64)
    expected[5] = clip.flatten()[5]
    torch.testing.assert_close(ours.flatten(), expected)


def test_planted_evidence_is_found():
    clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
    clips, labels, truth = PlantedClips(seed=77, n=4)[:4]
    clips = clf.layout.from_working(clips).contiguous()
    found = VideoOcclusion(clf).attribute(clips, (4, 12, 12), (2, 6, 6), target=labels, perturbations_per_eval=8)
    assert auroc(clf.layout.reduce(found), truth).mean() > 0.85
    assert auroc(clf.layout.reduce(-found), truth).mean() < 0.2


CLIP = clip_of(2, 3, 5, 7, 6)


@in_one_case()
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sliding_window_shapes": (6, 3, 3)}, ValueError, r"got \(6, 3, 3\) for a clip of shape \(2, 3, 5, 7, 6\)"),
        ({"sliding_window_shapes": (4, 2, 3, 3)}, ValueError, "not be larger"),
        ({"sliding_window_shapes": (2, 3)}, ValueError, r"one for each of CTHW, got \(2, 3\)"),
        ({"sliding_window_shapes": (2, 3, 0)}, ValueError, "at least 1"),
        ({"sliding_window_shapes": (2, 3, 2.0)}, TypeError, "got 2.0 of type float"),
        ({"sliding_window_shapes": 3}, ValueError, "must be integers.*got 3"),
        ({"sliding_window_shapes": None}, ValueError, "got None"),
        ({"sliding_window_shapes": ((2, 3, 3), (2, 3, 3))}, ValueError, "one for each|one item per input"),
        ({"strides": (1, -1, 1)}, ValueError, r"H of strides \(1, -1, 1\) .*, got -1"),
        ({"strides": 0}, ValueError, "at least 1"),
        ({"strides": True}, TypeError, "got True of type bool"),
        ({"strides": [1, 1, 1]}, ValueError, r"strides must be integers.*got \[1, 1, 1\]"),
        ({"strides": (1, 4, 1)}, ValueError, r"longer than the window.*at most 3"),
        ({"strides": (1, 1)}, ValueError, "strides"),
        ({"baselines": torch.zeros(2, 3, 5, 7, 5)}, ValueError, r"\(2, 3, 5, 7, 5\)"),
        ({"baselines": torch.zeros(5, 7, 6)}, ValueError, "input's shape"),
        ({"baselines": float("nan")}, ValueError, "finite"),
        ({"baselines": (0, 0)}, ValueError, "one per input.* got 2"),
        ({"baselines": "blur"}, TypeError, "got str"),
        ({"perturbations_per_eval": 0}, ValueError, "at least 1, got 0"),
        ({"perturbations_per_eval": 2.0}, TypeError, "perturbations_per_eval.*got 2.0"),
        ({"inputs": CLIP[0]}, ValueError, r"\(3, 5, 7, 6\)"),
        ({"inputs": CLIP[:0]}, ValueError, "non-empty"),
        ({"inputs": CLIP / 0}, ValueError, "nan"),
        ({"inputs": clip_of(1, 16, 3, 8, 8)}, ValueError, "layout='BTCHW'"),
        ({"inputs": (CLIP, CLIP[:1]), "sliding_window_shapes": ((2, 3, 3),) * 2}, ValueError, "same batch size"),
        ({"feature_mask": None}, TypeError, "unexpected keyword"),
    ],
)
def test_invalid_arguments_raise_before_the_model_is_called(arguments, error, message):
    calls = []

    def model(*inputs: Tensor) -> Tensor:
        calls.append(inputs)
        return net()(inputs[0])

    arguments = {"inputs": CLIP, "sliding_window_shapes": (2, 3, 3), "target": 0, **arguments}
    with pytest.raises(error, match=message):
        VideoOcclusion(model, "BCTHW").attribute(**arguments)
    assert not calls


def test_models_without_one_output_per_clip_raise():
    with pytest.raises(ValueError, match=r"outputs of shape \(2, 4\).*target="):
        VideoOcclusion(net(), "BCTHW").attribute(CLIP, (2, 3, 3))
    with pytest.raises(ValueError, match=r"one output per example.*shape \(\)"):
        VideoOcclusion(lambda x: net()(x).mean(), "BCTHW").attribute(CLIP, (2, 3, 3))
    with pytest.raises(TypeError, match="must return a tensor"):
        VideoOcclusion(lambda x: [1], "BCTHW").attribute(CLIP, (2, 3, 3))


def test_layout_is_required_and_must_match_the_classifier():
    with pytest.raises(ValueError, match="layout="):
        VideoOcclusion(net())
    clf = VideoClassifier(net(), layout="BCTHW")
    with pytest.raises(ValueError, match=r"[Ll]eave (the )?layout out"):
        VideoOcclusion(clf, "BTCHW")
    assert VideoOcclusion(clf).layout.axes == VideoOcclusion(clf, "BCTHW").layout.axes == "BCTHW"


def test_usual_mistakes_say_what_to_pass() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 8 * 8, 1))
    clf = VideoClassifier(net, layout="BCTHW", labels=["fall"], output="sigmoid")
    clip, windows = torch.rand(2, 3, 4, 8, 8), ((2, 4, 4), (2, 4, 4))
    with pytest.raises(ValueError, match=r"target must be 0 or None for a model with one output, got 1. Leave target"):
        VideoOcclusion(clf).attribute(clip, *windows, target=1)
    with pytest.raises(TypeError, match=r"got list. Pass one tensor per input of the model; if .*, pass this clip to"):
        VideoOcclusion(clf).attribute([clip, clip], *windows)  # type: ignore[arg-type]


# --- clips that a bare module does not take -----------------------------------------------------------------------


class EightFrames(nn.Module):
    """A network of (B, C, T, H, W) for 8 frames, with a defect in it if asked."""

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.num_frames, self.fails = 8, fails
        self.conv, self.head = nn.Conv3d(3, 2, 1), nn.Linear(16, 3)

    def forward(self, clip: Tensor) -> Tensor:
        if self.fails:
            raise RuntimeError(self.fails)
        return self.head(self.conv(clip).mean((3, 4)).flatten(1))


METHODS: dict[str, Callable[..., Any]] = {
    "VideoOcclusion": lambda net, x, layout: VideoOcclusion(net, layout).attribute(x, (2, 4, 4), target=1),
    "RISE": lambda net, x, layout: RISE(net, layout).attribute(x, target=1, n_samples=4),
    "VideoFeatureAblation": lambda net, x, layout: VideoFeatureAblation(net, layout).attribute(
        x, target=1, feature_mask=feature_masks.frames(x, layout)
    ),
    "SpatioTemporalPerturbation": lambda net, x, layout: SpatioTemporalPerturbation(net, layout=layout).attribute(
        x, target=1
    ),
    "GradCAM": lambda net, x, layout: GradCAM(net, "conv", layout=layout).attribute(x, target=1),
    "deletion": lambda net, x, layout: metrics.deletion(net, x, x, target=1, layout=layout, steps=2, cells=(1, 4, 4)),
}


@in_one_case()
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_clip_of_another_size_than_a_module_takes_is_a_value_error(method):
    built = r"built \(num_frames=8\), got shape \(\d, 3, 5, 8, 8\)\. Pass as many frames"
    with pytest.raises(ValueError, match=built) as caught:
        method(EightFrames().eval(), torch.rand(1, 3, 5, 8, 8), "BCTHW")
    assert type(caught.value.__cause__) is RuntimeError
    assert str(caught.value.__cause__) in str(caught.value)
    swapped = r"takes, got shape \(\d, 8, 3, 8, 8\), of which a layer for 3 channels gets 8"
    with pytest.raises(ValueError, match=swapped):
        method(EightFrames().eval(), torch.rand(1, 8, 3, 8, 8), "BTCHW")
    with pytest.raises(RuntimeError, match=r"^a defect of the model$"):
        method(EightFrames("a defect of the model").eval(), torch.rand(1, 3, 8, 8, 8), "BCTHW")


def test_an_error_about_shapes_after_the_first_call_is_that_of_the_model():
    """The whole clip was accepted, so the size is right."""
    net = EightFrames().eval()

    def forward(clip: Tensor) -> Tensor:
        return net(clip) if len(clip) == 1 else net(clip.flatten(0, 1)[None, :3, :5])

    method = VideoOcclusion(forward, "BCTHW")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as caught:
        method.attribute(torch.rand(1, 3, 8, 8, 8), (2, 4, 4), target=1, perturbations_per_eval=2)
    assert not isinstance(caught.value, ValueError)
