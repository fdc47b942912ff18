"""Compare the gates of an ST-ABN with Grad-CAM, STAA and controls: planted evidence and attention usage.

    python benchmarks/st_abn_table.py                       # the bundled networks of three tasks, minutes of one core

benchmarks/train_st_abn.py makes the networks: a 3D CNN with a branch, trained with the loss of the paper, and
a branch that observes the frozen VideoMAE.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from evidence import COLUMNS, Evidence, averaged, best_control, markdown, means, smoothed
from torch import Tensor
from tqdm import tqdm

from captum_staa import STAA, AttentionBranch, GradCAM, metrics
from captum_staa.benchmark import PlantedClips
from captum_staa.benchmark.scenes import LABELS
from captum_staa.models import STABN
from captum_staa.result import VideoAttribution

WEIGHTS = Path(__file__).parents[1] / "captum_staa" / "models" / "weights"
PAGE = Path(__file__).parents[1] / "docs" / "st_abn_table.md"
SEED = 90_000
Explain = Callable[[Tensor, Tensor], VideoAttribution]
INTRO = """# ST-ABN: the table

What do the gates of an attention branch know? Means over the bundled networks of the tasks `pattern`, `motion` and
`order`, {clips} clips of each. Columns and controls are those of
[planted evidence](planted.md#how-to-read-the-tables). Maps keep their signs. Of the temporal signal that a branch has
apart from its map ($\\alpha$), *in time* alone is measured. `posthoc` is the map of a branch that observes a frozen
VideoMAE. Made by `python benchmarks/st_abn_table.py`.
"""


def of_branch(network: STABN) -> dict[str, Explain]:
    """Return the maps of a 3D CNN with a branch, by name."""
    branch = AttentionBranch(network)

    def weighted(weighting: str) -> Explain:
        return lambda x, y: branch.attribute_maps(x, y, weighting=weighting)  # type: ignore[arg-type]

    def cam(layer: str, weighting: str) -> Explain:
        return GradCAM(network, f"model.module.{layer}", weighting=weighting).attribute_maps  # type: ignore[arg-type]

    return {
        "ST-ABN, gate (of no class)": weighted("gate"),
        "ST-ABN, grad_gate": weighted("grad_gate"),
        "ST-ABN, class_map": weighted("class_map"),
        "GradCAM (gradcam), the branch's layer": cam(network.layer, "gradcam"),
        "GradCAM (hirescam), the branch's layer": cam(network.layer, "hirescam"),
        "GradCAM (hirescam), the first stage": cam("stages.0", "hirescam"),
    }


def of_observer(observer: STABN) -> dict[str, Explain]:
    return {
        "posthoc, of VideoMAE (of no class)": AttentionBranch(observer).attribute_maps,
        "STAA, of VideoMAE": STAA(observer.model).attribute_maps,
    }


def scored(network: STABN, methods: dict[str, Explain], task: str, clips: int) -> dict[str, dict[str, float]]:
    evidence = Evidence(network.model, task, clips, SEED, redraw=network)

    def maps(inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, explain in methods.items():
            parts = explain(inputs, targets)
            found[name] = parts.joint
            if "GradCAM" in name:
                found[f"{name}, smoothed"] = smoothed(parts.joint)
            elif name.startswith("ST-ABN"):
                found[f"{name}: alpha"] = parts.temporal[:, :, None, None].expand_as(parts.joint).contiguous()
        return found

    found = means(evidence.scores(maps, controls=True))
    for name, own in found.items():
        if name.endswith(": alpha"):  # the same everywhere in a frame
            found[name] = {"time": own["time"]}
    return found | means(evidence.without_a_model())


def used(network: STABN, task: str) -> dict[str, str]:
    """Return how much the output changes if gates are replaced, and the share of changed predictions."""
    clips, labels, _ = PlantedClips(SEED + 2, 48, task)[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table has the numbers
        usage = metrics.attention_usage(network, clips.transpose(1, 2).contiguous(), labels)
    return {
        name.replace("_", " "): f"{float(getattr(usage, name).mean()):.3f} ({decisions:.2f})"
        for name, decisions in usage.decisions.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results, usages, lines = [], {}, []
    for task in tqdm(LABELS):
        network = STABN.from_pretrained(WEIGHTS / f"tiny-st-abn-{task}").eval()
        observer = STABN.from_pretrained(WEIGHTS / f"tiny-videomae-{task}-observer").eval()
        found = scored(network, of_branch(network), task, arguments.clips)
        found |= scored(observer, of_observer(observer), task, arguments.clips)
        results.append(best_control(found))
        usages[task] = used(network, task)
        lines += ["", f"## {task}", "", *markdown(results[-1], COLUMNS, "map")]
    intro = [
        INTRO.format(clips=arguments.clips),
        *markdown(averaged(results), COLUMNS, "map"),
        "",
        "## Are the gates used?",
        "",
    ]
    intro += [
        "Mean change of the target's probability when gates are replaced, and the share of decisions that change",
        "([attention_usage](metrics.md)):",
        "",
        "| | " + " | ".join(usages) + " |",
        "|---" * (len(usages) + 1) + "|",
    ]
    for name in next(iter(usages.values())):
        intro.append(f"| {name} | " + " | ".join(own[name] for own in usages.values()) + " |")
    PAGE.write_text("\n".join([*intro, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
