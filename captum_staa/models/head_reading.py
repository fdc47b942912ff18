"""Which attention results and tokens the outputs of a model depend on, and what its head reads of the last tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_staa._utils.model_state import frozen_parameters, uncompiled, without_compiling
from captum_staa.models.attention_watch import Tokens, Watch
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.families import Pooling
from captum_staa.models.probing import Fold, Probe, nothing


@dataclass(frozen=True)
class ForwardGraph:
    """The autograd graph of a forward in which the results of attention are leaves.

    Attributes:
        reached: attention results that the outputs depend on directly.
        ancestors: those that each attention depends on directly.
        used: all that the outputs depend on, in order; all of the model if there are no gradients.
        tails: tensors of tokens behind the last attention, by their number.
        gradients: the gradients of the outputs with respect to them, in one random direction of the outputs.
        of_results: the same with respect to each attention result; None where the outputs do not depend on it.
        scores: the outputs, detached.
        differentiable: whether the outputs have a gradient.
    """

    reached: set[int]
    ancestors: list[set[int]]
    used: list[int]
    tails: dict[int, Tokens]
    gradients: dict[int, Tensor]
    of_results: Sequence[Any]
    scores: Tensor
    differentiable: bool
    _place: dict[int, int]
    _outputs: Any
    _sources: list[Any]
    _embeddings: list[Any]

    @classmethod
    def of(cls, probe: Probe) -> ForwardGraph:
        """Run a forward, and follow its graph."""
        watch = Watch(replace=nothing, tail=probe.tail)
        with torch.enable_grad():
            outputs = probe.forward(probe.clip.clone().requires_grad_(), watch)
            seen = watch.attention
            place = {id(each.result): number for number, each in enumerate(seen)}
            asked = [[each.values.made_by, each.queries.made_by if each.queries else None] for each in seen]
            ancestors = [_leaves(nodes, place) for nodes in asked]
            scores = outputs.detach().float()
            if not outputs.requires_grad:
                return cls(set(), ancestors, list(range(len(seen))), {}, {}, (), scores, False, place, None, [], [])
            tails = {n: tokens for n, tokens in enumerate(watch.after) if tokens.tensor is not None}
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(outputs.shape, generator=generator).to(outputs.device)
            tensors: Any = [tokens.tensor for tokens in tails.values()] + [each.result for each in seen]
            found: Any = torch.autograd.grad((outputs.float() * weights).sum(), tensors, allow_unused=True)
        gradients = {n: gradient for n, gradient in zip(tails, found, strict=False) if gradient is not None}
        reached = _leaves([outputs.grad_fn], place)
        used, new = set(), set(reached)
        while new:
            used |= new
            new = set().union(*(ancestors[number] for number in new)) - used
        sources = [outputs.grad_fn, *(node for nodes in asked for node in nodes)]
        embeddings = [None if tokens.tensor is None else tokens.tensor.grad_fn for tokens in watch.before]
        tails = {n: tails[n] for n in gradients}
        results = found[len(found) - len(seen) :]
        return cls(
            reached,
            ancestors,
            sorted(used),
            tails,
            gradients,
            results,
            scores,
            True,
            place,
            outputs.grad_fn,
            sources,
            embeddings,
        )

    def is_gate(self, number: int) -> bool:
        """Whether the outputs depend on the pixels through a tensor before the first attention alone."""
        gate = self._embeddings[number] if number < len(self._embeddings) else None
        return gate is not None and not _leaves(self._sources, self._place, gate, other=True)

    def has_way_around(self, place: int) -> bool:
        """Whether the outputs depend on attention other than through a tensor of tokens behind the last one."""
        return bool(_leaves([self._outputs], self._place, self.tails[place].tensor.grad_fn))  # type: ignore[union-attr]

    def head_weights(self, place: int, axis: str) -> Tensor | None:
        """Return the weight of each token in the head, ``(n,)``, or None if it is no fixed weighted mean of tokens.

        It is one if the gradient with respect to the tokens has rank one.

        Args:
            place: number of the tensor of tokens.
            axis: ``"last"`` or ``"second"``, the axis of its features.
        """
        gradient = self.gradients[place].float().movedim(-1 if axis == "last" else 1, -1)
        left, values, _ = torch.linalg.svd(gradient.flatten(0, -2).cpu(), full_matrices=False)  # of (n, D)
        weights = left[:, 0] / left[:, 0].sum()
        linear = float(values[1:].norm()) <= 1e-2 * float(values[0]) and bool(weights.isfinite().all())
        if not linear or float(weights.min()) < -1e-3:
            return None
        return weights.clamp(min=0) * (weights > 1e-4 * weights.max())

    def reads_evenly(self, number: int, group: Tensor, fold: Fold) -> bool:
        """Whether the outputs depend equally on all results of an attention, such as one per frame.

        Args:
            number: of the attention.
            group: ``(L1,)``, the row of each leading entry.
            fold: where the examples are in its results.
        """
        gradient = fold.split(self.of_results[number])[0].float().cpu()
        rows = [gradient[group == row].movedim(0, 1).flatten(1) for row in range(int(group.max()) + 1)]
        matrix = torch.cat(rows)  # (R * Q, copies * d)
        return float((matrix - matrix.mean(0)).norm()) <= 1e-2 * float(matrix.norm())


def named(weights: Tensor) -> Pooling:
    """Return weights of tokens by their name, if they have one."""
    if float((weights - weights.mean()).abs().max()) < 1e-3 * float(weights.mean()):
        return "mean"
    return "cls" if weights[0] > 0.999 else weights


@dataclass(frozen=True)
class TokenGradients:
    """What a head reads of the last tokens, if that depends on the clip: the size of the gradient of the outputs.

    Args:
        attention: number of attention computations in a forward.
        place: number of the tensor of tokens behind the last of them.
        axis: ``"last"`` or ``"second"``, the axis of its features.
        fold: where the examples are in it.
        tokens: the number of each of its tokens.
        shares: ``(n, N)``, the share of each of its tokens in those of the sequence.
    """

    attention: int
    place: int
    axis: str
    fold: Fold
    tokens: Tensor
    shares: Tensor | None = None

    def __call__(self, classifier: VideoClassifier, clip: Tensor, *args: Any) -> Tensor:
        """Return the weight of each token of the sequence, ``(B, N)``: a forward, with gradients in the head alone."""
        assert self.shares is not None
        watch = Watch(tail=self.attention, open_tail=True)
        squares: Any = 0
        with torch.inference_mode(False), torch.no_grad(), frozen_parameters(classifier), without_compiling():
            with watch.watching(uncompiled(classifier.module)):
                outputs: Any = classifier(clip.clone(), *args)
            tokens: Any = watch.after[self.place].tensor
            count = outputs[0].numel()
            for direction in torch.eye(count) if count <= _DIRECTIONS else _signs(count):
                with torch.enable_grad():
                    score = (outputs.flatten(1).float() * direction.to(outputs.device)).sum()
                (gradient,) = torch.autograd.grad(score, tokens, retain_graph=True)
                gradient = gradient.float().movedim(-1 if self.axis == "last" else 1, -1)
                squares = squares + gradient.square().sum(-1).flatten()
        sizes = self.fold.split(squares).sqrt()  # (B, n)
        return sizes / sizes.sum(1, keepdim=True) @ self.shares.to(sizes)


_DIRECTIONS = 8  # in the space of outputs in which gradients are taken; the mean of random ones is that of all


def _signs(count: int) -> Tensor:
    return torch.randint(0, 2, (_DIRECTIONS, count), generator=torch.Generator().manual_seed(0)) * 2.0 - 1


def _leaves(nodes: Sequence[Any], place: dict[int, int], stop: Any = None, other: bool = False) -> set[int]:
    """Return the numbers of the leaves below nodes of the autograd graph, on paths that do not pass ``stop``.

    Args:
        nodes: where to begin.
        place: number of each leaf by its id.
        stop: a node that ends a path.
        other: whether to return -1 for other leaves, such as the clip, instead.
    """
    found, seen, stack = set(), set(), [node for node in nodes if node is not None]
    while stack:
        node = stack.pop()
        if node in seen or node == stop:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            number = place.get(id(node.variable), -1)
            if (number < 0) == other:
                found.add(number)
        stack += [following for following, _ in node.next_functions if following is not None]
    return found
