"""Sanity checks: rank correlation by counting, models with known results, and no side effects."""

from __future__ import annotations

import math
from collections import OrderedDict
from copy import deepcopy

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from covering import in_one_case
from torch import Tensor, nn

from captum_staa import STAA, VideoClassifier
from captum_staa.metrics.sanity import class_sensitivity, label_randomization, randomization

SHAPE = (2, 3, 4, 5, 6)  # (B, C, T, H, W)


def drawn(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv3d(3, 4, (2, 3, 3)), nn.BatchNorm3d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 3 * 4, 3)
        ).eval()


def gradient(model: nn.Module, clip: Tensor, target: int | Tensor = 0) -> Tensor:
    with torch.enable_grad():
        leaf = clip.detach().requires_grad_()
        answer = model(leaf)
        chosen = answer.gather(1, torch.as_tensor(target).expand(len(clip))[:, None])
        return torch.autograd.grad(chosen.sum(), leaf)[0]


def counted(first: list[float], second: list[float]) -> float:
    """Spearman's correlation by its definition: Pearson's of ranks, each rank counted."""

    def ranks(values: list[float]) -> list[float]:
        return [sum((w < v) + (w == v) / 2 for w in values) for v in values]

    a, b = ranks(first), ranks(second)
    mean = sum(a) / len(a)
    cross = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return cross / math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))


class Handed(nn.Module):
    """A "model" whose map is its parameter, to compute similarities of chosen maps."""

    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = nn.Parameter(maps)


