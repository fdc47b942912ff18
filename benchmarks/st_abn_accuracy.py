"""Does attention help accuracy? Train a 3D CNN, the paper's ST-ABN and a bottleneck ST-ABN on few, hard clips.

    python benchmarks/st_abn_accuracy.py               # trainings that docs/st_abn_accuracy.json lacks, and the page
    python benchmarks/st_abn_accuracy.py --minutes 8   # begins no further training after this time
    python benchmarks/st_abn_accuracy.py --page        # only writes the section of docs/st_abn.md

Training sets have 100, 300 or 1000 clips, with low contrast, noise, and rivals that are mirror images of the evidence.
For each seed, a 3D CNN learns the task on easy clips. All three networks start from it, and are trained by the same
number of steps on the same batches, with the same optimizer. In a second series, the background has more of one
color, which goes with the class in nine training clips of ten. Test clips have no such color, that of their class, or
that of another class.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from evidence import write_between
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from captum_staa import metrics
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.benchmark.scenes import LABELS
from captum_staa.models import STABN, FitConfig, STABNLoss, fit_st_abn
from captum_staa.models.resnet3d import ResNet3D
from captum_staa.models.st_abn.training import cosine, faithful_optimizer

TASK = "pattern"
EASY = SceneOptions(num_frames=8, image_size=24, patch_size=8, contrast=0.4, noise=0.02)
HARD = SceneOptions(num_frames=8, image_size=24, patch_size=8, contrast=0.18, noise=0.08)
SERIES = {"no cue": None, "cue": 0.9}  # part of the training clips whose cue is that of their class
SIZES, SEEDS = (100, 300, 1000), (1, 2, 3, 4, 5)
STEPS, BATCH = 20, 16  # of an epoch; clips of a step
BEFORE, EPOCHS = 32, 16  # epochs on easy clips, and those of the comparison
RATE, SLOW = 3e-3, 5e-4  # of new weights, and of trained ones, as in `faithful_optimizer`
CUE = 0.24  # added to one color of the background; the range of a clip is 2
TEST_SEED, TESTED, MAPPED = 80_000, 1000, 200
CUE_TEXT = (
    "With the cue, which agrees with the class in nine training clips of ten. Accuracy on three kinds of test clips:"
)
T95 = 2.776  # Student's t, 97.5 %, 4 degrees of freedom
PAGE = Path(__file__).parents[1] / "docs" / "st_abn.md"
KEPT = PAGE.with_name("st_abn_accuracy.json")
NETWORKS = {"trunk": "3D CNN alone", "mix": "ST-ABN of the paper", "bottleneck": "ST-ABN, bottleneck"}
TESTS = {"absent": "no cue", "agrees": "cue of the class", "contradicts": "cue of another class"}
Data = tuple[Tensor, Tensor]  # clips (B, C, T, H, W), labels (B,)


class Clips:
    """Planted clips with and without the cue.

    Args:
        seed: seed of the clips.
        count: number of clips.
        scene: their difficulty.
    """

    def __init__(self, seed: int, count: int, scene: SceneOptions) -> None:
        planted = PlantedClips(seed, count, TASK, scene=scene)
        clips, self.labels, self.truth = planted[:]
        self.clips = clips.transpose(1, 2).contiguous()
        self.rivals = planted.rivals(slice(None))
        generator = torch.Generator().manual_seed(seed)
        shift = torch.randint(1, len(LABELS[TASK]), (count,), generator=generator)
        self.others = (self.labels + shift) % len(LABELS[TASK])  # another class for each clip
        self.order = torch.rand(count, generator=generator)

    def with_cue(self, classes: Tensor) -> Tensor:
        """Return the clips with more of one color in the background, that of a class (B,)."""
        color = CUE * F.one_hot(classes, 3).float()[:, :, None, None, None]
        return self.clips + color * ~(self.truth | self.rivals)[:, None]

    def training(self, agrees: float | None) -> Data:
        """Return clips and labels; the cue agrees with the class in a part of them. None leaves it out."""
        if agrees is None:
            return self.clips, self.labels
        return self.with_cue(torch.where(self.order < agrees, self.labels, self.others)), self.labels

    def tests(self) -> dict[str, Tensor]:
        """Return the clips by the keys of :data:`TESTS`."""
        agrees, contradicts = self.with_cue(self.labels), self.with_cue(self.others)
        return {"absent": self.clips, "agrees": agrees, "contradicts": contradicts}


def easy_batches(seed: int, epoch: int) -> Iterator[Data]:
    """Yield new, easy clips. At first most of them have only the evidence, on gray, and later one in four."""
    for i in range(epoch * STEPS, (epoch + 1) * STEPS):
        clips, labels, truth = PlantedClips(seed * 1_000_000 + i, BATCH, TASK, scene=EASY)[:]
        generator = torch.Generator().manual_seed(seed * 1_000_000 + i)
        alone = torch.rand(BATCH, generator=generator) < max(0.25, 1 - i / (0.4 * BEFORE * STEPS))
        gray = 2 * 128 / 255 - 1
        clips = torch.where(truth[:, :, None] | ~alone[:, None, None, None, None], clips, gray)
        yield clips.transpose(1, 2).contiguous(), labels


def batches(data: Data, seed: int, epoch: int) -> Iterator[Data]:
    """Yield batches of an epoch. Each round through the clips has a new order."""
    clips, labels = data
    count, start = len(labels), epoch * STEPS * BATCH
    rounds = range(start // count, (start + STEPS * BATCH - 1) // count + 1)
    orders = [torch.randperm(count, generator=torch.Generator().manual_seed(seed * 100_000 + turn)) for turn in rounds]
    chosen = torch.cat(orders)[start - rounds[0] * count :][: STEPS * BATCH]
    for part in chosen.split(BATCH):
        yield clips[part], labels[part]


def train_trunk(trunk: nn.Module, epochs: list[Iterator[Data]], rate: float) -> nn.Module:
    """Train a 3D CNN without a branch, with the optimizer, schedule and limit of :func:`fit_st_abn`."""
    optimizer = torch.optim.AdamW(trunk.parameters(), lr=rate, weight_decay=0.01)
    trunk.train()
    for at, epoch in enumerate(epochs):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(at / len(epochs))
        for clips, labels in epoch:
            optimizer.zero_grad()
            F.cross_entropy(trunk(clips), labels).backward()
            nn.utils.clip_grad_norm_(trunk.parameters(), 1.0)
            optimizer.step()
    return trunk.eval()


def started(seed: int, folder: Path | None) -> ResNet3D:
    """Return the 3D CNN from which all networks of a seed start."""
    torch.manual_seed(seed)
    options = {"num_frames": EASY.num_frames, "image_size": EASY.image_size}
    trunk = ResNet3D(len(LABELS[TASK]), padding_mode="replicate", time_strides_from=2, **options)
    file = folder / f"start_{seed}.safetensors" if folder else None
    if file and file.exists():
        trunk.load_state_dict(load_file(file))
        return trunk.eval()
    train_trunk(trunk, [easy_batches(seed, epoch) for epoch in range(BEFORE)], RATE)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(trunk.state_dict(), file)
    return trunk


def trained(start: ResNet3D, name: str, data: Data, seed: int) -> nn.Module:
    """Return one of the three networks, trained on the clips."""
    trunk = copy.deepcopy(start)
    if name == "trunk":
        return train_trunk(trunk, [batches(data, seed, epoch) for epoch in range(EPOCHS)], SLOW)
    torch.manual_seed(seed)
    if name == "mix":
        network, loss = STABN(len(LABELS[TASK]), trunk), STABNLoss("paper")
    else:
        network = STABN(len(LABELS[TASK]), trunk, mechanism="bottleneck", dropout=0.0)
        loss = STABNLoss("faithful")
    config = FitConfig(optimizer=lambda _: faithful_optimizer(network))
    fit_st_abn(network, lambda epoch: batches(data, seed, epoch), loss, config, epochs=EPOCHS, seed=seed)
    return network.eval()


@torch.no_grad()
def measured(network: nn.Module, test: Clips) -> dict[str, float]:
    """Return accuracies by the keys of :data:`TESTS`, and for a branch, evidence against rivals and area of M alpha."""
    found = {}
    for name, clips in test.tests().items():
        answers = torch.cat([network(part).argmax(1) for part in clips.split(50)])
        found[name] = float((answers == test.labels).float().mean())
    if isinstance(network, STABN):
        gates = network.explain(test.clips[:MAPPED])
        joint = gates.spatial_gates * gates.temporal_gates[:, :, None, None]
        against = metrics.evidence_against_rivals(joint, test.truth[:MAPPED], test.rivals[:MAPPED])
        found |= {"rivals": float(against.nanmean()), "area": float(joint.mean())}
    return {name: round(value, 4) for name, value in found.items()}


def train_all(minutes: float, folder: Path | None) -> None:
    """Train and measure all networks that :data:`KEPT` lacks, and write the numbers after each."""
    until = time.monotonic() + 60 * minutes
    test, results = Clips(TEST_SEED, TESTED, HARD), read()
    jobs = sorted(product(SIZES, SERIES, SEEDS, NETWORKS), key=lambda job: (job[0] != 300, job[1] == "cue"))
    jobs = [job for job in jobs if job[-1] not in results.get(key_of(*job[:3]), {})]
    for size, series, seed, name in tqdm(jobs, desc="networks"):
        start = started(seed, folder)
        data = Clips(TEST_SEED + seed, size, HARD).training(SERIES[series])
        results = read()
        if key_of(0, "no cue", seed) not in results:
            results[key_of(0, "no cue", seed)] = {"trunk": measured(start, test)}
        results.setdefault(key_of(size, series, seed), {})[name] = measured(trained(start, name, data, seed), test)
        KEPT.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if time.monotonic() > until:
            return


def key_of(size: int, series: str, seed: int) -> str:
    return f"{size} clips, {series}, seed {seed}"


def read() -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}


def interval(values: list[float], signed: bool = False) -> str:
    """Return the mean, and half the length of its 95 % interval (Student's t)."""
    return f"{fmean(values):{'+' if signed else ''}.3f} ± {T95 * stdev(values) / len(values) ** 0.5:.3f}"


def section() -> str:
    """Return the tables of both series, for the sizes of which every seed has been trained."""
    results, lines = read(), []
    for series, tests in (("no cue", {"absent": "accuracy"}), ("cue", TESTS)):
        columns = [text for test in tests.values() for text in (test, "minus the 3D CNN")]
        rows = []
        for size in SIZES:
            own = [results[key] for seed in SEEDS if (key := key_of(size, series, seed)) in results]
            if sum(len(each) for each in own) < len(SEEDS) * len(NETWORKS):
                continue
            for name, text in NETWORKS.items():
                cells = []
                for test in tests:
                    more = [each[name][test] - each["trunk"][test] for each in own]
                    cells += [interval([each[name][test] for each in own])]
                    cells += ["" if name == "trunk" else interval(more, signed=True)]
                for value in ("rivals", "area"):
                    cells += ["" if name == "trunk" else f"{fmean(each[name][value] for each in own):.3f}"]
                rows.append(f"| {size} | {text} | " + " | ".join(cells) + " |")
        if rows and series == "cue":
            lines += [CUE_TEXT, ""]
        if rows:
            heads = ["training clips", "network", *columns, "M alpha against rivals", "mean of M alpha"]
            lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *rows, ""]
            if series == "no cue":
                before = [results[key_of(0, series, seed)]["trunk"]["absent"] for seed in SEEDS]
                lines += [f"Before these trainings, the 3D CNN has an accuracy of {interval(before)}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--folder", type=Path, help="keeps the 3D CNNs from which the networks start")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.page:
        train_all(options.minutes, options.folder)
    write_between(PAGE, "st_abn_accuracy", section())


if __name__ == "__main__":
    main()
