"""Measure the cost of STAA relative to one forward of the model, in time and in activation memory.

    python benchmarks/attention_cost.py                       # base-size models, two threads
    python benchmarks/attention_cost.py --model videomae --rounds 9
    python benchmarks/attention_cost.py --model explicit --only attention --threads 1
    python benchmarks/attention_cost.py --model videomae --inspect     # what models.inspect costs, and nothing else

Every call alternates with a plain forward in the same process. The result is the median over rounds of the ratio of
both times. Memory is the peak allocation during the call (PyTorch's profiler counts every allocation of every
operator) divided by the peak of the plain forward. Weights and the clip are not counted.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from captum_staa import STAA, TokenGrid, VideoClassifier, models

Way = Callable[[], object]
NAMES = ["videomae", "timesformer", "vivit", "explicit"]


class ExplicitViT(torch.nn.Module):
    """A base-size video ViT that no family declares, and that computes softmax(q k^T) itself, as research code does."""

    def __init__(self, width: int = 768, depth: int = 12, classes: int = 400) -> None:
        super().__init__()
        self.embed = torch.nn.Conv3d(3, width, (2, 16, 16), (2, 16, 16))
        self.positions = torch.nn.Parameter(torch.zeros(1, 8 * 14 * 14, width))
        self.blocks = torch.nn.ModuleList(ExplicitBlock(width) for _ in range(depth))
        self.norm, self.head = torch.nn.LayerNorm(width), torch.nn.Linear(width, classes)

    def forward(self, clip: Tensor) -> Tensor:  # (B, C, T, H, W)
        x = self.embed(clip).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class ExplicitBlock(torch.nn.Module):
    def __init__(self, width: int, heads: int = 12) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.qkv, self.proj = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
        pattern = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.proj((pattern @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


EXPLICIT = models.Family(  # as `--inspect` finds it
    name="explicit",
    grid=lambda model: TokenGrid(8, 14, 14, tubelet=(2, 16, 16)),
    attention=lambda model: [
        models.AttentionLayer(f"blocks.{block}", block, backend="softmax") for block in range(len(model.blocks))
    ],
    pooling=lambda model: "mean",
    layout="BCTHW",
    patch_embedding="embed",
)


def build(name: str) -> tuple[torch.nn.Module, Tensor]:
    """Return a base-size model with random weights (time does not depend on them), and a clip."""
    torch.manual_seed(0)
    if name == "videomae":
        config = transformers.VideoMAEConfig(num_labels=400)
        return transformers.VideoMAEForVideoClassification(config), torch.randn(1, 16, 3, 224, 224)
    if name == "explicit":
        return ExplicitViT(), torch.randn(1, 3, 16, 224, 224)
    if name == "timesformer":
        config = transformers.TimesformerConfig(num_labels=400)
        return transformers.TimesformerForVideoClassification(config), torch.randn(1, 8, 3, 224, 224)
    config = transformers.VivitConfig(num_labels=400)
    return transformers.VivitForVideoClassification(config), torch.randn(1, 32, 3, 224, 224)


def ways(name: str, model: torch.nn.Module, clip: Tensor) -> dict[str, Way]:
    """Return the calls to compare. The first one is the unit."""
    clf = VideoClassifier(model, family=EXPLICIT if name == "explicit" else None)

    def forward() -> Tensor:
        with torch.no_grad():
            return clf(clip)

    def forward_backward() -> Tensor:
        leaf = clip.clone().requires_grad_()
        return torch.autograd.grad(clf(leaf)[:, 0].sum(), leaf)[0]

    def reference() -> object:
        """Run eager attention, and return the weights of every head and layer, for comparison."""
        if name == "explicit":
            return forward()
        own = model.config._attn_implementation
        if name != "timesformer":
            model.set_attn_implementation("eager")
        try:
            with torch.no_grad():
                return [a.mean(1) for a in model(clip, output_attentions=True).attentions[-1:]]
        finally:
            if name != "timesformer":
                model.set_attn_implementation(own)

    def staa(attribute: str = "attribute", **options: object) -> Way:
        method = STAA(clf, **options)  # type: ignore[arg-type]
        return lambda: getattr(method, attribute)(clip, target=0)

    return {
        "plain forward": forward,
        "attention, last layer": staa(mode="attention", layers=[-1]),
        "attention, last layer, and logits": staa("attribute_maps", mode="attention", layers=[-1]),
        "attention, all layers aggregated": staa(mode="attention", layers="mean"),
        "attention, all layers rolled out": staa(mode="attention", layers="all"),
        **(
            {}
            if name == "timesformer"
            else {"attention, time alone rolled out": lambda: STAA(clf, "attention").attribute_temporal(clip)}
        ),
        "reference: eager, output_attentions": reference,
        "forward and backward": forward_backward,
        "relevance (decomposition)": staa(mode="relevance"),
        "relevance (chefer)": staa(mode="relevance", rule="chefer"),
    }


def seconds(way: Way) -> float:
    """Return the time of a call. With one thread it is that of the processor, which other programs do not lengthen."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    way()
    return clock() - start


