"""Captum's methods by name, configured for video where possible.

``docs/captum_methods.md`` explains why some of them do not apply to some models.
"""

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

STEPS = 50  # steps of Integrated Gradients
NOISY = 16  # samples of SmoothGrad and GradientShap
NOISE = 0.15  # standard deviation in SmoothGrad, as a fraction of the value range of the clip
# Regions along time, height and width for Lime and KernelShap. With many more regions, the fit would be noise.
REGIONS = (4, 3, 3)


def _gradient(kind: Callable[[VideoClassifier], Any]) -> Make:
    """Return the maker of a method whose ``attribute`` needs only the clip and the target."""

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
        named = ({**dict(zip("THW", triple, strict=True)), "C": channels} for triple in windows(classifier, clip))
        sides, strides = (tuple(sizes[axis] for axis in layout.axes[1:]) for sizes in named)
        return explainer.attribute(
            clip, sides, strides=strides, target=target, perturbations_per_eval=perturbations_per_eval
        )

    return call


def _surrogate(kind: Callable[[VideoClassifier], Any]) -> Make:
    """Return the maker of a method that fits a linear model to random subsets of regions."""

    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        if find_spec("sklearn") is None:
            raise NotApplicableError(
                "scikit-learn must be installed, because Captum fits a linear model with it. Run: "
                "pip install scikit-learn"
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
    _need_relu(classifier, "GuidedBackprop changes nn.ReLU modules only, so here it would equal the plain gradient")
    return _gradient(GuidedBackprop)(classifier, perturbations_per_eval)


def _deep_lift(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    consequence = "DeepLift has no rule for its layers, so here it would equal InputXGradient, which is not complete"
    _need_relu(classifier, consequence)
    return _gradient(DeepLift)(classifier, perturbations_per_eval)


def _layer_grad_cam(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    if classifier.family is not None:
        raise NotApplicableError(
            "LayerGradCam reads the tokens of a transformer as channels. Use GradCAM of this library instead"
        )
    layer = classifier.module.get_submodule(named_layer(classifier, "last"))
    explainer = LayerGradCam(classifier, layer)

    def call(clip: Tensor, target: int) -> Tensor:
        sizes = classifier.layout.size(clip)
        cells = explainer.attribute(clip, target=target)  # (1, 1, t, h, w)
        return LayerAttribution.interpolate(cells, tuple(sizes[axis] for axis in "THW"), "trilinear")[:, 0]

    return call


def _need_relu(classifier: VideoClassifier, consequence: str) -> None:
    """Raise unless the model is a network with ReLU modules; ``consequence`` says what the method would compute."""
    kind = type(classifier.module).__name__
    if classifier.family is not None:
        raise NotApplicableError(f"{kind} is a transformer: {consequence}")
    if not any(isinstance(module, nn.ReLU) for module in classifier.modules()):
        raise NotApplicableError(f"{kind} has no nn.ReLU: {consequence}")


CAPTUM: dict[str, MethodSpec] = {
    "Saliency": MethodSpec(_gradient(Saliency), "magnitude of the gradient of each channel"),
    "InputXGradient": MethodSpec(_gradient(InputXGradient), "default settings", smoothed=True),
    "IntegratedGradients": MethodSpec(_integrated, f"{STEPS} steps, baseline zero", smoothed=True),
    "GradientShap": MethodSpec(_gradient_shap, f"{NOISY} samples, baselines zero, mean frame and blur", smoothed=True),
    "SmoothGrad": MethodSpec(
        _smooth_grad, f"{NOISY} samples, noise with a standard deviation of {NOISE} times the range of the clip"
    ),
    "GuidedBackprop": MethodSpec(_guided, "default settings", smoothed=True),
    "DeepLift": MethodSpec(_deep_lift, "baseline zero", smoothed=True),
    "LayerGradCam": MethodSpec(_layer_grad_cam, "last layer with spatial positions, interpolated"),
    "Occlusion": MethodSpec(_occlusion, "the windows of VideoOcclusion, baseline zero"),
    "FeatureAblation(tubelets)": MethodSpec(
        ablation(FeatureAblation, feature_masks.tubelets, of_tokens=True), "one tubelet at a time, baseline zero"
    ),
    "FeatureAblation(frames)": MethodSpec(
        ablation(FeatureAblation, frames, of_tokens=False), "one frame at a time, baseline zero"
    ),
    "KernelShap": MethodSpec(_surrogate(KernelShap), f"{SAMPLES} samples of 4 x 3 x 3 regions, baseline zero"),
    "Lime": MethodSpec(_surrogate(Lime), f"{SAMPLES} samples of 4 x 3 x 3 regions, baseline zero"),
}
