"""Do maps of an answer's word show its evidence? Tables for the bundled video language models, on planted clips.

    python benchmarks/video_language_table.py --model tiny-qwen2_5_vl --clips 12 --out qwen.json
    python benchmarks/video_language_table.py --print qwen.json llava.json  # as Markdown

Each part is written to the file when it is finished, and a part that is in the file is not computed again.

Evidence against rivals (AUROC over voxels, frames and positions; .5 is chance), pointing at the right object, word
discrimination (two words in one clip, two questions about one clip), insertion and deletion of the word's
log-probability, and how much each token relies on the video. Only clips that the model answers correctly count.
Controls: random numbers, the center, the map inverted, the map of another word, the distance of each pixel from its
mean over time (no model), and the same method on random weights. The row of known objects removed says what the model
itself needs: each object gets the fall of the word's score when the background takes its place. A method can hardly be
better than it where the model does not use the evidence.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from train_video_language import AFTER, ANSWERS, BEFORE, PLACE, QUESTIONS, build, tokenizer, two_questions

from captum_staa import AnswerAttribution, VideoLanguageModel, VideoOcclusion, baselines
from captum_staa._utils.tensors import gaussian
from captum_staa.attr import StepAblation
from captum_staa.attr.answer import contrast
from captum_staa.attr.step_ablation import answer_logits, encode
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.metrics import class_discrimination, deletion, evidence_against_rivals, insertion, object_pointing
from captum_staa.models import AnswerClassifier

SEED = 2_000_000_011  # not used in training, nor to choose the rule
CHUNK = 8
Method = Callable[[AnswerClassifier, Tensor], Tensor]


def answered(vlm: VideoLanguageModel, task: str, label: int, against: list[int] | None = None) -> AnswerClassifier:
    """Return the sentence for a class as a classifier, against the words of the other classes."""
    others = [other for other in range(len(ANSWERS[task])) if other != label] if against is None else against
    words = [ANSWERS[task][other] for other in others]
    return vlm.as_classifier(QUESTIONS[task], f"{BEFORE}{ANSWERS[task][label]}{AFTER}", words or None)


# --- methods: maps (B, T, H, W) of the word ---------------------------------------------------------------------------


def ours(clf: AnswerClassifier, clip: Tensor, **options: Any) -> Tensor:
    return AnswerAttribution(clf, **options).attribute_maps(clip, target=PLACE).joint


def gradient_times_input(clf: AnswerClassifier, clip: Tensor, magnitude: bool = False) -> Tensor:
    leaf = clip.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(clf(leaf)[:, PLACE].sum(), leaf)
    product = (gradient * clip).sum(2)
    patches = clf.prompt_for(clip).tokens.patches
    width = tuple(0.75 * side for side in (patches.step, *patches.sides))
    return gaussian(product.abs() if magnitude else product, width)


def embedding(clf: AnswerClassifier, clip: Tensor) -> Tensor:
    """Gradient times embedding at the level of the language model: a map of video tokens."""
    prompt = clf.prompt_for(clip)
    maps = []
    for one in clip.split(1):
        with torch.no_grad():
            features = encode(clf.vlm, one, prompt)
        leaf = features.values.clone().requires_grad_()
        logits = answer_logits(clf.vlm, features.map(lambda values, leaf=leaf: leaf), prompt, clf.answer)
        (gradient,) = torch.autograd.grad(contrast(logits, clf)[:, PLACE].sum(), leaf)
        values = (gradient * leaf).sum(2)[:, : prompt.tokens.count].unflatten(1, prompt.tokens.shape)
        maps.append(prompt.tokens.to_pixels(values.detach()))
    return torch.cat(maps)


@torch.no_grad()
def logit_lens(clf: AnswerClassifier, clip: Tensor) -> Tensor:
    """What the last states of the video tokens would say: the word's logit minus those of the others."""
    prompt = clf.prompt_for(clip)
    logits = clf.vlm.run(clf.vlm.inputs(clip, prompt), len(prompt.ids))[:, prompt.at]  # (B, N, V)
    own = logits[..., clf.answer[PLACE]] - logits[..., clf.versus_ids[PLACE]].mean(-1)
    return prompt.tokens.to_pixels(own.unflatten(1, prompt.tokens.shape))


