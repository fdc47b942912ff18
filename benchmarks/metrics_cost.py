"""What insertion and deletion cost outside the model: `insertion_deletion`, bare forwards, a naive loop.

    python benchmarks/metrics_cost.py              # tiny-videomae-pattern, one thread, about six minutes
    python benchmarks/metrics_cost.py --rounds 1   # about a minute

The bare forwards are as many calls of the model on as many clips, with nothing else. The naive loop walks the four
curves one after the other, and writes unit after unit of clip after clip into a copy. All three run interleaved in the
same process; a ratio is the median of the ratios within a round. The scores of both ways are compared, too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from captum_staa import VideoClassifier
from captum_staa.benchmark import PlantedClips
from captum_staa.metrics.insertion_deletion import insertion_deletion

Places = list[tuple[slice, slice, slice, slice]]


class Counted(torch.nn.Module):
    """A classifier that counts its clips."""

    def __init__(self, clf: VideoClassifier) -> None:
        super().__init__()
        self.clf, self.clips = clf, 0

    def forward(self, clip: Tensor) -> Tensor:
        self.clips += len(clip)
        return self.clf(clip)


def cells_of(clip: Tensor, cell: tuple[int, int, int]) -> Places:
    """The cells of a clip ``(B, T, C, H, W)``, as indices into one of its clips."""
    frames, _, height, width = clip.shape[1:]
    t, h, w = cell
    return [
        (slice(a, a + t), slice(None), slice(b, b + h), slice(c, c + w))
        for a in range(0, frames, t)
        for b in range(0, height, h)
        for c in range(0, width, w)
    ]


@torch.no_grad()
def naive(model: Callable[[Tensor], Tensor], clip: Tensor, maps: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The scores ``(4, B)``: insertion and deletion, most relevant first, and both again, least relevant first."""
    cells, rows, scores = cells_of(clip, CELL), torch.arange(len(clip)), []
    means = torch.stack([maps[(slice(None), *cell[:1], *cell[2:])].mean((1, 2, 3)) for cell in cells], dim=1)
    for falling in (True, False):
        order = means.argsort(dim=1, descending=True, stable=True)
        order = order if falling else order.flip(1)
        for start, end in ((torch.zeros_like(clip), clip), (clip, torch.zeros_like(clip))):
            altered, done, curve, fractions = start.clone(), 0, [], []
            for k in range(steps + 1):
                count = int(k * len(cells) / steps + 0.5)
                for row in range(len(clip)):
                    for unit in order[row, done:count].tolist():
                        altered[row][cells[unit]] = end[row][cells[unit]]
                done = count
                curve.append(model(altered).softmax(1)[rows, labels].double())
                fractions.append(count / len(cells))
            scores.append(torch.trapezoid(torch.stack(curve), torch.tensor(fractions, dtype=torch.float64), dim=0))
    return torch.stack(scores)


@torch.no_grad()
def bare(model: Callable[[Tensor], Tensor], clip: Tensor, evaluations: int, perturbations_per_eval: int) -> None:
    """As many forwards as :func:`insertion_deletion` makes."""
    batch = clip.repeat(perturbations_per_eval, 1, 1, 1, 1)
    for start in range(0, evaluations, perturbations_per_eval):
        model(batch[: len(clip) * min(perturbations_per_eval, evaluations - start)])


def seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def row(clf: VideoClassifier, batch: int, steps: int, perturbations_per_eval: int, rounds: int) -> str:
    clip, labels, _ = PlantedClips(seed=0, n=batch)[:]
    maps = torch.randn(batch, *CLIP, generator=torch.Generator().manual_seed(0))
    model = Counted(clf)

    def ours() -> Tensor:
        found = insertion_deletion(
            model,
            clip,
            maps,
            target=labels,
            layout="BTCHW",
            cells=CELL,
            steps=steps,
            perturbations_per_eval=perturbations_per_eval,
        )
        return torch.stack([curve.score for curve in found])

    counts, results = [], []
    for way in (ours, lambda: naive(model, clip, maps, labels, steps)):
        model.clips = 0
        results.append(way())
        counts.append(model.clips // batch)
    # an insertion walked backwards rounds halves down, the naive deletion up: so steps divide the units, 288
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-4)
    ways = (
        ours,
        lambda: bare(model, clip, counts[0], perturbations_per_eval),
        lambda: naive(model, clip, maps, labels, steps),
    )
    took = [[seconds(way) for way in ways] for _ in tqdm(range(rounds), desc=f"{batch} clips", leave=False)]
    over = statistics.median(100 * (mine / alone - 1) for mine, alone, _ in took)
    gain = statistics.median(loop / mine for mine, _, loop in took)
    return (
        f"| {batch} | {steps} | {perturbations_per_eval} | {counts[0]} | {counts[1]} "
        f"| {statistics.median(mine for mine, _, _ in took):.2f} | {over:+.1f} % | {gain:.1f} |"
    )


CLIP, CELL = (16, 48, 48), (2, 8, 8)  # of tiny-videomae-pattern: 288 tubelets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    print(
        "| clips | steps | per evaluation | forwards per clip, ours | naive "
        "| s, ours | over the bare forwards | naive / ours |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for batch, steps, perturbations_per_eval in ((16, 96, 1), (1, 96, 16), (1, 96, 64)):
        print(row(clf, batch, steps, perturbations_per_eval, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
