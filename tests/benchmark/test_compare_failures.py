"""Errors of a comparison: invalid arguments raise, failures of single clips or methods become rows."""

from __future__ import annotations

import math

import pytest
import torch
from captum.attr import Saliency
from comparison_cases import PLANTED, silent, table
from covering import in_one_case
from torch import Tensor, nn

from captum_staa import STAA, VideoClassifier
from captum_staa.benchmark import METRICS, Metric, MetricInput, MetricOptions, PlantedClips
from captum_staa.benchmark.methods import made


@in_one_case()
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["STAR"]}, ValueError, "got 'STAR'"),
        ({"methods": ["staa", "STAA"]}, ValueError, r"got \['STAA'\] more than once"),
        ({"methods": []}, ValueError, "at least one method"),
        ({"methods": "STAA"}, TypeError, "list"),
        ({"methods": [3]}, TypeError, "got 3"),
        ({"methods": {"random": "STAA"}}, ValueError, "names of controls"),
        ({"metrics": ["aurok"]}, ValueError, r"got 'aurok'\. Did you mean auroc"),
        ({"metrics": ["auroc", "AUROC"]}, ValueError, "each name once"),
        ({"metrics": {"mine": 3}}, TypeError, "'mine'"),
        ({"metrics": "auroc"}, TypeError, "list"),
        ({"metrics": {"error": len}}, ValueError, "got 'error'"),
        ({"metrics": {"left out": Metric(len, True)}}, ValueError, "got 'left out'"),
        ({"metrics": {"does not apply": len}}, ValueError, "got 'does not apply'"),
        ({"metrics": {3: len}}, TypeError, "3 of type int"),
        ({"metrics": {"mine": Metric(len, "high")}}, ValueError, "must be True, False or None, got 'high'"),
        (
            {"metrics": {"mine": METRICS["forwards"]}},
            ValueError,
            "got None. Only seconds, forwards",
        ),
        ({"metric_options": {"steps": 4}}, TypeError, "must be a MetricOptions"),
        ({"perturbations_per_eval": 0}, ValueError, "perturbations_per_eval"),
        ({"resume": True}, ValueError, "Pass out="),
    ],
)
def test_invalid_arguments_raise(clf, options, error, message):
    with pytest.raises(error, match=message):
        silent(clf, [PLANTED[0]], **{"methods": ["STAA"], "metrics": ["auroc"], **options})


def test_an_instance_has_the_name_of_its_rule(clf):
    methods = [STAA(clf), STAA(clf, mode="attention"), Saliency(clf)]
    found = made(methods, clf, perturbations_per_eval=1)
    assert [method.name for method in found] == ["STAA (relevance)", "STAA", "Saliency"]


def test_the_notice_of_a_toy_model_is_in_every_report(clf):
    found = silent(clf, [PLANTED[0]], methods=["staa-relevance"], metrics={"AUROC": None, "Sum": lambda case: 0.0})
    assert found.metrics == ["auroc", "Sum"] and found.values("Auroc").shape == (1, len(found.methods))
    for text in (found.to_markdown(), found.to_latex(), found.to_report()):
        assert "Model: toy model, knows 3 synthetic patterns; its labels mean nothing on real video." in text


@pytest.mark.parametrize(("options", "message"), [({"steps": 0}, "steps"), ({"baseline": "gray"}, "got 'gray'")])
def test_invalid_metric_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        MetricOptions(**options)


class Broken:
    """Three clips: one cannot be read, and one has no truth."""

    names = ("good", "broken", "plain")

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int):
        if index == 1:
            raise OSError("the disk says no")
        clip, label, truth = PLANTED[index]
        return (clip, label, truth) if index == 0 else (clip, label)


