"""Draws the pictures of the gallery in docs/visualization.md: every method on the same three planted clips."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from captum.attr import IntegratedGradients
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from captum_staa import (
    RISE,
    STAA,
    AttentionBranch,
    GradCAM,
    SpatioTemporalPerturbation,
    VideoAttribution,
    VideoClassifier,
    VideoOcclusion,
    smooth,
)
from captum_staa.benchmark import PlantedClips
from captum_staa.metrics import evidence_against_rivals

HERE = Path(__file__).parent
TASKS = {
    "pattern": "Which pattern does one patch wear?",
    "motion": "Which way does the plain patch move?",
    "order": "Which patch is bright first?",
}
NAMES = {
    "videomae": "VideoMAE",
    "timesformer": "TimeSformer",
    "resnet3d": "3D CNN",
    "st-abn": "ST-ABN",
}
BUNDLED = {
    "videomae": "tiny-videomae-{}",
    "videomae observer": "tiny-videomae-{}-observer",
    "timesformer": "tiny-timesformer-{}",
    "resnet3d": "tiny-resnet3d-{}",
    "st-abn": "tiny-st-abn-{}",
}
CLIP, SEED, COUNT = 16, 12, 20  # the clip of all code blocks
GREEN = (67, 214, 92)
TEXT = (118, 118, 118)  # readable on a white and on a black page
WIDTH, GAP, LINE, BAR = 780, 8, 32, 12  # pixels: twice those of a phone

Maps = dict[tuple[str, str], Tensor]  # of a model's short name and a task, (1, T, H, W)
Canvas = tuple[Image.Image, ImageDraw.ImageDraw]


def clips(
    models: tuple[str, ...],
) -> Iterator[tuple[str, str, VideoClassifier, Tensor, Tensor]]:
    """Yield model, task, classifier, clip in the classifier's layout, and label, for each model and task."""
    for model in models:
        for task in TASKS:
            clf = VideoClassifier.from_pretrained(BUNDLED[model].format(task))
            clip, label, _ = PlantedClips(seed=SEED, n=COUNT, task=task)[
                CLIP : CLIP + 1
            ]
            yield model, task, clf, clf.layout.from_working(clip), label


def joint(attributions: Tensor, clf: VideoClassifier) -> Tensor:
    """Return the map ``(1, T, H, W)`` of attributions."""
    return VideoAttribution.from_attributions(attributions, clf.layout).joint


def relevance(clf: VideoClassifier, clip: Tensor, label: Tensor) -> Tensor:
    return STAA(clf).attribute_maps(clip, target=label).joint


def attention(clf: VideoClassifier, clip: Tensor, label: Tensor) -> Tensor:
    return STAA(clf, mode="attention").attribute_maps(clip).joint


def learned(clf: VideoClassifier, clip: Tensor, label: Tensor) -> Tensor:
    method = SpatioTemporalPerturbation(clf)
    return method.attribute_maps(clip, target=label, perturbations_per_eval=8).joint


def gates(clf: VideoClassifier, clip: Tensor, label: Tensor) -> Tensor:
    return AttentionBranch(clf).attribute_maps(clip, target=label).joint


def cam(clf: VideoClassifier, clip: Tensor, label: Tensor) -> Tensor:
    layer = "stem" if clf.grid is None else "videomae.encoder.layer.0.layernorm_before"
    return joint(
        smooth(GradCAM(clf, layer).attribute(clip, target=label), clf.layout), clf
    )


def occlusion(clf: VideoClassifier, clip: Tensor, label: Tensor) -> Tensor:
    windows = {"sliding_window_shapes": (4, 12, 12), "strides": (2, 6, 6)}
    return (
        VideoOcclusion(clf)
        .attribute_maps(clip, target=label, perturbations_per_eval=16, **windows)
        .joint
    )


def rise(clf: VideoClassifier, clip: Tensor, label: Tensor) -> Tensor:
    masks = {"n_samples": 400, "n_cells": (4, 6, 6)}
    return (
        RISE(clf)
        .attribute_maps(clip, target=label, perturbations_per_eval=16, **masks)
        .joint
    )


