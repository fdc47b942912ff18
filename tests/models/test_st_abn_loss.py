"""STABNLoss is its formula for every preset, and trains what the preset says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from branched_models import injected
from covering import in_one_case
from st_abn_networks import clips_of, settled, slow_resnet
from tiny_models import randomize
from torch import Tensor, nn

from captum_staa import baselines
from captum_staa.models import STABN, BranchConfig, FitConfig, STABNLoss, fit_st_abn
from captum_staa.models.st_abn.loss import trained_modules

TARGETS = torch.tensor([2, 0])


def observer(name: str = "tensor", seed: int = 5) -> tuple[STABN, Tensor]:
    st_abn, _, clip = injected(name, mechanism="observe")
    randomize(st_abn.branch, seed)
    return st_abn, clip


def cross_entropy(logits: Tensor, targets: list[int]) -> float:
    """Minus the mean log of a softmax, by hand."""
    rows = zip(logits.double().tolist(), targets, strict=True)
    return sum(math.log(sum(map(math.exp, row))) - row[target] for row, target in rows) / len(targets)


def log_odds(logits: Tensor, target: int) -> float:
    others = [math.exp(value) for k, value in enumerate(logits.double().tolist()) if k != target]
    return float(logits[target]) - math.log(sum(others))


@pytest.mark.parametrize("preset", ["paper", "adapter"])
def test_paper_loss_is_the_cross_entropy_of_both_heads(preset):
    st_abn, _, clip = injected("tensor")
    with torch.no_grad():
        logits, gates = st_abn.forward_with_gates(clip)
        terms = STABNLoss(preset).terms(st_abn, clip, TARGETS)
        whole = float(STABNLoss(preset)(st_abn, clip, TARGETS))
    assert list(terms) == ["perception", "attention"]
    assert float(terms["perception"]) == pytest.approx(cross_entropy(logits, [2, 0]), rel=1e-5)
    assert float(terms["attention"]) == pytest.approx(cross_entropy(gates.logits, [2, 0]), rel=1e-5)
    assert whole == pytest.approx(sum(map(float, terms.values())), rel=1e-6)
    soft = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    with torch.no_grad():
        mixed = STABNLoss(preset).terms(st_abn, clip, soft)["perception"]
    assert float(mixed) == pytest.approx(float(-(soft * logits.log_softmax(1)).sum(1).mean()), rel=1e-5)


def test_edit_term_is_the_distance_to_edited_gates():
    st_abn, _, clip = injected("tensor")
    gates = st_abn.explain(clip).gates
    generator = torch.Generator().manual_seed(0)
    when, where = (torch.rand(shape, generator=generator) for shape in ((2, 4), (2, 4, 6, 5)))
    of_time = float((gates.temporal[:, 0, :, 0, 0] - when).square().sum()) / 8
    of_space = float((gates.spatial[:, 0] - where).square().sum()) / 240
    for given, expected in (
        ({"temporal": when}, 10 * of_time),
        ({"spatial": where}, 10 * of_space),
        ({"temporal": when, "spatial": where}, 10 * (of_time + of_space)),
    ):
        with torch.no_grad():
            terms = STABNLoss("edit").terms(st_abn, clip, TARGETS, **given)
        assert list(terms) == ["perception", "attention", "edit"]
        assert float(terms["edit"]) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        light = STABNLoss("edit", edit=2.0).terms(st_abn, clip, TARGETS, when)["edit"]
    assert float(light) == pytest.approx(2 * of_time, rel=1e-4)


# ---------------------------------------------------------------- posthoc


def masks(cells: Tensor, size: tuple[int, int, int]) -> Tensor:
    """``(B, t, h, w)`` linearly between cells' centers, pixel by pixel."""
    found = torch.zeros(len(cells), *size)
    for place in torch.ones(size).nonzero().tolist():
        corners: list[tuple[list[int], float]] = [([], 1.0)]
        for pixel, pixels, count in zip(place, size, cells.shape[1:], strict=True):
            at = min(max((pixel + 0.5) * count / pixels - 0.5, 0.0), count - 1.0)
            low = min(int(at), count - 1)
            sides = ((low, 1 - at + low), (min(low + 1, count - 1), at - low))
            corners = [([*index, side], share * part) for index, share in corners for side, part in sides]
        for index, share in corners:
            found[(slice(None), *place)] += share * cells[(slice(None), *index)]
    return found