def steps(clf: AnswerClassifier, clip: Tensor) -> Tensor:
    return StepAblation(clf).attribute_maps(clip, target=PLACE, perturbations_per_eval=8).joint


def occlusion(clf: AnswerClassifier, clip: Tensor) -> Tensor:
    return (
        VideoOcclusion(clf).attribute_maps(clip, (4, 12, 12), (2, 6, 6), target=PLACE, perturbations_per_eval=16).joint
    )


def center(clf: AnswerClassifier, clip: Tensor) -> Tensor:
    axes = [-((torch.arange(size) - (size - 1) / 2) ** 2) / size for size in (clip.shape[1], *clip.shape[3:])]
    return (axes[0][:, None, None] + axes[1][:, None] + axes[2]).expand(len(clip), -1, -1, -1)


def noise(clf: AnswerClassifier, clip: Tensor) -> Tensor:
    return torch.rand(clip[:, :, 0].shape, generator=torch.Generator().manual_seed(0))


def another_word(clf: AnswerClassifier, clip: Tensor) -> Tensor:
    """The map of another word against the right one."""
    answer = clf.answer.clone()
    answer[PLACE], own = clf.versus_ids[PLACE, 0], int(answer[PLACE])
    return ours(clf.vlm.as_classifier(clf.prompt, answer, own), clip)


def distance_from_mean(clf: AnswerClassifier, clip: Tensor) -> Tensor:
    return gaussian((clip - clip.mean(1, keepdim=True)).abs().sum(2), (1.0, 4.0, 4.0))


def random_weights(clf: AnswerClassifier, clip: Tensor) -> Tensor:
    other = shuffled(clf.vlm).as_classifier(clf.prompt, clf.answer)
    other.module.others = clf.versus_ids
    return ours(other, clip)


METHODS: dict[str, Method] = {
    "relevance": ours,
    "relevance, pattern_weight=0": partial(ours, pattern_weight=0),
    "attention": partial(ours, mode="attention"),
    "StepAblation": steps,
    "logit lens on video tokens": logit_lens,
    "gradient x embedding": embedding,
    "gradient x input": gradient_times_input,
    "gradient x input, magnitude": partial(gradient_times_input, magnitude=True),
    "VideoOcclusion": occlusion,
    "(relevance, random weights)": random_weights,
    "(relevance, another word)": another_word,
    "(relevance, inverted)": lambda clf, clip: -ours(clf, clip),
    "(distance from the mean frame)": distance_from_mean,
    "(center)": center,
    "(random numbers)": noise,
}
# Not where a method takes long (occlusion), or where what it shows is known.
QUICK = {name: method for name, method in METHODS.items() if name not in ("VideoOcclusion", "(center)")}
PAIRS = {name: method for name, method in QUICK.items() if name not in ("(relevance, inverted)", "StepAblation")}
PAIRS = {name: method for name, method in PAIRS.items() if name != "(relevance, another word)"}


REMOVED = "(known objects removed)"


@torch.no_grad()
def known_objects(clf: AnswerClassifier, planted: PlantedClips, index: int) -> Tensor:
    """Return a map ``(T, H, W)`` of the fall of the word's score without each object, by who knows where they are."""
    clip, _, _, _, objects = planted.with_masks(index)
    falls = clf(clip[None])[:, PLACE] - clf(planted.without(index, objects))[:, PLACE]  # (objects,)
    return (falls[:, None, None, None] * objects).sum(0)


