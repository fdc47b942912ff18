"""Tests of models as plain functions, traces and compiled code: the same numbers, or a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from captum_staa import STAA, GradCAM, VideoClassifier, VideoOcclusion
from captum_staa.benchmark import PlantedClips

from .models import case
from .subjects import over
from .trials import Trial, assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of a tiny model with Python control flow
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # compiling
]


def eager(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
    """Backend of torch.compile that needs no compiler, and counts the graphs."""
    eager.graphs += 1  # type: ignore[attr-defined]
    return graph.forward


@pytest.fixture
def compiling() -> Iterator[None]:
    """Reset the compiler before the test, and check that something was compiled."""
    torch._dynamo.reset()
    eager.graphs = 0  # type: ignore[attr-defined]
    yield
    assert eager.graphs > 0, "nothing was compiled"  # type: ignore[attr-defined]


@over("conv-btchw", "two-stream", takes="perturbations_per_eval")
def test_plain_functions(trial: Trial) -> None:
    """Only the layout of a function is known."""
    function: Any = lambda *clips: trial.case.model(*clips)  # noqa: E731
    assert_close(trial.on(replace(trial.case, model=function)).attribute(), trial.attribute())


def same_when_traced(trial: Trial) -> None:
    """Check that results are the same, or a clear error for methods that read layers inside the trace."""
    traced = trial.on(trial.case.around(lambda network: torch.jit.trace(network, trial.case.inputs)))
    if trial.subject.inside:
        with pytest.raises(
            ValueError,
            match=r"no attention at.*blocks\.1\.attn|must call layer .*no call|layer .* 0 (times|calls)|got 0 runs of",
        ):
            traced.attribute()
    else:
        assert_close(traced.attribute(), trial.attribute())


@over("conv", "conv-btchw", "two-stream", per="kind")
def test_traced_models(trial: Trial) -> None:
    """Captum's test_jit does the same."""
    same_when_traced(trial)


@over("own", ours=True, per="kind")
def test_traced_transformers(trial: Trial) -> None:
    """The trace has a fixed batch size."""
    same_when_traced(trial)


@over("conv", "own", takes="perturbations_per_eval")
def test_traced_classifiers(trial: Trial) -> None:
    """The classifier is traced with its network. The result is a function with a known layout."""
    traced = replace(trial.case, model=torch.jit.trace(trial.case.model, trial.case.inputs))
    assert_close(trial.on(traced).attribute(), trial.attribute())


def test_traced_classifier_has_no_family() -> None:
    own = case("own")
    with pytest.raises(ValueError, match="TracedModule is not a recognized transformer"):
        STAA(torch.jit.trace(own.model, own.inputs))


class Halves(nn.Module):
    """Simulates nn.DataParallel on two devices: each processes a part of the batch."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.module(part) for part in clip.chunk(2)])


def test_data_parallel_models() -> None:
    """Methods that only call the model work, and methods that read inside it if it runs in one piece."""
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clips, labels, _ = PlantedClips(seed=3, n=2)[:]
    for split in (Halves(clf), nn.DataParallel(clf)):
        ours, plain = (
            VideoOcclusion(f, layout="BTCHW").attribute(clips, (8, 24, 24), (8, 24, 24), target=labels)
            for f in (split, clf)
        )
        assert_close(ours, plain)
    expected = STAA(clf).attribute(clips, target=labels)
    for split in (nn.DataParallel(clf), nn.DataParallel(clf.module)):
        assert_close(STAA(split).attribute(clips, target=labels), expected)
    with pytest.raises(ValueError, match=r"layer '.*' once, got 2 calls"):
        GradCAM(Halves(clf), "module.module.videomae.encoder.layer.1", layout="BTCHW", grid=clf.grid).attribute(
            clips, target=labels
        )


@pytest.mark.usefixtures("compiling")
@over(
    "conv",
    "own",
    per="kind",
    slow=("StepAblation", "AnswerAttribution attention", "AnswerAttribution relevance", "RISE", "ReleasedSTAA"),
)
def test_compiled_models(trial: Trial) -> None:
    other = trial.case.around(lambda network: torch.compile(network, backend=eager))
    try:
        found = other.model(*other.inputs)
    except Exception:  # of the compiler, or of code that it compiled wrongly
        if torch.__version__.startswith("2.6."):
            pytest.xfail("torch 2.6 cannot compile LLaVA-OneVision of transformers")
        raise
    assert_close(found, trial.case.model(*trial.case.inputs))
    assert_close(trial.on(other).attribute(), trial.attribute())


@pytest.mark.usefixtures("compiling")
@over("conv", takes="perturbations_per_eval")
def test_compiled_classifiers(trial: Trial) -> None:
    other = replace(trial.case, model=torch.compile(trial.case.model, backend=eager))
    assert_close(trial.on(other).attribute(), trial.attribute())
