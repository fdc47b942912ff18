"""Does a network use its attention? How much its outputs change when the gates are flattened or exchanged."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_staa._utils import notebook
from captum_staa._utils.model_state import class_indices, eval_mode
from captum_staa.masking.arguments import selected
from captum_staa.models.st_abn.answers import as_logits, chances, change, rule_of
from captum_staa.models.st_abn.branch import UNUSED
from captum_staa.models.st_abn.network import st_abn_of


@dataclass(frozen=True)
class AttentionUsage:
    """Absolute change of the target's probability when gates are replaced, one value per clip.

    Probabilities follow what the model's outputs are. The change of a score is relative to the mean absolute score.

    Attributes:
        temporal_flat: ``(B,)``, with the temporal gates of each clip replaced by their mean.
        temporal_shuffled: ``(B,)``, with the temporal gates of the next clip; the last clip gets those of the first.
            nan for a single clip.
        spatial_flat: ``(B,)``, with the spatial gates replaced by their mean over the clip.
        spatial_shuffled: ``(B,)``, with the spatial gates of the next clip; nan for a single clip.
        decisions: for each of these, the share of clips whose decision changes: the predicted class, or whether the
            target's label is more likely than not; nan for scores.
    """

    temporal_flat: Tensor
    temporal_shuffled: Tensor
    spatial_flat: Tensor
    spatial_shuffled: Tensor
    decisions: dict[str, float]

    def _repr_html_(self) -> str:
        rows = [(name, float(getattr(self, name).nanmean()), share) for name, share in self.decisions.items()]
        head = ("gates", "change of the target's probability", "share of decisions changed")
        verdict = "are used" if self.used else f"are not used: all mean changes are below {UNUSED * 100:g} %"
        title = f"AttentionUsage: the gates {verdict}; means over {len(self.spatial_flat)} clips"
        return notebook.block(title, notebook.table(head, rows))

    @property
    def used(self) -> bool:
        """Whether any of the four mean changes is at least ``UNUSED``."""
        return any(float(getattr(self, name).nanmean()) >= UNUSED for name in self.decisions)


def attention_usage(
    st_abn: nn.Module, inputs: Tensor, target: int | str | Tensor | list[int] | list[str] | None = None
) -> AttentionUsage:
    """Return how much the outputs of an ST-ABN depend on its gates. If it ignores them, their map means little.

    Example:
        >>> from captum_staa.models import STABN
        >>> st_abn = STABN(num_classes=4)
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # the network is untrained and may not use its gates
        ...     usage = attention_usage(st_abn, torch.rand(3, 3, 16, 48, 48), target=[0, 1, 2])
        >>> usage.temporal_flat.shape, sorted(usage.decisions)[0]
        (torch.Size([3]), 'spatial_flat')

    Args:
        st_abn: a :class:`STABN`, or a :class:`VideoClassifier` around one.
        inputs: clips in the layout of the network. Shuffling needs about a dozen clips or more, of several classes.
        target: class whose probability is compared, one for all clips or one per clip. None takes the predicted class
            of each clip, or the label or score of the highest output.

    Returns:
        :class:`AttentionUsage`, values in [0, 1].

    Warns:
        UserWarning: the gates are not ``used``.

    Raises:
        TypeError: ``st_abn`` is not an :class:`STABN`.
        ValueError: inputs of the wrong shape, a target out of range, or a branch that was removed.
    """
    network = st_abn_of(st_abn)
    if network is None:
        raise TypeError(f"st_abn must be a models.STABN, got {type(st_abn).__name__}.")
    network.layout.check_values(inputs, "inputs")
    with torch.no_grad(), eval_mode(network):
        outputs, gates = network.forward_with_gates(inputs)
        rule = rule_of(network.model)
        predicted = outputs.argmax(1)
        classes = predicted if target is None else class_indices(target, st_abn)

        def answer(outputs: Tensor) -> tuple[Tensor, Tensor]:
            """Return the target's probability or score, and the decisions."""
            logits = as_logits(outputs, network.model)
            own = selected(chances(logits, rule), classes)
            return own, logits.argmax(1) if rule == "one class" else own > 0.5

        unchanged, decided = answer(outputs)
        temporal, spatial, flat = gates.temporal.flatten(1), gates.spatial[:, 0], gates.flat()
        replacements = {
            "temporal_flat": {"temporal": flat.temporal.flatten(1)},
            "temporal_shuffled": {"temporal": temporal.roll(-1, 0)},
            "spatial_flat": {"spatial": flat.spatial[:, 0]},
            "spatial_shuffled": {"spatial": spatial.roll(-1, 0)},
        }
        changes, decisions = {}, {}
        for name, gate in replacements.items():
            with network.override(**gate):
                other, decision = answer(network(inputs))
            changes[name] = change(unchanged, other, rule)
            decisions[name] = float((decision != decided).float().mean()) if rule != "scores" else float("nan")
            if name.endswith("shuffled") and len(inputs) == 1:
                changes[name], decisions[name] = torch.full_like(changes[name], torch.nan), float("nan")
    usage = AttentionUsage(**changes, decisions=decisions)
    if not usage.used:
        largest = max(float(moved.nanmean()) for moved in changes.values())
        what = "score" if rule == "scores" else "probability"
        warnings.warn(
            f"the {what} of the target changes by at most {largest:.2%} on average when the gates are flattened or "
            f"shuffled between clips. The network ignores its attention, so maps of its gates do not explain its "
            f"outputs.",
            stacklevel=2,
        )
    return usage