def test_failures_become_rows_with_a_reason_and_the_run_continues(clf):
    calls = []

    def touchy(clip: Tensor, target: int) -> Tensor:
        calls.append(target)
        if torch.equal(clip[0], PLANTED[2][0]):
            raise RuntimeError("not this\nclip")
        return clip.mean(2)

    def unusable(case: MetricInput) -> float:
        raise ZeroDivisionError

    bad = {"nan": lambda clip, target: clip.mean(2) * math.nan, "flat": lambda clip, target: clip.mean((2, 3, 4))}
    chosen = {"auroc": None, "sparsity": None, "broken": unusable}
    found = silent(clf, Broken(), {"touchy": touchy, "STAA": "STAA", **bad}, chosen)
    reasons = {row[:2]: row.reason for row in found.failures if not row.reason.startswith("broken:")}
    assert reasons["broken", "*"] == "OSError: the disk says no"
    assert reasons["plain", "touchy"] == "RuntimeError: not this clip"
    assert "nan or infinite" in reasons["good", "nan"] and "got shape (1, 16)" in reasons["good", "flat"]
    # without a map of the first method there is none of the controls that are made of it, and no second try
    for control in ("inverted", "random weights", "other class"):
        assert reasons["plain", control] == "RuntimeError: not this clip"
    assert len(calls) == 3 + 1
    assert {row[:2] for row in found.failures if row.reason == "broken: ZeroDivisionError"} >= {("good", "STAA")}
    left_out = [row for row in found.rows if row.metric == "left out"]
    assert [row.clip for row in left_out] == ["plain"] and "auroc" in left_out[0].reason
    values = table(found)
    assert ("good", "STAA", "auroc") in values and ("plain", "STAA", "sparsity") in values
    assert ("plain", "STAA", "auroc") not in values and not any(clip == "broken" for clip, *_ in values)
    assert "failed on 2 of 3 clips" in found.reasons()["nan"]
    text = found.to_markdown()
    assert "1 of 3 clips could not be read" in text and "1 of 3 clips have no truth (needed by auroc)" in text
    assert found.means()["STAA"]["sparsity"].clips == 2 and found.means()["STAA"]["auroc"].clips == 1


class Linear(nn.Module):
    """Model whose logits are the means of the channels minus a constant."""

    def __init__(self, channels: int = 3, writes: bool = False) -> None:
        super().__init__()
        self.head, self.writes = nn.Linear(channels, 3), writes
        with torch.no_grad():
            self.head.bias.zero_()
            self.head.weight.copy_(torch.linspace(-1, 1, 3 * channels).view(3, channels))

    def forward(self, clip: Tensor) -> Tensor:
        clip = clip.sub_(0.1) if self.writes else clip - 0.1
        return self.head(clip.mean((2, 3, 4)))


