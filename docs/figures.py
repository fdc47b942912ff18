"""Draw the pictures of README and docs with planted clips, whose evidence is known: `python docs/figures.py`."""

import colorsys
import shutil
import subprocess
import tempfile
from io import BytesIO
from pathlib import Path

import gallery  # beside this file
import numpy as np
import package_graph
import real_video
import torch
from captum.attr import InputXGradient
from matplotlib.figure import Figure
from PIL import Image
from skimage.filters import median
from torch.nn import functional

from captum_staa import (
    STAA,
    SpatioTemporalPerturbation,
    VideoClassifier,
    VideoOcclusion,
    feature_masks,
)
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.models import STABN
from captum_staa.visualization import (
    Frames,
    Style,
    compare_methods,
    show_frames,
    show_slices,
    show_summary,
    show_timeline,
    to_html,
)

IMAGES = Path(__file__).parent / "images"
FOR = Style(
    sign="positive"
)  # draw evidence for the class only; absolute values would also show evidence against it


def staa() -> None:
    """Draw sheet.png and timeline.png: the STAA map of one clip."""
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    planted = PlantedClips(seed=12, n=20, task="pattern")
    clip, label, truth = planted[16:17]
    frames = planted.frames(16)
    parts = STAA(clf).attribute_maps(clip, target=label)
    answer, probability = clf.predict(clip, k=1)[0]
    title = f"STAA: why '{answer}' ({probability:.0%})?"
    figure, _ = show_frames(parts, frames, style=FOR, title=title, use_pyplot=False)
    figure.savefig(IMAGES / "sheet.png", dpi=110)
    windows = np.asarray(truth[0].flatten(1).any(1))
    figure, _ = show_timeline(
        parts, frames, truth=windows, title=title, use_pyplot=False
    )
    figure.savefig(IMAGES / "timeline.png", dpi=110)


