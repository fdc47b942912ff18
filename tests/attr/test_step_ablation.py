"""Removal of the video tokens of a step: equal to changing the features by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_answer import step_removed
from tiny_language import FAMILIES, clips_of, question, tiny_vlm
from torch import nn

from captum_staa.attr import StepAblation

ANSWER = "it is right"
NAME = "qwen3_vl"


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_falls_are_those_of_features_changed_by_hand(name):
    clip = clips_of(name)
    clf = tiny_vlm(name).as_classifier(question(name), ANSWER)
    for replacement in ("mean", "zero", "before"):
        falls = StepAblation(clf, replacement).attribute_steps(clip, perturbations_per_eval=np.int64(2))
        for step in (0, 2):
            expected = clf(clip)[0] - step_removed(clf, clip, step, replacement)
            assert torch.allclose(falls[0, :, step], expected, atol=1e-5)


def test_map_has_the_shape_of_the_clip_and_each_clip_its_own_token():
    clips = clips_of(NAME, 2)
    method = StepAblation(tiny_vlm(NAME).as_classifier(question(NAME), ANSWER))
    attributions = method.attribute(clips, target=[1, 3])
    falls = method.attribute_steps(clips)
    assert attributions.shape == clips.shape
    frames = attributions.sum((2, 3, 4))
    assert torch.allclose(frames[0, :2].sum(), falls[0, 1, 0], atol=1e-5)
    assert torch.allclose(frames[1, 4], falls[1, 3, 2], atol=1e-5)  # the last step has one frame
    assert isinstance(method.attribute((clips,), target=0), tuple)


def test_the_tower_runs_once_and_the_bar_counts_the_calls(capsys):
    clf, clips, towers, calls = tiny_vlm(NAME).as_classifier(question(NAME), ANSWER), clips_of(NAME, 2), [], []
    handles = [
        clf.vlm.model.model.visual.register_forward_pre_hook(lambda *_: towers.append(1)),
        clf.vlm.model.register_forward_pre_hook(lambda *_: calls.append(1)),
    ]
    try:
        StepAblation(clf).attribute(clips, target=0, perturbations_per_eval=2, show_progress=True)
    finally:
        for handle in handles:
            handle.remove()
    assert len(towers) == 2 and len(calls) == 6  # of three steps per clip, two at a time, and the whole clips
    assert "StepAblation attribution: 100%" in (shown := capsys.readouterr().err) and " 6/6 " in shown


def test_bad_input_is_refused():
    clf = tiny_vlm("internvl").as_classifier(question("internvl"), ANSWER)
    with pytest.raises(TypeError, match=r"got Linear. Use VideoFeatureAblation"):
        StepAblation(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="replacement must be one of 'mean', 'zero', 'before'"):
        StepAblation(clf, "blur")
    with pytest.raises(ValueError, match="additional_forward_args must be None"):
        StepAblation(clf).attribute(clips_of("internvl"), 0, 1)
    with pytest.raises(ValueError, match="perturbations_per_eval must be an integer of at least 1"):
        StepAblation(clf).attribute(clips_of("internvl"), 0, perturbations_per_eval=0)
