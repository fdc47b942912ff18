"""``VideoLanguageModel``: a video language model of transformers that takes clips in one plain layout."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_staa._utils.checks import check_count, is_number
from captum_staa._utils.model_state import eval_mode
from captum_staa.layout import VideoLayout
from captum_staa.models.preprocessing import as_frames
from captum_staa.models.video_language.classifier import AnswerClassifier
from captum_staa.models.video_language.families import Size, VideoLanguageFamily, find_language_model
from captum_staa.models.video_language.loading import load_language_model
from captum_staa.models.video_language.tokens import VideoTokens

if TYPE_CHECKING:
    import numpy as np

    from captum_staa.models.preprocessing import Preprocessing


@dataclass(frozen=True)
class VideoPrompt:
    """A prompt as token ids, for clips of one size.

    Attributes:
        ids: ``(L,)`` int64, the prompt with its video tokens.
        tokens: the grid of the video tokens.
        at: ``(tokens.count,)`` int64, position of each video token in ``ids``, step by step, row by row. A video token
            that was removed by compression has position -1.
        seconds: seconds per step, which are part of the positions of Qwen2.5-VL.
        text: the prompt with the text of the video, or None if it was given as ids.
    """

    ids: Tensor
    tokens: VideoTokens
    at: Tensor
    seconds: float
    text: str | None = None

    @property
    def kept(self) -> Tensor | None:
        """``(tokens.count,)`` bool, False for the video tokens that compression removed; None if there are none."""
        kept = self.at >= 0
        return None if bool(kept.all()) else kept


Prompt = str | VideoPrompt | Sequence[int] | Tensor


class VideoLanguageModel(nn.Module):
    """A video language model that takes clips ``(B, T, C, H, W)`` of normalized pixels, and answers a prompt.

    Explanations are about these clips: what the processor of the model makes of a video by sampling, resizing and
    normalizing frames, before it cuts them into patches. So a perturbed clip cannot change which frames are sampled,
    nor the timestamps in the prompt.

    Example:
        >>> vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")  # doctest: +SKIP
        >>> clip = torch.zeros(1, 16, 3, 48, 48)  # doctest: +SKIP
        >>> prompt = vlm.prompt("which pattern ?", (16, 48, 48))  # doctest: +SKIP
        >>> prompt.tokens.shape, len(prompt.at)  # doctest: +SKIP
        ((8, 3, 3), 72)
        >>> clf = vlm.as_classifier("which pattern ?", "it is right .")  # doctest: +SKIP
        >>> clf(clip).shape, clf.labels  # log-probability of each token, and of the whole answer  # doctest: +SKIP
        (torch.Size([1, 5]), ['it', 'is', 'right', '.', 'it is right .'])

    Args:
        model: a Qwen2.5-VL, Qwen3-VL, VideoLLaMA3, LLaVA-OneVision, InternVL or SmolVLM of transformers, or a module
            that contains one, such as PEFT's. It is used as it is, in its mode and dtype.
        processor: the model's processor, or its tokenizer. It is needed for prompts and answers that are text.
        family: fact sheet of a model of another family.
        fps: frames per second of clips. It sets the timestamps in the prompt and the positions of Qwen2.5-VL.
        preprocessing: conversion of uint8 frames to clips, used by :meth:`preprocess` in place of the processor, whose
            video part needs torchvision.

    Attributes:
        model: the language model with its head, the vision tower included.
        processor, family, fps, preprocessing: as above.
        layout: order of the axes of clips, always ``BTCHW``.

    Raises:
        TypeError: ``model`` is not a module, ``processor`` is neither a processor nor a tokenizer, or ``fps`` is not a
            number.
        ValueError: the family of the model is unknown, it adds tokens to prompts (PEFT's prompt tuning), or ``fps`` is
            not positive.
    """

    model: Any
    family: VideoLanguageFamily

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        family: VideoLanguageFamily | None = None,
        fps: float = 2.0,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be an nn.Module, got {type(model).__name__}. Load a model by its name with "
                f"VideoLanguageModel.from_pretrained(name)."
            )
        if not is_number(fps):
            raise TypeError(f"fps must be a number, frames per second, got {fps!r}")
        if not (fps > 0 and isfinite(fps)):
            raise ValueError(f"fps must be a finite number above 0, got {fps}. Pass the frames per second of clips.")
        _check_processor(processor)
        found: Any = find_language_model(model, family)
        self.model, self.family = found
        self.training = self.model.training
        self.processor, self.fps, self.preprocessing = processor, float(fps), preprocessing
        self.layout = VideoLayout("BTCHW")
        forward = inspect.signature(type(self.model).forward).parameters
        self.notice = ""
        self._keeps_logits = "logits_to_keep" in forward

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, *, dtype: torch.dtype = torch.float32, device: Any = None, **options: Any
    ) -> VideoLanguageModel:
        """Load a model by its name, in eval mode.

        Args:
            name_or_path: name of a bundled model (``"tiny-qwen2_5_vl"``, ``"tiny-llava_onevision"``), a folder, or a
                name on the Hugging Face hub such as ``"Qwen/Qwen2.5-VL-3B-Instruct"``.
            dtype: dtype of the weights.
            device: device of the weights.
            **options: ``processor``, ``family``, ``fps``, ``preprocessing`` as for the class;
                ``attn_implementation``, ``revision``, ``token``, ``cache_dir``, ``local_files_only`` as in
                transformers. Code from model repositories is never run, and pickled weights are never read.

        Raises:
            ValueError: the model does not exist, or its family is unknown.
            TypeError: an option is unknown.
        """
        model, settings = load_language_model(name_or_path, options)
        notice = settings.pop("notice", "")
        vlm = cls(model.to(device=device, dtype=dtype).eval(), **settings)
        vlm.notice = notice
        return vlm

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self.model.config

    @property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            ValueError: the model was made without a processor.
        """
        if self.processor is None:
            raise ValueError(
                "processor is required for a prompt or an answer that is text, got None. Pass VideoLanguageModel("
                "model, processor), where a tokenizer is enough, or pass token ids."
            )
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def video_token(self) -> int:
        """Id of the token that stands for one video token in a prompt."""
        return int(getattr(self.config, self.family.token))

    @property
    def _image_token(self) -> int | None:
        """Id of the token that stands for a token of an image; None if images have no such token."""
        image = getattr(self.config, "image_token_id", getattr(self.config, "image_token_index", None))
        return None if image is None or int(image) == self.video_token else int(image)

    def forward(self, *args: Any) -> Tensor:
        """Raise TypeError: a language model needs a prompt. Use :meth:`as_classifier`."""
        raise TypeError(
            "a VideoLanguageModel cannot be called with a clip alone, because it needs a prompt and an answer. Use "
            "vlm.as_classifier(prompt, answer), or vlm.generate(clip, prompt)."
        )

    # --- clips ------------------------------------------------------------------------------------------------------

    def preprocess(self, frames: np.ndarray | Tensor) -> Tensor:
        """Convert frames, for example from :func:`captum_staa.io.read_video`, to a clip: resize and normalize.

        Args:
            frames: uint8 ``(T, H, W, 3)``, RGB, already sampled.

        Returns:
            float32 ``(1, T, 3, H', W')`` on the device of the model.

        Raises:
            TypeError: ``frames`` is neither an array nor a tensor, or not uint8.
            ValueError: the frames have another shape, neither preprocessing nor a processor is known, or the processor
                dropped or repeated frames.
        """
        pixels = as_frames(frames)
        if self.preprocessing is not None:
            return self.preprocessing(pixels).to(self._device())
        processor = getattr(self.processor, "video_processor", None)
        if processor is None:
            raise ValueError(
                "preprocessing is required to convert frames, got None and no processor with a video_processor. Pass "
                "VideoLanguageModel(..., preprocessing=Preprocessing(resize=..., mean=..., std=...)), or install "
                "torchvision, which the video processors of transformers need, and pass processor=AutoProcessor..."
            )
        made = processor(torch.from_numpy(pixels).permute(0, 3, 1, 2), do_sample_frames=False, return_tensors="pt")
        clip = self.family.unpack(made, self.config)
        step = self.family.tokens((clip.shape[1], *clip.shape[3:]), self.config).step
        if -(-len(pixels) // step) * step != clip.shape[1]:
            raise ValueError(
                f"the processor must keep all frames, got {clip.shape[1]} of {len(pixels)}. Sample frames yourself and "
                f"set its do_sample_frames to False."
            )
        return clip[:, : len(pixels)].to(self._device())

    def read(self, inputs: Mapping[str, Any]) -> tuple[Tensor, VideoPrompt]:
        """Return clip and prompt from what the model's processor returned, so that any chat template can be used.

        Example:
            >>> vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")  # doctest: +SKIP
            >>> prompt = vlm.prompt("which pattern ?", (4, 48, 48))  # doctest: +SKIP
            >>> inputs = vlm.inputs(torch.rand(1, 4, 3, 48, 48), prompt)  # doctest: +SKIP
            >>> clip, prompt = vlm.read(inputs)  # inputs: what a processor returned  # doctest: +SKIP
            >>> clip.shape, prompt.tokens.shape  # doctest: +SKIP
            (torch.Size([1, 4, 3, 48, 48]), (2, 3, 3))

        Args:
            inputs: a mapping with ``input_ids`` ``(1, L)`` and the video of one example, such as
                ``pixel_values_videos``. Padding, where ``attention_mask`` is 0, is removed.

        Returns:
            clip ``(1, T, C, H, W)``, and a :class:`VideoPrompt` for :meth:`as_classifier`.

        Raises:
            TypeError: ``inputs`` is not a mapping, or holds lists in place of tensors.
            ValueError: there is not exactly one example with one video and no image, or the number of video tokens is
                wrong.
        """
        _check_processed(inputs)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if ids.ndim != 2 or len(ids) != 1:
            raise ValueError(
                f"inputs must hold one example, got input_ids of shape {tuple(ids.shape)}. Explain one prompt at a "
                f"time."
            )
        if mask is not None:
            if mask.shape != ids.shape:
                raise ValueError(
                    f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(mask.shape)}. "
                    f"Pass the one that the processor returned."
                )
            ids = ids[mask.bool()][None]
        images = inputs.get("pixel_values") if self.family.modality == "video" else None
        if images is not None and inputs.get("pixel_values_videos") is not None:
            raise ValueError(
                f"inputs must hold exactly one video and no image, got pixel_values of shape {tuple(images.shape)}. "
                f"Leave the image out of the message."
            )
        videos = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
        if videos is None or images is not None:
            raise ValueError(
                f"inputs must hold a video, got only {sorted(inputs)}. Add a video to the message: "
                f"{{'type': 'video', 'video': path}}."
            )
        grid = inputs.get("video_grid_thw")
        if (grid is not None and len(grid) != 1) or inputs.get("image_grid_thw") is not None:
            raise ValueError(
                f"inputs must hold exactly one video and no image, got video_grid_thw = "
                f"{None if grid is None else grid.tolist()}, image_grid_thw = {inputs.get('image_grid_thw')}. Explain "
                f"one video at a time; join two videos in time to explain both."
            )
        clip = self.family.unpack(inputs, self.config)
        if len(clip) != 1:
            raise ValueError(f"inputs must hold exactly one video, got {len(clip)}. Explain one video at a time.")
        seconds = inputs.get("second_per_grid_ts")
        seconds = None if seconds is None else float(seconds[0])
        kept = inputs.get("video_compression_mask")
        size = (clip.shape[1], clip.shape[3], clip.shape[4])
        return clip, self._placed(torch.as_tensor(ids[0]), size, seconds, None, kept)

    # --- prompts ----------------------------------------------------------------------------------------------------

    def prompt(self, prompt: Prompt, size: Size) -> VideoPrompt:
        """Return a prompt as token ids, for clips of one size.

        Args:
            prompt: a question, which the chat template puts behind the video; or a text in which the placeholder of the
                video, such as ``"<|video_pad|>"``, stands once; or token ids that contain all video tokens.
            size: ``(T, H, W)`` of the clips.

        Returns:
            The prompt. A :class:`VideoPrompt` is returned as it is if it has this size.

        Raises:
            TypeError: ``prompt`` has another type.
            ValueError: the prompt has no video or several, the model does not take clips of this size, or the prompt is
                longer than the model's context.
        """
        size = (int(size[0]), int(size[1]), int(size[2]))
        if isinstance(prompt, VideoPrompt):
            if prompt.tokens.size != size:
                raise ValueError(
                    f"clip must have the (T, H, W) of the prompt, {prompt.tokens.size}, got {size}. Make the "
                    f"prompt anew with vlm.prompt(question, (T, H, W))."
                )
            return prompt
        if not isinstance(prompt, str):
            ids = _as_ids(prompt)
            if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
                raise TypeError(
                    f"prompt must be a string, a VideoPrompt or a list of token ids, got {_shown(prompt)}. If it holds "
                    f"a batch of one, pass its first row."
                )
            self._check_padding(ids)
            return self._placed(ids, size)
        tokens = self.family.tokens(size, self.config)
        text, token = self.prompt_text(prompt), self._video_text
        assert text is not None
        text = text.replace(self._placeholder, self.family.text(tokens, self.fps, token))
        return self._placed(self._encode(text), size, text=text)

    def prompt_text(self, prompt: Prompt) -> str | None:
        """Return a prompt as text after the chat template, with one placeholder for the video; None for token ids.

        Args:
            prompt: as for :meth:`prompt`. The text of a :class:`VideoPrompt` contains all of its video tokens.

        Raises:
            ValueError: the text has no video or several.
        """
        if isinstance(prompt, VideoPrompt):
            return prompt.text
        if not isinstance(prompt, str):
            return None
        placeholder = self._placeholder
        text = prompt if placeholder in prompt else self._chat(prompt, placeholder)
        if (count := text.count(placeholder)) != 1:
            raise ValueError(
                f"prompt must contain the video once, got {placeholder!r} {count} times in {text[:200]!r}. Explain one "
                f"video at a time."
            )
        return text

    def answer_ids(self, answer: str | Sequence[int] | Tensor, text: str | None = None) -> Tensor:
        """Return an answer as token ids ``(n,)``, as they follow the prompt.

        Args:
            answer: text, or token ids.
            text: the prompt as text, from :meth:`prompt_text`. None if it is not known: the answer is then split alone.

        Raises:
            ValueError: the answer is empty, or the tokenizer does not split the prompt and the answer where they meet,
                or does not know a word, or the answer contains tokens of videos or images.
        """
        return self._ids_of(answer, text, "answer")

    def _ids_of(self, answer: str | Sequence[int] | Tensor, text: str | None, name: str) -> Tensor:
        if not isinstance(answer, str):
            ids = _as_ids(answer)
            if ids.ndim != 1 or len(ids) == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
                raise ValueError(f"{name} must be a text or a non-empty list of token ids, got {_shown(answer)}")
            self._check_ids(ids, name)
            self._check_marks(ids, name)
            return ids.long().cpu()
        if text is None:
            ids = torch.tensor(self.tokenizer(answer, add_special_tokens=False)["input_ids"], dtype=torch.long)
        else:
            alone, joined = self._encode(text), self._encode(text + answer)
            if not torch.equal(joined[: len(alone)], alone):
                raise ValueError(
                    f"{name} must begin with a separate token, got {answer!r}, whose beginning the tokenizer joins "
                    f"with the end of the prompt, {text[-20:]!r}. Begin the answer with a space, or pass token ids."
                )
            ids = joined[len(alone) :]
        if len(ids) == 0:
            raise ValueError(f"{name} must have at least one token, got {answer!r}")
        self._check_marks(ids, name)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is not None and bool((ids == unknown).any()) and self.tokenizer.unk_token not in answer:
            raise ValueError(
                f"{name} must consist of words that the tokenizer knows, got {answer!r}, in which it finds unknown "
                f"ones: {self.words(ids)}. Write it as the model does."
            )
        return ids

    def words(self, ids: Tensor | Sequence[int]) -> list[str]:
        """Return the text of each token, without the tokenizer's marks for spaces; ids without a tokenizer."""
        values = torch.as_tensor(ids).tolist()
        if self.processor is None:
            return [str(value) for value in values]
        return [self.tokenizer.decode([value]).strip() or repr(self.tokenizer.decode([value])) for value in values]

    @property
    def _video_text(self) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(self.video_token))

    @property
    def _placeholder(self) -> str:
        """What stands for the video in a prompt that is text."""
        return self.family.placeholder or self._video_text

    def _chat(self, question: str, placeholder: str) -> str:
        owner = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
        if not getattr(owner, "chat_template", None):
            raise ValueError(
                f"prompt must contain {placeholder!r} where the video belongs, because the tokenizer has no chat "
                f"template, got {question[:200]!r}. Write, e.g., '{placeholder} which pattern?'."
            )
        content = [{"type": "video"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        try:
            text = owner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template may raise any error
            raise ValueError(
                f"prompt must suit the chat template, which raises {type(error).__name__}: {error} Write the whole "
                f"prompt yourself, with {placeholder!r} where the video belongs."
            ) from error
        if placeholder not in text:
            raise ValueError(
                f"prompt must contain {placeholder!r} where the video belongs, got {text[:200]!r}, because the chat "
                f"template drops videos. Write the whole prompt yourself, with {placeholder!r}."
            )
        return str(text)

    def _encode(self, text: str) -> Tensor:
        start = getattr(self.tokenizer, "bos_token", None)
        ids = self.tokenizer(text, add_special_tokens=not (start and text.startswith(start)))["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def _check_ids(self, ids: Tensor, name: str) -> None:
        size = self.model.get_input_embeddings().weight.shape[0]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(
                f"{name} must consist of token ids from 0 to {size - 1}, got ids from {int(ids.min())} to "
                f"{int(ids.max())}. Use the tokenizer of this model."
            )

    def _check_padding(self, ids: Tensor) -> None:
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        pad = getattr(tokenizer, "pad_token_id", None)
        if pad is None or pad in (tokenizer.bos_token_id, tokenizer.eos_token_id) or len(ids) == 0:
            return
        if pad in (int(ids[0]), int(ids[-1])):
            raise ValueError(
                f"prompt must have no padding at its start or end, got pad tokens (id {pad}). Remove them, or use "
                f"vlm.read(inputs), which knows the attention mask."
            )

    def _check_marks(self, ids: Tensor, name: str) -> None:
        """Refuse tokens of videos or images in an answer: the model puts pixels in their place."""
        marks = [
            mark for mark in (self.video_token, self._image_token) if mark is not None and bool((ids == mark).any())
        ]
        if marks:
            raise ValueError(
                f"{name} must not contain the tokens of a video or an image, got ids {marks}. Pass the words alone; of "
                f"what generate() returns, only the tokens after the prompt."
            )

    def _check_context(self, name: str, length: int, video: int) -> None:
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ValueError(
                f"{name} must have at most {limit} tokens, the context of the model, got {length}, of which "
                f"{video} belong to the video. Use fewer or smaller frames."
            )

    def _placed(
        self,
        ids: Tensor,
        size: Size,
        seconds: float | None = None,
        text: str | None = None,
        kept: Tensor | None = None,
    ) -> VideoPrompt:
        """Return the prompt with the places of its video tokens."""
        self._check_ids(ids, "prompt")
        if images := int((ids == self._image_token).sum()) if self._image_token is not None else 0:
            raise ValueError(
                f"prompt must contain one video and no image, got {images} image tokens (id {self._image_token}). "
                f"Leave the image out."
            )
        tokens = self.family.tokens(size, self.config)
        found = (ids == self.video_token).nonzero()[:, 0].cpu()
        expected = tokens.count + tokens.tail
        if kept is not None:
            kept = torch.as_tensor(kept).bool().cpu()
            if len(kept) != tokens.count:
                raise ValueError(
                    f"video_compression_mask must have one value for each of {tokens.count} video tokens, got "
                    f"{len(kept)}"
                )
            expected = int(kept.sum())
        if len(found) != expected:
            other = "It has no video." if len(found) == 0 else "It may hold two videos, or was made for another size."
            raise ValueError(
                f"prompt must contain {expected} video tokens (id {self.video_token}) for a clip of (T, H, W) = "
                f"{tuple(size)}, got {len(found)}. {other} Use vlm.prompt(text, (T, H, W))."
            )
        self._check_context("prompt", len(ids), expected)
        at = torch.full((tokens.count,), -1)
        at[slice(None) if kept is None else kept] = found[: len(found) - tokens.tail]
        return VideoPrompt(ids.long().cpu(), tokens, at, tokens.step / self.fps if seconds is None else seconds, text)

    # --- the model --------------------------------------------------------------------------------------------------

    def inputs(self, clip: Tensor, prompt: VideoPrompt, answer: Tensor | None = None) -> dict[str, Any]:
        """Return the keyword arguments of the model's ``forward`` for clips, a prompt and the answer after it.

        Gradients of the clip pass through. Positions are computed here, because a Qwen2.5-VL without
        ``mm_token_type_ids`` silently takes other positions, and with them keeps a value between calls.

        Args:
            clip: ``(B, T, C, H, W)``.
            prompt: a prompt for clips of this size.
            answer: ``(n,)`` token ids, or None.
        """
        device, vision = self._device(), getattr(self.config, "vision_config", None)
        channels = getattr(vision, "num_channels", getattr(vision, "in_channels", clip.shape[2]))
        if clip.shape[2] != channels:
            raise ValueError(
                f"clip must have {channels} channels, (B, T, C, H, W), got shape {tuple(clip.shape)}. Repeat the "
                f"channel of gray frames."
            )
        ids = prompt.ids if answer is None else torch.cat([prompt.ids, answer.cpu()])
        self._check_context("prompt and answer", len(ids), int((prompt.ids == self.video_token).sum()))
        ids = ids.to(device).expand(len(clip), -1)
        video = self.family.pack(clip.to(device=device, dtype=self.model.dtype).contiguous(), self.config)
        if (kept := prompt.kept) is not None:
            video["video_compression_mask"] = kept.to(device).repeat(len(clip))
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **video}
        if self.family.mrope:
            kinds = torch.zeros_like(ids[:1], dtype=torch.int)
            kinds[0, prompt.at[prompt.at >= 0].to(device)] = 2
            positions, _ = self.model.model.get_rope_index(
                ids[:1],
                mm_token_type_ids=kinds,
                video_grid_thw=video["video_grid_thw"][:1].clone(),
                second_per_grid_ts=[prompt.seconds],
            )
            arguments["position_ids"] = positions.expand(-1, len(clip), -1)
        return arguments

    def generation_inputs(self, clip: Tensor, prompt: VideoPrompt) -> dict[str, Any]:
        """Return the keyword arguments of the model's ``generate``, as its processor makes them.

        Args:
            clip: ``(B, T, C, H, W)``.
            prompt: a prompt for clips of this size.
        """
        arguments = self.inputs(clip, prompt)
        if self.family.mrope:  # generate() computes positions itself, from the kinds of tokens
            del arguments["position_ids"]
            arguments["mm_token_type_ids"] = (arguments["input_ids"] == self.video_token).int() * 2
            if "second_per_grid_ts" in inspect.signature(type(self.model).forward).parameters:
                arguments["second_per_grid_ts"] = [prompt.seconds] * len(clip)
        return arguments

    def answer_logits(self, clip: Tensor, prompt: VideoPrompt, answer: Tensor) -> Tensor:
        """Return the logits at each token of an answer, given the tokens before it, from one forward.

        Args:
            clip: ``(B, T, C, H, W)``.
            prompt: a prompt for clips of this size.
            answer: ``(n,)`` token ids.

        Returns:
            ``(B, n, V)`` in float32 or wider.
        """
        return self.run(self.inputs(clip, prompt, answer[:-1]), len(answer))

    def run(self, arguments: Mapping[str, Any], count: int) -> Tensor:
        """Return the logits of the last ``count`` positions, ``(B, count, V)`` in float32 or wider.

        Args:
            arguments: keyword arguments of the model's forward.
            count: number of positions.
        """
        keep = {"logits_to_keep": count} if self._keeps_logits else {}
        logits = self.model(**arguments, **keep, use_cache=False).logits[:, -count:]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.no_grad()
    def generate(self, clip: Tensor, prompt: Prompt, max_new_tokens: int = 32) -> Tensor:
        """Return the model's own answer in eval mode: always the token with the highest logit.

        Sampling, beams, penalties and the other settings of the model's ``generation_config`` are not used, except the
        ids of special tokens.

        Example:
            >>> vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")  # doctest: +SKIP
            >>> answer = vlm.generate(torch.zeros(1, 16, 3, 48, 48), "which pattern ?")  # doctest: +SKIP
            >>> vlm.words(answer)[:2]  # doctest: +SKIP
            ['it', 'is']

        Args:
            clip: ``(1, T, C, H, W)``.
            prompt: as for :meth:`prompt`.
            max_new_tokens: the largest number of tokens.

        Returns:
            ``(n,)`` token ids, without the end-of-sequence token.

        Raises:
            ValueError: there are several clips.
        """
        check_count("max_new_tokens", max_new_tokens)
        self.layout.check_values(clip, "clip")
        if len(clip) != 1:
            raise ValueError(f"clip must be one clip to answer, got a batch of {len(clip)}. Call it once per clip.")
        placed = self.prompt(prompt, self.layout.extent(clip))
        arguments = self.generation_inputs(clip, placed)
        with eval_mode(self.model), _positions_kept(self.model):
            made = _greedy(self.model).generate(**arguments, max_new_tokens=max_new_tokens)[0]
        new = made[len(placed.ids) :].cpu()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        stop = next((i for i, value in enumerate(new.tolist()) if value in ends), len(new))
        return new[:stop]

    def as_classifier(
        self,
        prompt: Prompt,
        answer: str | Sequence[int] | Tensor,
        versus: str | int | Sequence[str | int] | None = None,
    ) -> AnswerClassifier:
        """Return a classifier of clips whose outputs are the log-probabilities of the tokens of an answer.

        Every method of this library and of Captum, every metric, baseline and feature mask then explains the answer:
        ``target=i`` is its token i, and ``target=len(tokens)`` (the last output) the whole answer.

        Example:
            >>> from captum_staa import VideoOcclusion  # doctest: +SKIP
            >>> vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")  # doctest: +SKIP
            >>> clf = vlm.as_classifier("which pattern ?", "it is right .", versus="bottom")  # doctest: +SKIP
            >>> clip = torch.zeros(1, 16, 3, 48, 48)  # doctest: +SKIP
            >>> token = clf.class_index("right")  # why "right" and not "bottom"?  # doctest: +SKIP
            >>> VideoOcclusion(clf).attribute(clip, (8, 48, 48), target=token).shape  # doctest: +SKIP
            torch.Size([1, 16, 3, 48, 48])

        Args:
            prompt: as for :meth:`prompt`.
            answer: text or token ids, for example what :meth:`generate` returned.
            versus: other words for the place of each token: a word of one token, its id, or a list of these. Outputs
                are then the log-probability of the answer's token minus the mean of those of the other words. None
                subtracts nothing.

        Returns:
            A :class:`VideoClassifier` with outputs ``(B, n + 1)``.

        Raises:
            ValueError: the prompt or the answer does not fit the model; as far as it depends on the size of the clip,
                when the classifier is called.
        """
        return AnswerClassifier(self, prompt, answer, versus)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def extra_repr(self) -> str:
        return f"family={self.family.name!r}, fps={self.fps:g}"


@contextmanager
def _positions_kept(model: nn.Module) -> Iterator[None]:
    """Restore what a Qwen model keeps between calls for positions."""
    inner: Any = getattr(model, "model", None)
    before = getattr(inner, "rope_deltas", None)
    try:
        yield
    finally:
        if hasattr(inner, "rope_deltas"):
            inner.rope_deltas = before


def _greedy(model: Any) -> Any:
    """Return the same model, its weights shared, with the generation defaults of transformers, which are greedy."""
    own, model = model.generation_config, copy.copy(model)
    special = {name: getattr(own, name) for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    model.generation_config = type(own)(**special)
    return model


def _check_processor(processor: Any) -> None:
    tokenizer = getattr(processor, "tokenizer", processor)
    is_one = callable(tokenizer) and hasattr(tokenizer, "convert_ids_to_tokens") and not isinstance(processor, type)
    if processor is not None and not is_one:
        raise TypeError(
            f"processor must be a processor or a tokenizer of transformers, got {processor!r}. Load one with "
            f"AutoProcessor.from_pretrained(name)."
        )


def _check_processed(inputs: Any) -> None:
    if not isinstance(inputs, Mapping) or "input_ids" not in inputs:
        got = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
        raise TypeError(
            f"inputs must be a mapping with input_ids and a video, got {got}. Pass what the processor returned for "
            f"text and video."
        )
    if lists := [name for name, value in inputs.items() if isinstance(value, list) and name != "second_per_grid_ts"]:
        raise TypeError(
            f"inputs must hold tensors, got lists in {', '.join(lists)}. Call the processor with return_tensors='pt'."
        )


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.ndim != 1 else repr(value)


def _as_ids(values: Any) -> Tensor:
    """Return a tensor of token ids, or an empty one of floats for what is none, which the caller's check refuses."""
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return torch.zeros(0)
