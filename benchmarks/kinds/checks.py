"""Every method and metric on a subject, and what it should give, computed from the model written by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import slow_staa
import torch
import torch.nn.functional as F
from captum import attr
from captum.metrics import infidelity
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_staa import (
    RISE,
    STAA,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoFeatureAblation,
    VideoOcclusion,
    feature_masks,
    metrics,
    models,
)
from captum_staa.metrics import noise
from kinds.subjects import Subject

# --- outputs by hand --------------------------------------------------------------------------------------------


def chosen(s: Subject, outputs: Tensor) -> Tensor:
    """Return the outputs of the targets, ``(B,)``. Rows may be copies of the batch, copy after copy."""
    if s.target is None:
        return outputs.flatten()
    targets = s.target if isinstance(s.target, list) else [s.target]
    rows = [outputs[i][targets[i % len(targets)]] for i in range(len(outputs))]
    return torch.stack(rows)


def probability(s: Subject, outputs: Tensor) -> Tensor:
    """Return what a reader is shown."""
    return {"logits": lambda: outputs.softmax(-1), "sigmoid": outputs.sigmoid}.get(
        s.reference.output, lambda: outputs
    )()


def in_logits(s: Subject, outputs: Tensor) -> Tensor:
    """Return what gradients explain: the logarithm of a probability, and other outputs as they are."""
    return outputs.log() if s.reference.output == "probabilities" else outputs


class Contrast(nn.Module):
    """The transformer of a subject with two outputs: the target's minus the mean of the others, and zero.

    The formula in ``slow_staa`` explains an output minus the mean of the others. So it explains the first of these.
    """

    def __init__(self, s: Subject) -> None:
        super().__init__()
        assert s.transformer is not None
        self.model: Any = copy.deepcopy(s.transformer[1](s.reference.net)).float()  # the formula casts it to float64
        self.subject = s
        self.model.set_attn_implementation("eager")

    def forward(self, clip: Tensor) -> Tensor:
        outputs = self.model(clip).logits.flatten(1)
        own = chosen(self.subject, outputs)
        if self.subject.reference.output in ("logits", "probabilities"):  # one class is right
            own = own - (outputs.sum(1) - own) / (outputs.shape[1] - 1)
        return torch.stack([own, torch.zeros_like(own)], 1)


# --- one check for each column: each returns what the library gives ---------------------------------------------


def predict(s: Subject) -> Tensor:
    rows: Any = s.clf.predict(s.clip, k=99)
    rows = rows if isinstance(rows[0], list) else [rows]
    names = s.clf.label_names(len(rows[0]))
    return torch.tensor([[dict(row)[name] for name in names] for row in rows])


def predict_by_hand(s: Subject) -> Tensor:
    with torch.no_grad():
        return probability(s, s.reference(s.clip))


def staa_attention(s: Subject) -> Tensor:
    return STAA(s.clf, mode="attention").attribute(s.clip)


def staa_relevance(s: Subject) -> Tensor:
    return STAA(s.clf, pattern_weight=0).attribute(s.clip, target=s.target)


def _slow_staa(s: Subject, mode: str) -> Tensor:
    assert s.transformer is not None, "a map of a model without a formula"
    model, target = Contrast(s), torch.zeros(len(s.clip), dtype=torch.long)
    frames = s.layout.to_working(s.clip)
    maps = slow_staa.staa(s.transformer[0], model, frames, target, mode, "decomposition", "all")
    return s.layout.from_working(maps[:, :, None].expand_as(frames) / 3)


def staa_attention_by_hand(s: Subject) -> Tensor:
    if callable(s.attention):
        with torch.no_grad(), _Softmaxes() as softmaxes:
            s.reference.run(_eager(s), s.clip)
        return _in_pixels(s, s.attention(softmaxes.found))
    if s.attention == "windows":
        return _rollout_of_windows(s)
    if s.attention == "pools":
        return _rollout_of_pools(s)
    return _slow_staa(s, "attention") if s.attention is None else _rollout_of_frames(s)


def staa_relevance_by_hand(s: Subject) -> Tensor:
    return _slow_staa(s, "relevance") if s.embedding is None else _frozen_gradient(s)


def _eager(s: Subject) -> Any:
    """Return a copy of the network of the reference that computes attention by a softmax."""
    net: Any = copy.deepcopy(s.reference.net)
    for module in net.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # of timm
        if hasattr(module, "use_flash_attn"):
            module.use_flash_attn = False  # of vit-pytorch
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    return net


def _rollout_of_frames(s: Subject) -> Tensor:
    """Multiply the attention of all blocks, with residual connections, for each frame; read by its class token."""
    assert s.attention is not None and s.embedding is not None
    net, found = _eager(s), []
    for name, module in net.named_modules():
        if name.endswith(s.attention):
            module.register_forward_pre_hook(lambda module, args: found.append(args[0].mean(1)))
    frames = s.layout.to_working(s.clip)
    with torch.no_grad():
        s.reference.run(net, s.clip)
    product = torch.eye(found[0].shape[1])
    for matrix in found:  # (B * t, N, N)
        product = (matrix + torch.eye(len(matrix[0]))) @ product / 2
    count, (t, h, w) = frames.shape[1], s.embedding[1]
    cells = product[:, 0, 1:].unflatten(0, (-1, count)) / count  # the head averages over frames
    cells = cells.unflatten(2, (frames.shape[3] // h, frames.shape[4] // w))
    maps = F.interpolate(cells[:, None], scale_factor=(t, h, w), mode="trilinear")[:, 0] / (t * h * w)
    return s.layout.from_working(maps[:, :, None].expand_as(frames) / 3)


def _in_pixels(s: Subject, weights: Tensor) -> Tensor:
    """Return the weights of cells ``(B, t, h, w)`` spread over their pixels and channels."""
    edges = [whole // cells for whole, cells in zip(s.layout.extent(s.clip), weights.shape[1:], strict=True)]
    maps = F.interpolate(weights[:, None], scale_factor=edges, mode="trilinear")[:, 0] / math.prod(edges)
    frames = s.layout.to_working(s.clip)
    return s.layout.from_working(maps[:, :, None].expand_as(frames) / 3)


class _Softmaxes(TorchFunctionMode):
    """Keeps what every softmax returns."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.softmax, torch.softmax, Tensor.softmax):
            self.found.append(result)
        return result


