"""SpatioTemporalPerturbation on outputs that are not logits of classes, and on long clips."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from captum_staa import SpatioTemporalPerturbation, VideoClassifier
from captum_staa.metrics import auroc
from captum_staa.models.outputs import minus_other

AREA = {"areas": (0.1,), "perturbations_per_eval": 2}


class Places(nn.Module):
    """Outputs that each depend on one place of the clip: contrast in the left, right or lower part of some frames."""

    def __init__(self, weights: tuple[float, ...] = (1.0, 1.0, 1.0)) -> None:
        super().__init__()
        self.weights = torch.tensor(weights)

    def forward(self, clip: Tensor) -> Tensor:  # (B, 3, T, 12, 12)
        parts = [clip[:, :, 2:4, :4, :4], clip[:, :, 2:4, :4, 8:], clip[:, :, 4:6, 8:, 4:8]]
        return 8 * self.weights * torch.stack([part.square().mean((1, 2, 3, 4)) for part in parts], 1) - 3


def clip_of(frames: int = 8) -> Tensor:
    return torch.randn(1, 3, frames, 12, 12, generator=torch.Generator().manual_seed(0))


def place(number: int) -> Tensor:
    """Where the model looks for this output, ``(1, 8, 12, 12)``."""
    found = torch.zeros(1, 8, 12, 12, dtype=torch.bool)
    t, y, x = ((slice(2, 4), slice(4), slice(4)), (slice(2, 4), slice(4), slice(8, 12)))[number]
    found[:, t, y, x] = True
    return found


def maps_of(clf: VideoClassifier, target: object, **options: object):
    return SpatioTemporalPerturbation(clf).attribute_maps(clip_of(), target=target, **{**AREA, **options})


def test_sigmoid_label_is_explained_by_its_own_logit() -> None:
    """The other labels change nothing, and the scores are sigmoids of the label's logit."""
    maps = [
        maps_of(VideoClassifier(Places(weights), "BCTHW", output="sigmoid"), 0)
        for weights in ((1.0, 1.0, 1.0), (1.0, -2.0, 0.0))
    ]
    assert torch.equal(maps[0].joint, maps[1].joint)
    assert auroc(maps[0].joint, place(0)) > 0.95 and auroc(maps[0].joint, place(1)) < 0.6
    torch.testing.assert_close(maps[0].whole, Places()(clip_of())[:, 0].sigmoid())
    as_classes = maps_of(VideoClassifier(Places((1.0, -2.0, 0.0)), "BCTHW", output="logits"), 0)
    assert not torch.allclose(as_classes.joint, maps[1].joint, rtol=0.01)


def test_score_is_explained_toward_higher_and_lower() -> None:
    """The first place raises the score, the second one lowers it."""

    class Score(Places):
        def forward(self, clip: Tensor) -> Tensor:
            left, right, _ = super().forward(clip).unbind(1)
            return (left - right)[:, None]

    clf = VideoClassifier(Score(), "BCTHW", output="score")
    for direction, evidence in (("higher", 0), ("lower", 1)):
        toward = clf.toward(direction)
        parts = maps_of(toward, None)
        assert auroc(parts.joint, place(evidence)) > 0.9 and auroc(parts.joint, place(1 - evidence)) < 0.3
        torch.testing.assert_close(parts.whole, toward(clip_of())[:, 0])
        assert parts.kept[0, 0] > parts.whole[0] > parts.removed[0, 0]


def test_output_per_frame_is_explained_by_its_frame() -> None:
    """Outputs ``(B, T, K)``, of which the target names a frame and a class."""

    class PerFrame(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            bright = clip[..., :4].square().mean((1, 3, 4)), clip[..., 4:].square().mean((1, 3, 4))
            return 8 * torch.stack([*bright, torch.ones_like(bright[0])], 2)

    clf = VideoClassifier(PerFrame(), "BCTHW", labels=["left", "right", "none"])
    for frame, label in ((1, 0), (6, 1)):
        parts = maps_of(clf, (frame, label))
        assert parts.temporal[0].argmax() == frame and parts.temporal[0, frame] > 0.5
        left = parts.joint[0, frame, :, :4].mean() > parts.joint[0, frame, :, 4:].mean()
        assert bool(left) == (label == 0)
        torch.testing.assert_close(parts.whole, clf(clip_of()).softmax(2)[:, frame, label])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_exact_for_certain_classes_and_along_any_axis(dtype: torch.dtype) -> None:
    values = torch.tensor([[30.0, -20.0, 3.0], [0.5, 0.25, 0.0], [-1e4, 1e4, 0.0]], dtype=dtype)
    found = minus_other(values, "logits", "rest")
    for row, column in torch.cartesian_prod(torch.arange(3), torch.arange(3)).tolist():
        others = values[row].double()[[other for other in range(3) if other != column]]
        expected = values[row, column].double() - others.logsumexp(0)
        torch.testing.assert_close(found[row, column].double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    per_frame = values[:, :2].reshape(1, 3, 2)
    torch.testing.assert_close(
        minus_other(per_frame, "logits", "rest", 2)[0], minus_other(values[:, :2], "logits", "rest")
    )


@pytest.mark.parametrize("cut", [37, pytest.param(62, marks=pytest.mark.slow)])
def test_cut_of_a_long_clip_is_found_within_one_frame(cut: int) -> None:
    """Two clips of different classes, joined to 100 frames of 27 x 48. Each shows a pattern that moves."""
    draw = torch.Generator().manual_seed(cut)
    clip, patterns = 0.5 * torch.randn(1, 1, 100, 27, 48, generator=draw), torch.randn(2, 1, 1, 9, 9, generator=draw)
    for frame in range(100):
        x = 2 + frame % 30
        clip[0, :, frame, 8:17, x : x + 9] += patterns[int(frame >= cut), :, 0]

    def model(clip: Tensor) -> Tensor:
        """The mean over frames of how well the best place fits each pattern."""
        fits = nn.functional.conv3d(clip, patterns / patterns.square().sum((1, 2, 3, 4), keepdim=True))
        return 10 * (fits - 0.3).relu().amax((3, 4)).mean(2)

    method = SpatioTemporalPerturbation(model, "BCTHW")
    for target in (0, 1):
        temporal = method.attribute_maps(clip, target=target, iterations=4, perturbations_per_eval=2).temporal[0]
        own = torch.arange(100) >= cut if target else torch.arange(100) < cut
        highest = temporal >= temporal.sort(descending=True).values[int(own.sum()) - 1]  # as many frames as it has
        wrong = (highest != own).nonzero()[:, 0]
        assert ((wrong == cut - 1) | (wrong == cut)).all()
