"""Calls of the metrics: with a model, with the truth, and of a map only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_staa import metrics
from captum_staa.metrics import noise, sanity

from . import values
from .calls import ABSENT, Call
from .hostile import malformed
from .models import CLASSES, anything, branched
from .tensors import _call
from .twins import brief, close, malformed_call

WITH_MODEL = ("insertion", "deletion", "aopc", "saco", "faithfulness", "faithfulness_correlation", "monotonicity")
WITH_TRUTH = {
    name: getattr(metrics, name)
    for name in ("auroc", "average_precision", "iou", "energy_pointing_game", "relevance_rank_accuracy")
} | {
    "pointing_game": metrics.pointing_game,
    "temporal_pointing": metrics.temporal_pointing,
    "signal_to_noise": metrics.signal_to_noise,
}


def _numbers(found: Any) -> Tensor:
    """Return the result of a metric of clips as ``(B,)``."""
    found = getattr(found, "score", found)
    assert isinstance(found, Tensor) and found.dtype == torch.float64, brief(found)
    return found


def bounded(function: Any, found: Tensor) -> None:
    inside = found[~found.isnan()]
    slack = 1e-9
    assert bool((inside >= function.lowest - slack).all() and (inside <= function.highest + slack).all()), (
        found.tolist()
    )


def _same(found: Tensor, wanted: Tensor, what: str, within: float = 1e-4) -> None:
    assert found.shape == wanted.shape, f"{what}: {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    assert torch.allclose(found, wanted, atol=within, rtol=within, equal_nan=True), f"{what}: {found} and {wanted}"


def with_model(draw: Any) -> Call:
    name = draw(st.sampled_from(WITH_MODEL))
    function = getattr(metrics, name)
    axes = draw(values.layouts)
    sizes = values.shape(draw, most=5, frames=4, batch=2)
    clip = values.clip_of(draw, axes, sizes, dtypes=(torch.float64, torch.float32))
    maps = values.normal(draw, sizes["B"], sizes["T"], sizes["H"], sizes["W"])
    maps = draw(st.sampled_from([maps, maps.round(), maps.numpy(), maps.half(), maps[..., ::1].double()]))
    options: dict[str, Any] = {
        "inputs": clip,
        "attributions": maps,
        "target": values.target_of(draw, len(clip)),
        "cells": tuple(draw(st.integers(1, side)) for side in values.extent(clip, axes)),
        "baselines": values.baseline_of(draw, clip),
        "perturbations_per_eval": draw(st.sampled_from([1, 3, 16])),
    }
    kinds = {"inputs": "clip", "attributions": "maps", "target": "target", "cells": "triple?", "layout": "layout?"}
    kinds |= {"perturbations_per_eval": "count", "baselines": "baseline?", "feature_mask": "mask?"}
    if name in ("insertion", "deletion"):
        options |= {
            "steps": draw(st.sampled_from([1, 4, 300])),
            "output": draw(st.sampled_from(["logit", "probability"])),
        }
        options |= {
            "order": draw(st.sampled_from(["morf", "lerf"])),
            "axis": draw(st.sampled_from(["joint", "time", "space"])),
        }
        kinds |= {"steps": "count", "output": "word", "order": "word", "axis": "word"}
    extras = {"faithfulness_correlation": {"n_subsets": 4}, "aopc": {"steps": 2}, "saco": {"groups": 2}}.get(name, {})
    options |= extras
    kinds |= dict.fromkeys(extras, "count")
    kinds |= {"faithfulness": {"kept": "fraction"}, "monotonicity": {"fractions": "numbers"}}.get(name, {})
    if name == "faithfulness_correlation":
        kinds |= {"fraction": "fraction", "correlation": "word", "generator": "generator?"}
    if name in ("faithfulness", "monotonicity"):
        kinds["target"] = "target?"
    at = draw(st.integers(0, len(clip) - 1))
    other = values.other_axes(draw, axes)

    def run(inputs: Any, axes: str = axes, layout: Any = ABSENT, **rest: Any) -> Any:
        return function(anything(axes), inputs, layout=axes if layout is ABSENT else layout, **rest)

    def check(found: Any) -> None:
        score = _numbers(found)
        assert score.shape == (len(clip),)
        if options.get("output") != "logit":
            bounded(function, score)
        rest = {key: value for key, value in options.items() if key != "inputs"}
        alone = rest | {"attributions": maps[at : at + 1], "target": values.target_at(rest["target"], at)}
        alone["baselines"] = values.baseline_at(rest["baselines"], at)
        # Two answers that differ by their rounding alone may change places, and a rank correlation with them.
        if name not in ("saco", "monotonicity", "faithfulness_correlation"):
            _same(_numbers(run(clip[at : at + 1], **alone)), score[at : at + 1], f"clip {at} alone")
            turned = rest | {"baselines": values.in_axes(rest["baselines"], axes, other)}
            twin = run(values.in_axes(clip, axes, other).contiguous(), other, **turned)
            _same(_numbers(twin), score, f"layout {other}")

    refusals = ("at most the number of cells", "at least one cell and not all cells")
    if draw(st.booleans()):
        said = f"{name}({', '.join(f'{key}={brief(value)}' for key, value in options.items())})"
        return Call(said, lambda: run(**options), check, refusals=refusals, inputs=(clip,), models=(anything(axes),))
    args, argument, bad = malformed(draw, options, kinds)
    sane = lambda found: None if argument in ("cells", "feature_mask") else _numbers(found)  # noqa: E731
    return malformed_call(
        name, lambda: run(**args), argument, bad, sane, refusals=refusals, inputs=(clip,), models=(anything(axes),)
    )


def with_truth(draw: Any) -> Call:
    name = draw(st.sampled_from(sorted(WITH_TRUTH)))
    function = WITH_TRUTH[name]
    sizes = [draw(st.integers(1, most)) for most in (3, 4, 5, 6)]
    scores = values.in_memory(draw, values.normal(draw, *sizes), draw(st.sampled_from(values.MEMORY[:3])))
    scores = draw(
        st.sampled_from([scores, scores.round(), scores.half(), scores.numpy(), scores.double() * 1e200, scores * 0])
    )
    truth = values.normal(draw, *sizes) > draw(st.sampled_from([-9.0, 0.0, 1.0, 9.0]))
    good: dict[str, Any] = {"attributions": scores, "truth": draw(st.sampled_from([truth, truth.numpy()]))}
    kinds = {"attributions": "maps", "truth": "truth"}
    if name not in ("pointing_game", "temporal_pointing"):
        good["axis"] = draw(st.sampled_from(["joint", "time", "space"]))
        kinds["axis"] = "word"
    kinds |= {"pointing_game": {"tolerance": "triple", "per": "word"}, "iou": {"area": "fraction?"}}.get(name, {})

    def check(found: Tensor) -> None:
        assert found.shape == (sizes[0],) and found.dtype == torch.float64
        bounded(function, found)
        for i in range(sizes[0]):
            part = {key: value[i : i + 1] if key in ("attributions", "truth") else value for key, value in good.items()}
            _same(function(**part), found[i : i + 1], f"clip {i} alone", 1e-12)
        if name == "auroc" and good["axis"] == "joint":
            x, inside = np.asarray(scores, dtype=np.float64), truth.numpy()
            for i in range(sizes[0]):
                pairs = np.sign(x[i][inside[i]][:, None] - x[i][~inside[i]][None])
                wanted = (pairs.mean() + 1) / 2 if pairs.size else math.nan
                _same(found[i], torch.tensor(wanted, dtype=torch.float64), "pairs counted one by one", 1e-12)

    def sane(found: Any) -> None:
        assert isinstance(found, Tensor), brief(found)

    return _call(draw, name, function, good, kinds, check=check, sane=sane)


def of_a_map(draw: Any) -> Call:
    name = draw(st.sampled_from(["smoothness", "sparsity", "complexity", "controls"]))
    function: Callable[..., Any] = getattr(metrics, name)
    axes = draw(values.layouts)
    clip = values.clip_of(draw, axes, values.shape(draw, batch=2))

    def stacked(found: Any) -> Tensor:
        if name == "controls":
            return torch.stack([found[key] for key in ("center", "uniform", "inverted")], 1)
        return torch.stack(found, 1) if isinstance(found, tuple) else found[:, None]

    if name == "controls":
        good: dict[str, Any] = {"inputs": clip, "layout": axes, "attributions": clip}
        kinds = {"inputs": "clip", "layout": "layout", "attributions": "maps?", "generator": "generator?"}
    else:
        good = {"attributions": clip, "layout": axes}
        kinds = {"attributions": "map alone", "layout": "layout?"}

    def check(found: Any) -> None:
        score = stacked(found)
        if name != "controls":
            bounded(function, score)
        plain = values.working(clip, axes).contiguous()
        turned = {key: plain if key in ("inputs", "attributions") else "BTCHW" for key in good}
        if plain.shape[1] != 3 or plain.shape[2] <= 4:
            _same(stacked(function(**turned)), score, "layout BTCHW", 1e-9)
        alone = {key: value[:1] if isinstance(value, Tensor) else value for key, value in good.items()}
        _same(stacked(function(**alone)), score[:1], "alone", 1e-9)

    return _call(draw, name, function, good, kinds, check=check)


def tables(draw: Any) -> Call:
    name = draw(st.sampled_from(["reliability", "krippendorff_alpha", "boxes_to_truth"]))
    if name == "boxes_to_truth":
        size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        corners = torch.tensor([[[0.0, 0.0, float(size[1]), float(size[0])], [math.nan] * 4]])
        boxes = draw(st.sampled_from([corners, corners.double(), corners.numpy(), corners[:, :1].int()]))

        def check(truth: Tensor) -> None:
            assert bool(truth[0, 0].all()) and not bool(truth[0, 1:].any()) and truth.shape[2:] == size

        kinds, refusals = {"boxes": "table", "size": "pair"}, ("each box must",)
        return _call(
            draw, name, metrics.boxes_to_truth, {"boxes": boxes, "size": size}, kinds, check=check, refusals=refusals
        )
    table = values.normal(draw, draw(st.integers(2, 5)), draw(st.integers(2, 5)))
    table = draw(
        st.sampled_from([table, table.round(), table * 0, table.numpy(), table.masked_fill(table > 1, math.nan)])
    )

    def bounded_table(found: Any) -> None:
        score = torch.tensor([found.spearman, found.krippendorff, found.weighted] if name == "reliability" else [found])
        inside = score[~score.isnan()]
        assert bool((inside.abs() <= 1 + 1e-9).all()), score

    if name == "reliability":
        good: dict[str, Any] = {"scores": table, "random": draw(st.sampled_from([None, 0])), "n_bootstrap": 5}
        kinds = {"scores": "table", "random": "word?", "n_bootstrap": "count", "generator": "generator?"}
        function: Any = metrics.reliability
    else:
        good, kinds = {"ratings": table, "level": "ordinal"}, {"ratings": "table", "level": "word"}
        function = metrics.krippendorff_alpha
    return _call(draw, name, function, good, kinds, check=bounded_table, sane=bounded_table)


def disturbed(draw: Any) -> Call:
    axes = draw(values.layouts)
    clip = values.clip_of(draw, axes, values.shape(draw))
    name = draw(st.sampled_from(["tubelet_noise", "brightness_flicker", "frame_drop", "frame_shuffle"]))
    _, h, w = values.extent(clip, axes)
    options: dict[str, Any] = {
        "tubelet_noise": {"cells": (1, max(1, h // 2), w), "std": 0.1},
        "brightness_flicker": {"std": 0.1},
        "frame_drop": {"share": 0.5, "baseline": 0.0},
        "frame_shuffle": {"window": 2},
    }[name]
    kinds = {"cells": "triple", "std": "number", "share": "fraction", "baseline": "signed", "window": "count"}
    kinds = {key: kinds[key] for key in options} | {"layout": "layout", "generator": "generator?", "clip": "inputs"}
    kinds |= {"perturb_radius": "number"}

    def run(clip: Any, layout: Any, perturb_radius: Any = 0.05, **made: Any) -> Any:
        one = getattr(noise, name)(layout, **made)
        return one.for_sensitivity()(clip, perturb_radius), one.for_infidelity(multiply_by_inputs=False)(clip)

    def check(found: Any) -> None:
        near, (change, altered) = found
        assert near.shape == change.shape == altered.shape == clip.shape
        assert all(bool(x.isfinite().all()) and not x.requires_grad for x in (near, change, altered))
        slack = 8 * torch.finfo(clip.dtype).eps * (1 + float(clip.detach().abs().max()))
        assert float((near - clip).abs().max()) <= 0.05 + slack, "beyond the radius"
        close(change, clip.detach() - altered, clip.dtype, scale=float(clip.detach().abs().max()), what="change")

    good = {"clip": clip, "layout": axes, **options}
    refusals = ("window must be at most the number of frames",)
    return _call(draw, f"noise.{name}", run, good, kinds, check=check, refusals=refusals)


def sanity_checks(draw: Any) -> Call:
    name = draw(st.sampled_from(["randomization", "class_sensitivity", "attention_usage"]))
    if name == "attention_usage":
        clip = values.normal(draw, draw(st.integers(1, 3)), 3, 4, 12, 10)
        good: dict[str, Any] = {"st_abn": branched(), "inputs": clip, "target": values.target_of(draw, len(clip))}

        def inside(found: Any) -> None:
            moved = torch.cat([found.temporal_flat, found.spatial_flat])
            assert bool(((moved >= 0) & (moved <= 1)).all()), moved

        kinds = {"st_abn": "model", "inputs": "clip", "target": "target?"}
        return _call(draw, name, metrics.attention_usage, good, kinds, check=inside)
    model = nn.Sequential(nn.Flatten(), nn.Linear(24, CLASSES))
    clip = values.normal(draw, draw(st.integers(1, 3)), 2, 1, 3, 4)

    def gradient(model: Any, clip: Tensor, target: Any = 0) -> Tensor:
        leaf = clip.detach().requires_grad_()
        with torch.enable_grad():
            score = model(leaf).gather(1, torch.as_tensor(target).expand(len(clip))[:, None]).sum()
        return torch.autograd.grad(score, leaf)[0]

    function = getattr(sanity, name)
    good = {"explain": gradient, "model": model, "inputs": clip, "layout": "BTCHW"}
    kinds = {"model": "model", "layout": "layout", "explain": "model"}
    if name == "class_sensitivity":
        good |= {"target": 0, "others": [1, [2] * len(clip)]}
        kinds |= {"target": "target", "others": "numbers"}
    else:
        kinds |= {"layers": "word?", "generator": "generator?"}

    def check(found: Any) -> None:
        rows = 2 if name == "class_sensitivity" else 1
        assert found.signed.shape == (rows, len(clip)) and bool((found.signed.abs() <= 1).all()), found.signed

    return _call(draw, name, function, good, kinds, check=check)


ENTRIES = {
    "metrics that ask a model": with_model,
    "metrics of the truth": with_truth,
    "metrics of a map": of_a_map,
    "tables and boxes": tables,
    "noise": disturbed,
    "sanity and usage": sanity_checks,
}
