"""The files that an explanation leaves in its folder: numbers first, then pictures; each whole or not at all."""

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
PREDICTIONS = 20  # classes that result.json names


def refuse_to_overwrite(folder: Path, overwrite: bool, files: tuple[str, ...] = FILES) -> None:
    """Raise FileExistsError where one of the files is there and may not be replaced."""
    held = [name for name in files if (folder / name).exists()]
    if held and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {', '.join(held)}; pass --overwrite to replace them, or choose another folder "
            f"with --out"
        )


def write(
    explanation: Explanation, folder: Path, *, overwrite: bool = False, truth: torch.Tensor | None = None
) -> list[Path]:
    """Write all files of an explanation, or none of them.

    Args:
        explanation: what to write.
        folder: is created where it is missing.
        overwrite: whether earlier files may be replaced.
        truth: bool ``(T,)``, when the evidence is there, for the timeline; known of planted clips only.

    Returns:
        The paths written.

    Raises:
        FileExistsError: one of the files is there and ``overwrite`` is False; nothing is written then.
        OSError: the folder cannot be written to, or the disk is full; nothing is left of it then.
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
    """The metadata of the tensors: strings, as safetensors has it; numbers in them are JSON."""
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
    """``result.json``; numbers that a file does not say are null."""
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