@pytest.mark.parametrize("name", ["tensor", "btchw"])
@pytest.mark.parametrize("blurred", [False, True])
def test_posthoc_terms_equal_a_slow_loop(name, blurred):
    st_abn, clips = observer(name)
    layout = st_abn.layout
    baseline = (lambda clip: baselines.blur(clip, layout)) if blurred else None
    with torch.no_grad():
        head = st_abn.model.module.head
        head.weight.mul_(8)
        head.bias.sub_(st_abn(clips).mean(0))  # close calls: what a mask shows is decided otherwise
        terms = STABNLoss("posthoc", baseline=baseline, area=0.7, smoothness=0.3).terms(st_abn, clips, TARGETS)
    gates = st_abn.explain(clips).gates
    spatial, alpha = gates.spatial[:, 0], gates.temporal[:, 0, :, 0, 0]
    joint, steps = spatial * alpha[:, :, None, None], alpha[:, :, None, None].expand_as(spatial)
    behind = torch.zeros_like(clips) if baseline is None else baseline(clips)
    model = st_abn.remove()
    kept, removed, turned = [], [], 0
    with torch.no_grad():
        for cells in (joint, steps):
            mask = masks(cells, (4, 12, 10)).unsqueeze(layout.channel)
            for i in range(2):
                part, clip, back = mask[i : i + 1], clips[i : i + 1], behind[i : i + 1]
                decision = int(model(clip).argmax())
                kept.append(cross_entropy(model(part * clip + (1 - part) * back), [decision]))
                turned += int(model(part * clip + (1 - part) * back).argmax()) != decision
                gone = log_odds(model((1 - part) * clip + part * back)[0], decision)
                removed.append(math.log1p(math.exp(gone - log_odds(model(back)[0], decision))))
    variation = sum(
        float(joint.narrow(a, 1, n - 1).sub(joint.narrow(a, 0, n - 1)).abs().mean())
        for a, n in ((1, 4), (2, 6), (3, 5))
    )
    variation += float((alpha[:, 1:] - alpha[:, :-1]).abs().mean())
    expected = {
        "kept": sum(kept) / 4,
        "removed": sum(removed) / 4,
        "area": 0.7 * float(joint.mean() + alpha.mean()),
        "smoothness": 0.3 * variation,
    }
    assert terms.keys() == expected.keys() and turned > 0
    for term, value in expected.items():
        assert float(terms[term]) == pytest.approx(value, rel=1e-4), term


def test_posthoc_gradient_passes_through_the_masks_only():
    """The model that judges the masked clips has no gates in it, and gets no gradient where it is frozen."""
    st_abn, clips = observer()
    st_abn.model.requires_grad_(False)
    terms = STABNLoss("posthoc").terms(st_abn, clips, TARGETS)
    for term in ("kept", "removed", "area", "smoothness"):
        slopes = torch.autograd.grad(terms[term], list(st_abn.branch.to_spatial.parameters()), retain_graph=True)
        assert all(slope.abs().max() > 0 for slope in slopes), term
    with pytest.raises(RuntimeError, match=r"does not require grad|not have been used"):
        torch.autograd.grad(terms["kept"], list(st_abn.branch.classify.parameters()))


# ---------------------------------------------------------------- what learns, and what stays


def batchnormed(mechanism: str) -> tuple[STABN, list[tuple[Tensor, Tensor]]]:
    """A branch in a 3D CNN with running statistics, dropout and one frozen stage."""
    model = settled(slow_resnet(3)).train()
    model.stages[0].requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BranchConfig(mechanism, width=4)
        st_abn = STABN.inject(model, "stages.2", "BCTHW", config=config, example=clips_of(4, 32))
    return st_abn, [(clips_of(4, 32, seed=seed), torch.tensor([0, 2])) for seed in range(2)]


@pytest.mark.parametrize(("preset", "mechanism"), [("adapter", "residual"), ("posthoc", "observe")])
def test_adapter_and_posthoc_freeze_the_model(preset, mechanism):
    """Its parameters, running statistics, modes and requires_grad are bit for bit what they were; the branch's not."""
    st_abn, batches = batchnormed(mechanism)
    model = st_abn.model.module
    state = {name: value.clone() for name, value in model.state_dict().items()}
    asks = [(p.requires_grad, p.grad) for p in st_abn.parameters()]
    modes = [module.training for module in st_abn.modules()]
    branch = {name: value.clone() for name, value in st_abn.branch.state_dict().items()}
    mechanism_before = [p.clone() for p in st_abn.mechanism.parameters()]
    fit_st_abn(st_abn, batches, STABNLoss(preset), epochs=2)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in st_abn.parameters()] == asks and not all(asked for asked, _ in asks)
    assert [module.training for module in st_abn.modules()] == modes
    unused = ("to_evidence.weight", "classify.weight", "classify.bias") if preset == "posthoc" else ()
    still = [name for name, value in st_abn.branch.state_dict().items() if torch.equal(value, branch[name])]
    assert set(still) <= set(unused)
    for before, after in zip(mechanism_before, st_abn.mechanism.parameters(), strict=True):
        assert not torch.equal(before, after)
    if preset == "posthoc":
        with st_abn.branch_disabled():
            expected = st_abn.eval().model(batches[0][0])
        assert torch.equal(st_abn(batches[0][0]), expected)


