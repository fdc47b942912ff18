"""Draws the pictures of README and docs: `python docs/figures.py` (a planted clip, so that the truth is known)."""

from pathlib import Path

import numpy as np

from captum_staa import STAA, VideoClassifier
from captum_staa.benchmark import PlantedClips
from captum_staa.visualization import save_animation, show_frames, show_timeline

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    planted = PlantedClips(seed=12, n=20, task="pattern")
    clip, label, truth = planted[16:17]
    frames = planted.frames(16)
    parts = STAA(clf).attribute_parts(clip, target=label)
    answer, probability = clf.predict(clip, k=1)[0]
    title = f"STAA: why '{answer}' ({probability:.0%})?"
    save_animation(IMAGES / "hero.webp", frames, parts, fps=6, overwrite=True)
    figure, _ = show_frames(frames, parts, title=title, use_pyplot=False)
    figure.savefig(IMAGES / "sheet.png", dpi=110)
    windows = np.asarray(truth[0].flatten(1).any(1))
    figure, _ = show_timeline(parts, clip=frames, truth=windows, title=title, use_pyplot=False)
    figure.savefig(IMAGES / "timeline.png", dpi=110)


if __name__ == "__main__":
    main()
