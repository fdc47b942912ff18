"""Calls of the attribution methods that take any model: windows, regions, random masks, learned masks and Grad-CAM."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from captum_staa import RISE, GradCAM, SpatioTemporalPerturbation, VideoFeatureAblation, VideoOcclusion

from . import values
from .calls import ABSENT, Call
from .hostile import malformed
from .models import anything, convolutions
from .twins import form, malformed_call, valid_call

USUAL = {"inputs": "clip", "target": "target", "perturbations_per_eval": "count", "layout": "layout?"}


def _anything(method: type, inputs: Any, axes: str, layout: Any = ABSENT, **options: Any) -> Any:
    explainer = method(anything(axes), axes if layout is ABSENT else layout)
    return explainer.attribute(inputs, **options)


def _case(draw: Any, **limits: int) -> tuple[str, Tensor, Any]:
    axes = draw(values.layouts)
    clip = values.clip_of(draw, axes, values.shape(draw, **limits))
    return axes, clip, values.target_of(draw, len(clip))


def _scores(clip: Tensor, axes: str, target: Any) -> Tensor:
    """``(B,)`` in float64."""
    with torch.no_grad():
        logits = anything(axes)(values.wide(clip))
    return logits[torch.arange(len(clip)), values.classes_of(target, len(clip))]


def _scale(clip: Tensor, axes: str) -> float:
    with torch.no_grad():
        return 1 + float(anything(axes)(values.wide(clip)).abs().max())


def _call(
    draw: Any, method: type, case: tuple[str, Tensor, Any], options: dict[str, Any], kinds: dict[str, str], **more: Any
) -> Call:
    """Return a valid call or, with equal probability, a call with one malformed argument."""
    axes, clip, target = case
    options = {"target": target, **options}

    def explain(inputs: Any, axes: str, **chosen: Any) -> Any:
        return _anything(method, inputs, axes, **chosen)

    if draw(st.booleans()):
        more.setdefault("scale", _scale(clip, axes))
        models = (anything(axes),)
        return valid_call(draw, method.__name__, explain, clip, axes, options, models=models, **more)
    good = {"inputs": clip, "layout": axes, **options}
    args, name, bad = malformed(draw, good, {**USUAL, **kinds})
    run = lambda: _anything(method, args.pop("inputs"), axes, **args)  # noqa: E731
    inputs = (clip, args[name])
    return malformed_call(
        method.__name__, run, name, bad, lambda found: _sane(found, clip), inputs=inputs, models=(anything(axes),)
    )


def _sane(found: Any, clip: Tensor) -> None:
    form(found, clip)


def occlusion(draw: Any) -> Call:
    case = axes, clip, target = _case(draw)
    size = values.extent(clip, axes)
    window = tuple(draw(st.integers(1, side)) for side in size)
    strides = tuple(draw(st.integers(1, side)) for side in window)
    baseline = values.baseline_of(draw, clip)
    options = {
        "sliding_window_shapes": window,
        "strides": strides,
        "baselines": baseline,
        "perturbations_per_eval": draw(st.sampled_from([1, 2, 7, 10**9])),
    }

    def slowly() -> Tensor:
        x = values.working(values.wide(clip), axes)
        hidden = torch.zeros_like(clip) if baseline is None else torch.zeros_like(clip) + torch.as_tensor(baseline)
        hidden = values.working(values.wide(hidden.to(clip.dtype)), axes)
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        starts = (range(0, -(-(n - w) // s) * s + 1, s) for n, w, s in zip(size, window, strides, strict=True))
        for t, h, w in product(*starts):
            box = (slice(None), slice(t, t + window[0]), slice(None), slice(h, h + window[1]), slice(w, w + window[2]))
            altered = x.clone()
            altered[box] = hidden[box]
            fall = _scores(x, "BTCHW", target) - _scores(altered, "BTCHW", target)
            total[box] += fall.view(-1, 1, 1, 1, 1)
            count[box] += 1
        return values.in_axes(total / count, "BTCHW", axes)

    kinds = {"sliding_window_shapes": "triple", "strides": "triple?", "baselines": "baseline?"}
    return _call(draw, VideoOcclusion, case, options, kinds, expected=slowly)


def ablation(draw: Any) -> Call:
    case = axes, clip, target = _case(draw, most=5, frames=3)
    mask = values.mask_of(draw, clip, axes)
    baseline = values.baseline_of(draw, clip)
    options = {
        "feature_mask": mask,
        "baselines": baseline,
        "perturbations_per_eval": draw(st.sampled_from([1, 2, 5])),
    }

    def slowly() -> Tensor:
        hidden = torch.zeros_like(clip) if baseline is None else torch.zeros_like(clip) + torch.as_tensor(baseline)
        whole, found = _scores(clip, axes, target), values.wide(torch.zeros_like(clip))
        ids = mask.expand(clip.shape)
        for region in ids.unique():
            altered = torch.where(ids == region, hidden, clip)
            fall = whole - _scores(altered, axes, target)
            found += (ids == region) * fall.view(-1, 1, 1, 1, 1)
        return found

    return _call(
        draw, VideoFeatureAblation, case, options, {"feature_mask": "mask?", "baselines": "baseline?"}, expected=slowly
    )


def rise(draw: Any) -> Call:
    case = _, clip, _ = _case(draw)
    options = {
        "baselines": values.baseline_of(draw, clip),
        "perturbations_per_eval": draw(st.sampled_from([1, 2, 50])),
        "n_samples": draw(st.integers(2, 6)),
        "n_cells": tuple(draw(st.integers(1, 9)) for _ in range(3)),
        "keep": draw(st.sampled_from([0.5, 0.1, 0.9])),
        "generator": None,
    }
    kinds = {"n_samples": "count", "n_cells": "triple", "keep": "fraction", "generator": "generator?"}
    # A slope is a covariance divided by the variance of the masks, which is small if almost everything is shown.
    scale = 50 * _scale(clip, case[0])
    return _call(draw, RISE, case, options, {**kinds, "baselines": "baseline?"}, scale=scale)


def perturbation(draw: Any) -> Call:
    case = axes, clip, _ = _case(draw, most=5, frames=3, batch=2)
    options: dict[str, Any] = {
        "baselines": draw(st.one_of(st.none(), st.just(0.5))),
        "perturbations_per_eval": draw(st.sampled_from([1, 3, 99])),
        "areas": draw(st.sampled_from([0.3, (0.1, 0.5), (0.05,), [0.2, 0.9]])),
        "objective": draw(st.sampled_from([None, "preserve", "delete", "dual"])),
        "regularizer": draw(st.sampled_from([None, "tv", "squared", "ellipsoid", "none"])),
        "iterations": draw(st.integers(0, 2)),
    }
    if draw(st.booleans()):
        options["feature_mask"] = values.mask_of(draw, clip, axes, channels=False)
    if draw(st.booleans()):
        options["init"] = values.normal(draw, *clip.shape)
    kinds = {
        "areas": "numbers?",
        "objective": "word?",
        "regularizer": "word?",
        "iterations": "count?",
    }
    kinds |= {"init": "maps?", "feature_mask": "mask?", "baselines": "baseline?"}
    refusals = ("no region", "hides nothing", "areas", "feature")
    # The optimization is not a continuous function of its start, so only relations with identical numbers are compared.
    relations = ("memory", "alone", "tuple")
    return _call(draw, SpatioTemporalPerturbation, case, options, kinds, relations=relations, refusals=refusals)


def grad_cam(draw: Any) -> Call:
    axes = draw(values.layouts)
    sizes = values.shape(draw)
    clip = values.clip_of(draw, axes, sizes, dtypes=(torch.float32,))
    target = values.target_of(draw, len(clip))
    model = convolutions(axes, sizes["C"])
    layer = draw(st.sampled_from(["first", "second"]))
    weighting = draw(st.sampled_from(["gradcam", "hirescam", "layercam"]))
    relu = draw(st.booleans())
    upsampling = draw(st.sampled_from(["trilinear", "nearest"]))

    def explain(inputs: Any, axes: str, target: Any, relu_attributions: bool = False, **made: Any) -> Any:
        made = {"layer": layer, "weighting": weighting, "upsampling": upsampling, "layout": axes, **made}
        network = convolutions(axes, sizes["C"])
        explainer = GradCAM(made.pop("forward_func", network), made.pop("layer"), **made)
        return explainer.attribute(inputs, target, relu_attributions=relu_attributions)

    def slowly() -> Tensor:
        x = values.working(clip.detach(), axes).transpose(1, 2)
        activation = model.first(x).detach() if layer == "first" else model.second(model.first(x).tanh()).detach()
        leaf = activation.requires_grad_()
        last = leaf if layer == "second" else model.second(leaf.tanh())
        logits = model.head(last.square().mean((2, 3, 4)))
        score = logits[torch.arange(len(x)), values.classes_of(target, len(x))].sum()
        (slope,) = torch.autograd.grad(score, leaf)
        slope = {"gradcam": slope.mean((2, 3, 4), keepdim=True), "layercam": slope.relu()}.get(weighting, slope)
        joint = (slope * leaf.detach()).sum(1, keepdim=True)
        joint = (joint.relu() if relu else joint) / sizes["C"]
        return values.in_axes(joint.transpose(1, 2).expand(-1, -1, sizes["C"], -1, -1), "BTCHW", axes)

    if draw(st.booleans()):
        options = {"target": target, "relu_attributions": relu}
        relations = ("memory", "layout", "alone", "order of the batch", "tuple")
        refusals = ("reaches no cell",)
        return valid_call(
            draw,
            f"GradCAM {layer} {weighting}",
            explain,
            clip,
            axes,
            options,
            relations=relations,
            expected=slowly,
            scale=0.1,
            refusals=refusals,
            models=(model,),
        )
    kinds = {"inputs": "clip", "target": "target", "layout": "layout?", "layer": "word", "weighting": "word"}
    kinds |= {"upsampling": "word", "grid": "model?", "forward_func": "model"}
    good = {"inputs": clip, "target": target}
    args, name, bad = malformed(draw, good, kinds)
    run = lambda: explain(args.pop("inputs"), axes, **args)  # noqa: E731
    return malformed_call(
        "GradCAM",
        run,
        name,
        bad,
        lambda found: _sane(found, clip),
        inputs=(clip,),
        models=(model,),
        refusals=("reaches no cell",),
    )


ENTRIES = {
    "VideoOcclusion": occlusion,
    "VideoFeatureAblation": ablation,
    "RISE": rise,
    "SpatioTemporalPerturbation": perturbation,
    "GradCAM": grad_cam,
}
