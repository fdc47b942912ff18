"""Fact sheets of families of video language models, as transformers 5.23 implements them.

A fact sheet states how a clip becomes the video input of the model, which tokens of the sequence belong to the video,
and which pixels each of them represents. A new family takes one :class:`VideoLanguageFamily`, most of which is one of
the two ways in which models take clips: rows of patches (:func:`rows`) or frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_staa.models.video_language.tokens import VideoTokens

Size = tuple[int, int, int]
Text = Callable[[VideoTokens, float, str], str]


@dataclass(frozen=True)
class VideoLanguageFamily:
    """Fact sheet of one family of video language models.

    Args:
        name: a short name, the ``model_type`` of its config.
        classes: names of its model classes, those with a language head.
        tokens: function of ``(T, H, W)`` and the model's config that returns the :class:`VideoTokens`. It raises a
            ValueError for a size that the model does not take.
        pack: differentiable function of a clip ``(B, T, C, H, W)`` and the config that returns the keyword arguments of
            the model's ``forward`` for the video, exactly as the model's processor makes them.
        unpack: the inverse of ``pack``, for what the processor of the model returned.
        text: function of the :class:`VideoTokens`, the frames per second and the string of the video token that returns
            the text of the video in the prompt, in place of ``placeholder``.
        placeholder: what stands for the video in a prompt. None is the video token itself.
        token: name in the config of the id of the video token.
        modality: key of the video in ``mm_encoder_outputs`` of the model.
        language_model: dotted name of the language model without its head.
        mrope: whether positions have three axes (time, row, column), which ``model.model.get_rope_index`` computes.
        deepstack: whether layers of the language model add further features to the video tokens.
    """

    name: str
    classes: tuple[str, ...]
    tokens: Callable[[Size, Any], VideoTokens]
    pack: Callable[[Tensor, Any], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Any], Any], Tensor]
    text: Text
    placeholder: str | None = None
    token: str = "video_token_id"
    modality: Literal["video", "image"] = "video"
    language_model: str = "model.language_model"
    mrope: bool = False
    deepstack: bool = False


def find_language_model(
    model: nn.Module, family: VideoLanguageFamily | None = None
) -> tuple[nn.Module, VideoLanguageFamily]:
    """Return the video language model in a module, which may be a wrapper such as PEFT's, and its fact sheet.

    Raises:
        ValueError: the module contains no model of a known family, or several, or adds tokens to every prompt.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"model must take prompts as they are, got {type(model).__name__}, which adds virtual tokens to them. Use "
            f"an adapter that changes weights, such as LoRA."
        )
    if family is not None:
        return model, family
    found = []
    for module in model.modules():
        names = {parent.__name__ for parent in type(module).__mro__}
        found += [(module, sheet) for sheet in LANGUAGE_FAMILIES.values() if names.intersection(sheet.classes)]
    if len(found) != 1:
        needed = ", ".join(field.name for field in fields(VideoLanguageFamily))
        known = ", ".join(name for sheet in LANGUAGE_FAMILIES.values() for name in sheet.classes)
        raise ValueError(
            f"model must be a video language model of a known family, got {type(model).__name__} with {len(found)} of "
            f"them. Known classes are {known}. For another family, pass "
            f"VideoLanguageModel(model, family=VideoLanguageFamily(...)), a fact sheet of {needed}; see "
            f"captum_staa/models/video_language/families.py for examples."
        )
    return found[0]


# --- rows of patches ------------------------------------------------------------------------------------------------


def to_rows(clip: Tensor, step: int, patch: int, merge: int) -> tuple[Tensor, Tensor]:
    """Return the patches of clips as rows, in the order of Qwen's processors, and the grid of each clip.

    The ``merge * merge`` patches of one token are neighbors. A clip whose last step is incomplete ends with copies of
    its last frame.

    Example:
        >>> rows, grid = to_rows(torch.zeros(1, 4, 3, 32, 48), step=2, patch=8, merge=2)
        >>> rows.shape, grid.tolist()
        (torch.Size([48, 384]), [[2, 4, 6]])

    Args:
        clip: ``(B, T, C, H, W)``.
        step: number of frames of a patch.
        patch: side of a patch in pixels.
        merge: number of patches per side of a token.

    Returns:
        rows ``(B * t * rows * columns, C * step * patch * patch)``, and ``(t, rows, columns)`` in patches, ``(B, 3)``.
    """
    if missing := -clip.shape[1] % step:
        clip = torch.cat([clip, clip[:, -1:].expand(-1, missing, -1, -1, -1)], 1)
    batch, frames, channels, height, width = clip.shape
    grid = frames // step, height // patch, width // patch
    blocks = clip.reshape(
        batch, grid[0], step, channels, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch
    ).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    rows = blocks.reshape(batch * math.prod(grid), channels * step * patch * patch)
    return rows, torch.tensor([grid] * batch, device=clip.device)


