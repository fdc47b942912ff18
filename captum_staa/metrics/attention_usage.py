"""Does a network use its attention? What becomes of its answers when the gates say nothing, or another clip's word."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_staa._utils import notebook
from captum_staa._utils.model_state import eval_mode
from captum_staa.masking.scores import selected
from captum_staa.models.st_abn.network import st_abn_of

UNUSED = 0.01  # of the target's probability: a change below is none


@dataclass(frozen=True)
class AttentionUsage:
    """How far answers move when gates are replaced, one value per clip: by how much the target's
    probability changes, without its sign.

    Attributes:
        temporal_flat: ``(B,)``, every clip's temporal gates replaced by their mean.
        temporal_shuffled: ``(B,)``, by those of the next clip, the last one's by the first's; nan for a single clip.
        spatial_flat: ``(B,)``, the spatial gates by their mean over the clip.
        spatial_shuffled: ``(B,)``, by those of the next clip; nan for a single clip.
        decisions: for each of these, the share of clips whose likeliest class changes.
    """

    temporal_flat: Tensor
    temporal_shuffled: Tensor
    spatial_flat: Tensor
    spatial_shuffled: Tensor
    decisions: dict[str, float]

    def _repr_html_(self) -> str:
        rows = [(name, float(getattr(self, name).nanmean()), share) for name, share in self.decisions.items()]
        head = ("gates", "change of the target's probability", "share of decisions changed")
        word = "are used" if self.used else f"are not used: no change is {UNUSED * 100:g} % on average"
        title = f"AttentionUsage: the gates {word}; means over {len(self.spatial_flat)} clips"
        return notebook.block(title, notebook.table(head, rows))

    @property
    def used(self) -> bool:
        """Whether any of the four moves answers by ``UNUSED`` or more on average."""
        return any(float(getattr(self, name).nanmean()) >= UNUSED for name in self.decisions)


def attention_usage(
    st_abn: nn.Module, clips: Tensor, targets: int | Tensor | list[int] | None = None
) -> AttentionUsage:
    """How much an ST-ABN's answers depend on its gates: it is free to ignore them, and a map of them then means little.

    Example:
        >>> from captum_staa.models import STABN
        >>> st_abn = STABN(num_classes=4)
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # it is untrained, and may not use them
        ...     usage = attention_usage(st_abn, torch.rand(3, 3, 16, 48, 48), targets=[0, 1, 2])
        >>> usage.temporal_flat.shape, sorted(usage.decisions)[0]
        (torch.Size([3]), 'spatial_flat')

    Args:
        st_abn: a :class:`STABN`, or a :class:`VideoClassifier` around one.
        clips: in its layout; a dozen and more, of several classes, for shuffling to mean something.
        targets: whose probability is watched, one for all or one per clip; None takes each clip's likeliest class.

    Returns:
        :class:`AttentionUsage`, values in [0, 1]. A warning says so where the gates are not ``used``.

    Raises:
        TypeError: ``st_abn`` is no :class:`STABN`.
        ValueError: a clip of the wrong shape, a target that is out of range, or a branch that was removed.
    """
    network = st_abn_of(st_abn)
    if network is None:
        raise TypeError(f"attention_usage asks a models.STABN, got {type(st_abn).__name__}")
    network.layout.check_values(clips, "clips")
    with torch.no_grad(), eval_mode(network):
        logits, gates = network.forward_with_gates(clips)
        decided = logits.argmax(1)
        wanted = decided if targets is None else targets
        whole = _probability(logits, wanted)
        temporal, spatial = gates.temporal.flatten(1), gates.spatial[:, 0]
        given = {
            "temporal_flat": {"temporal": temporal.mean(1, keepdim=True).expand_as(temporal)},
            "temporal_shuffled": {"temporal": temporal.roll(-1, 0)},
            "spatial_flat": {"spatial": spatial.mean((1, 2, 3), keepdim=True).expand_as(spatial)},
            "spatial_shuffled": {"spatial": spatial.roll(-1, 0)},
        }
        changes, decisions = {}, {}
        for name, gate in given.items():
            with network.override(**gate):
                answer = network(clips)
            changes[name] = (_probability(answer, wanted) - whole).abs()
            decisions[name] = float((answer.argmax(1) != decided).float().mean())
            if name.endswith("shuffled") and len(clips) == 1:
                changes[name], decisions[name] = torch.full_like(changes[name], torch.nan), float("nan")
    usage = AttentionUsage(**changes, decisions=decisions)
    if not usage.used:
        largest = max(float(change.nanmean()) for change in changes.values())
        warnings.warn(
            f"the answers move by {largest:.2%} on average when the gates are flattened or shuffled between clips: "
            f"this network ignores its attention, so a map of it says little about them",
            stacklevel=2,
        )
    return usage


def _probability(logits: Tensor, targets: int | Tensor | list[int]) -> Tensor:
    return selected(logits.float().softmax(1), targets)
