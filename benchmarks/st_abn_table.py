"""Compare the gates of an ST-ABN with Grad-CAM, integrated gradients, STAA and controls: planted evidence, and use.

    python benchmarks/st_abn_table.py                       # the bundled networks of three tasks, minutes of one core
    python benchmarks/st_abn_table.py --results FILE.json   # goes on with what the file does not have
    python benchmarks/st_abn_table.py --seeds FOLDER        # measures docs/st_abn_seeds.json, which the page shows

benchmarks/train_st_abn.py makes the networks: 3D CNNs with a bottleneck, the network of the paper for one task, and a
branch that observes the frozen VideoMAE. FOLDER holds `s1`, `s2`, ..., the `--out` of its other seeds.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from captum.attr import IntegratedGradients
from evidence import COLUMNS, Evidence, averaged, best_control, cell, markdown, mean, means, smoothed, write_between
from torch import Tensor
from tqdm import tqdm
from train_st_abn import AXES, MIXED, planted_of, train_observer
from train_st_abn import evidence as of_gates

from captum_staa import STAA, AttentionBranch, GradCAM, metrics
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.benchmark.clip_runner import RandomWeights
from captum_staa.benchmark.scenes import LABELS
from captum_staa.models import STABN, VideoClassifier
from captum_staa.models.st_abn import Gates
from captum_staa.result import VideoAttribution

WEIGHTS = Path(__file__).parents[1] / "captum_staa" / "models" / "weights"
PAGE = Path(__file__).parents[1] / "docs" / "results_methods.md"
SEEDS = PAGE.with_name("st_abn_seeds.json")
SEED = 90_000
TOP = 0.05  # part of the cells that is closed
CELLS, STEPS = (2, 6, 6), 16  # of insertion and deletion
DRAWS = 3  # of random weights
SCORED = 12  # clips of insertion and deletion
OBSERVED, POSTHOC = ("pattern",), "posthoc, of bottleneck"  # tasks with a branch that observes the bottleneck
VALIDATED = 200  # clips by which the bundled one of several seeds is chosen
PARTS = ("use", "separate")  # parts with a column for each network
Explain = Callable[[Tensor, Tensor], VideoAttribution]
INTRO = """\
What do the gates of an attention branch know, and does the network use them? Means over the bundled networks with
`mechanism="bottleneck"` of the tasks {tasks}, {clips} held-out clips of each. Columns and controls are those of
[planted evidence](results_truth.md#how-to-read-the-tables). Maps keep their signs. Of the temporal
signal that a branch has apart from its map ($\\alpha$), *in time* alone is measured. `mix` is the network of the
paper, for `pattern` only. `posthoc` is the map of a branch that observes a frozen model. Made by
`python benchmarks/st_abn_table.py --clips {clips}`.
"""
USE = {
    "accuracy": "accuracy",
    "trunk": "accuracy of the 3D CNN without a branch",
    "area": "area: mean of M alpha",
    "on evidence": "mean of M alpha on evidence (which is {truth} of the clip)",
    "on rivals": "mean of M alpha on rivals",
    "shuffled": "accuracy with the gates of another clip (chance {chance})",
    "closed": "accuracy with the evidence closed (chance {chance})",
    "opened": "accuracy with nothing but the evidence open",
    "sure": "mean probability of the network's answer",
    "top": "the same if the 5 % of the cells with the highest gates are closed (chance {chance})",
    "as evidence": "the same if as many of them are closed as have evidence in them (2 to 3 %)",
    "at random": "the same if 5 % of the cells, chosen at random, are closed",
    "code": "the same for the clip without its evidence, with the gates of the clip with it",
    "changed": "other decision if the 5 % of the cells with the highest gates are closed (a network that then answers "
    "at random: {most})",
    "switched": "clips of two classes: decision for the other one if the evidence of the first is closed",
    "moved": "the same if the evidence of the other one is also opened",
    "ends": "alpha in the first and last frame, in standard deviations over frames",
    "ends of the truth": "the same of the number of clips whose evidence is visible",
}

OF_SEED = {
    "validation": "validation",
    "accuracy": "accuracy",
    "less": "less than the 3D CNN",
    "joint": "M alpha against rivals",
    "space": "in space",
    "time": "in time",
    "random": "with random weights",
    "area": "area",
    "shuffled": "accuracy, gates of another clip",
    "sure": "probability of its answer",
    "top": "top 5 % closed",
    "code": "no evidence, same gates",
    "opened": "accuracy, only evidence open",
    "switched": "two classes: the other one, evidence of the first closed",
    "moved": "the same, that of the other one opened",
    "ends": "ends of alpha",
    "ends of the truth": "ends of the truth",
}


def of_branch(network: STABN, name: str) -> dict[str, Explain]:
    """Return the maps of a 3D CNN with a branch, by name."""
    branch = AttentionBranch(network)

    def weighted(weighting: str) -> Explain:
        return lambda x, y: branch.attribute_maps(x, y, weighting=weighting)  # type: ignore[arg-type]

    def cam(layer: str, weighting: str) -> Explain:
        return GradCAM(network, f"model.module.{layer}", weighting=weighting).attribute_maps  # type: ignore[arg-type]

    def integrated(x: Tensor, y: Tensor) -> VideoAttribution:
        attributions = IntegratedGradients(network).attribute(x, target=y, n_steps=8, internal_batch_size=16)
        return VideoAttribution.from_attributions(attributions, network.layout)

    gates = {f"{name}, gate (of no class)": weighted("gate"), f"{name}, grad_gate": weighted("grad_gate")}
    if name == "mix":
        return gates
    return gates | {
        f"GradCAM (gradcam) of {name}, second stage": cam("stages.1", "gradcam"),
        f"GradCAM (hirescam) of {name}, first stage": cam("stages.0", "hirescam"),
        f"IntegratedGradients of {name}": integrated,
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
            if "hirescam" in name or "Integrated" in name:
                found[f"{name}, smoothed"] = smoothed(parts.joint)
            elif name.endswith("gate (of no class)"):
                found[f"{name}: alpha"] = parts.temporal[:, :, None, None].expand_as(parts.joint).contiguous()
        return found

    found = means(evidence.scores(maps, controls=True))
    for name, own in found.items():
        if name.endswith(": alpha"):  # the same everywhere in a frame
            found[name] = {"time": own["time"]}
    return found | means(evidence.without_a_model())


def causal(network: STABN, methods: dict[str, Explain], task: str) -> dict[str, dict[str, float]]:
    """Return insertion (higher is better) and deletion (lower is better) of maps, by the network that they explain."""
    clips, labels, truth = PlantedClips(SEED + 3, SCORED, task)[:]
    inputs = network.layout.from_working(clips).contiguous()
    maps = {name: explain(inputs, labels).joint for name, explain in methods.items()}
    maps["the truth"] = truth.float()
    maps["random"] = torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, own in maps.items():
        curves = metrics.insertion_deletion(
            network, inputs, own, target=labels, layout=network.layout, cells=CELLS, steps=STEPS
        )
        found[name] = {side: float(getattr(curves, side).score.mean()) for side in ("insertion", "deletion")}
    return found


@torch.no_grad()
def used(network: STABN, task: str, clips: int) -> dict[str, float]:
    """Return the values of :data:`USE` for edited and exchanged gates."""
    planted = planted_of(SEED + 2, clips, task)
    inputs, labels, truth = planted[:]
    inputs = network.layout.from_working(inputs).contiguous()
    logits, gates = network.forward_with_gates(inputs)
    joint = (gates.spatial * gates.temporal)[:, 0]

    def right(edited: Gates) -> float:
        return float((network.forward_with_gates(inputs, given=edited)[0].argmax(1) == labels).float().mean())

    def with_gates(cells: Tensor) -> Gates:
        """Return gates with M alpha = ``cells`` (B, t, h, w)."""
        return replace(gates, spatial=cells[:, None], temporal=torch.ones_like(gates.temporal))

    evidence = torch.nn.functional.adaptive_max_pool3d(truth.float()[:, None], joint.shape[1:])[:, 0]  # of each cell
    sure, answers = logits.softmax(1).max(1)
    ranked = joint.flatten(1).argsort(1, descending=True)
    shuffled = torch.rand(ranked.shape, generator=torch.Generator().manual_seed(0)).argsort(1)

    def without(order: Tensor, share: float) -> Tensor:
        """Return the probabilities of all classes if the first cells of an order are closed."""
        cells = joint.flatten(1).scatter(1, order[:, : round(share * order.shape[1])], 0.0).view_as(joint)
        return network.forward_with_gates(inputs, given=with_gates(cells))[0].softmax(1)

    def of_answer(probabilities: Tensor) -> float:
        return float(probabilities.gather(1, answers[:, None]).mean())

    closed = without(ranked, TOP)
    emptied = network.layout.from_working(planted.without_evidence(slice(None))).contiguous()
    pixels = network.explain(inputs)
    shown = pixels.spatial_gates * pixels.temporal_gates[:, :, None, None]  # (B, T, H, W)
    found = {
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "area": float(joint.mean()),
        "on evidence": float(shown[truth].mean()),
        "on rivals": float(shown[planted.rivals(slice(None))].mean()),
        "shuffled": right(with_gates(joint.roll(-1, 0))),
        "closed": right(with_gates(joint * (1 - evidence))),
        "opened": right(with_gates(evidence)),
        "sure": float(sure.mean()),
        "top": of_answer(closed),
        "as evidence": of_answer(without(ranked, float(evidence.mean()))),
        "at random": of_answer(without(shuffled, TOP)),
        "code": of_answer(network.forward_with_gates(emptied, given=gates)[0].softmax(1)),
        "changed": float((closed.argmax(1) != answers).float().mean()),
    }
    for name, by_frame in (
        ("ends", gates.temporal.flatten(1).mean(0)),
        ("ends of the truth", truth.flatten(2).any(2).float().mean(0)),
    ):
        found[name] = float((by_frame[[0, -1]].mean() - by_frame.mean()) / by_frame.std())
    if task not in ("order", MIXED):
        found |= switched(network, task, clips)
    return found


def switched(network: STABN, task: str, clips: int) -> dict[str, float]:
    """Return how often the other of two visible classes is the answer once the first one's evidence is closed."""
    inputs, labels, truths = PlantedClips(SEED + 4, clips, task, scene=SceneOptions(two_classes=True))[:]
    inputs = network.layout.from_working(inputs).contiguous()
    logits, gates = network.forward_with_gates(inputs)
    first = logits.argmax(1, keepdim=True)
    planted = (labels == first).any(1)  # the answer is one of the two visible classes
    own = (labels == first).float().argmax(1)
    other = labels.gather(1, 1 - own[:, None])[:, 0]
    cells = torch.nn.functional.adaptive_max_pool3d(truths.float(), gates.spatial.shape[2:])  # (B, 2, t, h, w)
    shown, hidden = (cells[torch.arange(len(cells)), side][:, None] for side in (own, 1 - own))
    closed = gates.spatial * gates.temporal * (1 - shown)

    def answers_other(joint: Tensor) -> float:
        edited = replace(gates, spatial=joint, temporal=torch.ones_like(gates.temporal))
        after = network.forward_with_gates(inputs, given=edited)[0].argmax(1)
        return mean((after == other)[planted].float().tolist())

    return {"switched": answers_other(closed), "moved": answers_other(torch.maximum(closed, hidden * (1 - shown)))}


def of_seed(folder: Path, task: str, clips: int) -> dict[str, float]:
    """Return the values of :data:`OF_SEED` of a trained network."""
    network = STABN.from_pretrained(folder).eval()
    report = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    found = used(network, task, clips) | report["gate_against_rivals"] | {"accuracy": report["accuracy"]}
    trunk = (folder.parent if task == MIXED else WEIGHTS) / f"tiny-resnet3d-{task}"
    found["less"] = accuracy_of(trunk) - report["accuracy"]
    drawn = []
    for seed in range(DRAWS):
        with RandomWeights(VideoClassifier(network, "BCTHW"), seed).in_place():
            drawn.append(of_gates(network, task, clips)["joint"])
    found["random"] = mean(drawn)
    return {name: round(found[name], 4) for name in OF_SEED if name in found}


@torch.no_grad()
def validated(network: STABN, task: str) -> float:
    """Return the mean of accuracy and evidence in space and in time, on clips of which no table reports anything."""
    planted = planted_of(SEED + 5, VALIDATED, task)
    clips, labels, truth = planted[:]
    rivals, scores = planted.rivals(slice(None)), []
    for part in torch.arange(VALIDATED).split(50):
        gates = network.explain(network.layout.from_working(clips[part]).contiguous())
        joint = gates.spatial_gates * gates.temporal_gates[:, :, None, None]
        scores.append((gates.logits.argmax(1) == labels[part]).float())
        scores += [metrics.evidence_against_rivals(joint, truth[part], rivals[part], axis=axis) for axis in AXES[1:]]
    return mean(torch.cat(scores).tolist())


def of_seeds(folder: Path, clips: int) -> None:
    """Measure the networks of a folder that :data:`SEEDS` does not have, and store the numbers."""
    kept = json.loads(SEEDS.read_text(encoding="utf-8")) if SEEDS.exists() else {}
    for report in sorted(folder.glob("s*/tiny-st-abn-*/training.json")):
        about = json.loads(report.read_text(encoding="utf-8"))
        name = f"{about['task']}, seed {about['seed']}"
        if name not in kept:
            network = STABN.from_pretrained(report.parent).eval()
            kept[name] = {"validation": round(validated(network, about["task"]), 4)}
            kept[name] |= of_seed(report.parent, about["task"], clips)
            print(name, json.dumps(kept[name]), flush=True)
            SEEDS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def of_posthoc(task: str, clips: int) -> dict[str, Any]:
    """Train a branch that observes the bottleneck, frozen, behind its first stage; return its scores and curves."""
    bottleneck = VideoClassifier.from_pretrained(f"tiny-st-abn-{task}")
    observer = train_observer(bottleneck, "model.module.stages.0", task, seed=1)
    methods: dict[str, Explain] = {f"{POSTHOC} (of no class)": AttentionBranch(observer).attribute_maps}
    name = next(iter(methods))
    return {
        "maps": {name: scored(observer, methods, task, clips)[name]},
        "curves": {name: causal(observer, methods, task)[name]},
    }


def use_of_separate_gates(network: STABN, task: str, clips: int) -> dict[str, str]:
    """Return how much the output changes if one of the gates is replaced, and the share of changed predictions."""
    inputs, labels, _ = PlantedClips(SEED + 2, clips, task)[:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table has the numbers
        usage = metrics.attention_usage(network, network.layout.from_working(inputs).contiguous(), labels)
    return {
        name.replace("_", " "): f"{float(getattr(usage, name).mean()):.3f} ({decisions:.2f})"
        for name, decisions in usage.decisions.items()
    }


def accuracy_of(folder: Path) -> float:
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))["accuracy"]


