"""Score attribution methods on planted clips: evidence against rivals, one class against another, and the controls.

All tables in docs/ that compare a method with the truth are made with `Evidence`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from captum_staa import VideoClassifier, metrics
from captum_staa._utils.tensors import SPREAD, gaussian
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.benchmark.clip_runner import RandomWeights

BATCH = 8
COLUMNS = {
    "rivals": "evidence against rivals",
    "time": "in time",
    "space": "in space",
    "all": "against all voxels",
    "pointing": "evidence first",
    "classes": "class A against B",
    "random weights": "random weights",
    "other class": "other class",
}
Maps = Callable[[Tensor, Tensor], dict[str, Tensor]]  # clips in the classifier's layout, targets (B,) -> (B, T, H, W)
Scores = dict[str, dict[str, list[float]]]  # by name of a map and key of COLUMNS: one value per clip


class Evidence:
    """Planted clips for one model, and the scores of maps on them.

    Args:
        clf: the model.
        task: task of the model. ``"order"`` has no clips of two classes, so it has no score of classes.
        count: number of clips. The same number of clips of two classes uses the seed after `seed`.
        redraw: module with random weights in this control, if it is larger than the model.
        footage: real frames behind the objects, which then have the brightness and the blur of the frames. None draws
            a texture.
    """

    def __init__(
        self,
        clf: VideoClassifier,
        task: str,
        count: int,
        seed: int,
        redraw: nn.Module | None = None,
        footage: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.clf, self.count = clf, count
        scene = SceneOptions(blend=footage is not None)
        self.planted = PlantedClips(seed, count, task, scene=scene, background=footage)
        both = replace(scene, two_classes=True)
        self.pairs = None if task == "order" else PlantedClips(seed + 1, count, task, scene=both, background=footage)
        for parameter in clf.parameters():
            parameter.requires_grad_(False)
        self._weights = RandomWeights(clf if redraw is None else VideoClassifier(redraw, clf.layout), seed=0)

    def scores(self, maps: Maps, controls: bool = False) -> Scores:
        """Score every map that `maps` returns.

        `controls` scores the maps for another class, and those of the same model with random weights, as well.
        """
        found: Scores = {}
        for start in range(0, self.count, BATCH):
            part = slice(start, min(start + BATCH, self.count))
            clips, labels, truth = self.planted[part]
            clips, rivals, objects = self._own(clips), self.planted.rivals(part), self.planted.objects(part)
            for name, own in maps(clips, labels).items():
                for key, values in against_rivals(own, truth, rivals, objects).items():
                    _extend(found, name, key, values)
            if self.pairs is not None:
                two, both, truths = self.pairs[part]
                two = self._own(two)
                a, b = maps(two, both[:, 0]), maps(two, both[:, 1])
                for name in a:
                    preferred = metrics.class_discrimination(a[name], b[name], truths[:, 0], truths[:, 1])
                    _extend(found, name, "classes", preferred)
            if controls:
                with torch.no_grad():
                    other = self.clf(clips).scatter(1, labels[:, None], -torch.inf).argmax(1)
                for name, own in maps(clips, other).items():
                    _extend(found, name, "other class", metrics.evidence_against_rivals(own, truth, rivals))
                with self._weights.in_place():
                    for name, own in maps(clips, labels).items():
                        _extend(found, name, "random weights", metrics.evidence_against_rivals(own, truth, rivals))
        return found

    def without_a_model(self, **perfect: Callable[[Tensor], Tensor]) -> Scores:
        """Score random, uniform and center maps, those of the clip alone, and functions `perfect` of the truth."""
        generator = torch.Generator().manual_seed(0)
        found: Scores = {}
        for start in range(0, self.count, BATCH):
            part = slice(start, min(start + BATCH, self.count))
            clips, _, truth = self.planted[part]
            maps = {f"control: {name}": own for name, own in metrics.model_free_controls(clips, "BTCHW").items()}
            maps["random"] = torch.rand(truth.shape, generator=generator)
            maps["uniform"] = torch.ones(truth.shape)
            maps |= {name: make(truth) for name, make in perfect.items()}
            for name, own in maps.items():
                values = against_rivals(own, truth, self.planted.rivals(part), self.planted.objects(part))
                for key, each in values.items():
                    _extend(found, name, key, each)
        return found

    @torch.no_grad()
    def known_objects(self) -> Scores:
        """Score maps that know the objects: how far the target's logit falls, compared with the mean of the others,
        when the background replaces an object, in two frames at a time or in all frames where it shows the same.
        """
        found: Scores = {}
        for index in range(self.count):
            _, label, truth, rivals, objects = self.planted.with_masks(index)
            parts = torch.cat([objects, (rivals & ~objects.any(0))[None]])  # the last: evidence outside its window
            frames = torch.arange(truth.shape[0])[:, None, None]
            pairs = torch.stack([part & (frames // 2 == pair) for part in parts for pair in range(len(frames) // 2)])
            for name, masks in (("two frames", pairs), ("all frames", parts)):
                masks = masks[masks.flatten(1).any(1)]
                clips = self._own(torch.cat([self.planted.without(index, masks), self.planted[index][0][None]]))
                outputs = torch.cat([self.clf(batch) for batch in clips.split(4 * BATCH)])
                contrast = outputs[:, label] - outputs.mean(1)
                fallen = torch.einsum("m,mthw->thw", contrast[-1] - contrast[:-1], masks.float())
                one = against_rivals(fallen[None], truth[None], rivals[None], objects[None])
                for key, values in one.items():
                    _extend(found, f"known objects removed, {name}", key, values)
        return found

    def _own(self, clips: Tensor) -> Tensor:
        return self.clf.layout.from_working(clips).contiguous()


def against_rivals(maps: Tensor, truth: Tensor, rivals: Tensor, objects: Tensor) -> dict[str, Tensor]:
    """``(B,)`` for each of the first five columns, of maps ``(B, T, H, W)``."""
    return {
        "rivals": metrics.evidence_against_rivals(maps, truth, rivals),
        "time": metrics.evidence_against_rivals(maps, truth, rivals, axis="time"),
        "space": metrics.evidence_against_rivals(maps, truth, rivals, axis="space"),
        "all": metrics.auroc(maps, truth),
        "pointing": metrics.object_pointing(maps, objects),
    }


def smoothed(maps: Tensor) -> Tensor:
    """``(B, T, H, W)`` averaged over three quarters of a tubelet of most bundled models, 2 x 8 x 8."""
    return gaussian(maps, (SPREAD * 2, SPREAD * 8, SPREAD * 8))


def mean(values: Iterable[float]) -> float:
    """Return the mean of the known values, or nan if there are none."""
    known = [value for value in values if value == value]
    return statistics.fmean(known) if known else float("nan")


def means(scores: Scores) -> dict[str, dict[str, float]]:
    return {name: {key: mean(values) for key, values in own.items()} for name, own in scores.items()}


def averaged(results: Iterable[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Return means over the models that have the map and the column."""
    results = list(results)
    names = dict.fromkeys(name for own in results for name in own)
    keys = {name: dict.fromkeys(key for own in results for key in own.get(name, {})) for name in names}
    return {
        name: {key: mean(own[name][key] for own in results if key in own.get(name, {})) for key in keys[name]}
        for name in names
    }


