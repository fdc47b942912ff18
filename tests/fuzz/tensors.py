"""Calls without a model: layouts, grids, VideoAttribution, smoothing, baselines and feature masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from captum_staa import TokenGrid, VideoAttribution, VideoLayout, baselines, feature_masks, smooth

from . import values
from .calls import Call
from .hostile import malformed
from .twins import brief, close, malformed_call


def _call(
    draw: Any, name: str, run: Callable[..., Any], good: dict[str, Any], kinds: dict[str, str], **more: Any
) -> Call:
    """Return a valid call with its check, or a call with one malformed argument."""
    check, refusals = more.pop("check"), more.pop("refusals", ())
    inputs = tuple(value for value in good.values() if isinstance(value, Tensor))
    if draw(st.booleans()):
        description = f"{name}({', '.join(f'{key}={brief(value)}' for key, value in good.items())})"
        return Call(description, lambda: run(**good), check, inputs=inputs, refusals=refusals)
    args, argument, bad = malformed(draw, good, kinds)
    sane = more.get("sane", lambda result: None)
    return malformed_call(name, lambda: run(**args), argument, bad, sane, inputs=inputs, refusals=refusals)


def _clip(draw: Any, **limits: int) -> tuple[str, Tensor]:
    axes = draw(values.layouts)
    return axes, values.clip_of(draw, axes, values.shape(draw, **limits))


def sums(draw: Any) -> Call:
    axes, clip = _clip(draw)

    def check(parts: Any) -> None:
        x = values.wide(values.working(clip, axes)).numpy()
        for found, wanted in (
            (parts.joint, x.sum(2)),
            (parts.spatial, x.sum((1, 2))),
            (parts.temporal, x.sum((2, 3, 4))),
        ):
            close(found, torch.from_numpy(wanted), torch.float32, scale=abs(x).sum(), what="sums")

    kinds = {"attributions": "any numbers", "layout": "layout"}
    good = {"attributions": clip, "layout": axes}
    return _call(draw, "VideoAttribution", VideoAttribution.from_attributions, good, kinds, check=check)


def smoothing(draw: Any) -> Call:
    axes, clip = _clip(draw)
    space, time = (draw(st.sampled_from([0, 0.0, 0.4, 1.5, 30.0])) for _ in range(2))

    def check(found: Tensor) -> None:
        assert found.shape == clip.shape and found.dtype == clip.dtype and found.is_contiguous()
        x = values.wide(values.working(clip, axes))
        for axis, sigma in ((1, time), (3, space), (4, space)):
            if sigma:
                reach = max(1, int(3 * sigma + 0.5))
                place = torch.arange(x.shape[axis], dtype=torch.float64)
                apart = place[:, None] - place
                kernel = torch.exp(-0.5 * (apart / sigma) ** 2) * (apart.abs() <= reach)
                x = torch.tensordot(kernel / kernel.sum(1, keepdim=True), x.movedim(axis, 0), 1).movedim(0, axis)
        close(values.working(found, axes), x, clip.dtype, scale=float(values.wide(clip).abs().max()), what="slow blur")

    good = {"attributions": clip, "layout": axes, "space": space, "time": time}
    kinds = {"attributions": "clip", "layout": "layout", "space": "number", "time": "number"}
    return _call(draw, "smooth", smooth, good, kinds, check=check)


def layout(draw: Any) -> Call:
    axes, clip = _clip(draw)

    def run(clip: Any, layout: Any, channels: Any = None) -> Any:
        made = VideoLayout(layout, channels)
        return made.from_working(made.to_working(clip)), made.size(clip), made.reduce(clip)

    def check(found: Any) -> None:
        back, sizes, reduced = found
        assert torch.equal(back, clip) and sizes == dict(zip(axes, clip.shape, strict=True))
        wanted = values.wide(values.working(clip, axes)).sum(2)
        close(reduced, wanted, clip.dtype, scale=float(values.wide(clip).abs().sum()), what="sum over channels")

    good = {"clip": clip, "layout": axes, "channels": draw(st.sampled_from([None, clip.shape[axes.index("C")]]))}
    return _call(draw, "VideoLayout", run, good, {"layout": "layout", "channels": "count?"}, check=check)


def grid(draw: Any) -> Call:
    t, h, w, prefix = (draw(st.integers(least, 3)) for least in (1, 1, 1, 0))
    tubelet = tuple(draw(st.integers(1, 3)) for _ in range(3))
    good = {
        "t": t,
        "h": h,
        "w": w,
        "prefix": prefix,
        "order": draw(st.sampled_from(["thw", "hwt"])),
        "tubelet": tubelet,
    }
    tokens = values.normal(draw, 2, prefix + t * h * w)
    rest = tuple(draw(st.integers(0, 2)) for _ in range(3))
    size = tuple(a * b + c for a, b, c in zip((t, h, w), tubelet, rest, strict=True))

    def run(size: Any = size, mode: Any = "nearest", **made: Any) -> Any:
        one = TokenGrid(**made)
        return one.to_grid(tokens), one.to_pixels(one.to_grid(tokens), mode, size)

    def check(found: Any) -> None:
        cells, pixels = found
        assert pixels.shape == (2, *size)
        for at, value in enumerate(tokens[0, prefix:].tolist()):
            i, j, k = (
                (at // (h * w), at // w % h, at % w) if good["order"] == "thw" else (at % t, at // t // w, at // t % w)
            )
            assert float(cells[0, i, j, k]) == value, "a token in another cell"
            assert float(pixels[0, i * tubelet[0], j * tubelet[1], k * tubelet[2]]) == value, "a cell in another place"
        covered = math.prod(tubelet)
        close(pixels.double().sum((1, 2, 3)), covered * cells.double().sum((1, 2, 3)), torch.float32, scale=100.0)

    kinds = dict.fromkeys(("t", "h", "w"), "count") | {"order": "word", "tubelet": "triple", "size": "triple?"}
    return _call(draw, "TokenGrid", run, good, {**kinds, "mode": "word"}, check=check)


def baseline(draw: Any) -> Call:
    axes, clip = _clip(draw)
    name = draw(st.sampled_from(["zero", "mean_frame", "blur", "freeze", "shuffle", "reverse", "noise"]))
    function = getattr(baselines, name)
    frames = clip.shape[axes.index("T")]
    more: dict[str, Any] = {}
    if name == "blur":
        more = {"space": draw(st.sampled_from([None, 0.7, 20.0])), "time": draw(st.sampled_from([0.0, 1.0, 50.0]))}
    elif name == "freeze":
        more = {"frame": draw(st.one_of(st.none(), st.integers(-frames, frames - 1)))}
    elif name == "noise":
        more = {"std": draw(st.sampled_from([None, 0.5]))}

    def check(found: Tensor) -> None:
        assert found.shape == clip.shape and found.dtype == clip.dtype
        assert found.is_contiguous() and not found.requires_grad and bool(found.isfinite().all())
        x, y = values.working(clip.detach(), axes), values.working(found, axes)
        if name == "zero":
            assert not bool(y.any())
        elif name == "mean_frame":
            wanted = values.wide(x).mean(1, keepdim=True).expand_as(x)
            close(y, wanted, clip.dtype, scale=float(values.wide(x).abs().max()), what=name)
        elif name == "freeze":
            chosen = frames // 2 if more["frame"] is None else more["frame"]
            assert torch.equal(y, x[:, [chosen] * frames]), "another frame"
        elif name == "reverse":
            assert torch.equal(y, x.flip(1))
        elif name == "shuffle":
            assert torch.equal(y.flatten(2).sort(1).values, x.flatten(2).sort(1).values), "other frames"
            assert frames < 2 or bool((y != x).any()) or bool((x == x[:, :1]).all()), "the same order"
        other = values.other_axes(draw_free(axes), axes)
        twin = function(values.in_axes(clip, axes, other), other, **more)
        close(values.in_axes(twin, other, axes), found, clip.dtype, what=f"layout {other}", scale=1.0)
        if name != "noise":
            alone = function(clip[:1], axes, **more)
            close(alone, found[:1], clip.dtype, what="alone", scale=1.0)

    kinds = {"inputs": "clip", "layout": "layout"}
    kinds |= {"blur": {"space": "number?", "time": "number"}, "freeze": {"frame": "word?"}}.get(name, {})
    kinds |= {"noise": {"std": "number?", "generator": "generator?"}, "shuffle": {"generator": "generator?"}}.get(
        name, {}
    )
    refusals = ("at least two frames",)
    good = {"inputs": clip, "layout": axes, **more}
    return _call(draw, f"baselines.{name}", function, good, kinds, check=check, refusals=refusals)


def draw_free(axes: str) -> Any:
    """Return a replacement for hypothesis while a call runs: it chooses another layout of the list."""
    return lambda strategy: values.LAYOUTS[(values.LAYOUTS.index(axes) + 7) % len(values.LAYOUTS)]


def mask(draw: Any) -> Call:
    axes, clip = _clip(draw, most=9, batch=2)
    name = draw(st.sampled_from(["frames", "segments", "grid", "supervoxels", "flow_tubes"]))
    function = getattr(feature_masks, name)
    t, h, w = values.extent(clip, axes)
    more: dict[str, Any] = {}
    if name == "segments":
        more = {"n": draw(st.integers(1, t))}
    elif name == "grid":
        more = {"cells": tuple(draw(st.integers(1, side)) for side in (t, h, w))}
    elif name in ("supervoxels", "flow_tubes"):
        more = {"n": draw(st.integers(1, t * h * w)), "compactness": draw(st.sampled_from([20.0, 0.1, 500.0]))}

    def check(ids: Tensor) -> None:
        assert ids.dtype == torch.int64 and ids.is_contiguous()
        assert all(a in (1, b) for a, b in zip(ids.shape, clip.shape, strict=True)), tuple(ids.shape)
        for one in values.working(ids, axes):
            assert one.unique().tolist() == list(range(int(one.max()) + 1)), "gaps"
        other = values.other_axes(draw_free(axes), axes)
        twin = function(values.in_axes(clip, axes, other), other, **more)
        assert torch.equal(values.in_axes(twin, other, axes), ids), f"other regions in {other}"
        if name == "grid":
            a, b, c = more["cells"]
            found = values.working(ids, axes)[0, :, 0]
            rows, columns = -(-h // b), -(-w // c)
            place = torch.meshgrid(*(torch.arange(side) for side in (t, h, w)), indexing="ij")
            assert torch.equal(found, (place[0] // a * rows + place[1] // b) * columns + place[2] // c), "other cells"

    kinds = {"inputs": "clip", "layout": "layout"}
    kinds |= {"segments": {"n": "count"}, "grid": {"cells": "triple"}}.get(name, {})
    kinds |= {"n": "count", "compactness": "number"} if "compactness" in more else {}
    refusals = ("2 x 2 pixels",)
    good = {"inputs": clip, "layout": axes, **more}
    return _call(draw, f"feature_masks.{name}", function, good, kinds, check=check, refusals=refusals)


ENTRIES = {
    "VideoLayout": layout,
    "TokenGrid": grid,
    "VideoAttribution": sums,
    "smooth": smoothing,
    "baselines": baseline,
    "feature_masks": mask,
}
