"""What a model's output means: found in containers, read as logits, probabilities, sigmoid logits or a score."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import captum.attr
import pytest
import torch
from covering import in_one_case
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from captum_staa import VideoClassifier, VideoFeatureAblation, VideoOcclusion, metrics

CLIPS = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0]])
FEATURES = torch.ones(2, 7)


class Returns(nn.Module):
    """A module whose output is a function of fixed logits, which depend on the clip for autograd alone."""

    def __init__(self, make: Callable[[Tensor], Any], logits: Tensor = LOGITS) -> None:
        super().__init__()
        self.make, self.logits = make, logits

    def forward(self, clip: Tensor) -> Any:
        return self.make(self.logits[: len(clip)] + 0 * clip.flatten(1).sum(1, keepdim=True))


def classifier(make: Callable[[Tensor], Any], logits: Tensor = LOGITS, **options: Any) -> VideoClassifier:
    return VideoClassifier(Returns(make, logits).eval(), layout="BTCHW", **options)


class Named(NamedTuple):
    embedding: Tensor
    scores: Tensor


@dataclass
class Record:
    features: Tensor
    scores: Tensor


CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "logits first": lambda z: (z, FEATURES),
    "logits last": lambda z: (FEATURES, z),
    "loss and logits": lambda z: (torch.tensor(0.5), z),
    "list": lambda z: [FEATURES, z],
    "dict": lambda z: {"features": FEATURES, "scores": z},
    "named tuple": lambda z: Named(FEATURES, z),
    "dataclass": lambda z: Record(FEATURES, z),
    "object": lambda z: SimpleNamespace(features=FEATURES, scores=z),
    "Hugging Face output": lambda z: BaseModelOutput(last_hidden_state=FEATURES, hidden_states=(z,)),
    "nested": lambda z: {"head": {"scores": z}, "features": FEATURES},
    "labels": lambda z: (z.argmax(1), z),
    "weights of another batch axis": lambda z: (torch.ones(5, 3), z),
    "pooled map": lambda z: (FEATURES, z[..., None, None, None]),
}


@in_one_case()
@pytest.mark.parametrize("name", CONTAINERS)
def test_the_tensor_with_one_column_per_label_is_the_output(name: str) -> None:
    clf = classifier(CONTAINERS[name], labels=["a", "b", "c"])
    assert torch.equal(clf(CLIPS), LOGITS)


def test_logits_by_name_come_before_tensors_of_the_same_shape() -> None:
    assert torch.equal(classifier(lambda z: {"aux": -z, "logits": z}, labels=["a", "b", "c"])(CLIPS), LOGITS)


@in_one_case()
@pytest.mark.parametrize("labels", [None, ["a", "b", "c"]])
def test_an_ambiguous_output_lists_the_candidates_and_output_key_chooses(labels: list[str] | None) -> None:
    both: Callable[[Tensor], Any] = lambda z: {"rgb": z, "flow": -z}  # noqa: E731
    with pytest.raises(ValueError, match=r"'rgb' of shape \(2, 3\), 'flow' of shape \(2, 3\).*output_key"):
        classifier(both, labels=labels)(CLIPS)
    assert torch.equal(classifier(both, labels=labels, output_key="flow")(CLIPS), -LOGITS)
    assert torch.equal(classifier(lambda z: [(-z, z)], output_key=(0, 1))(CLIPS), LOGITS)
    with pytest.raises(ValueError, match=r"output_key must name a tensor.*'audio'.*'rgb'"):
        classifier(both, output_key="audio")(CLIPS)


def test_the_output_of_an_earlier_call_is_the_output_of_a_batch_with_as_many_clips_as_classes() -> None:
    class Texts(nn.Module):  # X-CLIP has the score of each text for each clip, too
        def forward(self, clip: Tensor) -> dict[str, Tensor]:
            scores = clip.flatten(1)[:, :3]
            return {"per_text": scores.T, "per_clip": scores}

    clips = torch.rand(3, 3, 2, 4, 4)
    with pytest.raises(ValueError, match=r"'per_text' of shape \(3, 3\), 'per_clip' of shape \(3, 3\).*output_key"):
        VideoClassifier(Texts(), "BCTHW", labels=["a", "b", "c"])(clips)
    clf = VideoClassifier(Texts(), "BCTHW", labels=["a", "b", "c"])
    assert torch.equal(clf(clips[:2]), clips[:2].flatten(1)[:, :3])
    assert torch.equal(clf(clips), clips.flatten(1)[:, :3])


@in_one_case()
@pytest.mark.parametrize("make", [lambda z: None, lambda z: "text", lambda z: {"a": 1}, lambda z: z.argmax(1)])
def test_an_output_without_floats_is_a_type_error_or_names_no_tensor(make: Callable[[Tensor], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match="must return"):
        classifier(lambda z: (make(z),))(CLIPS)


@in_one_case()
@pytest.mark.parametrize(
    "make", [lambda z: z[:, 0], lambda z: z[:, :1], lambda z: z[:, :1, None, None], lambda z: z[:, 0].squeeze()]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_single_output_has_one_column(make: Callable[[Tensor], Tensor], batch: int) -> None:
    clf = classifier(make)
    assert torch.equal(clf(CLIPS[:batch]), LOGITS[:batch, :1])
    assert clf.output == "score"  # said in the log
    assert clf.predict(CLIPS[:1]) == [("0", 2.0)]


def test_rows_of_frames_instead_of_clips_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"one row per clip, 2 here, got outputs of shape \(8, 3\)"):
        classifier(lambda z: z.repeat(4, 1))(CLIPS)


# --- kinds ------------------------------------------------------------------------------------------------------

KIND_CASES: dict[str, tuple[Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor]]] = {
    "logits": (lambda z: z, "logits", lambda z: z.softmax(1)),
    "softmax": (lambda z: z.softmax(1), "probabilities", lambda z: z.softmax(1)),
    "mean of views": (
        lambda z: z.softmax(1)[:, None].expand(-1, 3, -1).mean(1),
        "probabilities",
        lambda z: z.softmax(1),
    ),
    "sigmoids": (lambda z: z.sigmoid(), "probabilities", lambda z: z.sigmoid()),
    "one sigmoid": (lambda z: z[:, :1].sigmoid(), "probabilities", lambda z: z[:, :1].sigmoid()),
    "log softmax": (lambda z: z.log_softmax(1), "logits", lambda z: z.softmax(1)),
}


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", KIND_CASES)
def test_the_kind_of_output_is_found_in_the_first_call(
    name: str, graph: bool, caplog: pytest.LogCaptureFixture
) -> None:
    make, kind, expected = KIND_CASES[name]
    clf = classifier(make)
    with torch.set_grad_enabled(graph), caplog.at_level(logging.WARNING, "captum_staa"):
        clf(CLIPS)
    assert clf.output == kind
    assert bool(caplog.records) == (kind != "logits")
    torch.testing.assert_close(clf.values(clf(CLIPS)), expected(LOGITS))
    best = clf.predict(CLIPS)[1][0]
    assert best[1] == pytest.approx(float(expected(LOGITS)[1].max()))


@in_one_case()
@pytest.mark.parametrize(
    ("make", "output", "advice"),
    [
        (lambda z: z.softmax(1), "logits", "output='probabilities'"),
        (lambda z: z.sigmoid(), "sigmoid", "output='probabilities'"),
        (lambda z: z, "probabilities", "output='logits'"),
        (lambda z: z[:, :1], "logits", "output='sigmoid'"),
    ],
)
def test_outputs_that_contradict_the_stated_kind_are_an_error(
    make: Callable[[Tensor], Tensor], output: Any, advice: str
) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=advice):
        classifier(make, output=output)(CLIPS)


def test_a_model_with_a_softmax_in_eval_mode_only_is_judged_in_eval_mode() -> None:
    class Head(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            return LOGITS if self.training else LOGITS.softmax(1)

    clf = VideoClassifier(Head().train(), layout="BTCHW")
    clf(CLIPS)
    assert clf.output == "logits"
    torch.testing.assert_close(torch.tensor([p for _, p in clf.predict(CLIPS)[0]]).sum(), torch.tensor(1.0))
    assert clf.output == "probabilities"
    assert clf.module.training


@in_one_case()
@pytest.mark.parametrize(
    ("problem_type", "num_labels", "kind"),
    [
        ("regression", 1, "score"),
        ("multi_label_classification", 3, "sigmoid"),
        ("single_label_classification", 3, "logits"),
        (None, 1, "score"),
        (None, 3, "logits"),
    ],
)
def test_the_kind_is_read_from_a_hugging_face_config(problem_type: str | None, num_labels: int, kind: str) -> None:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=8, num_frames=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        patch_size=4, problem_type=problem_type, num_labels=num_labels,
    )  # fmt: skip
    clf = VideoClassifier(VideoMAEForVideoClassification(config).eval())
    assert clf.output == kind
    with torch.no_grad():
        outputs = clf(CLIPS)
    shown = torch.tensor(
        [[dict(row)[clf.label_names(num_labels)[i]] for i in range(num_labels)] for row in clf.predict(CLIPS)]
    )
    expected = {"score": outputs, "sigmoid": outputs.sigmoid(), "logits": outputs.softmax(1)}[kind]
    torch.testing.assert_close(shown, expected)


def test_predict_names_a_score_by_its_value_and_sorts_in_descending_order() -> None:
    clf = classifier(lambda z: z, labels=["calm", "loud", "fast"], output="score")
    assert clf.predict(CLIPS[:1], k=2) == [("calm", 2.0), ("fast", 0.5)]


def test_outputs_per_frame_are_explained_by_a_tuple_and_not_predicted() -> None:
    from captum.attr import Saliency

    class PerFrame(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            return clip.mean((2, 3, 4))[..., None] * torch.tensor([1.0, 2.0])  # (B, T, K)

    clf = VideoClassifier(PerFrame().eval(), layout="BTCHW")
    assert clf(CLIPS).shape == (2, 4, 2)
    gradient = Saliency(clf).attribute(CLIPS.clone().requires_grad_(), target=(1, 1), abs=False)
    torch.testing.assert_close(gradient.sum((2, 3, 4)), torch.tensor([[0.0, 2.0, 0.0, 0.0]] * 2))
    with pytest.raises(ValueError, match=r"outputs \(B, K\) to predict.*tuple as target"):
        clf.predict(CLIPS)


def test_a_target_that_leaves_several_outputs_asks_for_a_tuple() -> None:
    clf = VideoClassifier(nn.Linear(8, 5), "BTCHW", output="score")  # (B, 4, 3, 8, 5)
    with pytest.raises(ValueError, match=r"got 1, which leaves outputs of shape \(2, 3, 8, 5\). Pass a tuple"):
        VideoOcclusion(clf).attribute(CLIPS, (4, 4, 4), target=1)


# --- why this class and not that --------------------------------------------------------------------------------


@in_one_case()
@pytest.mark.parametrize(("kind", "make"), [("logits", lambda z: z), ("probabilities", lambda z: z.softmax(1))])
def test_versus_subtracts_the_logit_of_the_other_class(kind: Any, make: Callable[[Tensor], Tensor]) -> None:
    clf = classifier(make, labels=["run", "walk", "jump"], output=kind)
    torch.testing.assert_close(clf.versus("walk")(CLIPS), LOGITS - LOGITS[:, 1:2])
    rest = clf.versus("rest")(CLIPS)
    p = LOGITS.softmax(1)
    torch.testing.assert_close(rest, (p / (1 - p)).log())
    assert clf.versus(2).predict(CLIPS)[0][0] == ("run", 1.5)  # a score: no softmax of a difference
    assert torch.equal(clf(CLIPS), make(LOGITS))  # the classifier itself is unchanged


@in_one_case()
@pytest.mark.parametrize("target", [1, "walk", [0, 1], torch.tensor([1, 2]), torch.tensor(1), [(0,), (1,)]], ids=str)
def test_the_class_of_versus_is_refused_as_a_target(target: Any) -> None:
    single = VideoClassifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), "BTCHW", labels=["run", "walk", "jump"])
    clf = single.versus("walk")
    with pytest.raises(ValueError, match=r"must differ from the class of versus, got 'walk' \(index 1\) for both"):
        VideoOcclusion(clf).attribute(CLIPS, (4, 4, 4), target=target)
    with pytest.raises(ValueError, match=r"'walk' \(index 1\) for both( in row [01] of the batch)?, whose difference"):
        metrics.insertion(clf, CLIPS, CLIPS, target=target)
    assert VideoOcclusion(clf).attribute(CLIPS, (4, 4, 4), target=[0, 2]).abs().sum((1, 2, 3, 4)).min() > 0
    for other in (single, single.versus("rest")):
        VideoOcclusion(other).attribute(CLIPS, (4, 4, 4), target=target)


HALVES = (torch.arange(4) // 2).view(1, 4, 1, 1, 1)
CAPTUM: dict[str, Callable[[VideoClassifier, Any], Any]] = {  # select the target's output with and without a gradient
    "Saliency": lambda clf, k: captum.attr.Saliency(clf).attribute(CLIPS, target=k),
    "IntegratedGradients": lambda clf, k: captum.attr.IntegratedGradients(clf).attribute(CLIPS, target=k, n_steps=2),
    "DeepLift": lambda clf, k: captum.attr.DeepLift(clf).attribute(CLIPS, target=k),
    "FeatureAblation": lambda clf, k: captum.attr.FeatureAblation(clf).attribute(CLIPS, target=k, feature_mask=HALVES),
    "KernelShap": lambda clf, k: captum.attr.KernelShap(clf).attribute(
        CLIPS[:1], target=k[:1] if isinstance(k, (list, Tensor)) and len(k) > 1 else k, feature_mask=HALVES, n_samples=4
    ),
}


@in_one_case()
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks:UserWarning")
@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients:UserWarning")
@pytest.mark.parametrize("target", [1, [1, 0], torch.tensor([1, 2]), (1,)], ids=str)
def test_methods_of_captum_refuse_the_class_of_versus(target: Any) -> None:
    """They would return zeros in silence: they select the output of the target themselves."""
    clf = VideoClassifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), "BTCHW", labels=["run", "walk", "jump"])
    for attribute in CAPTUM.values():
        with pytest.raises(ValueError, match=r"must differ from the class of versus, got 'walk' \(index 1\)"):
            attribute(clf.versus("walk"), target)
        assert attribute(clf.versus("walk"), 2).abs().sum() > 0
        attribute(clf.versus("rest"), target)


def test_outputs_of_versus_are_tensors_for_everything_else() -> None:
    clf = VideoClassifier(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)), "BTCHW").versus(1)
    clips = CLIPS.clone().requires_grad_()
    outputs = clf(clips)
    for plain in (outputs + 0, outputs[:, 0], outputs[0], outputs.softmax(1), copy.deepcopy(outputs.detach())):
        assert type(plain) is Tensor
    assert torch.equal(outputs.argsort(1), (outputs + 0).argsort(1))
    for loss in (outputs.sum(), nn.functional.cross_entropy(outputs, torch.tensor([1, 0]))):
        (gradient,) = torch.autograd.grad(loss, clips, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert torch.func.grad(lambda x: clf(x)[:, 0].sum())(CLIPS).abs().sum() > 0
    for maps in (
        VideoOcclusion(clf).attribute_maps(CLIPS, (4, 4, 4), target=0),
        VideoFeatureAblation(clf).attribute_maps(CLIPS, target=0, feature_mask=HALVES),
    ):
        assert type(maps.logits) is Tensor


def test_versus_of_one_output_and_of_unknown_labels_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"several classes.*raises"):
        classifier(lambda z: z[:, :1], labels=["fall"]).versus(0)
    with pytest.raises(ValueError, match="'swim'"):
        classifier(lambda z: z, labels=["run", "walk", "jump"]).versus("swim")
