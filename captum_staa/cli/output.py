"""Write the files of an explanation: numbers and pictures. Either all files are written completely, or none."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from captum_staa import io
from captum_staa._utils.files import atomic, atomic_files, save_tensors
from captum_staa.benchmark.records import versions
from captum_staa.cli.explanation import Explanation, KeyFrame
from captum_staa.result import VideoAttribution
from captum_staa.visualization import Frames, Style, save_animation, show_frames, show_summary, show_timeline, to_html
from captum_staa.visualization.frames import reduced
from captum_staa.visualization.saliency import Attributions, Classes, key_frames

PICTURES = ("overlay.mp4", "player.html", "sheet.png", "timeline.png")
FILES = ("attributions.safetensors", "result.json", *PICTURES)
PREDICTIONS = 20  # maximum number of classes in result.json
EDGE = 360  # maximum length of the shorter edge of frames in pictures, in pixels
MOVING = 360  # maximum number of frames of an animation
SHEET = 24  # maximum number of frames of a contact sheet
PAGE_FRAMES, PAGE_BYTES = 120, 8_000_000  # maximum number of frames and size of the player
PAGE_EDGE = 240  # shorter edge of the player's frames in pixels, if the page would be too large otherwise
PAGE_CLASSES = 5  # number of classes on the player's page, in addition to the explained one
SLOWEST, FASTEST = 4.0, 30.0  # frames per second
DPI = 150
STYLE = Style(sign="positive")  # evidence for the class; magnitudes would also show evidence for other classes


def refuse_to_overwrite(folder: Path, overwrite: bool, files: tuple[str, ...] = FILES) -> None:
    """Raise before the work begins if the results could not be written.

    Raises:
        FileExistsError: one of the files exists and ``overwrite`` is False.
        ValueError: the folder can neither be written nor created.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        wrong = "is not writable" if nearest.is_dir() else "is a file"
        raise ValueError(
            f"--out must be a folder, or one that can be created, got {folder}, where {nearest} {wrong}. Choose "
            f"another folder."
        )
    existing = [name for name in files if (folder / name).exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"{folder} already contains {', '.join(existing)}. Pass --overwrite to replace them, or choose another "
            f"folder with --out."
        )


def write(
    explanation: Explanation, folder: Path, *, overwrite: bool = False, truth: torch.Tensor | None = None
) -> list[Path]:
    """Write all files of an explanation, or none of them.

    Args:
        explanation: the explanation.
        folder: output folder; created if it does not exist.
        overwrite: whether to replace earlier files.
        truth: bool ``(T,)``, True for frames that contain the evidence, for the timeline; known for planted clips only.

    Returns:
        The paths of the files.

    Raises:
        FileExistsError: one of the files exists and ``overwrite`` is False. Nothing is written.
        OSError: the folder is not writable, or the disk is full. No partial files are left.
    """
    refuse_to_overwrite(folder, overwrite)
    parts, masks = explanation.maps, explanation.masks
    tensors = {"attributions": parts.joint[0], "temporal": parts.temporal[0], "spatial": parts.spatial[0]}
    if masks is not None:
        tensors["masks"] = masks.masks
    if (other := explanation.other_maps) is not None:
        named = {"attributions": other.joint[0], "temporal": other.temporal[0], "spatial": other.spatial[0]}
        tensors |= {f"versus_{name}": values for name, values in named.items()}
    with atomic_files(folder, FILES, overwrite) as partial:
        paths = [partial / name for name in FILES]
        contiguous = {name: part.float().contiguous() for name, part in tensors.items()}
        save_tensors(save_file, contiguous, paths[0], described(explanation))
        entries = as_json(explanation).items()
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, allow_nan=False)}" for key, value in entries
        ]
        paths[1].write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")  # one entry per line
        draw(explanation, *paths[2:], truth=truth)
    return [folder / name for name in FILES]


def described(explanation: Explanation) -> dict[str, str]:
    """Return the metadata of the safetensors file: strings, in which numbers are JSON."""
    axes = "attributions THW in pixels of the model's input, temporal T, spatial HW"
    masks = explanation.masks
    return {
        "format": "pt",
        "model": explanation.prediction.model,
        "method": str(explanation.method),
        "target": explanation.label,
        "target_index": str(explanation.target),
        "layout": explanation.prediction.layout,
        "axes": axes + ("" if masks is None else ", masks ATHW with A areas"),
        "frame_indices": json.dumps(explanation.video.indices),
        "crop_box": json.dumps(explanation.video.crop),
        **({} if masks is None else {"areas": json.dumps(masks.areas)}),
    }