def masks() -> None:
    """Draw feature_masks.png: every mask over the same frames of one clip."""
    clf = VideoClassifier.from_pretrained("tiny-videomae-motion")
    planted = PlantedClips(seed=5, n=20, task="motion")
    index = 10  # the evidence shows in frames 7 to 11 and stays clear of the borders
    clip, layout, frames = (
        planted[index : index + 1][0],
        clf.layout,
        planted.frames(index),
    )
    rows = {
        "the clip": None,
        "frames": feature_masks.frames(clip, layout),
        "segments, n=4": feature_masks.segments(clip, layout, 4),
        "grid, 4 x 12 x 12": feature_masks.grid(clip, layout, (4, 12, 12)),
        "tubelets, 2 x 8 x 8": feature_masks.tubelets(clip, clf),
        "supervoxels, n=24": feature_masks.supervoxels(clip, layout, 24),
        "flow_tubes, n=24": feature_masks.flow_tubes(clip, layout, 24),
    }
    shown = range(5, 16, 2)
    figure = Figure(figsize=(1.2 * len(shown), 1.28 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(shown))
    for (name, mask), row in zip(rows.items(), axes, strict=True):
        pictures = (
            frames
            if mask is None
            else colored(frames, mask.expand(1, 16, 1, 48, 48)[0, :, 0].numpy())
        )
        row[0].set_ylabel(
            name if mask is None else f"{name}\n{int(mask.max()) + 1} regions",
            fontsize=8,
        )
        for ax, t in zip(row, shown, strict=True):
            ax.imshow(pictures[t])
            ax.set(xticks=[], yticks=[])
    for ax, t in zip(axes[0], shown, strict=True):
        ax.set_title(f"frame {t}", fontsize=8)
    save_small(figure, "feature_masks.png")


def perturbation() -> None:
    """Draw perturbation.png: the masks of four areas over some frames, the map, and the planted evidence."""
    clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
    planted = PlantedClips(seed=12, n=20, task="pattern")
    clip, label, truth = planted[16:17]
    frames = planted.frames(16)
    parts = SpatioTemporalPerturbation(clf).attribute_maps(
        clf.layout.from_working(clip).contiguous(),
        target=label,
        perturbations_per_eval=8,
    )
    shown = range(7, 16, 2)
    gray = frames.mean(-1)
    rows = [("the clip", None), ("planted", truth[0].float())]
    for area, kept, removed, mask in zip(
        parts.areas, parts.kept[0], parts.removed[0], parts.masks[0], strict=True
    ):
        rows.append(
            (f"mask of {area:.0%}\nkept {kept:.2f}\nremoved {removed:.2f}", mask)
        )
    rows.append(("the map", parts.joint[0] / parts.joint[0].max()))
    figure = Figure(
        figsize=(1.2 * len(shown) + 0.7, 1.24 * len(rows)), layout="constrained"
    )
    axes = figure.subplots(len(rows), len(shown))
    for (name, values), row in zip(rows, axes, strict=True):
        row[0].set_ylabel(name, fontsize=7)
        for ax, t in zip(row, shown, strict=True):
            if values is None:
                ax.imshow(frames[t])
            else:
                ax.imshow(0.25 * gray[t], cmap="gray", vmin=0, vmax=255)
                ax.imshow(values[t], cmap="inferno", vmin=0, vmax=1, alpha=0.8)
            ax.set(xticks=[], yticks=[])
    for ax, t in zip(axes[0], shown, strict=True):
        ax.set_title(f"frame {t}", fontsize=8)
    save_small(figure, "perturbation.png")


def branch_edits() -> None:
    """Draw st_abn_edits.webp: the gates of a clip with evidence of two classes, as they are and edited."""
    st_abn = STABN.from_pretrained("tiny-st-abn-pattern")
    planted = PlantedClips(seed=21, n=12, scene=SceneOptions(two_classes=True))
    index = 4
    clip, labels, truth = planted[index : index + 1]
    frames, volume = planted.frames(index), st_abn.layout.from_working(clip)
    own = st_abn.explain(volume)
    evidence = [
        functional.adaptive_max_pool3d(truth[:, side].float()[:, None], own.grid)[:, 0]
        for side in (0, 1)
    ]
    spatial, opened = own.gates.spatial[:, 0], torch.ones(1, len(frames))
    names = [st_abn.model.labels[int(label)] for label in labels[0]]
    edits = {
        "its own gates": {},
        f"'{names[0]}' closed": {"spatial": spatial * (1 - evidence[0])},
        f"'{names[1]}' closed": {"spatial": spatial * (1 - evidence[1])},
        f"only '{names[0]}' open": {"spatial": evidence[0], "temporal": opened},
        f"only '{names[1]}' open": {"spatial": evidence[1], "temporal": opened},
    }
    shown, gray = range(1, 16, 2), frames.mean(-1)
    figure = Figure(
        figsize=(1.2 * len(shown) + 1.1, 1.3 * (len(edits) + 1)), layout="constrained"
    )
    axes = figure.subplots(len(edits) + 1, len(shown))
    axes[0][0].set_ylabel("the clip", fontsize=7)
    for ax, t in zip(axes[0], shown, strict=True):
        ax.imshow(frames[t])
        ax.set_title(f"frame {t}", fontsize=8)
    for (name, gates), row in zip(edits.items(), axes[1:], strict=True):
        with st_abn.override(**gates):
            found = st_abn.explain(volume)
        values = found.spatial_gates[0] * found.temporal_gates[0, :, None, None]
        answer = found.logits.softmax(1)[0, labels[0]].tolist()
        text = "\n".join(
            f"{label} {share:.2f}" for label, share in zip(names, answer, strict=True)
        )
        row[0].set_ylabel(f"{name}\n{text}", fontsize=6.5)
        for ax, t in zip(row, shown, strict=True):
            ax.imshow(0.25 * gray[t], cmap="gray", vmin=0, vmax=255)
            ax.imshow(values[t], cmap="inferno", vmin=0, vmax=1, alpha=0.8)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    save_smooth(figure, "st_abn_edits.webp")


def panels() -> None:
    """Draw summary.webp, compare.webp, slices.webp and player.webp: one clip and its explanations."""
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    planted = PlantedClips(seed=12, n=20, task="pattern")
    clip, label, truth = planted[16:17]
    frames, windows = (
        Frames(planted.frames(16), layout=clf.layout),
        truth[0].flatten(1).any(1),
    )
    answer = clf.predict(clip, k=3)
    parts = STAA(clf).attribute_maps(clip, target=label)
    gradients = (
        InputXGradient(clf)
        .attribute(clip.clone().requires_grad_(), target=label)
        .detach()
    )
    hidden = VideoOcclusion(clf).attribute(
        clip, sliding_window_shapes=(4, 12, 12), strides=(2, 6, 6), target=label
    )

    figure, _ = show_summary(
        parts, frames, style=FOR, predictions=answer, truth=windows, use_pyplot=False
    )
    save_smooth(figure, "summary.webp")
    maps = {"STAA": parts, "InputXGradient": gradients, "VideoOcclusion": hidden}
    figure, _ = compare_methods(
        {"planted": truth, **maps}, frames, style=FOR, use_pyplot=False
    )
    save_smooth(figure, "compare.webp")
    figure, _ = show_slices(parts, frames, style=FOR, use_pyplot=False)
    save_smooth(figure, "slices.webp")
    classes()

    chromium = shutil.which("chromium")
    if chromium is None:
        print("player.webp stays as it is: no chromium to take it with")
        return
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder) / "player.html", Path(folder) / "player.png"
        title = f"Why '{answer[0][0]}' ({answer[0][1]:.0%})?"
        to_html(
            maps,
            frames,
            page,
            style=FOR,
            predictions=answer,
            truth=windows,
            title=title,
        )
        switches = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={folder}/profile",
        ]
        # Frames are decoded after the page is loaded. A slow machine would otherwise take a picture of an empty page.
        switches += [
            "--window-size=900,900",
            "--hide-scrollbars",
            "--virtual-time-budget=20000",
            f"--screenshot={shot}",
        ]
        subprocess.run(
            [chromium, *switches, page.as_uri()], check=True, capture_output=True
        )
        with Image.open(shot) as picture:
            picture.save(IMAGES / "player.webp", quality=85, method=6)


