"""Wherever the classifier knows labels, a label as target gives what its class index gives."""

from __future__ import annotations

import pytest
import torch
from captum.attr import NoiseTunnel
from covering import in_one_case
from torch import nn

from captum_staa import (
    RISE,
    STAA,
    AttentionBranch,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoClassifier,
    VideoFeatureAblation,
    VideoOcclusion,
    metrics,
)
from captum_staa.attr import ReleasedSTAA
from captum_staa.metrics.sanity import class_sensitivity

LABELS = ["waving", "Arm Wrestling", "jumping"]
CLIP = torch.rand(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
WINDOWS = {"sliding_window_shapes": (2, 4, 4)}


def conv() -> VideoClassifier:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    return VideoClassifier(net.eval(), layout="BCTHW", labels=LABELS, output="logits")


CLF = conv()
METHODS = {
    "occlusion": lambda target: VideoOcclusion(CLF).attribute(CLIP, (2, 4, 4), target=target),
    "occlusion, by position": lambda target: VideoOcclusion(CLF).attribute(CLIP, (2, 4, 4), None, None, target),
    "ablation": lambda target: VideoFeatureAblation(CLF).attribute(
        CLIP, target=target, feature_mask=torch.arange(4).view(1, 1, 4, 1, 1).expand(1, 1, 4, 8, 8)
    ),
    "rise": lambda target: RISE(CLF).attribute(CLIP, target=target, n_samples=4),
    "grad-cam": lambda target: GradCAM(CLF, "0").attribute(CLIP, target),
    "grad-cam maps": lambda target: GradCAM(CLF, "0").attribute_maps(CLIP, target=target).joint,
    "masks": lambda target: SpatioTemporalPerturbation(CLF).attribute(CLIP, target=target, iterations=2),
    "noise tunnel": lambda target: NoiseTunnel(VideoOcclusion(CLF)).attribute(
        CLIP, nt_samples=2, stdevs=0.0, target=target, **WINDOWS
    ),
    "insertion": lambda target: metrics.insertion(CLF, CLIP, CLIP, target=target, steps=4).score,
    "deletion": lambda target: metrics.deletion(CLF, CLIP, CLIP, target=target, steps=4).score,
    "faithfulness": lambda target: metrics.faithfulness(CLF, CLIP, CLIP, target=target),
    "aopc": lambda target: metrics.aopc(CLF, CLIP, CLIP, target=target),
}


@in_one_case()
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("labels", "indices"), [("arm wrestling", 1), (["jumping", "waving"], [2, 0]), (("jumping",), (2,))]
)
def test_labels_give_what_class_indices_give(name, labels, indices):
    explain = METHODS[name]
    assert torch.equal(explain(labels), explain(indices))
    assert not torch.equal(explain(indices), explain(0)) or name == "faithfulness"


@in_one_case()
@pytest.mark.parametrize("method", [STAA, ReleasedSTAA])
def test_staa_takes_labels(method):
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clip = torch.rand(1, 16, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(method(clf).attribute(clip, target="bright-bottom"), method(clf).attribute(clip, target=1))


@pytest.mark.filterwarnings("ignore:the probability of the target changes")  # on clips without a motion
def test_gates_and_their_usage_take_labels():
    clf = VideoClassifier.from_pretrained("tiny-st-abn-motion")
    clip = torch.rand(2, 3, 16, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(AttentionBranch(clf).attribute(clip, "right"), AttentionBranch(clf).attribute(clip, 1))
    by_label, by_index = (metrics.attention_usage(clf, clip, target=target) for target in ("right", 1))
    assert torch.equal(by_label.temporal_flat, by_index.temporal_flat)


def test_class_sensitivity_takes_labels():
    def explain(model, inputs, target):
        return GradCAM(model, "0").attribute(inputs, target)

    by_label = class_sensitivity(explain, CLF, CLIP, "waving", others=["jumping"], layout="BCTHW")
    by_index = class_sensitivity(explain, CLF, CLIP, 0, others=[2], layout="BCTHW")
    assert torch.equal(by_label.signed, by_index.signed)


@pytest.mark.parametrize(
    ("model", "target", "error", "says"),
    [
        (CLF, "arm wrestlin", ValueError, r"there is no label 'arm wrestlin'\. Similar labels: \['Arm Wrestling'\]"),
        (CLF.module, "waving", TypeError, r"got 'waving' for Sequential\. Pass an index, or explain VideoClassifier"),
        (VideoClassifier(CLF.module, "BCTHW"), "waving", ValueError, "has no labels, got 'waving'"),
    ],
)
def test_unknown_labels_are_errors_with_the_fix(model, target, error, says):
    with pytest.raises(error, match=says):
        VideoOcclusion(model, "BCTHW").attribute(CLIP, (2, 4, 4), target=target)
