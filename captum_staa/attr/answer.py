"""Which frames and regions made a video language model say a word, and how much the answer depends on the video."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_staa import baselines
from captum_staa._utils.captum import TargetType, log_usage
from captum_staa._utils.checks import check_choice, is_number
from captum_staa._utils.model_state import eval_mode, frozen_parameters, in_eval_mode, uncompiled, without_compiling
from captum_staa._utils.networks import lost_gradient, refuse_missing_backward
from captum_staa._utils.tensors import gaussian, short_repr
from captum_staa.attention.capture import AttentionCall, capture
from captum_staa.attention.frozen import FrozenPatterns
from captum_staa.attention.linear_graph import nonlinear_operations, reaches
from captum_staa.attr._base import VideoMethod, call_bar, like_inputs, one_clip, refuse_inference_mode, target_outputs
from captum_staa.layout import VideoLayout
from captum_staa.models.families import AttentionLayer
from captum_staa.models.video_language import AnswerClassifier, VideoLanguageModel, VideoPrompt
from captum_staa.result import VideoAttribution

Mode = Literal["relevance", "attention"]
# Standard deviations of the Gaussian over maps, in frames and in patches of the tower (H, W), chosen on clips that are
# not in the tables. In time it is more than that of STAA, because a language model reads movement from several frames.
SPREAD = (2.5, 0.75, 0.75)
Counterfactual = Callable[..., Tensor]
PATTERN_WEIGHT = 0.125  # weight of the effect of a token on attention patterns, as in STAA
# A blur has no details, the mean frame no movement, and the reversed clip another order. One of them is not enough: a
# blur still shows movement, and a model without evidence may give the same answer.
COUNTERFACTUALS: tuple[Counterfactual, ...] = (baselines.blur, baselines.mean_frame, baselines.reverse)


@dataclass(frozen=True)
class AnswerMaps(VideoAttribution):
    """Maps of each token of an answer. The batch axis counts the n tokens.

    Attributes:
        joint: ``(n, T, H, W)``.
        spatial: ``(n, H, W)``, the sum over frames.
        temporal: ``(n, T)``, the sum over the pixels of each frame.
        logits: ``(n, V)``, the logits at each token.
        tokens: the text of each token.
        ids: ``(n,)`` int64, their ids.
        log_probabilities: ``(n,)``, log-probability of each token after the prompt and the tokens before it.
        reliance: ``(n,)``, by how many nats the log-probability falls at most if the clip is replaced by a
            counterfactual one. It is near 0 for words that the model says with any video. Their map does not count
            then.
        falls: ``(m, n)``, the same for each counterfactual clip. ``reliance`` is the maximum over clips.
    """

    tokens: tuple[str, ...] = ()
    ids: Tensor | None = None
    log_probabilities: Tensor | None = None
    reliance: Tensor | None = None
    falls: Tensor | None = None

    __repr__ = short_repr

    def __str__(self) -> str:
        assert self.log_probabilities is not None and self.reliance is not None
        rows = zip(self.tokens, self.log_probabilities.exp().tolist(), self.reliance.tolist(), strict=True)
        lines = [f"{token:20s} {probability:11.3f} {reliance:+9.2f}" for token, probability, reliance in rows]
        return "\n".join([f"{'token':20s} {'probability':>11s} {'reliance':>9s}", *lines])


class AnswerAttribution(VideoMethod):
    """Attribution of each token of an answer of a video language model, in space and time.

    Example:
        >>> import torch  # doctest: +SKIP
        >>> from captum_staa import VideoLanguageModel  # doctest: +SKIP
        >>> from captum_staa.benchmark import PlantedClips  # doctest: +SKIP
        >>> vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")  # doctest: +SKIP
        >>> clip, label, truth = PlantedClips(seed=3, n=1, task="order")[:]  # doctest: +SKIP
        >>> maps = AnswerAttribution(vlm).attribute_answer(clip, "which came first ?")  # doctest: +SKIP
        >>> maps.joint.shape, maps.tokens[2] == ("right", "bottom")[label]  # doctest: +SKIP
        (torch.Size([4, 16, 48, 48]), True)
        >>> bool(maps.reliance[2] > 1), bool(maps.reliance[1] < 0.05)  # doctest: +SKIP
        (True, True)

    ``mode="relevance"`` decomposes the logit of a token, minus that of another word (``versus``) or the mean of all
    other words, into signed contributions of the patches of the clip: through the language model and the vision tower,
    under :class:`~captum_staa.attention.frozen.FrozenPatterns`. It takes one forward for all tokens, and one
    backward for each. No attention matrix is formed.

    ``mode="attention"`` is the attention of the token to the video tokens, averaged over heads and layers. It does not
    depend on which word is said, and finds the evidence less well: tokens of a language model exchange information, so
    that one of them is not a place.

    Args:
        model: a classifier from :meth:`VideoLanguageModel.as_classifier`, or a :class:`VideoLanguageModel`, for
            :meth:`attribute_answer` only.
        mode: ``"relevance"`` or ``"attention"``.
        pattern_weight: as in :class:`~captum_staa.STAA`, weight of the effect of a patch on attention. With 0, the
            decomposition is exact. For ``mode="relevance"``.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        model: AnswerClassifier | VideoLanguageModel,
        mode: Mode = "relevance",
        *,
        pattern_weight: float = PATTERN_WEIGHT,
    ) -> None:
        if not isinstance(model, (AnswerClassifier, VideoLanguageModel)):
            raise TypeError(
                f"model must be a VideoLanguageModel or what its as_classifier(prompt, answer) returns, got "
                f"{type(model).__name__}. Use STAA for classifiers."
            )
        check_choice("mode", mode, get_args(Mode))
        if not is_number(pattern_weight) or not 0 <= pattern_weight < inf:
            raise ValueError(
                f"pattern_weight must be a finite number of at least 0, got {pattern_weight!r}. Use, e.g., 0.125."
            )
        super().__init__(model)
        self.mode, self.pattern_weight = mode, float(pattern_weight)

    @log_usage(part_of_slo=True)
    def attribute(
        self, inputs: Tensor | tuple[Tensor, ...], target: TargetType = None, additional_forward_args: None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of one token of the answer, of the shape of the clip, spread evenly over channels.

        Args:
            inputs: clip ``(B, T, C, H, W)``, or a tuple of one clip.
            target: index of the token, 0 to n - 1, or n for the whole answer (the sum over tokens); or one per clip.
            additional_forward_args: must be None.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), contiguous and detached. For relevance, signed
            contributions in units of a logit. For attention, the share of each voxel.

        Raises:
            ValueError: the target is missing, the clip has the wrong shape, or the call is under
                ``torch.inference_mode()``.
            TypeError: the model is a :class:`VideoLanguageModel`, which does not know the prompt.
        """
        return like_inputs(inputs, self.forward_func.layout, self._maps(inputs, target, additional_forward_args).joint)

    def attribute_maps(
        self, inputs: Tensor | tuple[Tensor, ...], target: TargetType = None, additional_forward_args: None = None
    ) -> VideoAttribution:
        """Return the same attribution as :class:`VideoAttribution`, in float32, with the log-probabilities."""
        return self._maps(inputs, target, additional_forward_args)

    def attribute_answer(
        self,
        inputs: Tensor,
        prompt: str | VideoPrompt | Sequence[int] | Tensor | None = None,
        answer: str | Sequence[int] | Tensor | None = None,
        versus: str | int | Sequence[str | int] | None = None,
        *,
        counterfactual: Tensor | Counterfactual | Sequence[Counterfactual] = COUNTERFACTUALS,
        show_progress: bool = False,
    ) -> AnswerMaps:
        """Return the maps of all tokens of an answer, and how much each relies on the video.

        Args:
            inputs: one clip ``(1, T, C, H, W)``.
            prompt: as for :meth:`VideoLanguageModel.prompt`. None if the model is a classifier, which has a prompt.
            answer: text or token ids. None lets the model answer.
            versus: as for :meth:`VideoLanguageModel.as_classifier`.
            counterfactual: what replaces the clip for :attr:`AnswerMaps.reliance`: a function of
                :mod:`captum_staa.baselines`, several of them, or clips ``(m, T, C, H, W)``, such as the clip without an
                object, or other videos. The default is the blurred clip, its mean frame and the reversed clip.
            show_progress: whether to show a progress bar over tokens.

        Returns:
            :class:`AnswerMaps` in float32.

        Raises:
            ValueError: there are several clips, the prompt is missing, or the counterfactual has another size.
            TypeError: an argument has the wrong type.
        """
        model, layout = self.forward_func, self.forward_func.layout
        clip = one_clip(inputs, layout, self.get_name())
        if len(clip) != 1:
            raise ValueError(
                f"inputs must be one clip, got a batch of {len(clip)}. Call attribute_answer once per clip."
            )
        classifier = self._classifier(clip, prompt, answer, versus)
        other = _counterfactuals(counterfactual, clip, layout)
        layout.check_values(other, "counterfactual")
        if other.shape[1:] != clip.shape[1:]:
            raise ValueError(
                f"counterfactual must be clips of shape {tuple(clip.shape[1:])} (T, C, H, W), got "
                f"{tuple(other.shape[1:])}. Resize or cut them."
            )
        count = len(classifier.answer)
        with eval_mode(model):
            maps, logits = self._joint(clip, classifier, range(count), show_progress)
            with torch.no_grad():
                plain = _plain(classifier)
                own = plain.scores(logits)[0, :count]
                falls = own - torch.stack([plain(part[None])[0, :count] for part in other])
        whole = VideoAttribution.from_joint(maps[:, 0])
        return AnswerMaps(
            whole.joint,
            whole.spatial,
            whole.temporal,
            logits[0],
            tuple(classifier.tokens),
            classifier.answer,
            own,
            falls.amax(0),
            falls,
        )

    def get_name(self) -> str:
        """Return ``"AnswerAttribution (relevance)"`` or ``"AnswerAttribution (attention)"``."""
        return f"AnswerAttribution ({self.mode})"

    # --- one call -----------------------------------------------------------------------------------------------

    def _classifier(self, clip: Tensor, prompt: Any, answer: Any, versus: Any) -> AnswerClassifier:
        model = self.forward_func
        if isinstance(model, AnswerClassifier):
            if prompt is None and answer is None and versus is None:
                return model
            prompt = model.prompt if prompt is None else prompt
            answer = model.answer if answer is None else answer
            model = model.vlm
        if prompt is None:
            raise ValueError(
                "prompt is required if the model is a VideoLanguageModel, got None. Pass the question, such as 'What "
                "happens?', or use vlm.as_classifier(prompt, answer)."
            )
        if answer is None:
            answer = model.generate(clip, prompt)
            if len(answer) == 0:
                raise ValueError("the model must give an answer of at least one token, got none. Pass answer='...'.")
        return model.as_classifier(prompt, answer, versus)

    def _maps(self, inputs: Any, target: TargetType, additional_forward_args: object) -> VideoAttribution:
        if isinstance(self.forward_func, VideoLanguageModel):  # before a target such as the prompt is read as a label
            raise TypeError(
                "model must be a classifier to attribute a token, got a VideoLanguageModel, which does not know prompt "
                "and answer. Use AnswerAttribution(vlm.as_classifier(prompt, answer)), or attribute_answer()."
            )
        if additional_forward_args is not None:
            raise ValueError(
                "additional_forward_args must be None, because the prompt is part of the classifier. Use "
                "vlm.as_classifier(prompt, answer)."
            )
        return self._token_maps(inputs, target)

    @in_eval_mode
    def _token_maps(self, inputs: Any, target: TargetType) -> VideoAttribution:
        classifier = self.forward_func
        clip = one_clip(inputs, classifier.layout, self.get_name())
        indices = torch.arange(len(classifier.answer) + 1).expand(len(clip), -1)
        chosen = target_outputs(indices, target)  # checks the target, and gives one index per clip
        tokens = [int(index) for index in chosen.flatten()]
        needed = sorted(set(tokens))
        maps, logits = self._joint(clip, classifier, needed, False)
        joint = torch.stack([maps[needed.index(token), i] for i, token in enumerate(tokens)])
        return VideoAttribution.from_joint(joint, classifier.scores(logits))

    def _joint(
        self, clip: Tensor, classifier: AnswerClassifier, tokens: Sequence[int], show_progress: bool
    ) -> tuple[Tensor, Tensor]:
        """Return maps ``(len(tokens), B, T, H, W)`` and the logits at all tokens ``(B, n, V)``."""
        if self.mode == "attention":
            return _attention(clip, classifier, tokens)
        refuse_inference_mode("mode='relevance'")
        patches = classifier.prompt_for(clip).tokens.patches
        height, width = patches.sides
        with call_bar(self.get_name(), len(tokens), show_progress) as bar:
            raw, logits = contributions(clip, classifier, tokens, self.pattern_weight, bar.update)
        # Neighboring patches of one object often have opposite signs. Their mean is that of the object.
        spread = (SPREAD[0], SPREAD[1] * height, SPREAD[2] * width)
        return gaussian(raw.flatten(0, 1), spread, keep_sums=True).view(raw.shape), logits


def _counterfactuals(
    chosen: Tensor | Counterfactual | Sequence[Counterfactual], clip: Tensor, layout: VideoLayout
) -> Tensor:
    """Return counterfactual clips ``(m, T, C, H, W)``; the caller checks their shape."""
    if isinstance(chosen, Tensor):
        return chosen
    functions: list[Any] = list(chosen) if isinstance(chosen, Sequence) else [chosen]
    if not functions or not all(callable(function) and not isinstance(function, type) for function in functions):
        raise TypeError(
            f"counterfactual must be clips (m, T, C, H, W), a function such as baselines.blur, or a list of functions, "
            f"got {chosen!r}."
        )
    clips: list[Any] = [function(clip, layout) for function in functions]
    for function, made in zip(functions, clips, strict=True):
        if not isinstance(made, Tensor) or made.shape[1:] != clip.shape[1:]:
            got = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else repr(made)
            raise ValueError(
                f"counterfactual must return clips of shape {tuple(clip.shape)}, got {got} from {function!r}. Return a "
                f"clip in place of the one that is passed."
            )
    return torch.cat(clips)


def contributions(
    clip: Tensor,
    classifier: AnswerClassifier,
    tokens: Sequence[int],
    pattern_weight: float = 0.0,
    update: Callable[[], Any] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Return the contribution of each pixel to the score of each asked token: one forward, and a backward for each.

    The score is :func:`contrast`: the logit of a token minus the mean of the logits of other words. With
    ``pattern_weight=0``, pixels and constants (biases, text, positions) sum to it exactly.

    Args:
        clip: ``(B, T, C, H, W)``.
        classifier: the answer.
        tokens: indices of tokens; n is the whole answer.
        pattern_weight: as in :class:`~captum_staa.attention.frozen.FrozenPatterns`.
        update: called after each backward.

    Returns:
        contributions ``(len(tokens), B, T, H, W)`` in float32 or wider, and the logits at all tokens of the answer
        ``(B, n, V)``, detached.

    Raises:
        ValueError: the logits have no gradient with respect to the clip, as in quantized models.
    """
    vlm, mode = classifier.vlm, FrozenPatterns(pattern_weight)
    leaf = clip.detach().clone().requires_grad_()
    wide = torch.promote_types(leaf.dtype, torch.float32)
    maps = []
    with torch.enable_grad(), frozen_parameters(vlm), without_compiling():
        with mode, _NoOtherLeaves():
            logits = vlm.answer_logits(leaf.clone(), classifier.prompt_for(clip), classifier.answer)
        scores = contrast(logits, classifier)
        _check_gradient(scores, leaf, classifier)
        if nonlinear := sorted({operation.name for operation in nonlinear_operations(scores.grad_fn, leaf)}):
            warnings.warn(
                f"FrozenPatterns must know every operation of the model, got {', '.join(nonlinear)}. Contributions are "
                f"a first-order approximation. Load the model with attn_implementation='sdpa'.",
                stacklevel=2,
            )
        backward = mode.expand(torch.autograd.grad)
        for i, token in enumerate(tokens):
            (gradient,) = backward(scores[:, token].sum(), leaf, retain_graph=i + 1 < len(tokens))
            maps.append((gradient.to(wide) * leaf.detach().to(wide)).sum(2))
            update()
    return torch.stack(maps), logits.detach()


