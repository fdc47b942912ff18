"""What occlusion and feature ablation cost outside the model, per window: Captum's beside ours.

    python benchmarks/occlusion_cost.py              # 16 x 3 x 224 x 224, one thread, about five minutes
    python benchmarks/occlusion_cost.py --quick      # the larger windows only, about a minute

The model reads one number per clip, so nearly all that is timed is the building of perturbed clips and of the map.
Both ways run interleaved in the same process; the figures are medians over rounds, and a ratio is the median of the
ratios of neighbors. Every pair of results is compared, too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from captum.attr import FeatureAblation, Occlusion
from torch import Tensor
from tqdm import tqdm

from captum_staa import VideoFeatureAblation, VideoOcclusion

Way = Callable[[], Tensor]
FRAMES, SIZE = 16, 224


def model(clip: Tensor) -> Tensor:
    """One number per clip, from one voxel inside the second window."""
    return clip[:, 0, 0, 0, -1:] * 2


def occlusion(
    clip: Tensor, window: tuple[int, int, int], stride: tuple[int, int, int], perturbations_per_eval: int
) -> list[Way]:
    """Captum's Occlusion and ours on a clip ``(1, T, C, H, W)``."""
    channels = clip.shape[2]
    whole, step = [(t, channels, h, w) for t, h, w in (window, stride)]
    return [
        lambda: Occlusion(model).attribute(clip, whole, step, target=0, perturbations_per_eval=perturbations_per_eval),
        lambda: VideoOcclusion(model, "BTCHW").attribute(
            clip, window, stride, target=0, perturbations_per_eval=perturbations_per_eval
        ),
    ]


def ablation(clip: Tensor, mask: Tensor, perturbations_per_eval: int) -> list[Way]:
    """Captum's FeatureAblation and ours."""
    arguments = {"target": 0, "feature_mask": mask, "perturbations_per_eval": perturbations_per_eval}
    return [
        lambda: FeatureAblation(model).attribute(clip, **arguments),
        lambda: VideoFeatureAblation(model, "BTCHW").attribute(clip, **arguments),
    ]


def cells(t: int, h: int, w: int) -> Tensor:
    """A mask ``(1, T, 1, H, W)`` of t x h x w cells."""
    steps = [torch.arange(size) * n // size for size, n in ((FRAMES, t), (SIZE, h), (SIZE, w))]
    return (steps[0][:, None, None] * h * w + steps[1][:, None] * w + steps[2])[None, :, None]


def seconds(way: Way) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = way()
    return time.perf_counter() - start, result


def row(name: str, count: int, perturbations_per_eval: int, ways: list[Way], rounds: int) -> str:
    theirs, ours = [], []
    for _ in tqdm(range(rounds), desc=f"{name}, {perturbations_per_eval} per evaluation", leave=False):
        for way, times in zip(ways, (theirs, ours), strict=True):
            took, result = seconds(way)
            times.append(1000 * took / count)
            if times is theirs:
                expected = result
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return (
        f"| {name} | {count} | {perturbations_per_eval} | {statistics.median(theirs):.1f} "
        f"| {statistics.median(ours):.3f} "
        f"| {ratio:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    clip = torch.randn(1, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    print("| what | regions | per evaluation | Captum, ms per region | ours, ms per region | ratio |")
    print("|---|---|---|---|---|---|")
    for perturbations_per_eval in (1, 4, 16, 64):
        ways = occlusion(clip, (4, 56, 56), (4, 56, 56), perturbations_per_eval)
        print(row("Occlusion, 4 x 56 x 56", 64, perturbations_per_eval, ways, arguments.rounds), flush=True)
    for perturbations_per_eval in (1, 4):
        ways = occlusion(clip, (4, 56, 56), (2, 28, 28), perturbations_per_eval)
        print(row("Occlusion, 4 x 56 x 56, half overlapping", 343, perturbations_per_eval, ways, 1), flush=True)
    for perturbations_per_eval in (1, 4, 16):
        ways = ablation(clip, cells(4, 4, 4), perturbations_per_eval)
        print(row("FeatureAblation, 64 cells", 64, perturbations_per_eval, ways, arguments.rounds), flush=True)
    if not arguments.quick:
        for perturbations_per_eval in (1, 4):
            ways = occlusion(clip, (2, 16, 16), (2, 16, 16), perturbations_per_eval)
            print(row("Occlusion, 2 x 16 x 16", 1568, perturbations_per_eval, ways, 1), flush=True)


if __name__ == "__main__":
    main()
