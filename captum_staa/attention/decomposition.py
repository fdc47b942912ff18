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

Under :class:`~captum_staa.attention.frozen.FrozenPatterns`, autograd sees every attention pattern, every
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

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from threading import get_ident
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from captum_staa._utils.captum import _format_additional_forward_args, _run_forward
from captum_staa._utils.checks import check_choice
from captum_staa._utils.model_state import eval_mode, frozen_parameters, without_checkpointing, without_compiling
from captum_staa._utils.networks import lost_gradient, networks_of, refuse_missing_backward
from captum_staa._utils.tensors import SPREAD, gaussian
from captum_staa.attention.completeness import ConstantShares, ModuleTrace, Sums, report_missing, rounding
from captum_staa.attention.frozen import FrozenPatterns
from captum_staa.attention.linear_graph import Operation, nonlinear_operations, reaches
from captum_staa.grid import TokenGrid
from captum_staa.models.outputs import LastFunction

__all__ = [
    "Decomposition",
    "FrozenPatterns",
    "class_contrast",
    "decompose",
    "decompose_classifier",
    "relevance_maps",
    "rest_contrast",
]

Score = Callable[[Tensor], Tensor]
Where = Literal["tokens", "pixels"]
Side = Literal["output", "input"]


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
        remainder: 0-d, the part of ``constants``, summed over the batch, that is not the share of constants: rounding,
            unless a warning named the module in which it is lost. The share of constants is computed independently,
            from what each operation adds.
        nonlinear: names of autograd operations that no rule of :class:`FrozenPatterns` made affine.
    """

    contributions: Tensor
    constants: Tensor
    score: Tensor
    outputs: Tensor
    remainder: Tensor
    nonlinear: tuple[str, ...] = ()


def relevance_maps(
    classifier: Any,
    clips: Tensor,
    score: Score,
    additional_forward_args: object = None,
    *,
    pattern_weight: float = 0.0,
) -> tuple[Tensor, Decomposition]:
    """Return the score of a video classifier as a sum of contributions of pixels, for pictures.

    The contribution of a token is spread evenly over its pixels. If the patch embedding of the model is not known,
    pixels are decomposed directly. Then the map is smoothed, because neighboring tokens of one object often have
    opposite signs, and their mean is the contribution of the object. The Gaussian is three quarters as wide as the
    tokens among which most layers attend, which are those of the grid unless the model merges them later. If there is
    no grid, it is as wide as for 8 x 14 x 14 tokens.

    Args:
        classifier, clips, score, additional_forward_args, pattern_weight: as for :func:`decompose_classifier`.

    Returns:
        Maps ``(B, T, H, W)``, and the :class:`Decomposition` before the smoothing. Both have the same sums.
    """
    grid = classifier.grid
    known = grid is not None and getattr(classifier.family, "patch_embedding", None) is not None
    result = decompose_classifier(
        classifier,
        clips,
        score,
        additional_forward_args,
        where="tokens" if known else "pixels",
        pattern_weight=pattern_weight,
    )
    frames, _, height, width = clips.shape[1:]
    maps = result.contributions
    if grid is None or grid.num_patches == 1:
        cell = (frames / 8, height / 14, width / 14)
    else:
        cell = _attended_cell(classifier, grid)
    if known:
        maps = grid.spread(maps, "nearest", (frames, height, width))
    t, h, w = (SPREAD * side for side in cell)
    return gaussian(maps, (t, h, w), keep_sums=True), result


def _attended_cell(classifier: Any, grid: TokenGrid) -> tuple[float, float, float]:
    """Return the sides ``(t, h, w)`` of the queries of half of the layers or more, in pixels.

    Layers of a hierarchy merge tokens. Those of the first stage are often smaller than the objects in a clip, and a
    Gaussian as narrow as them leaves opposite signs within one object.
    """
    layers = [layer for layer in classifier.family.attention(classifier.transformer) if layer.role != "pool"]
    merged = sorted((_merged(layer.rows and layer.rows.query_groups, grid) for layer in layers), key=prod)
    merged = merged or [(1, 1, 1)]
    t, h, w = (side * count for side, count in zip(grid.tubelet, merged[len(merged) // 2], strict=True))
    return t, h, w


def _merged(groups: Tensor | None, grid: TokenGrid) -> tuple[int, ...]:
    """Return how many patches of the grid one token stands for, along each axis."""
    if groups is None:
        return 1, 1, 1
    cells = groups[grid.indices()]  # (t, h, w)
    lines = cells[:, 0, 0], cells[0, :, 0], cells[0, 0, :]
    return tuple(round(len(line) / len(line.unique())) for line in lines)


def decompose_classifier(
    classifier: Any,
    clips: Tensor,
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
        clips: ``(B, T, C, H, W)``, also if the classifier has another layout.
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
    forward = classifier.layout.forward_from_working(classifier)
    with eval_mode(classifier):
        result = decompose(
            forward, clips, score, additional_forward_args, tokens=embedding, pattern_weight=pattern_weight
        )
    if embedding is None:
        return replace(result, contributions=result.contributions.sum(2))
    return replace(result, contributions=_on_grid(result.contributions, len(clips), classifier.grid))


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


def rest_contrast(outputs: Tensor, chosen: Tensor) -> Tensor:
    """Return the target's logit minus the mean of the other logits, weighted by their softmax, ``(B,)``.

    The weights are constants. The gradient is that of the log odds of the target, ``x - log sum exp`` of the others,
    which differ from it by the entropy of the weights, and contributions sum to it exactly.

    Example:
        >>> rest_contrast(torch.tensor([[5.0, 1.0, 1.0]]), torch.tensor([0]))
        tensor([4.])

    Args:
        outputs: logits ``(B, K)`` of several classes.
        chosen: index of the target of each example, ``(B,)``.
    """
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    own = torch.zeros_like(outputs, dtype=torch.bool).scatter(1, chosen.reshape(-1, 1), True)
    weights = outputs.detach().masked_fill(own, -torch.inf).softmax(1)
    return outputs[own] - (weights * outputs).sum(1)


def decompose(
    forward_func: Callable[..., Any],
    inputs: Tensor,
    score: Score,
    additional_forward_args: object = None,
    *,
    tokens: nn.Module | None = None,
    side: Side = "output",
    pattern_weight: float = 0.0,
) -> Decomposition:
    """Return a score of any model as a sum of contributions of its tokens, or of the inputs.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
        >>> result = decompose(model, torch.randn(2, 4), lambda outputs: outputs[:, 0], tokens=model[0])
        >>> result.contributions.shape
        torch.Size([2, 8])
        >>> torch.allclose(result.contributions.sum(1) + result.constants, result.score, atol=1e-6)
        True

    Args:
        forward_func: model or function that returns one row of outputs per example. The parameters of the modules that
            it uses are frozen during the call.
        inputs: ``(B, ...)`` floats.
        score: function from outputs to ``(B,)``, one number per example. It must be linear, otherwise the result is
            approximate. If the outputs are the result of a softmax or a sigmoid, it gets the logits before that.
        additional_forward_args: further positional arguments of ``forward_func``.
        tokens: the submodule whose output, or the first floating-point tensor in it, is decomposed, such as a patch
            embedding. None decomposes the inputs.
        side: ``"input"`` decomposes the first floating-point argument of ``tokens`` instead of its output, for a model
            whose tokens are no output of a module, such as ``tokens=model.blocks[0]``.
        pattern_weight: weight of the effect of each token on attention patterns, as a query and as a key. With 0,
            patterns are constants and the sum is exact. With a positive weight, the effect is added in first order,
            and ``constants`` is the rest of the score. See :class:`FrozenPatterns`.

    Returns:
        :class:`Decomposition`. Its contributions have the shape of the tokens or of the inputs. If ``tokens`` runs
        several times in a forward, as for one frame after the other, they are stacked: ``(B, runs, ...)``.

    Raises:
        ValueError: more than half of the score is neither a contribution nor a share of constants; the outputs do not
            depend on the tokens, as after a softmax; ``tokens`` does not run; or the call is under
            ``torch.inference_mode()``.
        TypeError: the model does not return a tensor, or there is none at ``tokens``.

    Warns:
        UserWarning: a smaller part of the score is missing. The message names the module and the operation.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "decompose needs gradients, got a call under torch.inference_mode(), which forbids them. Call it under "
            "torch.no_grad() instead. Gradients are enabled inside."
        )
    check_choice("side", side, ("output", "input"))
    extra = _format_additional_forward_args(additional_forward_args)
    cut = _Cut(tokens, side)
    mode = FrozenPatterns(pattern_weight, ConstantShares())
    result, sums, _ = _pass(forward_func, inputs, score, extra, cut, mode)
    if abs(sums.remainder) > sums.rounding:
        with ModuleTrace(forward_func) as trace:
            mode = FrozenPatterns(pattern_weight, ConstantShares(trace))
            _, sums, nonlinear = _pass(forward_func, inputs, score, extra, cut, mode)
        remainder = report_missing(sums, trace.missing(nonlinear, sums.score))
        result = replace(result, remainder=result.score.new_tensor(remainder))
    return result