def integrated(clf: VideoClassifier, clip: Tensor, label: Tensor) -> Tensor:
    method = IntegratedGradients(clf)
    attributions = method.attribute(
        clip, target=label, n_steps=20, internal_batch_size=10
    )
    return joint(smooth(attributions.abs(), clf.layout, space=2, time=1), clf)


METHODS = {  # name, models, function of a classifier, a clip and its label
    "STAA, relevance": (("videomae", "timesformer"), relevance),
    "STAA, attention": (("videomae", "timesformer"), attention),
    "SpatioTemporalPerturbation": (("videomae", "resnet3d"), learned),
    "AttentionBranch": (("videomae observer", "st-abn"), gates),
    "GradCAM": (("videomae", "resnet3d"), cam),
    "VideoOcclusion": (("videomae", "resnet3d"), occlusion),
    "RISE": (("videomae", "resnet3d"), rise),
    "Captum's IntegratedGradients, smoothed": (("videomae", "resnet3d"), integrated),
}


def file_of(name: str) -> Path:
    """Return the path of the picture of a section or of a task."""
    return (
        HERE
        / "images"
        / f"gallery_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.webp"
    )


def main() -> None:
    """Draw one picture per method, and one per task with all methods."""
    found: dict[str, Maps] = {}
    for heading, (models, method) in METHODS.items():
        found[heading] = {
            (model.split()[0], task): method(clf, clip, label)
            for model, task, clf, clip, label in clips(models)
        }
        print(heading, flush=True)
    pictures(found)


def pictures(found: dict[str, Maps]) -> None:
    """Draw all pictures from the maps of all sections."""
    for heading, maps in found.items():
        strips(maps).save(file_of(heading), quality=75, method=4)
    noise = torch.rand(1, 16, 48, 48, generator=torch.Generator().manual_seed(0))
    every = found | {
        "Random": {
            (model, task): noise for model in ("videomae", "resnet3d") for task in TASKS
        }
    }
    for task in TASKS:
        overview(task, every).save(file_of(task), quality=75, method=4)


def strips(maps: Maps) -> Image.Image:
    """Draw one method: a row of five frames and a bar of time for every model and task."""
    side = (WIDTH - 4 * GAP) // 5
    high = LINE + side + BAR + 2 * GAP
    canvas = empty(high * len(maps))
    for row, ((model, task), values) in enumerate(maps.items()):
        top = row * high
        write(canvas, 0, top, f"{NAMES[model]}, {task}: {scored(values, task)}")
        strip(canvas, 0, top + LINE, side, task, values, 5)
    return canvas[0]


def overview(task: str, found: dict[str, Maps]) -> Image.Image:
    """Draw one task: a row per method, with a transformer on the left and a 3D CNN on the right."""
    half = (WIDTH - 2 * GAP) // 2
    side = (half - 2 * GAP) // 3
    high = 2 * LINE + side + BAR + 2 * GAP
    canvas = empty(high * (len(found) + 1))
    write(canvas, 0, 0, TASKS[task])
    write(canvas, 0, LINE, "the clip, and when the evidence shows")
    strip(canvas, 0, 2 * LINE, side, task, None, 3)
    for row, (heading, maps) in enumerate(found.items(), start=1):
        top = row * high
        write(canvas, 0, top, heading)
        for column, kinds in enumerate(
            (("videomae", "timesformer"), ("resnet3d", "st-abn"))
        ):
            left = column * (half + 2 * GAP)
            model = next((kind for kind in kinds if (kind, task) in maps), None)
            if model is None:
                write(canvas, left, top + LINE, "needs attention")
                continue
            write(
                canvas,
                left,
                top + LINE,
                f"{NAMES[model]}: {scored(maps[model, task], task)}",
            )
            strip(canvas, left, top + 2 * LINE, side, task, maps[model, task], 3)
    return canvas[0]


