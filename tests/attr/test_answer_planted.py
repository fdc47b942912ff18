"""On planted clips, maps of a word show its evidence and not rivals, and constant words do not rely on the video."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from captum_staa import AnswerAttribution, VideoLanguageModel
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.metrics import class_discrimination, evidence_against_rivals
from captum_staa.models.video_language.loading import _WEIGHTS, bundled_language_models

SEED = 2_000_000_033  # neither for training nor for choosing the rule
WORDS = {"pattern": ("right", "bottom", "diagonal"), "motion": ("left", "right"), "order": ("right", "bottom")}
QUESTIONS = {"pattern": "which pattern ?", "motion": "which direction ?", "order": "which came first ?"}
PLACE = 2  # of the word in "it is ... ."


@cache
def bundled(name: str) -> VideoLanguageModel:
    return VideoLanguageModel.from_pretrained(name)


def answer(vlm: VideoLanguageModel, task: str, label: int, versus: bool = True):
    others = [word for word in WORDS[task] if word != WORDS[task][label]]
    return vlm.as_classifier(QUESTIONS[task], f"it is {WORDS[task][label]} .", others if versus else None)


@pytest.mark.parametrize("name", bundled_language_models())
def test_bundled_models_are_small_and_answer_by_themselves(name):
    vlm = bundled(name)
    assert sum(path.stat().st_size for path in (_WEIGHTS / name).iterdir()) < 1_200_000
    planted = PlantedClips(SEED, 6, "order")
    for clip, _, _ in planted:
        made = vlm.words(vlm.generate(clip[None], QUESTIONS["order"]))
        assert made[:2] == ["it", "is"] and made[2] in WORDS["order"] and made[3] == "."
    assert not vlm.training


EVIDENCE = [
    ("tiny-qwen2_5_vl", "pattern", 0.95),
    ("tiny-qwen2_5_vl", "motion", 0.95),
    ("tiny-qwen2_5_vl", "order", 0.95),
    ("tiny-llava_onevision", "pattern", 0.8),
    ("tiny-llava_onevision", "motion", 0.88),
    ("tiny-llava_onevision", "order", 0.9),
]


@pytest.mark.parametrize(("name", "task", "least"), EVIDENCE)
def test_relevance_finds_the_evidence_against_rivals(name, task, least):
    vlm, count = bundled(name), 8
    planted = PlantedClips(SEED, count, task)
    clips, labels, truth = planted[:]
    rivals = planted.rivals(slice(0, count))
    random = VideoLanguageModel(type(vlm.model)(vlm.config).eval(), vlm.processor)
    found, chance = [], []
    with torch.no_grad():
        said = [answer(vlm, task, label, versus=False)(clips)[:, PLACE] for label in range(len(WORDS[task]))]
    right = torch.stack(said, 1).argmax(1) == labels
    assert right.float().mean() > 0.7
    for label in range(len(WORDS[task])):
        rows = ((labels == label) & right).nonzero()[:, 0]
        for model, scores in ((vlm, found), (random, chance)):
            maps = AnswerAttribution(answer(model, task, label)).attribute_maps(clips[rows], target=PLACE).joint
            scores.append(evidence_against_rivals(maps, truth[rows], rivals[rows]))
    assert torch.cat(found).mean() > least
    assert 0.25 < torch.cat(chance).mean() < 0.75


@pytest.mark.parametrize("name", bundled_language_models())
def test_the_asked_word_changes_the_place(name):
    vlm, count = bundled(name), 6
    clips, labels, truth = PlantedClips(SEED + 1, count, "pattern", scene=SceneOptions(two_classes=True))[:]
    scores = []
    for i in range(count):
        maps = []
        for own, other in (labels[i].tolist(), labels[i].flip(0).tolist()):
            clf = vlm.as_classifier(QUESTIONS["pattern"], f"it is {WORDS['pattern'][own]} .", WORDS["pattern"][other])
            maps.append(AnswerAttribution(clf).attribute_maps(clips[i : i + 1], target=PLACE).joint)
        scores.append(class_discrimination(*maps, truth[i : i + 1, 0], truth[i : i + 1, 1]))
    assert torch.cat(scores).mean() > 0.9


@pytest.mark.parametrize("name", bundled_language_models())
def test_constant_words_do_not_rely_on_the_video_and_the_word_does(name):
    vlm = bundled(name)
    clips, labels, _ = PlantedClips(SEED, 6, "order")[:]
    reliance = []
    for i in range(6):
        other = clips[labels != labels[i]]  # clips with the other answer
        text = f"it is {WORDS['order'][int(labels[i])]} ."
        maps = AnswerAttribution(vlm).attribute_answer(clips[i : i + 1], QUESTIONS["order"], text, counterfactual=other)
        reliance.append(maps.reliance)
    mean = torch.stack(reliance).mean(0)
    assert mean[PLACE] > 1
    assert mean[[0, 1, 3]].abs().max() < 0.05


@pytest.mark.parametrize("task", WORDS)
@pytest.mark.parametrize("name", bundled_language_models())
def test_reliance_finds_every_kind_of_evidence_by_default(name, task):
    """A blurred clip still shows movement, and without evidence a model says one of two words all the same."""
    vlm, count = bundled(name), 4
    clips, labels, _ = PlantedClips(SEED, count, task)[:]
    reliance = []
    for i in range(count):
        text = f"it is {WORDS[task][int(labels[i])]} ."
        maps = AnswerAttribution(vlm, mode="attention").attribute_answer(clips[i : i + 1], QUESTIONS[task], text)
        reliance.append(maps.reliance)
    assert torch.stack(reliance)[:, PLACE].mean() > 1
    assert torch.stack(reliance)[:, [0, 1, 3]].abs().max() < 0.05


def test_a_head_that_ignores_the_video_is_not_explained_by_it():
    """A model whose answer does not depend on the clip has contributions of zero in the language model's video part."""
    vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")
    merger = next(module for name, module in vlm.model.named_modules() if name.endswith("visual.merger"))
    for part in merger.modules():
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.weight)
    clip = PlantedClips(SEED, 1, "order")[:][0]
    maps = AnswerAttribution(vlm).attribute_answer(clip, QUESTIONS["order"], "it is right .")
    assert maps.joint.abs().max() == 0 and maps.reliance.abs().max() < 1e-6
