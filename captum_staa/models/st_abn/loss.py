"""Losses of an ST-ABN: classification by both heads, gates that are small and hide nothing, or masking of the clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from captum_staa._utils.checks import check_choice
from captum_staa._utils.model_state import eval_mode, frozen_parameters
from captum_staa.models.layers import to_pixels
from captum_staa.models.st_abn.answers import (
    Rule,
    answer_loss,
    as_logits,
    decision_loss,
    distance_from,
    leftover,
    rule_of,
)
from captum_staa.models.st_abn.branch import Gates
from captum_staa.models.st_abn.network import STABN

Preset = Literal["paper", "adapter", "posthoc", "edit", "faithful"]
# Modules that each preset trains: all of the network, or only the added ones.
TRAINS = {"paper": "all", "adapter": "added", "posthoc": "added", "edit": "all", "faithful": "all"}
FRAMES = 0.2  # weight of the temporal gates' own mean in the area of "faithful", beside that of M alpha
# Factors of the terms of "faithful" at parts of a training, linear in between. Gates that close at once learn nothing.
# If hiding something counts much while the gates are open, they stay open: what is left of almost open gates is the
# whole clip, only fainter. If it counts nothing while they close, they become a code for the class, which the branch
# knows. At the end, a lower price of the area and a higher one of hiding open the gates for the rest of the evidence.
PARTS = [0.05, 0.3, 0.4, 0.55, 0.75]
FACTORS = {"area": [0.0, 4.0, 4.0, 2.0, 1.0], "removed": [0.0, 1 / 3, 1 / 3, 1.0, 1.0]}


@dataclass(frozen=True)
class STABNLoss:
    """Loss of an ST-ABN on a batch, as a sum of named terms.

    The classification terms follow what the outputs of the model are (:attr:`VideoClassifier.output`): cross entropy of
    logits or of probabilities that sum to 1, the mean binary cross entropy of independent labels, and the mean squared
    error of scores, which should have a standard deviation of about 1.

    Example:
        >>> st_abn = STABN(num_classes=4)
        >>> clips, targets = torch.rand(2, 3, 16, 48, 48), torch.tensor([0, 3])
        >>> sorted(STABNLoss("paper").terms(st_abn, clips, targets))
        ['attention', 'perception']
        >>> STABNLoss("paper")(st_abn, clips, targets).backward()

    Args:
        preset: one of

            - ``"paper"``: cross entropy of the outputs of branch and model. All parameters are trained.
            - ``"adapter"``: the same loss, but the model is frozen and only the added modules are trained.
            - ``"posthoc"``: the model is frozen and its outputs do not change. The gates learn to mask the clip. The
              part of the clip kept by M alpha, and the frames kept by alpha, must preserve the model's decision. The
              removed part must not preserve it: the odds of the decision must fall to those of the baseline. The gates
              must be small and smooth.
            - ``"edit"``: the paper's loss plus the distance to gates edited by a person. Pass ``temporal=`` or
              ``spatial=``. Cells where they are nan are left as they are, so a batch may mix clips with and without
              edited gates. For a bottleneck, ``"area"`` is added, but not ``"removed"``: a person may close what says
              something about the class, such as a background that only goes with it.
            - ``"faithful"``: for ``mechanism="bottleneck"``. The network must classify what the gates let through, and
              the gates must be small. What they close must say nothing about the class; only the gates learn from this
              term. All parameters are trained, or, in an injected model, all behind the layer.
        baseline: for ``"posthoc"``: function from clips to what replaces the pixels whose gates are closed, of the
            same shape, such as a blur; None uses zeros.
        area: for ``"posthoc"``, ``"faithful"``, and ``"edit"`` of a bottleneck: weight of the mean of the gates, at
            least 0. A training with ``"faithful"`` begins without it, then raises it to four times this weight.
        removed: for ``"faithful"``: weight of the information about the class in what the gates close, at least 0.
        smoothness: for ``"posthoc"``: weight of the total variation of the gates, at least 0.
        edit: for ``"edit"``: weight of the mean squared distance to the edited gates, at least 0.

    Raises:
        ValueError: the preset is unknown, or a weight is negative.

    Reference:
        ``"paper"``: Mitsuhara et al., arXiv 2110.15574. ``"edit"``: Mitsuhara et al., "Embedding Human Knowledge into
        Deep Neural Network via Attention Map", arXiv 1905.03540. ``"posthoc"``: the gates as the masker of Dabkowski
        and Gal, "Real Time Image Saliency for Black Box Classifiers", NeurIPS 2017.
    """

    preset: Preset = "paper"
    baseline: Callable[[Tensor], Tensor] | None = None
    area: float = 1.0
    smoothness: float = 0.1
    edit: float = 10.0
    removed: float = 3.0

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, TRAINS)
        for name in ("area", "smoothness", "edit", "removed"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"{name} must be a number of at least 0, got {getattr(self, name)!r}. Pass 0 to leave the term out."
                )

    def __call__(
        self,
        st_abn: STABN,
        clips: Tensor,
        targets: Tensor,
        temporal: Tensor | None = None,
        spatial: Tensor | None = None,
    ) -> Tensor:
        """Return the sum of :meth:`terms`."""
        return torch.stack(list(self.terms(st_abn, clips, targets, temporal, spatial).values())).sum()

    def terms(
        self,
        st_abn: STABN,
        clips: Tensor,
        targets: Tensor,
        temporal: Tensor | None = None,
        spatial: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the weighted terms by name, each a scalar tensor.

        Args:
            st_abn: the network.
            clips: clips in the network's layout.
            targets: ``(B,)`` classes or ``(B, K)`` probabilities; for labels and scores ``(B, K)``, or ``(B,)`` if
                K is 1. Not used by ``"posthoc"``.
            temporal: for ``"edit"``: edited gates of the layer's steps, ``(B, t)``.
            spatial: for ``"edit"``: edited gates of the layer's cells, ``(B, t, h, w)``.

        Returns:
            ``"perception"`` and ``"attention"``, the classification loss of model and branch; for ``"faithful"`` also
            ``"removed"`` and ``"area"``; for ``"edit"`` also ``"edit"``, and ``"area"`` for a bottleneck. For
            ``"posthoc"``, ``"kept"``, ``"removed"``, ``"area"`` and ``"smoothness"``.

        Raises:
            ValueError: edited gates are missing, have another shape, or do not fit the preset; the preset does not
                fit the mechanism or the number of classes; or targets do not fit the outputs.
        """
        if self.preset != "edit" and (temporal is not None or spatial is not None):
            raise ValueError(
                f"temporal and spatial must be None with preset={self.preset!r}, got edited gates. Use preset='edit', "
                f"or leave them out."
            )
        if self.preset == "posthoc":
            return self._masking(st_abn, clips)
        bottleneck = st_abn.config.mechanism == "bottleneck"
        if self.preset == "faithful" and not bottleneck:
            raise ValueError(
                f"preset='faithful' needs mechanism='bottleneck', got mechanism={st_abn.config.mechanism!r}, with "
                f"which the network also receives what the gates close. Use STABN.inject(model, layer, "
                f"mechanism='bottleneck')."
            )
        faithful = bottleneck and self.preset in ("faithful", "edit")
        outputs, gates = st_abn.forward_with_gates(clips, front_detached=faithful and st_abn.injected)
        logits, rule = as_logits(outputs, st_abn.model), rule_of(st_abn.model)
        if faithful:
            _check_classes(logits, self.preset, rule)
        terms = {
            "perception": answer_loss(logits, targets, rule),
            "attention": answer_loss(gates.logits, targets, rule),
        }
        if self.preset == "faithful":
            terms["removed"] = self.removed * self._hidden(st_abn, clips, gates, rule)
        if faithful:
            joint = gates.spatial * gates.temporal
            terms["area"] = self.area * (joint.mean() + FRAMES * gates.temporal.mean())
        if self.preset == "edit":
            terms["edit"] = self.edit * _distance(gates, temporal, spatial)
        return terms

    def weights_at(self, progress: float) -> dict[str, float]:
        """Return factors of the terms at ``progress`` from 0 to 1 of a training; terms that are not named have 1."""
        factors = FACTORS if self.preset == "faithful" else {}
        return {name: float(np.interp(progress, PARTS, values)) for name, values in factors.items()}

    def _hidden(self, st_abn: STABN, clips: Tensor, gates: Gates, rule: Rule) -> Tensor:
        """Return how much the network knows from what the gates close: the distance of its answer from no answer."""
        # The rest of the network must not learn to ignore what is closed, so only the gates learn from this forward.
        with eval_mode(st_abn), frozen_parameters(st_abn):

            def answer(cells: Tensor) -> Tensor:
                given = replace(gates, spatial=cells, temporal=torch.ones_like(gates.temporal))
                return as_logits(st_abn.forward_with_gates(clips, given=given)[0], st_abn.model)

            closed = answer(1 - gates.spatial * gates.temporal)
            if rule == "one class":
                return distance_from(closed, closed, rule)
            with torch.no_grad():
                nothing = answer(torch.zeros_like(gates.spatial))
            return distance_from(closed, nothing, rule)

    def _masking(self, st_abn: STABN, clips: Tensor) -> dict[str, Tensor]:
        if st_abn.config.mechanism != "observe":
            raise ValueError(
                f"preset='posthoc' needs a branch that does not change the outputs, got "
                f"mechanism={st_abn.config.mechanism!r}. Use STABN.inject(model, layer, "
                f"config=BranchConfig(mechanism='observe'))."
            )
        outputs, gates = st_abn.forward_with_gates(clips)
        whole, rule = as_logits(outputs, st_abn.model).detach(), rule_of(st_abn.model)
        _check_classes(whole, self.preset, rule)
        joint, steps = (gates.spatial * gates.temporal)[:, 0], gates.temporal.expand_as(gates.spatial)[:, 0]
        baseline = torch.zeros_like(clips) if self.baseline is None else self.baseline(clips)
        size = st_abn.layout.extent(clips)
        inputs = []
        for cells in (joint, steps):
            mask = st_abn.layout.from_working(to_pixels(cells.float(), size, st_abn.grid)[:, :, None]).to(clips)
            inputs += [baseline.lerp(clips, mask), clips.lerp(baseline, mask)]
        with st_abn.branch_disabled():
            *parts, nothing = as_logits(st_abn.model(torch.cat([*inputs, baseline])), st_abn.model).float().chunk(5)
        whole, nothing = whole.float(), nothing.detach()
        kept = [decision_loss(part, whole, nothing, rule) for part in parts[::2]]
        removed = [leftover(part, whole, nothing, rule) for part in parts[1::2]]
        variation = sum((joint.diff(dim=axis).abs().mean() for axis in (1, 2, 3)), steps.diff(dim=1).abs().mean())
        return {
            "kept": torch.stack(kept).mean(),
            "removed": torch.stack(removed).mean(),
            "area": self.area * (joint.mean() + steps.mean()),
            "smoothness": self.smoothness * variation,
        }


