"""AttentionBranch once more: the model without its branch, and the branch's formulas by hand where it stood."""

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
    """A forward by hand: the gates of every cell ``(B, t, h, w)``, as leaves, and what the model answers to them."""

    branch: nn.Module
    logits: Tensor
    spatial: Tensor
    temporal: Tensor
    evidence: Tensor


def _run(case: Case) -> _Run:
    own = copy.deepcopy(case.model)
    own.remove()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def by_hand(_: nn.Module, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        g = slow_st_abn.to_cells(first, own.grid)
        gates = slow_st_abn.gates(own.branch, g)
        spatial = gates.spatial.detach().requires_grad_()
        temporal = gates.temporal[..., None, None].expand_as(spatial).detach().clone().requires_grad_()
        seen.append((spatial, temporal, gates.evidence.detach()))
        onward = slow_st_abn.mechanism(own.mechanism, own.config.mechanism, g, spatial, temporal)
        onward = slow_st_abn.from_cells(onward, first, own.grid)
        return (onward, *output[1:]) if isinstance(output, tuple) else onward

    layer = next(module for name, module in own.model.named_modules() if name.endswith(own.config.layer))
    layer.register_forward_hook(by_hand, prepend=True)  # hooks of the owner come after the branch
    with torch.enable_grad():
        logits = own.model(case.inputs[0].detach().clone())
    return _Run(own.branch, logits, *seen[0])


def gate(case: Case, **_: Any) -> Tensors:
    """M alpha, of which a clip has one in all."""
    run = _run(case)
    maps = drawn(case, (run.spatial * run.temporal).detach())
    return spread(case, torch.stack([clip / clip.sum() for clip in maps]))


def grad_gate(case: Case, **_: Any) -> Tensors:
    """Every gate of every cell, times how fast the target's logit grows with it."""
    run = _run(case)
    score = sum(run.logits[i, target] for i, target in enumerate(case.target))
    slopes = torch.autograd.grad(score, (run.spatial, run.temporal))
    maps = [gate.detach() * slope for gate, slope in zip((run.spatial, run.temporal), slopes, strict=True)]
    return spread(case, drawn(case, maps[0] + maps[1]))


def class_map(case: Case, **_: Any) -> Tensors:
    """Evidence of every map and cell times its weight in the head, whose rows run over steps first; no gradient."""
    run = _run(case)
    weight, maps = run.branch.classify.weight.detach(), torch.zeros_like(run.spatial.detach())
    count, steps, height, width = run.evidence.shape[1:]
    assert steps == run.branch.steps
    for i, target in enumerate(case.target):
        for k in range(count):
            for t in range(steps):
                maps[i, t] += run.evidence[i, k, t] * weight[target, k * steps + t] / (height * width)
    return spread(case, drawn(case, maps))