class NanWhereWhite(Linear):
    """Model that returns nan for white pixels next to black ones only, or for all white pixels."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.always = always

    def forward(self, clip: Tensor) -> Tensor:
        lost = clip.amax((1, 2, 3, 4)) == 1
        if not self.always:
            lost &= clip.amin((1, 2, 3, 4)) == 0
        return super().forward(clip).where(~lost[:, None], torch.nan)


def drawn(channels: int, count: int = 1) -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.rand(channels, 4, 8, 8, generator=draw) * 0.9, 1) for _ in range(count)]


def test_nan_outputs_affect_the_curves_of_their_clip_only(tmp_path):
    clips = drawn(3, 3)
    clips[1][0][:, 2] = 1.0  # answered with nan where these pixels are there, and others are hidden
    classifier = VideoClassifier(NanWhereWhite(), "BCTHW")
    wanted = ["insertion", "deletion", "sparsity"]
    found = silent(
        classifier,
        clips,
        ["Saliency", "VideoOcclusion"],
        wanted,
        metric_options=MetricOptions(steps=4),
        out=tmp_path / "run",
    )
    lost = {(row.clip, row.method, row.reason.partition(":")[0]) for row in found.failures}
    assert lost >= {("clip-00001", "random", "insertion"), ("clip-00001", "random", "deletion")}
    assert {clip for clip, *_ in lost} == {"clip-00001"}
    reason = next(row.reason for row in found.failures if row[1] == "random")
    assert "ValueError" in reason and "got nan or infinity at" in reason and "of the 5 points" in reason
    values = table(found)
    assert ("clip-00001", "random", "sparsity") in values
    alone = silent(
        classifier, [clips[0], clips[2]], ["Saliency", "VideoOcclusion"], wanted, metric_options=MetricOptions(steps=4)
    )
    for name, kinds in alone.curves.items():
        if name != "random":  # it is drawn by the clip's number
            for kind, curve in kinds.items():
                torch.testing.assert_close(torch.from_numpy(found.curves[name][kind]), torch.from_numpy(curve))
    again = silent(
        classifier,
        clips,
        ["Saliency", "VideoOcclusion"],
        wanted,
        metric_options=MetricOptions(steps=4),
        out=tmp_path / "run",
        resume=True,
    )
    assert {row[:3] for row in again.rows} == {row[:3] for row in found.rows}


def test_a_clip_with_nan_logits_is_one_failure():
    clips = drawn(3, 2)
    clips[1][0][:, 2] = 1.0
    found = silent(VideoClassifier(NanWhereWhite(always=True), "BCTHW"), clips, ["Saliency"], ["sparsity"])
    (failure,) = {(row.clip, row.reason) for row in found.failures}
    assert failure[0] == "clip-00001" and "got nan in 3 of 3 classes" in failure[1]
    assert {row.clip for row in found.rows if not math.isnan(row.value)} == {"clip-00000"}


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_clips_of_any_number_of_channels(channels):
    found = silent(VideoClassifier(Linear(channels), "BCTHW"), drawn(channels), ["Saliency"], ["sparsity"])
    assert not found.failures and len(table(found)) == 8
    assert (found.sheet is None) == (channels != 1)
    assert ("sheet" in found.plot()) == (channels == 1)


@pytest.mark.parametrize("wanted", [["aopc", "sparsity"], ["insertion", "faithfulness", "memory"]])
def test_models_and_methods_that_write_into_a_clip_change_a_copy(wanted):
    def blackens(clip: Tensor, target: int) -> Tensor:
        return clip.zero_().sum(1) + torch.arange(8.0)

    def reads(clip: Tensor, target: int) -> Tensor:
        return clip.mean(1)

    class Blackens(Saliency):
        def attribute(self, inputs: Tensor, target: int) -> Tensor:
            return inputs.detach().zero_() + torch.arange(8.0)

    values = []
    for writes, before in ((True, blackens), (False, blackens), (False, reads)):
        classifier, clips = VideoClassifier(Linear(writes=writes), "BCTHW"), drawn(3)
        given = {"first": before, "instance": Blackens(classifier), "last": reads}
        found = silent(classifier, clips, given, wanted, metric_options=MetricOptions(steps=4))
        assert not found.failures and torch.equal(clips[0][0], drawn(3)[0][0])
        values.append({key: value for key, value in table(found).items() if key[2] != "memory"})
    writing, spoiling, reading = values
    assert writing == pytest.approx(spoiling, nan_ok=True) and len(writing) >= 12
    for (clip, method, metric), value in spoiling.items():
        if method not in ("first", "inverted", "random weights", "other class"):
            assert value == pytest.approx(reading[clip, method, metric], nan_ok=True), (method, metric)


def test_a_model_without_gradients_is_compared_with_gradient_free_methods():
    class Frozen(nn.Module):
        def forward(self, clip: Tensor) -> Tensor:
            with torch.no_grad():
                return torch.stack([clip.mean((1, 2, 3, 4)), clip[:, :, :4].mean((1, 2, 3, 4))], 1)

    clips = [(torch.rand(3, 8, 16, 16, generator=torch.Generator().manual_seed(0)), 1)]
    found = silent(
        VideoClassifier(Frozen(), "BCTHW"),
        clips,
        ["VideoOcclusion", "Saliency"],
        ["deletion", "forwards"],
        metric_options=MetricOptions(steps=4),
    )
    assert [row.method for row in found.failures] == ["Saliency"]
    means = found.means()
    assert means["VideoOcclusion"]["deletion"].value < means["inverted"]["deletion"].value
    assert means["VideoOcclusion"]["forwards"].value > 1


def test_ctrl_c_keeps_finished_entries_and_resume_continues(clf, tmp_path):
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
    assert len(whole.rows) == 3 * 9 and len({row[:3] for row in whole.rows}) == 27
