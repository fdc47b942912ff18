"""Write the files of an explanation: numbers and pictures. Either all files are written completely, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from captum_staa._utils.files import atomic_files, save_tensors
from captum_staa._utils.versions import versions
from captum_staa.cli.explanation import Explanation, KeyFrame
from captum_staa.cli.pictures import draw

PICTURES = ("overlay.mp4", "player.html", "sheet.png", "timeline.png")
FILES = ("attributions.safetensors", "result.json", *PICTURES)
PREDICTIONS = 20  # maximum number of classes in result.json


def refuse_to_overwrite(folder: Path, overwrite: bool, files: tuple[str, ...] = FILES) -> None:
    """Raise FileExistsError if one of the files exists and ``overwrite`` is False."""
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
    parts, masks = explanation.parts, explanation.masks
    tensors = {"attributions": parts.joint[0], "temporal": parts.temporal[0], "spatial": parts.spatial[0]}
    if masks is not None:
        tensors["masks"] = masks.masks
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
        "model": explanation.model,
        "method": explanation.method,
        "target": explanation.labels[explanation.target],
        "target_index": str(explanation.target),
        "layout": explanation.layout,
        "axes": axes + ("" if masks is None else ", masks ATHW with A areas"),
        "frame_indices": json.dumps(explanation.indices),
        "crop_box": json.dumps(explanation.crop),
        **({} if masks is None else {"areas": json.dumps(masks.areas)}),
    }


def as_json(explanation: Explanation) -> dict[str, Any]:
    """Return the content of ``result.json``. Numbers that the video file does not provide are None."""
    info, indices = explanation.info, explanation.indices
    height, width = explanation.parts.joint.shape[-2:]
    masks = explanation.masks
    return {
        "versions": versions(),
        "model": {"name": explanation.model, "layout": explanation.layout, "input_size": [height, width]},
        "method": explanation.method,
        "perturbation": None if masks is None else {**explanation.settings, **masks.scores()},
        "video": {
            "path": str(explanation.video),
            "num_frames": info.num_frames,
            "height": info.height,
            "width": info.width,
        },
        "fps": explanation.fps,
        "frame_indices": indices,
        "frame_times": explanation.times or [None] * len(indices),
        "predictions": [
            {"index": index, "label": label, "probability": probability}
            for index, label, probability in explanation.top(PREDICTIONS)
        ],
        "target": {
            "index": explanation.target,
            "label": explanation.labels[explanation.target],
            "probability": explanation.probabilities[explanation.target],
            "given": explanation.target_given,
            "class_specific": explanation.class_specific,
        },
        "temporal": explanation.parts.temporal[0].tolist(),
        "key_frames": [_key_frame(frame) for frame in explanation.key_frames()],
        "crop_box": dict(zip(("top", "left", "height", "width"), explanation.crop, strict=True)),
        "windows": list(explanation.windows),
        "interrupted": explanation.interrupted or None,
        "files": list(FILES),
    }


def _key_frame(frame: KeyFrame) -> dict[str, Any]:
    return {"frame": frame.index, "time": frame.time, "temporal": frame.temporal}
