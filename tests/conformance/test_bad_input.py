"""Bad input: an error that says what came, before the model has computed anything."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from .models import Case, MeanOverBatch, watched
from .subjects import over
from .trials import Trial


@dataclass(frozen=True)
class Bad:
    """A bad value of one argument.

    Attributes:
        make: the value, from the good case.
        message: what the error says.
        error: its kind.
    """

    make: Callable[[Case], Any]
    message: str
    error: type[Exception] | tuple[type[Exception], ...] = ValueError


def spoilt(value: float) -> Callable[[Case], Tensor]:
    def make(case: Case) -> Tensor:
        clip = case.inputs[0].clone()
        clip[0, 0, 0, 0, 0] = value
        return clip

    return make


CLIPS = {
    "no batch": Bad(lambda c: c.inputs[0][0], r"shape is \(\d+, \d+, \d+, \d+\).*clip\[None\]"),
    "six axes": Bad(lambda c: c.inputs[0][None], r"shape is \(1, 2, "),
    "no clips": Bad(lambda c: c.inputs[0][:0], r"shape is \(0, "),
    "nan": Bad(spoilt(float("nan")), r"1 of the \d+ values.*nan"),
    "infinite": Bad(spoilt(float("-inf")), r"1 of the \d+ values.*infinite"),
    "whole numbers": Bad(lambda c: c.inputs[0].long(), "floats.*int64", TypeError),
    "bytes": Bad(lambda c: c.inputs[0].to(torch.uint8), "floats.*uint8.*preprocess", TypeError),
    "no tensor": Bad(lambda c: c.inputs[0].tolist(), "(?i)tensor", (TypeError, AssertionError)),
}
BASELINES = {
    "of another shape": Bad(lambda c: torch.zeros(c.inputs[0].shape[1:]), r"\(2, .*, 10\), or.*\(3, 4, 12, 10\) came"),
    "of half the width": Bad(lambda c: torch.zeros(c.inputs[0][..., ::2].shape), r"\(2, 3, 4, 12, 5\) came"),
    "of another batch": Bad(lambda c: torch.zeros(3, *c.inputs[0].shape[1:]), r"\(3, 3, 4, 12, 10\) came"),
    "nan": Bad(lambda c: torch.full((1, 1, 1, 1, 1), float("nan")), "finite.*nan"),
    "one too many": Bad(lambda c: (0, 0), "one per input, 1, got 2"),
    "elsewhere": Bad(lambda c: torch.zeros(1, 1, 1, 1, 1, device="meta"), r"lies on meta, its input on cpu.*\.to\("),
    "a word": Bad(lambda c: "blur", "number or a tensor, got str", TypeError),
}
MASKS = {
    "of another shape": Bad(lambda c: torch.zeros(1, 3, 4, 5, 6).long(), r"\(2, 3, 4, 12, 10\).*\(1, 3, 4, 5, 6\)"),
    "with a gap": Bad(lambda c: 2 * (c.inputs[0] > 0).long(), "without gaps, got 2 ids from 0 to 2"),
    "from 1 on": Bad(lambda c: 1 + (c.inputs[0] > 0).long(), "without gaps, got 2 ids from 1 to 2"),
    "negative": Bad(lambda c: (c.inputs[0] > 0).long() - 1, "without gaps, got 2 ids from -1 to 0"),
    "of floats": Bad(lambda c: (c.inputs[0] > 0).float(), "whole numbers, got torch.float32", TypeError),
    "one too many": Bad(lambda c: (torch.zeros(1).long(),) * 2, "one per input, 1, got 2"),
    "no tensor": Bad(lambda c: "grid", "whole numbers, got str", TypeError),
}
WINDOWS = {
    "larger than the clip": Bad(lambda c: (5, 8, 5), r"\(5, 8, 5\).*at most \(4, 12, 10\)"),
    "higher than the clip": Bad(lambda c: (2, 13, 5), r"\(2, 13, 5\).*at most \(4, 12, 10\)"),
    "flat": Bad(lambda c: (2, 0, 5), r"\(2, 0, 5\).*at least 1"),
    "negative": Bad(lambda c: (-1, 8, 5), r"\(-1, 8, 5\).*at least 1"),
    "two sides": Bad(lambda c: (8, 5), r"\(t, h, w\).*\(8, 5\)"),
    "fractions": Bad(lambda c: (2, 8.0, 5), r"\(2, 8.0, 5\).*whole number", TypeError),
    "one too many": Bad(lambda c: ((2, 8, 5), (2, 8, 5)), r"\(\(2, 8, 5\), \(2, 8, 5\)\)"),
    "none": Bad(lambda c: None, "None"),
}
STRIDES = {
    "negative": Bad(lambda c: (2, -1, 5), r"\(2, -1, 5\).*at least 1"),
    "zero": Bad(lambda c: 0, "at least 1.*0"),
    "longer than the window": Bad(lambda c: (2, 9, 5), r"longer than the window.*\(2, 9, 5\).*at most 8"),
    "two steps": Bad(lambda c: (2, 5), r"\(2, 5\)"),
}

OPTIONS_OF_RISE = {
    "no samples": ("n_samples", 0, ValueError),
    "one sample": ("n_samples", 1, ValueError),
    "half a sample": ("n_samples", 2.5, TypeError),
    "two cells": ("n_cells", (2, 2), ValueError),
    "no cells": ("n_cells", (2, 0, 2), ValueError),
    "all kept": ("keep", 1.0, ValueError),
    "more than all kept": ("keep", 1.5, ValueError),
    "a seed": ("generator", 3, TypeError),
}


def refuses(trial: Trial, bad: Bad, argument: str) -> None:
    changed = {argument: bad.make(trial.case)}
    clips = changed.pop("inputs", trial.case.clips)
    with watched(trial.case.network) as calls, pytest.raises(bad.error, match=bad.message):
        trial.attribute(clips, **changed)
    assert not calls, "the model computed something before the error"


@pytest.mark.parametrize("kind", CLIPS)
@over("conv", "vivit", ours=True)
def test_clips(trial: Trial, kind: str) -> None:
    refuses(trial, CLIPS[kind], "inputs")


@over("videomae", "videomae-bcthw", ours=True)
def test_clips_in_another_layout(trial: Trial) -> None:
    (clip,) = trial.case.inputs
    with watched(trial.case.network) as calls, pytest.raises(ValueError, match=r"swapped|pass layout="):
        trial.attribute(clip.transpose(1, 2))
    assert not calls


@over("vivit", ours=True)
def test_clips_of_another_size(trial: Trial) -> None:
    """The classifier knows the size that its network takes."""
    (clip,) = trial.case.inputs
    for other, message in ((clip[:, ::2], "4 frames.* takes 8"), (clip[..., ::2], "24 x 8 .*takes 24 x 16")):
        with watched(trial.case.network) as calls, pytest.raises(ValueError, match=f"{message}|broadcast|tokens"):
            trial.attribute(other)
        assert not calls


@over("vivit", kinds=("gradient", "attention", "learning"), ours=True)
def test_more_clips_than_it_explains(trial: Trial) -> None:
    refuses(trial, Bad(lambda c: c.inputs * 2, "one clip tensor, got a tuple of 2 inputs"), "inputs")


@over("two-stream", ours=True)
def test_clips_of_several_batches(trial: Trial) -> None:
    rgb, flow = trial.case.inputs
    refuses(
        trial, Bad(lambda c: (rgb, flow[:1]), r"same batch size.*\(2, 3, 4, 12, 10\), \(1, 2, 4, 12, 10\)"), "inputs"
    )
    refuses(trial, Bad(lambda c: (rgb, flow / 0), r"inputs\[1\]"), "inputs")


@pytest.mark.parametrize("kind", BASELINES)
@over("conv", ours=True, takes="baselines")
def test_baselines(trial: Trial, kind: str) -> None:
    refuses(trial, BASELINES[kind], "baselines")


@pytest.mark.parametrize("kind", MASKS)
@over("conv", ours=True, takes="feature_mask")
def test_feature_masks(trial: Trial, kind: str) -> None:
    refuses(trial, MASKS[kind], "feature_mask")


@pytest.mark.parametrize("kind", WINDOWS)
@over("conv", ours=True, takes="sliding_window_shapes")
def test_windows(trial: Trial, kind: str) -> None:
    refuses(trial, WINDOWS[kind], "sliding_window_shapes")


@pytest.mark.parametrize("kind", STRIDES)
@over("conv", ours=True, takes="strides")
def test_strides(trial: Trial, kind: str) -> None:
    refuses(trial, STRIDES[kind], "strides")


@pytest.mark.parametrize("kind", OPTIONS_OF_RISE)
@over("conv", ours=True, takes="n_samples")
def test_options_of_rise(trial: Trial, kind: str) -> None:
    name, value, error = OPTIONS_OF_RISE[kind]
    refuses(trial, Bad(lambda c: value, f"{name}.*{re.escape(repr(value))}", error), name)


@over("conv", "two-stream", takes="perturbations_per_eval", ours=True)
def test_a_model_that_answers_once_for_all_clips(trial: Trial) -> None:
    mean = trial.on(trial.case.around(MeanOverBatch))
    with pytest.raises(ValueError, match=r"one output per example, 2 here.*\(1,?\)"):
        mean.attribute(target=1)
