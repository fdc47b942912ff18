"""Train small transformers that no family declares on planted clips, and score methods on them.

    python benchmarks/train_discovered.py --train plain --task pattern    # minutes on one core; goes on if called again
    python benchmarks/train_discovered.py --score plain --task pattern
    python benchmarks/train_discovered.py --write                         # docs/staa.md

The models are an MViT 2 (pooled queries and keys), a Swin 3D (windows), an image encoder on frames below a transformer
over time, and a video transformer with its own softmax. Trained weights are in benchmarks/discovered, written by
`--export`; states from which a training can go on stay in the folder `--out`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from evidence import Evidence, averaged, best_control, markdown, means, smoothed, write_between
from evidence import mean as mean_of
from planted_table import SIGNED, Row, forwards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from train_zoo import HELD_OUT_SEED, training_batch

from captum_staa import RISE, STAA, GradCAM, TokenGrid, VideoClassifier
from captum_staa.benchmark import PlantedClips
from captum_staa.benchmark.scenes import LABELS

ROOT = Path(__file__).parents[1]
WEIGHTS = Path(__file__).parent / "discovered"  # trained weights in half precision
sys.path.append(str(ROOT / "tests" / "_helpers"))  # the hierarchies
from hierarchical_models import MViT, Swin  # noqa: E402

SEED, BATCH = 30_000, 12
STEPS = {"pattern": 900, "motion": 700, "order": 700}
COLUMNS = {
    "rivals": "evidence against rivals",
    "time": "in time",
    "classes": "class A against B",
    "random weights": "random weights",
    "other class": "other class",
    "forwards": "forwards",
}


class Block(nn.Module):
    """Attention with its own softmax, as research code writes it."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        pattern = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.proj((pattern @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Plain(nn.Module):
    """Joint attention among tubelets of 2 x 8 x 8, whose mean the head reads."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, width, (2, 8, 8), (2, 8, 8))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 8 * 36, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.embed(clip).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Frames(nn.Module):
    """A ViT with a class token on each frame, and a transformer over the class tokens."""

    def __init__(self, classes: int, width: int = 64) -> None:
        super().__init__()
        self.embed, self.cls = nn.Conv2d(3, width, 8, 8), nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 37, width))
        self.times = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.spatial = nn.ModuleList(Block(width) for _ in range(2))
        self.temporal = nn.ModuleList(Block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.embed(clip.transpose(1, 2).flatten(0, 1)).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.spatial:
            x = block(x)
        x = x[:, 0].unflatten(0, (len(clip), -1)) + self.times
        for block in self.temporal:
            x = block(x)
        return self.head(self.norm(x).mean(1))


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "plain": Plain,
    "frames": Frames,
    "mvit": lambda classes: MViT(48, classes, (16, 48, 48)),
    "swin": lambda classes: Swin(48, classes),
}
TITLES = {"plain": "joint attention", "frames": "frame encoder", "mvit": "MViT 2", "swin": "Swin 3D"}
# What returns the tokens of the hints, how many of the first are no patches, and the pixels of one patch. One frame of
# the image encoder shows no movement and no order: there, the hints are for the tokens over time.
TUBELET, FRAME = (2, 8, 8), (1, 48, 48)
FINAL = {"plain": ("norm", 0, TUBELET), "mvit": ("norm", 1, TUBELET), "swin": ("norm", 0, TUBELET)}
FINAL_OF_FRAMES = {"pattern": ("spatial.1", 1, (1, 8, 8)), "motion": ("norm", 0, FRAME), "order": ("norm", 0, FRAME)}
# The last layer whose tokens have a gradient each, the order of its axes, and its grid.
CAM_LAYERS: dict[str, tuple[str, str | None, TokenGrid]] = {
    "plain": ("blocks.3.norm1", None, TokenGrid(8, 6, 6, tubelet=(2, 8, 8))),
    "frames": ("spatial.1.norm1", "(BT)NC", TokenGrid(16, 6, 6, 1, tubelet=(1, 8, 8))),
    "mvit": ("blocks.2.norm1", None, TokenGrid(8, 6, 6, 1, tubelet=(2, 8, 8))),
    "swin": ("merge", "BTHWC", TokenGrid(8, 6, 6, tubelet=(2, 8, 8))),
}


def build(kind: str, task: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[kind](len(LABELS[task]))
    for parameter in model.parameters():
        if parameter.ndim == 2:  # with the usual small weights, models this small stay on a plateau
            nn.init.normal_(parameter, std=0.1)
    return model


def train(kind: str, task: str, seed: int, steps: int, minutes: float, out: Path, start: str | None) -> None:
    """Train until `steps`, or until the time is over; a second call goes on.

    `start` is a task whose trained weights the training begins with, but for the head.
    """
    path, begin = out / f"{kind}-{task}-{seed}.safetensors", time.perf_counter()
    model, generator = build(kind, task, seed), torch.Generator().manual_seed(seed)
    if start is not None:
        weights = load_file(out / f"{kind}-{start}-{seed}.safetensors")
        own = {f"model.{name}": value for name, value in model.state_dict().items() if name.startswith("head.")}
        _load(model, weights | own)
    hints = Hints(model, kind, task)
    parameters = [*model.parameters(), *hints.head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.02)
    first, recent, seconds = 0, 0.0, 0.0
    if path.exists():
        tensors = load_file(path)
        _load(model, tensors)
        _load(hints.head, tensors, "hints.")
        generator.set_state(tensors["generator"])
        first, recent, seconds = int(tensors["step"]), float(tensors["recent"]), float(tensors["seconds"])
        groups = optimizer.state_dict()["param_groups"]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for step in tqdm(range(first, steps), desc=f"{kind}-{task}", mininterval=20):
        over = time.perf_counter() - begin > 60 * minutes
        if over or step == steps - 1 or (step % 50 == 0 and step > first):
            numbers = {"step": step, "recent": recent, "seconds": seconds + time.process_time()}
            _save(path, model, hints.head, optimizer, generator, numbers)
        if over:
            break
        for group in optimizer.param_groups:
            cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = 1.5e-3 * min((step + 1) / 30, cosine)
        clips, targets, truth = training_batch(task, seed * 1_000_000 + step, step / steps, 0.4, generator, BATCH)
        loss = F.cross_entropy(outputs := model(clips.transpose(1, 2)), targets)
        loss = loss + (1 - step / steps) * hints.loss(truth, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sure = targets.amax(1) == 1
        recent = 0.95 * recent + 0.05 * float((outputs.argmax(1) == targets.argmax(1))[sure].float().mean())
    print(kind, task, "step", step + 1, "recent accuracy", round(recent, 3), flush=True)


class Hints:
    """A second loss, on what the single final tokens answer: the one label of a clip is a faint signal.

    Tokens that show evidence must answer the class, all others no class. The head is not in the model.
    """

    def __init__(self, model: nn.Module, kind: str, task: str) -> None:
        self.tokens = torch.empty(0)
        name, self.skipped, self.patch = FINAL_OF_FRAMES[task] if kind == "frames" else FINAL[kind]
        module = model.get_submodule(name)
        norm = module if isinstance(module, nn.LayerNorm) else module.get_submodule("norm2")
        self.head = nn.Linear(norm.weight.numel(), len(LABELS[task]))
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.tokens = output

    def loss(self, truth: Tensor, targets: Tensor) -> Tensor:
        """``truth`` (B, T, H, W) and probabilities ``targets`` (B, K) of the clips of the last forward."""
        share = F.avg_pool3d(truth[:, None].float(), self.patch).flatten(1)  # (B, N)
        tokens = self.tokens.flatten(1, -2)[:, self.skipped :]  # of clips, or of frames
        logs = self.head(tokens).log_softmax(-1).reshape(*share.shape, -1)  # (B, N, K)
        evidence = share * (targets.amax(1, keepdim=True) == 1)
        losses = -(logs * targets[:, None]).sum(-1)
        return (losses * evidence).sum() / evidence.sum() - logs.mean(-1)[share == 0].mean()


def _save(
    path: Path,
    model: nn.Module,
    head: nn.Module,
    optimizer: Any,
    generator: torch.Generator,
    numbers: dict[str, float],
) -> None:
    moments = {
        f"optimizer.{index}.{key}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    weights = {
        f"{prefix}.{name}": value.contiguous()
        for prefix, module in (("model", model), ("hints", head))
        for name, value in module.state_dict().items()
    }
    scalars = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    part = path.with_suffix(".part")
    save_file({**weights, **moments, **scalars, "generator": generator.get_state()}, part)
    part.replace(path)


def _load(model: nn.Module, tensors: dict[str, Tensor], prefix: str = "model.") -> None:
    model.load_state_dict({name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)})


def methods(clf: VideoClassifier, kind: str) -> dict[str, Row]:
    name, axes, grid = CAM_LAYERS[kind]
    layer = clf.module.get_submodule(name)

    def row(attribute: Callable[..., Tensor], variants: Any = SIGNED, slow: bool = False, **options: object) -> Row:
        def call(clips: Tensor, targets: Tensor) -> Tensor:
            return clf.layout.reduce(attribute(clips, target=targets, **options).detach().float())

        return Row(call, variants, slow)

    return {
        "STAA (relevance)": row(STAA(clf).attribute),
        "STAA (Chefer)": row(STAA(clf, rule="chefer").attribute),
        "STAA (layer gradients)": row(STAA(clf, rule="layer_gradients").attribute),
        "STAA (attention, of no class)": row(STAA(clf, mode="attention").attribute),
        "GradCAM (hirescam, late layer)": row(
            GradCAM(clf, layer, weighting="hirescam", layer_axes=axes, grid=grid).attribute
        ),
        "IntegratedGradients (20), smoothed": row(
            IntegratedGradients(clf).attribute, {"": smoothed}, True, n_steps=20, internal_batch_size=32
        ),
        "RISE (200)": row(RISE(clf).attribute, slow=True, n_samples=200, perturbations_per_eval=16),
    }


def trained(kind: str, task: str, seed: int = 1, out: Path | None = None) -> tuple[VideoClassifier, int]:
    """Return a trained model and its number of steps: of the state in `out`, or else of the kept weights."""
    model, name = build(kind, task, seed), f"{kind}-{task}-{seed}.safetensors"
    path = WEIGHTS / name if out is None or not (out / name).exists() else out / name
    tensors = load_file(path)
    _load(model, tensors)
    clf = VideoClassifier(model.eval(), layout="BCTHW", labels=list(LABELS[task]))
    return clf, int(tensors["step"]) + 1


def export(out: Path) -> None:
    """Keep the weights of all states in `out`, in half precision."""
    WEIGHTS.mkdir(exist_ok=True)
    for path in sorted(out.glob("*-*-*.safetensors")):
        tensors = load_file(path)
        kept = {name: value.half() for name, value in tensors.items() if name.startswith("model.")}
        save_file({**kept, "step": tensors["step"]}, WEIGHTS / path.name)


def score(kind: str, task: str, seed: int, clips: int, slow_clips: int, out: Path, only: str) -> None:
    """Score the methods whose names start with `only` and that have no scores yet, and store each when it is done."""
    clf, steps = trained(kind, task, seed, out)
    stored = out / f"{kind}-{task}-{seed}.json"
    found: dict[str, Any] = json.loads(stored.read_text()) if stored.exists() else {}
    if found.get("steps") != steps:  # of other weights
        found = {"steps": steps, "accuracy": _accuracy(clf, task), "methods": {}}
    many, few = Evidence(clf, task, clips, SEED), Evidence(clf, task, slow_clips, SEED)
    own = found["methods"]
    for name, row in tqdm(methods(clf, kind).items(), desc=f"{kind}-{task}", mininterval=20):
        if name in own or not name.startswith(only):
            continue
        evidence, variant = few if row.slow else many, row.variants[""]

        def maps(x: Tensor, y: Tensor, row: Row = row, name: str = name, variant: Any = variant) -> dict[str, Tensor]:
            return {name: variant(row.call(x, y))}

        own |= means(evidence.scores(maps, controls=not row.slow))
        own[name]["forwards"] = forwards(clf, evidence, row.call)
        stored.write_text(json.dumps(found, indent=1) + "\n")
    if "random" not in own:
        own |= means(many.without_a_model())
        stored.write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(markdown(_rows(own), COLUMNS)), flush=True)


@torch.no_grad()
def _accuracy(clf: VideoClassifier, task: str) -> float:
    planted, right = PlantedClips(HELD_OUT_SEED, 200, task), 0
    for start in range(0, 200, 20):
        clips, labels, _ = planted[start : start + 20]
        right += int((clf(clips.transpose(1, 2)).argmax(1) == labels).sum())
    return right / 200


def _rows(own: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the rows of a table: the methods and the controls."""
    rows = dict(own)
    rows["center"] = rows["control: center"]
    if "STAA (relevance)" in rows:
        ours = rows["STAA (relevance)"]
        rows["STAA (relevance), inverted"] = {
            key: 1 - ours[key] for key in ("rivals", "time", "classes") if key in ours
        }
    return best_control(rows)


