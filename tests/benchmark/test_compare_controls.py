"""The controls of a comparison: the best map without the model, random weights, and another class."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from captum.attr import InputXGradient
from comparison_cases import (
    CONTROLS,
    FAST,
    PLANTED,
    absolute,
    classifier,
    mixture,
    remove_entries,
    scene,
    silent,
    table,
)
from covering import in_one_case
from torch import Tensor, nn

from captum_staa import VideoClassifier, metrics
from captum_staa.benchmark import MetricOptions, NotApplicableError
from captum_staa.benchmark.clip_runner import RandomWeights, model_free
from captum_staa.benchmark.methods import made
from captum_staa.benchmark.records import control_of
from captum_staa.layout import VideoLayout

MODEL_CONTROLS = ("random weights", "other class")


def drawn_weights(seed: int) -> Tensor:
    """Return the initial weights of ``nn.Linear`` for a seed that a generator draws."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))))
        return nn.Linear(3, 3, bias=False).weight.detach()


# --- the maps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7])
def test_random_weights_and_other_class_are_maps_of_the_first_method(seed):
    model, clip = classifier(), scene(1)[0]
    wanted = {"total": lambda case: case.maps.sum()}
    found = silent(model, [(clip, 1)], {"mixture": mixture(model), "absolute": absolute}, wanted, seed=seed)
    totals = clip.double().sum((0, 1, 3, 4))  # by channel
    assert totals[2] > totals[0]  # so 2, the class of the other square, has the highest logit besides 1
    values = {method: value for (_, method, _), value in table(found).items()}
    assert values["mixture"] == pytest.approx(totals[1].item())
    assert values["other class"] == pytest.approx(totals[2].item())
    assert values["random weights"] == pytest.approx((drawn_weights(seed)[1].double() @ totals).item())
    assert found.methods == ["mixture", "absolute", *CONTROLS]
    assert found.settings["model_controls"] == dict.fromkeys(MODEL_CONTROLS, "mixture")


def test_model_controls_of_chosen_methods():
    model, clip = classifier(), scene(1)[0]
    wanted, given = {"total": lambda case: case.maps.sum()}, {"mixture": mixture(model), "ABS (all)": absolute}

    def run(model_controls):
        return silent(model, [(clip, 1)], given, wanted, model_controls=model_controls)

    whole, chosen, none = run(True), run(["abs-all", "mixture"]), run(False)
    rows = [f"{method}, {kind}" for method in ("ABS (all)", "mixture") for kind in MODEL_CONTROLS]
    assert chosen.methods == [*given, *CONTROLS[:5], *rows] and none.methods == [*given, *CONTROLS[:5]]
    assert all(control_of(row) in MODEL_CONTROLS for row in rows)
    assert run([]).methods == none.methods and none.settings["model_controls"] == {}
    first, values = table(whole), table(chosen)
    for kind in MODEL_CONTROLS:
        assert values["clip-00000", f"mixture, {kind}", "total"] == first["clip-00000", kind, "total"]
        assert values["clip-00000", f"ABS (all), {kind}", "total"] == pytest.approx(clip.sum().item())


@in_one_case()
@pytest.mark.parametrize(
    ("model_controls", "error", "message"),
    [
        ("STAA", TypeError, r"got 'STAA'. Pass \['STAA'\]"),
        ([absolute], TypeError, "list of method names"),
        (["STAA"], ValueError, r"got \['STAA'\]. They are absolute, GuidedBackprop"),
        (["absolute", "Absolute"], ValueError, "each method once"),
    ],
)
def test_invalid_model_controls_raise(model_controls, error, message):
    methods = [absolute, "GuidedBackprop"]
    with pytest.raises(error, match=message):
        silent(classifier(), [scene(0)], methods, ["auroc"], model_controls=model_controls)


def test_methods_that_do_not_apply_have_no_controls_and_names_of_controls_are_reserved():
    methods = ["GuidedBackprop", absolute]
    found = silent(classifier(), [scene(0)], methods, ["auroc"], model_controls=["GuidedBackprop"])
    assert found.methods == ["GuidedBackprop", "absolute", *CONTROLS[:5]]
    assert silent(classifier(), [scene(0)], methods, ["auroc"]).settings["model_controls"] == dict.fromkeys(
        MODEL_CONTROLS, "absolute"
    )
    for name in ("model-free", "other class", "mine, random weights"):
        with pytest.raises(ValueError, match="names of controls"):
            silent(classifier(), [scene(0)], {name: absolute}, ["auroc"])


