"""This library's methods, one check for each, as in checks.py."""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_methods.checks import Model
from captum_methods.formulas import (
    Tensors,
    Wrong,
    cam,
    falls,
    logits,
    masks,
    near,
    ready,
    same,
    score,
    two_frames,
    windows,
)
from captum_methods.subjects import TARGET, Subject
from captum_staa import RISE, STAA, GradCAM, VideoFeatureAblation, VideoOcclusion
from captum_staa.visualization import Style, show_frames


def frames_on_one_scale(s: Subject, f: Model) -> None:
    frames = two_frames(s)
    pictures = torch.zeros(*frames.shape, 3, dtype=torch.uint8)
    _, axes = show_frames(frames, pictures, style=Style(method="heat_map", outlier_perc=0), use_pyplot=False)
    colors = matplotlib.colormaps["inferno"](frames / frames.max())[..., :3] * 255
    if not np.allclose([image.get_array() for image in axes.images], colors, atol=1):
        raise Wrong("the colors are not those of one scale")


def grad_cam(s: Subject, f: Model) -> str | None:
    """The layer's map, each cell's value spread over its pixels and channels; of the first input."""
    clip, *rest = s.inputs
    found = GradCAM(f, s.layer, weighting="gradcam").attribute(
        clip, target=TARGET, additional_forward_args=tuple(rest) or None
    )
    sizes = s.layout.size(clip)
    size = tuple(sizes[axis] for axis in "THW")
    cells = cam(s)
    stretched = F.interpolate(cells[:, None], size=size, mode="trilinear")[:, 0] * (cells[0].numel() / np.prod(size))
    spread = s.layout.from_working((stretched / sizes["C"]).unsqueeze(2).expand(-1, -1, sizes["C"], -1, -1))
    if not found.is_contiguous() or not near(found, spread):
        raise Wrong("the map is not the definition's")
    return "of the RGB clip; the flow goes through `additional_forward_args`" if rest else None


def staa(s: Subject, f: Model) -> None:
    """Attention is a share of all that there is, and the model answers as ever while it is read."""
    (found,) = ready(s, STAA(f, mode="attention").attribute(s.given))
    total = found.flatten(1).sum(1)
    if bool((found < 0).any()) or bool((total > 1 + 1e-6).any()) or bool((total < 0.2).any()):
        raise Wrong("the map is no share of the attention")
    ready(s, STAA(f).attribute(s.given, target=TARGET))
    if not near(STAA(f).attribute_maps(s.given, target=TARGET).logits, logits(s, s.inputs)):
        raise Wrong("the logits are not the model's")


def video_feature_ablation(s: Subject, f: Model) -> str | None:
    found = VideoFeatureAblation(f).attribute(s.given, target=TARGET, feature_mask=masks(s), perturbations_per_eval=3)
    return same(s, found, falls(s, torch.zeros_like))


def video_occlusion(s: Subject, f: Model) -> str | None:
    found = VideoOcclusion(f).attribute(s.given, windows(s), windows(s), target=TARGET, perturbations_per_eval=3)
    return same(s, found, falls(s, torch.zeros_like))


def rise(s: Subject, f: Model) -> None:
    """The covariance of scores and masks over the masks' variance; the masks are seen from inside of the model."""
    shown: list[Tensors] = []

    def seen(*clips: Tensor) -> Tensor:
        shown.append(clips)
        return f(*clips)

    found = RISE(seen, s.layout).attribute(
        s.given, target=TARGET, perturbations_per_eval=4, n_samples=8, n_cells=(2, 3, 3)
    )
    masked = [torch.cat(column)[2:].unflatten(0, (8, 2)) for column in zip(*shown, strict=True)]  # (N, B, ...)
    with torch.no_grad():
        scores = torch.stack([score(s, each) for each in zip(*masked, strict=True)])  # (N, B)
    scores = (scores - scores.mean(0)).view(8, 2, 1, 1, 1, 1)
    maps = []
    for part, clip in zip(masked, s.inputs, strict=True):
        sizes = s.layout.size(clip)
        sides = [sizes[axis] // count for axis, count in zip("THW", (2, 3, 3), strict=True)]
        variance = 0.25 * np.prod([(2 + side**-2) / 3 for side in sides])  # of linear interpolation between 0 and 1
        maps.append((scores * part / clip).sum(0) / 7 / variance / sizes["C"])
    same(s, found, tuple(maps))
