"""When is the evidence of an answer? Remove the video tokens of one step after the other."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_staa._utils.captum import TargetType, log_usage
from captum_staa._utils.checks import check_choice, check_count
from captum_staa._utils.model_state import class_indices, in_eval_mode
from captum_staa.attr._base import VideoMethod, call_bar, like_inputs, one_clip, target_outputs
from captum_staa.models.video_language import AnswerClassifier
from captum_staa.models.video_language.model import VideoLanguageModel, VideoPrompt
from captum_staa.models.video_language.tokens import VideoTokens

# --- the output of the vision tower, and the language model run on it -------------------------------------------------


@dataclass(frozen=True)
class VideoFeatures:
    """What the language model gets for the video tokens of clips.

    Attributes:
        values: ``(B, N, D)``, one vector per video token: those of the grid, then those of the tail.
        deepstack: ``(B, N, D)`` for each layer of the language model that adds further features (Qwen3-VL). A token
            that is removed must be removed here as well.
    """

    values: Tensor
    deepstack: tuple[Tensor, ...] = ()
    _raw: Any = None

    def map(self, function: Callable[[Tensor], Tensor]) -> VideoFeatures:
        """Return the features with a function applied to each of the tensors ``(B, N, D)``."""
        return replace(self, values=function(self.values), deepstack=tuple(map(function, self.deepstack)))


def encode(vlm: VideoLanguageModel, clip: Tensor, prompt: VideoPrompt) -> VideoFeatures:
    """Return what the vision tower and the projection make of clips.

    Args:
        vlm: the model.
        clip: ``(B, T, C, H, W)``.
        prompt: a prompt for clips of this size.
    """
    arguments = vlm.inputs(clip, prompt)
    function = getattr(vlm.model.model, f"get_{vlm.family.modality}_features")
    known = inspect.signature(inspect.unwrap(function)).parameters
    raw = function(**{name: value for name, value in arguments.items() if name in known}, return_dict=True)
    count = prompt.tokens.count + prompt.tokens.tail
    deepstack = tuple(_rows(layer, count) for layer in (raw.get("deepstack_features") or ()))
    return VideoFeatures(_rows(raw.pooler_output, count), deepstack, raw)


def answer_logits(vlm: VideoLanguageModel, features: VideoFeatures, prompt: VideoPrompt, answer: Tensor) -> Tensor:
    """Return the logits at each token of an answer, ``(B, n, V)``, from features in place of clips.

    Args:
        vlm: the model.
        features: features of B clips, perhaps changed.
        prompt: the prompt.
        answer: ``(n,)`` token ids.
    """
    batch = len(features.values)
    size, dtype = prompt.tokens.size, features.values.dtype
    empty = torch.zeros((1, size[0], 3, *size[1:]), dtype=dtype, device=features.values.device)
    arguments = vlm.inputs(empty, prompt, answer[:-1])  # for ids and positions, which do not depend on pixels
    arguments = {name: _repeated(name, value, batch) for name, value in arguments.items() if "pixel" not in name}
    raw = copy.copy(features._raw)
    raw.pooler_output = _like(features._raw.pooler_output, features.values)
    if features.deepstack:
        raw.deepstack_features = [
            _like(layer, values)
            for layer, values in zip(features._raw.deepstack_features, features.deepstack, strict=True)
        ]
    return vlm.run({**arguments, "mm_encoder_outputs": {vlm.family.modality: raw}}, len(answer))


def _repeated(name: str, value: Tensor, batch: int) -> Tensor:
    if name == "position_ids":
        return value.expand(-1, batch, -1)
    return value.repeat(batch, *[1] * (value.ndim - 1))


def _rows(output: Any, count: int) -> Tensor:
    """Return features ``(B, N, D)`` from a tensor, or from a list with one tensor per clip."""
    joined = output if isinstance(output, Tensor) else torch.cat(list(output))
    return joined.reshape(-1, count, joined.shape[-1])


def _like(output: Any, values: Tensor) -> Any:
    """Return features ``(B, N, D)`` in the form of ``output``."""
    if isinstance(output, Tensor):
        return values.reshape(-1, *output.shape[1:])
    return tuple(values.unbind(0))


Replacement = Literal["mean", "zero", "before"]


# --- the method -------------------------------------------------------------------------------------------------------


class StepAblation(VideoMethod, PerturbationAttribution):
    """Attribution of each time step: the fall of a token's log-probability when the step's video tokens are replaced.

    Example:
        >>> import torch  # doctest: +SKIP
        >>> from captum_staa import VideoLanguageModel  # doctest: +SKIP
        >>> vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")  # doctest: +SKIP
        >>> clf = vlm.as_classifier("which pattern ?", "it is right .", versus="bottom")  # doctest: +SKIP
        >>> steps = StepAblation(clf).attribute_steps(torch.rand(1, 16, 3, 48, 48))  # doctest: +SKIP
        >>> steps.shape  # of each token and of the whole answer, for 8 steps of two frames  # doctest: +SKIP
        torch.Size([1, 5, 8])

    The vision tower runs once, and the language model once per step, for all tokens of the answer together. With
    DeepStack (Qwen3-VL), the features that layers add to the video tokens are replaced as well. Steps only tell when:
    use :class:`AnswerAttribution` for where.

    Args:
        classifier: a classifier from :meth:`VideoLanguageModel.as_classifier`.
        replacement: what replaces the features of a step. ``"mean"``: the mean of the other steps at the same place.
            ``"zero"``: zeros. ``"before"``: the step before (after, for the first), as if time stood still.

    Raises:
        TypeError: ``classifier`` is not an :class:`AnswerClassifier`.
        ValueError: ``replacement`` is unknown.
    """

    def __init__(self, classifier: AnswerClassifier, replacement: Replacement = "mean") -> None:
        if not isinstance(classifier, AnswerClassifier):
            raise TypeError(
                f"classifier must be what vlm.as_classifier(prompt, answer) returns, got {type(classifier).__name__}. "
                f"Use VideoFeatureAblation with feature_masks.frames for other models."
            )
        check_choice("replacement", replacement, get_args(Replacement))
        super().__init__(classifier)
        self.replacement = replacement

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: None = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the shape of the clip: the value of each step, spread evenly over its voxels.

        Args:
            inputs: clip ``(B, T, C, H, W)``, or a tuple of one clip.
            target: index of the token, 0 to n - 1, or n for the whole answer; or one per clip.
            additional_forward_args: must be None.
            perturbations_per_eval: number of steps per call of the language model. It changes speed and memory only.
            show_progress: whether to show a progress bar over the calls of the language model.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), contiguous and detached. The sum over a step is the
            fall of the log-probability.

        Raises:
            ValueError: the target is missing, the clip has the wrong shape, or an option is out of range.
        """
        if additional_forward_args is not None:
            raise ValueError(
                "additional_forward_args must be None, because the prompt is part of the classifier. Use "
                "vlm.as_classifier(prompt, answer)."
            )
        classifier = self.forward_func
        clip = one_clip(inputs, classifier.layout, self.get_name())
        indices = torch.arange(len(classifier.answer) + 1).expand(len(clip), -1)
        chosen = target_outputs(indices, class_indices(target, classifier)).flatten().tolist()
        steps = self.attribute_steps(clip, perturbations_per_eval, show_progress)
        asked = torch.stack([values[token] for values, token in zip(steps, chosen, strict=True)])  # (B, t)
        tokens = classifier.prompt_for(clip).tokens
        shares = (asked / (tokens.h * tokens.w))[..., None, None].expand(-1, -1, tokens.h, tokens.w)
        return like_inputs(inputs, classifier.layout, tokens.to_pixels(shares))

    @in_eval_mode
    @torch.no_grad()
    def attribute_steps(self, inputs: Tensor, perturbations_per_eval: int = 1, show_progress: bool = False) -> Tensor:
        """Return the fall of the log-probability of each token and of the whole answer, for each step.

        Args:
            inputs: clip ``(B, T, C, H, W)``.
            perturbations_per_eval: number of steps per call of the language model.
            show_progress: whether to show a progress bar over the calls of the language model.

        Returns:
            ``(B, n + 1, t)`` float32. Positive: the step is evidence for the token.
        """
        check_count("perturbations_per_eval", perturbations_per_eval)
        classifier: AnswerClassifier = self.forward_func
        clip = one_clip(inputs, classifier.layout, self.get_name())
        prompt, vlm = classifier.prompt_for(clip), classifier.vlm
        tokens = prompt.tokens
        calls = len(clip) * (1 + -(-tokens.t // perturbations_per_eval))
        falls = []
        with call_bar(self.get_name(), calls, show_progress) as bar:
            for one in clip.split(1):
                features = encode(vlm, one, prompt)
                whole = classifier.scores(answer_logits(vlm, features, prompt, classifier.answer))  # (1, n + 1)
                bar.update()
                parts = []
                for steps in torch.arange(tokens.t).split(int(perturbations_per_eval)):
                    removed = self._without(features, tokens, steps)
                    parts.append(classifier.scores(answer_logits(vlm, removed, prompt, classifier.answer)))
                    bar.update()
                falls.append((whole - torch.cat(parts)).T)
        return torch.stack(falls)

    def _without(self, features: VideoFeatures, tokens: VideoTokens, steps: Tensor) -> VideoFeatures:
        """Return features ``(len(steps), N, D)``, each without one of the steps."""

        def remove(values: Tensor) -> Tensor:
            grid = values[0, : tokens.count].unflatten(0, (tokens.t, tokens.h * tokens.w))  # (t, h * w, D)
            copies = []
            for step in steps.tolist():
                copy = grid.clone()
                if self.replacement == "mean" and tokens.t > 1:
                    copy[step] = (grid.sum(0) - grid[step]) / (tokens.t - 1)
                elif self.replacement == "before" and tokens.t > 1:
                    copy[step] = grid[step - 1 if step else 1]
                else:
                    copy[step] = 0
                copies.append(torch.cat([copy.flatten(0, 1), values[0, tokens.count :]]))
            return torch.stack(copies)

        return features.map(remove)
