"""Answers of a model, by what its outputs are: one class, labels, or scores. What they cost, and how they change."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.tensors import wide
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.outputs import decision_values, sums_to_one

Rule = Literal["one class", "labels", "scores"]


def rule_of(model: VideoClassifier) -> Rule:
    """Return whether one class is right, each label may be right, or the outputs are scores."""
    if model.output == "score":
        return "scores"
    return "one class" if model.exclusive else "labels"


def as_logits(outputs: Tensor, model: VideoClassifier) -> Tensor:
    """Return outputs ``(B, K)`` as logits, or scores as they are.

    Probabilities become their logarithms if one class is right, otherwise log odds. Heads that end in a softmax or a
    sigmoid in eval mode only, as those of PySlowFast, return logits in train mode: they are not probabilities then.
    """
    if model.output == "probabilities":
        rows = outputs.detach()
        if not (sums_to_one(rows) if model.exclusive else bool(((rows >= 0) & (rows <= 1)).all())):
            return wide(outputs)
    return decision_values(outputs, model.output)


def answer_loss(logits: Tensor, targets: Tensor, rule: Rule) -> Tensor:
    """Return cross entropy, the mean binary cross entropy of all labels, or the mean squared error of scores.

    Example:
        >>> answer_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]]), "labels")  # log 2
        tensor(0.6931)

    Args:
        logits: ``(B, K)`` from :func:`as_logits`, or of a branch.
        targets: ``(B,)`` classes or ``(B, K)`` probabilities for one class; ``(B, K)`` from 0 to 1 for labels; and
            ``(B, K)`` numbers for scores. ``(B,)`` is enough for one label or score.
        rule: what the model's outputs are.

    Raises:
        ValueError: targets do not fit the outputs.
    """
    if rule == "one class":
        return F.cross_entropy(logits, targets)
    shape = tuple(logits.shape)
    if targets.numel() != logits.numel() or len(targets) != len(logits):
        what = "the probability of each label, from 0 to 1" if rule == "labels" else "a number for each score"
        raise ValueError(
            f"targets must have the shape {shape} of the outputs, {what}, got shape {tuple(targets.shape)}. If exactly "
            f"one class is right, pass VideoClassifier(..., output='logits')."
        )
    targets = targets.reshape(shape).to(logits)
    if rule == "scores":
        return F.mse_loss(logits, targets)
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError(
            f"targets must be probabilities of labels, from 0 to 1, got values from {targets.min():.4g} to "
            f"{targets.max():.4g}. Pass VideoClassifier(..., output='score') for a regression."
        )
    return F.binary_cross_entropy_with_logits(logits, targets)


def distance_from(logits: Tensor, nothing: Tensor, rule: Rule) -> Tensor:
    """Return how far answers are from no answer: a divergence of probabilities, or a squared difference of scores.

    Args:
        logits: ``(B, K)``, the answers.
        nothing: ``(B, K)``, those without evidence. If one class is right, all classes are then equally likely, and
            this argument is not used.
        rule: what the model's outputs are.
    """
    if rule == "one class":
        return -logits.float().log_softmax(1).mean() - math.log(logits.shape[1])
    if rule == "scores":
        return F.mse_loss(logits, nothing)
    chances = nothing.sigmoid()
    cost = F.binary_cross_entropy_with_logits
    return cost(logits, chances) - cost(nothing, chances)


def decision_loss(logits: Tensor, whole: Tensor, nothing: Tensor, rule: Rule) -> Tensor:
    """Return the cost of answers that should be those for the whole clip.

    Args:
        logits: ``(B, K)``, answers for a part of the clip.
        whole: ``(B, K)``, those for the whole clip, which decide what is right.
        nothing: ``(B, K)``, those for no clip, which set the scale of scores.
        rule: what the model's outputs are.
    """
    if rule == "one class":
        return F.cross_entropy(logits, whole.argmax(1))
    if rule == "labels":
        return F.softplus(-logits * _signs(whole)).mean()
    return F.mse_loss(logits, whole) / _scale(whole, nothing)


def leftover(logits: Tensor, whole: Tensor, nothing: Tensor, rule: Rule) -> Tensor:
    """Return the cost of a decision that is still there: its log odds above those without the clip.

    Lower odds than those without the clip cost nothing, because they would be evidence for another class.

    Args:
        logits: ``(B, K)``, answers for what is left of the clip.
        whole, nothing, rule: as in :func:`decision_loss`.
    """
    if rule == "one class":
        decision = whole.argmax(1)
        return F.softplus(_log_odds(logits, decision) - _log_odds(nothing, decision)).mean()
    if rule == "labels":
        return F.softplus((logits - nothing) * _signs(whole)).mean()
    return F.mse_loss(logits, nothing) / _scale(whole, nothing)


def chances(logits: Tensor, rule: Rule) -> Tensor:
    """Return the probability of each class or label; scores as they are."""
    if rule == "scores":
        return logits
    return logits.softmax(1) if rule == "one class" else logits.sigmoid()


def change(before: Tensor, after: Tensor, rule: Rule) -> Tensor:
    """Return the absolute change of :func:`chances`; that of scores relative to their mean absolute value."""
    changed = (after - before).abs()
    return changed / before.abs().mean().clamp(min=torch.finfo(before.dtype).tiny) if rule == "scores" else changed


def _signs(logits: Tensor) -> Tensor:
    """Return 1 for each label that is more likely than not, otherwise -1."""
    return torch.where(logits > 0, 1.0, -1.0).to(logits)


def _scale(whole: Tensor, nothing: Tensor) -> Tensor:
    """Return the mean squared effect of the clips on the scores, so that a cost has no unit."""
    return F.mse_loss(whole, nothing).clamp(min=torch.finfo(whole.dtype).tiny)


def _log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of the target of each clip, ``(B,)``."""
    wanted = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return wanted - others.logsumexp(1)