def _pass(
    forward_func: Callable[..., Any], inputs: Tensor, score: Score, extra: Any, cut: _Cut, mode: FrozenPatterns
) -> tuple[Decomposition, Sums, tuple[Operation, ...]]:
    """Run one forward and one backward. Also return the operations without a rule."""
    shares = mode.shares
    assert shares is not None
    source = inputs.detach().clone()  # models may write into their input
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for network in networks_of(forward_func):
            stack.enter_context(frozen_parameters(network))
        stack.enter_context(without_compiling())
        stack.enter_context(without_checkpointing())
        leaves = stack.enter_context(cut.leaves(shares.trace))
        if cut.module is None:
            source = cut.leaf(source, leaves, shares.trace)
        else:
            shares.freeze(source, "the cut at the tokens")
        with mode, LastFunction() as last:
            outputs = _run_forward(forward_func, source, None, extra)
        _check_run(outputs, leaves, cut)
        logits = last.argument(outputs)  # a final softmax is not an attention pattern: what precedes it is decomposed
        scores = score(outputs if logits is None else logits)
        refuse_missing_backward(scores, forward_func, _rerun(forward_func, inputs, extra))
        if not scores.requires_grad or not reaches(scores.grad_fn, *leaves):
            raise ValueError(f"{_no_gradient(outputs, cut)}{_lost(forward_func, inputs, extra)}")
        # under the mode as well, because gradient checkpointing repeats the forward during the backward
        backward = mode.expand(torch.autograd.grad)
        gradients = backward(scores.sum(), leaves, allow_unused=True, materialize_grads=True)
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    parts = [slope.to(wide) * leaf.detach().to(wide) for slope, leaf in zip(gradients, leaves, strict=True)]
    contributions = parts[0] if len(parts) == 1 else torch.stack(parts, 1)
    nonlinear = tuple(nonlinear_operations(scores.grad_fn, *leaves))
    scores = scores.detach()
    total, relevance, constants = float(scores.sum()), float(contributions.sum()), shares.total()
    remainder = total - relevance - constants + shares.through_patterns()
    names = tuple(sorted({operation.name for operation in nonlinear}))
    rest = scores - contributions.reshape(len(scores), -1).sum(1)
    result = Decomposition(contributions, rest, scores, outputs.detach(), scores.new_tensor(remainder), names)
    size = float(contributions.abs().sum()) + shares.size()
    relative = rounding({outputs.dtype, *shares.dtypes}, shares.convolved and outputs.is_cuda)
    sums = Sums(total, relevance, constants, remainder, size * relative)
    return result, sums, nonlinear


