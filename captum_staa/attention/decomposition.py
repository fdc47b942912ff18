"""The class score of a transformer as a signed sum over patch tokens, from one forward and one backward.

Example:
    >>> import torch
    >>> from captum_staa import VideoClassifier
    >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    >>> clips = torch.rand(1, 16, 3, 48, 48)
    >>> result = decompose_classifier(clf, clips, lambda logits: class_contrast(logits, logits[:, 2]))
    >>> result.contributions.shape  # one number per patch token: (B, t, h, w)
    torch.Size([1, 8, 6, 6])
    >>> total = result.contributions.sum((1, 2, 3)) + result.constants
    >>> torch.allclose(total, result.score)
    True

Under :class:`~captum_staa.attention.frozen_patterns.FrozenPatterns`, autograd sees every attention pattern, every
normalization scale and every activation ratio as a constant. The network is then an affine function of the patch
embeddings, so gradient times embedding is the exact share of each token in the score. The rest is the share of biases,
position embeddings and class tokens. The gradient does not pass through queries and keys, so fused attention kernels
are used and no N x N matrix is kept.

Reference:
    Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021 (frozen attention patterns). Ali et al.,
    "XAI for Transformers: Better Explanations through Conservative Propagation", ICML 2022, arXiv 2202.07304 (frozen
    attention and normalization). Achtibat et al., "AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for
    Transformers", ICML 2024, arXiv 2402.05602 (equal shares of a product).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_staa._utils.captum import _format_additional_forward_args, _run_forward
from captum_staa._utils.checks import check_choice
from captum_staa._utils.model_state import eval_mode, frozen_parameters, without_compiling
from captum_staa._utils.networks import lacks_backward, lost_gradient
from captum_staa.attention.frozen_patterns import FrozenPatterns
from captum_staa.attention.linear_graph import nonlinear_operations, reaches
from captum_staa.grid import TokenGrid
from captum_staa.models.outputs import LastFunction

__all__ = ["Decomposition", "FrozenPatterns", "class_contrast", "decompose", "decompose_classifier"]

Score = Callable[[Tensor], Tensor]
Where = Literal["tokens", "pixels"]


@dataclass(frozen=True)
class Decomposition:
    """The score of each example as a sum of signed contributions.

    ``contributions`` summed over an example, plus ``constants``, is ``score``. All tensors are detached; all but
    ``outputs`` are float32 or wider.

    Attributes:
        contributions: gradient times value. Of :func:`decompose_classifier`: ``(B, t, h, w)`` per token or
            ``(B, T, H, W)`` per pixel. Of :func:`decompose`: the shape of the embedding or of the inputs.
        constants: ``(B,)``, what biases, position embeddings, class tokens and other parameters contribute.
        score: ``(B,)``.
        outputs: the model's outputs, such as logits ``(B, K)``, in its own dtype.
        nonlinear: names of autograd operations that no rule of :class:`FrozenPatterns` made affine. If empty,
            the decomposition is exact. Otherwise it is a first-order approximation, and ``constants`` includes its
            error.
    """

    contributions: Tensor
    constants: Tensor
    score: Tensor
    outputs: Tensor
    nonlinear: tuple[str, ...] = ()


def decompose_classifier(
    classifier: Any,
    inputs: Tensor,
    score: Score,
    additional_forward_args: object = None,
    *,
    where: Where = "tokens",
    pattern_weight: float = 0.0,
) -> Decomposition:
    """Return the score of a video classifier, in eval mode, as a sum of contributions of its patch tokens or pixels.

    Example:
        >>> import torch
        >>> from captum_staa import VideoClassifier
        >>> clf = VideoClassifier.from_pretrained("tiny-vivit-motion")
        >>> clips = torch.rand(2, 16, 3, 48, 48)
        >>> pixels = decompose_classifier(clf, clips, lambda logits: logits[:, 1] - logits[:, 0], where="pixels")
        >>> pixels.contributions.shape, pixels.constants.shape
        (torch.Size([2, 16, 48, 48]), torch.Size([2]))

    Args:
        classifier: a :class:`VideoClassifier` around a transformer.
        inputs: ``(B, ...)`` clips in the classifier's layout.
        score: function from logits to ``(B,)``, as in :func:`decompose`; for a class, :func:`class_contrast`.
        additional_forward_args: further positional arguments of the model.
        where: ``"tokens"`` needs a family that names its patch embedding. ``"pixels"`` works with any network, and
            counts the bias of the patch embedding as a constant.
        pattern_weight: as in :func:`decompose`.

    Returns:
        :class:`Decomposition` with contributions ``(B, t, h, w)`` or ``(B, T, H, W)``, summed over channels.

    Raises:
        ValueError: the patch embedding is unknown, or as for :func:`decompose`.
    """
    check_choice("where", where, ("tokens", "pixels"))
    embedding = _patch_embedding(classifier) if where == "tokens" else None
    with eval_mode(classifier):
        result = decompose(
            classifier, inputs, score, additional_forward_args, embedding=embedding, pattern_weight=pattern_weight
        )
    if embedding is None:
        return replace(result, contributions=classifier.layout.reduce(result.contributions))
    return replace(result, contributions=_on_grid(result.contributions, len(inputs), classifier.grid))


def class_contrast(outputs: Tensor, chosen: Tensor) -> Tensor:
    """Return the target's output minus the mean of the example's other outputs, ``(B,)``.

    What all classes have in common cancels. If there is a single output per example, it is returned as it is.

    Example:
        >>> logits = torch.tensor([[5.0, 1.0, 3.0]])
        >>> class_contrast(logits, logits[:, 0])
        tensor([3.])

    Args:
        outputs: ``(B,)``, ``(B, K)`` or ``(B, ...)``, such as logits.
        chosen: the output of each example's target, B numbers that are part of ``outputs``.

    Returns:
        ``(B,)``, in float32 or wider.

    Raises:
        ValueError: ``chosen`` does not have one number per example.
    """
    if chosen.numel() != len(outputs):
        raise ValueError(
            f"target must select one output per example, got {chosen.numel()} values for {len(outputs)} examples with "
            f"outputs of shape {tuple(outputs.shape)}. Pass target=class_index, one index per axis after the batch."
        )
    wide = torch.promote_types(outputs.dtype, torch.float32)
    outputs, chosen = outputs.to(wide), chosen.to(wide).reshape(len(outputs))
    count = outputs[0].numel()
    return chosen if count == 1 else chosen - (outputs.flatten(1).sum(1) - chosen) / (count - 1)


def decompose(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    score: Score,
    additional_forward_args: object = None,
    *,
    embedding: nn.Module | None = None,
    pattern_weight: float = 0.0,
) -> Decomposition:
    """Return a score of any model as a sum of contributions of an embedding's output, or of the inputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
        >>> result = decompose(model, torch.randn(2, 4), lambda outputs: outputs[:, 0], embedding=model[0])
        >>> result.contributions.shape
        torch.Size([2, 8])
        >>> torch.allclose(result.contributions.sum(1) + result.constants, result.score, atol=1e-6)
        True

    Args:
        forward_func: model or function that returns one row of outputs per example. Parameters of a module are frozen
            during the call.
        inputs: ``(B, ...)`` floats.
        score: function from outputs to ``(B,)``, one number per example. It must be linear, otherwise the result is
            approximate. If the outputs are the result of a softmax or a sigmoid, it gets the logits before that.
        additional_forward_args: further positional arguments of ``forward_func``.
        embedding: the submodule whose output is decomposed. It must run once per forward. None decomposes the inputs.
        pattern_weight: weight of the effect of each token on attention patterns, as a query and as a key. With 0,
            patterns are constants and the sum is exact. With a positive weight, the effect is added in first order,
            and ``constants`` is the rest of the score. See :class:`FrozenPatterns`.

    Returns:
        :class:`Decomposition`. Its contributions have the shape of the embedding's output, or of the inputs.

    Raises:
        ValueError: the outputs do not depend on the embedding, as after a softmax; the embedding does not run exactly
            once; or the call is under ``torch.inference_mode()``.
        TypeError: the model or the embedding does not return a tensor.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "decompose needs gradients, got a call under torch.inference_mode(), which forbids them. Call it under "
            "torch.no_grad() instead. Gradients are enabled inside."
        )
    extra = _format_additional_forward_args(additional_forward_args)
    frozen = frozen_parameters(forward_func) if isinstance(forward_func, nn.Module) else nullcontext()
    mode = FrozenPatterns(pattern_weight)
    source = inputs.detach().clone()  # models may write into their input
    with torch.enable_grad(), frozen, without_compiling(), _as_leaf(embedding) as leaves:
        if embedding is None:
            leaves.append(source.requires_grad_())
            source = source.clone()
        with mode, LastFunction() as last:
            outputs = _run_forward(forward_func, source, None, extra)
        _check_run(outputs, leaves, embedding)
        (leaf,) = leaves
        logits = last.argument(outputs)  # a final softmax is not an attention pattern: what precedes it is decomposed
        scores = score(outputs if logits is None else logits)
        if not scores.requires_grad or not reaches(scores.grad_fn, leaf):
            raise ValueError(f"{_no_gradient(outputs, embedding)}{_lost(forward_func, inputs, extra)}")
        # under the mode as well, because gradient checkpointing repeats the forward during the backward
        backward = mode.expand(torch.autograd.grad)
        (gradient,) = backward(scores.sum(), leaf)
        if not bool((gradient != 0).any()) and lacks_backward(scores.grad_fn):
            raise ValueError(f"{_no_gradient(outputs, embedding)}{_lost(forward_func, inputs, extra)}")
    nonlinear = tuple(sorted(set(nonlinear_operations(scores.grad_fn, leaf))))
    if nonlinear:
        warnings.warn(
            f"FrozenPatterns must know every operation of the model, got {', '.join(nonlinear)}. Contributions are "
            f"a first-order approximation, and the constants include its error. Write these operations with functions "
            f"of torch, such as F.scaled_dot_product_attention, and pass the model as an nn.Module, whose parameters "
            f"are frozen.",
            stacklevel=2,
        )
    wide = torch.promote_types(leaf.dtype, torch.float32)
    contributions = gradient.to(wide) * leaf.detach().to(wide)
    scores = scores.detach()
    constants = scores - contributions.reshape(len(scores), -1).sum(1)
    return Decomposition(contributions, constants, scores, outputs.detach(), nonlinear)


