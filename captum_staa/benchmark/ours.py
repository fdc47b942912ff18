"""This library's methods by name; the plain name is the class as it is called with nothing else said."""

from __future__ import annotations

from typing import Any

from captum_staa import feature_masks
from captum_staa.attr import (
    RISE,
    STAA,
    AttentionBranch,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoFeatureAblation,
    VideoOcclusion,
)
from captum_staa.benchmark.layers import End
from captum_staa.benchmark.recipes import (
    SAMPLES,
    Call,
    DoesNotApply,
    Make,
    Recipe,
    ablation,
    frames,
    named_layer,
    windows,
)
from captum_staa.models import VideoClassifier
from captum_staa.models.st_abn.network import st_abn_of


def _staa(**options: Any) -> Make:
    def make(classifier: VideoClassifier, copies: int) -> Call:
        if classifier.family is None:
            raise DoesNotApply(
                f"{type(classifier.module).__name__} is no transformer of a known family: there is no attention to read"
            )
        explainer = STAA(classifier, **options)
        return lambda clip, target: explainer.attribute(clip, target=target)

    return make


def _perturbation(setting: str) -> Make:
    def make(classifier: VideoClassifier, copies: int) -> Call:
        explainer = SpatioTemporalPerturbation(classifier, setting=setting)
        return lambda clip, target: explainer.attribute(clip, target=target, perturbations_per_eval=copies)

    return make


def _occlusion(classifier: VideoClassifier, copies: int) -> Call:
    explainer = VideoOcclusion(classifier)
    return lambda clip, target: explainer.attribute(
        clip, *windows(classifier, clip), target=target, perturbations_per_eval=copies
    )


def _rise(classifier: VideoClassifier, copies: int) -> Call:
    explainer = RISE(classifier)
    return lambda clip, target: explainer.attribute(
        clip, target=target, perturbations_per_eval=copies, n_samples=SAMPLES
    )


def _grad_cam(end: End, weighting: str) -> Make:
    def make(classifier: VideoClassifier, copies: int) -> Call:
        layer = named_layer(classifier, end)
        explainer = GradCAM(classifier, layer, weighting=weighting)  # type: ignore[arg-type]
        return lambda clip, target: explainer.attribute(clip, target=target)

    return make


def _branch(weighting: str) -> Make:
    def make(classifier: VideoClassifier, copies: int) -> Call:
        st_abn = st_abn_of(classifier)
        if st_abn is None:
            raise DoesNotApply(f"{type(classifier.module).__name__} is no ST-ABN: it has no attention branch")
        if weighting == "grad_gate" and st_abn.config.mechanism == "observe":
            raise DoesNotApply(
                "this branch only observes: its gates do not act on the answer, so it has no gradient there"
            )
        explainer = AttentionBranch(classifier)
        return lambda clip, target: explainer.attribute(clip, target=target, weighting=weighting)

    return make


OURS: dict[str, Recipe] = {
    "STAA": Recipe(_staa(), "relevance by decomposition"),
    "STAA(chefer)": Recipe(_staa(rule="chefer"), "relevance by the rule of Chefer et al., all layers"),
    "STAA(attention)": Recipe(_staa(mode="attention"), "attention rolled out through all layers"),
    "STAA(attention-last)": Recipe(_staa(mode="attention", layers=[-1]), "attention of the last layer"),
    "STAA(released)": Recipe(_staa(mode="released"), "as the authors' public code computes it"),
    "SpatioTemporalPerturbation": Recipe(_perturbation("nested"), "setting nested"),
    "SpatioTemporalPerturbation(step)": Recipe(_perturbation("step"), "setting step, the STEP paper's"),
    "SpatioTemporalPerturbation(3d-ep)": Recipe(_perturbation("3d-ep"), "setting 3d-ep"),
    "AttentionBranch(gate)": Recipe(_branch("gate"), "both gates of an ST-ABN, of no class in particular"),
    "AttentionBranch(grad_gate)": Recipe(_branch("grad_gate"), "gate times gradient"),
    "AttentionBranch(class_map)": Recipe(_branch("class_map"), "the branch's own class activation map"),
    "VideoOcclusion": Recipe(_occlusion, "windows of 4 frames and 2 x 2 cells, half overlapping in space; zero"),
    "VideoFeatureAblation(tubelets)": Recipe(
        ablation(VideoFeatureAblation, feature_masks.tubelets, of_tokens=True), "one tubelet at a time; zero"
    ),
    "VideoFeatureAblation(frames)": Recipe(
        ablation(VideoFeatureAblation, frames, of_tokens=False), "one frame at a time; zero"
    ),
    "RISE": Recipe(_rise, f"{SAMPLES} masks of 4 x 7 x 7 cells, half shown; zero"),
    "GradCAM": Recipe(_grad_cam("first", "hirescam"), "hirescam, first layer", smoothed=True),
    "GradCAM(layercam)": Recipe(_grad_cam("first", "layercam"), "layercam, first layer", smoothed=True),
    "GradCAM(last)": Recipe(_grad_cam("last", "gradcam"), "gradcam, last layer: Grad-CAM as in its paper"),
}
