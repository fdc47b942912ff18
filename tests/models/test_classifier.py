"""VideoClassifier with custom networks: logits, gradients, behavior as an nn.Module, predictions and class indices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from captum.metrics import sensitivity_max
from covering import in_one_case
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from captum_staa.grid import TokenGrid
from captum_staa.io import Video
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.families import Family
from captum_staa.models.preprocessing import Preprocessing

FRAMES, SIZE = 4, 16
LABELS = {0: "Waving", 1: "Jumping jacks", 2: "running"}
# Captum warns if a gradient method gets a tensor without requires_grad
pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")


def clip_of(batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def videomae() -> nn.Module:
    torch.manual_seed(0)
    config = VideoMAEConfig(
        image_size=SIZE,
        patch_size=8,
        num_frames=FRAMES,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=16,
        id2label=LABELS,
    )
    return VideoMAEForVideoClassification(config).eval()


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(32, 3)
    )


class CnnLstm(nn.Module):
    """A CNN per frame and an LSTM over frames; takes (B, C, T, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, clip: Tensor) -> Tensor:
        frames = clip.transpose(1, 2)  # (B, T, C, H, W)
        features = self.cnn(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
        return self.head(self.lstm(features)[0][:, -1])


class Swapped(nn.Module):
    """Make a (B, C, T, H, W) module take (B, T, C, H, W)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, clip: Tensor) -> Tensor:
        return self.inner(clip.transpose(1, 2))


class Returns(nn.Module):
    """A module that returns ``wrap`` of its logits (B, 3)."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.wrap = conv_net(), wrap

    def forward(self, clip: Tensor) -> Any:
        return self.wrap(self.net(clip))


@pytest.mark.parametrize("make", [conv_net, CnnLstm])
def test_both_layouts_give_equal_logits(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = make().eval()
    channels_first = VideoClassifier(net, layout="BCTHW")
    time_first = VideoClassifier(Swapped(net), layout="BTCHW")
    clip = clip_of()
    assert torch.equal(channels_first(clip.transpose(1, 2)), net(clip.transpose(1, 2)))
    torch.testing.assert_close(time_first(clip), channels_first(clip.transpose(1, 2)))
    for clf, inputs in ((channels_first, clip.transpose(1, 2)), (time_first, clip)):
        leaf = inputs.clone().requires_grad_()
        assert torch.autograd.grad(clf(leaf)[:, 0].sum(), leaf)[0].is_contiguous()
        assert torch.isfinite(sensitivity_max(Saliency(clf).attribute, inputs, target=1)).all()


@in_one_case()
@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: (logits, "attention"),
        lambda logits: [logits],
        lambda logits: SimpleNamespace(logits=logits),
        lambda logits: {"loss": 0, "logits": logits},
        lambda logits: logits[:, None],
        lambda logits: logits[:, :, None, None, None],
    ],
)
def test_logits_are_found_in_all_supported_outputs(wrap: Callable[[Tensor], Any]) -> None:
    module = Returns(wrap)
    clip = clip_of().transpose(1, 2)
    assert torch.equal(VideoClassifier(module, "BCTHW")(clip), module.net(clip))


def test_swapped_axes_raise_an_error_with_a_hint() -> None:
    clip = clip_of()
    with pytest.raises(ValueError, match=r"\(2, 4, 3, 16, 16\) in layout BCTHW.*4 channels and 3 frames.*swapped"):
        VideoClassifier(conv_net(), "BCTHW")(clip)
    with pytest.raises(ValueError, match=r"swapped.*transpose\(2, 1\)"):
        VideoClassifier(conv_net(), "BCTHW", num_frames=FRAMES)(clip)
    with pytest.raises(RuntimeError, match="expected input"):  # no hint if the axes do not look swapped
        VideoClassifier(conv_net(), "BCTHW")(torch.rand(1, 5, 6, 16, 16))