def peak_bytes(way: Way) -> int:
    """Return the largest sum of live allocations during a call, including buffers of operators."""
    gc.collect()  # memory of an earlier call would be counted as freed by this call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        way()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(name: str, rounds: int, only: str) -> list[str]:
    model, clip = build(name)
    calls = {way: call for way, call in ways(name, model.eval(), clip).items() if only in way or way == "plain forward"}
    plain = calls["plain forward"]
    units = dict.fromkeys(("relevance (decomposition)", "relevance (chefer)"), "forward and backward")
    units = {way: unit for way, unit in units.items() if way in calls and unit in calls}
    ratios: dict[str, list[float]] = {way: [] for way in calls}
    own_unit: dict[str, list[float]] = {way: [] for way in units}
    plain()
    for _ in tqdm(range(rounds), desc=f"{name}: time"):
        took = {}
        for way, call in calls.items():
            beside = seconds(plain)
            took[way] = seconds(call)
            ratios[way].append(took[way] / beside)
        for way, unit in units.items():
            own_unit[way].append(took[way] / took[unit])
    memory = {way: peak_bytes(call) for way, call in tqdm(calls.items(), desc=f"{name}: memory")}
    rows = [f"| {name}-base, {clip.shape[1]} x {clip.shape[3]} | time | spread | memory |", "|---|---|---|---|"]
    for way, values in ratios.items():
        share = memory[way] / memory["plain forward"]
        spread = f"{min(values):.2f} to {max(values):.2f}"
        rows.append(f"| {way} | {statistics.median(values):.3f} | {spread} | {share:.3f} |")
    for way, unit in units.items():
        share = memory[way] / memory[unit]
        rows.append(f"| {way}, over {unit} | {statistics.median(own_unit[way]):.3f} | | {share:.3f} |")
    return rows


def inspection(name: str) -> list[str]:
    """Return the cost of one inspection, which is cached on the classifier."""
    model, clip = build(name)
    clf = VideoClassifier(model.eval(), layout="BCTHW" if name == "explicit" else None)

    def forward() -> Tensor:
        with torch.no_grad():
            return clf(clip)

    forward()
    plain = statistics.median(seconds(forward) for _ in range(3))
    took = seconds(lambda: models.inspect(clf, clip, show_progress=True))
    report = models.inspect(clf, clip)
    ratio = took / plain
    return [
        f"{name}-base: {report.forwards} clips run, {took:.0f} s, the time of {ratio:.1f} forwards of {plain:.2f} s; "
        f"{'verified' if report.ok else report.problems[0]}"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMES, action="append")
    parser.add_argument("--only", default="", help="measure only ways with this word in their name")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inspect", action="store_true", help="measure models.inspect alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.model or NAMES:
        rows = inspection(name) if arguments.inspect else measure(name, arguments.rounds, arguments.only)
        print("\n".join(rows), flush=True)


if __name__ == "__main__":
    main()
