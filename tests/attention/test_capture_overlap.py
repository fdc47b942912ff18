"""Captures beside and inside each other, in one thread and in several, and over copies."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from capture_readings import READINGS, layers_of, read
from tiny_models import (
    classifier,
    clip_for,
    snapshot,
    tiny,
)
from torch import Tensor

from captum_staa.attention.capture import AttentionCall, capture


def _same(readings: dict, expected: dict) -> None:
    assert list(readings) == list(expected)
    for layer, value in readings.items():
        torch.testing.assert_close(value, expected[layer], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["videomae", "timesformer", "sdpa", "mha"])
def test_nested_captures(name):
    """Each capture reads only the forwards of its block, and the inner one may run inside the outer one's reader."""
    clf = classifier(name)
    first, second = clip_for(clf, seed=1), clip_for(clf, seed=2)
    layers = layers_of(clf)
    with torch.no_grad():
        alone = [read(clf, clip)[1] for clip in (first, second)]
        with capture(clf.module, layers, READINGS["head_mean"]) as outer:
            with capture(clf.module, layers[-1:], READINGS["head_mean"]) as inner:
                clf(second)
            assert not outer
            clf(first)
        _same(inner, {layers[-1]: alone[1][layers[-1]]})
        _same(outer, alone[0])

        def reader(call: AttentionCall) -> Tensor:
            with capture(clf.module, layers, READINGS["head_mean"]) as within:
                clf(second)
            _same(within, alone[1])
            return call.head_mean()

        with capture(clf.module, layers, reader) as outer:
            logits = clf(first)
        torch.testing.assert_close(logits, clf(first), rtol=0, atol=1e-5)
        _same(outer, alone[0])


@pytest.mark.parametrize("name", ["videomae", "timesformer", "sdpa", "mha"])
def test_captures_in_two_threads_are_independent(name):
    """Two threads read one model, a third another one of its kind, and a fourth runs plain forwards meanwhile."""
    clf = classifier(name)
    other = copy.deepcopy(clf)
    clips = [clip_for(clf, seed=seed) for seed in range(4)]
    with torch.no_grad():
        plain = [clf(clip) for clip in clips]
        alone = [read(clf, clip)[1] for clip in clips]
    before = snapshot(clf), snapshot(other), torch._dynamo.eval_frame._stance
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        try:
            torch.set_num_threads(1)
            barrier.wait()
            with torch.no_grad():
                for turn in range(12):
                    model, clip = (other if index == 2 else clf), clips[index]
                    if index == 3:
                        logits, readings = model(clip), {}
                    else:
                        logits, readings = read(model, clip, stop=turn % 3 == 2)
                    if logits.numel():
                        torch.testing.assert_close(logits, plain[index], rtol=0, atol=1e-5)
                    assert index == 3 or len(readings) == len(layers_of(clf))
                    for layer, value in readings.items():
                        torch.testing.assert_close(value, alone[index][layer], rtol=0, atol=1e-6)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert (snapshot(clf), snapshot(other), torch._dynamo.eval_frame._stance) == before


def test_captures_that_overlap_in_time_restore_the_model_and_the_compiler():
    """First in, first out: the order in which a naive 'put back what was there' leaves the first one's state."""
    clf = tiny("vivit")
    before, stance = snapshot(clf), torch._dynamo.eval_frame._stance
    steps = [threading.Event() for _ in range(3)]

    def first() -> None:
        with capture(clf.module, layers_of(clf), READINGS["row"]):
            steps[0].set()
            steps[1].wait()
            clf(clip_for(clf))
        steps[2].set()

    def second() -> None:
        steps[0].wait()
        with capture(clf.module, layers_of(clf), READINGS["row"]):
            steps[1].set()
            steps[2].wait()
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"
            clf(clip_for(clf))

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot(clf) == before
    assert torch._dynamo.eval_frame._stance is stance


def test_copy_made_after_a_capture_is_independent():
    clf = tiny("videomae")
    clip = clip_for(clf)
    with torch.no_grad():
        plain, readings = read(clf, clip)
        twin = copy.deepcopy(clf)
        for parameter in clf.parameters():
            parameter.zero_()
        logits, again = read(twin, clip)
    assert torch.equal(logits, plain) and all(torch.equal(again[layer], readings[layer]) for layer in readings)
