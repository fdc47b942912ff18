"""Similarity of a clip to texts or to other clips, as the score of a model without classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa._utils.model_state import eval_mode, uncompiled
from captum_staa.models.families import find_transformer
from captum_staa.models.outputs import OutputKey, find_outputs, tensors_in

# Where encoders return the embedding of a clip, the most specific first. Tokens are averaged.
_EMBEDDINGS = ("video_embeds", "pooler_output", "last_hidden_state")


class Similarity(nn.Module):
    """Cosine similarity ``(B, K)`` of the embedding of clips to K other embeddings.

    Args:
        encoder: module that returns embeddings of clips, or a model of videos and texts.
        key: where the embedding is in what the encoder returns. None finds it.
        to: what clips are compared with: embeddings ``(K, D)``; the keyword arguments of K texts; or None, which
            returns the embeddings themselves.
    """

    def __init__(self, encoder: nn.Module, key: OutputKey | None, to: Tensor | Mapping[str, Tensor] | None) -> None:
        super().__init__()
        self.encoder, self.key = encoder, key
        self.texts = sorted(to) if isinstance(to, Mapping) else []
        for name in self.texts:
            self.register_buffer(f"text_{name}", to[name], persistent=False)  # type: ignore[index]
        self.register_buffer("references", to if isinstance(to, Tensor) else None, persistent=False)
        self.training = encoder.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the similarities ``(B, K)`` of clips, or their embeddings ``(B, D)``."""
        if self.texts:
            name = clip_keyword(self.encoder)
            if args and name is not None:
                kwargs, args = {name: args[0], **kwargs}, args[1:]
            texts = {name: getattr(self, f"text_{name}") for name in self.texts}
            returned = self.encoder(*args, **texts, **kwargs)
            clips, others = returned.video_embeds, returned.text_embeds
        else:
            clips, others = self._embeddings(*args, **kwargs), self.references
        if others is None:
            return clips
        if clips.shape[-1] != others.shape[-1]:
            raise ValueError(
                f"to must hold embeddings of {clips.shape[-1]} numbers, as the encoder returns, got shape "
                f"{tuple(others.shape)}. Compute them with the same model, behind its projection."
            )
        clips, others = F.normalize(clips, dim=-1), F.normalize(others.to(clips), dim=-1)
        return (clips[:, None] * others).sum(-1)  # others: (K, D), or (B, K, D) if texts depend on the clip

    def _embeddings(self, *args: Any, **kwargs: Any) -> Tensor:
        model: Any = uncompiled(self.encoder)
        if "skip_predictor" in signature(model.forward).parameters:  # V-JEPA 2: of masked tokens, for training
            kwargs = {"skip_predictor": True, **kwargs}
        run = model.get_video_features if hasattr(model, "get_text_features") else self.encoder
        returned = run(*args, **kwargs)
        return embedding_in(returned, len(next(value for _, value in tensors_in((args, kwargs)))), self.key)


def embedding_in(returned: Any, batch: int, key: OutputKey | None = None) -> Tensor:
    """Return the embedding of each clip in what an encoder returned, ``(B, D)``: that of the clip, or mean of tokens.

    Example:
        >>> import torch
        >>> embedding_in({"last_hidden_state": torch.tensor([[[1.0, 0.0], [3.0, 2.0]]])}, batch=1)
        tensor([[2., 1.]])

    Args:
        returned: what the encoder returned.
        batch: B.
        key: where the embedding is. None finds it.

    Raises:
        ValueError: the embedding has further axes.
    """
    if key is None and not isinstance(returned, Tensor):
        names = [path for path, _ in tensors_in(returned)]
        key = next((name for name in _EMBEDDINGS if (name,) in names), None)
    values = find_outputs(returned, batch, key=key)
    if values.ndim == 3:
        values = values.mean(1)
    if values.ndim != 2:
        raise ValueError(
            f"the encoder must return one embedding per clip (B, D), or tokens (B, N, D), got shape "
            f"{tuple(values.shape)}. Put the pooling into a module around the encoder, or pass output_key=..."
        )
    return values


