"""Train the small models shipped in `captum_staa/models/weights`, one folder each.

    python benchmarks/train_zoo.py --family videomae --task pattern
    python benchmarks/train_zoo.py --all

Every model takes minutes on one core. Clips are drawn anew for each step, so nothing can be learnt by heart;
the held-out clips come from another seed. Weights are stored as float16, and measured as stored.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from captum_staa.benchmark.planted import LABELS, PlantedClips
from captum_staa.models import resnet3d

WEIGHTS = Path(__file__).parents[1] / "captum_staa" / "models" / "weights"
FAMILIES = ("videomae", "timesformer", "vivit", "vjepa2", "resnet3d")
BATCH = 24
HELD_OUT_SEED = 1_000_000_007

# (steps, peak learning rate)
SCHEDULE = {
    "videomae": {"pattern": (350, 1e-3), "motion": (500, 1e-3), "order": (400, 1e-3)},
    "timesformer": {"pattern": (350, 1e-3), "motion": (400, 1e-3), "order": (400, 1e-3)},
    "vivit": {"pattern": (350, 1e-3), "motion": (500, 1e-3), "order": (400, 1e-3)},
    "vjepa2": {"pattern": (700, 1e-3), "motion": (600, 1e-3), "order": (600, 1e-3)},
    "resnet3d": {"pattern": (300, 3e-3), "motion": (400, 3e-3), "order": (400, 3e-3)},
}


def build(family: str, labels: tuple[str, ...]) -> nn.Module:
    """An untrained model of the family for clips of 16 frames of 48 x 48 pixels."""
    model = build_plain(family, labels)
    # Hugging Face starts these at or near zero. Time is then invisible at first, and a task that is all about
    # time gives no gradient to make it visible. VideoMAE's fixed waves are a start which can be learnt from.
    for name, values in model.named_parameters():
        if name.endswith(("position_embeddings", "time_embeddings")):
            values.data.copy_(waves(values.shape[1], values.shape[2]))
    return model


def waves(positions: int, channels: int) -> Tensor:
    """The sines and cosines (positions, channels) of "Attention is all you need"."""
    rates = 10_000 ** (-torch.arange(0, channels, 2) / channels)
    angles = torch.arange(positions)[:, None] * rates  # (positions, channels / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def build_plain(family: str, labels: tuple[str, ...]) -> nn.Module:
    """The model as its library starts it."""
    if family == "resnet3d":
        return resnet3d.ResNet3D(num_classes=len(labels))
    import transformers as hf

    names = dict(enumerate(labels))
    shared = {
        # The usual 0.02 is made for hundreds of channels; models this small stay on the plateau with it.
        "initializer_range": 0.1,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
    }
    size = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    if family == "videomae":
        return hf.VideoMAEForVideoClassification(
            hf.VideoMAEConfig(
                image_size=48,
                patch_size=8,
                num_frames=16,
                tubelet_size=2,
                num_hidden_layers=4,
                use_mean_pooling=True,
                decoder_num_hidden_layers=1,
                decoder_hidden_size=32,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=32,
                **size,
                **shared,
            )
        )
    if family == "timesformer":
        return hf.TimesformerForVideoClassification(
            hf.TimesformerConfig(
                image_size=48,
                patch_size=8,
                num_frames=16,
                num_hidden_layers=3,
                attention_type="divided_space_time",
                drop_path_rate=0,
                **size,
                **shared,
            )
        )
    if family == "vivit":
        return hf.VivitForVideoClassification(
            hf.VivitConfig(
                image_size=48,
                num_frames=16,
                tubelet_size=[2, 8, 8],
                num_hidden_layers=4,
                hidden_act="gelu",
                **size,
                **shared,
            )
        )
    if family == "vjepa2":
        return hf.VJEPA2ForVideoClassification(
            hf.VJEPA2Config(
                crop_size=48,
                patch_size=8,
                frames_per_clip=16,
                tubelet_size=2,
                num_hidden_layers=3,
                # The rotary embedding cuts a head into three even parts (time, height, width): 24 channels.
                hidden_size=72,
                num_attention_heads=3,
                mlp_ratio=2.0,
                num_pooler_layers=1,
                drop_path_rate=0,
                # The predictor is of no use to a classifier, but its weights are part of the checkpoint.
                pred_hidden_size=24,
                pred_num_attention_heads=1,
                pred_num_hidden_layers=1,
                pred_num_mask_tokens=1,
                pred_mlp_ratio=1.0,
                attention_dropout=0.0,
                **shared,
            )
        )
    raise ValueError(f"{family = !r}, expected one of {', '.join(FAMILIES)}")


def logits(family: str, model: nn.Module, clips: Tensor) -> Tensor:
    """Logits (B, K) of clips (B, T, C, H, W), whatever the model calls its input and output."""
    if family == "resnet3d":
        return model(clips.transpose(1, 2))
    return model(clips).logits


def training_batch(
    task: str, seed: int, progress: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Clips (B, T, C, H, W) and target probabilities (B, K), harder as `progress` goes from 0 to 1."""
    spread = min(1.0, progress / 0.5)
    draw = torch.rand(2, generator=generator).tolist()
    planted = PlantedClips(
        seed,
        BATCH,
        task,
        noise=0.02 + 0.08 * spread * draw[0],
        contrast=0.36 - spread * (0.02 + 0.16 * draw[1]),
    )
    clips, labels, truth = planted[:]
    targets = F.one_hot(labels, len(planted.labels)).float()

    # Clips as the explainers will make them: without surroundings (the answer stays) ...
    grey = torch.rand(BATCH, generator=generator) < 0.25
    clips = torch.where(truth[:, :, None] | ~grey[:, None, None, None, None], clips, 2 * 128 / 255 - 1)
    # ... and, once the task is learnt, without evidence (no answer is better than another).
    if progress > 0.4:
        clips[-3:] = planted.without_evidence(slice(BATCH - 3, BATCH))
        targets[-3:] = 1 / len(planted.labels)
    # A clip which went through a video file comes back a little smoother.
    amount = (torch.rand(BATCH, generator=generator) * 2 - 1).clamp(0, 0.7)[:, None, None, None, None]
    smooth = F.avg_pool2d(clips.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(clips)
    return clips.lerp(smooth, amount), targets


def train(family: str, task: str, seed: int, steps: int, peak: float) -> nn.Module:
    torch.manual_seed(seed)
    model = build(family, LABELS[task]).train()
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0}],
        lr=peak,
        betas=(0.9, 0.98),
    )
    warm = 30
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(
            (i + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * max(0, i - warm) / (steps - warm)))
        ),
    )
    recent = 0.0
    bar = tqdm(range(steps), desc=f"{family}-{task}", mininterval=10)
    for i in bar:
        clips, targets = training_batch(task, seed * 1_000_000 + i, i / steps, generator)
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
def evaluate(family: str, model: nn.Module, task: str, n: int = 1000) -> dict[str, float]:
    """Accuracy on clips never trained on, as they are, without the evidence, and with it alone."""
    planted = PlantedClips(HELD_OUT_SEED, n, task)
    right = {"accuracy": 0, "accuracy_without_evidence": 0, "accuracy_only_evidence": 0}
    for start in range(0, n, 50):
        part = slice(start, start + 50)
        clips, labels, _ = planted[part]
        variants = (clips, planted.without_evidence(part), planted.only_evidence(part))
        for name, inputs in zip(right, variants, strict=True):
            right[name] += int((logits(family, model, inputs).argmax(1) == labels).sum())
    return {name: count / n for name, count in right.items()}


