"""The comparison of methods: its numbers against the metrics called by hand, and what happens when something fails."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, Saliency
from torch import Tensor, nn

from captum_staa import STAA, GradCAM, VideoClassifier, VideoOcclusion, metrics
from captum_staa.benchmark import METHODS, METRICS, Case, DoesNotApply, Metric, PlantedClips, Recipe, compare
from captum_staa.benchmark.cost import PeakMemory, with_cost
from captum_staa.benchmark.layers import end_layer
from captum_staa.benchmark.methods import made, seeded
from captum_staa.benchmark.recipes import windows

PLANTED = PlantedClips(seed=12, n=20)
FAST = [  # all but those that take many forwards
    "STAA",
    "STAA(attention)",
    "STAA(attention-last)",
    "STAA(released)",
    "VideoFeatureAblation(frames)",
    "GradCAM",
    "GradCAM(hirescam-first)",
    "GradCAM(layercam-first)",
    "Saliency",
    "InputXGradient",
    "GuidedBackprop",
    "DeepLift",
    "LayerGradCam",
    "FeatureAblation(frames)",
]


@pytest.fixture(scope="module")
def clf() -> VideoClassifier:
    return VideoClassifier.from_pretrained("tiny-videomae-pattern")


@pytest.fixture(scope="module")
def cnn() -> VideoClassifier:
    return VideoClassifier.from_pretrained("tiny-resnet3d-pattern")


def table(found) -> dict[tuple[str, str, str], float]:
    return {row[:3]: row.value for row in found.rows if not row.reason}


def silent(*args, **options):
    return compare(*args, show_progress=False, **options)


def test_numbers_are_those_of_the_metrics_called_by_hand(clf):
    wanted = [
        "insertion",
        "deletion",
        "faithfulness",
        "saco",
        "auroc",
        "auroc_time",
        "pointing_game",
        "iou",
        "sparsity",
    ]
    found = silent(clf, [PLANTED[i] for i in (3, 16)], ["STAA", "InputXGradient"], wanted, steps=6)
    values = table(found)
    assert len(values) == 2 * 6 * len(wanted)  # of a flat map saco is nan, and that is a row, too
    for name, at in (("clip-00000", 3), ("clip-00001", 16)):
        clip, label, truth = PLANTED[at : at + 1]
        maps = {
            "STAA": clf.layout.reduce(STAA(clf).attribute(clip, target=label)),
            "InputXGradient": clf.layout.reduce(
                InputXGradient(clf).attribute(clip.clone().requires_grad_(), target=label).detach()
            ).abs(),
        }
        maps["inverted"] = -maps["STAA"]
        maps["uniform"] = torch.ones_like(maps["STAA"])
        for method, each in maps.items():
            curves = metrics.causal(clf, clip, each, target=label, steps=6, perturbations_per_eval=8)
            by_hand = {
                "insertion": curves.insertion.score,
                "deletion": curves.deletion.score,
                "faithfulness": metrics.faithfulness(clf, clip, each),
                "saco": metrics.saco(clf, clip, each, target=label),
                "auroc": metrics.auroc(each, truth),
                "auroc_time": metrics.auroc(each, truth, axis="time"),
                "pointing_game": metrics.pointing_game(each, truth, tolerance=clf.grid.tubelet),
                "iou": metrics.iou(each, truth),
                "sparsity": metrics.sparsity(each),
            }
            for metric, value in by_hand.items():
                told = values[name, method, metric]
                assert told == pytest.approx(value.item(), rel=1e-5, abs=1e-6, nan_ok=True), (name, method, metric)


def test_every_method_gives_a_map_or_says_why_not(clf, cnn):
    none = {"seconds": None, "sparsity": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_clf = silent(clf, [PLANTED[16]], FAST, none)
        volume = [(cnn.layout.from_working(PLANTED[16][0][None]), 2, PLANTED[16][2])]
        of_cnn = silent(cnn, volume, FAST, none)
    for found, silent_ones in (
        (of_clf, {"GuidedBackprop", "DeepLift", "LayerGradCam"}),
        (of_cnn, {"STAA", "STAA(attention)", "STAA(attention-last)", "STAA(released)"}),
    ):
        assert not found.failures
        assert {row.method for row in found.rows if row.metric == "does not apply"} == silent_ones
        assert all(len(row.reason) > 20 for row in found.rows if row.metric == "does not apply")
        scored = {method for _, method, metric in table(found) if metric == "sparsity"}
        assert scored == {*FAST, "random", "uniform", "centre", "inverted"} - silent_ones
    assert "does not apply" in of_clf.to_markdown() and "is a transformer" in of_clf.to_markdown()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-videomae-pattern", "tiny-timesformer-motion", "tiny-resnet3d-order"])
def test_all_methods_run_on_all_kinds_of_models(model):
    classifier = VideoClassifier.from_pretrained(model)
    found = silent(classifier, PlantedClips(seed=5, n=1, task=model.rsplit("-")[-1]), None, ["auroc", "forwards"])
    assert not found.failures
    assert set(found.methods) == {*METHODS, "random", "uniform", "centre", "inverted"}
    silenced = {row.method for row in found.rows if row.metric == "does not apply"}
    assert {method for _, method, metric in table(found) if metric == "auroc"} == {*found.methods} - silenced


@pytest.mark.parametrize(
    ("ours", "theirs"), [("VideoOcclusion", "Occlusion"), ("VideoFeatureAblation(frames)", "FeatureAblation(frames)")]
)
def test_ours_and_captums_see_the_same_windows(cnn, ours, theirs):
    clip, label, _ = PLANTED[16:17]
    clip = cnn.layout.from_working(clip).contiguous()
    first, second = (method.call(clip, int(label)) for method in made([ours, theirs], cnn, copies=16))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    if ours == "VideoOcclusion":
        sides, strides = windows(cnn, clip)
        assert (sides, strides) == ((4, 12, 12), (4, 6, 6))
        by_hand = VideoOcclusion(cnn).attribute(clip, sides, strides, target=label, perturbations_per_eval=16)
        torch.testing.assert_close(first, by_hand)


def test_layer_grad_cam_is_grad_cam_per_pixel(cnn):
    clip, label, _ = PLANTED[16:17]
    clip = cnn.layout.from_working(clip).contiguous()
    ours, theirs = made(["GradCAM", "LayerGradCam"], cnn, copies=1)
    maps = [method.map_of(method.call(clip, int(label)), clip, cnn).flatten() for method in (ours, theirs)]
    assert torch.corrcoef(torch.stack(maps))[0, 1] > 0.999
    assert ours.about == "gradcam, last layer"


def test_end_layers():
    plain = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    one = nn.Sequential(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), nn.Flatten(), nn.Linear(4, 2))
    none = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    inside = nn.Sequential(plain)
    ends = [
        tuple(end_layer(VideoClassifier(net, "BCTHW"), end) for end in ("first", "last"))
        for net in (plain, one, none, inside)
    ]
    assert ends == [("0", "2"), ("0.0", "0.0"), (None, None), ("0.0", "0.2")]
    (lost,) = made(["GradCAM"], VideoClassifier(none, "BCTHW"), copies=1)
    assert lost.call is None and "GradCAM(classifier, layer)" in lost.reason


def test_instances_functions_and_metrics_of_ones_own(clf):
    def brightest(case: Case) -> Tensor:
        return case.maps.amax()

    def of_frames(clip: Tensor, target: int) -> Tensor:  # (1, T, H, W)
        return clip.mean(2)

    brightest.higher_is_better = True
    given = {
        "mine": of_frames,
        "stem": GradCAM(clf, end_layer(clf, "first"), weighting="hirescam"),
        "known": "gradcam hirescam first",
        "gradient": Saliency(clf),
    }
    metric = {"brightest": brightest, "again": Metric(lambda case: 2 * brightest(case), None), "auroc": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input Tensor 0 did not already")  # an instance is its owner's
        found = silent(clf, [PLANTED[16]], given, metric)
    values = table(found)
    assert found.methods[:4] == list(given)
    assert values["clip-00000", "mine", "brightest"] == pytest.approx(PLANTED[16][0].mean(1).max().item())
    assert values["clip-00000", "mine", "again"] == pytest.approx(2 * PLANTED[16][0].mean(1).max().item())
    target = int(PLANTED[16][1])
    signed = GradCAM(clf, end_layer(clf, "first"), weighting="hirescam").attribute_parts(
        PLANTED[16:17][0], target=target
    )
    assert values["clip-00000", "stem", "brightest"] == pytest.approx(signed.joint.max().item(), rel=1e-4)
    assert values["clip-00000", "known", "brightest"] == pytest.approx(signed.joint.abs().max().item(), rel=1e-4)
    assert found.better == {"brightest": 1, "again": 0, "auroc": 1}


def test_a_method_by_name_is_a_line_in_the_dict(clf, monkeypatch):
    def make(classifier, copies):
        if copies > 4:
            raise DoesNotApply("too many copies")
        return lambda clip, target: -clip

    monkeypatch.setitem(METHODS, "Darkness", Recipe(make, "the clip itself", magnitude=True))
    wanted = {"peak": lambda case: case.maps.amax()}
    found = silent(clf, [PLANTED[16]], ["darkness"], wanted, perturbations_per_eval=4)
    peak = PLANTED[16][0].sum(1).abs().max().item()
    assert table(found)["clip-00000", "Darkness", "peak"] == pytest.approx(peak)
    assert found.settings["methods"] == {"Darkness": "the clip itself"}
    lost = silent(clf, [PLANTED[16]], ["darkness"], wanted)
    assert lost.reasons() == {"Darkness": "does not apply: too many copies"}
    assert lost.methods == ["Darkness", "random", "uniform", "centre"]  # nothing is there to be turned round


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["STAR"]}, ValueError, "no method 'STAR'"),
        ({"methods": ["staa", "STAA"]}, ValueError, r"\['STAA'\] came twice"),
        ({"methods": []}, ValueError, "no methods"),
        ({"methods": "STAA"}, TypeError, "list"),
        ({"methods": [3]}, TypeError, "3 came"),
        ({"methods": {"random": "STAA"}}, ValueError, "names of controls"),
        ({"metrics": ["aurok"]}, ValueError, "'aurok' came"),
        ({"metrics": ["auroc", "auroc"]}, ValueError, "each once"),
        ({"metrics": {"mine": 3}}, TypeError, "'mine'"),
        ({"metrics": "auroc"}, TypeError, "list"),
        ({"steps": 0}, ValueError, "steps"),
        ({"perturbations_per_eval": 0}, ValueError, "perturbations_per_eval"),
        ({"baseline": "grey"}, ValueError, "'grey' came"),
        ({"resume": True}, ValueError, "pass out="),
    ],
)
def test_bad_arguments(clf, options, error, message):
    with pytest.raises(error, match=message):
        silent(clf, [PLANTED[0]], **{"methods": ["STAA"], "metrics": ["auroc"], **options})


class Broken:
    """Three clips of which one cannot be read and one has no truth."""

    names = ("good", "broken", "plain")

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int):
        if index == 1:
            raise OSError("the disk says no")
        clip, label, truth = PLANTED[index]
        return (clip, label, truth) if index == 0 else (clip, label)


def test_what_fails_is_a_row_with_its_reason_and_the_rest_goes_on(clf):
    calls = []

    def touchy(clip: Tensor, target: int) -> Tensor:
        calls.append(target)
        if len(calls) == 2:
            raise RuntimeError("not this\nclip")
        return clip.mean(2)

    def of_no_use(case: Case) -> float:
        raise ZeroDivisionError

    bad = {"nan": lambda clip, target: clip.mean(2) * math.nan, "flat": lambda clip, target: clip.mean((2, 3, 4))}
    chosen = {"auroc": None, "sparsity": None, "broken": of_no_use}
    found = silent(clf, Broken(), {"touchy": touchy, "STAA": "STAA", **bad}, chosen)
    reasons = {row[:2]: row.reason for row in found.failures if not row.reason.startswith("broken:")}
    assert reasons["broken", "*"] == "OSError: the disk says no"
    assert reasons["plain", "touchy"] == "RuntimeError: not this clip"
    assert "nan or infinite" in reasons["good", "nan"] and "shape is (1, 16)" in reasons["good", "flat"]
    # what is turned round is the first method's map: without it there is no inverted one
    assert reasons["plain", "inverted"] == "RuntimeError: not this clip" and len(calls) == 2
    assert {row[:2] for row in found.failures if row.reason == "broken: ZeroDivisionError"} >= {("good", "STAA")}
    left_out = [row for row in found.rows if row.metric == "left out"]
    assert [row.clip for row in left_out] == ["plain"] and "auroc" in left_out[0].reason
    values = table(found)
    assert ("good", "STAA", "auroc") in values and ("plain", "STAA", "sparsity") in values
    assert ("plain", "STAA", "auroc") not in values and not any(clip == "broken" for clip, *_ in values)
    assert "failed on 2 of 3 clips" in found.reasons()["nan"]
    told = found.to_markdown()
    assert "1 of 3 clips could not be had" in told and "1 of 3 clips without truth" in told
    assert found.means()["STAA"]["sparsity"].clips == 2 and found.means()["STAA"]["auroc"].clips == 1


def test_what_is_random_depends_on_clip_and_method_alone(clf):
    """Not on the other clips and methods, nor on what was drawn before; and nobody's generator is touched."""
    names = ["auroc", "sparsity"]
    torch.manual_seed(1)
    np.random.seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    more = silent(clf, PlantedClips(seed=12, n=2), ["Saliency", "SmoothGrad", "GradientShap"], names)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    torch.manual_seed(2)
    np.random.seed(2)
    fewer = silent(clf, PlantedClips(seed=12, n=1), ["Saliency", "GradientShap", "SmoothGrad"], names)
    other = silent(clf, PlantedClips(seed=12, n=1), ["SmoothGrad"], names, seed=1)
    first, again, seeded_else = table(more), table(fewer), table(other)
    assert {key: first[key] for key in again} == again
    key = ("pattern-00000", "SmoothGrad", "auroc")
    assert seeded_else[key] != again[key]
    assert first["pattern-00000", "random", "auroc"] != first["pattern-00001", "random", "auroc"]