@pytest.mark.parametrize("name", ["tiny-videomae-pattern", "tiny-resnet3d-pattern"])
def test_methods_on_random_weights_equal_methods_of_a_copy_with_random_weights(name):
    """The copy is the last model of the cascade of ``metrics.sanity``; new methods are made for it."""
    clf, perturbations_per_eval = VideoClassifier.from_pretrained(name), []

    def keep(model: nn.Module, clip: Tensor) -> Tensor:
        perturbations_per_eval[:] = [model]
        return clip.mean(2)

    clip = PLANTED[16:17][0]
    metrics.sanity.randomization(keep, clf, clip, generator=torch.Generator().manual_seed(3))
    clip = clf.layout.from_working(clip).contiguous()
    random_weights = RandomWeights(clf, seed=3)
    for own, other in zip(
        made(FAST, clf, perturbations_per_eval=8),
        made(FAST, perturbations_per_eval[0], perturbations_per_eval=8),
        strict=True,
    ):
        if own.call is None:
            continue
        before = own.call(clip.clone(), 1)
        with random_weights.in_place():
            found = own.call(clip.clone(), 1)
        assert torch.equal(found, other.call(clip.clone(), 1)), own.name
        assert not torch.equal(found, before) and torch.equal(own.call(clip.clone(), 1), before), own.name


def test_random_weights_affect_instances_and_the_original_weights_are_restored():
    model, clip = classifier(), scene(1)[0].requires_grad_()
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    instance = InputXGradient(model)

    def interrupted() -> None:
        with RandomWeights(model, seed=2).in_place():
            by_hand = clip * drawn_weights(2)[0][:, None, None] / (4 * 8 * 8)
            torch.testing.assert_close(instance.attribute(clip, target=0), by_hand)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.data_ptr() == before[name][1]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_random_weights_of_traced_and_compiled_models():
    model, clip = classifier(), scene(1)[0]
    for module in (torch.jit.trace(model.module, clip), torch.compile(model.module, backend="eager")):
        other = VideoClassifier(module, "BTCHW")
        before = other(clip)
        assert torch.equal(before, model(clip))
        with RandomWeights(other, seed=2).in_place():
            assert not torch.allclose(other(clip), before)
        assert torch.equal(other(clip), before)


def test_running_statistics_are_reset_and_restored():
    net = nn.Sequential(nn.BatchNorm3d(3), nn.AdaptiveAvgPool3d(1), nn.Flatten()).eval()
    net[0].running_mean.fill_(5.0)
    with RandomWeights(VideoClassifier(net, "BCTHW"), seed=0).in_place():
        assert net[0].running_mean.tolist() == [0, 0, 0]
    assert net[0].running_mean.tolist() == [5, 5, 5]


def test_random_draws_of_a_method_are_the_same_for_its_controls():
    def dice(clip: Tensor, target: int) -> Tensor:
        return torch.rand(1, 4, 8, 8)

    values = table(silent(classifier(), [scene(0)], [dice], ["auroc"]))
    assert len({values["clip-00000", name, "auroc"] for name in ("dice", *MODEL_CONTROLS)}) == 1