def _rollout_of_windows(s: Subject) -> Tensor:
    """Carry equal weights of the last tokens back through shifted windows, one query at a time, and merged tokens."""
    net, calls = _eager(s), []
    for module in net.modules():
        if type(module).__name__ == "SwinTransformerBlock":  # torchvision has the window in the attention, timm here
            owner = module.attn if hasattr(module.attn, "shift_size") else module
            module.register_forward_pre_hook(
                lambda module, args, owner=owner: calls.append((owner, tuple(args[0].shape[1:-1])))
            )
    with torch.no_grad(), _Softmaxes() as softmaxes:
        s.reference.run(net, s.clip)
    frames = s.layout.to_working(s.clip)
    folded = len(calls[0][1]) == 2  # one frame after the other
    count = len(frames) * (frames.shape[1] if folded else 1)
    weights = torch.full((count, *calls[-1][1]), 1 / math.prod(calls[-1][1]))
    for (owner, size), matrix in zip(reversed(calls), reversed(softmaxes.found), strict=True):
        for axis, (few, many) in enumerate(zip(weights.shape[1:], size, strict=True), 1):
            weights = weights.repeat_interleave(many // few, axis) / (many // few)
        numbers = _windows(size, owner.window_size, owner.shift_size)  # (windows, n)
        matrix = matrix.mean(1).unflatten(0, (count, -1))  # (count, windows, n, n)
        flat, pulled = weights.flatten(1), torch.zeros(count, math.prod(size))
        for window, tokens in enumerate(numbers.tolist()):
            inside = [place for place, token in enumerate(tokens) if token >= 0]
            for place in inside:
                pulled[:, numbers[window, inside]] += flat[:, tokens[place], None] * matrix[:, window, place, inside]
        weights = (weights + pulled.view(weights.shape)) / 2
    if folded:
        weights = weights.unflatten(0, (len(frames), -1)) / frames.shape[1]  # the head averages over frames
    return _in_pixels(s, weights)


def _rollout_of_pools(s: Subject) -> Tensor:
    """Carry the class token's weight back through pooled attention. A pooled token stands evenly for its patches."""
    net, grids = _eager(s), []
    for module in net.modules():
        if type(module).__name__ == "MultiscaleAttention":
            module.register_forward_pre_hook(lambda module, args: grids.append(tuple(args[1])))
    with torch.no_grad(), _Softmaxes() as softmaxes:
        s.reference.run(net, s.clip)

    def pooled(grid: tuple[int, ...], count: int) -> tuple[int, ...]:
        step = round(math.sqrt(math.prod(grid) / count))
        return grid[0], grid[1] // step, grid[2] // step

    def divided(weights: Tensor, grid: tuple[int, ...]) -> Tensor:
        for axis, (few, many) in enumerate(zip(weights.shape[1:], grid, strict=True), 1):
            weights = weights.repeat_interleave(many // few, axis) / (many // few)
        return weights

    weights = None
    for grid, matrix in zip(reversed(grids), reversed(softmaxes.found), strict=True):
        matrix = matrix.mean(1)  # (B, 1 + Q, 1 + N)
        asked, keys = (pooled(grid, side - 1) for side in matrix.shape[1:])
        if weights is None:
            cls, weights = torch.ones(len(matrix), 1), torch.zeros(len(matrix), *asked)
        pulled = (torch.cat([cls, weights.flatten(1)], 1)[:, None] @ matrix)[:, 0]
        cls = (cls + pulled[:, :1]) / 2
        weights = (divided(weights, grid) + divided(pulled[:, 1:].unflatten(1, keys), grid)) / 2
    return _in_pixels(s, weights)


def _windows(size: tuple[int, ...], window: Any, shift: Any) -> Tensor:
    """Return the numbers of the tokens in each window, ``(windows, n)``; -1 is padding."""
    fits = [side <= width for side, width in zip(size, window, strict=True)]
    window = [side if fit else width for side, width, fit in zip(size, window, fits, strict=True)]
    shift = [0 if fit else step for step, fit in zip(shift, fits, strict=True)]
    padded = [-(-side // width) * width for side, width in zip(size, window, strict=True)]
    numbers = torch.full(padded, -1)
    numbers[tuple(map(slice, size))] = torch.arange(math.prod(size)).view(size)
    numbers = numbers.roll([-step for step in shift], tuple(range(len(size))))
    for axis, width in enumerate(window):
        numbers = numbers.unflatten(2 * axis, (-1, width))
    axes = range(len(size))
    return numbers.permute(*(2 * axis for axis in axes), *(2 * axis + 1 for axis in axes)).reshape(
        -1, math.prod(window)
    )


class FrozenPlayback(slow_staa.Playback):
    """Also keeps the gate of a sigmoid and norms, and gives each factor of a product of two features one half."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.einsum:
            equation, *factors = args
            return self._product(lambda *two: func(equation, *two), factors)
        if func in (torch.mul, Tensor.mul, Tensor.__mul__) and all(isinstance(factor, Tensor) for factor in args):
            return self._product(func, args)
        return super().__torch_function__(func, types, args, kwargs)

    def _product(self, multiply: Callable[..., Tensor], factors: Sequence[Tensor]) -> Tensor:
        if self.next < 0:
            self.recorded += factors
            return multiply(*factors)
        first, second = self.recorded[self.next : self.next + 2]
        self.next += 2
        if not all(factor.requires_grad for factor in factors):
            return multiply(*factors)  # of a pattern and values, for example
        return (multiply(factors[0], second) + multiply(first, factors[1])) / 2

    @staticmethod
    def _known(func: Any) -> str | None:
        if func in (torch.sigmoid, Tensor.sigmoid, Tensor.norm):
            return "constant"
        return slow_staa.Playback._known(func)


def _frozen_gradient(s: Subject) -> Tensor:
    """Gradient times embedding or pixel, in float64, with the patterns, scales and gates of a first forward."""
    assert s.embedding is not None
    name, sides = s.embedding
    net, mode, leaves = _eager(s).double(), FrozenPlayback(), []
    for parameter in net.parameters():
        parameter.requires_grad_(False)

    def leaf(value: Tensor) -> Tensor:
        leaves.append(value.detach().requires_grad_())
        return leaves[-1] * 1

    if name is not None:
        net.get_submodule(name).register_forward_hook(lambda module, args, output: leaf(output))
    for first in (True, False):
        mode.next = -1 if first else 0
        with mode, torch.set_grad_enabled(not first):
            outputs = s.reference.run(net, s.clip.double() if name is not None else leaf(s.clip.double()))
    own = chosen(s, outputs)
    score = own - (outputs.sum(1) - own) / (outputs.shape[1] - 1)
    (gradient,) = torch.autograd.grad(score.sum(), leaves[-1])
    products = gradient * leaves[-1].detach()
    products = products if name is None else s.embedded(products)
    frames = s.layout.to_working(s.clip)
    if name is None:
        maps = s.layout.to_working(products).sum(2)
    else:
        shares = products.sum(1)  # (B, t, h, w), or (B * t, h, w) of an embedding per frame
        maps = (shares if shares.ndim == 4 else shares.unflatten(0, (len(frames), -1))) / math.prod(sides)
        for axis, side in enumerate(sides, start=1):
            maps = maps.repeat_interleave(int(side), axis)
    t, h, w = sides
    for axis, side in enumerate((t, s.merged * h, s.merged * w), start=1):
        maps = _spread(maps, axis, 0.75 * side)
    return s.layout.from_working(maps.float()[:, :, None].expand_as(frames) / 3)


def _spread(maps: Tensor, axis: int, sigma: float) -> Tensor:
    """Distribute each value along an axis by a Gaussian whose sum inside the clip is 1."""
    place = torch.arange(maps.shape[axis], dtype=torch.float64)
    far = (place[:, None] - place).abs()
    kernel = torch.exp(-(far**2) / (2 * sigma**2)) * (far <= max(1, int(3 * sigma + 0.5)))
    kernel = kernel / kernel.sum(1, keepdim=True)  # row i: how the value of pixel i is distributed
    return torch.tensordot(maps, kernel, ([axis], [0])).movedim(-1, axis)


def grad_cam(s: Subject) -> Tensor:
    grid = models.inspect(s.clf, s.clip).grid if s.inspected else None
    return GradCAM(s.clf, s.layer, grid=grid).attribute(s.clip, target=s.target)


def grad_cam_by_hand(s: Subject) -> Tensor:
    """Activation times gradient, summed over channels; each cell's value is shared by its pixels and channels."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = s.reference.net.get_submodule(s.layer.removeprefix(s.prefix)).register_forward_hook(hook)
    outputs = s.reference(s.clip.clone().requires_grad_())
    handle.remove()
    (gradient,) = torch.autograd.grad(chosen(s, in_logits(s, outputs)).sum(), kept)
    cells = (s.fold(kept[0]).float() * s.fold(gradient).float()).sum(1).detach()  # (B, t, h, w)
    frames = s.layout.to_working(s.clip)
    size = (frames.shape[1], *frames.shape[3:])
    maps = F.interpolate(cells[:, None], size=size, mode="trilinear")[:, 0]
    maps = maps * math.prod(cells.shape[1:]) / math.prod(size)
    return s.layout.from_working(maps[:, :, None].expand_as(frames) / 3)


def occlusion(s: Subject) -> Tensor:
    options = {"target": s.target, "perturbations_per_eval": s.per_eval}
    return VideoOcclusion(s.clf).attribute(s.clip, s.cell, s.cell, **options)


def occlusion_by_captum(s: Subject) -> Tensor:
    sides = dict(zip("THW", s.cell, strict=True)) | {"C": 3}
    window = tuple(sides[axis] for axis in s.layout.axes[1:])
    return attr.Occlusion(s.reference).attribute(s.clip, window, window, target=s.target)


def _features(s: Subject) -> Tensor:
    return feature_masks.grid(s.clip, s.layout, s.cell)


def ablation(s: Subject) -> Tensor:
    options = {"target": s.target, "perturbations_per_eval": s.per_eval, "feature_mask": _features(s)}
    return VideoFeatureAblation(s.clf).attribute(s.clip, baselines=0.5, **options)


def ablation_by_captum(s: Subject) -> Tensor:
    method = attr.FeatureAblation(s.reference)
    return method.attribute(s.clip, baselines=0.5, target=s.target, feature_mask=_features(s))


def _rise(s: Subject, model: nn.Module) -> Tensor:
    options = {"target": s.target, "n_samples": 3 * s.steps, "n_cells": (2, 3, 3)}
    return RISE(model, s.layout).attribute(s.clip, perturbations_per_eval=s.per_eval, **options)


def rise(s: Subject) -> Tensor:
    return _rise(s, s.clf)


def rise_by_hand(s: Subject) -> Tensor:
    return _rise(s, s.reference)


def _perturbation(s: Subject, model: nn.Module) -> Tensor:
    options: dict[str, Any] = {"areas": (0.2, 0.5), "iterations": s.steps, "perturbations_per_eval": s.per_eval}
    if s.steps == 1:  # one blend in place of several
        options |= {"areas": 0.3, "baselines": 0.0}
    options["target"] = s.target
    return SpatioTemporalPerturbation(model, s.layout).attribute(s.clip, **options)


def perturbation(s: Subject) -> Tensor:
    return _perturbation(s, s.clf)


def perturbation_by_hand(s: Subject) -> Tensor:
    return _perturbation(s, s.reference)


def _integrated_gradients(s: Subject, model: nn.Module) -> Tensor:
    return attr.IntegratedGradients(model).attribute(
        s.clip, target=s.target, n_steps=2 * s.steps, internal_batch_size=4
    )


def integrated_gradients(s: Subject) -> Tensor:
    return _integrated_gradients(s, s.clf).detach()


def integrated_gradients_by_hand(s: Subject) -> Tensor:
    return _integrated_gradients(s, s.reference).detach()


def _map(s: Subject) -> Tensor:
    """Return a random map ``(B, T, H, W)``."""
    frames = s.layout.to_working(s.clip)
    shape = (len(frames), frames.shape[1], *frames.shape[3:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def insertion_deletion(s: Subject) -> Tensor:
    options = {"target": s.target, "cells": s.cell, "steps": _curve_steps(s), "perturbations_per_eval": s.per_eval}
    found = metrics.insertion_deletion(s.clf, s.clip, _map(s), **options)
    return torch.cat([found.insertion.curve, found.deletion.curve], 1)


@torch.no_grad()
def insertion_deletion_by_hand(s: Subject) -> Tensor:
    """Sort the cells of each clip by the mean of the map, and replace one after the other."""
    frames, maps = s.layout.to_working(s.clip), _map(s)
    cells = _features_working(s)  # (T, H, W)
    count = int(cells.max()) + 1
    means = torch.stack([maps[:, cells == i].mean(1) for i in range(count)], 1)  # (B, count)
    order = means.argsort(1, descending=True)
    curves = []
    for deletes in (False, True):
        curve = []
        for step in range(_curve_steps(s) + 1):
            done = step * count // _curve_steps(s)
            altered = frames.clone() if deletes else torch.zeros_like(frames)
            for row, ranked in enumerate(order.tolist()):
                for cell in ranked[:done]:
                    inside = (cells == cell)[:, None].expand_as(frames[row])
                    altered[row][inside] = 0 if deletes else frames[row][inside]
            outputs = s.reference(s.layout.from_working(altered))
            curve.append(chosen(s, probability(s, outputs)))
        curves.append(torch.stack(curve, 1))
    return torch.cat(curves, 1)


def _curve_steps(s: Subject) -> int:
    """Return a number of steps that divides the number of cells: parts of cells are rounded in two ways."""
    count = int(_features(s).max()) + 1
    return max(steps for steps in range(1, 2 * s.steps + 1) if count % steps == 0)


def _features_working(s: Subject) -> Tensor:
    mask = s.layout.to_working(_features(s).expand_as(s.clip))
    return mask[0, :, 0]


def _infidelity_parts(s: Subject) -> tuple[Tensor, Callable[[Any], Any], Tensor]:
    """Return attributions whose products with the perturbation are as large as the change of the output."""
    perturbation = noise.tubelet_noise(s.layout, s.cell, std=0.5, generator=torch.Generator().manual_seed(3))
    perturb = perturbation.for_infidelity(multiply_by_inputs=False)
    many = s.clip.repeat_interleave(2, 0)
    change, perturbed = perturb(many)
    with torch.no_grad():
        outputs = [s.reference(clips).unflatten(0, (-1, 2)).transpose(0, 1) for clips in (many, perturbed)]
    before, after = (torch.stack([chosen(s, own) for own in each], 1) for each in outputs)  # (B, 2)
    attributions = torch.randn(s.clip.shape, generator=torch.Generator().manual_seed(4))
    products = (attributions.repeat_interleave(2, 0) * change).flatten(1).sum(1).view_as(before)
    scale = (before - after).abs().mean() / products.abs().mean()
    expected = (products * scale - (before - after)).square().mean(1)
    again = noise.tubelet_noise(s.layout, s.cell, std=0.5, generator=torch.Generator().manual_seed(3))
    return attributions * scale, again.for_infidelity(multiply_by_inputs=False), expected


def infidelity_score(s: Subject) -> Tensor:
    attributions, perturb, _ = _infidelity_parts(s)
    return infidelity(s.clf, perturb, s.clip, attributions, target=s.target, n_perturb_samples=2).detach()


def infidelity_by_hand(s: Subject) -> Tensor:
    return _infidelity_parts(s)[2]


COLUMNS: dict[str, tuple[Callable[[Subject], Tensor], Callable[[Subject], Tensor]]] = {
    "predict": (predict, predict_by_hand),
    "STAA (attention)": (staa_attention, staa_attention_by_hand),
    "STAA (relevance)": (staa_relevance, staa_relevance_by_hand),
    "GradCAM": (grad_cam, grad_cam_by_hand),
    "VideoOcclusion": (occlusion, occlusion_by_captum),
    "VideoFeatureAblation": (ablation, ablation_by_captum),
    "RISE": (rise, rise_by_hand),
    "SpatioTemporalPerturbation": (perturbation, perturbation_by_hand),
    "IntegratedGradients": (integrated_gradients, integrated_gradients_by_hand),
    "insertion, deletion": (insertion_deletion, insertion_deletion_by_hand),
    "infidelity": (infidelity_score, infidelity_by_hand),
}
CAPTUMS = ("IntegratedGradients", "infidelity")  # these run the model in the mode in which it is
# In half precision these differ from the reference: the formulas of STAA are in float32 or wider, and Captum subtracts
# outputs in the dtype of the model.
ROUNDED = ("STAA (attention)", "STAA (relevance)", "infidelity")
