"""Which layer a Grad-CAM reads where nobody says it: the first and the last that still know places."""

from __future__ import annotations

from typing import Literal

from torch import nn

from captum_staa.lending import uncompiled
from captum_staa.models import VideoClassifier

End = Literal["first", "last"]
# What a block's attention reads, in TimeSformer its spatial one: the last block's output has no gradient but at the
# class token where the head reads that alone, and this norm still has one everywhere.
NORMS = ("layernorm_before", "norm1")
CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def end_layer(classifier: VideoClassifier, end: End) -> str | None:
    """The name of a layer, among ``classifier.module.named_modules()``.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> end_layer(clf, "first"), end_layer(clf, "last")
        ('stem', 'stages')
        >>> end_layer(VideoClassifier.from_pretrained("tiny-videomae-pattern"), "first")
        'videomae.encoder.layer.0.layernorm_before'

    Args:
        classifier: around any model.
        end: ``"first"`` or ``"last"``.

    Returns:
        Of a known transformer the norm in front of the attention of its first or last block. Of other models the first
        or last child with convolutions in it, of the innermost module that holds all of them, such as a stem or a
        stage. None where there is neither.
    """
    model = uncompiled(classifier.module)
    if classifier.family is not None:
        names = [name for name, _ in model.named_modules() if name.endswith(NORMS) and "predictor" not in name]
    else:
        names = _children_with_convolutions(model)
    return names[0 if end == "first" else -1] if names else None


def _children_with_convolutions(model: nn.Module) -> list[str]:
    paths = [name.split(".") for name, module in model.named_modules() if isinstance(module, CONVOLUTIONS)]
    depth = 0  # of the innermost module that holds them all
    while paths and len({tuple(path[: depth + 1]) for path in paths}) == 1 and depth + 1 < len(paths[0]):
        depth += 1
    return list(dict.fromkeys(".".join(path[: depth + 1]) for path in paths))
