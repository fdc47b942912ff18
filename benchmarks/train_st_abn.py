"""Train the bundled ST-ABNs in `captum_staa/models/weights`: with a small 3D CNN, and as an observer of VideoMAE.

    python benchmarks/train_st_abn.py --task pattern --kind bottleneck       # some minutes on one core
    python benchmarks/train_st_abn.py --all
    python benchmarks/train_st_abn.py --task mixed --kind bottleneck --out OUT

- `bottleneck` starts from the bundled 3D CNN. Gates behind its stem, and the network behind them, are trained with the
  loss "faithful".
- `mix` is the network of the paper. Its 3D CNN is trained alone, then together with its branch (the loss "paper").
- `observer` learns to mask clips so that the frozen, bundled VideoMAE keeps its prediction.

The task `mixed` has clips of all three tasks, for a network of two classes that must know three kinds of evidence. Its
3D CNN is trained first, from that of `pattern`, and kept in the same folder. It is not bundled.

New clips are drawn for each step. The test clips have another seed. The weights are stored as float16, and tested in
this form.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from train_zoo import HELD_OUT_SEED, WEIGHTS, notice, training_batch, write_json

from captum_staa import VideoClassifier, baselines, metrics
from captum_staa.benchmark.planted import PlantedClips
from captum_staa.benchmark.scenes import LABELS
from captum_staa.models import STABN, BranchConfig, FitConfig, STABNLoss, fit_st_abn, resnet3d
from captum_staa.models.resnet3d import ResNet3D

STEPS, BATCH = 20, 16  # of an epoch; clips of a step
EPOCHS = {"pattern": 48, "motion": 40, "order": 18, "mixed": 30}  # of the 3D CNN of the mix alone, or of `mixed`
JOINT = {"pattern": 16, "motion": 16, "order": 10}  # further ones, with the branch
CLOSING = 16  # epochs of the bottleneck
AXES = ("joint", "space", "time")
KINDS = ("bottleneck", "mix", "observer")
PAPER = ("pattern",)  # tasks with a bundled network of the paper, for comparison
LOOKING, LOOKS = 8, 11  # clips per step and epochs of the observer
EASY = 4  # of these, the first ones with an area that weighs little: gates that close at once learn nothing
LAYER = "videomae.encoder.layer.1"
RATE = 3e-3
EASY_START = 0.4  # part of the training in which clips of evidence alone become fewer; see train_zoo.py


MIXED = "mixed"
MIXED_LABELS = ("bright-right, left or right-first", "bright-bottom, right or bottom-first")
PART = 5  # clips of each task in a batch of `mixed`


class MixedClips:
    """Clips of all tasks in turn, with two classes each: what the programs use of :class:`PlantedClips`.

    No object says the class but the evidence: rivals say which task it is, and each task has both classes.
    """

    def __init__(self, seed: int, n: int) -> None:
        self.planted = [PlantedClips(seed, n, task) for task in LABELS]
        two = [i for i in range(n) if self.planted[0][i][1] < len(MIXED_LABELS)]  # `pattern` has a third class
        self.places = [(task, two[i] if task == 0 else i) for i in range(-(-n // 3)) for task in range(3)][:n]

    def __getitem__(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        clips, labels, truth = zip(*(self.planted[task][i] for task, i in self.places[part]), strict=True)
        return torch.stack(clips), torch.stack(labels), torch.stack(truth)

    def rivals(self, part: slice) -> Tensor:
        return torch.stack([self.planted[task].rivals(i) for task, i in self.places[part]])

    def without_evidence(self, part: slice) -> Tensor:
        return torch.stack([self.planted[task].without_evidence(i) for task, i in self.places[part]])


def planted_of(seed: int, n: int, task: str) -> PlantedClips | MixedClips:
    return MixedClips(seed, n) if task == MIXED else PlantedClips(seed, n, task)


def labels_of(task: str) -> list[str]:
    return list(MIXED_LABELS if task == MIXED else LABELS[task])


def mixed_batch(seed: int, progress: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return clips (B, T, C, H, W) and targets (B, 2): of each task some as they are, without rivals, or evidence."""
    clips, targets = [], []
    for task in LABELS:
        drawn, sure, _ = training_batch(task, seed, progress, EASY_START, generator, 12)
        order = torch.tensor([-1, 0, *range(2, 9)])  # without evidence, without rivals, and whole ones
        order = order[sure[order, 2:].sum(1) < 1][:PART]  # of the first two classes, or of none
        clips.append(drawn[order])
        targets.append(sure[order, :2] / sure[order, :2].sum(1, keepdim=True))
    return torch.cat(clips), torch.cat(targets)


def small_trunk(classes: int) -> ResNet3D:
    """Return the trunk that :class:`STABN` builds: no stride in time before the branch, no zeros at the clip's ends."""
    return ResNet3D(classes, padding_mode="replicate", time_strides_from=2)


