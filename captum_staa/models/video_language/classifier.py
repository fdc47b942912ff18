"""``AnswerClassifier``: the tokens of an answer as the classes of a video classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from captum_staa._utils.checks import is_integer
from captum_staa.layout import VideoLayout
from captum_staa.models.classifier import VideoClassifier

if TYPE_CHECKING:
    from captum_staa.models.video_language.model import VideoLanguageModel, VideoPrompt


class AnswerClassifier(VideoClassifier):
    """A video language model with a fixed prompt and answer, as a classifier.

    :meth:`VideoLanguageModel.as_classifier` makes it.

    Attributes:
        vlm: the :class:`VideoLanguageModel`.
        prompt: the prompt as it was given.
        answer: ``(n,)`` token ids.
        tokens: the text of each token.
        versus_ids: ids of the other words at the place of each token, ``(n, m)``; m = 0 without.
    """

    def __init__(
        self,
        vlm: VideoLanguageModel,
        prompt: Any,
        answer: str | Sequence[int] | Tensor,
        versus: str | int | Sequence[str | int] | None = None,
    ) -> None:
        scorer = _AnswerScores(vlm, prompt, answer, versus)
        labels = [*scorer.words, answer if isinstance(answer, str) else " ".join(scorer.words)]
        if len(scorer.words) == 1:
            labels[1] = "whole answer"  # not the same label twice
        super().__init__(scorer, VideoLayout("BTCHW"), labels, output="score", preprocessing=vlm.preprocessing)
        self.training = vlm.training

    @property
    def vlm(self) -> VideoLanguageModel:
        """The language model."""
        return self.module.vlm  # type: ignore[return-value]

    @property
    def prompt(self) -> Any:
        """The prompt as it was given."""
        return self.module.prompt

    @property
    def answer(self) -> Tensor:
        """``(n,)`` token ids of the answer."""
        return self.module.answer  # type: ignore[return-value]

    @property
    def tokens(self) -> list[str]:
        """The text of each token of the answer."""
        return self.module.words  # type: ignore[return-value]

    @property
    def versus_ids(self) -> Tensor:
        """``(n, m)`` ids of the other words at the place of each token; m = 0 if there are none."""
        return self.module.others  # type: ignore[return-value]

    def prompt_for(self, clip: Tensor) -> VideoPrompt:
        """Return the prompt with video tokens for clips of this size."""
        return self.module.prompt_for(clip)  # type: ignore[operator]

    def scores(self, logits: Tensor) -> Tensor:
        """Return the outputs ``(B, n + 1)`` from the logits at the tokens of the answer, ``(B, n, V)``."""
        return self.module.scores(logits)  # type: ignore[operator]

    def preprocess(self, frames: Any) -> Tensor:
        """Convert frames to a clip. See :meth:`VideoLanguageModel.preprocess`."""
        return self.vlm.preprocess(frames)

    def _dtype(self) -> torch.dtype | None:
        return None  # the language model converts clips itself, and log-probabilities stay in float32


class _AnswerScores(nn.Module):
    """Clips ``(B, T, C, H, W)`` to log-probabilities ``(B, n + 1)``: of each token of an answer, and of all of them."""

    def __init__(self, vlm: VideoLanguageModel, prompt: Any, answer: Any, versus: Any) -> None:
        super().__init__()
        self.vlm, self.prompt = vlm, prompt
        self.training = vlm.training
        self._prompts: dict[tuple[int, int, int], VideoPrompt] = {}
        self.answer = vlm.answer_ids(answer, vlm.prompt_text(prompt))
        self.words = vlm.words(self.answer)
        self.others = self._other_words(versus)  # (n, m)

    def prompt_for(self, clip: Tensor) -> VideoPrompt:
        size = (clip.shape[1], clip.shape[3], clip.shape[4])
        if size not in self._prompts:
            self._prompts[size] = self.vlm.prompt(self.prompt, size)
        return self._prompts[size]

    def forward(self, clip: Tensor) -> Tensor:
        return self.scores(self.vlm.answer_logits(clip, self.prompt_for(clip), self.answer))

    def scores(self, logits: Tensor) -> Tensor:
        """Return ``(B, n + 1)`` scores from the logits at the tokens of the answer, ``(B, n, V)``."""
        logs = logits.log_softmax(-1)
        own = logs.gather(2, self.answer.to(logits.device).expand(len(logs), -1)[..., None])[..., 0]
        if self.others.numel():
            own = own - logs.gather(2, self.others.to(logits.device).expand(len(logs), -1, -1)).mean(-1)
        return torch.cat([own, own.sum(1, keepdim=True)], 1)

    def _other_words(self, versus: Any) -> Tensor:
        """Return the ids of the other words at the place of each token, ``(n, m)``."""
        versus = versus.tolist() if isinstance(versus, Tensor) else versus
        words = [versus] if isinstance(versus, str) or is_integer(versus) else [] if versus is None else versus
        if not isinstance(words, Sequence) or not all(isinstance(word, str) or is_integer(word) for word in words):
            raise TypeError(f"versus must be a word, a token id, or a list of these, got {versus!r}.")
        return torch.tensor([[self._in_place_of(own, word) for word in words] for own in self.answer.tolist()])

    def _in_place_of(self, own: int, word: str | int) -> int:
        """Return the id of a word where the token ``own`` stands: with a space before it if that has one."""
        if not isinstance(word, str):
            return int(self.vlm._ids_of([int(word)], None, "versus")[0])
        forms = [self.vlm._ids_of(form, None, "versus") for form in (word, f" {word}")]
        single = [int(form[0]) for form in forms if len(form) == 1]
        if not single:
            raise ValueError(
                f"versus must be words of one token each, got {word!r}, which has {len(forms[0])}: "
                f"{self.vlm.words(forms[0])}. Pass the id of its first token, or explain the two answers separately."
            )
        return next((form for form in single if self._spaced(form) == self._spaced(own)), single[0])

    def _spaced(self, token: int) -> bool:
        """Return whether a token begins with a space, by the marks of byte-level and sentencepiece tokenizers."""
        return str(self.vlm.tokenizer.convert_ids_to_tokens(token)).startswith(("\u0120", "\u2581", " "))
