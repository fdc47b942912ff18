"""The comparison of methods: its numbers against direct calls of the metrics."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from captum.attr import InputXGradient, Saliency
from comparison_cases import CONTROLS, FAST, PLANTED, silent, table
from torch import Tensor, nn

from captum_staa import STAA, GradCAM, VideoClassifier, VideoOcclusion, metrics
from captum_staa._utils.tensors import gaussian
from captum_staa.benchmark import (
    METHODS,
    METRICS,
    MethodSpec,
    Metric,
    MetricInput,
    MetricOptions,
    NotApplicableError,
    PlantedClips,
)
from captum_staa.benchmark.methods import made
from captum_staa.benchmark.registry import end_layer, windows


def test_numbers_equal_direct_calls_of_the_metrics(clf):
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
    found = silent(
        clf,
        [PLANTED[i] for i in (3, 16)],
        ["STAA (relevance)", "InputXGradient"],
        wanted,
        metric_options=MetricOptions(steps=6),
    )
    values = table(found)
    assert len(values) == 2 * (2 + len(CONTROLS)) * len(wanted)  # of a flat map saco is nan, and that is a row, too
    for name, at in (("clip-00000", 3), ("clip-00001", 16)):
        clip, label, truth = PLANTED[at : at + 1]
        maps = {
            "STAA (relevance)": clf.layout.reduce(STAA(clf).attribute(clip, target=label)),
            "InputXGradient": gaussian(
                clf.layout.reduce(InputXGradient(clf).attribute(clip.clone().requires_grad_(), target=label).detach()),
                (1.5, 6, 6),
            ),
        }
        maps["inverted"] = -maps["STAA (relevance)"]
        maps["uniform"] = torch.ones_like(maps["STAA (relevance)"])
        for method, each in maps.items():
            curves = metrics.insertion_deletion(clf, clip, each, target=label, steps=6, perturbations_per_eval=8)
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
                actual = values[name, method, metric]
                assert actual == pytest.approx(value.item(), rel=1e-5, abs=1e-6, nan_ok=True), (name, method, metric)


def test_every_method_returns_a_map_or_a_reason(clf, cnn):
    none = {"seconds": None, "sparsity": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_clf = silent(clf, [PLANTED[16]], FAST, none)
        volume = [(cnn.layout.from_working(PLANTED[16][0][None]), 2, PLANTED[16][2])]
        of_cnn = silent(cnn, volume, FAST, none)
    for found, silent_ones in (
        (of_clf, {"GuidedBackprop", "DeepLift", "LayerGradCam"}),
        (of_cnn, {name for name in FAST if "STAA" in name}),
    ):
        assert not found.failures
        assert {row.method for row in found.rows if row.metric == "does not apply"} == silent_ones
        assert all(len(row.reason) > 20 for row in found.rows if row.metric == "does not apply")
        scored = {method for _, method, metric in table(found) if metric == "sparsity"}
        assert scored == {*FAST, *CONTROLS} - silent_ones
    assert "does not apply" in of_clf.to_markdown() and "is a transformer" in of_clf.to_markdown()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-videomae-pattern", "tiny-timesformer-motion", "tiny-resnet3d-order"])
def test_all_methods_run_on_all_kinds_of_models(model):
    classifier = VideoClassifier.from_pretrained(model)
    found = silent(classifier, PlantedClips(seed=5, n=1, task=model.rsplit("-")[-1]), None, ["auroc", "forwards"])
    assert not found.failures
    assert set(found.methods) == {*METHODS, *CONTROLS}
    silenced = {row.method for row in found.rows if row.metric == "does not apply"}
    assert {method for _, method, metric in table(found) if metric == "auroc"} == {*found.methods} - silenced


@pytest.mark.parametrize(
    ("ours", "theirs"), [("VideoOcclusion", "Occlusion"), ("VideoFeatureAblation (frames)", "FeatureAblation (frames)")]
)
def test_methods_of_this_library_and_of_captum_use_the_same_windows(cnn, ours, theirs):
    clip, label, _ = PLANTED[16:17]
    clip = cnn.layout.from_working(clip).contiguous()
    first, second = (method.call(clip, int(label)) for method in made([ours, theirs], cnn, perturbations_per_eval=16))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    if ours == "VideoOcclusion":
        sides, strides = windows(cnn, clip)
        assert (sides, strides) == ((4, 12, 12), (4, 6, 6))
        by_hand = VideoOcclusion(cnn).attribute(clip, sides, strides, target=label, perturbations_per_eval=16)
        torch.testing.assert_close(first, by_hand)


def test_layer_grad_cam_equals_grad_cam_per_pixel(cnn):
    clip, label, _ = PLANTED[16:17]
    clip = cnn.layout.from_working(clip).contiguous()
    ours, theirs = made(["GradCAM (last)", "LayerGradCam"], cnn, perturbations_per_eval=1)
    maps = [method.map_of(method.call(clip, int(label)), clip, cnn).flatten() for method in (ours, theirs)]
    assert torch.corrcoef(torch.stack(maps))[0, 1] > 0.999
    assert ours.description.startswith("gradcam, last layer")


def test_end_layer_finds_the_first_and_last_layer():
    plain = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.Conv3d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    one = nn.Sequential(nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU()), nn.Flatten(), nn.Linear(4, 2))
    none = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    inside = nn.Sequential(plain)
    ends = [
        tuple(end_layer(VideoClassifier(net, "BCTHW"), end) for end in ("first", "last"))
        for net in (plain, one, none, inside)
    ]
    assert ends == [("0", "2"), ("0.0", "0.0"), (None, None), ("0.0", "0.2")]
    (lost,) = made(["GradCAM"], VideoClassifier(none, "BCTHW"), perturbations_per_eval=1)
    assert lost.call is None and "GradCAM(classifier, layer)" in lost.reason


def test_end_layer_is_a_layer_that_the_model_calls():
    """A ModuleList is never called, and the branch of an ST-ABN returns gates."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv3d(3, 4, 1)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv3d(4, 4, 1), nn.Tanh()) for _ in range(3))

        def forward(self, clip: Tensor) -> Tensor:
            x = self.embed(clip)
            for block in self.blocks:
                x = block(x)
            return x.mean((2, 3, 4))

    listed = VideoClassifier(Listed(), "BCTHW")
    assert [end_layer(listed, end) for end in ("first", "last")] == ["embed", "blocks.2"]
    st_abn = VideoClassifier.from_pretrained("tiny-st-abn-pattern")
    assert [end_layer(st_abn, end) for end in ("first", "last")] == ["model.module.stem", "model.module.stages"]
    for classifier, clip in ((listed, torch.rand(3, 4, 8, 8)), (st_abn, PLANTED[0][0].transpose(0, 1))):
        found = silent(
            classifier, [(clip, int(PLANTED[0][1]))], ["GradCAM", "GradCAM (last)"], ["sparsity"], model_controls=False
        )
        assert not found.reason_rows