def as_json(explanation: Explanation) -> dict[str, Any]:
    """Return the content of ``result.json``. Numbers that the video file does not provide are None."""
    video, prediction, masks = explanation.video, explanation.prediction, explanation.masks
    info, indices = video.info, video.indices
    height, width = explanation.maps.joint.shape[-2:]
    return {
        "versions": versions(),
        "model": {
            "name": prediction.model,
            "layout": prediction.layout,
            "input_size": [height, width],
            "notice": prediction.notice or None,
        },
        "method": str(explanation.method),
        "perturbation": None if masks is None else {**masks.settings, **masks.scores()},
        "video": {
            "path": str(video.path),
            "num_frames": info.num_frames,
            "height": info.height,
            "width": info.width,
        },
        "fps": video.fps,
        "frame_indices": indices,
        "frame_times": video.times or [None] * len(indices),
        "predictions": [
            {"index": index, "label": label, "probability": probability}
            for index, label, probability in prediction.top(PREDICTIONS)
        ],
        "target": {
            "index": explanation.target,
            "label": explanation.label,
            "probability": explanation.probability,
            "given": explanation.target_given,
            "class_specific": explanation.method.class_specific,
        },
        "versus": None
        if explanation.other is None
        else {
            "index": explanation.other,
            "label": prediction.labels[explanation.other],
            "probability": prediction.probabilities[explanation.other],
            "temporal": None if explanation.other_maps is None else explanation.other_maps.temporal[0].tolist(),
        },
        "temporal": explanation.maps.temporal[0].tolist(),
        "key_frames": [_key_frame(frame) for frame in explanation.key_frames()],
        "crop_box": dict(zip(("top", "left", "height", "width"), video.crop, strict=True)),
        "windows": list(prediction.windows),
        "interrupted": explanation.interrupted or None,
        "files": list(FILES),
    }


def _key_frame(frame: KeyFrame) -> dict[str, Any]:
    return {"frame": frame.index, "time": frame.time, "temporal": frame.temporal}


def draw(
    explanation: Explanation,
    overlay: Path,
    player: Path,
    sheet: Path,
    timeline: Path,
    *,
    truth: Tensor | None,
) -> None:
    """Write the pictures to files that do not exist yet.

    Args:
        explanation: the explanation to draw.
        overlay: path of the animation.
        player: path of the HTML player.
        sheet: path of the contact sheet.
        timeline: path of the timeline with key frames.
        truth: bool ``(T,)``, True for frames that contain the evidence; shaded in the timeline and in the player.
    """
    shown = thinned(len(explanation.video.indices), MOVING)
    pixels = frames_of(explanation, shown)
    joint, temporal = explanation.maps.joint[0][shown], explanation.maps.temporal[0][shown]
    indices = [explanation.video.indices[at] for at in shown]
    scale = pixels.shape[1] / explanation.video.info.height, pixels.shape[2] / explanation.video.info.width
    top, left, height, width = explanation.video.crop
    crop = (top * scale[0], left * scale[1], height * scale[0], width * scale[1])
    # With a variable frame rate, labels in seconds would be wrong, so fps is None.
    frames = Frames(pixels, crop, indices, explanation.video.constant_fps)

    title = title_of(explanation)
    rate = play_rate(indices, explanation.video.fps)
    save_animation(joint, frames, overlay, style=STYLE, title=title, play_fps=rate)
    windows = None if truth is None else truth[shown].numpy()
    if explanation.classes:
        classes = {label: _at(maps, shown) for label, maps in explanation.classes.items()}
        bars = _bars(explanation)
        figure, _ = show_summary(
            classes, frames, style=STYLE, predictions=bars, truth=windows, title=title, use_pyplot=False
        )
    else:
        few = key_frames(temporal.numpy(), SHEET)
        figure, _ = show_frames(joint[few], frames[few], style=STYLE, title=title, use_pyplot=False)
    with atomic(sheet) as partial:
        figure.savefig(partial, dpi=DPI)
    figure, _ = show_timeline(temporal, frames, truth=windows, title=title, use_pyplot=False)
    with atomic(timeline) as partial:
        figure.savefig(partial, dpi=DPI)
    text = page(explanation, shown, frames, truth)
    with atomic(player) as partial:
        partial.write_text(text, encoding="utf-8")