@contextmanager
def _as_leaf(embedding: nn.Module | None) -> Iterator[list[Tensor]]:
    """Make the output of a module a leaf of the graph, in forwards of this thread, and yield the leaves."""
    leaves: list[Tensor] = []
    if embedding is None:
        yield leaves
        return
    thread = get_ident()

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if get_ident() != thread:
            return None
        if not isinstance(output, Tensor):
            raise TypeError(
                f"embedding must return a tensor, got {type(output).__name__} from {type(module).__name__}. Pass the "
                f"convolution or linear layer inside it."
            )
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # models add position embeddings in place, which autograd forbids for a leaf

    handle = embedding.register_forward_hook(hook)
    try:
        yield leaves
    finally:
        handle.remove()


def _check_run(outputs: Any, leaves: list[Tensor], embedding: nn.Module | None) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"forward_func must return a tensor, got {type(outputs).__name__}. Wrap the model in VideoClassifier, or "
            f"return its logits."
        )
    if len(leaves) != 1:
        raise ValueError(
            f"embedding must run once in a forward, got {len(leaves)} runs of {type(embedding).__name__}. Pass the "
            f"module that embeds all patches in one call, or use where='pixels'."
        )


def _lost(forward_func: Callable[..., Any], inputs: Tensor, extra: Any) -> str:
    leaf = inputs.detach().clone().requires_grad_()
    where = lost_gradient(forward_func, lambda: _run_forward(forward_func, leaf.clone(), None, extra))
    return f" {where}" if where else ""


