"""Train the small bundled models in `captum_staa/models/weights`, one folder each.

    python benchmarks/train_zoo.py --family videomae --task pattern
    python benchmarks/train_zoo.py --all

Every model takes minutes on one core. New clips are drawn for each step, so the model cannot memorize clips. The
held-out clips have another seed. Weights are stored as float16, and tested in this form.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.benchmark.scenes import LABELS
from captum_staa.models import resnet3d

WEIGHTS = Path(__file__).parents[1] / "captum_staa" / "models" / "weights"
FAMILIES = ("videomae", "timesformer", "vivit", "vjepa2", "resnet3d")
BATCH = 24
HELD_OUT_SEED = 1_000_000_007
SECOND_ROUND = 500  # added to the seed, so that the second round uses other clips


@dataclass(frozen=True)
class Recipe:
    """Length, learning rate and curriculum of a training.

    `easy` is the part of the training in which clips with nothing but evidence fall from all to their usual
    quarter: a gentle start. `waves` starts ViViT's embeddings of position, else zero, as VideoMAE's.
    `hints` is for a TimeSformer which must learn about time: see `look_around` and `hint_loss`.
    `second` is the number of steps of a second round, from the stored weights, on clips of full difficulty, with
    .6 of the peak learning rate.
    """

    steps: int
    peak: float = 1e-3
    easy: float = 0.0
    waves: bool = False
    hints: bool = False
    second: int = 0


RECIPES = {
    "videomae": {
        "pattern": Recipe(900, 0.0015, easy=0.4, second=500),
        "motion": Recipe(800, 0.0015, easy=0.5),
        "order": Recipe(700, 0.001, easy=0.4),
    },
    "timesformer": {
        "pattern": Recipe(700, 0.001, easy=0.5, second=500),
        "motion": Recipe(650, 0.001, easy=0.5, hints=True),
        "order": Recipe(500, 0.001, easy=0.5, hints=True),
    },
    "vivit": {
        "pattern": Recipe(850, 0.0015, easy=0.4, second=1000),
        "motion": Recipe(650, 0.001, easy=0.5),
        "order": Recipe(450, 0.001, easy=0.5, waves=True, second=500),
    },
    "vjepa2": {
        "pattern": Recipe(750, 0.0012, easy=0.3, second=600),
        "motion": Recipe(450, 0.001, easy=0.4, second=600),
        "order": Recipe(850, 0.001, easy=0.4, second=1500),
    },
    "resnet3d": {
        "pattern": Recipe(600, 0.003, easy=0.3),
        "motion": Recipe(350, 0.003, easy=0.3, second=500),
        "order": Recipe(350, 0.003, easy=0.3),
    },
}


def wave_rates(channels: int) -> Tensor:
    """Radians per step (channels / 2) of the sines and cosines of "Attention is all you need"."""
    return 10_000 ** (-torch.arange(0, channels, 2) / channels)


def waves(positions: int, channels: int) -> Tensor:
    """Return alternating sines and cosines (positions, channels)."""
    angles = torch.arange(positions)[:, None] * wave_rates(channels)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def look_around(model: nn.Module) -> None:
    """Initialize the temporal heads of a TimeSformer to attend one and two frames back and ahead.

    Its library starts the embeddings of time at zero: frames have no order at first, and a task that is all
    about order gives hardly a gradient to bring one in. Here they start as waves. In the first layer each head
    turns them by some frames, so that the key which fits a query best is that of the frame so far away.
    """
    embeddings = model.timesformer.embeddings
    channels, frames = embeddings.time_embeddings.shape[-1], embeddings.time_embeddings.shape[1]
    embeddings.time_embeddings.data.copy_(waves(frames, channels))
    rates = wave_rates(channels)
    heads, dim = model.config.num_attention_heads, channels // model.config.num_attention_heads
    attention = model.timesformer.encoder.layer[0].temporal_attention.attention
    query, key, _ = attention.qkv.weight.data.view(3, heads, dim, channels)
    for head, shift in enumerate((1, -1, 2, -2)):
        turn = rates[: dim // 2] * shift  # the fastest waves tell neighbors apart best
        blocks = [torch.tensor([[c, s], [-s, c]]) for c, s in zip(turn.cos(), turn.sin(), strict=True)]
        query[head] = key[head] = 0
        query[head, :, :dim] = 4 * torch.block_diag(*blocks)
        key[head, :, :dim] = 4 * torch.eye(dim)


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
INPUT = {"image_size": 48, "patch_size": 8, "num_frames": 16}
# The decoder and the predictor are of no use to a classifier, but part of the configs, the latter of the weights too.
DECODER = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
PREDICTOR = {
    "hidden_size": 24,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_mask_tokens": 1,
    "mlp_ratio": 1.0,
}
# Hugging Face's name of a family, and what its config takes. VJEPA2's rotary embedding cuts a head into three even
# parts (time, height, width), hence its heads of 24 channels.
CONFIGS: dict[str, tuple[str, dict]] = {
    "videomae": (
        "VideoMAE",
        {**SMALL, **INPUT, "tubelet_size": 2, "num_hidden_layers": 4, "use_mean_pooling": True}
        | {f"decoder_{key}": value for key, value in DECODER.items()},
    ),
    "timesformer": (
        "Timesformer",
        {**SMALL, **INPUT, "num_hidden_layers": 3, "attention_type": "divided_space_time", "drop_path_rate": 0},
    ),
    "vivit": (
        "Vivit",
        {**SMALL, "image_size": 48, "num_frames": 16, "tubelet_size": [2, 8, 8], "num_hidden_layers": 4}
        | {"hidden_act": "gelu"},
    ),
    "vjepa2": (
        "VJEPA2",
        {"crop_size": 48, "patch_size": 8, "frames_per_clip": 16, "tubelet_size": 2, "hidden_size": 72}
        | {"num_hidden_layers": 3, "num_attention_heads": 3, "mlp_ratio": 2.0, "num_pooler_layers": 1}
        | {"drop_path_rate": 0, "attention_dropout": 0.0}
        | {f"pred_{key}": value for key, value in PREDICTOR.items()},
    ),
}


def build(family: str, labels: tuple[str, ...]) -> nn.Module:
    """Return an untrained model of the family for clips of 16 frames of 48 x 48 pixels."""
    if family == "resnet3d":
        return resnet3d.ResNet3D(num_classes=len(labels))
    import transformers

    name, options = CONFIGS[family]
    config = getattr(transformers, f"{name}Config")(
        **options,
        # The usual 0.02 is made for hundreds of channels; models this small stay on the plateau with it.
        initializer_range=0.1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return getattr(transformers, f"{name}ForVideoClassification")(config)


def logits(family: str, model: nn.Module, clips: Tensor) -> Tensor:
    """Return the logits (B, K) of clips (B, T, C, H, W), independent of the names of inputs and outputs."""
    if family == "resnet3d":
        return model(clips.transpose(1, 2))
    return model(clips).logits


def hint_loss(tokens: Tensor, truth: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    """Cross entropy of the answers of TimeSformer's tokens where the evidence is.

    A token of TimeSformer sees one frame. To see movement it must multiply what attention brings from another
    time with what is here. The one label of a clip is too faint a signal to find that; many tokens are not.

    `tokens` (B, 1 + P T, D) are the class token, then for each place all of its times; `truth` is (B, T, H, W);
    `targets` (B, K) are the clip's, and rows without a certain answer count nothing; `head` is not in the model.
    """
    batch, t = truth.shape[:2]
    share = F.avg_pool2d(truth.float(), 8).flatten(2).transpose(1, 2)  # (B, P, T)
    weight = share * (targets.amax(1) == 1)[:, None, None]
    answers = head(tokens[:, 1:].view(batch, -1, t, tokens.shape[-1]))  # (B, P, T, K)
    losses = -(answers.log_softmax(-1) * targets[:, None, None]).sum(-1)
    return (losses * weight).sum() / weight.sum()


def training_batch(
    task: str,
    seed: int,
    progress: float,
    easy: float,
    generator: torch.Generator,
    batch: int = BATCH,
    footage: Sequence[np.ndarray] | None = None,
) -> tuple[Tensor, ...]:
    """Clips (B, T, C, H, W), harder as `progress` nears 1, target probabilities (B, K) and truth (B, T, H, W).

    `footage` are real frames behind the objects, which then have the brightness and the blur of the frames.
    """
    spread = min(1.0, progress / 0.5)
    draw = torch.rand(2, generator=generator).tolist()
    noise, contrast = 0.02 + 0.06 * spread * draw[0], 0.4 - spread * (0.04 + 0.12 * draw[1])
    scene = SceneOptions(noise=noise, contrast=contrast, blend=footage is not None)
    planted = PlantedClips(seed, batch, task, scene=scene, background=footage)
    clips, labels, truth = planted[:]
    targets = F.one_hot(labels, len(planted.labels)).float()

    # Clips as the explainers will make them: without surroundings (the answer stays) ...
    alone = max(0.25, 1 - progress / easy) if easy else 0.25
    gray = torch.rand(batch, generator=generator) < alone
    clips = torch.where(truth[:, :, None] | ~gray[:, None, None, None, None], clips, 2 * 128 / 255 - 1)
    # ... without rivals (the answer also stays) ...
    clips[:2] = planted.without_rivals(slice(2))
    # ... and, once the task is learned, without evidence (no answer is better than another).
    if progress > 0.4:
        clips[-3:] = planted.without_evidence(slice(batch - 3, batch))
        targets[-3:] = 1 / len(planted.labels)
    # A clip which went through a video file comes back a little smoother.
    amount = (torch.rand(batch, generator=generator) * 2 - 1).clamp(0, 0.7)[:, None, None, None, None]
    smooth = F.avg_pool2d(clips.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(clips)
    return clips.lerp(smooth, amount), targets, truth


def train(family: str, task: str, seed: int, recipe: Recipe) -> nn.Module:
    """Run the first round, from random weights."""
    torch.manual_seed(seed)
    model = build(family, LABELS[task])
    if recipe.waves:
        positions = model.vivit.embeddings.position_embeddings
        positions.data.copy_(waves(*positions.shape[1:]))
    if recipe.hints:
        look_around(model)
    return fit(family, task, seed, recipe, model)


def train_again(family: str, task: str, seed: int, recipe: Recipe, model: nn.Module) -> nn.Module:
    """Run the second round, on other clips."""
    torch.manual_seed(seed)
    second = replace(recipe, steps=recipe.second, peak=0.6 * recipe.peak, hints=False)
    return fit(family, task, seed + SECOND_ROUND, second, model, start=1.0)


def fit(
    family: str,
    task: str,
    seed: int,
    recipe: Recipe,
    model: nn.Module,
    start: float = 0.0,
    footage: Sequence[np.ndarray] | None = None,
) -> nn.Module:
    """Train a model in place, on clips whose difficulty grows from `start` to 1. `footage` as in `training_batch`."""
    steps = recipe.steps
    model.train()
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    if recipe.hints:
        hint_head = nn.Linear(model.config.hidden_size, len(LABELS[task]))
        decayed.append(hint_head.weight)
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak, betas=(0.9, 0.98))
    warm = 30
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * max(0, i - warm) / (steps - warm)))),
    )
    recent = 0.0
    bar = tqdm(range(steps), desc=f"{family}-{task}", mininterval=10)
    for i in bar:
        progress = start + (1 - start) * i / steps
        clips, targets, truth = training_batch(
            task, seed * 1_000_000 + i, progress, recipe.easy, generator, footage=footage
        )
        if recipe.hints:
            output = model(clips, output_hidden_states=True)
            out, hint = output.logits, hint_loss(output.hidden_states[-1], truth, targets, hint_head)
            loss = F.cross_entropy(out, targets) + (1 - i / steps) * hint
        else:
            out = logits(family, model, clips)
            loss = F.cross_entropy(out, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        sure = targets.amax(1) == 1
        right = (out.argmax(1) == targets.argmax(1))[sure].float().mean().item()
        recent = right if i == 0 else 0.95 * recent + 0.05 * right
        bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{recent:.3f}", refresh=False)
    return model.eval()


@torch.no_grad()
def evaluate(
    family: str, model: nn.Module, task: str, n: int = 1000, footage: Sequence[np.ndarray] | None = None
) -> dict[str, float]:
    """Return the accuracy on held-out clips: unchanged, without the evidence, and with the evidence only."""
    planted = PlantedClips(HELD_OUT_SEED, n, task, scene=SceneOptions(blend=footage is not None), background=footage)
    right = {"accuracy": 0, "accuracy_without_evidence": 0, "accuracy_only_evidence": 0}
    for start in range(0, n, 50):
        part = slice(start, start + 50)
        clips, labels, _ = planted[part]
        variants = (clips, planted.without_evidence(part), planted.only_evidence(part))
        for name, inputs in zip(right, variants, strict=True):
            right[name] += int((logits(family, model, inputs).argmax(1) == labels).sum())
    return {name: count / n for name, count in right.items()}


def save(family: str, model: nn.Module, task: str, folder: Path) -> None:
    """Save weights in float16, config and preprocessor in the Hugging Face format."""
    if family == "resnet3d":
        resnet3d.save_pretrained(model, folder, list(LABELS[task]), half=True, overwrite=True)
    else:
        model.half().save_pretrained(folder)
        # float16 reduces the size of the package; the model runs with float32 weights.
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", config | {"dtype": "float32"})
    preprocessor = {
        "do_resize": True,
        "size": {"shortest_edge": 48},
        "do_center_crop": True,
        "crop_size": {"height": 48, "width": 48},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes the file readable for the owner only
    kind = "video_preprocessor" if family == "vjepa2" else "preprocessor"
    write_json(folder / f"{kind}_config.json", preprocessor)


def load(family: str, folder: Path) -> nn.Module:
    """Load a stored model as float32, in eval mode."""
    if family == "resnet3d":
        return resnet3d.from_pretrained(folder)
    import transformers

    name = f"{CONFIGS[family][0]}ForVideoClassification"
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def notice(task: str) -> str:
    """Return the sentence that pictures and reports show with the answers of a model."""
    known = {
        "pattern": "synthetic patterns",
        "motion": "directions of motion in synthetic clips",
        "order": "orders of two synthetic patterns",
    }
    return f"toy model, knows {len(LABELS[task])} {known[task]}; its labels mean nothing on real video"


def make(family: str, task: str, seed: int, recipe: Recipe, out: Path) -> None:
    started = time.perf_counter()
    folder = out / f"tiny-{family}-{task}"
    minutes = 0.0
    if recipe.steps:
        save(family, train(family, task, seed, recipe), task, folder)
    else:  # the first round is stored
        first = json.loads((folder / "training.json").read_text())
        minutes = first["minutes"]
        recipe = replace(recipe, steps=first["steps"], peak=first["learning_rate"], easy=first["easy"])
    if recipe.second:
        save(family, train_again(family, task, seed, recipe, load(family, folder)), task, folder)
    minutes += (time.perf_counter() - started) / 60
    model = load(family, folder)
    measured = evaluate(family, model, task)
    report = {
        "task": task,
        "notice": notice(task),
        "seed": seed,
        "steps": recipe.steps,
        "second_round_steps": recipe.second,
        "batch": BATCH,
        "learning_rate": recipe.peak,
        "easy": recipe.easy,
        "minutes": round(minutes, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": f"python benchmarks/train_zoo.py --family {family} --task {task} --seed {seed}"
        f" --steps {recipe.steps} --learning-rate {recipe.peak} --easy {recipe.easy} --second {recipe.second}",
        "held_out_seed": HELD_OUT_SEED,
        "held_out_clips": 1000,
        **measured,
    }
    write_json(folder / "training.json", report)
    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"{folder.name}: {measured}, {recipe.steps} steps, {minutes:.1f} min, {size:.2f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, help="one family; all without it")
    parser.add_argument("--task", choices=tuple(LABELS), help="one task; all without it")
    parser.add_argument("--all", action="store_true", help="all families and tasks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, help="training steps; the family's and task's own without it; 0: only the second round"
    )
    parser.add_argument("--second", type=int, help="steps of the second round; as above")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate; as above")
    parser.add_argument("--easy", type=float, help="part of the training with an easy start; as above")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    if not (options.all or options.family or options.task):
        parser.error("name a --family, a --task, both, or --all")
    torch.set_num_threads(1)  # more threads are not faster for small models, and change the last digits
    for task in [options.task] if options.task else LABELS:
        for family in [options.family] if options.family else FAMILIES:
            wished = {
                "steps": options.steps,
                "second": options.second,
                "peak": options.learning_rate,
                "easy": options.easy,
            }
            recipe = replace(RECIPES[family][task], **{k: v for k, v in wished.items() if v is not None})
            make(family, task, options.seed, recipe, options.out)


if __name__ == "__main__":
    main()
