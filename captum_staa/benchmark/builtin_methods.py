"""The methods of this library by name. A name without parentheses is the class with its default arguments."""

from __future__ import annotations

from typing import Any

from captum_staa import feature_masks
from captum_staa.attr import (
    RISE,
    STAA,
    AttentionBranch,
    GradCAM,
    ReleasedSTAA,
    SpatioTemporalPerturbation,
    VideoFeatureAblation,
    VideoOcclusion,
)
from captum_staa.benchmark.method_spec import (
    SAMPLES,
    Call,
    End,
    Make,
    MethodSpec,
    NotApplicableError,
    ablation,
    frames,
    named_layer,
    windows,
)
from captum_staa.models import VideoClassifier
from captum_staa.models.st_abn.network import st_abn_of


def _staa(method: type[STAA] | type[ReleasedSTAA] = STAA, **options: Any) -> Make:
    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        if classifier.family is None:
            raise NotApplicableError(
                f"STAA needs a transformer of a known family, got {type(classifier.module).__name__}, which has no "
                f"attention that STAA can read"
            )
        explainer = method(classifier, **options)
        return lambda clip, target: explainer.attribute(clip, target=target)

    return make


def _perturbation(preset: str) -> Make:
    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        explainer = SpatioTemporalPerturbation(classifier, preset=preset)
        return lambda clip, target: explainer.attribute(
            clip, target=target, perturbations_per_eval=perturbations_per_eval
        )

    return make


def _occlusion(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    explainer = VideoOcclusion(classifier)
    return lambda clip, target: explainer.attribute(
        clip, *windows(classifier, clip), target=target, perturbations_per_eval=perturbations_per_eval
    )


def _rise(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    explainer = RISE(classifier)
    return lambda clip, target: explainer.attribute(
        clip, target=target, perturbations_per_eval=perturbations_per_eval, n_samples=SAMPLES
    )


def _grad_cam(end: End, weighting: str) -> Make:
    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        layer = named_layer(classifier, end)
        explainer = GradCAM(classifier, layer, weighting=weighting)  # type: ignore[arg-type]
        return lambda clip, target: explainer.attribute(clip, target=target)

    return make


def _branch(weighting: str) -> Make:
    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        st_abn = st_abn_of(classifier)
        if st_abn is None:
            raise NotApplicableError(
                f"AttentionBranch needs an ST-ABN, got {type(classifier.module).__name__}, which has no attention "
                f"branch"
            )
        if weighting == "grad_gate" and st_abn.config.mechanism == "observe":
            raise NotApplicableError(
                "grad_gate needs a branch whose gates change the output of the model, got a branch with "
                "mechanism='observe', whose gates have no gradient"
            )
        explainer = AttentionBranch(classifier)
        return lambda clip, target: explainer.attribute(clip, target=target, weighting=weighting)

    return make


OURS: dict[str, MethodSpec] = {
    "STAA": MethodSpec(_staa(), "relevance by decomposition"),
    "STAA(chefer)": MethodSpec(_staa(rule="chefer"), "relevance by the rule of Chefer et al., all layers"),
    "STAA(attention)": MethodSpec(_staa(mode="attention"), "attention rolled out through all layers"),
    "STAA(attention-last)": MethodSpec(_staa(mode="attention", layers=[-1]), "attention of the last layer"),
    "STAA(released)": MethodSpec(_staa(ReleasedSTAA), "as in the public code of the authors"),
    "SpatioTemporalPerturbation": MethodSpec(_perturbation("nested"), "preset nested"),
    "SpatioTemporalPerturbation(step)": MethodSpec(_perturbation("step"), "preset step, as in the STEP paper"),
    "SpatioTemporalPerturbation(3d-ep)": MethodSpec(_perturbation("3d-ep"), "preset 3d-ep"),
    "AttentionBranch(gate)": MethodSpec(_branch("gate"), "both gates of an ST-ABN, not specific to a class"),
    "AttentionBranch(grad_gate)": MethodSpec(_branch("grad_gate"), "gate times gradient"),
    "AttentionBranch(class_map)": MethodSpec(_branch("class_map"), "class activation map of the branch"),
    "VideoOcclusion": MethodSpec(
        _occlusion, "windows of 4 frames and 2 x 2 cells, half overlapping in space, baseline zero"
    ),
    "VideoFeatureAblation(tubelets)": MethodSpec(
        ablation(VideoFeatureAblation, feature_masks.tubelets, of_tokens=True), "one tubelet at a time, baseline zero"
    ),
    "VideoFeatureAblation(frames)": MethodSpec(
        ablation(VideoFeatureAblation, frames, of_tokens=False), "one frame at a time, baseline zero"
    ),
    "RISE": MethodSpec(_rise, f"{SAMPLES} masks of 4 x 7 x 7 cells, half of them visible, baseline zero"),
    "GradCAM": MethodSpec(_grad_cam("first", "hirescam"), "hirescam, first layer", smoothed=True),
    "GradCAM(layercam)": MethodSpec(_grad_cam("first", "layercam"), "layercam, first layer", smoothed=True),
    "GradCAM(last)": MethodSpec(_grad_cam("last", "gradcam"), "gradcam, last layer, as in the Grad-CAM paper"),
}
