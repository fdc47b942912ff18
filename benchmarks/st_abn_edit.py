"""Try to remove a misleading background cue from a network by gates that a person draws for one clip in ten.

    python benchmarks/st_abn_edit.py --folder OUT          # about five minutes of one core; goes on where it stopped

In the training clips, a small square in the corner is bright for one class and dark for the other. A bottleneck over
the bundled 3D CNN is trained on them. Then `STABNLoss("edit")` goes on with clips of the same kind. For one clip in
ten, the evidence is drawn. As a control, it also goes on without any drawn gates. Prints accuracies for clips whose
square agrees with the class, is random, or contradicts it.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from train_st_abn import untrained_bottleneck

from captum_staa.benchmark import PlantedClips
from captum_staa.models import STABN, FitConfig, STABNLoss, fit_st_abn

TASK, SIDE, BATCH, STEPS = "motion", 6, 16, 20
EDITED = 0.1  # part of the clips with drawn gates
TEST_SEED = 70_000


def with_cue(clips: Tensor, bright: Tensor) -> Tensor:
    """Return clips (B, C, T, H, W) with a square in the corner, bright where ``bright`` (B,) is True, else dark."""
    changed = clips.clone()
    changed[..., :SIDE, :SIDE] = (bright.float() * 1.6 - 0.8)[:, None, None, None, None]
    return changed


def batches(seed: int, epoch: int, edited: float | None = None) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield clips with a cue that agrees with the class, labels, and, if ``edited`` is given, drawn gates.

    They are nan for all clips but the share ``edited``.
    """
    generator = torch.Generator().manual_seed(1000 * seed + epoch)
    for i in range(STEPS):
        planted, labels, truth = PlantedClips(seed * 1_000_000 + epoch * STEPS + i, BATCH, TASK)[:]
        clips = with_cue(planted.transpose(1, 2), labels == 1).contiguous()
        if edited is None:
            yield clips, labels
            continue
        drawn = F.adaptive_max_pool3d(truth.float()[:, None], (16, 24, 24))[:, 0]
        drawn[torch.rand(BATCH, generator=generator) >= edited] = torch.nan
        yield clips, labels, None, drawn


@torch.no_grad()
def measured(st_abn: STABN, count: int) -> dict[str, float]:
    """Return accuracies with a cue that agrees with the class, is random, or is that of the other class; and gates."""
    planted, labels, truth = PlantedClips(TEST_SEED, count, TASK)[:]
    planted = planted.transpose(1, 2).contiguous()
    chance = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
    found = {}
    for name, bright in (("agrees", labels == 1), ("random", chance), ("contradicts", labels != 1)):
        right = [
            st_abn(with_cue(clips, side)).argmax(1) == label
            for clips, side, label in zip(planted.split(32), bright.split(32), labels.split(32), strict=True)
        ]
        found[name] = float(torch.cat(right).float().mean())
    explained = st_abn.explain(with_cue(planted[:64], chance[:64]))
    joint = explained.spatial_gates * explained.temporal_gates[:, :, None, None]
    elsewhere = ~truth[:64]
    elsewhere[..., :SIDE, :SIDE] = False
    found["gates on the cue"] = float(joint[..., :SIDE, :SIDE].mean())
    found["gates on evidence"] = float(joint[truth[:64]].mean())
    found["gates elsewhere"] = float(joint[elsewhere].mean())
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--edit-epochs", type=int, default=4)
    parser.add_argument("--clips", type=int, default=256, help="test clips")
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    seed, first, further = options.seed, options.epochs, options.edit_epochs

    def fit(name: str, st_abn: STABN, loss: STABNLoss, start: int, epochs: int, edited: float | None) -> STABN:
        config = FitConfig(checkpoint=options.folder / f"{name}_{seed}.safetensors", resume=True)
        data = lambda epoch: batches(seed, start + epoch, edited)  # noqa: E731
        fit_st_abn(st_abn, data, loss, config, epochs=epochs, seed=seed, show_progress=True)
        print(name, json.dumps(measured(st_abn.eval(), options.clips)), flush=True)
        return st_abn

    before = fit("before", untrained_bottleneck(TASK, seed), STABNLoss("faithful"), 0, first, None)
    edit = STABNLoss("edit", edit=100.0)
    fit("after", copy.deepcopy(before), edit, first, further, EDITED)
    fit("control", copy.deepcopy(before), edit, first, further, 0.0)


if __name__ == "__main__":
    main()
