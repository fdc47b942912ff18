"""ST-ABN beside torch.compile and torch.jit.trace: the same numbers, or a word about why not; never a branch unseen."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from branched_models import add, case, hooks_of, injected, taught
from tiny_models import randomize

from captum_staa import VideoClassifier
from captum_staa.models import STABN
from captum_staa.models.resnet3d import ResNet3D

pytestmark = [
    pytest.mark.usefixtures("_compiling"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
]


@pytest.fixture
def _compiling() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiled_layer_after_the_branch():
    clip = torch.randn(2, 3, 16, 24, 24, generator=torch.Generator().manual_seed(1))
    trunk = ResNet3D(3, width=4, padding_mode="replicate", time_strides_from=2)
    st_abn, zeros = randomize(STABN(3, trunk), seed=0), torch.zeros(1, 16)
    expected = st_abn.explain(clip)
    with st_abn.override(temporal=zeros):
        without = st_abn(clip)
    trunk.stages[2] = torch.compile(trunk.stages[2], backend="eager")
    torch.testing.assert_close(st_abn(clip), expected.logits)
    with st_abn.override(temporal=zeros):
        torch.testing.assert_close(st_abn(clip), without)
    explained = st_abn.explain(clip)
    torch.testing.assert_close(explained.logits, expected.logits)
    assert torch.equal(explained.temporal_gates, expected.temporal_gates)


def test_model_compiled_before_the_branch_runs_it_or_raises():
    """The compiler may or may not see a new hook. If it does not, there is an error that says how to fix it."""
    model, layer, clip, options = case("tensor")
    with torch.no_grad():
        expected, before = injected("tensor")[0](clip), model(clip)
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(compiled(clip), before)
        st_abn = taught(add(compiled, layer, clip, **options))
        assert (expected - before).abs().max() > 1e-3
        found, error = None, ""
        try:
            found = st_abn(clip)
        except ValueError as raised:
            error = str(raised)
        if found is None:
            assert re.search("'middle' once, got 0 calls.*compiled before the branch was added", error)
            torch._dynamo.reset()
            found = st_abn(clip)
        torch.testing.assert_close(found, expected)
        assert st_abn.remove() is compiled
        torch._dynamo.reset()
        assert torch.equal(compiled(clip), before)


def test_model_compiled_with_its_branch():
    """What is asked of a call reaches the graph, and nothing of it stays there."""
    st_abn, model, clip = injected("tensor")
    shut = torch.zeros(1, 4)
    with torch.no_grad():
        expected = st_abn(clip)
        with st_abn.override(temporal=shut):
            without = st_abn(clip)
        st_abn.model.module = torch.compile(model, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(st_abn(clip), expected)
            torch.testing.assert_close(st_abn.model(clip), expected)
            with st_abn.override(temporal=shut):
                torch.testing.assert_close(st_abn(clip), without)
                torch.testing.assert_close(st_abn.model(clip), without)


def test_traced_model_raises():
    """It runs none of its layers' hooks."""
    model, layer, clip, options = case("tensor")
    traced = torch.jit.trace(model, clip)
    with pytest.raises(ValueError, match="call layer 'middle' once, got 0 calls"):
        STABN.inject(VideoClassifier(traced, "BCTHW"), layer, example=clip)
    assert not hooks_of(model, layer)
    st_abn = add(model, layer, clip, **options)
    st_abn.model.module = traced
    for call in (st_abn, st_abn.explain):
        with pytest.raises(
            ValueError, match=r"'middle' once, got 0 calls.*compiled before the branch was added.*add the branch first"
        ):
            call(clip)
