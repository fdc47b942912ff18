"""Shape of a layer's output, determined by one forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_staa._utils.model_state import eval_mode
from captum_staa.grid import TokenGrid
from captum_staa.models.classifier import DEFAULT_FRAMES, VideoClassifier
from captum_staa.models.layers import to_features


@dataclass(frozen=True)
class Probe:
    """Class that holds the features ``(1, C, t, h, w)`` of a layer and the number of classes K of its model."""

    features: Tensor
    num_classes: int


@torch.no_grad()
def probe(model: VideoClassifier, layer: nn.Module, name: str, grid: TokenGrid | None, example: Tensor | None) -> Probe:
    """Run the model once, in eval mode, on the example or on a clip of zeros.

    Raises:
        ValueError: the model fails on a clip of zeros, does not call the layer exactly once, or the layer's output is
            not a grid over space and time.
    """
    outputs: list[object] = []
    clip = _zeros(model) if example is None else example[:1]
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with eval_mode(model):
            logits = model(clip)
    except Exception as error:
        if example is not None:
            raise
        raise ValueError(
            f"the model must accept a clip of zeros, got an error for shape {tuple(clip.shape)} in layout "
            f"{model.layout.axes}: {error}. Pass example=clip with a clip that the model accepts."
        ) from error
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise ValueError(
            f"the forward must call layer {name!r} once, got {len(outputs)} calls. Choose a layer that is called once "
            f"per forward."
        )
    first = outputs[0][0] if isinstance(outputs[0], tuple) and outputs[0] else outputs[0]
    features = to_features(first, grid) if isinstance(first, Tensor) and first.is_floating_point() else None
    size = model.layout.extent(clip)
    # This also detects channels-last layers: their channels, taken as the width, exceed the width in pixels.
    if features is None or any(cells > pixels for cells, pixels in zip(features.shape[2:], size, strict=True)):
        shape = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        tokens = grid or "a grid. Pass grid=TokenGrid(...), or a VideoClassifier around a known transformer."
        raise ValueError(
            f"the output of layer {name!r} must be (B, C, t, h, w), or tokens (B, N, D) or frames (B*t, C, h, w), got "
            f"{shape} for a clip of {size} (T, H, W). Tokens and frames need {tokens}"
        )
    return Probe(features, logits.shape[1])


def _zeros(model: VideoClassifier) -> Tensor:
    """Return a clip of zeros of the model's size, or of a small default size if it is unknown."""
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    like = weights[0] if weights else torch.empty(0)
    channels = next((m.in_channels for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), 3)
    height, width = model.image_size or (64, 64)
    clip = torch.zeros(1, model.num_frames or DEFAULT_FRAMES, channels, height, width, device=like.device)
    return model.layout.from_working(clip)
