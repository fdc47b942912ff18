"""Slow reference implementation of AttentionBranch: the model without its branch, and the formulas of the branch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import slow_st_abn
import torch
from torch import Tensor, nn

from .models import Case, Tensors
from .oracles import drawn, spread


@dataclass
class _Run:
    """A forward with the reference branch: the gates of every cell ``(B, t, h, w)``, as leaves, and the logits."""

    branch: nn.Module
    logits: Tensor
    spatial: Tensor
    temporal: Tensor
    evidence: Tensor


def _run(case: Case) -> _Run:
    model = copy.deepcopy(case.model)
    model.remove()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def by_hand(_: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        g = slow_st_abn.to_cells(first, model.grid)
        gates = slow_st_abn.gates(model.branch, g)
        spatial = gates.spatial.detach().requires_grad_()
        temporal = gates.temporal[..., None, None].expand_as(spatial).detach().clone().requires_grad_()
        seen.append((spatial, temporal, gates.evidence.detach()))
        gated = slow_st_abn.mechanism(model.mechanism, model.config.mechanism, g, spatial, temporal)
        gated = slow_st_abn.from_cells(gated, first, model.grid)
        return (gated, *output[1:]) if isinstance(output, tuple) else gated

    layer = next(module for name, module in model.model.named_modules() if name.endswith(model.layer))
    layer.register_forward_hook(by_hand, prepend=True)  # user hooks run after the branch
    with torch.enable_grad():
        logits = model.model(case.inputs[0].detach().clone())
    return _Run(model.branch, logits, *seen[0])


def gate(case: Case, **_: Any) -> Tensors:
    """Return M alpha, normalized to a sum of 1 per clip."""
    run = _run(case)
    maps = drawn(case, (run.spatial * run.temporal).detach())
    return spread(case, torch.stack([clip / clip.sum() for clip in maps]))


def grad_gate(case: Case, **_: Any) -> Tensors:
    """Return every gate of every cell, times the gradient of the target's logit."""
    run = _run(case)
    score = sum(run.logits[i, target] for i, target in enumerate(case.target))
    slopes = torch.autograd.grad(score, (run.spatial, run.temporal))
    maps = [gate.detach() * slope for gate, slope in zip((run.spatial, run.temporal), slopes, strict=True)]
    return spread(case, drawn(case, maps[0] + maps[1]))


def class_map(case: Case, **_: Any) -> Tensors:
    """Return the evidence of every map and cell times its weight in the head, whose rows run over steps first."""
    run = _run(case)
    weight, maps = run.branch.classify.weight.detach(), torch.zeros_like(run.spatial.detach())
    count, steps, height, width = run.evidence.shape[1:]
    assert steps == run.branch.steps
    for i, target in enumerate(case.target):
        for k in range(count):
            for t in range(steps):
                maps[i, t] += run.evidence[i, k, t] * weight[target, k * steps + t] / (height * width)
    return spread(case, drawn(case, maps))
