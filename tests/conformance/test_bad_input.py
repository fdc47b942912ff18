"""Invalid input raises an error that names the value, before the model computes anything."""

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
    """An invalid value of one argument.

    Attributes:
        make: function that creates the value from a valid case.
        message: pattern of the error message.
        error: type of the error.
    """

    make: Callable[[Case], Any]
    message: str
    error: type[Exception] | tuple[type[Exception], ...] = ValueError


def with_value(value: float) -> Callable[[Case], Tensor]:
    def make(case: Case) -> Tensor:
        clip = case.inputs[0].clone()
        clip[0, 0, 0, 0, 0] = value
        return clip

    return make


CLIPS = {
    "no batch": Bad(lambda c: c.inputs[0][0], r"got shape \(\d+, \d+, \d+, \d+\).*unsqueeze\(0\)"),
    "six axes": Bad(lambda c: c.inputs[0][None], r"got shape \(1, 2, "),
    "no clips": Bad(lambda c: c.inputs[0][:0], r"got shape \(0, "),
    "nan": Bad(with_value(float("nan")), r"got 1 nan or infinite values out of \d+"),
    "infinite": Bad(with_value(float("-inf")), r"got 1 nan or infinite values out of \d+"),
    "whole numbers": Bad(lambda c: c.inputs[0].long(), "floating-point.*int64", TypeError),
    "bytes": Bad(lambda c: c.inputs[0].to(torch.uint8), "floating-point.*uint8.*preprocess", TypeError),
    "no tensor": Bad(lambda c: c.inputs[0].tolist(), "(?i)tensor", (TypeError, AssertionError)),
}
BASELINES = {
    "of another shape": Bad(
        lambda c: torch.zeros(c.inputs[0].shape[1:]), r"\(2, .*, 10\), or.*got shape \(3, 4, 12, 10\)"
    ),
    "of half the width": Bad(lambda c: torch.zeros(c.inputs[0][..., ::2].shape), r"got shape \(2, 3, 4, 12, 5\)"),
    "of another batch": Bad(lambda c: torch.zeros(3, *c.inputs[0].shape[1:]), r"got shape \(3, 3, 4, 12, 10\)"),
    "nan": Bad(lambda c: torch.full((1, 1, 1, 1, 1), float("nan")), "finite.*nan"),
    "one too many": Bad(lambda c: (0, 0), "one per input, 1, got 2"),
    "elsewhere": Bad(lambda c: torch.zeros(1, 1, 1, 1, 1, device="meta"), r"device cpu, got meta.*\.to\("),
    "a word": Bad(lambda c: "blur", "number or a tensor, got str", TypeError),
}
MASKS = {
    "of another shape": Bad(lambda c: torch.zeros(1, 3, 4, 5, 6).long(), r"\(2, 3, 4, 12, 10\).*\(1, 3, 4, 5, 6\)"),
    "with a gap": Bad(lambda c: 2 * (c.inputs[0] > 0).long(), "without gaps.*2 ids from 0 to 2"),
    "from 1 on": Bad(lambda c: 1 + (c.inputs[0] > 0).long(), "without gaps.*2 ids from 1 to 2"),
    "negative": Bad(lambda c: (c.inputs[0] > 0).long() - 1, "without gaps.*2 ids from -1 to 0"),
    "of floats": Bad(lambda c: (c.inputs[0] > 0).float(), "torch.float32", TypeError),
    "one too many": Bad(lambda c: (torch.zeros(1).long(),) * 2, "one per input, 1, got 2"),
    "no tensor": Bad(lambda c: "grid", "integers, got str", TypeError),
}
WINDOWS = {
    "larger than the clip": Bad(lambda c: (5, 8, 5), r"\(5, 8, 5\).*at most \(4, 12, 10\)"),
    "higher than the clip": Bad(lambda c: (2, 13, 5), r"\(2, 13, 5\).*at most \(4, 12, 10\)"),
    "flat": Bad(lambda c: (2, 0, 5), r"\(2, 0, 5\).*at least 1"),
    "negative": Bad(lambda c: (-1, 8, 5), r"\(-1, 8, 5\).*at least 1"),
    "two sides": Bad(lambda c: (8, 5), r"\(t, h, w\).*\(8, 5\)"),
    "fractions": Bad(lambda c: (2, 8.0, 5), r"\(2, 8.0, 5\).*integer", TypeError),
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


def check_error(trial: Trial, bad: Bad, argument: str) -> None:
    changed = {argument: bad.make(trial.case)}
    clips = changed.pop("inputs", trial.case.clips)
    with watched(trial.case.network) as calls, pytest.raises(bad.error, match=bad.message):
        trial.attribute(clips, **changed)
    assert not calls, "the model computed something before the error"


@over("conv", "vivit", ours=True, per="kind", together=True)
def test_invalid_clips_raise(trial: Trial) -> None:
    for bad in CLIPS.values():
        check_error(trial, bad, "inputs")


@over("videomae", "videomae-bcthw", ours=True, per="kind", together=True)
def test_wrong_layout_raises(trial: Trial) -> None:
    (clip,) = trial.case.inputs
    with watched(trial.case.network) as calls, pytest.raises(ValueError, match=r"swapped|Pass layout="):
        trial.attribute(clip.transpose(1, 2))
    assert not calls


@over("vivit", ours=True, per="kind", together=True)
def test_wrong_clip_size_raises(trial: Trial) -> None:
    """The classifier knows the input size of its network."""
    (clip,) = trial.case.inputs
    for other, message in ((clip[:, ::2], "must have 8 frames, got 4"), (clip[..., ::2], "24 x 16 pixels, got 24 x 8")):
        with (
            watched(trial.case.network) as calls,
            pytest.raises(ValueError, match=f"{message}|broadcast|tokens|grid must cover"),
        ):
            trial.attribute(other)
        assert not calls


@over("vivit", kinds=("gradient", "attention", "learning"), ours=True, per="kind", together=True)
def test_too_many_inputs_raise(trial: Trial) -> None:
    check_error(trial, Bad(lambda c: c.inputs * 2, r"one clip tensor, got (a tuple of )?2"), "inputs")


@over("two-stream", ours=True, per="kind", together=True)
def test_different_batch_sizes_raise(trial: Trial) -> None:
    rgb, flow = trial.case.inputs
    check_error(
        trial, Bad(lambda c: (rgb, flow[:1]), r"same batch size.*\(2, 3, 4, 12, 10\), \(1, 2, 4, 12, 10\)"), "inputs"
    )
    check_error(trial, Bad(lambda c: (rgb, flow / 0), r"inputs\[1\]"), "inputs")


@over("conv", ours=True, takes="baselines", together=True)
def test_invalid_baselines_raise(trial: Trial) -> None:
    for bad in BASELINES.values():
        check_error(trial, bad, "baselines")


@over("conv", ours=True, takes="feature_mask", together=True)
def test_invalid_feature_masks_raise(trial: Trial) -> None:
    for bad in MASKS.values():
        check_error(trial, bad, "feature_mask")


@over("conv", ours=True, takes="sliding_window_shapes")
def test_invalid_windows_raise(trial: Trial) -> None:
    for bad in WINDOWS.values():
        check_error(trial, bad, "sliding_window_shapes")


@over("conv", ours=True, takes="strides")
def test_invalid_strides_raise(trial: Trial) -> None:
    for bad in STRIDES.values():
        check_error(trial, bad, "strides")


@over("conv", ours=True, takes="n_samples")
def test_invalid_options_of_rise_raise(trial: Trial) -> None:
    for name, value, error in OPTIONS_OF_RISE.values():
        check_error(trial, Bad(lambda c, own=value: own, f"{name}.*{re.escape(repr(value))}", error), name)


@over("conv", "two-stream", takes="perturbations_per_eval", ours=True, together=True)
def test_one_output_for_the_batch_raises(trial: Trial) -> None:
    mean = trial.on(trial.case.around(MeanOverBatch))
    with pytest.raises(ValueError, match=r"one (output per example|row per clip), 2 here.*\(1,?( 3)?\)"):
        mean.attribute(target=1)