class _Cut(NamedTuple):
    """Where a forward is cut: the tokens are the output or the input of a module, or the inputs of the model."""

    module: nn.Module | None
    side: Side

    def leaf(self, value: Tensor, leaves: list[Tensor], trace: ModuleTrace | None) -> Tensor:
        leaves.append(value.detach().requires_grad_())
        # models add position embeddings in place, which autograd forbids for a leaf
        return leaves[-1].clone() if trace is None else trace.take(leaves[-1])

    @contextmanager
    def leaves(self, trace: ModuleTrace | None) -> Iterator[list[Tensor]]:
        """Make the tokens leaves of the graph, in forwards of this thread, and yield the leaves."""
        leaves: list[Tensor] = []
        if self.module is None:
            yield leaves
            return
        thread = get_ident()

        def replaced(module: nn.Module, values: Any) -> Any:
            flat, structure = tree_flatten(values)
            for place, value in enumerate(flat):
                if isinstance(value, Tensor) and value.is_floating_point():
                    flat[place] = self.leaf(value, leaves, trace)
                    return tree_unflatten(flat, structure)
            raise TypeError(
                f"tokens must {'return' if self.side == 'output' else 'take'} a floating-point tensor, got "
                f"{type(values).__name__} without one at {type(module).__name__}. Pass the convolution or linear "
                f"layer inside it."
            )

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return replaced(module, (args, kwargs)) if get_ident() == thread else None

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            return replaced(module, output) if get_ident() == thread else None

        if self.side == "output":
            handle = self.module.register_forward_hook(after)
        else:
            handle = self.module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield leaves
        finally:
            handle.remove()