def test_paper_trains_all_parameters():
    st_abn, batches = batchnormed("residual")
    before = {name: value.clone() for name, value in st_abn.state_dict().items()}
    fit_st_abn(st_abn, batches, STABNLoss("paper"), epochs=1)
    still = [name for name, value in st_abn.state_dict().items() if torch.equal(value, before[name])]
    assert still == []
    assert trained_modules(st_abn, "paper") == [st_abn] and trained_modules(st_abn, "edit") == [st_abn]
    assert trained_modules(st_abn, "adapter") == trained_modules(st_abn, "posthoc") == [st_abn.branch, st_abn.mechanism]


def test_edited_weights_are_learned_in_a_few_steps():
    st_abn, _, clip = injected("tensor")
    edited = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]])

    def far() -> float:
        return float((st_abn.explain(clip).temporal_gates - edited).square().mean())

    before, answers = far(), cross_entropy(st_abn(clip), [2, 0])
    maker: Any = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    fit_st_abn(st_abn, [(clip, TARGETS, edited)], STABNLoss("edit"), FitConfig(maker), epochs=40)
    assert before > 0.2 and far() < 0.02
    assert cross_entropy(st_abn(clip), [2, 0]) < answers


def test_observing_branch_learns_the_position_of_the_evidence():
    """A model that reads the brightness of frame 2's left half alone; nothing else may stay open."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv3d(3, 4, 1)

        def forward(self, clip: Tensor) -> Tensor:
            self.conv(clip)
            bright = clip[:, :, 2, :, :4].mean((1, 2, 3))
            return torch.stack([4 * bright, -4 * bright], 1)

    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor([1.0, -1.0] * 4).view(-1, 1, 1, 1)
    clips = 0.1 * torch.rand(8, 3, 4, 8, 8, generator=generator)
    clips[:, :, 2, :, :4] += signs.expand(-1, 3, 8, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        st_abn = STABN.inject(Reads(), "conv", "BCTHW", config=BranchConfig("observe", width=8), example=clips)
    maker: Any = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    data = [(clips, torch.zeros(8).long())]
    fit_st_abn(st_abn, data, STABNLoss("posthoc", area=4.0), FitConfig(maker), epochs=80)
    found = st_abn.explain(clips)
    joint = found.spatial_gates * found.temporal_gates[:, :, None, None]
    inside = torch.zeros(4, 8, 8).bool()
    inside[2, :, :4] = True
    assert (found.temporal_gates[:, 2] > 0.9).all() and (found.temporal_gates[:, [0, 1, 3]] < 0.1).all()
    assert joint[:, inside].mean() > 8 * joint[:, ~inside].mean()


# ---------------------------------------------------------------- bad input


@in_one_case()
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "joint"}, "preset .*'paper', 'adapter', 'posthoc', 'edit', 'faithful', got 'joint'"),
        ({"area": -1.0}, r"area must be .*at least 0, got -1\.0"),
        ({"smoothness": float("nan")}, "smoothness must be .*got nan"),
        ({"edit": -0.1}, "edit must be .*got -0.1"),
        ({"removed": -2.0}, "removed must be .*got -2.0"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        STABNLoss(**options)


def test_arguments_that_do_not_fit_the_preset_raise():
    st_abn, _, clip = injected("tensor")
    when = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"'posthoc' needs .*mechanism='residual'.*config=BranchConfig\(mechanism="):
        STABNLoss("posthoc")(st_abn, clip, TARGETS)
    with pytest.raises(ValueError, match=r"temporal or spatial must be given with preset='edit'"):
        STABNLoss("edit")(st_abn, clip, TARGETS)
    for preset in ("paper", "adapter", "posthoc"):
        for name in ("temporal", "spatial"):
            with pytest.raises(ValueError, match=f"must be None with preset='{preset}', got edited gates"):
                STABNLoss(preset)(observer()[0] if preset == "posthoc" else st_abn, clip, TARGETS, **{name: when})
    with pytest.raises(ValueError, match=r"edited gates.*shape \(2, 4\) .*got shape \(2, 5\)"):
        STABNLoss("edit")(st_abn, clip, TARGETS, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"edited gates.*got shape \(1, 4\)"):
        STABNLoss("edit")(st_abn, clip, TARGETS, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"edited gates.*shape \(2, 120\) .*got shape \(2, 4, 12, 10\)"):
        STABNLoss("edit")(st_abn, clip, TARGETS, spatial=torch.zeros(2, 4, 12, 10))