def write(out: Path) -> None:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("*-*-*.json"), key=lambda path: (path.stem.split("-")[1:], path.stem)):
        kind, task, seed = path.stem.split("-")
        found[f"{TITLES[kind]}, `{task}`" + ("" if seed == "1" else f", seed {seed}")] = json.loads(path.read_text())
    every = set.intersection(*(set(own["methods"]) for own in found.values()))
    mean = averaged({name: each for name, each in own["methods"].items() if name in every} for own in found.values())
    ours = {name: own["methods"]["STAA (relevance)"] | {"accuracy": own["accuracy"]} for name, own in found.items()}
    rivals: dict[str, dict[str, float]] = {}
    for model, own in found.items():
        for name, values in _rows(own["methods"]).items():
            rivals.setdefault(name, {})[model] = values["rivals"]
    for values in rivals.values():
        values["rivals"] = mean_of(values.get(model, math.nan) for model in found)  # the order of the rows
    lines = [
        f"Mean over the {len(found)} models, of what was run on all of them:",
        "",
        *markdown(_rows(mean), COLUMNS),
        "",
        "STAA (relevance) of each model, with the accuracy on 200 held-out clips:",
        "",
        *markdown(ours, {**COLUMNS, "accuracy": "accuracy"}, "model"),
        "",
        "Evidence against rivals of each model:",
        "",
        *markdown(rivals, {model: model for model in found}),
    ]
    write_between(ROOT / "docs" / "staa.md", "train_discovered", "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs="*", choices=tuple(MODELS), default=[])
    parser.add_argument("--score", nargs="*", choices=tuple(MODELS), default=[])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--export", action="store_true", help="write the weights of all states in --out")
    parser.add_argument("--task", choices=tuple(LABELS), default="pattern")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--start", choices=tuple(LABELS), help="task whose trained weights the training begins with")
    parser.add_argument("--minutes", type=float, default=60, help="of each training, after which it stops")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--slow-clips", type=int, default=12, help="for slow methods")
    parser.add_argument("--only", default="", help="score only methods whose names start with this")
    parser.add_argument("--out", type=Path, default=Path("discovered"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for kind in options.train:
        steps = options.steps or STEPS[options.task]
        train(kind, options.task, options.seed, steps, options.minutes, options.out, options.start)
    for kind in options.score:
        score(kind, options.task, options.seed, options.clips, options.slow_clips, options.out, options.only)
    if options.export:
        export(options.out)
    if options.write:
        write(options.out)


if __name__ == "__main__":
    main()
