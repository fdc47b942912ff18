"""The models of the published comparison, each with the methods that only its kind has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from train_discovered import CAM_LAYERS, trained
from train_video_language import AFTER, ANSWERS, BEFORE, PLACE, QUESTIONS

from captum_staa import STAA, AnswerAttribution, GradCAM, TokenGrid, VideoClassifier, VideoLanguageModel
from captum_staa.benchmark import MethodSpec
from captum_staa.benchmark.scenes import LABELS

TRANSFORMERS, CNNS, BRANCH, LANGUAGE = "Video transformers", "3D CNNs", "ST-ABN", "A video language model"

# GradCAM by name takes the patch embedding of a transformer of no declared family. That of Swin is read by a norm only.
FIRST: dict[str, tuple[str, str | None, TokenGrid]] = {
    "swin": ("norm0", "BTHWC", TokenGrid(8, 12, 12, tubelet=(2, 4, 4))),
}


@dataclass(frozen=True)
class Subject:
    """A model of the comparison.

    Attributes:
        group: heading of the tables that it is in.
        task: task of its planted clips.
        load: returns the classifier.
        own: returns the methods that are not made by their names, from the classifier.
        origin: where its weights come from.
    """

    group: str
    task: str
    load: Callable[[], VideoClassifier]
    own: Callable[[VideoClassifier], dict[str, Any]] = field(default=lambda classifier: {})
    origin: str = "bundled"


class Words(nn.Module):
    """A video language model with a fixed question, as a classifier whose classes are words at one place of the answer.

    `VideoLanguageModel.as_classifier` explains one answer. Here the answer differs from clip to clip.
    """

    def __init__(self, vlm: VideoLanguageModel, task: str) -> None:
        super().__init__()
        self.model = vlm.model  # registered, so that random weights reach it
        self.vlm = [vlm]
        self.question = QUESTIONS[task]
        self.answers = [f"{BEFORE}{word}{AFTER}" for word in ANSWERS[task]]
        self.ids = [vlm.answer_ids(answer) for answer in self.answers]

    def forward(self, clip: Tensor) -> Tensor:
        """Return logits ``(B, K)`` of K words for clips ``(B, T, 3, H, W)``."""
        vlm = self.vlm[0]
        prompt = vlm.prompt(self.question, (clip.shape[1], clip.shape[3], clip.shape[4]))
        return vlm.answer_logits(clip, prompt, self.ids[0])[:, PLACE, [int(ids[PLACE]) for ids in self.ids]]


def _bundled(name: str) -> VideoClassifier:
    return VideoClassifier.from_pretrained(f"tiny-{name}")


def _language(name: str, task: str) -> VideoClassifier:
    module = Words(VideoLanguageModel.from_pretrained(name), task).eval()
    return VideoClassifier(module, layout="BTCHW", labels=list(LABELS[task]))


def _unknown(kind: str, classifier: VideoClassifier) -> dict[str, Any]:
    """Methods that take the layers of a transformer, which by name need a declared family."""

    def cam(layer: str, axes: str | None, grid: TokenGrid, weighting: Any) -> MethodSpec:
        def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Any:
            own = GradCAM(classifier, layer, weighting=weighting, layer_axes=axes, grid=grid)
            return lambda clip, target: own.attribute(clip, target=target)

        return MethodSpec(make, f"{weighting}, {layer}", smoothed=weighting == "hirescam")

    found: dict[str, Any] = {"STAA (relevance)": STAA(classifier), "STAA": STAA(classifier, mode="attention")}
    if kind in FIRST:
        found["GradCAM"] = cam(*FIRST[kind], "hirescam")
    return {**found, "GradCAM (last)": cam(*CAM_LAYERS[kind], "gradcam")}


def _answer(classifier: VideoClassifier) -> dict[str, Any]:
    words: Any = classifier.module

    def relevance(clip: Tensor, target: int) -> Tensor:
        others = [ids[PLACE] for at, ids in enumerate(words.ids) if at != target]
        answered = words.vlm[0].as_classifier(words.question, words.answers[target], [int(other) for other in others])
        return AnswerAttribution(answered).attribute(clip, target=PLACE)

    return {"AnswerAttribution": relevance}


def _of(group: str, name: str) -> Subject:
    return Subject(group, name.rpartition("-")[2], partial(_bundled, name))


def _trained(kind: str, task: str = "pattern") -> Subject:
    return Subject(
        TRANSFORMERS,
        task,
        lambda: trained(kind, task)[0],
        partial(_unknown, kind),
        "`benchmarks/discovered`, trained by `benchmarks/train_discovered.py`",
    )


SUBJECTS: dict[str, Subject] = {
    **{name: _of(TRANSFORMERS, name) for name in ("videomae-pattern", "timesformer-motion", "vivit-order")},
    "vjepa2-motion": _of(TRANSFORMERS, "vjepa2-motion"),
    "mvit-pattern": _trained("mvit"),
    "swin-pattern": _trained("swin"),
    "plain-pattern": _trained("plain"),
    **{name: _of(CNNS, name) for name in ("resnet3d-motion", "resnet3d-order")},
    "qwen2_5_vl-pattern": Subject(LANGUAGE, "pattern", partial(_language, "tiny-qwen2_5_vl", "pattern"), _answer),
    "st-abn-motion": _of(BRANCH, "st-abn-motion"),
}