class FixedSize(nn.Module):
    """A module with a position embedding for clips of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.img_size, self.position = (SIZE, SIZE), nn.Parameter(torch.zeros(SIZE, SIZE))

    def forward(self, clip: Tensor) -> Tensor:
        return (clip + self.position).mean((3, 4)).flatten(1)


def test_a_clip_of_another_size_than_the_module_takes_raises_an_error_with_the_sizes() -> None:
    clf, clip = VideoClassifier(FixedSize(), "BTCHW", output="score"), clip_of()
    for ran in ("", " and ran before on 4 frames of 16 x 16 pixels"):
        with pytest.raises(ValueError) as caught:
            clf(clip[..., :12])
        assert str(caught.value) == (
            f"clips must have the size for which the module was built (FixedSize has img_size=(16, 16){ran}), got 4 "
            f"frames of 16 x 12 pixels (shape (2, 4, 3, 16, 12) in layout BTCHW). Resize the clip with F.interpolate, "
            f"or pass other frames; state the size with VideoClassifier(..., num_frames=, image_size=). The error of "
            f"the module: The size of tensor a (12) must match the size of tensor b (16) at non-singleton dimension 4"
        )
        clf(clip)


def test_other_errors_of_the_module_are_raised_as_they_are() -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    module = conv_net()
    module[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        VideoClassifier(module, "BCTHW")(clip_of().transpose(1, 2))
    with pytest.raises(
        ValueError, match=r"3 channels and 4 frames.*probably swapped.*expected input\[2, 4, 3, 16, 16\]"
    ):
        VideoClassifier(conv_net(), "BTCHW")(clip_of())


def test_additional_forward_args_reach_the_module() -> None:
    class Scaled(nn.Module):
        def forward(self, clip: Tensor, scale: Tensor, shift: float) -> Tensor:
            return clip.mean((1, 3, 4)) * scale + shift

    clip, scale = clip_of(), torch.tensor([[2.0], [3.0]])
    clf = VideoClassifier(Scaled(), "BCTHW")
    assert torch.equal(clf(clip, scale, 1.0), clip.mean((1, 3, 4)) * scale + 1)
    attributions = IntegratedGradients(clf).attribute(clip, target=0, additional_forward_args=(scale, 1.0))
    torch.testing.assert_close(attributions.sum((1, 2, 3, 4)), clip.mean((1, 3, 4))[:, 0] * scale[:, 0])


def test_modules_without_parameters_keep_the_dtype_of_the_clip() -> None:
    class Mean(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            return clip.mean((2, 3, 4))

    assert VideoClassifier(Mean(), "BCTHW")(clip_of(dtype=torch.float64)).dtype == torch.float64


def test_a_custom_family() -> None:
    grid = TokenGrid(2, 4, 4, tubelet=(2, 4, 4))
    family = Family(
        name="custom", grid=lambda model: grid, attention=lambda model: [], pooling=lambda model: "mean", layout="BCTHW"
    )
    clf = VideoClassifier(conv_net(), family=family)
    assert (clf.grid, clf.layout.axes) == (grid, "BCTHW")
    assert clf(clip_of().transpose(1, 2)).shape == (2, 3)


def test_invalid_modules_and_labels_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"Sequential is not a recognized transformer.*layout='BCTHW'"):
        VideoClassifier(conv_net())
    with pytest.raises(TypeError, match=r"got function.*VideoClassifier.from_pretrained"):
        VideoClassifier(lambda clip: clip, "BCTHW")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="string 'abc'"):
        VideoClassifier(conv_net(), "BCTHW", labels="abc")


@in_one_case()
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_frames": 0}, ValueError, "num_frames must be an integer of at least 1, got 0"),
        ({"num_frames": -2}, ValueError, "num_frames must be an integer of at least 1, got -2"),
        ({"num_frames": 2.5}, TypeError, r"num_frames must be an integer.*2\.5"),
        ({"image_size": 16}, TypeError, r"image_size must be \(height, width\) in pixels, got 16"),
        ({"image_size": (16, 16, 3)}, TypeError, r"image_size must be \(height, width\).*\(16, 16, 3\)"),
        ({"image_size": (16, 0)}, ValueError, "image_size must be an integer of at least 1.*got 0"),
        ({"image_size": (16, "a")}, TypeError, "image_size must be an integer.*'a'"),
    ],
)
def test_invalid_sizes_are_rejected(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        VideoClassifier(conv_net(), "BCTHW", **options)


def test_preprocess_checks_type_and_number_of_frames() -> None:
    clf = VideoClassifier(conv_net(), "BCTHW", num_frames=FRAMES, preprocessing=Preprocessing())
    frames = [np.zeros((SIZE, SIZE, 3), np.uint8)] * FRAMES
    with pytest.raises(TypeError, match=r"frames must be a uint8 array or tensor .*got list.*np.stack"):
        clf.preprocess(frames)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got str. Read a file with io.read_video"):
        clf.preprocess("video.mp4")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got Video. Pass video.frames"):
        clf.preprocess(Video(np.stack(frames), 25.0, np.arange(FRAMES)))  # type: ignore[arg-type]
    assert clf.preprocess(np.stack(frames)).shape == (1, 3, FRAMES, SIZE, SIZE)
    with pytest.raises(ValueError, match=r"must have 4 frames, got 3 \(shape \(3, 16, 16, 3\)\)"):
        clf.preprocess(torch.from_numpy(np.stack(frames[:3])))


def test_without_preprocessing_the_error_says_how_to_pass_it() -> None:
    clf = VideoClassifier(conv_net(), "BCTHW")
    for call in (lambda: clf.preprocess(np.zeros((4, 8, 8, 3), np.uint8)), lambda: clf.crop_box(8, 8)):
        with pytest.raises(ValueError, match=r"preprocessing=Preprocessing\(resize"):
            call()


# ---------------------------------------------------------------- behavior as an nn.Module


def test_wrapping_does_not_change_the_module() -> None:
    net = conv_net().train()
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    clf = VideoClassifier(net, "BCTHW")
    assert clf.module is net and net.training and not net[0].weight.requires_grad
    assert set(clf.state_dict()) == {f"module.{name}" for name in before}
    clf.load_state_dict({f"module.{name}": value for name, value in before.items()})


@pytest.mark.parametrize("name", ["videomae", "conv"])
def test_copies_are_independent(name: str) -> None:
    clf = VideoClassifier(conv_net(), "BCTHW") if name == "conv" else VideoClassifier(videomae(), layout="BCTHW")
    clip = clip_of().transpose(1, 2)
    expected, copied = clf(clip).detach(), copy.deepcopy(clf)
    with torch.no_grad():
        for parameter in clf.parameters():
            parameter.zero_()
    assert torch.equal(copied(clip), expected) and not torch.equal(clf(clip), expected)
    assert (copied.layout, copied.grid, copied.labels) == (clf.layout, clf.grid, clf.labels)


def test_second_derivatives_and_no_grad() -> None:
    class Square(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            return clip.pow(3).transpose(1, 2).sum((2, 3, 4))

    clf, clip = VideoClassifier(Square(), "BCTHW"), clip_of().requires_grad_()
    first = torch.autograd.grad(clf(clip).sum(), clip, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), clip)[0]
    torch.testing.assert_close(second, 6 * clip.detach())
    with torch.no_grad():
        assert not clf(clip).requires_grad
    with torch.inference_mode():
        assert clf(clip_of()).shape == (2, 3)


# ---------------------------------------------------------------- predict and class_index


def test_predict_returns_the_sorted_softmax() -> None:
    clf = VideoClassifier(videomae())
    probabilities = clf(clip_of(1)).softmax(1)[0].tolist()
    expected = sorted(zip(LABELS.values(), probabilities, strict=True), key=lambda pair: -pair[1])
    answer = clf.predict(clip_of(1), k=100)
    assert [label for label, _ in answer] == [label for label, _ in expected]
    assert [value for _, value in answer] == pytest.approx([value for _, value in expected])
    assert sum(value for _, value in answer) == pytest.approx(1)
    assert clf.predict(clip_of(1), k=2) == answer[:2]
    batch = clf.predict(torch.cat([clip_of(1), clip_of(1, seed=5)]), k=1)
    assert batch[0][0][0] == answer[0][0] and len(batch) == 2


def test_predict_runs_in_eval_mode_and_restores_every_mode() -> None:
    net = nn.Sequential(conv_net(), nn.Dropout(0.9))
    clf = VideoClassifier(net, "BCTHW").train()
    net[0][0].eval()  # a frozen layer, as in fine-tuning
    modes = [module.training for module in clf.modules()]
    clip = clip_of(1).transpose(1, 2)
    first = clf.predict(clip)
    assert first == clf.predict(clip) and [label for label, _ in sorted(first)] == ["0", "1", "2"]
    assert [module.training for module in clf.modules()] == modes
    with pytest.raises(RuntimeError):
        clf.predict(torch.rand(1, 5, 4, 16, 16))
    assert [module.training for module in clf.modules()] == modes


def test_predict_rejects_invalid_arguments() -> None:
    clf = VideoClassifier(conv_net(), "BCTHW", labels=["a", "b"])
    with pytest.raises(ValueError, match="each output of the model, 3 here, got 2: "):
        clf.predict(clip_of(1).transpose(1, 2))
    with pytest.raises(ValueError, match=r"at least 1.*got 0"):
        clf.predict(clip_of(1).transpose(1, 2), k=0)
    for k in (2.5, "2", True):
        with pytest.raises(TypeError, match=f"k must be an integer.*{k!r}"):
            clf.predict(clip_of(1).transpose(1, 2), k=k)


def test_label_names() -> None:
    assert VideoClassifier(conv_net(), "BCTHW").label_names(3) == ["0", "1", "2"]
    clf = VideoClassifier(conv_net(), "BCTHW", labels=["a", "b"])
    assert clf.label_names(2) == ["a", "b"]
    with pytest.raises(ValueError, match=r"one label for each output of the model, 3 here, got 2.*in the order"):
        clf.label_names(3)
    with pytest.raises(ValueError, match=r"1 here, got 2.*label of a high output alone"):  # ["no fall", "fall"]
        clf.label_names(1)


def test_class_index_of_labels_and_indices() -> None:
    clf = VideoClassifier(conv_net(), "BCTHW", labels=["Waving", "jumping jacks", "run", "Run", "7"])
    assert [clf.class_index(x) for x in ("waving", " Jumping Jacks", "run", "Run", "7", "0")] == [0, 1, 2, 3, 4, 0]
    assert [clf.class_index(x) for x in (2, np.int64(3), torch.tensor(4))] == [2, 3, 4]
    with pytest.raises(ValueError, match=r"no label 'jumpin jack'. Similar labels: \['jumping jacks'\]"):
        clf.class_index("jumpin jack")
    with pytest.raises(ValueError, match=r"The labels are \['Waving'"):
        clf.class_index("xyz")
    with pytest.raises(ValueError, match=r"belongs to several classes: \[2, 3\]"):
        clf.class_index("RUN")
    for index in (5, -1, "5"):
        with pytest.raises(ValueError, match=r"must be from 0 to 4, got"):
            clf.class_index(index)
    for value in (1.5, True, None):
        with pytest.raises(TypeError, match="a label or a class index"):
            clf.class_index(value)
    unnamed = VideoClassifier(conv_net(), "BCTHW")
    assert unnamed.class_index(1000) == unnamed.class_index("1000") == 1000
    with pytest.raises(ValueError, match="has no labels, got 'waving'"):
        unnamed.class_index("waving")


def test_repr_is_one_line_without_the_modules_inside() -> None:
    assert repr(VideoClassifier(videomae())) == (
        "VideoClassifier(VideoMAEForVideoClassification, layout='BTCHW', num_frames=4, image_size=(16, 16), 3 classes, "
        "output='logits', transformer=VideoMAEForVideoClassification)"
    )
    wrapped = VideoClassifier(nn.Sequential(videomae()), labels=["a", "b", "c"]).versus("b")
    assert repr(wrapped).startswith("VideoClassifier(Sequential, layout='BTCHW', num_frames=4")
    assert repr(wrapped).endswith("output='score', transformer=VideoMAEForVideoClassification in '0', versus=1)")
    packed = VideoClassifier(conv_net(), "BCTHW", output="score", pack=lambda clip: clip).toward("lower")
    assert repr(packed) == (
        "VideoClassifier(Sequential, layout='BCTHW', num_frames=None, image_size=None, unnamed classes, "
        "output='score', packed, toward='lower')"
    )


class Pathways(nn.Module):
    """A module that takes a list of two clips."""

    def forward(self, pathways: list[Tensor]) -> Tensor:
        slow, fast = pathways
        return slow.mean((2, 3, 4)) + fast.mean((2, 3, 4))


@pytest.mark.parametrize("batch", [1, 2])  # two clips are unpacked, and fail later
def test_a_module_that_takes_a_list_needs_pack(batch: int) -> None:
    with pytest.raises(ValueError, match=r"must take a clip as one tensor.*pass pack="):
        VideoClassifier(Pathways(), "BCTHW")(torch.rand(batch, 3, 4, 8, 8))
    with pytest.raises(ValueError, match=r"got a tuple of 2.*Return a list"):
        VideoClassifier(Pathways(), "BCTHW", pack=lambda clip: (clip[:, :, ::2], clip))(torch.rand(batch, 3, 4, 8, 8))
    VideoClassifier(Pathways(), "BCTHW", pack=lambda clip: [clip[:, :, ::2], clip])(torch.rand(batch, 3, 4, 8, 8))