class _NoOtherLeaves(TorchFunctionMode):
    """Ignore ``requires_grad_``, by which PEFT and gradient checkpointing make the embeddings of text a leaf."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is Tensor.requires_grad_ else func(*args, **(kwargs or {}))


def _check_gradient(scores: Tensor, leaf: Tensor, classifier: AnswerClassifier) -> None:
    """Raise ValueError if the gradient of the clip is missing or would be wrong."""

    def run() -> Tensor:
        return classifier(leaf.detach().clone().requires_grad_().clone())

    refuse_missing_backward(scores, classifier, run)
    if not scores.requires_grad or not reaches(scores.grad_fn, leaf):
        raise ValueError(
            f"mode='relevance' needs a gradient of the logits with respect to the clip, got none. "
            f"{lost_gradient(classifier, run)} Remove torch.no_grad() and .detach() from the model, or use "
            f"mode='attention', StepAblation, VideoOcclusion or RISE."
        )


def contrast(logits: Tensor, classifier: AnswerClassifier) -> Tensor:
    """Return the scores of all tokens and of the whole answer, ``(B, n + 1)``, from their logits ``(B, n, V)``."""
    own = logits.gather(2, classifier.answer.to(logits.device).expand(len(logits), -1)[..., None])[..., 0]
    others = classifier.versus_ids.to(logits.device)
    if others.numel():
        scores = own - logits.gather(2, others.expand(len(logits), -1, -1)).mean(2)
    else:
        scores = own - (logits.sum(2) - own) / (logits.shape[2] - 1)
    return torch.cat([scores, scores.sum(1, keepdim=True)], 1)


def _attention(clip: Tensor, classifier: AnswerClassifier, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the attention of the tokens to the video, ``(len(tokens), B, T, H, W)``, and the logits ``(B, n, V)``."""
    vlm, prompt, count = classifier.vlm, classifier.prompt_for(clip), len(classifier.answer)
    layers = language_layers(vlm)
    length = len(prompt.ids) + count - 1
    with torch.no_grad(), capture(uncompiled(vlm.model), layers, lambda call: _last_rows(call, length, count)) as read:
        logits = vlm.answer_logits(clip, prompt, classifier.answer)
    rows = torch.stack([read[layer] for layer in layers]).mean(0)  # (B, n, L)
    values = rows[..., prompt.at.clamp(min=0).to(rows.device)] * (prompt.at >= 0).to(rows)
    whole = torch.cat([values, values.mean(1, keepdim=True)], 1).unflatten(2, prompt.tokens.shape)
    maps = prompt.tokens.to_pixels(whole[:, list(tokens)])  # (B, len(tokens), T, H, W)
    return maps.transpose(0, 1), logits


def _last_rows(call: AttentionCall, length: int, count: int) -> Tensor:
    return call.rows(slice(length - count, length))


def language_layers(vlm: VideoLanguageModel) -> list[AttentionLayer]:
    """Return the attention layers of the language model, without those of the vision tower."""
    start = f"{vlm.family.language_model}."
    names = [
        name
        for name, _ in uncompiled(vlm.model).named_modules()
        if name.startswith(start) and name.endswith(".self_attn")
    ]
    if not names:
        raise ValueError(
            f"mode='attention' needs attention layers named 'self_attn' in {vlm.family.language_model!r}, got none in "
            f"{type(vlm.model).__name__}. Use mode='relevance'."
        )
    return [AttentionLayer(name, block, backend="hf") for block, name in enumerate(names)]


def _plain(classifier: AnswerClassifier) -> AnswerClassifier:
    """Return the classifier without other words, whose outputs are log-probabilities."""
    if not classifier.versus_ids.numel():
        return classifier
    return classifier.vlm.as_classifier(classifier.prompt, classifier.answer)