def test_controls_that_a_model_does_not_support_are_left_out_without_failure():
    class Still(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs.mean((1, 2, 3, 4))[:, None]

    clip, _, truth, *_ = scene(0)
    found = silent(VideoClassifier(Still(), "BTCHW"), [(clip, 0, truth)], [absolute], ["auroc"])
    assert not found.failures
    reasons = found.reasons()
    for control, reason in (("random weights", "got Still without parameters"), ("other class", "got one output")):
        assert reasons[control].startswith("left out on 1 of 1 clips") and reason in reasons[control]
    assert math.isnan(found.means()["other class"]["auroc"].value) and "got one output" in found.to_markdown()
    alike = classifier()
    with torch.no_grad():
        alike.module.head = nn.PReLU(3)  # of which the initial values are constants
    with pytest.raises(NotApplicableError, match="got Colors, whose parameters stay the same"):
        RandomWeights(alike, seed=0)


# --- the map without the model -----------------------------------------------------------------------------------


def test_the_model_free_map_is_the_difference_from_the_mean_frame():
    truth = torch.zeros(1, 6, 24, 24, dtype=torch.bool)
    truth[:, 2:4, 14:22, 14:22] = True
    clip = 0.3 * truth[:, :, None].float().expand(1, 6, 3, 24, 24).clone()
    clip[..., 2:9, 2:9] = 1.0  # brighter than the evidence, but it stays
    found = silent(classifier(), [(clip, 0, truth)], [absolute], ["auroc"])
    maps = metrics.model_free_controls(clip, "BTCHW")
    assert table(found)["clip-00000", "model-free", "auroc"] == metrics.auroc(maps["difference from mean frame"], truth)
    one = metrics.model_free_controls(clip[:, :1], "BTCHW")["absolute input"]
    assert torch.equal(model_free(clip[:, :1], VideoLayout("BTCHW")), one)


# --- what they say of a method -----------------------------------------------------------------------------------

SEED = 4  # of weights by which the rival's color counts more than the target's for two of three targets


def compared(method, names: list[str], model: VideoClassifier, **options):
    scenes = [scene(at % 3, seed=at) for at in range(6)]
    return silent(model, scenes, {"M": method, "other": absolute}, names, seed=SEED, **options)


def test_a_method_that_ignores_the_model_is_marked():
    found = compared(absolute, ["auroc"], classifier())
    means = found.means()
    assert means["M"]["auroc"].value > 0.9 and abs(means["random"]["auroc"].value - 0.5) < 0.1
    assert found.retained() == {"M": {"random weights": 1.0, "other class": 1.0}}
    for text in (found.to_markdown(), found._repr_html_(), found.to_report()):
        assert "M †‡" in text and "other †" not in text
        assert "† as good on random weights: this map shows the clip, not the model" in text
        assert "‡ as good for another class: this map does not explain this class" in text
    latex = found.to_latex()
    assert r"M $\dagger$$\ddagger$ & " in latex and "†" not in latex
    assert json.loads(found.to_json())["retained"] == found.retained()


def test_a_method_that_uses_the_model_is_not_marked():
    model = classifier()
    for names, metric in ((["auroc"], "auroc"), (["auroc", "rivals"], "rivals")):
        found = compared(mixture(model), names, model)
        value = {method: own[metric].value for method, own in found.means().items()}
        assert value["M"] == pytest.approx(1)
        share = {kind: (value[kind] - value["random"]) / (1 - value["random"]) for kind in MODEL_CONTROLS}
        assert found.retained() == {"M": pytest.approx(share)} and max(share.values()) < 0.8
        assert "†" not in found.to_markdown() and "‡" not in found.to_markdown()
    weights = drawn_weights(SEED)
    wins = [float(weights[k, k] > weights[k, (k + 1) % 3]) for k in range(3)]
    assert found.means()["random weights"]["rivals"].value == pytest.approx(sum(wins) / 3, abs=0.05)
    assert found.means()["other class"]["rivals"].value < 0.05  # its evidence is the rival


def test_a_method_that_uses_the_model_but_not_the_class_is_marked():
    model = classifier()
    energy = lambda clip, target: torch.einsum("btchw,kc->bthw", clip, model.module.head.weight.detach())  # noqa: E731
    found = compared(energy, ["auroc"], model)
    assert found.retained()["M"]["other class"] == 1 and found.retained()["M"]["random weights"] < 0.8
    assert "| M ‡" in found.to_markdown() and "†" not in found.to_markdown()


def test_a_method_no_better_than_the_random_map_is_not_marked():
    found = compared(absolute, ["auroc", "rivals"], classifier())  # the squares are equally bright
    assert found.means()["M"]["rivals"].value == pytest.approx(0.5, abs=0.1)
    assert found.retained() == {} and "†" not in found.to_markdown()
    assert compared(absolute, ["sparsity"], classifier()).retained() == {}
    assert compared(absolute, ["auroc"], classifier(), model_controls=False).retained() == {}


def test_chosen_methods_are_marked_by_their_own_controls():
    model = classifier()
    found = compared(mixture(model), ["auroc"], model, model_controls=["M", "other"])
    assert set(found.retained()) == {"M", "other"}
    text = found.to_markdown()
    assert "| other †‡" in text and "| M †" not in text and "| M ‡" not in text


def test_figures_have_lines_for_the_controls():
    model = classifier()
    found = compared(
        mixture(model),
        ["auroc", "insertion", "forwards"],
        model,
        metric_options=MetricOptions(steps=4),
        model_controls=["M"],
    )
    figures = found.plot()
    labels = {line.get_label() for line in figures["curves"].axes[0].lines}
    assert labels == set(found.methods) and {"M, random weights", "model-free"} <= labels
    assert {text.get_text() for text in figures["cost"].axes[0].texts} == {"M", "other"}


# --- the record of a run -----------------------------------------------------------------------------------------


def test_a_run_with_controls_is_resumed_only_with_the_same_controls(tmp_path: Path):
    model = classifier()

    def run(**options):
        return compared(mixture(model), ["auroc", "rivals"], model, out=tmp_path / "run", **options)

    first = run()
    calls: list[int] = []
    inside = mixture(model)

    def counted(clip: Tensor, target: int) -> Tensor:
        calls.append(target)
        return inside(clip, target)

    counted.__name__ = "contributions"  # the name that is recorded
    lost = {(2, "random weights"), (4, "other class"), (4, "other")}
    removed = remove_entries(tmp_path / "run", lambda entry: (entry["index"], entry["method"]) in lost)
    assert removed == len(lost)  # "other" is the name of a method
    again = compared(counted, ["auroc", "rivals"], model, out=tmp_path / "run", resume=True)
    assert again.rows == first.rows and again.retained() == first.retained()
    assert calls == [2, 2]  # the target of clip 2 on random weights, the highest other class of clip 4
    for choice in (False, ["M"], ["other"]):
        with pytest.raises(
            ValueError, match=r"model_controls: recorded \{'other class': 'M', 'random weights': 'M'\}, now"
        ):
            run(resume=True, model_controls=choice)
    settings = tmp_path / "run" / "settings.json"
    old = json.loads(settings.read_text())
    del old["model_controls"]  # as before there were such controls
    settings.write_text(json.dumps(old))
    for choice in (True, False):
        with pytest.raises(ValueError, match="model_controls: recorded None"):
            run(resume=True, model_controls=choice)