def best_control(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Replace all maps without a model by the best one for each column."""
    controls = [values for name, values in found.items() if name.startswith("control: ")]
    rest = {name: values for name, values in found.items() if not name.startswith("control: ")}
    if not controls:
        return rest
    best = {key: max((c[key] for c in controls if c[key] == c[key]), default=float("nan")) for key in controls[0]}
    return {**rest, "best map without a model": best}


def cell(values: dict[str, float], key: str, digits: int = 3) -> str:
    """Return a number for Markdown, or an empty string if there is none."""
    value = values.get(key, float("nan"))
    return f"{value:.{digits}f}" if value == value else ""


def markdown(found: dict[str, dict[str, float]], columns: dict[str, str], first: str = "method") -> list[str]:
    """Return the lines of a table: one row per name, sorted by evidence against rivals."""
    lines = [f"| {first} | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in sorted(found.items(), key=lambda each: -each[1].get("rivals", 0)):
        lines.append(f"| {name} | " + " | ".join(cell(values, key) for key in columns) + " |")
    return lines


def _extend(found: Scores, name: str, key: str, values: Tensor) -> None:
    found.setdefault(name, {}).setdefault(key, []).extend(values.tolist())


def write_between(page: Path, script: str, text: str) -> None:
    """Replace the text of a page between the two comments with the name of a script."""
    begin, end = f"<!-- made by benchmarks/{script}.py: begin -->\n", "<!-- end -->\n"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page} must hold {begin.strip()} and then {end.strip()}")
    part = page.with_suffix(".part")
    part.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}", encoding="utf-8")
    part.replace(page)
    print(text)
