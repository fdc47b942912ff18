"""Compare layers and weightings of Grad-CAM on 3D CNNs with planted evidence: the table of docs/grad_cam.md.

python benchmarks/grad_cam_table.py                # the three bundled 3D CNNs, some minutes of one core
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from evidence import COLUMNS, Evidence, Maps, averaged, best_control, markdown, means, smoothed, write_between
from torch import Tensor
from tqdm import tqdm

from captum_staa import GradCAM, VideoClassifier

TASKS = ("pattern", "motion", "order")
LAYERS = ("stem", "stages.0", "stages.1", "stages.2")
SEED = 21_000
PAGE = Path(__file__).parents[1] / "docs" / "grad_cam.md"


def maps_of(clf: VideoClassifier, layer: str, weighting: str) -> Maps:
    method = GradCAM(clf, layer, weighting=weighting)  # type: ignore[arg-type]

    def maps(clips: Tensor, targets: Tensor) -> dict[str, Tensor]:
        joint = method.attribute_maps(clips, targets).joint
        return {f"{layer}, `{weighting}`": joint, f"{layer}, `{weighting}`, smoothed": smoothed(joint)}

    return maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for task in tqdm(TASKS):
        clf = VideoClassifier.from_pretrained(f"tiny-resnet3d-{task}")
        evidence = Evidence(clf, task, arguments.clips, SEED)
        found = means(evidence.without_a_model())
        for layer in LAYERS:
            for weighting in ("hirescam", "layercam", "gradcam"):
                found |= means(evidence.scores(maps_of(clf, layer, weighting), controls=True))
        results.append(best_control(found))
    text = f"Means over {arguments.clips} clips of each of the three bundled 3D CNNs.\n\n"
    write_between(PAGE, "grad_cam_table", text + "\n".join(markdown(averaged(results), COLUMNS, "layer, weighting")))


if __name__ == "__main__":
    main()