def _check_classes(logits: Tensor, preset: Preset, rule: Rule) -> None:
    if rule == "one class" and logits.shape[1] < 2:
        raise ValueError(
            f"preset={preset!r} needs at least two classes, got logits of shape {tuple(logits.shape)}. Add an output "
            f"for the other class, or pass VideoClassifier(..., output='sigmoid') for a yes-no question."
        )


def trained_modules(st_abn: STABN, preset: Preset) -> list[nn.Module]:
    """Return the modules whose parameters a preset trains."""
    return [st_abn] if TRAINS[preset] == "all" else [st_abn.branch, st_abn.mechanism]


def _distance(gates: Gates, temporal: Tensor | None, spatial: Tensor | None) -> Tensor:
    pairs = [
        (gate.flatten(1), edited)
        for gate, edited in ((gates.temporal, temporal), (gates.spatial, spatial))
        if edited is not None
    ]
    if not pairs:
        raise ValueError(
            "temporal or spatial must be given with preset='edit', got neither. Pass edited gates: temporal= of shape "
            "(B, t), or spatial= of shape (B, t, h, w)."
        )
    for gate, edited in pairs:
        if gate.shape != edited.flatten(1).shape:
            raise ValueError(
                f"edited gates, flattened per clip, must have the shape {tuple(gate.shape)} of the layer's gates, got "
                f"shape {tuple(edited.shape)}. See st_abn.explain(clip).gates for the shape."
            )
    return torch.stack([_squared(gate, edited.flatten(1).to(gate)) for gate, edited in pairs]).sum()


def _squared(gate: Tensor, edited: Tensor) -> Tensor:
    """Return the mean squared difference where ``edited`` is not nan, 0 if it is nan everywhere."""
    known = ~edited.isnan()
    difference = torch.where(known, gate - edited.nan_to_num(), 0)
    return difference.square().sum() / known.sum().clamp(min=1)
