"""What the public code of the STAA authors (VideoXAI, October 2024) computes, with its defects, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from captum_staa._utils.captum import TargetType, _format_additional_forward_args, _run_forward, log_usage
from captum_staa._utils.checks import generator_or_seeded
from captum_staa._utils.model_state import in_eval_mode
from captum_staa._utils.tensors import gaussian
from captum_staa.attention.capture import capture
from captum_staa.attr._base import VideoMethod, like_inputs, one_clip
from captum_staa.attr.staa import transformer_of
from captum_staa.grid import TokenGrid
from captum_staa.result import VideoAttribution

_OPENCV_SIGMA = 1.4  # default of OpenCV for a 7 x 7 kernel
_MOVING_AVERAGE = 5  # frames
_EMA = 0.3


class ReleasedSTAA(VideoMethod):
    """Attribution method that computes the maps of the STAA authors' public code, for comparison with :class:`STAA`.

    Its maps do not depend on the class. Do not use them to explain a model: four defects of the code are kept (see
    Note).

    Example:
        >>> import torch
        >>> from captum_staa import VideoClassifier
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> maps = ReleasedSTAA(clf).attribute_maps(torch.rand(1, 16, 3, 48, 48))
        >>> maps.joint.shape, float(maps.joint.max())
        (torch.Size([1, 16, 48, 48]), 1.0)

    Args:
        forward_func: a :class:`VideoClassifier` around a transformer of a known family, or such a model itself.
        generator: draws the random thresholds. None uses a new generator with seed 0 in each call.

    Raises:
        TypeError: ``forward_func`` is not a module, or ``generator`` is not a generator.
        ValueError: the model does not belong to a known family.

    Note:
        The defects. (1) The code reads ``S[0, i+1, p]``, the attention of a patch of frame 0, instead of
        ``S[i, 0, 1:]``, the attention of the class token of frame i. (2) Its temporal attention is the mean of a
        softmax row, which is constant except for the class token's share, so the min-max normalization amplifies
        noise. (3) Its threshold is random. (4) Its map is stretched over the whole frame although the processor cropped
        the frame. Figures of this library undo the crop, but ``attribute`` does not know the crop.

        The code is reimplemented from its description. Joint attention, which it does not support, is read at the same
        indices.

    Reference:
        Code of Wang and Liu, "STAA: Spatio-Temporal Attention Attribution for Real-Time Interpreting Transformer-based
        Video Models", arXiv 2411.00630.
    """

    def __init__(self, forward_func: nn.Module, generator: torch.Generator | None = None) -> None:
        classifier = transformer_of(forward_func)
        if classifier.family is None:
            raise ValueError(
                f"forward_func must belong to a known family of video transformers, got "
                f"{type(classifier.module).__name__}. Pass VideoClassifier(model, family=...), with the family that "
                f"captum_staa.models.inspect(model, inputs).family finds."
            )
        super().__init__(classifier)
        generator_or_seeded(generator)  # reject a wrong generator now
        self.generator = generator

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the shape of the clip, spread evenly over channels.

        Args:
            inputs: clip in the classifier's layout, or a tuple of one clip.
            target: unused, as the maps do not depend on the class.
            additional_forward_args: further positional arguments of the model.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), contiguous and detached. Summed over channels, each
            frame lies in [0, 1].

        Raises:
            ValueError: the clip has the wrong shape.
        """
        maps = self.attribute_maps(inputs, target, additional_forward_args)
        return like_inputs(inputs, self.forward_func.layout, maps.joint)

    @in_eval_mode
    def attribute_maps(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
    ) -> VideoAttribution:
        """Return the same attribution as :class:`VideoAttribution`, with the logits of the forward.

        ``temporal`` is not the sum of the attribution over each frame, but the separate "temporal attention" of the
        code, in [0, 1].
        """
        classifier = self.forward_func
        clip = one_clip(inputs, classifier.layout, self.get_name())
        model, grid = classifier.transformer, classifier.grid
        layer = [layer for layer in classifier.family.attention(model) if layer.role != "temporal"][-1]
        generator = generator_or_seeded(self.generator)
        extra = _format_additional_forward_args(additional_forward_args)
        with torch.no_grad():
            with capture(model, [layer], lambda call: call.head_mean()) as readings:
                logits = _run_forward(classifier, clip.clone(), None, extra)  # a copy: models may write into it
            maps, weights = _released_maps(readings[layer], layer.role, len(clip), grid, generator)
        frames, height, width = classifier.layout.extent(clip)
        seen = torch.nn.functional.pad(maps, (0, width - maps.shape[3], 0, height - maps.shape[2]))
        joint = grid.to_frames(seen, frames)
        return VideoAttribution(joint, joint.sum(1), grid.to_frames(weights, frames), logits.detach())


def _released_maps(
    matrix: Tensor, role: str, batch: int, grid: TokenGrid, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the spatial map of every frame, and the "temporal attention".

    Args:
        matrix: head-mean matrix of the last layer's spatial attention ``(B*t, n, n)``; for joint attention
            and pooling queries, which the authors do not support, ``(B, Q, N)`` with the same indices.
        role: role of the attention layer of ``matrix``.
        batch: B.
        grid: the model's grid.
        generator: draws the random thresholds, one per step of time, shared by all clips.

    Returns:
        ``(B, t, H, W)`` in [0, 1], normalized per frame, and ``(B, t)`` in [0, 1].
    """
    rows = _rows(matrix, role, batch, grid)  # (B, t, h, w)
    weights = rows.flatten(2).mean(2)  # (B, t): the mean of a softmax row, which is constant but for special tokens
    smoothed = torch.stack([rows[:, max(0, i + 1 - _MOVING_AVERAGE) : i + 1].mean(1) for i in range(grid.t)], 1)
    size = grid.pixels[1:]
    pixels = torch.nn.functional.interpolate(smoothed, size=size, mode="bilinear", align_corners=False)
    pixels = gaussian(pixels, (0, _OPENCV_SIGMA, _OPENCV_SIGMA), radius=(0, 3, 3))
    low, high = (torch.quantile(pixels.flatten(2), p, dim=2) for p in (0.7, 0.9))
    draw = torch.rand(grid.t, generator=generator, device=generator.device)  # the same for every clip of the batch
    threshold = low + draw.to(low) * (high - low)
    kept = pixels.where(pixels >= threshold[..., None, None], pixels.new_zeros(()))
    return _min_max(kept, (2, 3)), _min_max(_moving(weights), (1,))


def _rows(matrix: Tensor, role: str, batch: int, grid: TokenGrid) -> Tensor:
    """Return ``m_i(p) = S[0, i + 1, p]``: always frame 0, and its (i+1)-th token as the query instead of frame i."""
    steps = torch.arange(grid.t, device=matrix.device)
    if role == "spatial":
        first = matrix.unflatten(0, (batch, grid.t))[:, 0]  # (B, n, n): frame 0 alone
        queries = (steps + 1).clamp(max=first.shape[1] - 1)
        return first[:, queries, grid.prefix :].unflatten(2, (grid.h, grid.w))
    queries = (steps + 1).clamp(max=matrix.shape[1] - 1)
    return grid.to_grid(matrix[:, queries])[:, steps, steps]  # query token i+1, keys of grid step i


def _moving(values: Tensor) -> Tensor:
    average = [values[:, 0]]
    for step in range(1, values.shape[1]):
        average.append(_EMA * values[:, step] + (1 - _EMA) * average[-1])
    return torch.stack(average, 1)


def _min_max(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