def references_of(
    encoder: nn.Module, to: Tensor | Mapping[str, Tensor], embed: Callable[[Tensor], Tensor]
) -> Tensor | Mapping[str, Tensor]:
    """Return what :class:`Similarity` compares clips with: embeddings ``(K, D)``, or texts that depend on the clip.

    Args:
        encoder: as for :class:`Similarity`.
        to: embeddings, reference clips, or the tensors of texts, as for :meth:`VideoClassifier.similarity`.
        embed: function from reference clips to their embeddings.

    Raises:
        TypeError: ``encoder`` is not a module, or ``to`` is neither a tensor nor a mapping of tensors.
        ValueError: ``to`` has another shape, or the encoder has no texts.
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder must be an nn.Module, got {type(encoder).__name__}. Pass the loaded model.")
    if not isinstance(to, (Tensor, Mapping)):
        raise TypeError(
            f"to must be a tensor of embeddings or clips, or a mapping of the tensors of texts, got "
            f"{type(to).__name__}. Pass texts as tokenizer(texts, padding=True, return_tensors='pt')."
        )
    with eval_mode(encoder), torch.no_grad():
        if isinstance(to, Mapping):
            model: Any = uncompiled(encoder)
            _check_texts(model, to)
            if hasattr(model, "prompts_generator") or not hasattr(model, "get_text_features"):
                return to  # X-CLIP adds to texts what it sees in the clip
            to = embedding_in(model.get_text_features(**to), len(next(iter(to.values()))))
        elif to.ndim == 5:
            to = embed(to)
    if to.ndim not in (1, 2) or not to.is_floating_point():
        raise ValueError(
            f"to must be floating-point embeddings (K, D) or clips with five axes, got {to.dtype} of shape "
            f"{tuple(to.shape)}. Pass, e.g., model.get_text_features(**tokens).pooler_output, or a reference clip."
        )
    return to.detach().clone().reshape(-1, to.shape[-1])


def clip_keyword(model: nn.Module) -> str | None:
    """Return the keyword of clips in the forward of a model of videos and texts, or None."""
    names = signature(uncompiled(model).forward).parameters
    return next((name for name in ("pixel_values_videos", "pixel_values") if name in names), None)


def sizes_in_config(model: nn.Module) -> dict[str, Any]:
    """Return layout, number of frames and size of clips of an encoder of transformers, as far as its config has them.

    Nothing if it is of a known family, which states them.

    Example:
        >>> sizes_in_config(nn.Linear(1, 1))
        {}
    """
    config = getattr(uncompiled(model), "config", None)
    if not hasattr(config, "model_type") or find_transformer(model) is not None:
        return {}
    vision: Any = getattr(config, "vision_config", config)
    sizes: dict[str, Any] = {"layout": "BTCHW", "num_frames": getattr(vision, "num_frames", None)}
    side = getattr(vision, "image_size", None)
    sizes["image_size"] = (side, side) if isinstance(side, int) else side
    return {name: value for name, value in sizes.items() if value is not None}


def _check_texts(model: nn.Module, texts: Mapping[str, Any]) -> None:
    """Raise unless a model takes these texts, ``(K, n)`` each, beside clips."""
    if clip_keyword(model) is None or "input_ids" not in signature(model.forward).parameters:
        raise ValueError(
            f"texts need a model of videos and texts, such as XCLIPModel or VideoPrismClipModel, got "
            f"{type(model).__name__}. Pass the embeddings of the texts instead, (K, D)."
        )
    wrong = [name for name, value in texts.items() if not isinstance(value, Tensor) or value.ndim != 2]
    if wrong or not texts:
        raise TypeError(
            f"texts must be tensors (K, n), got others for {wrong or 'all'}. Pass tokenizer(texts, padding=True, "
            f"return_tensors='pt')."
        )
