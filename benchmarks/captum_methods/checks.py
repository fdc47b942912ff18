"""Captum's methods, one check for each: the rows of the table.

A check calls a method on a subject through ``f``, its model as it is or wrapped, and returns None, or a remark to be
printed below the table. It raises Wrong where the numbers are not those of formulas.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from captum import attr, metrics, robust
from captum._utils.models.linear_model import SkLearnLinearRegression
from captum.attr import visualization as viz
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn

from captum_methods.formulas import (
    GRAPH,
    Tensors,
    Wrong,
    cam,
    change,
    complete,
    falls,
    gradients,
    logits,
    masks,
    near,
    parts,
    ready,
    rectified,
    same,
    score,
    times_input,
    two_frames,
    windows,
)
from captum_methods.subjects import TARGET, Subject, seeded

Model = Callable[..., Tensor]


# --- gradients ----------------------------------------------------------------------------------------------------


def saliency(s: Subject, f: Model) -> str | None:
    return same(s, attr.Saliency(f).attribute(s.given, target=TARGET), tuple(g.abs() for g in gradients(s)))


def input_x_gradient(s: Subject, f: Model) -> str | None:
    return same(s, attr.InputXGradient(f).attribute(s.given, target=TARGET), times_input(s))


def integrated_gradients(s: Subject, f: Model) -> None:
    found = attr.IntegratedGradients(f).attribute(s.given, target=TARGET, n_steps=64, internal_batch_size=16)
    complete(s, found, change(s), tolerance=0.02)


def gradient_shap(s: Subject, f: Model) -> str | None:
    """From one baseline of zeros and without noise: gradient times input at random places on the way."""
    baselines = tuple(torch.zeros_like(clip[:1]) for clip in s.inputs)
    given = baselines if len(baselines) > 1 else baselines[0]
    with seeded():
        found = attr.GradientShap(f).attribute(s.given, given, n_samples=4, stdevs=0.0, target=TARGET)
    with seeded():
        places = torch.tensor(np.random.uniform(size=8)).view(8, 1, 1, 1, 1)
    scaled = tuple(places * clip.repeat_interleave(4, 0) for clip in s.inputs)
    means = (gradient.unflatten(0, (2, 4)).mean(1) for gradient in gradients(s, scaled))
    return same(s, found, tuple(clip * mean for clip, mean in zip(s.inputs, means, strict=True)))


def _deep_lift(s: Subject, found: Tensor | Tensors, baselines: Tensors) -> str | None:
    """Complete in the mean over baselines, each for every clip."""
    changes = [change(s, tuple(part[i].expand_as(part) for part in baselines)) for i in range(len(baselines[0]))]
    try:
        complete(s, found, sum(changes) / len(changes), tolerance=1e-4)
    except Wrong as wrong:
        steps = (clip - part.mean(0) for clip, part in zip(s.inputs, baselines, strict=True))
        products = [step * gradient for step, gradient in zip(steps, gradients(s), strict=True)]
        if all(near(part, product) for part, product in zip(ready(s, found), products, strict=True)):
            raise Wrong(wrong.short, f"{wrong}; it is the gradient times the step from the baseline") from wrong
        raise
    return GRAPH if any(part.requires_grad for part in ready(s, found)) else None


def deep_lift(s: Subject, f: Model) -> str | None:
    zeros = tuple(torch.zeros_like(clip) for clip in s.inputs)
    return _deep_lift(s, attr.DeepLift(f).attribute(s.given, target=TARGET), zeros)


def deep_lift_shap(s: Subject, f: Model) -> str | None:
    """The mean over two baselines, zeros and a fainter clip."""
    baselines = tuple(clip * torch.tensor([0.0, 0.5]).view(2, 1, 1, 1, 1) for clip in s.inputs)
    given = baselines if len(baselines) > 1 else baselines[0]
    return _deep_lift(s, attr.DeepLiftShap(f).attribute(s.given, given, target=TARGET), baselines)


def _backprop(s: Subject, found: Tensor | Tensors, guided: bool) -> str | None:
    remark = same(s, found, rectified(s, guided))
    if not any(isinstance(module, nn.ReLU) for module in s.net.modules()):
        raise Wrong("equals the gradient", "the model has no `nn.ReLU`, so nothing is changed")
    return remark


def guided_backprop(s: Subject, f: Model) -> str | None:
    return _backprop(s, attr.GuidedBackprop(f).attribute(s.given, target=TARGET), guided=True)


def deconvolution(s: Subject, f: Model) -> str | None:
    return _backprop(s, attr.Deconvolution(f).attribute(s.given, target=TARGET), guided=False)


def lrp(s: Subject, f: Model) -> str | None:
    """For ReLU networks the epsilon rule is gradient times input."""
    return same(s, attr.LRP(f).attribute(s.given, target=TARGET), times_input(s), tolerance=1e-3)


def lrp_with_rules(s: Subject, f: Model) -> str | None:
    for module in s.net.modules():
        if not list(module.children()) and not isinstance(module, (nn.ReLU, nn.Dropout, nn.Tanh)):
            module.rule = EpsilonRule()
    try:
        return lrp(s, f)
    finally:
        for module in s.net.modules():
            module.__dict__.pop("rule", None)


# --- perturbation -------------------------------------------------------------------------------------------------


def feature_ablation(s: Subject, f: Model) -> str | None:
    found = attr.FeatureAblation(f).attribute(s.given, target=TARGET, feature_mask=masks(s), perturbations_per_eval=3)
    return same(s, found, falls(s, torch.zeros_like))


def feature_permutation(s: Subject, f: Model) -> str | None:
    method = attr.FeaturePermutation(f, perm_func=lambda x, mask: torch.where(mask.bool(), x.flip(0), x))
    found = method.attribute(s.given, target=TARGET, feature_mask=masks(s))
    return same(s, found, falls(s, lambda clip: clip.flip(0)))


def occlusion(s: Subject, f: Model) -> str | None:
    found = attr.Occlusion(f).attribute(s.given, windows(s), windows(s), target=TARGET, perturbations_per_eval=3)
    return same(s, found, falls(s, torch.zeros_like))


def _shapley(s: Subject, found: Tensor | Tensors, exact: bool = False) -> None:
    """Of two features, the halves in time, each gets between what it adds alone and what it adds last."""
    pairs = list(zip(s.inputs, parts(s, joint=True), strict=True))
    with torch.no_grad():
        nothing, late, early, whole = (
            score(s, tuple(clip * torch.tensor(kept)[mask] for clip, mask in pairs))
            for kept in itertools.product((0, 1), repeat=2)
        )
    alone, last = early - nothing, whole - late
    slack = 1e-3 * (whole - nothing).abs()
    reach = slack + (0 if exact else (alone - last).abs() / 2)
    for part in ready(s, found):
        halves = [half.flatten(1) for half in s.layout.to_working(part).chunk(2, 1)]
        if any(bool((half != half[:, :1]).any()) for half in halves):
            raise Wrong("a feature has several values")
        first, second = (half[:, 0] for half in halves)
        if ((first + second - (whole - nothing)).abs() > slack).any():
            raise Wrong("the features do not share the whole change")
        if ((first - (alone + last) / 2).abs() > reach).any():
            raise Wrong("a feature's value lies outside of what it adds")


def shapley_sampling(s: Subject, f: Model) -> None:
    method = attr.ShapleyValueSampling(f)
    with seeded():
        _shapley(s, method.attribute(s.given, target=TARGET, feature_mask=masks(s, joint=True), n_samples=4))


def _every_subset(original: Tensor | Tensors, **known: int) -> Iterator[Tensor]:
    for kept in itertools.product((0, 1), repeat=known["num_interp_features"]):
        yield torch.tensor([kept])


def lime(s: Subject, f: Model) -> None:
    """An unweighted linear fit to all four subsets of two features has the mean differences as coefficients."""
    method = attr.Lime(
        f,
        interpretable_model=SkLearnLinearRegression(),
        similarity_func=lambda *clips, **known: 1.0,
        perturb_func=_every_subset,
    )
    mask = masks(s, joint=True)
    _shapley(s, method.attribute(s.given, target=TARGET, feature_mask=mask, n_samples=4), exact=True)


def kernel_shap(s: Subject, f: Model) -> None:
    with seeded():
        mask = masks(s, joint=True)
        _shapley(s, attr.KernelShap(f).attribute(s.given, target=TARGET, feature_mask=mask, n_samples=16))


# --- Grad-CAM -----------------------------------------------------------------------------------------------------


def layer_grad_cam(s: Subject, f: Model) -> str | None:
    found = attr.LayerGradCam(f, s.layer).attribute(s.given, target=TARGET)
    sizes = s.layout.size(s.inputs[0])
    size = tuple(sizes[axis] for axis in "THW")
    stretched = attr.LayerAttribution.interpolate(found, size, "trilinear")
    expected = F.interpolate(cam(s)[:, None], size=size, mode="trilinear")
    if stretched.shape != expected.shape or not near(stretched, expected):
        raise Wrong("the map is not the definition's")
    return GRAPH if stretched.requires_grad else None


def guided_grad_cam(s: Subject, f: Model) -> str | None:
    found = attr.GuidedGradCam(f, s.layer).attribute(s.given, target=TARGET)
    if any(part.numel() == 0 for part in (found if isinstance(found, tuple) else (found,))):
        raise Wrong("the result is an empty tensor")
    sizes = [s.layout.size(clip) for clip in s.inputs]
    maps = [F.interpolate(cam(s).relu()[:, None], size=tuple(own[axis] for axis in "THW")) for own in sizes]
    spread = [s.layout.from_working(own.transpose(1, 2)) for own in maps]
    return same(s, found, tuple(a * b for a, b in zip(spread, rectified(s, guided=True), strict=True)))


# --- Captum's tools -----------------------------------------------------------------------------------------------


def noise_tunnel(s: Subject, f: Model) -> str | None:
    with seeded():
        found = attr.NoiseTunnel(attr.Saliency(f)).attribute(s.given, target=TARGET, nt_samples=3, stdevs=0.1)
    many = tuple(clip.repeat_interleave(3, 0) for clip in s.inputs)
    with seeded():
        noisy = tuple(clip + torch.normal(0, torch.full(clip.shape, 0.1)) for clip in many)
    means = tuple(g.abs().unflatten(0, (2, 3)).float().mean(1) for g in gradients(s, noisy))
    return same(s, found, means, tolerance=1e-3)


def infidelity(s: Subject, f: Model) -> None:
    def shrink(clips: Tensor | Tensors) -> tuple[Tensor | Tensors, Tensor | Tensors]:
        if isinstance(clips, Tensor):
            return 0.1 * clips, 0.9 * clips
        return tuple(0.1 * clip for clip in clips), tuple(0.9 * clip for clip in clips)

    product = times_input(s)
    found = metrics.infidelity(f, shrink, s.given, product if len(product) > 1 else product[0], target=TARGET)
    explained = sum((0.1 * clip * part).flatten(1).sum(1) for clip, part in zip(s.inputs, product, strict=True))
    expected = (explained - change(s, tuple(0.9 * clip for clip in s.inputs))) ** 2
    if not near(found, expected, 1e-4):
        raise Wrong("the score is not the definition's")


def sensitivity_max(s: Subject, f: Model) -> None:
    found = metrics.sensitivity_max(
        attr.Saliency(f).attribute,
        s.given,
        perturb_func=lambda clips: tuple(0.98 * clip for clip in (clips if isinstance(clips, tuple) else (clips,))),
        n_perturb_samples=2,
        target=TARGET,
    )
    before, after = (
        torch.cat([part.abs().flatten(1) for part in gradients(s, clips)], 1)
        for clips in (s.inputs, tuple(0.98 * clip for clip in s.inputs))
    )
    if not near(found, (after - before).norm(dim=1) / before.norm(dim=1), 1e-4):
        raise Wrong("the score is not the definition's")


def _reached(s: Subject, found: Tensor | Tensors, steps: int) -> None:
    """Raise Wrong unless the clips went steps of 0.05 up the loss, never further than 0.1 from where they were."""
    clips = s.inputs
    for _ in range(steps):
        leaves = tuple(clip.clone().requires_grad_() for clip in clips)
        loss = F.cross_entropy(logits(s, leaves), torch.tensor(TARGET), reduction="sum")
        up = torch.autograd.grad(loss, leaves)
        clips = tuple(
            (clip.detach() + 0.05 * g.sign() * (g.abs() > 1e-6)).clamp(x - 0.1, x + 0.1)  # Captum's zero_thresh
            for clip, g, x in zip(leaves, up, s.inputs, strict=True)
        )
    for part, right in zip(found if isinstance(found, tuple) else (found,), clips, strict=True):
        if not near(part, right):
            raise Wrong("the clip is not where the definition leads")


def fgsm(s: Subject, f: Model) -> None:
    attack = robust.FGSM(f, loss_func=nn.CrossEntropyLoss(reduction="none"))
    _reached(s, attack.perturb(s.given, epsilon=0.05, target=torch.tensor(TARGET)), steps=1)


def pgd(s: Subject, f: Model) -> None:
    attack = robust.PGD(f, loss_func=nn.CrossEntropyLoss(reduction="none"))
    _reached(s, attack.perturb(s.given, radius=0.1, step_size=0.05, step_num=3, target=torch.tensor(TARGET)), steps=3)


def image_attr(s: Subject, f: Model) -> None:
    frames = two_frames(s)
    # Integers, whose sums are exact: Captum compares a sum with the end of a cumulative one.
    frames = np.ceil(frames / frames.max() * 4096)
    shown = [
        viz.visualize_image_attr(frame[..., None], method="heat_map", outlier_perc=0, use_pyplot=False)[1]
        for frame in frames
    ]
    bright = [float(axes.images[0].get_array().max()) for axes in shown]
    if not np.isclose(bright[1] / bright[0], frames[1].max() / frames[0].max()):
        raise Wrong("every frame is drawn on a separate scale")