def table(rows: dict[str, dict[str, str]], first: str = "") -> list[str]:
    """Return the lines of a table with a column for each key of ``rows``."""
    lines = [f"| {first} | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for name in dict.fromkeys(name for own in rows.values() for name in own):
        lines.append(f"| {name} | " + " | ".join(own.get(name, "") for own in rows.values()) + " |")
    return lines


def measures(task: str, clips: int) -> dict[str, Callable[[], Any]]:
    """Return functions for all parts of a task's numbers: scores of maps, use of the gates, insertion and deletion."""
    network = STABN.from_pretrained(WEIGHTS / f"tiny-st-abn-{task}").eval()
    networks, methods = {task: network}, of_branch(network, "bottleneck")
    if (WEIGHTS / f"tiny-st-abn-{task}-mix").is_dir():
        networks[f"{task}-mix"] = STABN.from_pretrained(WEIGHTS / f"tiny-st-abn-{task}-mix").eval()

    def of_vit() -> dict[str, Any]:
        observer = STABN.from_pretrained(WEIGHTS / f"tiny-videomae-{task}-observer").eval()
        return scored(observer, of_observer(observer), task, clips)

    def use() -> dict[str, Any]:
        trunk = {"trunk": accuracy_of(WEIGHTS / f"tiny-resnet3d-{task}")}
        known = {name: {"accuracy": accuracy_of(WEIGHTS / f"tiny-st-abn-{name}")} for name in networks}
        return {name: used(own, task, clips) | known[name] | trunk for name, own in networks.items()}

    found: dict[str, Callable[[], Any]] = {
        "maps": lambda: scored(network, methods, task, clips),
        "maps of the observer": of_vit,
        "use": use,
        "separate": lambda: {name: use_of_separate_gates(own, task, clips) for name, own in networks.items()},
        "curves": lambda: causal(network, methods, task),
    }
    if task in OBSERVED:
        found["posthoc"] = lambda: of_posthoc(task, clips)
    if len(networks) > 1:
        mix = networks[f"{task}-mix"]
        found["maps of the mix"] = lambda: scored(mix, of_branch(mix, "mix"), task, clips)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    parser.add_argument("--results", type=Path, help="JSON file that keeps the numbers of finished parts")
    parser.add_argument("--parts", nargs="*", help="only measure these parts, such as 'use', and write no page")
    parser.add_argument("--seeds", type=Path, metavar="FOLDER", help="only measure the networks of several seeds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.seeds:
        of_seeds(arguments.seeds, arguments.clips)
        return
    warnings.filterwarnings("ignore", "the network does not use its gates")  # the table has the numbers
    kept: Path | None = arguments.results
    results: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.exists() else {}
    for task in tqdm(LABELS):
        for part, measure in measures(task, arguments.clips).items():
            if part in results.setdefault(task, {}) or part not in (arguments.parts or [part]):
                continue
            results[task][part] = measure()
            if kept:
                kept.write_text(json.dumps(results), encoding="utf-8")
    if arguments.parts:
        return
    for own in results.values():
        for part in [part for part in own if part.startswith("maps of")]:
            own["maps"] |= own.pop(part)
        for part, found in own.pop("posthoc", {}).items():
            own[part] |= found
    write_between(PAGE, "st_abn_table", page(results, arguments.clips))


def page(results: dict[str, Any], clips: int) -> str:
    """Return the text of the page."""
    joined = {part: {name: own for task in results.values() for name, own in task[part].items()} for part in PARTS}
    maps = [
        best_control({name: own for name, own in task["maps"].items() if not name.startswith(("mix", POSTHOC))})
        for task in results.values()
    ]
    names = dict.fromkeys(name for task in results.values() for name in task["curves"])
    curves = {
        f"{task}, {side}": {name: cell(own["curves"].get(name, {}), side) for name in names}
        for task, own in results.items()
        for side in ("insertion", "deletion")
    }
    lines = [
        INTRO.format(clips=clips, tasks=", ".join(f"`{task}`" for task in results)),
        *markdown(averaged(maps), COLUMNS, "map"),
        "",
        "### Are the gates used?",
        "",
        "What the network answers if its gates are edited or exchanged. Accuracies in the first two rows are over 1000",
        "clips.",
        "",
        *table(
            {name: _named({key: f"{value:.3f}" for key, value in own.items()}) for name, own in joined["use"].items()}
        ),
        "",
        "Mean change of the target's probability when only one of the gates is replaced, and the share of decisions",
        "that change ([attention_usage](metrics.md)):",
        "",
        *table(joined["separate"]),
        "",
        *seeds_section(),
        "### Insertion and deletion",
        "",
        f"Of the bottleneck, {SCORED} clips of each task, in {STEPS} steps of cells of {CELLS[0]} frames and "
        f"{CELLS[1]} x {CELLS[2]} pixels; insertion (higher is",
        "better) and deletion (lower is better). The gates are computed again for every changed clip.",
        "",
        *table(curves, "map"),
    ]
    for task, own in results.items():
        lines += ["", f"### {task}", "", *markdown(best_control(own["maps"]), COLUMNS, "map")]
    return "\n".join(lines)


def seeds_section() -> list[str]:
    """Return the lines about several seeds, if they have been measured."""
    if not SEEDS.exists():
        return []
    kept = json.loads(SEEDS.read_text(encoding="utf-8"))
    order = sorted(kept, key=lambda name: ([*LABELS, MIXED].index(name.split(",")[0]), name))
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in WEIGHTS.glob("tiny-st-abn-*/training.json")]
    chosen = {f"{own['task']}, seed {own['seed']}" for own in reports if own["loss"] == "faithful"}
    columns = {
        text: {
            name + ", bundled" * (name in chosen): f"{kept[name][key]:.3f}" if key in kept[name] else ""
            for name in order
        }
        for key, text in OF_SEED.items()
    }
    return [
        "### By seed",
        "",
        "Each network by one command, `python benchmarks/train_st_abn.py --task TASK --kind bottleneck --seed SEED`.",
        f"*Validation* is the mean of accuracy and of evidence in space and in time on {VALIDATED} clips used for",
        "nothing else. By it, the bundled networks were chosen; less than 0.005 does not count, so that of motion is",
        "the first. All other columns are of held-out clips: accuracy of 1000, evidence of 96, others of 64. The",
        "last columns are alpha in the first and last frame, and the visible evidence there, as in the table above.",
        "",
        *table(columns, "network"),
        "",
    ]


def _named(values: dict[str, str]) -> dict[str, str]:
    """Return the values by the text of their row."""
    facts = {"truth": "2 to 3 %", "chance": "1/3, 1/2, 1/2", "most": "2/3, 1/2, 1/2"}
    return {text.format(**facts): values[name] for name, text in USE.items() if name in values}


if __name__ == "__main__":
    main()