def _check_run(outputs: Any, leaves: list[Tensor], cut: _Cut) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"forward_func must return a tensor, got {type(outputs).__name__}. Wrap the model in VideoClassifier, or "
            f"return its logits."
        )
    if not leaves or len({leaf.shape for leaf in leaves}) > 1:
        raise ValueError(
            f"tokens must run in a forward, and give tensors of one shape, got {len(leaves)} runs of "
            f"{type(cut.module).__name__} with shapes {[tuple(leaf.shape) for leaf in leaves]}. Pass the module that "
            f"embeds all patches, or decompose the inputs with tokens=None (where='pixels')."
        )


def _rerun(forward_func: Callable[..., Any], inputs: Tensor, extra: Any) -> Callable[[], Any]:
    """Return a function that runs the model again, on inputs that require a gradient."""
    return lambda: _run_forward(forward_func, inputs.detach().clone().requires_grad_().clone(), None, extra)


def _lost(forward_func: Callable[..., Any], inputs: Tensor, extra: Any) -> str:
    where = lost_gradient(forward_func, _rerun(forward_func, inputs, extra))
    return f" {where}" if where else ""


def _no_gradient(outputs: Tensor, cut: _Cut) -> str:
    """Return the message for a missing gradient. The usual cause is a softmax at the end of the model."""
    values = outputs.detach().float()
    if values.ndim > 1 and bool((values >= 0).all() and ((values.sum(1) - 1).abs() < 1e-2).all()):
        return (
            f"outputs must be logits or the direct result of a softmax, got probabilities of shape "
            f"{tuple(outputs.shape)} that were computed in another way, such as a mean over views. A softmax is frozen "
            f"like an attention pattern, so no gradient passes it. Remove it from the end of the model, or explain one "
            f"view."
        )
    of = "inputs" if cut.module is None else f"{cut.side} of {type(cut.module).__name__}"
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
    if shape[:2] + shape[3:] == (batch, t, h, w):  # (B, t, D, h, w), of one run per step
        return contributions.sum(2)
    if len(shape) == 3 and shape[0] == batch and shape[1] in (grid.num_patches, grid.num_tokens):  # (B, N, D)
        return grid.to_grid(contributions.sum(-1))
    if prod(shape[:-1]) == batch * t * h * w and (shape[-2] == h * w or shape[-3:-1] == (h, w)):
        return contributions.sum(-1).reshape(batch, t, h, w)  # (B * t, h * w, D), (B, t, h, w, D) and the like
    raise ValueError(
        f"the patch embedding must return (B, D, t, h, w), (B * t, D, h, w), (B, N, D), (B * t, h * w, D) or "
        f"(B, t, h, w, D), got shape {shape} for {batch} clips on {grid}. Name another module in Family(..., "
        f"patch_embedding=...)."
    )