def lessons(task: str, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch of clips (B, C, T, H, W) and target probabilities. The difficulty grows from epoch to epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000 + epoch)
    for i in range(epoch * STEPS, (epoch + 1) * STEPS):
        progress, clip_seed = i / (EPOCHS[task] * STEPS), seed * 1_000_000 + i
        if task == MIXED:
            clips, targets = mixed_batch(clip_seed, progress, generator)
        else:
            clips, targets, _ = training_batch(task, clip_seed, progress, EASY_START, generator, BATCH)
        yield clips.transpose(1, 2).contiguous(), targets


def train_trunk(task: str, seed: int, trunk: ResNet3D | None = None) -> VideoClassifier:
    """Train a 3D CNN without a branch, with the same steps. None begins with that of the mix, untrained."""
    torch.manual_seed(seed)
    trunk = (trunk or small_trunk(len(labels_of(task)))).train()
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS[task], 0.02 * RATE)
    for epoch in tqdm(range(EPOCHS[task]), desc="3D CNN"):
        for clips, targets in lessons(task, seed, epoch):
            optimizer.zero_grad()
            F.cross_entropy(trunk(clips), targets).backward()
            nn.utils.clip_grad_norm_(trunk.parameters(), 1.0)
            optimizer.step()
        schedule.step()
    return VideoClassifier(trunk.eval(), "BCTHW", labels_of(task))


def mixed_trunk(out: Path) -> ResNet3D:
    """Return the 3D CNN of `mixed`, from its folder or trained from the stem and stages of that of `pattern`."""
    folder = out / f"tiny-resnet3d-{MIXED}"
    if not folder.is_dir():
        torch.manual_seed(1)
        bundled = VideoClassifier.from_pretrained("tiny-resnet3d-pattern").module
        trunk = ResNet3D(replace(bundled.config, num_classes=len(MIXED_LABELS)))
        weights = {name: value for name, value in bundled.state_dict().items() if not name.startswith("head")}
        trunk.load_state_dict(weights, strict=False)
        train_trunk(MIXED, 1, trunk)
        resnet3d.save_pretrained(trunk, folder, list(MIXED_LABELS), half=True)
        report = {"accuracy": accuracy(resnet3d.from_pretrained(folder), MIXED)}
        write_json(folder / "training.json", report)
    return resnet3d.from_pretrained(folder)


def train_joint(trunk: VideoClassifier, task: str, seed: int) -> STABN:
    """The paper's network over a trained 3D CNN, as the paper begins with a trained one; both heads and all weights."""
    torch.manual_seed(seed)
    st_abn = STABN(len(LABELS[task]), copy.deepcopy(trunk.module), labels=list(LABELS[task]))
    fit_st_abn(
        st_abn,
        lambda epoch: lessons(task, seed, EPOCHS[task] + epoch),
        STABNLoss("paper"),
        FitConfig(lambda parameters: torch.optim.AdamW(parameters, lr=RATE / 2, weight_decay=0.02)),
        epochs=JOINT[task],
        validation=[_held_out(task, HELD_OUT_SEED + 1, 48)],
        seed=seed,
        show_progress=True,
    )
    return st_abn.eval()


def untrained_bottleneck(task: str, seed: int, out: Path = WEIGHTS) -> STABN:
    """Return the 3D CNN of a task with open gates behind its stem."""
    torch.manual_seed(seed)
    known = mixed_trunk(out) if task == MIXED else VideoClassifier.from_pretrained(f"tiny-resnet3d-{task}").module
    trunk = ResNet3D(replace(known.config, padding_mode="replicate"))  # zeros would mark the ends of the clip
    trunk.load_state_dict(known.state_dict())
    labels = labels_of(task)
    return STABN(len(labels), trunk, mechanism="bottleneck", dropout=0.0, labels=labels)


def train_bottleneck(task: str, seed: int, out: Path) -> STABN:
    """Train the gates, and the network behind them, which can only use what they let through."""
    st_abn = untrained_bottleneck(task, seed, out)
    checkpoint = out / f"{task}_{seed}.safetensors"  # a training that was stopped goes on from it
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    fit_st_abn(
        st_abn,
        lambda epoch: lessons(task, seed, EPOCHS[task] + epoch),  # of full difficulty
        config=FitConfig(checkpoint=checkpoint, resume=True),
        preset="faithful",
        epochs=CLOSING,
        validation=[_held_out(task, HELD_OUT_SEED + 1, 48)],
        seed=seed,
        show_progress=True,
    )
    checkpoint.unlink()
    return st_abn.eval()


