"""Measure the cost of explaining a stream: its frame rate relative to the model, and memory over a long loop.

    python benchmarks/stream.py                                  # frame rates, one thread of a CPU
    python benchmarks/stream.py --device cuda --model base
    python benchmarks/stream.py --truth 16                       # which mode finds planted evidence
    python benchmarks/stream.py --minutes 60                     # a looped video, resident memory and live tensors

The rate of the model is that of a loop that preprocesses each frame once, stacks the same windows and runs the model
without an explanation. ``forward`` has prepared windows, so it measures the model only. Both alternate with
``STAAStream`` in one process, and each number is a median over rounds. On a CPU, processor time is compared, so that
other programs do not count. On a GPU, wall-clock time is compared.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from captum_staa import STAA, STAAStream, VideoClassifier, io, metrics
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.models.preprocessing import Preprocessing

Frames = NDArray[np.uint8]
SIZES = {"small": (384, 12, 6), "base": (768, 12, 12)}  # hidden size, layers, heads


def build(name: str, device: str) -> tuple[VideoClassifier, tuple[int, int]]:
    """Return a model, and the size of its frames. Larger models have random weights, which do not affect the time."""
    if name not in SIZES:
        return VideoClassifier.from_pretrained(name, device=device), (48, 48)
    torch.manual_seed(0)
    hidden, layers, heads = SIZES[name]
    config = transformers.VideoMAEConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        num_labels=400,
        use_mean_pooling=True,
    )
    module = transformers.VideoMAEForVideoClassification(config).to(device).eval()
    preprocessing = Preprocessing(resize=224, crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return VideoClassifier(module, preprocessing=preprocessing), (240, 320)


def planted(count: int, size: tuple[int, int]) -> Frames:
    """Return the frames ``(T, H, W, 3)`` of an enlarged planted clip."""
    frames = PlantedClips(seed=1, n=1, scene=SceneOptions(num_frames=count)).frames(0)
    rows, columns = (np.arange(side) * 48 // side for side in size)
    return frames[:, rows][:, :, columns]


@torch.no_grad()
def own_loop(clf: VideoClassifier, frames: Frames, stride: int) -> None:
    """Run the model without an explanation: each frame is preprocessed once, with the same windows."""
    window, held = clf.num_frames, []
    for count, frame in enumerate(frames, start=1):
        held = [*held[-window + 1 :], clf.preprocessing(frame[None])[0, 0].to(device_of(clf))]
        if count >= window and (count - window) % stride == 0:
            clf(clf.layout.from_working(torch.stack(held)[None]).contiguous())[0].softmax(0).cpu()


def device_of(clf: VideoClassifier) -> torch.device:
    return next(clf.parameters()).device


def seconds(work: Callable[[], object], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def explainer_of(clf: VideoClassifier, mode: str) -> STAA:
    """``mode`` is relevance, or the layers whose attention is read: all, mean, or one index."""
    if mode == "relevance":
        return STAA(clf)
    return STAA(clf, mode="attention", layers=mode if mode in ("all", "mean") else [int(mode)])


def rates(name: str, device: str, strides: list[int], windows: int, rounds: int, mode: str) -> Iterator[str]:
    """Yield the rows of a table."""
    clf, size = build(name, device)
    explainer = explainer_of(clf, mode)
    for stride in [clf.num_frames if stride == 0 else stride for stride in strides]:
        frames = planted(clf.num_frames + (windows - 1) * stride, size)
        clip = clf.preprocess(frames[: clf.num_frames])

        @torch.no_grad()
        def forward(clip: torch.Tensor = clip) -> None:
            for _ in range(windows):
                clf(clip)[0].softmax(0).cpu()

        stream = STAAStream(explainer, stride=stride)
        ways: dict[str, Callable[[], object]] = {
            "forward": forward,
            "own": lambda frames=frames, stride=stride: own_loop(clf, frames, stride),
            "stream": lambda frames=frames, stream=stream: list(stream(frames)),
        }
        took: dict[str, list[float]] = {way: [] for way in ways}
        for at in range(rounds + 1):
            for way, work in ways.items():
                spent = seconds(work, device)
                if at:  # the first round warms up
                    took[way].append(spent)
        ratios = [own / all_ for own, all_ in zip(took["own"], took["stream"], strict=True)]
        strict = [own / all_ for own, all_ in zip(took["forward"], took["stream"], strict=True)]
        own, explained = (f"{len(frames) / statistics.median(took[way]):.1f}" for way in ("own", "stream"))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        ratio, beside = statistics.median(ratios), statistics.median(strict)
        yield f"| {name} | {mode} | {stride} | {own} | {explained} | {ratio:.3f} | {spread} | {beside:.3f} |"


def truth(videos: int) -> Iterator[str]:
    """Yield the rows of a table: how well each mode and stride finds the evidence in videos of three windows."""
    found: dict[tuple[str, int], list[list[float]]] = {}
    for family in ("videomae", "timesformer", "vivit", "vjepa2"):
        clf = VideoClassifier.from_pretrained(f"tiny-{family}-pattern")
        scene = SceneOptions(num_frames=3 * clf.num_frames)
        planted = PlantedClips(seed=21_000, n=videos, scene=scene)
        for index in range(videos):
            label, truth_masks, rivals = planted[index][1], *(each[None] for each in planted.with_masks(index)[2:4])
            for stride in (clf.num_frames, clf.num_frames // 2, clf.num_frames // 4):
                for name, mode, target in (
                    ("relevance, of the label", "relevance", int(label)),
                    ("relevance, of each window's own class", "relevance", None),
                    ("attention, all layers", "all", None),
                    ("attention, the last layer", "-1", None),
                ):
                    stream = STAAStream(explainer_of(clf, mode), stride=stride, target=target)
                    results = list(stream(planted.frames(index)))
                    maps = torch.stack([result.joint for result in results])[None]
                    scores = [
                        float(metrics.evidence_against_rivals(maps, truth_masks, rivals)),
                        float(metrics.evidence_against_rivals(maps, truth_masks, rivals, axis="time")),
                        float(metrics.auroc(maps, truth_masks)),
                    ]
                    found.setdefault((name, stride), []).append(scores)
    for (name, stride), scores in found.items():
        mean = torch.tensor(scores).nanmean(0)
        yield f"| {name} | {stride} | " + " | ".join(f"{value:.3f}" for value in mean.tolist()) + " |"


def soak(name: str, device: str, stride: int, minutes: float, video: Path | None) -> str:
    """Run a loop for ``minutes``. Return the least-squares slope of resident memory after a tenth of the time."""
    clf, size = build(name, device)
    frames = planted(64, size) if video is None else None
    loop = itertools.cycle(frames) if frames is not None else _looped(video)
    results, sizes = STAAStream(clf, stride=stride or None)(loop), []
    begun = time.perf_counter()
    for result in results:
        if result.index % 64 == 0:
            sizes.append((time.perf_counter() - begun, _resident() / 1e6))
            if sizes[-1][0] > minutes * 60:
                break
    results.close()
    steady = np.array(sizes[len(sizes) // 10 :])
    slope = np.polyfit(steady[:, 0] / 3600, steady[:, 1], 1)[0]
    first, last, most = steady[0, 1], steady[-1, 1], steady[:, 1].max()
    return (
        f"{results.stats.frames} frames, {results.stats.windows} windows in {sizes[-1][0] / 60:.1f} minutes; resident "
        f"{first:.1f} MB, at the end {last:.1f} MB, at most {most:.1f} MB: {slope:+.2f} MB per hour"
    )


def _looped(video: Path | None) -> Iterator[Frames]:
    assert video is not None
    while True:
        yield from (frames[0] for _, frames in io.iter_windows(video, 1))


def _resident() -> float:
    """Return the resident memory in bytes. Linux only."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", help="name of a bundled model, small or base (default: two of them)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--mode",
        default="relevance",
        help="of STAA: relevance, or the layers whose attention is read: all, mean, or one index (default: relevance)",
    )
    parser.add_argument("--stride", type=int, action="append", help="default: a window, and a quarter of one")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--truth", type=int, metavar="VIDEOS", help="find planted evidence instead of measuring frame rates"
    )
    parser.add_argument("--minutes", type=float, help="run a long loop instead of measuring frame rates")
    parser.add_argument("--video", type=Path, help="video for --minutes (default: a planted clip)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    names = asked.model or ["tiny-videomae-pattern", "base"]
    if asked.truth is not None:
        print("| mode | stride | evidence against rivals | in time | against all voxels |\n|---|---|---|---|---|")
        for row in truth(asked.truth):
            print(row, flush=True)
        return
    if asked.minutes is not None:
        for name in names[:1]:
            print(soak(name, asked.device, (asked.stride or [0])[0], asked.minutes, asked.video), flush=True)
        return
    print(
        "| model | mode | stride | model only, frames/s | explained, frames/s | ratio | spread "
        "| compared with the forward only |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in names:
        for row in rates(name, asked.device, asked.stride or [0, 4], asked.windows, asked.rounds, asked.mode):
            print(row, flush=True)


if __name__ == "__main__":
    main()
