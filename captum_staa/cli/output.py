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
    parts, masks = explanation.maps, explanation.masks
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
        "model": {"name": prediction.model, "layout": prediction.layout, "input_size": [height, width]},
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
        "temporal": explanation.maps.temporal[0].tolist(),
        "key_frames": [_key_frame(frame) for frame in explanation.key_frames()],
        "crop_box": dict(zip(("top", "left", "height", "width"), video.crop, strict=True)),
        "windows": list(prediction.windows),
        "interrupted": explanation.interrupted or None,
        "files": list(FILES),
    }


def _key_frame(frame: KeyFrame) -> dict[str, Any]:
    return {"frame": frame.index, "time": frame.time, "temporal": frame.temporal}