def test_grad_cam_by_name_does_not_apply_where_its_layer_has_no_map():
    """The layer is not the user's choice, so this is not a failure of every clip."""
    net = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Flatten(3), nn.Conv2d(1, 2, 1), nn.Flatten(), nn.LazyLinear(2))
    clip = torch.rand(3, 4, 8, 8)
    net(clip[None])
    found = silent(VideoClassifier(net, "BCTHW"), [(clip, 0)], ["GradCAM", "Saliency"], ["sparsity"])
    assert not found.failures and "GradCAM(classifier, layer)" in found.reasons()["GradCAM"]


def test_custom_instances_functions_and_metrics(clf):
    def brightest(case: MetricInput) -> Tensor:
        return case.maps.amax()

    def of_frames(clip: Tensor, target: int) -> Tensor:  # (1, T, H, W)
        return clip.mean(2)

    brightest.higher_is_better = True
    given = {
        "mine": of_frames,
        "stem": GradCAM(clf, end_layer(clf, "first"), weighting="hirescam"),
        "known": "gradcam",
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
    signed = GradCAM(clf, end_layer(clf, "first"), weighting="hirescam").attribute_maps(
        PLANTED[16:17][0], target=target
    )
    assert values["clip-00000", "stem", "brightest"] == pytest.approx(signed.joint.max().item(), rel=1e-4)
    assert values["clip-00000", "known", "brightest"] == pytest.approx(
        gaussian(signed.joint, (1.5, 6, 6)).max().item(), rel=1e-4
    )
    assert found.better == {"brightest": 1, "again": 0, "auroc": 1}


def test_a_method_spec_is_a_method(clf):
    def make(classifier, perturbations_per_eval):
        if perturbations_per_eval > 4:
            raise NotApplicableError("too many perturbations_per_eval")
        return lambda clip, target: -clip

    given = {"Darkness": MethodSpec(make, "the clip itself", smoothed=True)}
    wanted = {"peak": lambda case: case.maps.amax()}
    found = silent(clf, [PLANTED[16]], given, wanted, perturbations_per_eval=4)
    peak = gaussian(-PLANTED[16][0].sum(1)[None], (1.5, 6, 6)).max().item()
    assert table(found)["clip-00000", "Darkness", "peak"] == pytest.approx(peak)
    assert found.settings["methods"] == {"Darkness": "the clip itself"}
    lost = silent(clf, [PLANTED[16]], given, wanted)
    assert lost.reasons() == {"Darkness": "does not apply: too many perturbations_per_eval"}
    assert lost.methods == ["Darkness", *CONTROLS[:4]]  # there is no method to invert, or to run again


def test_curves_are_means_over_clips_with_different_numbers_of_cells(clf):
    rows = [PLANTED[3], PLANTED[16]]
    found = silent(clf, rows, ["STAA (relevance)"], ["deletion"], metric_options=MetricOptions(steps=6))
    by_hand = {"insertion": [], "deletion": []}
    for clip, label, _ in rows:
        maps = clf.layout.reduce(STAA(clf).attribute(clip[None], target=label))
        curves = metrics.insertion_deletion(clf, clip[None], maps, target=label, steps=6, perturbations_per_eval=8)
        for kind, each in by_hand.items():
            own = getattr(curves, kind)
            each.append(np.interp(np.linspace(0, 1, 101), own.fractions[0], own.curve[0]))
    for kind, each in by_hand.items():
        np.testing.assert_allclose(found.curves["STAA (relevance)"][kind], np.mean(each, axis=0), rtol=1e-4, atol=1e-5)
    assert silent(clf, rows[:1], ["STAA"], ["sparsity"]).curves == {}


def test_names_of_methods_and_metrics_are_consistent():
    assert {"insertion", "deletion", "auroc", "forwards", "memory"} <= set(METRICS)
    for name, metric in METRICS.items():
        known = getattr(metrics, name.removesuffix("_time").removesuffix("_space"), None)
        if callable(known):
            assert metric.higher_is_better == known.higher_is_better, name
    assert METRICS["deletion"].higher_is_better is METRICS["seconds"].higher_is_better is False
