"""Losses of an ST-ABN and the use of its gates follow what the model's outputs are, against formulas by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from branched_models import frames_of, net
from covering import in_one_case
from tiny_models import randomize
from torch import Tensor, nn

from captum_staa import AttentionBranch, VideoClassifier
from captum_staa.metrics import attention_usage
from captum_staa.models import STABN, BranchConfig, FitConfig, STABNLoss, fit_st_abn

Rows = list[list[float]]


class Head(nn.Module):
    """The 3D CNN with a function after its outputs; in train mode too, unless ``eval_only``."""

    def __init__(self, function: Any, columns: int, eval_only: bool = False) -> None:
        super().__init__()
        self.net, self.function, self.columns, self.eval_only = net(), function, columns, eval_only

    def forward(self, clip: Tensor) -> Tensor:
        logits = 3 * self.net(clip)[:, : self.columns]
        return logits if self.training and self.eval_only else self.function(logits)


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1)


HEADS: dict[str, tuple[str, Any, int]] = {
    "logits": ("logits", lambda x: x, 3),
    "probabilities": ("probabilities", softmax, 3),
    "labels": ("sigmoid", lambda x: x, 3),
    "probabilities of labels": ("probabilities", torch.sigmoid, 3),
    "yes or no": ("sigmoid", lambda x: x, 1),
    "scores": ("score", lambda x: x, 2),
    "one score": ("score", lambda x: x, 1),
}
TARGETS: dict[str, Tensor] = {
    "logits": torch.tensor([2, 0]),
    "probabilities": torch.tensor([2, 0]),
    "labels": torch.tensor([[1, 0, 1], [0, 0, 1]]),
    "probabilities of labels": torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.25, 1.0]]),
    "yes or no": torch.tensor([1, 0]),
    "scores": torch.tensor([[0.5, -1.0], [2.0, 0.0]]),
    "one score": torch.tensor([0.5, -1.0]),
}


def branched(kind: str, mechanism: Any = "bottleneck", eval_only: bool = False) -> tuple[STABN, Tensor]:
    output, function, columns = HEADS[kind]
    clip = frames_of(2, 3, 4, 12, 10)
    model = VideoClassifier(Head(function, columns, eval_only).eval(), "BCTHW", output=output)
    config = BranchConfig(mechanism, noise=0.0, drop=0.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        st_abn = STABN.inject(model, "net.middle", config=config, example=clip)
    randomize(st_abn.branch, 5)
    return st_abn.eval(), clip


def log_probability(row: list[float], k: int) -> float:
    return row[k] - math.log(sum(map(math.exp, row)))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def cost(kind: str, rows: Rows, targets: Tensor) -> float:
    """The classification loss of outputs, value by value. Probabilities are used as they are."""
    wanted = targets.double().reshape(len(rows), -1).tolist()
    pairs = [pair for row, goal in zip(rows, wanted, strict=True) for pair in zip(row, goal, strict=False)]
    if kind == "logits":
        return -mean(log_probability(row, int(goal[0])) for row, goal in zip(rows, wanted, strict=True))
    if kind == "probabilities":
        return -mean(math.log(row[int(goal[0])]) for row, goal in zip(rows, wanted, strict=True))
    if kind in ("labels", "yes or no"):
        return -mean(t * math.log(sigmoid(x)) + (1 - t) * math.log(1 - sigmoid(x)) for x, t in pairs)
    if kind == "probabilities of labels":
        return -mean(t * math.log(p) + (1 - t) * math.log(1 - p) for p, t in pairs)
    return mean((x - t) ** 2 for x, t in pairs)


OF_BRANCH = {"probabilities": "logits", "probabilities of labels": "labels"}  # the branch returns logits


@in_one_case()
@pytest.mark.parametrize("kind", HEADS)
def test_both_heads_are_trained_for_what_the_outputs_are(kind):
    st_abn, clip = branched(kind)
    with torch.no_grad():
        outputs, gates = st_abn.forward_with_gates(clip)
        terms = STABNLoss("paper").terms(st_abn, clip, TARGETS[kind])
    rows, own = outputs.double().tolist(), gates.logits.double().tolist()
    assert float(terms["perception"]) == pytest.approx(cost(kind, rows, TARGETS[kind]), rel=1e-4)
    assert float(terms["attention"]) == pytest.approx(cost(OF_BRANCH.get(kind, kind), own, TARGETS[kind]), rel=1e-4)


@in_one_case()
@pytest.mark.parametrize("kind", HEADS)
def test_what_is_closed_must_be_no_answer(kind):
    """Equal probabilities if one class is right; otherwise the answer if all gates are closed."""
    st_abn, clip = branched(kind)
    gates = st_abn.explain(clip).gates
    with torch.no_grad():
        found = float(STABNLoss("faithful", removed=1.0).terms(st_abn, clip, TARGETS[kind])["removed"])
        with st_abn.override(spatial=1 - (gates.spatial * gates.temporal)[:, 0], temporal=torch.ones(1, 4)):
            rows = st_abn(clip).double().tolist()
        with st_abn.override(spatial=torch.zeros_like(gates.spatial[:, 0])):
            nothing = st_abn(clip).double().tolist()
    pairs = [pair for row, none in zip(rows, nothing, strict=True) for pair in zip(row, none, strict=True)]
    if kind == "logits":
        expected = mean(-log_probability(row, k) - math.log(3) for row in rows for k in range(3))
    elif kind == "probabilities":
        expected = mean(-math.log(p) - math.log(3) for p, _ in pairs)
    elif "score" in kind:
        expected = mean((x - none) ** 2 for x, none in pairs)
    else:
        chances = pairs if kind.startswith("prob") else [(sigmoid(x), sigmoid(none)) for x, none in pairs]
        expected = mean(q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) for p, q in chances)
    assert expected > 1e-6 and found == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("kind", ["probabilities", "labels", "probabilities of labels", "scores"])
def test_masks_of_an_observer_keep_the_decision(kind):
    """Masks of closed gates: the kept part is the baseline, and the removed part the whole clip."""
    st_abn, clip = branched(kind, "observe")
    with torch.no_grad():
        st_abn.branch.to_spatial.weight.zero_()
        st_abn.branch.spatial_norm.weight.zero_()
        st_abn.branch.spatial_norm.bias.fill_(-40.0)
        list(st_abn.branch.to_temporal.parameters())[-1].fill_(-1e4)
        terms = STABNLoss("posthoc").terms(st_abn, clip, TARGETS[kind])
        whole, nothing = st_abn(clip).double().tolist(), st_abn(torch.zeros_like(clip)).double().tolist()
    pairs = [pair for row, none in zip(whole, nothing, strict=True) for pair in zip(row, none, strict=True)]
    if kind == "scores":
        kept = removed = 1.0  # the whole effect of the clips is missing, or still there
    elif kind == "probabilities":
        odds = lambda row, k: math.log(row[k] / (1 - row[k]))  # noqa: E731
        decided = [row.index(max(row)) for row in whole]
        kept = -mean(math.log(none[k]) for none, k in zip(nothing, decided, strict=True))
        removed = mean(
            math.log1p(math.exp(odds(row, k) - odds(none, k)))
            for row, none, k in zip(whole, nothing, decided, strict=True)
        )
    else:
        logit = (lambda x: x) if kind == "labels" else (lambda p: math.log(p / (1 - p)))
        sides = [(1 if logit(x) > 0 else -1, logit(x), logit(none)) for x, none in pairs]
        kept = mean(math.log1p(math.exp(-side * none)) for side, _, none in sides)
        removed = mean(math.log1p(math.exp(side * (x - none))) for side, x, none in sides)
    assert float(terms["kept"]) == pytest.approx(kept, rel=1e-3)
    assert float(terms["removed"]) == pytest.approx(removed, rel=1e-3)


@pytest.mark.parametrize("kind", ["probabilities", "probabilities of labels"])
def test_heads_that_end_in_a_function_in_eval_mode_only_are_trained_by_their_logits(kind):
    st_abn, clip = branched(kind, eval_only=True)
    st_abn.train()
    with torch.no_grad():
        logits = st_abn(clip).double().tolist()
        terms = STABNLoss("paper").terms(st_abn, clip, TARGETS[kind])
    assert min(map(min, logits)) < 0
    assert float(terms["perception"]) == pytest.approx(cost(OF_BRANCH[kind], logits, TARGETS[kind]), rel=1e-4)


@pytest.mark.parametrize("kind", ["probabilities", "labels", "one score"])
def test_training_lowers_the_loss_of_each_kind(kind):
    st_abn, clip = branched(kind)
    maker: Any = lambda parameters: torch.optim.AdamW(parameters, lr=0.02)  # noqa: E731
    history = fit_st_abn(st_abn, [(clip, TARGETS[kind])], config=FitConfig(maker), preset="faithful", epochs=25)
    assert history.train[-1]["perception"] < 0.5 * history.train[0]["perception"]


@in_one_case()
@pytest.mark.parametrize("kind", HEADS)
def test_usage_is_the_change_of_the_answer(kind):
    st_abn, clip = branched(kind)
    clips = torch.cat([clip, -clip])
    gates = st_abn.explain(clips).gates.temporal.flatten(1)
    with torch.no_grad():
        whole = st_abn(clips).double()
        with st_abn.override(temporal=gates.mean(1, keepdim=True).expand(-1, 4)):
            flat = st_abn(clips).double()
    chances = {"logits": softmax, "labels": torch.sigmoid, "yes or no": torch.sigmoid}.get(kind, lambda x: x)
    before, after = chances(whole)[:, 0], chances(flat)[:, 0]
    moved, turned = (after - before).abs(), ((after > 0.5) != (before > 0.5)).double().mean()
    if kind in ("logits", "probabilities"):
        turned = (whole.argmax(1) != flat.argmax(1)).double().mean()
    if "score" in kind:
        moved, turned = moved / before.abs().mean(), torch.tensor(torch.nan)
    usage = attention_usage(st_abn, clips, 0)
    torch.testing.assert_close(usage.temporal_flat.double(), moved, rtol=1e-3, atol=1e-6)
    assert usage.decisions["temporal_flat"] == pytest.approx(float(turned), nan_ok=True)


@in_one_case()
@pytest.mark.parametrize("kind", ["yes or no", "one score", "labels"])
def test_unused_gates_of_each_kind_are_reported(kind):
    st_abn, clip = branched(kind)
    with torch.no_grad():
        for parameter in st_abn.model.module.net.last.parameters():
            parameter.zero_()  # nothing of the clip reaches the head
    what = "scores" if "score" in kind else "probabilities"
    with pytest.warns(UserWarning, match=f"does not use its gates: its {what} change"):
        AttentionBranch(st_abn).attribute_maps(clip)


def test_targets_that_do_not_fit_the_outputs_raise():
    labels, clip = branched("labels")
    with pytest.raises(ValueError, match=r"targets must have the shape \(2, 3\) .*got shape \(2,\)\. If exactly one"):
        STABNLoss("paper")(labels, clip, torch.tensor([2, 0]))
    with pytest.raises(ValueError, match=r"targets must be probabilities of labels, from 0 to 1, got .* to 2"):
        STABNLoss("paper")(labels, clip, 2 * TARGETS["labels"])
    scores, clip = branched("scores")
    with pytest.raises(ValueError, match=r"targets must have the shape \(2, 2\) .* a number for each score"):
        STABNLoss("paper")(scores, clip, torch.zeros(2, 3))