def strip(
    canvas: Canvas,
    left: int,
    top: int,
    side: int,
    task: str,
    values: Tensor | None,
    count: int,
) -> None:
    """Draw some frames under their map, and below them one bar over all frames of the clip."""
    frames, truth = planted(task)
    heat = None if values is None else strength(values)
    for place, at in enumerate(shown(truth, count)):
        picture = drawn(frames[at], None if heat is None else heat[at], truth[at], side)
        canvas[0].paste(picture, (left + place * (side + GAP), top))
    wide = (count * (side + GAP) - GAP) / len(frames)
    when = (
        None
        if values is None
        else np.clip(values[0].sum((1, 2)).double().numpy(), 0, None)
    )
    for at in range(len(frames)):
        box = (
            left + at * wide,
            top + side + 4,
            left + (at + 1) * wide - 2,
            top + side + BAR,
        )
        share = 0.0 if when is None or not when.max() else float(when[at] / when.max())
        color = tuple(
            int(255 * channel)
            for channel in matplotlib.colormaps["inferno"](0.1 + 0.85 * share)[:3]
        )
        canvas[1].rectangle(box, (150, 150, 150) if when is None else color)
        if truth[at].any():
            canvas[1].rectangle((box[0], box[3] + 1, box[2], box[3] + 4), GREEN)


def scored(values: Tensor, task: str) -> str:
    """Return the AUROC of the evidence against rivals as text."""
    clips = PlantedClips(seed=SEED, n=COUNT, task=task)
    _, _, truth = clips[CLIP : CLIP + 1]
    score = evidence_against_rivals(values, truth, clips.rivals(slice(CLIP, CLIP + 1)))
    return f"AUROC {float(score):.2f}"


def planted(task: str) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the frames ``(T, H, W, 3)`` and the truth ``(T, H, W)`` of the clip of all code blocks."""
    clips = PlantedClips(seed=SEED, n=COUNT, task=task)
    return clips.frames(CLIP), clips[CLIP : CLIP + 1][2][0].numpy()


def shown(truth: NDArray[np.bool_], count: int) -> list[int]:
    """Return the first, the middle and the last frame of the evidence, and for five also those around it."""
    times = np.flatnonzero(truth.any((1, 2)))
    first, last = int(times[0]), int(times[-1])
    inner = [first, int(times[len(times) // 2]), last]
    return (
        inner
        if count == 3
        else [max(0, first - 2), *inner, min(len(truth) - 1, last + 2)]
    )


def strength(maps: Tensor) -> NDArray[np.float64]:
    """Return positive values ``(T, H, W)`` in [0, 1], on one scale per clip; the top 2 % of the sum count as 1."""
    values = maps[0].clamp(min=0).double().numpy()
    ordered = np.sort(values, None)
    top = ordered[np.searchsorted(ordered.cumsum(), 0.98 * ordered.sum())]
    return np.clip(values / top, 0, 1) if top > 0 else values


def drawn(
    frame: NDArray[np.uint8],
    values: NDArray[np.float64] | None,
    truth: NDArray[np.bool_],
    side: int,
) -> Image.Image:
    """Return a frame, in color or in gray under its map, with the outline of the planted evidence."""
    pixels = frame / 255
    if values is not None:
        opacity = 0.75 * values[..., None] ** 0.5
        heat = matplotlib.colormaps["inferno"](values)[..., :3]
        pixels = (1 - opacity) * frame.mean(-1)[..., None] / 255 + opacity * heat
    picture = Image.fromarray((255 * pixels).astype(np.uint8)).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    large = np.asarray(
        Image.fromarray(truth).resize((side, side), Image.Resampling.NEAREST)
    )
    inside = large.copy()
    for axis in (0, 1):
        for step in (-2, 2):
            inside &= np.roll(large, step, axis)
    outlined = np.asarray(picture).copy()
    outlined[large & ~inside] = GREEN
    return Image.fromarray(outlined)


def empty(high: int) -> Canvas:
    """Return a transparent picture, which suits light and dark pages."""
    picture = Image.new("RGBA", (WIDTH, high), (0, 0, 0, 0))
    return picture, ImageDraw.Draw(picture)


def write(canvas: Canvas, left: int, top: int, text: str) -> None:
    canvas[1].text((left, top + 2), text, TEXT, FONT)


FONT = ImageFont.truetype(font_manager.findfont("DejaVu Sans:bold"), 23)

if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
