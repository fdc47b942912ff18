"""Similarity of a clip to texts or to other clips, as the score of a model without classes."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa._utils.model_state import uncompiled
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


def two_towers(model: Any) -> Any:
    """Return the text encoder of a model that embeds clips and texts independently, or None."""
    joint = hasattr(model, "prompts_generator")  # X-CLIP adds to texts what it sees in the clip
    return None if joint else getattr(model, "get_text_features", None)


def clip_keyword(model: nn.Module) -> str | None:
    """Return the keyword of clips in the forward of a model of videos and texts, or None."""
    names = signature(uncompiled(model).forward).parameters
    return next((name for name in ("pixel_values_videos", "pixel_values") if name in names), None)


def sizes_in_config(model: nn.Module) -> dict[str, Any]:
    """Return layout, number of frames and size of clips of an encoder of transformers, as far as its config has them.

    Example:
        >>> sizes_in_config(nn.Linear(1, 1))
        {}
    """
    config = getattr(uncompiled(model), "config", None)
    if not hasattr(config, "model_type"):
        return {}
    vision: Any = getattr(config, "vision_config", config)
    sizes: dict[str, Any] = {"layout": "BTCHW", "num_frames": getattr(vision, "num_frames", None)}
    side = getattr(vision, "image_size", None)
    sizes["image_size"] = (side, side) if isinstance(side, int) else side
    return {name: value for name, value in sizes.items() if value is not None}


def check_texts(model: nn.Module, texts: Mapping[str, Any]) -> None:
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