def test_a_function_that_draws_gets_new_draws_for_each_clip_and_the_same_ones_again(clf):
    def dice(clip: Tensor, target: int) -> Tensor:
        return torch.rand(1, 16, 48, 48)

    wanted = {"first": lambda case: case.maps[0, 0, 0, 0]}
    values = [table(silent(clf, [PLANTED[i] for i in (0, 1)], {"dice": dice}, wanted)) for _ in range(2)]
    drawn = [values[0][f"clip-0000{i}", "dice", "first"] for i in (0, 1)]
    assert drawn[0] != drawn[1] and values[0] == values[1]


def test_curves_are_means_over_clips_of_any_number_of_cells(clf):
    rows = [PLANTED[3], PLANTED[16]]
    found = silent(clf, rows, ["STAA"], ["deletion"], steps=6)
    by_hand = {"insertion": [], "deletion": []}
    for clip, label, _ in rows:
        maps = clf.layout.reduce(STAA(clf).attribute(clip[None], target=label))
        curves = metrics.causal(clf, clip[None], maps, target=label, steps=6, perturbations_per_eval=8)
        for kind, each in by_hand.items():
            own = getattr(curves, kind)
            each.append(np.interp(np.linspace(0, 1, 101), own.fractions[0], own.curve[0]))
    for kind, each in by_hand.items():
        np.testing.assert_allclose(found.curves["STAA"][kind], np.mean(each, axis=0), rtol=1e-4, atol=1e-5)
    assert silent(clf, rows[:1], ["STAA"], ["sparsity"]).curves == {}