@cache
def shuffled(vlm: VideoLanguageModel) -> VideoLanguageModel:
    """Return the same architecture with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return VideoLanguageModel(build(vlm.family.name).eval(), tokenizer(vlm.family.name))


def mapped(method: Method, vlm: VideoLanguageModel, task: str, clips: Tensor, labels: Tensor) -> Tensor:
    """Return the map of each clip for the word of its class."""
    maps = torch.zeros_like(clips[:, :, 0])
    for label in range(len(ANSWERS[task])):
        classifier = answered(vlm, task, label)
        for rows in (labels == label).nonzero()[:, 0].split(CHUNK):
            maps[rows] = method(classifier, clips[rows]).detach()
    return maps


@torch.no_grad()
def right(vlm: VideoLanguageModel, task: str, clips: Tensor, labels: Tensor) -> Tensor:
    """Return which clips the model answers correctly, ``(B,)`` bool."""
    words = torch.tensor([int(answered(vlm, task, label, []).answer[PLACE]) for label in range(len(ANSWERS[task]))])
    classifier = answered(vlm, task, 0, [])
    prompt = classifier.prompt_for(clips)
    chosen = [vlm.answer_logits(part, prompt, classifier.answer)[:, PLACE, words].argmax(1) for part in clips.split(32)]
    return torch.cat(chosen) == labels


def mean(values: Tensor) -> float:
    return round(float(values.nanmean()), 3)


# --- tables -----------------------------------------------------------------------------------------------------------


def evidence(vlm: VideoLanguageModel, task: str, count: int, methods: dict[str, Method]) -> dict[str, Any]:
    planted = PlantedClips(SEED, count, task)
    clips, labels, truth = planted[:]
    good = right(vlm, task, clips, labels)
    at = good.nonzero()[:, 0]
    rivals, objects = planted.rivals(slice(0, count))[at], planted.objects(slice(0, count))[at]
    clips, labels, truth = clips[at], labels[at], truth[at]
    table = {"accuracy": mean(good.float()), "clips": len(at)}
    runs = {name: mapped(method, vlm, task, clips, labels) for name, method in methods.items()}
    if "relevance" in methods:
        falls = [
            known_objects(answered(vlm, task, int(label)), planted, int(i)) for i, label in zip(at, labels, strict=True)
        ]
        runs[REMOVED] = torch.stack(falls)
    for name, maps in runs.items():
        table[name] = {
            **{axis: mean(evidence_against_rivals(maps, truth, rivals, axis)) for axis in ("joint", "time", "space")},
            "pointing": mean(object_pointing(maps, objects)),
        }
    if REMOVED in runs:
        joint = {name: evidence_against_rivals(runs[name], truth, rivals) for name in ("relevance", REMOVED)}
        table["words"] = {
            word: {"clips": int((labels == i).sum())}
            | {name: mean(values[labels == i]) for name, values in joint.items()}
            for i, word in enumerate(ANSWERS[task])
        }
    return table


def faithful(vlm: VideoLanguageModel, task: str, count: int, methods: dict[str, Method]) -> dict[str, dict[str, float]]:
    """Return the areas under insertion and deletion of the word's log-probability; what is removed becomes gray.

    Training clips had gray surroundings, so that gray is nothing unusual. A blur would still show movement.
    """
    clips, labels, _ = PlantedClips(SEED + 3, count, task)[:]
    at = right(vlm, task, clips, labels).nonzero()[:, 0]
    clips, labels = clips[at], labels[at]
    table = {}
    for name, method in methods.items():
        maps, areas = mapped(method, vlm, task, clips, labels), {"insertion": [], "deletion": []}
        for i, clip in enumerate(clips.split(1)):
            classifier = answered(vlm, task, int(labels[i]), [])
            options = {"target": PLACE, "cells": (2, 12, 12), "steps": 16, "output": "logit"}
            for key, metric in (("insertion", insertion), ("deletion", deletion)):
                score = metric(classifier, clip, maps[i : i + 1], baselines=torch.zeros_like(clip), **options).score
                areas[key].append(score)
        table[name] = {key: mean(torch.cat(values)) for key, values in areas.items()}
    return table


def two_words(vlm: VideoLanguageModel, task: str, count: int, methods: dict[str, Method]) -> dict[str, float]:
    """Clips with the evidence of two words: A's map at A's place, B's at B's."""
    planted = PlantedClips(SEED + 1, count, task, scene=SceneOptions(two_classes=True))
    clips, labels, truth = planted[:]
    scores: dict[str, list[Tensor]] = {name: [] for name in (*methods, REMOVED)}
    for i in range(count):
        a, b = labels[i].tolist()
        pair = [answered(vlm, task, own, [other]) for own, other in ((a, b), (b, a))]
        maps = {name: [method(clf, clips[i : i + 1]).detach() for clf in pair] for name, method in methods.items()}
        maps[REMOVED] = [known_objects(clf, planted, i)[None] for clf in pair]
        for name, (own, other) in maps.items():
            scores[name].append(class_discrimination(own, other, truth[i : i + 1, 0], truth[i : i + 1, 1]))
    return {name: mean(torch.cat(values)) for name, values in scores.items()}


def questions(vlm: VideoLanguageModel, count: int, methods: dict[str, Method]) -> dict[str, Any]:
    """Clips with the evidence of two questions: the map of each answer at its own place."""
    both = two_questions(SEED + 2, count)
    good = [right(vlm, task, both.clips, both.labels[:, i]) for i, task in enumerate(("pattern", "motion"))]
    at = (good[0] & good[1]).nonzero()[:, 0]
    clips, truth, rivals = both.clips[at], both.truth[at], both.rivals[at]
    table: dict[str, Any] = {"accuracy": [mean(part.float()) for part in good], "clips": len(at)}
    for name, method in methods.items():
        a, b = (mapped(method, vlm, task, clips, both.labels[at, i]) for i, task in enumerate(("pattern", "motion")))
        table[name] = {
            "discrimination": mean(class_discrimination(a, b, truth[:, 0], truth[:, 1])),
            "pattern": mean(evidence_against_rivals(a, truth[:, 0], rivals | truth[:, 1])),
            "motion": mean(evidence_against_rivals(b, truth[:, 1], rivals | truth[:, 0])),
        }
    return table


@torch.no_grad()
def reliance(vlm: VideoLanguageModel, task: str, count: int) -> dict[str, list[float]]:
    """Mean fall of each token's log-probability for several counterfactual clips."""
    planted = PlantedClips(SEED, count, task)
    clips, labels, _ = planted[:]
    at = right(vlm, task, clips, labels).nonzero()[:, 0]
    other = labels[:, None] != labels  # another clip of another class
    others = {
        "blur": baselines.blur(clips, "BTCHW"),
        "mean frame": baselines.mean_frame(clips, "BTCHW"),
        "gray": torch.zeros_like(clips),
        "without evidence": planted.without_evidence(slice(0, count)),
        "reversed": baselines.reverse(clips, "BTCHW"),
        "a clip with another answer": clips[other.float().argmax(1)],
    }
    table, usual = {}, []
    for name, counterfactual in others.items():
        falls = []
        for i in at.tolist():
            classifier = answered(vlm, task, int(labels[i]), [])
            falls.append((classifier(clips[i : i + 1]) - classifier(counterfactual[i : i + 1]))[0, :-1])
        if name in ("blur", "mean frame", "reversed"):
            usual.append(torch.stack(falls))
        table[name] = [round(value, 3) for value in torch.stack(falls).mean(0).tolist()]
    largest = torch.stack(usual).amax(0).mean(0)
    return table | {"default: largest of blur, mean frame, reversed": [round(value, 3) for value in largest.tolist()]}