def train_observer(clf: VideoClassifier, layer: str, task: str, seed: int) -> STABN:
    """Train a branch that observes a frozen model, and learns which part of the clip the prediction needs."""
    torch.manual_seed(seed)
    example = clf.layout.from_working(PlantedClips(seed, 1, task)[:1][0])
    st_abn = STABN.inject(clf, layer, config=BranchConfig("observe", maps=16), example=example)

    def watched(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(epoch * STEPS, (epoch + 1) * STEPS):
            clips, labels, _ = PlantedClips(seed=seed * 2_000_000 + i, n=LOOKING, task=task)[:]
            yield clf.layout.from_working(clips).contiguous(), labels

    def baseline(clips: Tensor) -> Tensor:
        """Return zeros or a blur. With only one of them, a mask could create artificial evidence at its edges."""
        return torch.zeros_like(clips) if torch.rand(()) < 0.5 else baselines.blur(clips, clf.layout)

    easy, whole = (STABNLoss("posthoc", baseline=baseline, area=area) for area in (0.5, 3.0))
    constant = FitConfig(schedule=lambda progress: 1.0)
    fit_st_abn(st_abn, watched, easy, constant, epochs=EASY, seed=seed, show_progress=True)
    rest = LOOKS - EASY
    fit_st_abn(st_abn, lambda epoch: watched(EASY + epoch), whole, epochs=rest, seed=seed, show_progress=True)
    return st_abn.eval()


def _held_out(task: str, seed: int, n: int) -> tuple[Tensor, Tensor]:
    clips, labels, _ = planted_of(seed, n, task)[:]
    return clips.transpose(1, 2).contiguous(), F.one_hot(labels, len(labels_of(task))).float()


@torch.no_grad()
def accuracy(model: nn.Module, task: str, n: int = 1000) -> float:
    """Return the accuracy on held-out clips (B, C, T, H, W)."""
    planted, right = planted_of(HELD_OUT_SEED, n, task), 0
    for start in range(0, n, 50):
        clips, labels, _ = planted[start : start + 50]
        right += int((model(clips.transpose(1, 2).contiguous()).argmax(1) == labels).sum())
    return right / n


def evidence(st_abn: STABN, task: str, n: int = 96) -> dict[str, float]:
    """Return how often M alpha is higher on evidence than on rivals, and its mean, on held-out clips."""
    planted = planted_of(HELD_OUT_SEED + 2, n, task)
    clips, _, truth = planted[:]
    found = st_abn.explain(clips.transpose(1, 2).contiguous())
    joint, rivals = found.spatial_gates * found.temporal_gates[:, :, None, None], planted.rivals(slice(None))
    values = {axis: metrics.evidence_against_rivals(joint, truth, rivals, axis=axis) for axis in AXES}
    return {axis: round(float(value.nanmean()), 3) for axis, value in values.items()} | {
        "area": round(float(joint.mean()), 3)
    }


def make(task: str, seed: int, kind: str, out: Path) -> None:
    started = time.perf_counter()
    base = f"tiny-videomae-{task}" if kind == "observer" else None
    names = {"bottleneck": f"tiny-st-abn-{task}", "mix": f"tiny-st-abn-{task}-mix", "observer": f"{base}-observer"}
    steps = {
        "bottleneck": CLOSING * STEPS,
        "mix": (EPOCHS[task] + JOINT.get(task, 0)) * STEPS,
        "observer": LOOKS * STEPS,
    }
    folder = out / names[kind]
    if base is not None:
        st_abn = train_observer(VideoClassifier.from_pretrained(base), LAYER, task, seed)
    elif kind == "mix":
        st_abn = train_joint(train_trunk(task, seed), task, seed)
    else:
        st_abn = train_bottleneck(task, seed, out)
    shutil.rmtree(folder, ignore_errors=True)
    st_abn.save_pretrained(folder, base=base, half=True)
    shutil.copy(WEIGHTS / f"tiny-videomae-{'pattern' if task == MIXED else task}" / "preprocessor_config.json", folder)
    report = {
        "task": task,
        "notice": "toy model of three tasks in one, see benchmarks/train_st_abn.py" if task == MIXED else notice(task),
        "seed": seed,
        "loss": {"bottleneck": "faithful", "mix": "paper", "observer": "posthoc"}[kind],
        "steps": steps[kind],
        "batch": BATCH if base is None else LOOKING,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "parameters_added": sum(p.numel() for part in (st_abn.branch, st_abn.mechanism) for p in part.parameters()),
        "command": f"python benchmarks/train_st_abn.py --task {task} --kind {kind} --seed {seed}",
    }
    if base is None:
        report |= {"held_out_seed": HELD_OUT_SEED, "accuracy": accuracy(STABN.from_pretrained(folder), task)}
    if kind == "bottleneck":
        report |= {
            "trunk": f"tiny-resnet3d-{task}",
            "gate_against_rivals": evidence(STABN.from_pretrained(folder), task),
        }
    write_json(folder / "training.json", report)
    print(json.dumps(report), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=(*LABELS, MIXED), help="one task; all that are bundled without it")
    parser.add_argument("--kind", choices=KINDS, help="one kind; all that are bundled without it")
    parser.add_argument("--all", action="store_true", help="all tasks and kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    if options.task == MIXED and options.kind != "bottleneck":
        parser.error("--task mixed needs --kind bottleneck")
    if not (options.all or options.task or options.kind):
        parser.error("name a --task, a --kind, both, or --all")
    torch.set_num_threads(1)  # more threads are not faster for small models, and change the last digits
    for task in [options.task] if options.task else LABELS:
        bundled = [kind for kind in KINDS if kind != "mix" or task in PAPER]
        for kind in [options.kind] if options.kind else bundled:
            make(task, options.seed, kind, options.out)


if __name__ == "__main__":
    main()
