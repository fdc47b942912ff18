"""Draw a result as a picture: the map over its frame, the prediction, and the timeline of the last frames."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from captum_staa.stream.run import FrameResult
from captum_staa.visualization import Frames, Overlay, Style
from captum_staa.visualization.placement import reduced
from captum_staa.visualization.saliency import Maps, Saliency, saliency

EDGE = 360  # maximum pixels of the shorter edge of a picture; larger pictures would take longer than the model
STRIP = 44  # height in pixels of the strip below the picture
PAST = 96  # frames of the timeline
BAR, LATEST, TEXT, GROUND = (150, 110, 60), (255, 190, 80), (235, 235, 235), (24, 24, 24)
STYLE = Style(sign="positive")  # evidence for the class
LEAST = 4.0  # the strongest color is at least this many even shares of attention


class Painter:
    """Draw results one after the other on a common color scale.

    Future frames are unknown, so the scale is that of the strongest frame so far. It grows and never falls. Evenly
    distributed attention is not evidence, so the strongest color is at least four even shares.

    Example:
        >>> import torch
        >>> result = FrameResult(0, np.zeros((48, 64, 3), np.uint8), 1, ["walking"], torch.ones(1), torch.rand(6, 6),
        ...                      1.0, (0, 8, 48, 48), latency=0.5, latency_frames=12)
        >>> Painter()(result, result.frame).shape  # including the strip with the prediction and the timeline
        (92, 64, 3)

    Args:
        shares: whether maps are shares of attention.
    """

    def __init__(self, shares: bool = True) -> None:
        self.scale = 0.0
        self._shares, self._past = shares, deque([math.nan] * PAST, maxlen=PAST)  # type: bool, deque[float]
        self._font = ImageFont.load_default(14)

    def __call__(self, result: FrameResult, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Draw one picture.

        Args:
            result: the result to draw.
            frame: ``(H, W, 3)`` uint8, the frame of the result; if it was dropped, an earlier frame.

        Returns:
            ``(h + 44, w, 3)`` uint8; the shorter edge of the ``(h, w)`` above the strip has at most 360 pixels.
        """
        self._past.append(result.temporal)
        size, frame = frame.shape, reduced(frame, EDGE)
        gray = (frame @ np.array([0.299, 0.587, 0.114]) / 2).round().astype(np.uint8)
        picture = gray[..., None].repeat(3, axis=-1)  # dark gray outside the explained part
        if result.joint is not None:
            scaled = saliency(Maps.of(result.joint[None]).joint, STYLE.sign)
            even = LEAST / result.joint.numel() if self._shares else 0.0
            self.scale = max(self.scale, scaled.scale, even)
            values = (result.joint.numpy() / (self.scale or 1)).clip(0, 1)[None]
            down, right = frame.shape[0] / size[0], frame.shape[1] / size[1]
            top, left, height, width = result.crop
            crop = (top * down, left * right, height * down, width * right)
            shown = Saliency(values.astype(np.float32), self.scale)
            picture = Overlay(Frames(frame[None], crop), shown, STYLE).picture(0)
        return np.concatenate([picture, self._strip(result, frame.shape[1])])

    def _strip(self, result: FrameResult, width: int) -> NDArray[np.uint8]:
        """Draw the strip with the prediction and the timeline."""
        strip = Image.new("RGB", (width, STRIP), GROUND)
        draw = ImageDraw.Draw(strip)
        middle = width // 2
        top = max((value for value in self._past if not math.isnan(value)), default=0.0) or 1.0
        for at, value in enumerate(self._past):
            if value > 0:  # no bar for a frame without an explanation, or with evidence against the class
                x = middle + at * (width - middle) // PAST
                end = max(middle + (at + 1) * (width - middle) // PAST - 2, x)
                y = STRIP - 3 - round(value / top * (STRIP - 8))
                draw.rectangle((x, y, end, STRIP - 3), fill=LATEST if at == PAST - 1 else BAR)
        answer = "  ".join(f"{label} {probability:.0%}" for label, probability in result.top(1)) or "not explained"
        draw.rectangle((0, 0, middle - 4, STRIP), fill=GROUND)
        draw.text((6, 4), answer, fill=TEXT, font=self._font)
        draw.text((6, 23), f"frame {result.index}", fill=BAR, font=self._font)
        return np.asarray(strip)