def parts(vlm: VideoLanguageModel, clips: int) -> dict[str, Callable[[], Any]]:
    """Return all parts of the table by name."""
    words = ("pattern", "motion")  # the words for an order share their evidence
    return {
        **{task: partial(evidence, vlm, task, clips, QUICK) for task in QUESTIONS},
        **{f"faithful, {task}": partial(faithful, vlm, task, clips // 4, QUICK) for task in QUESTIONS},
        **{f"two words, {task}": partial(two_words, vlm, task, clips, PAIRS) for task in words},
        "two questions": partial(questions, vlm, clips, PAIRS),
        # fewer clips for a method of many forwards
        "pattern, few": partial(
            evidence, vlm, "pattern", clips // 3, {"VideoOcclusion": occlusion, "(center)": center}
        ),
        **{f"reliance, {task}": partial(reliance, vlm, task, clips) for task in QUESTIONS},
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the tables of one model: evidence and discrimination, insertion and deletion, reliance."""
    evidence_columns = [
        *((f"{task}, {axis}", task, axis) for task in QUESTIONS for axis in ("joint", "time")),
        *((f"two words, {task}", f"two words, {task}", None) for task in ("pattern", "motion")),
        ("two questions", "two questions", "discrimination"),
    ]
    removal_columns = [
        (f"{task}, {name}", f"faithful, {task}", name) for task in QUESTIONS for name in ("insertion", "deletion")
    ]
    lines = [f"{result['model']}, {result['clips']} clips per part"]
    for columns in (evidence_columns, removal_columns):
        lines += ["", f"| method | {' | '.join(title for title, *_ in columns)} |", "|---" * (len(columns) + 1) + "|"]
        for method in (*METHODS, REMOVED):
            few = {"pattern": "pattern, few"} if method in ("VideoOcclusion", "(center)") else {}
            cells = [result.get(few.get(part, part), {}).get(method) for _, part, _ in columns]
            values = [
                value[name] if name and value is not None else value
                for value, (*_, name) in zip(cells, columns, strict=True)
            ]
            shown = [" " if value is None else f"{value:.2f}".replace("0.", ".", abs(value) < 1) for value in values]
            if any(value is not None for value in values):
                lines.append(f"| {method} | {' | '.join(shown)} |")
    lines += ["", f"| question | word | clips | relevance | {REMOVED} |", "|---|---|---|---|---|"]
    for task in QUESTIONS:
        for word, row in result.get(task, {}).get("words", {}).items():
            lines.append(f"| {task} | {word} | {row['clips']} | {row['relevance']:.2f} | {row[REMOVED]:.2f} |")
    lines += ["", "| question | in place of the clip | it | is | (the word) | . |", "|---|---|---|---|---|---|"]
    for task in QUESTIONS:
        for name, falls in result.get(f"reliance, {task}", {}).items():
            lines.append(f"| {task} | {name} | {' | '.join(f'{value + 0:.2f}' for value in falls[:4])} |")
    return "\n".join(lines).replace("-0.00", "0.00")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="bundled name or folder")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--out", type=Path, help="JSON file; parts that are in it are not computed again")
    parser.add_argument("--parts", nargs="+", help="only parts whose names begin so")
    parser.add_argument("--print", dest="shown", type=Path, nargs="+", help="print these files as Markdown")
    options = parser.parse_args()
    if options.shown:
        print("\n\n".join(markdown(json.loads(path.read_text("utf-8"))) for path in options.shown))
        return
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    vlm = VideoLanguageModel.from_pretrained(options.model)
    result: dict[str, Any] = {"model": Path(options.model).name, "clips": options.clips, "seed": SEED}
    if options.out and options.out.exists():
        result |= json.loads(options.out.read_text("utf-8"))
    for name, part in parts(vlm, options.clips).items():
        if name in result or (options.parts and not any(name.startswith(start) for start in options.parts)):
            continue
        started = time.process_time()
        result[name] = part()
        print(f"{name}: {time.process_time() - started:.0f} CPU s", file=sys.stderr)
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
