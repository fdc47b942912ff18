"""Load the model of a command, with errors that name its flags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from captum_staa.models import VideoClassifier
from captum_staa.models.preprocessing import published
from captum_staa.models.video_language.loading import bundled_language_models


def load(name: str, device: str | None, *, for_files: bool = True, **options: Any) -> VideoClassifier:
    """Return the classifier; the progress bars of transformers are hidden.

    Args:
        name: bundled model, folder, or name on the hub.
        device: of the model.
        for_files: whether it must have a preprocessing, because it gets the frames of files.
        **options: of :meth:`VideoClassifier.from_pretrained`.
    """
    if device is not None:
        check_device(device)
    if name in bundled_language_models():
        raise ValueError(
            f"--model must be a video classifier, got the video language model {name!r}, whose answers are explained "
            f"with explain --prompt TEXT. Pass --prompt, or another model."
        )
    with quiet_transformers():
        classifier = VideoClassifier.from_pretrained(name, device=device, **options)
    if for_files and classifier.preprocessing is None:
        family = classifier.family.name if classifier.family else None
        steps = published(family, classifier.image_size)
        own = (
            "captum_staa.models.preprocessing.Preprocessing(...).to_config() returns its content."
            if steps is None
            else f"That of the published {family} models would be {json.dumps(steps.to_config())}"
        )
        raise ValueError(
            f"--model must be a model with a preprocessing of frames, got {name!r} without one. Copy the "
            f"preprocessor_config.json of its processor next to its config.json, or write this file. {own}"
        )
    return classifier


def check_device(name: str) -> None:
    """Raise ValueError if this machine does not have the device."""
    try:
        torch.empty(1, device=torch.device(name))
    except (RuntimeError, AssertionError) as error:  # a torch build without CUDA raises AssertionError
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"--device must be an available device, got {name!r}, which cannot be used here ({reason}). Drop --device "
            f"to run on the CPU."
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the progress bars of transformers, such as "Loading weights", and restore the setting afterwards."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
