"""The command inspect: which attention and which tokens a model has."""

from __future__ import annotations

import torch

from captum_staa import models
from captum_staa.cli.loading import load
from captum_staa.models.classifier import DEFAULT_FRAMES

DEFAULT_EDGE = 224  # pixels, for models that accept any size


def run(model: str, frames: int | None = None, edge: int | None = None, device: str | None = None) -> int:
    """Print what :func:`captum_staa.models.inspect` finds in a model with a random clip.

    Args:
        model: bundled model, folder, or name on the hub.
        frames: number of frames of the clip. None takes that of the model.
        edge: height and width of the clip in pixels. None takes those of the model.
        device: device of the model.

    Returns:
        0 if STAA can explain the model, 1 if not.
    """
    given = {"num_frames": frames, "image_size": None if edge is None else (edge, edge)}
    classifier = load(
        model, device, for_files=False, **{name: size for name, size in given.items() if size is not None}
    )
    crop = getattr(classifier.preprocessing, "crop", None)
    height, width = classifier.image_size or crop or (DEFAULT_EDGE, DEFAULT_EDGE)
    sizes = {"B": 1, "T": classifier.num_frames or DEFAULT_FRAMES, "C": 3, "H": height, "W": width}
    clip = torch.randn([sizes[axis] for axis in classifier.layout.axes], generator=torch.Generator().manual_seed(0))
    try:
        report = models.inspect(classifier, clip.to(next(classifier.parameters(), clip).device))
    except RuntimeError as error:
        raise ValueError(
            f"{model} must run on a clip of shape {tuple(clip.shape)} ({classifier.layout.axes}), got an error: "
            f"{' '.join(str(error).split())}. Leave out --frames and --size, or pass those that the model takes."
        ) from error
    print(report)
    return 0 if report.ok else 1