def classes() -> None:
    """Draw classes.webp: a clip with evidence of two classes, and the evidence for each against the other."""
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    planted = PlantedClips(31, 8, "pattern", scene=SceneOptions(two_classes=True))
    clip, labels, truth = planted[5:6]
    maps, windows = {}, {"sliding_window_shapes": (4, 12, 12), "strides": (4, 6, 6)}
    for other, this in (labels[0].tolist(), labels[0].tolist()[::-1]):
        method = VideoOcclusion(clf.versus(other))
        maps[planted.labels[this]] = method.attribute_maps(clip, target=this, **windows)
    figure, _ = show_summary(
        maps,
        Frames(planted.frames(5), layout=clf.layout),
        style=FOR,
        predictions=clf.predict(clip, k=3),
        truth=truth[0].any(0).flatten(1).any(1),
        title=" or ".join(maps),
        use_pyplot=False,
    )
    save_smooth(figure, "classes.webp")


def save_smooth(figure: Figure, name: str) -> None:
    """Save a picture that keeps all colors of its color bar."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").save(IMAGES / name, quality=85, method=6)


def save_small(figure: Figure, name: str) -> None:
    """Save a picture with 256 colors, which has a third of the bytes."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110)
    few = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(IMAGES / name, optimize=True)


def colored(frames: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return frames ``(T, H, W, 3)`` in gray, four times as large, with the color and borders of each region."""
    hues = [
        colorsys.hls_to_rgb(i * 0.194 % 1, (0.5, 0.65, 0.38)[i % 3], 0.9)
        for i in range(ids.max() + 1)
    ]
    gray = (
        median(frames.mean(-1), np.ones((1, 3, 3)))[..., None] / 255
    )  # without the noise, which takes most bytes
    picture = (0.55 * gray + 0.45 * np.array(hues)[ids]).repeat(4, 1).repeat(4, 2)
    large = ids.repeat(4, 1).repeat(4, 2)
    edge = np.zeros(large.shape, bool)
    edge[:, 1:] |= large[:, 1:] != large[:, :-1]
    edge[:, :, 1:] |= large[:, :, 1:] != large[:, :, :-1]
    picture[edge] = 0.1
    return picture


if __name__ == "__main__":
    torch.set_num_threads(1)
    staa()
    masks()
    perturbation()
    branch_edits()
    panels()
    gallery.main()
    real_video.main()
    package_graph.main()