def from_rows(rows: Tensor, grid: Tensor, step: int, patch: int, merge: int) -> Tensor:
    """Return clips ``(B, T, C, H, W)`` from rows of patches: the inverse of :func:`to_rows`."""
    t, h, w = grid[0].tolist()
    blocks = rows.reshape(len(grid), t, h // merge, w // merge, merge, merge, -1, step, patch, patch)
    return blocks.permute(0, 1, 7, 6, 2, 4, 8, 3, 5, 9).reshape(len(grid), t * step, -1, h * patch, w * patch)


@dataclass(frozen=True)
class _Rows:
    """Fact sheet functions of models that take rows of patches."""

    extra: Callable[[Tensor, int], dict[str, Tensor]] | None = None  # further arguments, of the grid and the merge

    @staticmethod
    def sides(config: Any) -> tuple[int, int, int]:
        vision = config.vision_config
        return getattr(vision, "temporal_patch_size", 1), vision.patch_size, getattr(vision, "spatial_merge_size", 2)

    def pack(self, clip: Tensor, config: Any) -> dict[str, Tensor]:
        rows, grid = to_rows(clip, *self.sides(config))
        more = {} if self.extra is None else self.extra(grid, self.sides(config)[2])
        return {"pixel_values_videos": rows, "video_grid_thw": grid, **more}

    def unpack(self, inputs: Mapping[str, Any], config: Any) -> Tensor:
        return from_rows(inputs["pixel_values_videos"], inputs["video_grid_thw"], *self.sides(config))

    def tokens(self, size: Size, config: Any) -> VideoTokens:
        step, patch, merge = self.sides(config)
        side = patch * merge
        if size[1] % side or size[2] % side:
            near = tuple(max(round(edge / side), 1) * side for edge in size[1:])
            raise ValueError(
                f"clip must have frames whose height and width are multiples of {side} pixels ({merge} patches of "
                f"{patch} pixels per video token), got {size[1]} x {size[2]}. Resize them to {near[0]} x {near[1]}."
            )
        return VideoTokens(size, step, size[1] // side, size[2] // side, merge=merge)


def _llama3_extra(grid: Tensor, merge: int) -> dict[str, Tensor]:
    kept = torch.ones(int(grid.prod(1).sum()) // merge**2, dtype=torch.bool, device=grid.device)
    return {"video_merge_sizes": torch.full_like(grid[:, 0], merge), "video_compression_mask": kept}


# --- frames ---------------------------------------------------------------------------------------------------------


def _square(size: Size, config: Any) -> tuple[int, int]:
    """Return image size and patch size, after a check of the frames of a clip."""
    vision = config.vision_config
    edges = [
        value[0] if isinstance(value, (list, tuple)) else value for value in (vision.image_size, vision.patch_size)
    ]
    if size[1:] != (edges[0], edges[0]):
        raise ValueError(
            f"clip must have frames of {edges[0]} x {edges[0]} pixels for this model, got {size[1]} x {size[2]}. "
            f"Resize them, or use vlm.preprocess(frames)."
        )
    return edges[0], edges[1]


def _llava_tokens(size: Size, config: Any) -> VideoTokens:
    edge, patch = _square(size, config)
    patches = edge // patch
    side = -(-patches // 2)  # frames are pooled to half the patches per side, rounded up
    return VideoTokens(size, 1, side, side, (patches * patch,) * 2, tail=1, merge=patches / side)


def _merged_tokens(merge_of: Callable[[Any], int]) -> Callable[[Size, Any], VideoTokens]:
    def tokens(size: Size, config: Any) -> VideoTokens:
        edge, patch = _square(size, config)
        merge = merge_of(config)
        side = edge // patch // merge
        return VideoTokens(size, 1, side, side, (edge // patch * patch,) * 2, merge=merge)

    return tokens


def _internvl_frames(inputs: Mapping[str, Any], config: Any) -> Tensor:
    """The processor flattens the clips that its video processor makes."""
    made = inputs.get("pixel_values_videos")
    return inputs["pixel_values"][None] if made is None else made


def _without_empty_frames(clip: Tensor, config: Any) -> dict[str, Tensor]:
    """Return the frames for SmolVLM, which removes frames of zeros: one pixel of such a frame becomes almost zero."""
    empty = (clip == 0).flatten(2).all(2)  # (B, T)
    if not bool(empty.any()):
        return {"pixel_values": clip}
    spark = torch.zeros_like(clip[0, 0])
    spark[0, 0, 0] = torch.finfo(clip.dtype).tiny
    return {"pixel_values": clip + empty[:, :, None, None, None] * spark}


# --- text -----------------------------------------------------------------------------------------------------------


def _one_run(tokens: VideoTokens, fps: float, token: str) -> str:
    return token * (tokens.count + tokens.tail)


def _qwen3_text(tokens: VideoTokens, fps: float, token: str) -> str:
    """A run per step after the mean time of its frames. A missing last frame counts as a copy of the last one."""
    last = tokens.size[0] - 1
    times = [(i * tokens.step + min((i + 1) * tokens.step - 1, last)) / 2 / fps for i in range(tokens.t)]
    run = f"<|vision_start|>{token * (tokens.h * tokens.w)}<|vision_end|>"
    return "".join(f"<{time:.1f} seconds>{run}" for time in times)


def _llama3_text(tokens: VideoTokens, fps: float, token: str) -> str:
    return ",".join(f"Time {i / fps:.1f}s:{token * (tokens.h * tokens.w)}" for i in range(tokens.t))


def _internvl_text(tokens: VideoTokens, fps: float, token: str) -> str:
    return "\n".join(f"Frame{i + 1}: <img>{token * (tokens.h * tokens.w)}</img>" for i in range(tokens.t))


def _smolvlm_text(tokens: VideoTokens, fps: float, token: str) -> str:
    seconds = int(tokens.size[0] / fps)
    length = f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    intro = f"You are provided the following series of {_words(tokens.t)} frames from a {length} [H:MM:SS] video.\n"
    mark = "<fake_token_around_image>"
    run = f"{mark}<global-img>{token * (tokens.h * tokens.w)}{mark}"
    times = [int(i / fps) for i in range(tokens.t)]
    frames = [f"\nFrame from {time // 60:02d}:{time % 60:02d}:{run}" for time in times]
    return f"{intro}{''.join(frames)}\n\n"


_SMALL = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def _words(number: int) -> str:
    """Return a number below a thousand in words, as SmolVLM's prompt has it."""
    if number < 20:
        return _SMALL[number]
    if number < 100:
        return _TENS[number // 10 - 2] + (f"-{_SMALL[number % 10]}" if number % 10 else "")
    rest = f" and {_words(number % 100)}" if number % 100 else ""
    return f"{_SMALL[number // 100]} hundred{rest}" if number < 1000 else str(number)


# --- the families ---------------------------------------------------------------------------------------------------

_ROWS, _LLAMA3_ROWS = _Rows(), _Rows(_llama3_extra)
_SHEETS = (
    VideoLanguageFamily(
        name="qwen2_5_vl",
        classes=("Qwen2_5_VLForConditionalGeneration",),
        tokens=_ROWS.tokens,
        pack=_ROWS.pack,
        unpack=_ROWS.unpack,
        text=_one_run,
        mrope=True,
    ),
    VideoLanguageFamily(
        name="qwen3_vl",
        classes=("Qwen3VLForConditionalGeneration",),
        tokens=_ROWS.tokens,
        pack=_ROWS.pack,
        unpack=_ROWS.unpack,
        text=_qwen3_text,
        mrope=True,
        deepstack=True,
    ),
    VideoLanguageFamily(
        name="video_llama_3",
        classes=("VideoLlama3ForConditionalGeneration",),
        tokens=_LLAMA3_ROWS.tokens,
        pack=_LLAMA3_ROWS.pack,
        unpack=_LLAMA3_ROWS.unpack,
        text=_llama3_text,
    ),
    VideoLanguageFamily(
        name="llava_onevision",
        classes=("LlavaOnevisionForConditionalGeneration",),
        tokens=_llava_tokens,
        pack=lambda clip, config: {"pixel_values_videos": clip},
        unpack=lambda inputs, config: inputs["pixel_values_videos"],
        text=_one_run,
    ),
    VideoLanguageFamily(
        name="internvl",
        classes=("InternVLForConditionalGeneration",),
        tokens=_merged_tokens(lambda config: round(1 / config.downsample_ratio)),
        pack=lambda clip, config: {"pixel_values": clip.flatten(0, 1)},
        unpack=_internvl_frames,
        text=_internvl_text,
        placeholder="<video>",
        token="image_token_id",
        modality="image",
    ),
    VideoLanguageFamily(
        name="smolvlm",
        classes=("SmolVLMForConditionalGeneration",),
        tokens=_merged_tokens(lambda config: config.scale_factor),
        pack=_without_empty_frames,
        unpack=lambda inputs, config: inputs["pixel_values"],
        text=_smolvlm_text,
        placeholder="<video>",
        token="image_token_id",
        modality="image",
        language_model="model.text_model",
    ),
)
LANGUAGE_FAMILIES = {sheet.name: sheet for sheet in _SHEETS}