def page(explanation: Explanation, shown: Sequence[int], frames: Frames, truth: Tensor | None) -> str:
    """Return the HTML player: the strongest frame of each of at most ``PAGE_FRAMES`` equal parts of the clip.

    If the page is larger than ``PAGE_BYTES``, the shorter edge of its frames is reduced to ``PAGE_EDGE`` pixels. If
    this is not enough, it shows fewer frames. Each mask of the perturbation method is a separate explanation.

    Args:
        explanation: the explanation to show.
        shown: positions of the available frames in the explanation.
        frames: the frames at these positions.
        truth: bool ``(T,)``, True for frames that contain the evidence.
    """
    parts, masks = explanation.maps, explanation.masks

    def render(few: Sequence[int], edge: int) -> str:
        at = [shown[position] for position in few]
        classes = {label: _at(maps, at) for label, maps in explanation.classes.items()}
        maps: dict[str, Attributions | Classes] = {explanation.method.name: classes or _at(parts, at)}
        if masks is not None:
            maps |= {f"mask, area {area:g}": mask[at] for area, mask in zip(masks.areas, masks.masks, strict=True)}
        return to_html(
            maps,
            frames[few],
            style=STYLE,
            predictions=_bars(explanation),
            target=explanation.label if explanation.method.class_specific else "",  # no label is empty: no colored bar
            truth=None if truth is None else truth[at].numpy(),
            title=title_of(explanation),
            play_fps=play_rate([explanation.video.indices[position] for position in at], explanation.video.fps),
            max_size=edge,
        )

    values, edge = parts.temporal[0][shown].numpy(), EDGE
    few = key_frames(values, PAGE_FRAMES)
    while len(text := render(few, edge)) > PAGE_BYTES and len(few) > 1:
        if edge > PAGE_EDGE:
            edge = PAGE_EDGE
        else:
            few = key_frames(values, max(int(0.9 * len(few) * PAGE_BYTES / len(text)), 1))
    return text


def _at(maps: VideoAttribution, frames: Sequence[int]) -> VideoAttribution:
    """Return the maps of some frames, with the spatial part of the whole clip."""
    return VideoAttribution(maps.joint[:, frames], maps.spatial, maps.temporal[:, frames])


def _bars(explanation: Explanation) -> list[tuple[str, float]]:
    """Return the most probable classes and those that are explained, with their probabilities."""
    prediction = explanation.prediction
    bars = [(name, share) for _, name, share in prediction.top(PAGE_CLASSES)]
    explained = [explanation.target] if explanation.method.class_specific else []
    explained += [] if explanation.other is None else [explanation.other]
    more = [(prediction.labels[index], prediction.probabilities[index]) for index in explained]
    return bars + [bar for bar in more if bar not in bars]


def thinned(total: int, most: int) -> list[int]:
    """Return the positions of at most ``most`` of ``total`` frames, at equal steps.

    Example:
        >>> thinned(5, most=8), thinned(10, most=4)
        ([0, 1, 2, 3, 4], [0, 3, 6, 9])
    """
    return list(range(0, total, math.ceil(total / most)))


def frames_of(explanation: Explanation, shown: Sequence[int]) -> NDArray[np.uint8]:
    """Return the frames at these positions, reduced to ``EDGE``. Only one full-size frame is in memory at a time."""
    if explanation.video.frames is not None:
        return np.stack([reduced(explanation.video.frames[at], EDGE) for at in shown])
    wanted = {explanation.video.indices[at] for at in shown}
    last = max(wanted)
    frames = []
    for index, frame in io.iter_windows(explanation.video.path, 1):
        if index in wanted:
            frames.append(reduced(frame[0], EDGE))
        if index == last:
            break
    return np.stack(frames)


def play_rate(indices: Sequence[int], fps: float | None) -> float:
    """Return the playback rate in frames per second: real time, clipped to ``SLOWEST``..``FASTEST``.

    A few frames that are sampled from a long file are therefore shown faster than real time.

    Example:
        >>> play_rate(range(50), fps=25.0), play_rate([0, 50, 100], fps=25.0), play_rate([3, 4], fps=None)
        (25.0, 4.0, 4.0)
    """
    if fps is None or len(indices) < 2:
        return SLOWEST
    real = fps * (len(indices) - 1) / (indices[-1] - indices[0])
    return min(max(real, SLOWEST), FASTEST)


def title_of(explanation: Explanation) -> str:
    """Return the title of the pictures. Its second line says if the model is a toy."""
    about = (
        f"{explanation.label} ({explanation.probability:.0%})"
        if explanation.method.class_specific
        else "no class in particular"
    )
    if "versus" in explanation.method.options:
        other = "the rest" if explanation.other is None else explanation.prediction.labels[explanation.other]
        about += f" rather than {other}"
    notice = explanation.prediction.notice
    return f"{about}, {explanation.method.name}, {explanation.video.path.name}" + (notice and f"\n{notice}")
