"""Properties of all attributions: their form, and equal numbers for equivalent calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from . import values
from .calls import Call

Explain = Callable[..., Any]
RELATIONS = ("memory", "layout", "alone", "order of the batch", "double", "chunks", "tuple")


def form(result: Any, clip: Tensor) -> Tensor:
    """Check that a map has the shape of the clip, and is finite, contiguous, detached, and at least float32."""
    assert isinstance(result, Tensor), f"a tensor was expected, got {type(result).__name__}"
    assert result.shape == clip.shape, f"shape {tuple(result.shape)} for a clip of {tuple(clip.shape)}"
    assert result.dtype == torch.promote_types(clip.dtype, torch.float32), f"{result.dtype} for {clip.dtype}"
    assert result.is_contiguous() and not result.requires_grad, "not contiguous, or part of a graph"
    assert bool(result.isfinite().all()), "nan or infinity"
    return result


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, scale: float = 0.0, what: str = "") -> None:
    """Check that tensors are equal up to the rounding of a dtype, on the scale of the inputs."""
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    found, wanted = values.wide(found), values.wide(wanted)
    size = max(scale, float(wanted.abs().max()) if wanted.numel() else 0.0)
    apart = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    allowed = 200 * torch.finfo(dtype).eps * size + 1e-30
    assert apart <= allowed, f"{what}: up to {apart:.3g} apart, {allowed:.3g} allowed on a scale of {size:.3g}"


def valid_call(
    draw: Any,
    name: str,
    explain: Explain,
    clip: Tensor,
    axes: str,
    options: dict[str, Any],
    *,
    relations: Sequence[str] = RELATIONS,
    expected: Callable[[], Tensor] | None = None,
    scale: float = 0.0,
    refusals: tuple[str, ...] = (),
    models: tuple[Any, ...] = (),
) -> Call:
    """Return a call whose result is compared with a slow formula, if there is one, and with an equivalent call (twin).

    Args:
        draw: the draw function of hypothesis.
        name: name of the entry point.
        explain: ``explain(clip, axes, **options)``.
        clip: clip in the layout ``axes``.
        axes: its layout.
        options: additional arguments, whose 5-D tensors have the same layout.
        relations: the twins that are valid for this method.
        expected: function that computes the attribution in another way.
        scale: scale of the scores whose differences are the attributions.
        refusals: texts of errors that a valid call may raise.
        models: models that must not change.
    """
    relation = draw(st.sampled_from(tuple(relations)))
    other = values.other_axes(draw, axes)
    at = draw(st.integers(0, len(clip) - 1))
    order = torch.tensor(draw(st.permutations(range(len(clip)))))
    described = f"{clip.dtype} {tuple(clip.shape)} strides {clip.stride()} in {axes}, {_brief(options)}"
    description = f"{name}({described}), {relation}"

    def check(result: Any) -> None:
        result = form(result, clip)
        plain = clip.detach().contiguous().clone()
        if expected is not None and torch.finfo(clip.dtype).bits >= 32:
            close(result, expected(), torch.promote_types(clip.dtype, torch.float32), scale, "the slow formula")
        if relation == "memory":
            close(result, explain(plain, axes, **options), clip.dtype, scale, relation)
        elif relation == "layout":
            turned = {key: values.in_axes(value, axes, other) for key, value in options.items()}
            twin = explain(values.in_axes(plain, axes, other).contiguous(), other, **turned)
            close(result, values.in_axes(twin, other, axes), clip.dtype, scale, f"{relation} {other}")
        elif relation == "alone":
            alone = explain(plain[at : at + 1], axes, **_part(options, at))
            close(result[at : at + 1], alone, clip.dtype, scale, f"{relation}, clip {at}")
        elif relation == "order of the batch":
            twin = explain(plain[order], axes, **_ordered(options, order))
            close(result[order], twin, clip.dtype, scale, relation)
        elif relation == "double" and clip.dtype == torch.float32:
            wide = {k: v.double() if _floats(v) else v for k, v in options.items()}
            close(result, explain(plain.double(), axes, **wide), clip.dtype, scale, relation)
        elif relation == "chunks" and "perturbations_per_eval" in options:
            twin = explain(plain, axes, **{**options, "perturbations_per_eval": 3})
            close(result, twin, clip.dtype, scale, relation)
        elif relation == "tuple":
            twin = explain((plain,), axes, **options)
            assert isinstance(twin, tuple) and len(twin) == 1, "a tuple input did not return a tuple"
            close(result, twin[0], clip.dtype, scale, relation)

    inputs = (clip, *(value for value in options.values() if isinstance(value, Tensor)))
    run = lambda: explain(clip, axes, **options)  # noqa: E731
    return Call(description, run, check, refusals=refusals, inputs=inputs, models=models)


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _part(options: dict[str, Any], at: int) -> dict[str, Any]:
    """Return the arguments of one clip of the batch."""
    parts = {k: values.baseline_at(v, at) for k, v in options.items()}
    if isinstance(mask := parts.get("feature_mask"), Tensor):
        parts["feature_mask"] = mask.unique(return_inverse=True)[1]  # ids of the other clips leave gaps
    return {**parts, "target": values.target_at(options.get("target"), at)} if "target" in options else parts


def _ordered(options: dict[str, Any], order: Tensor) -> dict[str, Any]:
    changed = dict(options)
    for key, value in options.items():
        if isinstance(value, Tensor) and value.ndim in (1, 4, 5) and len(value) == len(order) > 1:
            changed[key] = value[order]
        elif key == "target" and isinstance(value, list) and len(value) == len(order):
            changed[key] = [value[i] for i in order]
    return changed


def _brief(options: dict[str, Any]) -> str:
    return ", ".join(f"{key}={brief(value)}" for key, value in options.items())


def brief(value: Any) -> str:
    """Return a value for a report. Large values are described by type and shape."""
    if isinstance(value, Tensor) and (value.is_meta or value.layout != torch.strided or value.numel() > 6):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray) and value.size > 6:
        return f"array {value.dtype} {value.shape}"
    return " ".join(repr(value).split())[:120]


def malformed_call(
    name: str, run: Callable[[], Any], argument: str, bad: Any, check: Callable[[Any], None], **more: Any
) -> Call:
    """Return a call with one invalid argument, which must raise an error of the library."""
    description = f"{name}({argument}={brief(bad.value)})"
    return Call(description, run, check, must_fail=bad.must_fail, changed=(argument, bad.value), **more)
