"""Captum's ``LLMAttribution`` for video language models: which regions of a clip, ablated, change each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from captum.attr import InterpretableInput, LLMAttribution
from torch import Tensor

from captum_staa._utils.captum import BaselineType
from captum_staa._utils.model_state import eval_mode
from captum_staa.masking.arguments import baselines_for, units_for
from captum_staa.models.video_language import VideoLanguageModel, VideoPrompt


class VideoMaskInput(InterpretableInput):
    """A clip and a prompt as an input of :class:`VideoLLMAttribution`, whose features are regions of the clip.

    Example:
        >>> from captum_staa import VideoLanguageModel, feature_masks  # doctest: +SKIP
        >>> vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")  # doctest: +SKIP
        >>> clip = torch.rand(1, 16, 3, 48, 48)  # doctest: +SKIP
        >>> mask = feature_masks.segments(clip, "BTCHW", 4)  # doctest: +SKIP
        >>> inp = VideoMaskInput(vlm, clip, "which pattern ?", mask)  # doctest: +SKIP
        >>> inp.n_itp_features, inp.values[0]  # doctest: +SKIP
        (4, 'region 0')

    Args:
        vlm: the model.
        clip: one clip ``(1, T, C, H, W)``.
        prompt: as for :meth:`VideoLanguageModel.prompt`.
        feature_mask: ids 0 .. n-1 of regions, as for :class:`VideoFeatureAblation`.
        baselines: what replaces an absent region: a number, a clip, or a function of ``captum_staa.baselines``. None
            is 0.

    Raises:
        ValueError: there are several clips, or an argument does not fit the clip.
    """

    def __init__(
        self,
        vlm: VideoLanguageModel,
        clip: Tensor,
        prompt: str | VideoPrompt | Sequence[int] | Tensor,
        feature_mask: Tensor,
        baselines: BaselineType | Callable[..., Tensor] = None,
    ) -> None:
        vlm.layout.check_values(clip, "clip")
        if len(clip) != 1:
            raise ValueError(f"clip must be one clip, got a batch of {len(clip)}. Explain one clip at a time.")
        self.vlm, self.clip = vlm, clip
        self.prompt = vlm.prompt(prompt, vlm.layout.extent(clip))
        self.mask = units_for(clip, feature_mask, vlm.layout)[0]  # (T, H, W)
        (self.baseline,) = baselines_for((clip,), baselines(clip, vlm.layout) if callable(baselines) else baselines)
        self.n_itp_features = int(self.mask.max()) + 1
        self.values = [f"region {i}" for i in range(self.n_itp_features)]

    def to_tensor(self) -> Tensor:
        """Return which regions are present: ones ``(1, n)``."""
        return torch.ones(1, self.n_itp_features)

    def perturbed_clip(self, present: Tensor | None = None) -> Tensor:
        """Return the clip in which regions are replaced by the baseline.

        Args:
            present: ``(1, n)``, 1 for regions that stay, 0 for those that are replaced. None keeps all.
        """
        if present is None:
            return self.clip
        if len(present) != 1:
            raise ValueError(
                f"one perturbation per call is possible, as in Captum's LLMAttribution, got {len(present)}. Leave "
                f"perturbations_per_eval at 1."
            )
        keep = present[0].to(self.clip)[self.mask.to(self.clip.device)][None, :, None]  # (1, T, 1, H, W)
        return torch.where(keep == 1, self.clip, self.clip * keep + self.baseline * (1 - keep))

    def to_model_input(self, perturbed_tensor: Tensor | None = None) -> dict[str, Any]:
        """Return the keyword arguments of the model, as its processor makes them."""
        return self.vlm.generation_inputs(self.perturbed_clip(perturbed_tensor), self.prompt)

    def format_attr(self, itp_attr: Tensor) -> Tensor:
        """Return attributions of regions unchanged, as Captum asks for."""
        return itp_attr

    def format_video_attr(self, itp_attr: Tensor) -> Tensor:
        """Return maps ``(..., T, H, W)`` from attributions of regions ``(..., n)``: each voxel gets its region's."""
        return itp_attr[..., self.mask.to(itp_attr.device)]


class VideoLLMAttribution(LLMAttribution):
    """Captum's :class:`captum.attr.LLMAttribution` for a :class:`VideoMaskInput`.

    Captum's own class computes zeros for a video by default: with transformers 5.23, its way to generate with a cache
    drops the pixels. Without the cache, it raises an error for Qwen models. Here, the log-probabilities of all tokens
    come from one forward per perturbation, in eval mode, and are equal to those of generation.

    Example:
        >>> from captum.attr import FeatureAblation  # doctest: +SKIP
        >>> from captum_staa import VideoLanguageModel, feature_masks  # doctest: +SKIP
        >>> vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")  # doctest: +SKIP
        >>> clip = torch.rand(1, 16, 3, 48, 48)  # doctest: +SKIP
        >>> inp = VideoMaskInput(vlm, clip, "which pattern ?", feature_masks.frames(clip, "BTCHW"))  # doctest: +SKIP
        >>> llm = VideoLLMAttribution(FeatureAblation(vlm.model), vlm.tokenizer)  # doctest: +SKIP
        >>> result = llm.attribute(inp, target="it is right .")  # doctest: +SKIP
        >>> result.token_attr.shape, inp.format_video_attr(result.seq_attr).shape  # doctest: +SKIP
        (torch.Size([4, 16]), torch.Size([16, 48, 48]))

    Args:
        attr_method: a Captum method for a model: FeatureAblation, ShapleyValueSampling, ShapleyValues, Lime or
            KernelShap.
        tokenizer: the tokenizer of the model.
        attr_target: ``"log_prob"`` or ``"prob"``.
    """

    SUPPORTED_INPUTS = (VideoMaskInput,)

    def _forward_func(
        self, perturbed_tensor: Tensor | None, inp: VideoMaskInput, target_tokens: Tensor, *unused: Any
    ) -> Tensor:
        answer = inp.vlm.answer_ids(target_tokens.long())
        with torch.no_grad(), eval_mode(inp.vlm):
            logits = inp.vlm.answer_logits(inp.perturbed_clip(perturbed_tensor), inp.prompt, answer)
        logs = logits[0].log_softmax(-1).gather(1, answer.to(logits.device)[:, None])[:, 0]
        whole = torch.cat([logs.sum()[None], logs])[None] if self.include_per_token_attr else logs.sum()
        return whole if self.attr_target == "log_prob" else whole.exp()
