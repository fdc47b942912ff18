"""A first comparison of methods on clips whose evidence is planted: where it was found, and for how many forwards."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from captum.attr import IntegratedGradients, Occlusion, Saliency
from torch import Tensor
from tqdm import tqdm

from captum_staa import io
from captum_staa.attr import STAA
from captum_staa.benchmark import PlantedClips
from captum_staa.layout import SpaceTime, from_joint, space_time
from captum_staa.metrics import auroc, controls, pointing_game
from captum_staa.models import VideoClassifier

Method = Callable[[Tensor, int], SpaceTime]  # of one clip and its class


@dataclass(frozen=True)
class Row:
    """One method's means over the clips."""

    method: str
    auroc_joint: float
    auroc_temporal: float
    pointing: float
    forwards: float  # median time, in medians of a plain forward
    seconds: float  # median


def methods_of(classifier: VideoClassifier) -> dict[str, Method]:
    """The methods by name; maps of signed methods are taken by magnitude, as a patch may also speak against."""
    layout = classifier.layout
    assert classifier.grid is not None
    t, h, w = classifier.grid.tubelet
    block = tuple({"T": t, "C": 3, "H": h, "W": w}[axis] for axis in layout.axes[1:])

    def staa(**options: object) -> Method:
        explainer = STAA(classifier, **options)  # type: ignore[arg-type]
        return lambda clip, target: explainer.attribute_parts(clip, target=target)

    def captum(attributions: Callable[[Tensor, int], Tensor]) -> Method:
        return lambda clip, target: from_joint(space_time(attributions(clip, target), layout).joint.abs())

    saliency, integrated, occlusion = Saliency(classifier), IntegratedGradients(classifier), Occlusion(classifier)
    return {
        "STAA attention, last layer": staa(mode="attention", layers=[-1]),
        "STAA attention, all layers rolled out": staa(mode="attention", layers="all"),
        "STAA relevance": staa(mode="relevance"),
        "STAA released": staa(mode="released"),
        "Captum Saliency": captum(
            lambda clip, target: saliency.attribute(clip.clone().requires_grad_(), target=target).detach()
        ),
        "Captum IntegratedGradients, 50 steps": captum(
            lambda clip, target: integrated.attribute(clip, target=target, n_steps=50, internal_batch_size=10)
        ),
        f"Captum Occlusion, {t} x {h} x {w}": captum(
            lambda clip, target: occlusion.attribute(
                clip, block, strides=block, target=target, perturbations_per_eval=16
            )
        ),
    }


def compare(classifier: VideoClassifier, clips: PlantedClips) -> tuple[list[Row], dict[str, Tensor]]:
    """Score every method on every clip, and the controls; the inverted map is that of STAA's relevance.

    Each call is timed right after a plain forward of the same clip, so that both meet the same machine. One thread is
    used: a small model's threads wait for each other most of the time.

    Args:
        classifier: a video transformer that answers the clips' task.
        clips: with their truth.

    Returns:
        One row per method and control, and the methods' maps of the first clip, ``(1, T, H, W)`` each. ``pointing``
        allows the maximum to lie one tubelet beside the truth.
    """
    assert classifier.grid is not None
    methods = methods_of(classifier)
    tubelet = classifier.grid.tubelet
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[list[float]]] = {}
    first: dict[str, Tensor] = {}
    plain: list[float] = []
    with _one_thread(), tqdm(total=len(clips) * len(methods), desc="comparing", delay=1, leave=False) as bar:
        clip, label, _ = clips[0:1]
        with torch.no_grad():
            classifier(clip)
        methods["STAA relevance"](clip, int(label))  # the first call of anything is slow
        for index in range(len(clips)):
            clip, label, truth = clips[index : index + 1]
            maps: dict[str, Tensor] = {}
            for name, method in methods.items():
                started = time.perf_counter()
                with torch.no_grad():
                    classifier(clip)
                plain.append(time.perf_counter() - started)
                started = time.perf_counter()
                parts = method(clip, int(label))
                seconds = time.perf_counter() - started
                maps[name] = parts.joint
                found.setdefault(name, []).append([*_scores(parts, truth, tubelet), seconds])
                bar.update()
            first = first or maps
            for name, control in controls(clip, classifier.layout, maps["STAA relevance"], generator).items():
                found.setdefault(name, []).append([*_scores(from_joint(control), truth, tubelet), 0.0])
    forward = statistics.median(plain)
    rows = []
    for name, values in found.items():
        joint, temporal_mean, pointing = (statistics.fmean(column) for column in list(zip(*values, strict=True))[:3])
        median = statistics.median(seconds for *_, seconds in values)
        rows.append(Row(name, joint, temporal_mean, pointing, median / forward, median))
    return rows, first


def _scores(parts: SpaceTime, truth: Tensor, tubelet: tuple[int, int, int]) -> tuple[float, float, float]:
    frames = truth.any(3, keepdim=True).any(2, keepdim=True)  # (1, T, 1, 1)
    temporal = auroc(parts.temporal[:, :, None, None], frames)
    return auroc(parts.joint, truth).item(), temporal.item(), pointing_game(parts.joint, truth, tubelet).item()


def as_markdown(rows: Sequence[Row]) -> str:
    """A table for people.

    Example:
        >>> print(as_markdown([Row("STAA", 0.97512, 0.9, 1.0, 3.26, 0.012)]))
        | method | AUROC joint | AUROC temporal | pointing | time / forward |
        |:-------|------------:|---------------:|---------:|---------------:|
        | STAA   |       0.975 |          0.900 |     1.00 |            3.3 |
    """
    head = ("method", "AUROC joint", "AUROC temporal", "pointing", "time / forward")
    body = [
        (r.method, f"{r.auroc_joint:.3f}", f"{r.auroc_temporal:.3f}", f"{r.pointing:.2f}", f"{r.forwards:.1f}")
        for r in rows
    ]
    wide = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(n) if i == 0 else cell.rjust(n) for i, (cell, n) in enumerate(zip(cells, wide))]  # noqa: B905
        return f"| {' | '.join(padded)} |"

    rule = "|".join([":" + "-" * (wide[0] + 1), *("-" * (n + 1) + ":" for n in wide[1:])])
    return "\n".join([line(head), f"|{rule}|", *map(line, body)])


def write_tables(rows: Sequence[Row], markdown: Path, table: Path, *, overwrite: bool) -> None:
    """The table for people and the one for programs."""
    with io.atomic(markdown, overwrite) as partial:
        partial.write_text(as_markdown(rows) + "\n", encoding="utf-8")
    with io.atomic(table, overwrite) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
