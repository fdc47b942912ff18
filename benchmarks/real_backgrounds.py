"""Train models on planted clips with real backgrounds, and compare methods on videos that they have not seen.

    python benchmarks/real_backgrounds.py --train DIR_OR_VIDEO ... --test DIR_OR_VIDEO ...
    python benchmarks/real_backgrounds.py --write-only      # the page only, from the existing results

Writes docs/results_truth.md. A bundled model is trained further on clips whose background is cut from the videos
of ``--train``, and explained on clips whose background is cut from those of ``--test``. Beside it stands the bundled
model on clips with drawn backgrounds. Trained weights and finished rows are stored, and a second start continues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from evidence import BATCH, COLUMNS, Evidence, averaged, best_control, cell, means, write_between
from planted_table import Row, methods
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from train_zoo import RECIPES, WEIGHTS, Recipe, evaluate, fit, load

from captum_staa import SpatioTemporalPerturbation, VideoClassifier, VideoLayout, io
from captum_staa._utils.files import atomic
from captum_staa.benchmark.planted import VIDEOS

MODELS = ("resnet3d-motion", "resnet3d-pattern", "videomae-motion", "videomae-pattern")
STEPS, SEED = 320, 31_000
FRAMES = 160  # of each video
DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "real_backgrounds"
SHOWN = ("rivals", "time", "classes", "random weights", "other class")
# One row for each kind of method in the table of planted evidence.
KEPT = (
    "STAA (relevance)",
    "STAA (attention, of no class)",
    "GradCAM (hirescam, first layer), signed, smoothed",
    "InputXGradient, signed, smoothed",
    "InputXGradient, magnitude, smoothed",
    "IntegratedGradients (20), signed, smoothed",
    "VideoOcclusion (4 x 16 x 16)",
    "RISE (400)",
    "STEP (nested)",
)


def read(sources: Sequence[Path]) -> dict[str, np.ndarray]:
    """Return the first frames of every video by its name, ``(F, H, W, 3)`` uint8."""
    paths = [path for each in sources for path in ([each] if each.is_file() else sorted(each.iterdir()))]
    return {path.name: io.read_video(path).frames[:FRAMES] for path in paths if path.suffix.lower() in VIDEOS}


def trained(name: str, footage: Sequence[np.ndarray], folder: Path) -> torch.nn.Module:
    """Return a bundled model that was trained further on clips with real backgrounds."""
    family, task = name.split("-")
    model = load(family, WEIGHTS / f"tiny-{name}")
    path = folder / f"{name}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    torch.manual_seed(SEED)
    fit(family, task, SEED, Recipe(STEPS, RECIPES[family][task].peak), model, footage=footage)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return model


def rows(clf: VideoClassifier) -> dict[str, Row]:
    step = SpatioTemporalPerturbation(clf)
    found = methods(clf) | {
        step.get_name(): Row(
            lambda clips, targets: clf.layout.reduce(
                step.attribute(clips, target=targets, perturbations_per_eval=BATCH)
            ),
            {"": lambda maps: maps},
            slow=True,
            controls=False,
        )
    }
    return {name: row for name, row in found.items() if any(kept.startswith(name) for kept in KEPT)}


def score(clf: VideoClassifier, task: str, counts: tuple[int, int], footage: Sequence[np.ndarray] | None) -> dict:
    many, few = (Evidence(clf, task, count, SEED + 1, footage=footage) for count in counts)
    found: dict[str, dict[str, float]] = {}
    for name, row in tqdm(rows(clf).items(), mininterval=5):

        def maps(clips: torch.Tensor, targets: torch.Tensor, name: str = name, row: Row = row) -> dict:
            own = row.call(clips, targets)
            return {name + end: variant(own) for end, variant in row.variants.items() if name + end in KEPT}

        found |= means((few if row.slow else many).scores(maps, row.controls))
    return found | means(many.without_a_model())


def measure(name: str, options: argparse.Namespace) -> dict:
    """Return accuracies and scores of the bundled model on drawn backgrounds, and of the trained one on real ones."""
    family, task = name.split("-")
    training, testing = read(options.train), read(options.test)
    if both := sorted(training.keys() & testing.keys()):
        raise ValueError(f"videos of --train and --test must be different, got {both} in both")
    start = time.process_time()
    model = trained(name, list(training.values()), options.weights)
    minutes = (time.process_time() - start) / 60
    bundled = VideoClassifier.from_pretrained(f"tiny-{name}")
    clf = VideoClassifier(model, layout=VideoLayout(bundled.layout.axes), labels=bundled.labels)
    unseen = list(testing.values())
    return {
        "train": sorted(training),
        "test": sorted(testing),
        "minutes": round(minutes, 1),
        "before": evaluate(family, load(family, WEIGHTS / f"tiny-{name}"), task, 200, unseen),
        "accuracy": evaluate(family, model, task, 200, unseen),
        "drawn": score(bundled, task, (options.clips, options.slow_clips), None),
        "real": score(clf, task, (options.clips, options.slow_clips), unseen),
    }


def page(found: dict[str, dict]) -> str:
    """Return the part of docs/results_truth.md that this program writes."""
    first = next(iter(found.values()))
    lines = [
        f"Trained on backgrounds of {', '.join(f'`{name}`' for name in first['train'])}; explained on backgrounds of "
        f"{', '.join(f'`{name}`' for name in first['test'])}. {first['clips']} clips of each model, "
        f"{first['slow clips']} for methods of hundreds of forwards.",
        "",
        "| model | accuracy before, after | without evidence | only evidence |",
        "|---|---|---|---|",
    ]
    for name, own in found.items():
        after = own["accuracy"]
        lines.append(
            f"| {name} | {own['before']['accuracy']:.2f}, {after['accuracy']:.2f} | "
            f"{after['accuracy_without_evidence']:.2f} | {after['accuracy_only_evidence']:.2f} |"
        )
    heads = [COLUMNS[key] for key in SHOWN]
    lines += ["", "Drawn / real backgrounds, means over the models that a method explains:", ""]
    lines += ["| method | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    drawn, real = (best_control(averaged([own[kind] for own in found.values()])) for kind in ("drawn", "real"))
    for name in sorted(real, key=lambda each: -real[each].get("rivals", 0)):
        cells = [f"{cell(drawn[name], key)} / {cell(real[name], key)}".strip(" /") for key in SHOWN]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, nargs="+", default=[], help="videos, or folders of videos")
    parser.add_argument("--test", type=Path, nargs="+", default=[])
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--slow-clips", type=int, default=6)
    parser.add_argument(
        "--weights", type=Path, default=Path("build/real_backgrounds"), help="folder of trained weights"
    )
    parser.add_argument("--write-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(exist_ok=True)
    for name in [] if options.write_only else options.only:
        path = FOLDER / f"{name}.json"
        if not path.exists():
            if not (options.train and options.test):
                parser.error("--train and --test need at least one video each")
            result = {"clips": options.clips, "slow clips": options.slow_clips, **measure(name, options)}
            with atomic(path) as part:
                part.write_text(json.dumps(result, indent=1) + "\n")
    found = {
        name: json.loads((FOLDER / f"{name}.json").read_text()) for name in MODELS if (FOLDER / f"{name}.json").exists()
    }
    write_between(DOCS / "results_truth.md", "real_backgrounds", page(found))


if __name__ == "__main__":
    main()