def _no_gradient(outputs: Tensor, embedding: nn.Module | None) -> str:
    """Return the message for a missing gradient. The usual cause is a softmax at the end of the model."""
    values = outputs.detach().float()
    if values.ndim > 1 and bool((values >= 0).all() and ((values.sum(1) - 1).abs() < 1e-2).all()):
        return (
            f"outputs must be logits or the direct result of a softmax, got probabilities of shape "
            f"{tuple(outputs.shape)} that were computed in another way, such as a mean over views. A softmax is frozen "
            f"like an attention pattern, so no gradient passes it. Remove it from the end of the model, or explain one "
            f"view."
        )
    of = "inputs" if embedding is None else f"output of {type(embedding).__name__}"
    return (
        f"outputs must depend on the {of} through differentiable operations, got outputs without a gradient. Remove "
        f"torch.no_grad(), detach() and a final softmax from the model."
    )


def _patch_embedding(classifier: Any) -> nn.Module:
    family, model = classifier.family, classifier.transformer
    name = getattr(family, "patch_embedding", None)
    if name is None:
        known = "no family" if family is None else f"family {family.name!r} without a patch embedding"
        raise ValueError(
            f"where='tokens' needs the module that embeds the patches, got {type(classifier.module).__name__} of "
            f"{known}. Pass VideoClassifier(..., family=Family(..., patch_embedding='name.of.the.module')), or use "
            f"where='pixels'."
        )
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"patch_embedding of family {family.name!r} must name a module of {type(model).__name__}, got {name!r}. "
            f"Use a name from model.named_modules()."
        ) from None


def _on_grid(contributions: Tensor, batch: int, grid: TokenGrid) -> Tensor:
    """Return the contributions summed over channels, on the grid: ``(B, t, h, w)``."""
    shape = tuple(contributions.shape)
    t, h, w = grid.shape
    if shape[:1] + shape[2:] == (batch, t, h, w):  # (B, D, t, h, w)
        return contributions.sum(1)
    if shape[:1] + shape[2:] == (batch * t, h, w):  # (B * t, D, h, w)
        return contributions.sum(1).unflatten(0, (batch, t))
    if len(shape) == 3 and shape[0] == batch and shape[1] in (grid.num_patches, grid.num_tokens):  # (B, N, D)
        return grid.to_grid(contributions.sum(-1))
    if len(shape) == 3 and shape[:2] == (batch * t, h * w):  # (B * t, h * w, D)
        return contributions.sum(-1).reshape(batch, t, h, w)
    raise ValueError(
        f"the patch embedding must return (B, D, t, h, w), (B * t, D, h, w), (B, N, D) or (B * t, h * w, D), got shape "
        f"{shape} for {batch} clips on {grid}. Name another module in Family(..., patch_embedding=...)."
    )