def save(family: str, model: nn.Module, task: str, folder: Path) -> None:
    """Weights in float16, config and preprocessor, in the manner of Hugging Face."""
    if family == "resnet3d":
        resnet3d.save_pretrained(model, folder, list(LABELS[task]), half=True)
    else:
        model.half().save_pretrained(folder)
        # float16 is for the size of the package; to run, the weights are wanted as float32.
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
    (folder / "model.safetensors").chmod(
        0o644
    )  # safetensors writes for the owner alone; a package is for all
    kind = "video_preprocessor" if family == "vjepa2" else "preprocessor"
    write_json(folder / f"{kind}_config.json", preprocessor)


def load(family: str, folder: Path) -> nn.Module:
    """A stored model as float32, in eval mode."""
    if family == "resnet3d":
        return resnet3d.from_pretrained(folder)
    import transformers as hf

    classes = {
        "videomae": hf.VideoMAEForVideoClassification,
        "timesformer": hf.TimesformerForVideoClassification,
        "vivit": hf.VivitForVideoClassification,
        "vjepa2": hf.VJEPA2ForVideoClassification,
    }
    return classes[family].from_pretrained(folder, dtype=torch.float32).eval()


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make(family: str, task: str, seed: int, steps: int | None, peak: float | None, out: Path) -> None:
    started = time.perf_counter()
    default_steps, default_peak = SCHEDULE[family][task]
    steps, peak = steps or default_steps, peak or default_peak
    folder = out / f"tiny-{family}-{task}"
    save(family, train(family, task, seed, steps, peak), task, folder)
    minutes = (time.perf_counter() - started) / 60
    model = load(family, folder)
    measured = evaluate(family, model, task)
    report = {
        "task": task,
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "learning_rate": peak,
        "minutes": round(minutes, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "command": f"python benchmarks/train_zoo.py --family {family} --task {task} --seed {seed}"
        f" --steps {steps} --learning-rate {peak}",
        "held_out_seed": HELD_OUT_SEED,
        "held_out_clips": 1000,
        **measured,
    }
    write_json(folder / "training.json", report)
    size = (folder / "model.safetensors").stat().st_size / 1e6
    print(f"{folder.name}: {measured}, {steps} steps, {minutes:.1f} min, {size:.2f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, help="one family; all without it")
    parser.add_argument("--task", choices=tuple(LABELS), help="one task; all without it")
    parser.add_argument("--all", action="store_true", help="all families and tasks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="training steps; the family's and task's own without it")
    parser.add_argument("--learning-rate", type=float, help="peak learning rate; as above")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    if not (options.all or options.family or options.task):
        parser.error("name a --family, a --task, both, or --all")
    torch.set_num_threads(options.threads)
    for task in [options.task] if options.task else LABELS:
        for family in [options.family] if options.family else FAMILIES:
            make(family, task, options.seed, options.steps, options.learning_rate, options.out)


if __name__ == "__main__":
    main()
