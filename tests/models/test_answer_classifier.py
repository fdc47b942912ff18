"""The answer of a video language model as a classifier: methods and metrics explain its tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from captum.attr import IntegratedGradients
from tiny_language import FAMILIES, clips_of, question, size_of, tiny_vlm, tokenizer
from torch import Tensor

from captum_staa import RISE, VideoFeatureAblation, VideoOcclusion, baselines, feature_masks
from captum_staa.metrics import insertion
from captum_staa.models import AnswerClassifier, VideoLanguageModel

NAME = "qwen3_vl"  # a run of tokens per step, padded frames, DeepStack
ANSWER = "it is right"


def classifier(name: str = NAME, versus=None) -> AnswerClassifier:
    return tiny_vlm(name).as_classifier(question(name), ANSWER, versus)


def by_hand(name: str, clip: Tensor, others: tuple[str, ...] = ()) -> Tensor:
    """Log-probability of each token of the answer, from one forward per token of the prompt and what precedes it."""
    vlm = tiny_vlm(name)
    prompt = vlm.prompt(question(name), size_of(name))
    pieces = ["it", "\u0120is", "\u0120right"]
    ids = tokenizer().convert_tokens_to_ids(pieces)
    columns = []
    for i, own in enumerate(ids):
        arguments = vlm.inputs(clip, prompt, torch.tensor(ids[:i], dtype=torch.long))
        logs = vlm.model(**arguments).logits[:, -1].log_softmax(-1)
        space = "\u0120" if i else ""
        rivals = tokenizer().convert_tokens_to_ids([space + word for word in others])
        columns.append(logs[:, own] - (logs[:, rivals].mean(1) if rivals else 0))
    return torch.stack([*columns, sum(columns)], 1)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_outputs_are_the_log_probabilities_of_the_tokens_and_of_the_whole_answer(name):
    clips = clips_of(name, 2)
    clf = classifier(name)
    assert torch.allclose(clf(clips), by_hand(name, clips), atol=1e-5)
    assert clf.labels == ["it", "is", "right", ANSWER] and clf.class_index("right") == 2


@torch.no_grad()
def test_versus_subtracts_the_mean_of_other_words_at_the_same_place():
    clips = clips_of(NAME, 2)
    assert torch.allclose(classifier(versus="left")(clips), by_hand(NAME, clips, ("left",)), atol=1e-5)
    both = classifier(versus=["left", "bottom"])
    assert torch.allclose(both(clips), by_hand(NAME, clips, ("left", "bottom")), atol=1e-5)
    ids = tokenizer().convert_tokens_to_ids(["\u0120left", "\u0120bottom"])
    assert classifier(versus=ids).versus_ids.tolist() == [ids] * 3
    with pytest.raises(ValueError, match="words of one token each, got 'it is', which has 2"):
        classifier(versus="it is")
    with pytest.raises(ValueError, match=r"versus must consist of token ids from 0 to .* got ids from 9999"):
        classifier(versus=["left", 9999])
    with pytest.raises(ValueError, match="versus must have at least one token"):
        classifier(versus="")
    for wrong in (1.5, True, [None]):
        with pytest.raises(TypeError, match="versus must be a word, a token id, or a list of these, got"):
            classifier(versus=wrong)


def test_integrated_gradients_of_captum():
    clip, clf = clips_of(NAME), classifier()
    total = torch.zeros_like(clip)
    for k in range(4):
        point = (clip * (k + 0.5) / 4).requires_grad_()
        total += torch.autograd.grad(by_hand(NAME, point)[0, 2], point)[0] / 4
    attributions = IntegratedGradients(clf).attribute(clip, target=2, n_steps=4, method="riemann_middle")
    assert torch.allclose(attributions.float(), total * clip, atol=1e-5)


@torch.no_grad()
def test_occlusion_and_ablation():
    clip, clf = clips_of(NAME), classifier()
    attributions = VideoOcclusion(clf).attribute(clip, (2, 8, 8), (2, 8, 8), target=3, perturbations_per_eval=4)
    before = by_hand(NAME, clip)[0, 3]
    for frame, row, column in ((0, 0, 0), (2, 8, 16)):
        hidden = clip.clone()
        hidden[:, frame : frame + 2, :, row : row + 8, column : column + 8] = 0
        fall = before - by_hand(NAME, hidden)[0, 3]
        block = attributions[0, frame : frame + 2, 0, row : row + 8, column : column + 8]
        assert torch.allclose(block, fall.expand_as(block), atol=1e-5)
    mask, mean = feature_masks.frames(clip, "BTCHW"), baselines.mean_frame(clip, "BTCHW")
    falls = VideoFeatureAblation(clf).attribute(clip, mean, target=1, feature_mask=mask)
    hidden = clip.clone()
    hidden[:, 3] = mean[:, 3]
    assert torch.isclose(falls[0, 3, 0, 0, 0], by_hand(NAME, clip)[0, 1] - by_hand(NAME, hidden)[0, 1], atol=1e-5)


@torch.no_grad()
def test_rise_and_insertion():
    clip, clf = clips_of(NAME), classifier()
    options = {"target": 0, "n_samples": 6, "n_cells": (2, 2, 2), "perturbations_per_eval": 3}
    maps = RISE(clf).attribute(clip, **options)
    hand = RISE(lambda clip: by_hand(NAME, clip), "BTCHW").attribute(clip, **options)
    assert torch.allclose(maps, hand, atol=1e-4)
    order = torch.arange(5.0).view(1, 5, 1, 1).expand(1, 5, 16, 24)  # the last frame first
    result = insertion(clf, clip, order, target=3, steps=5, axis="time", output="logit")
    steps = []
    for k in range(6):
        shown = clip.clone()
        shown[:, : 5 - k] = 0
        steps.append(by_hand(NAME, shown)[0, 3])
    assert torch.allclose(result.curve[0].float(), torch.stack(steps), atol=1e-4)


def test_half_precision_models_give_log_probabilities_in_float32():
    vlm = VideoLanguageModel(tiny_vlm(NAME).model, tokenizer())
    vlm.model = copy.deepcopy(vlm.model).bfloat16()
    outputs = vlm.as_classifier(question(NAME), ANSWER)(clips_of(NAME))
    assert outputs.dtype == torch.float32
    assert (outputs - classifier()(clips_of(NAME))).abs().max() < 0.5


def test_answers_of_one_token_and_answers_as_ids():
    clf = tiny_vlm(NAME).as_classifier(question(NAME), "right")
    assert clf.labels == ["right", "whole answer"]
    ids = tiny_vlm(NAME).prompt(question(NAME), size_of(NAME)).ids
    bare = VideoLanguageModel(tiny_vlm(NAME).model)  # no tokenizer
    clf = bare.as_classifier(ids, tokenizer().convert_tokens_to_ids(["it", "\u0120is"]), versus=[5])
    assert clf(clips_of(NAME)).shape == (1, 3)
    with pytest.raises(ValueError, match="token ids from 0 to"):
        bare.as_classifier(ids, [10_000])
    with pytest.raises(ValueError, match=r"must contain 12 video tokens .* got 18"):
        clf(clips_of(NAME)[:, :4])
