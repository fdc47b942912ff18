"""Two threads that explain at once, on one model or on two, get what each would get alone."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import snapshot
from torch import Tensor

from captum_staa import VideoClassifier
from captum_staa._utils.model_state import eval_mode

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    import soak

TURNS = 2
NAMES = list(soak.METHODS)
SMALL = ("STAA, relevance", "GradCAM", "RISE")  # two models at once with the others: slow tests
FEW = [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in NAMES]
PLAIN = [name for name in NAMES if soak.METHODS[name][0] == soak.PLAIN]
Work = Callable[[], Tensor]


def at_once(works: list[Work]) -> list[list[Tensor]]:
    """Run each function in a separate thread, several times. All threads start each round together."""
    results: list[list[Tensor]] = [[] for _ in works]
    errors: list[BaseException] = []
    barrier = threading.Barrier(len(works), timeout=60)

    def run(at: int) -> None:
        try:
            torch.set_num_threads(1)
            for _ in range(TURNS):
                barrier.wait()
                results[at].append(works[at]())
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return results


def work(name: str, classifier: VideoClassifier, at: int) -> Work:
    """Clip and target number ``at``, explained; half of the threads under no_grad, as Captum's metrics call."""
    clips, labels = soak.planted(classifier, 4)
    call = soak.METHODS[name][1]

    def explain() -> Tensor:
        with torch.set_grad_enabled(at % 2 == 0):
            return call(classifier, clips[at], (labels[at] + at) % 3)

    return explain


def check(works: list[Work], *classifiers: VideoClassifier) -> None:
    alone = [explain() for explain in works]
    for one, other in itertools.pairwise(alone):
        assert (one - other).abs().max() > 1e-3 * one.abs().max(), "nothing could be mixed up"
    before = [(snapshot(classifier), soak.held(classifier).routes) for classifier in classifiers]
    found = at_once(works)
    for expected, results in zip(alone, found, strict=True):
        for result in results:
            torch.testing.assert_close(result, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert [(snapshot(classifier), soak.held(classifier).routes) for classifier in classifiers] == before


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_and_one_model(name):
    classifier = VideoClassifier.from_pretrained(soak.METHODS[name][0])
    check([work(name, classifier, at) for at in (0, 1)], classifier)


@pytest.mark.parametrize("name", FEW)
def test_two_threads_and_two_models(name):
    one = VideoClassifier.from_pretrained(soak.METHODS[name][0])
    other = copy.deepcopy(one)
    with torch.no_grad():  # another one, so that a mixture would show
        for parameter in other.parameters():
            parameter.mul_(0.9)
    check([work(name, one, 0), work(name, other, 1)], one, other)


@pytest.mark.parametrize("at", [0, 1, *(pytest.param(at, marks=pytest.mark.slow) for at in range(2, len(PLAIN)))])
def test_two_methods_and_one_model(at):
    """Each method beside the next one in the table: what reads attention beside what cuts, hides and learns."""
    classifier = VideoClassifier.from_pretrained(soak.PLAIN)
    names = PLAIN[at], PLAIN[(at + 4) % len(PLAIN)]
    check([work(name, classifier, index) for index, name in enumerate(names)], classifier)


@pytest.mark.slow
def test_all_methods_at_once_on_one_model():
    classifier = VideoClassifier.from_pretrained(soak.PLAIN)
    check([work(name, classifier, index % 3) for index, name in enumerate(PLAIN)], classifier)


def test_a_thread_that_fails_disturbs_no_other():
    classifier = VideoClassifier.from_pretrained(soak.PLAIN)
    clips, _ = soak.planted(classifier, 1)

    def fails() -> Tensor:
        with pytest.raises((ValueError, IndexError)):
            soak.METHODS["STAA, relevance"][1](classifier, clips[0][:, :, :1], 0)
        return torch.zeros_like(clips[0])

    check([work("STAA, relevance", classifier, 1), fails, work("GradCAM", classifier, 2)], classifier)


def test_eval_mode_ends_with_the_last_block_that_asked_for_it():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))
    model[1].eval()
    first, second = eval_mode(model), eval_mode(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == [True, True, False]


def test_a_block_inside_another_gives_back_what_was_set_between_them():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(2, 2))
    with eval_mode(model):
        model[0].train()
        with eval_mode(model):
            assert not model[0].training
        assert model[0].training and not model[1].training
    assert all(module.training for module in model.modules())