def handed_over(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    found = label_randomization(lambda model, clip: model.maps, Handed(first), Handed(second), torch.zeros(len(first)))
    return found.signed, found.magnitude


# --- the similarity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 1, 3])
def test_similarity_equals_a_count_of_ranks(levels):
    first, second = drawn(1, (3, 2, 4, 5)), drawn(2, (3, 2, 4, 5)) + drawn(1, (3, 2, 4, 5))
    if levels:  # many equal values
        first, second = (first * levels).round(), (second * levels).round()
    signed, magnitude = handed_over(first, second)
    assert signed.dtype == magnitude.dtype == torch.float64
    pairs = [(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(first, second, strict=True)]
    assert signed.tolist() == pytest.approx([counted(a, b) for a, b in pairs], rel=1e-12)
    absolute = [([abs(v) for v in a], [abs(v) for v in b]) for a, b in pairs]
    assert magnitude.tolist() == pytest.approx([counted(a, b) for a, b in absolute], rel=1e-12)


def test_similarity_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    first, second = drawn(1, (2, 3, 7, 9)).round(decimals=1), drawn(2, (2, 3, 7, 9)).round(decimals=1)
    expected = [stats.spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(first, second, strict=True)]
    assert handed_over(first, second)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_only_the_order_counts_and_constant_maps_are_nan():
    maps = drawn(1, (2, 3, 4, 5))
    signed, magnitude = handed_over(maps, maps.exp() * 9)
    assert signed.tolist() == [1.0, 1.0] and magnitude.max() < 0.9
    assert [part.tolist() for part in handed_over(maps, -maps)] == [[-1.0, -1.0], [1.0, 1.0]]
    flat = torch.cat([torch.full_like(maps[:1], 0.1), maps[1:]])
    assert handed_over(maps, flat)[0].isnan().tolist() == [True, False]
    sign = maps.sign()  # the magnitude is constant
    assert [bool(part.isnan().any()) for part in handed_over(maps, sign)] == [False, True]


# --- randomization of parameters ----------------------------------------------------------------------------------


def by_hand(model: nn.Module, names: list[str], seen: list[nn.Module]) -> None:
    """Check that only parameters under ``names`` differ from the trained model in the last call of ``explain``."""
    for name, value in model.state_dict().items():
        other = seen[-1].state_dict()[name]
        changed = any(name.startswith(f"{layer}.") for layer in names)
        untrained = name.split(".")[0] == "1"  # an untrained BatchNorm is reset to the same values
        assert torch.equal(value, other) != (changed and not untrained), (name, names)


@pytest.mark.parametrize("independent", [False, True])
def test_layers_are_randomized_from_the_output_to_the_input(independent):
    model, clip, seen = network(), drawn(), []
    plans = [[], ["4"], ["1"], ["0"]] if independent else [[], ["4"], ["4", "1"], ["4", "1", "0"]]

    def explain(handed: nn.Module, x: Tensor) -> Tensor:
        seen.append(handed)
        by_hand(model, plans[len(seen) - 1], seen)
        return gradient(handed, x)

    found = randomization(explain, model, clip, layout="BCTHW", independent=independent)
    assert found.layers == ("4", "1", "0") and len(seen) == 4 and not any(handed is model for handed in seen)
    original = gradient(model, clip).sum(1)
    for row, handed in zip(found.signed.tolist(), seen[1:], strict=True):
        maps = gradient(handed, clip).sum(1)
        expected = [counted(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(original, maps, strict=True)]
        assert row == pytest.approx(expected, abs=1e-9)
    assert found.signed[0].abs().max() < 0.6


def test_an_edge_detector_fails_and_a_gradient_passes():
    model, clip = network(), drawn(shape=(1, 3, 4, 5, 6))
    edges = randomization(lambda model, x: x.diff(dim=-1, append=x[..., -1:]), model, clip, layout="BCTHW")
    assert edges.signed.tolist() == edges.magnitude.tolist() == [[1.0]] * 3
    found = [
        randomization(gradient, network(seed), clip, layout="BCTHW", generator=torch.Generator().manual_seed(seed))
        for seed in range(20)
    ]
    assert abs(float(torch.stack([result.signed[-1] for result in found]).mean())) < 0.15


def test_layers_group_modules_and_set_the_order():
    model = nn.Sequential(OrderedDict(net=network(), net2=nn.Linear(3, 3)))  # one name is the start of the other
    kept = {}

    def explain(handed: nn.Module, x: Tensor) -> Tensor:
        kept[len(kept)] = deepcopy(handed.state_dict())
        return gradient(handed, x)

    found = randomization(explain, model, drawn(), layout="BCTHW", layers=["net", "net2"])
    assert found.layers == ("net", "net2") and found.signed.shape == (2, 2)
    for name, trained in model.state_dict().items():
        if name.endswith("weight") and name != "net.1.weight":
            assert torch.equal(trained, kept[1][name]) == name.startswith("net2."), name
            assert not torch.equal(trained, kept[2][name]), name
    assert torch.equal(kept[1]["net.0.weight"], kept[2]["net.0.weight"])  # cascading draws each layer once


def test_batchnorm_is_reset_with_its_running_statistics():
    model, seen = network(), []
    model[1].running_mean += 3.0
    model[1].weight.data += torch.tensor([1.0, 2.0, 3.0, 4.0])
    randomization(
        lambda m, x: seen.append(m[1].state_dict()) or gradient(m, x), model, drawn(), layout="BCTHW", layers=["1"]
    )
    assert seen[0]["running_mean"].tolist() == [3.0] * 4
    assert seen[1]["running_mean"].tolist() == [0.0] * 4 and seen[1]["weight"].tolist() == [1.0] * 4


def test_a_parameter_without_reset_is_drawn_at_its_own_scale():
    model = Handed(5 + 2 * drawn(4, (1, 10, 20, 20)))
    seen = []
    found = randomization(lambda m, x: seen.append(m.maps.detach()) or m.maps, model, torch.zeros(1))
    assert found.layers == ("",) and abs(float(found.signed)) < 0.1
    assert not torch.equal(seen[0], seen[1])
    assert float(seen[1].mean()) == pytest.approx(5, abs=0.15)
    assert float(seen[1].std()) == pytest.approx(2, rel=0.06)


def test_draws_depend_only_on_the_generator():
    def run(seed: int | None) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return randomization(gradient, network(), drawn(), layout="BCTHW", generator=generator).signed

    torch.manual_seed(1)
    first = run(None)
    torch.manual_seed(2)
    assert torch.equal(first, run(None)) and torch.equal(first, run(0))
    assert not torch.equal(first, run(1))


def test_clips_are_compared_independently():
    """The network is in eval mode, so the maps of a clip do not depend on its batch."""
    clip, model = drawn(), network()
    both = randomization(gradient, model, clip, layout="BCTHW").signed
    swapped = randomization(gradient, model, clip.flip(0), layout="BCTHW").signed
    alone = randomization(gradient, model, clip[:1], layout="BCTHW").signed
    torch.testing.assert_close(both, swapped.flip(1))
    torch.testing.assert_close(both[:, :1], alone)
    maps = randomization(lambda m, x: gradient(m, x).sum(1).numpy(), model, clip).signed  # without a layout
    other = randomization(lambda m, x: gradient(m, x).transpose(1, 2), model, clip, layout="BTCHW").signed
    torch.testing.assert_close(both, maps)
    torch.testing.assert_close(both, other)


@pytest.mark.parametrize("fails", [False, True])
def test_models_and_inputs_are_unchanged_even_if_explain_changes_its_copies(fails):
    model, other, clip = network().train(), network(1), drawn().requires_grad_()
    model[4].weight.grad = torch.ones_like(model[4].weight)
    before, kept, state = deepcopy(model.state_dict()), clip.detach().clone(), torch.random.get_rng_state()

    def messy(handed: nn.Module, x: Tensor, target: int | Tensor = 0) -> Tensor:
        handed.eval().register_forward_hook(lambda *_: None)
        handed.zero_grad()
        maps = gradient(handed, x, target)
        x.data.zero_()
        for parameter in handed.parameters():
            parameter.data.zero_()
        if fails:
            raise KeyError("on purpose")
        return maps

    for run in (
        lambda: randomization(messy, model, clip, layout="BCTHW"),
        lambda: label_randomization(messy, model, other, clip, layout="BCTHW"),
        lambda: class_sensitivity(messy, model, clip, 0, [1, 2], layout="BCTHW"),
    ):
        if fails:
            with pytest.raises(KeyError):
                run()
        else:
            run()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert not model._forward_hooks and bool((model[4].weight.grad == 1).all()) and clip.grad is None
        assert torch.equal(clip, kept) and torch.equal(state, torch.random.get_rng_state())


# --- labels and classes -------------------------------------------------------------------------------------------


def test_label_randomization_compares_the_maps_of_two_models():
    first, second, clip = network(0), network(1), drawn()
    found = label_randomization(gradient, first, second, clip, layout="BCTHW")
    pairs = zip(gradient(first, clip).sum(1), gradient(second, clip).sum(1), strict=True)
    expected = [counted(a.flatten().tolist(), b.flatten().tolist()) for a, b in pairs]
    assert found.signed.tolist() == pytest.approx(expected, abs=1e-9)
    twin = label_randomization(gradient, first, deepcopy(first), clip, layout="BCTHW")
    assert twin.signed.tolist() == [1.0, 1.0]


def test_class_sensitivity_passes_one_target_per_clip():
    model, clip, seen = network(), drawn(), []

    def explain(handed: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        seen.append(target.tolist())
        assert target.dtype == torch.int64
        return IntegratedGradients(handed).attribute(x, target=target, n_steps=4)

    found = class_sensitivity(explain, model, clip, [0, 1], [2, np.array([1, 0])], layout="BCTHW")
    assert seen == [[0, 1], [2, 2], [1, 0]] and found.signed.shape == (2, 2)
    of = [IntegratedGradients(model).attribute(clip, target=t, n_steps=4).sum(1) for t in ([0, 1], [2, 2], [1, 0])]
    for row, other in zip(found.signed.tolist(), of[1:], strict=True):
        expected = [counted(a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(of[0], other, strict=True)]
        assert row == pytest.approx(expected, abs=1e-9)
    assert found.signed.max() < 0.9


def test_staa_is_class_specific_by_relevance_and_not_by_attention():
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clip = drawn(shape=(2, 16, 3, 48, 48))

    def similarity(mode: str) -> Tensor:
        return class_sensitivity(
            lambda model, x, target: STAA(model, mode=mode).attribute_maps(x, target).joint,
            clf,
            clip,
            0,
            [1, 2],
        ).signed

    assert similarity("attention").tolist() == [[1.0, 1.0]] * 2
    assert similarity("relevance").max() < 0.99


# --- invalid arguments --------------------------------------------------------------------------------------------


def never(*_: object) -> Tensor:
    raise AssertionError("explained before the arguments were checked")


@in_one_case()
@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: randomization(never, gradient, drawn()), TypeError, "function"),
        (lambda: randomization(never, network(), [1.0]), TypeError, "list"),
        (lambda: randomization(never, network(), drawn()[:0]), ValueError, "(0, 3, 4, 5, 6)"),
        (lambda: randomization(never, nn.ReLU(), drawn()), ValueError, "got ReLU"),
        (lambda: randomization(never, network(), drawn(), layers="4"), TypeError, "'4'"),
        (lambda: randomization(never, network(), drawn(), layers=[]), ValueError, "[]"),
        (lambda: randomization(never, network(), drawn(), layers=["4", "2", "7"]), ValueError, "['2', '7']"),
        (lambda: randomization(never, network(), drawn(), generator=0), TypeError, "got 0"),
        (lambda: randomization(gradient, network(), drawn()), ValueError, "layout="),
        (lambda: randomization(lambda m, x: x[:1], network(), drawn(), layout="BCTHW"), ValueError, "batch of 2"),
        (lambda: randomization(lambda m, x: x / 0, network(), drawn(), layout="BCTHW"), ValueError, "infinite"),
        (lambda: label_randomization(never, m := network(), m, drawn()), ValueError, "same object"),
        (lambda: label_randomization(never, network(), "other", drawn()), TypeError, "str"),
        (lambda: class_sensitivity(never, network(), drawn(), 0, []), ValueError, "others=[1, 2]"),
        (lambda: class_sensitivity(never, network(), drawn(), 0, [1, 0]), ValueError, "others[1] must"),
        (lambda: class_sensitivity(never, network(), drawn(), [0, 1], [[1, 1]]), ValueError, "targets [0, 1]"),
        (lambda: class_sensitivity(never, network(), drawn(), [0, 1, 2], [1]), ValueError, "each of 2 clips"),
        (lambda: class_sensitivity(never, network(), drawn(), 0.5, [1]), TypeError, "got 0.5"),
    ],
)
def test_invalid_arguments_raise(run, error, message):
    with pytest.raises(error) as caught:
        run()
    assert message in str(caught.value)


def test_maps_must_keep_their_shape():
    sizes = iter([6, 5, 5, 5])
    with pytest.raises(ValueError, match=r"\(2, 4, 5, 6\) first, then \(2, 4, 5, 5\)"):
        randomization(lambda m, x: x[..., : next(sizes)], network(), drawn(), layout="BCTHW")