def test_a_model_without_gradients_is_compared_by_what_needs_none():
    class Frozen(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.stack([clip.mean((1, 2, 3, 4)), clip[:, :, :4].mean((1, 2, 3, 4))], 1)

    clips = [(torch.rand(3, 8, 16, 16, generator=torch.Generator().manual_seed(0)), 1)]
    found = silent(
        VideoClassifier(Frozen(), "BCTHW"), clips, ["VideoOcclusion", "Saliency"], ["deletion", "forwards"], steps=4
    )
    assert [row.method for row in found.failures] == ["Saliency"]
    means = found.means()
    assert means["VideoOcclusion"]["deletion"].value < means["inverted"]["deletion"].value
    assert means["VideoOcclusion"]["forwards"].value > 1


def test_seeded_draws_differ_by_clip_method_and_seed():
    def draws(*key) -> tuple[float, float]:
        with seeded(*key, torch.device("cpu")):
            return torch.rand(()).item(), np.random.rand()

    keys = [(0, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 0, "a")]
    assert len({draws(*key) for key in keys}) == 4 and draws(*keys[0]) == draws(*keys[0])


def test_ctrl_c_keeps_what_is_done_and_a_second_start_goes_on(clf, tmp_path):
    calls = []

    def interrupted(clip: Tensor, target: int) -> Tensor:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return clip.mean(2)

    def run(out, **options):
        return silent(
            clf, PlantedClips(seed=12, n=3), {"STAA": "STAA", "mine": interrupted}, ["auroc"], out=out, **options
        )

    half = run(tmp_path / "run")
    assert half.interrupted and "Interrupted" in half.to_markdown()
    assert half.clips == ["pattern-00000", "pattern-00001"]
    whole = run(tmp_path / "run", resume=True)
    assert not whole.interrupted and len(calls) == 4  # the first clip's was kept
    assert whole.rows == run(tmp_path / "other").rows
    assert len(whole.rows) == 3 * 6 and len({row[:3] for row in whole.rows}) == 18


def test_cost_in_forwards(clf):
    clip = PLANTED[16:17][0]
    held = []

    def forwards(count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                clf(clip)

    ratios = [with_cost(lambda: forwards(12), clf, clip, memory=False)[1] for _ in range(7)]
    assert all(math.isnan(cost.memory) for cost in ratios)
    assert 6 < sorted(cost.forwards for cost in ratios)[3] < 24
    _, plain = with_cost(lambda: forwards(3), clf, clip, memory=True)
    assert plain.memory == pytest.approx(1, abs=0.2)  # one after the other
    with PeakMemory() as memory:
        forwards(1)
    large = torch.Size([memory.peak])  # bytes

    def hold() -> None:
        held.append(torch.ones(large, dtype=torch.uint8))
        forwards(1)
        held.clear()

    _, twice = with_cost(hold, clf, clip, memory=True)
    assert twice.memory == pytest.approx(2, rel=0.02)


def test_peak_memory_counts_what_lives_at_once_and_not_what_was_there():
    given = torch.ones(1000)
    with PeakMemory() as memory:
        view = given.view(10, 100)  # no new bytes
        view += 1
        for _ in range(4):
            (given * 2).sum()
    assert 4000 <= memory.peak < 4100
    with PeakMemory() as memory:
        kept = [given * i for i in range(5)]
        del kept
        given * 2
    assert 20000 <= memory.peak < 20100
    leaf = given.clone().requires_grad_()
    with PeakMemory() as memory:  # a product's factors are kept for the way back
        first = leaf * 2
        second = first * first
        second.sum().backward()
    assert memory.peak >= 3 * 4000


def test_all_names_are_known_to_the_table():
    assert {"insertion", "deletion", "auroc", "forwards", "memory"} <= set(METRICS)
    for name, metric in METRICS.items():
        known = getattr(metrics, name.removesuffix("_time").removesuffix("_space"), None)
        if known is not None:
            assert metric.higher_is_better == known.higher_is_better, name
    assert METRICS["deletion"].higher_is_better is METRICS["seconds"].higher_is_better is False
