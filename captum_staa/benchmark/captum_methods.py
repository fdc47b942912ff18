"""Captum's methods by name, set up for video as far as they allow; ``docs/captum_methods.md`` says why some do not."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from captum.attr import (
    DeepLift,
    FeatureAblation,
    GradientShap,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerAttribution,
    LayerGradCam,
    Lime,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn

from captum_staa import baselines, feature_masks
from captum_staa.benchmark.method_spec import (
    SAMPLES,
    Call,
    Make,
    MethodSpec,
    NotApplicableError,
    ablation,
    frames,
    named_layer,
    windows,
)
from captum_staa.models import VideoClassifier

STEPS = 50  # of Integrated Gradients
NOISY = 16  # samples of SmoothGrad and GradientShap
NOISE = 0.15  # of SmoothGrad, as a part of the clip's range
REGIONS = (4, 3, 3)  # of these two along time, height and width: some dozens at most, or the fit is noise


def _gradient(kind: Callable[[VideoClassifier], Any]) -> Make:
    """A method whose ``attribute`` needs nothing but the clip and the target."""

    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        explainer = kind(classifier)
        return lambda clip, target: explainer.attribute(clip, target=target)

    return make


def _integrated(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    explainer = IntegratedGradients(classifier)
    return lambda clip, target: explainer.attribute(
        clip, target=target, n_steps=STEPS, internal_batch_size=perturbations_per_eval
    )


def _gradient_shap(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    explainer, layout = GradientShap(classifier), classifier.layout
    return lambda clip, target: explainer.attribute(
        clip,
        torch.cat([torch.zeros_like(clip), baselines.mean_frame(clip, layout), baselines.blur(clip, layout)]),
        n_samples=NOISY,
        target=target,
    )


def _smooth_grad(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    explainer = NoiseTunnel(Saliency(classifier))
    return lambda clip, target: explainer.attribute(
        clip,
        nt_type="smoothgrad",
        nt_samples=NOISY,
        nt_samples_batch_size=min(perturbations_per_eval, NOISY),
        stdevs=NOISE * float(clip.max() - clip.min()),
        target=target,
    )


def _occlusion(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    explainer, layout = Occlusion(classifier), classifier.layout

    def call(clip: Tensor, target: int) -> Tensor:
        channels = layout.size(clip)["C"]
        named = ({**dict(zip("THW", each, strict=True)), "C": channels} for each in windows(classifier, clip))
        sides, strides = (tuple(sizes[axis] for axis in layout.axes[1:]) for sizes in named)
        return explainer.attribute(
            clip, sides, strides=strides, target=target, perturbations_per_eval=perturbations_per_eval
        )

    return call


def _surrogate(kind: Callable[[VideoClassifier], Any]) -> Make:
    """A linear model of regions, fitted to random subsets of them."""

    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        if find_spec("sklearn") is None:
            raise NotApplicableError(
                "Captum fits it with scikit-learn, which is not installed: pip install scikit-learn"
            )

        def call(clip: Tensor, target: int) -> Tensor:
            sizes = classifier.layout.size(clip)
            cell = [-(-sizes[axis] // count) for axis, count in zip("THW", REGIONS, strict=True)]
            return kind(classifier).attribute(
                clip,
                target=target,
                feature_mask=feature_masks.grid(clip, classifier.layout, cell),
                n_samples=SAMPLES,
                perturbations_per_eval=perturbations_per_eval,
                show_progress=False,
            )

        return call

    return make


def _guided(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    _need_relu(classifier, "GuidedBackprop changes nn.ReLU modules alone, so it would be the plain gradient")
    return _gradient(GuidedBackprop)(classifier, perturbations_per_eval)


def _deep_lift(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    without = "DeepLift has no rule for what the model is made of, so it would be InputXGradient, and not complete"
    _need_relu(classifier, without)
    return _gradient(DeepLift)(classifier, perturbations_per_eval)


def _layer_grad_cam(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    if classifier.family is not None:
        raise NotApplicableError("LayerGradCam takes a transformer's tokens for channels; GradCAM does not")
    layer = classifier.module.get_submodule(named_layer(classifier, "last"))
    explainer = LayerGradCam(classifier, layer)

    def call(clip: Tensor, target: int) -> Tensor:
        sizes = classifier.layout.size(clip)
        cells = explainer.attribute(clip, target=target)  # (1, 1, t, h, w)
        return LayerAttribution.interpolate(cells, tuple(sizes[axis] for axis in "THW"), "trilinear")[:, 0]

    return call


def _need_relu(classifier: VideoClassifier, otherwise: str) -> None:
    kind = type(classifier.module).__name__
    if classifier.family is not None:
        raise NotApplicableError(f"{kind} is a transformer: {otherwise}")
    if not any(isinstance(module, nn.ReLU) for module in classifier.modules()):
        raise NotApplicableError(f"{kind} has no nn.ReLU: {otherwise}")


CAPTUM: dict[str, MethodSpec] = {
    "Saliency": MethodSpec(_gradient(Saliency), "magnitude of each channel's gradient"),
    "InputXGradient": MethodSpec(_gradient(InputXGradient), "as it is", smoothed=True),
    "IntegratedGradients": MethodSpec(_integrated, f"{STEPS} steps from zero", smoothed=True),
    "GradientShap": MethodSpec(
        _gradient_shap, f"{NOISY} samples between zero, mean frame, blur and clip", smoothed=True
    ),
    "SmoothGrad": MethodSpec(_smooth_grad, f"{NOISY} samples, noise of {NOISE} of the clip's range"),
    "GuidedBackprop": MethodSpec(_guided, "as it is", smoothed=True),
    "DeepLift": MethodSpec(_deep_lift, "from zero", smoothed=True),
    "LayerGradCam": MethodSpec(_layer_grad_cam, "last layer with places, interpolated"),
    "Occlusion": MethodSpec(_occlusion, "the windows of VideoOcclusion; zero"),
    "FeatureAblation(tubelets)": MethodSpec(
        ablation(FeatureAblation, feature_masks.tubelets, of_tokens=True), "one tubelet at a time; zero"
    ),
    "FeatureAblation(frames)": MethodSpec(
        ablation(FeatureAblation, frames, of_tokens=False), "one frame at a time; zero"
    ),
    "KernelShap": MethodSpec(_surrogate(KernelShap), f"{SAMPLES} samples of 4 x 3 x 3 regions; zero"),
    "Lime": MethodSpec(_surrogate(Lime), f"{SAMPLES} samples of 4 x 3 x 3 regions; zero"),
}
