"""What an ST-ABN is trained for: answers of both heads, gates as a person edited them, or masks that keep an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_staa._utils.checks import check_choice
from captum_staa.models.layers import to_pixels
from captum_staa.models.st_abn.branch import Gates
from captum_staa.models.st_abn.network import STABN

Preset = Literal["paper", "adapter", "posthoc", "edit"]
# What each preset trains: all of the network, or what was added to it.
TRAINS = {"paper": "all", "adapter": "added", "posthoc": "added", "edit": "all"}


@dataclass(frozen=True)
class STABNLoss:
    """The loss of an ST-ABN on a batch, as a sum of named terms.

    Example:
        >>> st_abn = STABN(num_classes=4)
        >>> clips, targets = torch.rand(2, 3, 16, 48, 48), torch.tensor([0, 3])
        >>> sorted(STABNLoss("paper").terms(st_abn, clips, targets))
        ['attention', 'perception']
        >>> STABNLoss("paper")(st_abn, clips, targets).backward()

    Args:
        preset: one of

            - ``"paper"``: cross entropy of the branch's own answer and of the model's; all is trained.
            - ``"adapter"``: the same, but the model is frozen and only what was added learns.
            - ``"posthoc"``: the model is frozen and its answers are nobody's business but its own. Gates learn to mask
              the clip: what M alpha shows, and what alpha alone shows (whole frames), must keep the model's decision;
              what they hide must not (its odds against what nothing shown gives); and they must be small and smooth.
            - ``"edit"``: the paper's, and gates near those that a person drew: pass ``temporal=`` or ``spatial=``.
        cover: for ``"posthoc"``: from clips to what is shown where a gate is closed, such as a blur; None shows zeros.
        area: for ``"posthoc"``: weight of the gates' means.
        smoothness: for ``"posthoc"``: weight of their total variation.
        edit: for ``"edit"``: weight of the mean squared distance to the edited gates.

    Raises:
        ValueError: an unknown preset, a negative weight, or a preset that does not fit the mechanism.

    Reference:
        ``"paper"``: Mitsuhara et al., arXiv 2110.15574. ``"edit"``: Mitsuhara et al., "Embedding Human Knowledge into
        Deep Neural Network via Attention Map", arXiv 1905.03540. ``"posthoc"``: the gates as the masker of Dabkowski
        and Gal, "Real Time Image Saliency for Black Box Classifiers", NeurIPS 2017.
    """

    preset: Preset = "paper"
    cover: Callable[[Tensor], Tensor] | None = None
    area: float = 1.0
    smoothness: float = 0.1
    edit: float = 10.0

    def __post_init__(self) -> None:
        check_choice("preset", self.preset, TRAINS)
        for name in ("area", "smoothness", "edit"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} weighs a term and is at least 0, got {getattr(self, name)!r}")

    def __call__(
        self,
        st_abn: STABN,
        clips: Tensor,
        targets: Tensor,
        temporal: Tensor | None = None,
        spatial: Tensor | None = None,
    ) -> Tensor:
        """The sum of :meth:`terms`."""
        return torch.stack(list(self.terms(st_abn, clips, targets, temporal, spatial).values())).sum()

    def terms(
        self,
        st_abn: STABN,
        clips: Tensor,
        targets: Tensor,
        temporal: Tensor | None = None,
        spatial: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted terms by name, each a scalar.

        Args:
            st_abn: the network.
            clips: in its layout.
            targets: ``(B,)`` classes or ``(B, K)`` probabilities; ``"posthoc"`` does not look at them.
            temporal: ``(B, t)`` edited gates of the layer's steps, for ``"edit"``.
            spatial: ``(B, t, h, w)`` of its cells, likewise.
        """
        if self.preset != "edit" and (temporal is not None or spatial is not None):
            raise ValueError(f"edited gates came, but preset={self.preset!r} has no use for them; take 'edit'")
        if self.preset == "posthoc":
            return self._masking(st_abn, clips)
        logits, gates = st_abn.forward_with_gates(clips)
        terms = {
            "perception": F.cross_entropy(logits, targets),
            "attention": F.cross_entropy(gates.logits, targets),
        }
        if self.preset == "edit":
            terms["edit"] = self.edit * _distance(gates, temporal, spatial)
        return terms

    def _masking(self, st_abn: STABN, clips: Tensor) -> dict[str, Tensor]:
        if st_abn.config.mechanism != "observe":
            raise ValueError(
                f"preset='posthoc' leaves the model's answers as they are, but this branch acts on them by "
                f"mechanism={st_abn.config.mechanism!r}; STABN.inject(..., mechanism='observe')"
            )
        whole, gates = st_abn.forward_with_gates(clips)
        if whole.shape[1] < 2:
            raise ValueError(
                f"preset='posthoc' keeps a decision between classes, but the model gives logits {tuple(whole.shape)}"
            )
        joint, steps = (gates.spatial * gates.temporal)[:, 0], gates.temporal.expand_as(gates.spatial)[:, 0]
        cover = torch.zeros_like(clips) if self.cover is None else self.cover(clips)
        size = st_abn.layout.extent(clips)
        inputs = []
        for cells in (joint, steps):
            mask = st_abn.layout.from_working(to_pixels(cells.float(), size, st_abn.grid)[:, :, None]).to(clips)
            inputs += [cover.lerp(clips, mask), clips.lerp(cover, mask)]
        with st_abn.branch_disabled():
            answers = st_abn.model(torch.cat([*inputs, cover])).float().chunk(5)
        decision = whole.detach().argmax(1)
        shown = [F.cross_entropy(answer, decision) for answer in answers[:4:2]]
        nothing = _log_odds(answers[4], decision).detach()
        # The evidence is gone when the answer is what it is without the clip; further would be another class's case.
        hidden = [F.softplus(_log_odds(answer, decision) - nothing).mean() for answer in answers[1:4:2]]
        variation = sum((joint.diff(dim=axis).abs().mean() for axis in (1, 2, 3)), steps.diff(dim=1).abs().mean())
        return {
            "shown": torch.stack(shown).mean(),
            "hidden": torch.stack(hidden).mean(),
            "area": self.area * (joint.mean() + steps.mean()),
            "smoothness": self.smoothness * variation,
        }


def _log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """``(B,)`` log p / (1 - p) of each clip's target."""
    wanted = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return wanted - others.logsumexp(1)


def _distance(gates: Gates, temporal: Tensor | None, spatial: Tensor | None) -> Tensor:
    pairs = [
        (gate.flatten(1), edited)
        for gate, edited in ((gates.temporal, temporal), (gates.spatial, spatial))
        if edited is not None
    ]
    if not pairs:
        raise ValueError("preset='edit' needs the gates that a person drew: pass temporal=(B, t) or spatial=")
    for gate, edited in pairs:
        if gate.shape != edited.flatten(1).shape:
            raise ValueError(
                f"edited gates of shape {tuple(edited.shape)} came, but the layer has {tuple(gate.shape)} of them, "
                f"clip by clip; st_abn.explain(clip).gates has their shape"
            )
    return torch.stack([(gate - edited.flatten(1).to(gate)).square().mean() for gate, edited in pairs]).sum()


def trained(st_abn: STABN, preset: Preset) -> list[nn.Module]:
    """The modules whose parameters a preset trains."""
    return [st_abn] if TRAINS[preset] == "all" else [st_abn.branch, st_abn.mechanism]
