"""All methods by name, of this library and of Captum, each with the settings that its name stands for.

``compare`` and the command ``explain`` take their methods from here. ``docs/captum_methods.md`` explains why some
methods of Captum do not apply to some models.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

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
from captum_staa._utils.checks import known_name
from captum_staa._utils.model_state import uncompiled
from captum_staa.attention.focus import Focus
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
from captum_staa.models import VideoClassifier
from captum_staa.models.st_abn.network import st_abn_of
from captum_staa.perturbation.config import PRESETS
from captum_staa.result import VideoAttribution

End = Literal["first", "last"]
Call = Callable[[Tensor, int], Tensor]  # clip (1, ...), target -> attributions of its shape, or maps (1, T, H, W)
Make = Callable[..., Call]  # classifier, perturbations_per_eval, and options by keyword -> call
# The norms in front of a block's attention (in TimeSformer, its spatial attention). If the head reads the class token
# only, the output of the last block has a gradient at that token only, but this norm has a gradient at all tokens.
NORMS = ("layernorm_before", "norm1")
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
SAMPLES = 400  # masks of RISE; subsets of regions of Lime and KernelShap
STEPS = 50  # steps of Integrated Gradients
NOISY = 16  # samples of SmoothGrad and GradientShap
NOISE = 0.15  # standard deviation in SmoothGrad, as a fraction of the value range of the clip
# Regions along time, height and width for Lime and KernelShap. With many more regions, the fit would be noise.
REGIONS = (4, 3, 3)
INTENDED = ("Input Tensor .* did not already require gradients", "Setting (forward, )?backward hooks")  # warnings


class NotApplicableError(ValueError):
    """Raised when a method does not apply to a model. Tables show its message as a reason, not as a failure."""


class MethodSpec(NamedTuple):
    """A method that is known by name.

    Attributes:
        make: function of a classifier and ``perturbations_per_eval`` that returns the method for this classifier: a
            function of a clip ``(1, ...)`` and its target. Raises :class:`NotApplicableError`.
        description: the settings of the method in one line, for lists of methods and for the record of a run.
        smoothed: whether signed maps are smoothed by three quarters of a cell (see :func:`cell`). This is for methods
            whose signs change from pixel to pixel, such as gradients. Absolute values would mix evidence for the class
            with evidence against it.
        class_specific: whether maps explain the target. Otherwise they are the same for every target.
        options: names of the keyword arguments that ``make`` takes in addition; the command ``explain`` has a flag for
            each.
    """

    make: Make
    description: str
    smoothed: bool = False
    class_specific: bool = True
    options: tuple[str, ...] = ()


class Explainer:
    """An instance of an attribution class with the arguments of its calls, as a function of a clip and its target.

    Args:
        explainer: a Captum ``Attribution``.
        of_clip: function that returns the arguments of ``attribute`` that depend on the clip, by name; None if there
            are none.
        **arguments: the other arguments of ``attribute``.
    """

    def __init__(
        self, explainer: Any, of_clip: Callable[[Tensor], dict[str, Any]] | None = None, **arguments: Any
    ) -> None:
        self.explainer, self._of_clip, self._arguments = explainer, of_clip, arguments

    def __call__(self, clip: Tensor, target: int) -> Tensor:
        return self._called(self.explainer.attribute, clip, target)

    def maps(self, clip: Tensor, target: int) -> VideoAttribution | None:
        """Return the result of ``attribute_maps``; None if the class does not have this method."""
        attribute_maps = getattr(self.explainer, "attribute_maps", None)
        return None if attribute_maps is None else self._called(attribute_maps, clip, target)

    def _called(self, function: Callable[..., Any], clip: Tensor, target: int) -> Any:
        more = {} if self._of_clip is None else self._of_clip(clip)
        with warnings.catch_warnings():  # Captum warns that it changes its copy of the clip and nn.ReLU
            for message in INTENDED:
                warnings.filterwarnings("ignore", message=message)
            return function(clip, target=target, **self._arguments, **more)


def find_method(name: str) -> tuple[str, MethodSpec]:
    """Return the exact name of a method, and its specification. Case, spaces and punctuation do not matter.

    Example:
        >>> find_method("staa-relevance")[0]
        'STAA (relevance)'
        >>> find_method("occlusoin")
        Traceback (most recent call last):
        ...
        ValueError: a method must be one of ..., got 'occlusoin'. Did you mean Occlusion...?

    Raises:
        ValueError: there is no such method.
    """
    known = known_name("a method", name, METHODS)
    return known, METHODS[known]


# --- layers and cells of a model --------------------------------------------------------------------------------------


def end_layer(classifier: VideoClassifier, end: End) -> str | None:
    """Return the name of the first or last layer, as in ``classifier.module.named_modules()``.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> end_layer(clf, "first"), end_layer(clf, "last")
        ('stem', 'stages')
        >>> end_layer(VideoClassifier.from_pretrained("tiny-videomae-pattern"), "first")
        'videomae.encoder.layer.0.layernorm_before'

    Args:
        classifier: a classifier of any architecture.
        end: ``"first"`` or ``"last"``.

    Returns:
        For a transformer of a known family, the norm in front of the attention of its first or last block. For other
        models, the first or last child that contains convolutions, such as a stem or a stage; its parent is the
        innermost module that contains all convolutions. Of a ``ModuleList``, which is never called, the children count.
        For an ST-ABN, the layer is in its trunk. None if there is no such layer.
    """
    model = uncompiled(classifier.module)
    if classifier.family is not None:
        names = [name for name, _ in model.named_modules() if name.endswith(NORMS) and "predictor" not in name]
    elif (st_abn := st_abn_of(classifier)) is not None:  # its branch returns gates, so its trunk has the layers
        trunk = next(name for name, module in model.named_modules() if module is st_abn.model.module)
        names = [f"{trunk}.{name}" for name in _children_with_convolutions(st_abn.model.module)]
    else:
        names = _children_with_convolutions(model)
    return names[0 if end == "first" else -1] if names else None


def named_layer(classifier: VideoClassifier, end: End) -> str:
    """Return the name of the layer that a Grad-CAM reads.

    Raises:
        NotApplicableError: the model has no such layer.
    """
    name = end_layer(classifier, end)
    if name is None:
        raise NotApplicableError(
            f"GradCAM needs a layer with spatial positions, got {_kind(classifier)}, in which none was found. Pass an "
            f"instance with the layer that you want: GradCAM(classifier, layer)"
        )
    return name


def cell(classifier: VideoClassifier, clip: Tensor) -> tuple[int, int, int]:
    """Return the sides ``(t, h, w)`` of the model's tubelet; without tokens, an eighth of the clip along each axis."""
    if classifier.grid is not None:
        return classifier.grid.tubelet
    t, h, w = (-(-side // 8) for side in classifier.layout.extent(clip))
    return t, h, w


def windows(classifier: VideoClassifier, clip: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return sides and strides ``(t, h, w)`` of occlusion windows.

    A window covers two cells in height and in width, and overlaps the next one by half. It covers 4 frames, or all
    frames of a shorter clip.
    """
    size = classifier.layout.extent(clip)
    _, h, w = cell(classifier, clip)
    frames = min(4, size[0])
    return (frames, min(2 * h, size[1]), min(2 * w, size[2])), (frames, h, w)


def _children_with_convolutions(model: nn.Module) -> list[str]:
    paths = [name.split(".") for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    depth = 0  # of the innermost module that contains all convolutions
    while paths and len({tuple(path[: depth + 1]) for path in paths}) == 1 and depth + 1 < len(paths[0]):
        depth += 1
    called = []
    for path in paths:
        end = depth + 1
        while end < len(path) and isinstance(model.get_submodule(".".join(path[:end])), (nn.ModuleList, nn.ModuleDict)):
            end += 1
        called.append(".".join(path[:end]))
    return list(dict.fromkeys(called))


def _kind(classifier: VideoClassifier) -> str:
    return type(classifier.module).__name__


# --- makers of methods ------------------------------------------------------------------------------------------------


def _plain(kind: Callable[[VideoClassifier], Any]) -> Make:
    """Return the maker of a method whose ``attribute`` needs only the clip and the target."""
    return lambda classifier, perturbations_per_eval: Explainer(kind(classifier))


def _staa(method: type[STAA] | type[ReleasedSTAA] = STAA, **settings: Any) -> Make:
    def make(classifier: VideoClassifier, perturbations_per_eval: int, **options: Any) -> Call:
        if classifier.family is None:
            raise NotApplicableError(
                f"STAA by name needs a transformer of a known family, got {_kind(classifier)}. For a transformer of "
                f"your own, pass the instance STAA(classifier), or VideoClassifier(..., family=...) with "
                f"models.inspect(classifier, clip).family"
            )
        if options.pop("focus", False):
            options["focus"] = Focus()
        return Explainer(method(classifier, **{**settings, **options}))

    return make


def _masks(preset: str, description: str) -> MethodSpec:
    """Return the specification of a preset of SpatioTemporalPerturbation, with its cost."""

    def make(
        classifier: VideoClassifier,
        perturbations_per_eval: int,
        *,
        show_progress: bool = False,
        **overrides: Any,
    ) -> Call:
        PRESETS[preset].changed(**overrides)  # rejects wrong values now
        return Explainer(
            SpatioTemporalPerturbation(classifier, preset=preset),
            perturbations_per_eval=perturbations_per_eval,
            show_progress=show_progress,
            **overrides,
        )

    options = ("areas", "objective", "regularizer", "iterations", "show_progress")
    return MethodSpec(make, f"{description}, {PRESETS[preset].forwards()} forward passes", options=options)


def _branch(weighting: str) -> Make:
    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        st_abn = st_abn_of(classifier)
        if st_abn is None:
            raise NotApplicableError(
                f"AttentionBranch needs an ST-ABN, got {_kind(classifier)}, which has no attention branch"
            )
        if weighting == "grad_gate" and st_abn.config.mechanism == "observe":
            raise NotApplicableError(
                "grad_gate needs a branch whose gates change the output of the model, got a branch with "
                "mechanism='observe', whose gates get no gradient"
            )
        return Explainer(AttentionBranch(classifier), weighting=weighting)

    return make


class _GradCamByPosition(Explainer):
    """Grad-CAM of a layer that was chosen by its position. If the layer does not suit, the method does not apply."""

    def _called(self, function: Callable[..., Any], clip: Tensor, target: int) -> Any:
        try:
            return super()._called(function, clip, target)
        except ValueError as error:
            raise NotApplicableError(
                f"{error} The layer was chosen by its position in the model. Pass an instance with a layer that you "
                f"choose: GradCAM(classifier, layer)"
            ) from error


def _grad_cam(end: End, weighting: Any) -> Make:
    return lambda classifier, perturbations_per_eval: _GradCamByPosition(
        GradCAM(classifier, named_layer(classifier, end), weighting=weighting)
    )


def _rise(classifier: VideoClassifier, perturbations_per_eval: int, *, show_progress: bool = False) -> Call:
    return Explainer(
        RISE(classifier),
        perturbations_per_eval=perturbations_per_eval,
        n_samples=SAMPLES,
        show_progress=show_progress,
    )


def _video_occlusion(classifier: VideoClassifier, perturbations_per_eval: int, *, show_progress: bool = False) -> Call:
    def of_clip(clip: Tensor) -> dict[str, Any]:
        return dict(zip(("sliding_window_shapes", "strides"), windows(classifier, clip), strict=True))

    return Explainer(
        VideoOcclusion(classifier), of_clip, perturbations_per_eval=perturbations_per_eval, show_progress=show_progress
    )


def _occlusion(classifier: VideoClassifier, perturbations_per_eval: int, *, show_progress: bool = False) -> Call:
    layout = classifier.layout

    def of_clip(clip: Tensor) -> dict[str, Any]:
        channels = layout.size(clip)["C"]
        named = ({**dict(zip("THW", triple, strict=True)), "C": channels} for triple in windows(classifier, clip))
        sides, strides = (tuple(sizes[axis] for axis in layout.axes[1:]) for sizes in named)
        return {"sliding_window_shapes": sides, "strides": strides}

    return Explainer(
        Occlusion(classifier), of_clip, perturbations_per_eval=perturbations_per_eval, show_progress=show_progress
    )


def _ablation(
    kind: Callable[[VideoClassifier], Any],
    mask: Callable[[Tensor, VideoClassifier], Tensor],
    *,
    of_tokens: bool = False,
    **arguments: Any,
) -> Make:
    """Return the maker of a method that removes regions of a feature mask.

    Args:
        kind: a class with the interface of Captum's ``FeatureAblation``.
        mask: function of a clip and a classifier that returns the feature mask.
        of_tokens: whether the model must have tubelets.
        **arguments: further arguments of ``attribute``.
    """

    def make(classifier: VideoClassifier, perturbations_per_eval: int, *, show_progress: bool = False) -> Call:
        if of_tokens and classifier.grid is None:
            raise NotApplicableError(
                f"tubelets need a transformer of a known family, got {_kind(classifier)}, which has no tubelets"
            )
        if kind in (Lime, KernelShap) and find_spec("sklearn") is None:
            raise NotApplicableError(
                "scikit-learn must be installed, because Captum fits a linear model with it. Run: "
                "pip install scikit-learn"
            )

        def call(clip: Tensor, target: int) -> Tensor:
            # a new instance per clip: after its first call, Captum's FeatureAblation skips checks
            return kind(classifier).attribute(
                clip,
                target=target,
                feature_mask=mask(clip, classifier),
                perturbations_per_eval=perturbations_per_eval,
                show_progress=show_progress,
                **arguments,
            )

        return call

    return make


def _frames(clip: Tensor, classifier: VideoClassifier) -> Tensor:
    return feature_masks.frames(clip, classifier.layout)


def _regions(clip: Tensor, classifier: VideoClassifier) -> Tensor:
    sizes = classifier.layout.size(clip)
    sides = [-(-sizes[axis] // count) for axis, count in zip("THW", REGIONS, strict=True)]
    return feature_masks.grid(clip, classifier.layout, sides)


def _integrated(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    return Explainer(IntegratedGradients(classifier), n_steps=STEPS, internal_batch_size=perturbations_per_eval)


def _gradient_shap(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    def of_clip(clip: Tensor) -> dict[str, Any]:
        layout = classifier.layout
        plain = [torch.zeros_like(clip), baselines.mean_frame(clip, layout), baselines.blur(clip, layout)]
        return {"baselines": torch.cat(plain)}

    return Explainer(GradientShap(classifier), of_clip, n_samples=NOISY)


def _smooth_grad(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
    return Explainer(
        NoiseTunnel(Saliency(classifier)),
        lambda clip: {"stdevs": NOISE * float(clip.max() - clip.min())},
        nt_type="smoothgrad",
        nt_samples=NOISY,
        nt_samples_batch_size=min(perturbations_per_eval, NOISY),
    )


def _of_relu(kind: Callable[[VideoClassifier], Any], consequence: str) -> Make:
    """Return the maker of a method for networks with ReLU modules; ``consequence`` says what it would compute."""

    def make(classifier: VideoClassifier, perturbations_per_eval: int) -> Call:
        if classifier.family is not None:
            raise NotApplicableError(f"{_kind(classifier)} is a transformer: {consequence}")
        if not any(isinstance(module, nn.ReLU) for module in classifier.modules()):
            raise NotApplicableError(f"{_kind(classifier)} has no nn.ReLU: {consequence}")
        return Explainer(kind(classifier))

    return make


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


# --- the methods ------------------------------------------------------------------------------------------------------

_LAYERS = ("layers", "focus")
_SLOW = ("show_progress",)
# A name without parentheses is the method of its paper, or the class with its default arguments. The first method that
# applies is the one that comparisons run again as a control, so a method that explains a class comes first.
METHODS: Mapping[str, MethodSpec] = MappingProxyType(
    {
        "STAA (relevance)": MethodSpec(
            _staa(mode="relevance"), "the default of STAA(clf): relevance, signed, for one class"
        ),
        "STAA (Chefer)": MethodSpec(
            _staa(mode="relevance", rule="chefer"),
            "relevance by the rule of Chefer et al., all layers",
            options=_LAYERS,
        ),
        "STAA": MethodSpec(
            _staa(mode="attention"),
            "the attention of the STAA paper, the same map for every class; not the default of STAA(clf)",
            class_specific=False,
            options=_LAYERS,
        ),
        "STAA (last layer)": MethodSpec(
            _staa(mode="attention", layers=[-1]),
            "attention of the last layer; not specific to a class",
            class_specific=False,
        ),
        "ReleasedSTAA": MethodSpec(
            _staa(ReleasedSTAA),
            "as in the public code of the authors of STAA; not specific to a class",
            class_specific=False,
        ),
        "STEP (nested)": _masks("nested", "learned nested masks"),
        "STEP": _masks("step", "learned masks, as in the STEP paper"),
        "Extremal perturbation (3D)": _masks("3d-ep", "the same without its regularizer: extremal perturbation"),
        "Extremal perturbation (2D)": _masks("2d-ep", "extremal perturbation with the same area in each frame"),
        "AttentionBranch (gate)": MethodSpec(
            _branch("gate"), "both gates of an ST-ABN; not specific to a class", class_specific=False
        ),
        "AttentionBranch (grad_gate)": MethodSpec(_branch("grad_gate"), "gates of an ST-ABN times their gradient"),
        "AttentionBranch (class_map)": MethodSpec(
            _branch("class_map"), "class activation map of the branch of an ST-ABN"
        ),
        "VideoOcclusion": MethodSpec(
            _video_occlusion,
            "windows of 4 frames and 2 x 2 cells, half overlapping in space, baseline zero",
            options=_SLOW,
        ),
        "VideoFeatureAblation (tubelets)": MethodSpec(
            _ablation(VideoFeatureAblation, feature_masks.tubelets, of_tokens=True),
            "one tubelet at a time, baseline zero",
            options=_SLOW,
        ),
        "VideoFeatureAblation (frames)": MethodSpec(
            _ablation(VideoFeatureAblation, _frames), "one frame at a time, baseline zero", options=_SLOW
        ),
        "RISE": MethodSpec(
            _rise, f"{SAMPLES} masks of 4 x 7 x 7 cells, half of them visible, baseline zero", options=_SLOW
        ),
        "GradCAM": MethodSpec(_grad_cam("first", "hirescam"), "hirescam, first layer", smoothed=True),
        "GradCAM (layercam)": MethodSpec(_grad_cam("first", "layercam"), "layercam, first layer", smoothed=True),
        "GradCAM (last)": MethodSpec(_grad_cam("last", "gradcam"), "gradcam, last layer, as in the Grad-CAM paper"),
        "Saliency": MethodSpec(_plain(Saliency), "magnitude of the gradient of each channel"),
        "InputXGradient": MethodSpec(_plain(InputXGradient), "input times gradient", smoothed=True),
        "IntegratedGradients": MethodSpec(_integrated, f"{STEPS} steps, baseline zero", smoothed=True),
        "GradientShap": MethodSpec(
            _gradient_shap, f"{NOISY} samples, baselines zero, mean frame and blur", smoothed=True
        ),
        "SmoothGrad": MethodSpec(
            _smooth_grad, f"{NOISY} samples, noise with a standard deviation of {NOISE} times the range of the clip"
        ),
        "GuidedBackprop": MethodSpec(
            _of_relu(
                GuidedBackprop,
                "GuidedBackprop changes nn.ReLU modules only, so here it would equal the plain gradient",
            ),
            "gradient with the negative part removed at each ReLU",
            smoothed=True,
        ),
        "DeepLift": MethodSpec(
            _of_relu(
                DeepLift,
                "DeepLift has no rule for its layers, so here it would equal InputXGradient, which is not complete",
            ),
            "baseline zero",
            smoothed=True,
        ),
        "LayerGradCam": MethodSpec(_layer_grad_cam, "last layer with spatial positions, interpolated"),
        "Occlusion": MethodSpec(_occlusion, "the windows of VideoOcclusion, baseline zero", options=_SLOW),
        "FeatureAblation (tubelets)": MethodSpec(
            _ablation(FeatureAblation, feature_masks.tubelets, of_tokens=True),
            "one tubelet at a time, baseline zero",
            options=_SLOW,
        ),
        "FeatureAblation (frames)": MethodSpec(
            _ablation(FeatureAblation, _frames), "one frame at a time, baseline zero", options=_SLOW
        ),
        "KernelShap": MethodSpec(
            _ablation(KernelShap, _regions, n_samples=SAMPLES),
            f"{SAMPLES} samples of 4 x 3 x 3 regions, baseline zero",
            options=_SLOW,
        ),
        "Lime": MethodSpec(
            _ablation(Lime, _regions, n_samples=SAMPLES),
            f"{SAMPLES} samples of 4 x 3 x 3 regions, baseline zero",
            options=_SLOW,
        ),
    }
)
