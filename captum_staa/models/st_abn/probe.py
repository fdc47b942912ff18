"""What a layer gives, learned by one forward: the sizes that a branch is built for."""

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
    """The features ``(1, C, t, h, w)`` of a layer and the number of classes K of the model around it."""

    features: Tensor
    num_classes: int


@torch.no_grad()
def probe(model: VideoClassifier, layer: nn.Module, name: str, grid: TokenGrid | None, example: Tensor | None) -> Probe:
    """Run the model once, in eval mode, on the example or on a clip of zeros.

    Raises:
        ValueError: the model takes no clip of zeros of a common shape, does not call the layer once, or the layer's
            output is no grid over space and time.
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
            f"the model failed on a clip of zeros of shape {tuple(clip.shape)} in layout {model.layout.axes}; pass "
            f"example=clip, one that it takes. It said: {error}"
        ) from error
    finally:
        handle.remove()
    if len(outputs) != 1:
        raise ValueError(
            f"the forward called layer {name!r} {len(outputs)} times, but a branch needs a layer that is called once"
        )
    first = outputs[0][0] if isinstance(outputs[0], tuple) and outputs[0] else outputs[0]
    features = to_features(first, grid) if isinstance(first, Tensor) and first.is_floating_point() else None
    size = model.layout.extent(clip)
    # A layer with channels last shows here: as width they are too many.
    if features is None or any(cells > pixels for cells, pixels in zip(features.shape[2:], size, strict=True)):
        shape = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        tokens = grid or "a grid: pass grid=TokenGrid(...), or a VideoClassifier around a known transformer"
        raise ValueError(
            f"layer {name!r} gives {shape} for a clip of {size} (T, H, W), which is no grid over space and time. What "
            f"fits: (B, C, t, h, w), or tokens (B, N, D) or frames (B*t, C, h, w) of {tokens}"
        )
    return Probe(features, logits.shape[1])


def _zeros(model: VideoClassifier) -> Tensor:
    """A clip of the model's own size, where it is known; small where not."""
    weights = [weight for weight in model.parameters() if weight.ndim > 1]
    like = weights[0] if weights else torch.empty(0)
    channels = next((m.in_channels for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), 3)
    height, width = model.image_size or (64, 64)
    clip = torch.zeros(1, model.num_frames or DEFAULT_FRAMES, channels, height, width, device=like.device)
    return model.layout.from_working(clip)
