"""Synthetic clips with planted evidence among rivals, so that the correct explanation is known."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa._utils.checks import check_choice, check_count, is_integer, is_number
from captum_staa.benchmark.scenes import (
    GRAY,
    LABELS,
    PHASES,
    Draw,
    Scene,
    SceneOptions,
    cells_per_side,
    cuts,
    draw_scene,
    free_pixels,
)

RIVALS = {"pattern": 3, "motion": 3, "order": 2}  # four objects in all

Footage = Tensor | np.ndarray[Any, Any]


class PlantedClips(Sequence[tuple[Tensor, Tensor, Tensor]]):
    """Small synthetic clips with a known class and known evidence for it in space and time.

    Example:
        >>> planted = PlantedClips(seed=0, n=8, task="motion")
        >>> clips, labels, truth = planted[:4]
        >>> clips.shape, labels.shape, truth.shape
        (torch.Size([4, 16, 3, 48, 48]), torch.Size([4]), torch.Size([4, 16, 48, 48]))
        >>> planted.labels
        ('left', 'right')
        >>> rivals = planted.rivals(slice(4))  # objects that look alike but do not determine the class
        >>> rivals.shape, bool((rivals & truth).any())
        (torch.Size([4, 16, 48, 48]), False)

    Each clip has four moving objects of the same size, contrast and lifetime. One of them shows the evidence for some
    frames (its window). The other objects are rivals, and so is that object outside its window: they show twins of the
    evidence, which differ from it only in what the model was trained to recognize. So only the model can distinguish
    evidence from rivals: contrast, color, gradients, frame differences, optical flow and the spectrum are alike.

    - ``pattern``: a patch whose bright half is on the right or at the bottom, or whose bright quarters lie on the main
      diagonal. Twins are the mirror images: bright on the left, at the top, on the other diagonal. Every object changes
      its texture twice.
    - ``motion``: a plain patch moves to the left or right. Twins move up or down at the same speeds. Every object jumps
      twice, and moves in another direction after a jump. The class cannot be found from single frames, or from an
      unordered set of frames.
    - ``order``: one patch is bright on the right for a while, another at the bottom; the class is their order.
      Both are evidence. Twins are bright on the left or at the top. Every object shows a texture twice, and is plain
      at other times.

    Clip ``i`` depends on the arguments, ``seed`` and ``i`` only: not on ``n``, on the order of reading, or on the
    global random generators, which are not used. Classes are balanced within every ``len(labels)`` clips.

    Args:
        seed: an int between -2^63 and 2^63 - 1.
        n: number of clips, at least 1.
        task: ``"pattern"``, ``"motion"`` or ``"order"``.
        num_frames: T, frames per clip.
        image_size: H and W, in pixels.
        noise: standard deviation of the pixel noise, as a fraction of the range 0..255.
        contrast: distance of bright and dark from an object's mean color (``motion``: of an object from mid gray), as
            a fraction of the range 0..255.
        patch_size: side of an object, in pixels, an even number.
        window: fewest and most frames that show evidence (``order``: each of the two), both included. None chooses it
            from ``num_frames``; for 16 frames, it is (4, 7), or (3, 4) for ``order``.
        speed: slowest and fastest movement in ``motion``, in pixels per frame. None takes the highest speed that
            keeps the object in its part of the frame, and three quarters of it: (1.5, 2.0) by default.
        rivals: number of objects that show twins only. None takes 3, or 2 for ``order``: four objects in all.
        two_classes: whether each clip contains evidence of two classes, in two objects. Then labels are ``(B, 2)`` and
            truth is ``(B, 2, T, H, W)``. Not for ``order``, whose classes share their evidence.
        background: real footage ``(F, H', W', 3)`` uint8, or a list of such arrays. Each clip takes a random run of
            frames and a random square of them. None draws a smooth, still texture.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the evidence does not fit into the clip.
    """

    def __init__(
        self,
        seed: int,
        n: int,
        task: str = "pattern",
        num_frames: int = 16,
        image_size: int = 48,
        *,
        noise: float = 0.06,
        contrast: float = 0.3,
        patch_size: int = 12,
        window: tuple[int, int] | None = None,
        speed: tuple[float, float] | None = None,
        rivals: int | None = None,
        two_classes: bool = False,
        background: Footage | Sequence[Footage] | None = None,
    ) -> None:
        check_choice("task", task, tuple(LABELS))
        check_count("seed", seed, least=-(2**63), most=2**63 - 1)
        rivals = RIVALS[task] if rivals is None else rivals
        counts = {"n": n, "num_frames": num_frames, "image_size": image_size, "patch_size": patch_size}
        for name, count in counts.items():
            check_count(name, count)
        check_count("rivals", rivals, least=0)
        options = SceneOptions(
            task=task,
            num_frames=int(num_frames),
            image_size=int(image_size),
            patch_size=int(patch_size),
            window=_pair("window", _window(task, int(num_frames)) if window is None else window),
            speed=(0.0, 0.0),
            noise=noise,
            contrast=contrast,
            rivals=int(rivals),
            two_classes=bool(two_classes),
        )
        _check(options)
        if task == "motion":
            options = replace(options, speed=_speed(speed, options))
        self.seed, self.n, self.task = int(seed), int(n), task
        self.labels: tuple[str, ...] = LABELS[task]
        self.options = options
        self._evidence_objects = 2 if task == "order" or two_classes else 1
        self._footage = [] if background is None else _checked_footage(background, options)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return clips, labels and truth.

        Returns:
            clips: ``(B, T, C, H, W)`` float32 in [-1, 1]; labels: ``(B,)`` int64; truth: ``(B, T, H, W)`` bool, True
            where evidence is visible. With ``two_classes``, labels are ``(B, 2)`` and truth is ``(B, 2, T, H, W)``. An
            int index returns the same without the batch axis.
        """
        scenes = self._scenes(index)
        clips = _to_clip(torch.stack([_round(scene.frames + scene.noise) for scene in scenes]))
        if self.options.two_classes:
            labels = torch.tensor([scene.classes for scene in scenes])
            truth = torch.stack([scene.where(scene.objects.evidence)[:2] for scene in scenes])
        else:
            labels = torch.tensor([scene.classes[0] for scene in scenes])
            truth = torch.stack([scene.truth for scene in scenes])
        return (clips, labels, truth) if isinstance(index, slice) else (clips[0], labels[0], truth[0])

    def rivals(self, index: int | slice) -> Tensor:
        """Return where objects are visible that look like evidence and are not.

        Returns:
            ``(B, T, H, W)`` bool; no batch axis for an int index. Together with the truth it covers all objects.
        """
        return self._stack(index, [scene.rivals for scene in self._scenes(index)])

    def objects(self, index: int | slice) -> Tensor:
        """Return the pixels of the evidence and of each object without evidence, for :func:`metrics.object_pointing`.

        Returns:
            ``(B, 1 + rivals, T, H, W)`` bool, the truth first; with ``two_classes`` ``(B, 2 + rivals, T, H, W)``, the
            truth of either class first. No batch axis for an int index. An object that shows evidence in its window
            is left out in all other frames.
        """
        objects = []
        for scene in self._scenes(index):
            truths = scene.where(scene.objects.evidence)[:2] if self.options.two_classes else scene.truth[None]
            objects.append(torch.cat([truths, scene.where(scene.objects.twins)[self._evidence_objects :]]))
        return self._stack(index, objects)

    def frames(self, index: int) -> np.ndarray:
        """Return the frames of clip ``index``: ``(T, H, W, 3)`` uint8. The clip is ``(frames / 255 - 0.5) / 0.5``."""
        (scene,) = self._scenes(operator.index(index))
        return _round(scene.frames + scene.noise).numpy()

    def without_evidence(self, index: int | slice) -> Tensor:
        """Return the same clips with the background in place of the evidence.

        Returns:
            ``(B, T, C, H, W)`` float32, equal to the clips outside the truth; no batch axis for an int index.
        """
        return self._replaced(index, lambda scene: scene.truth)

    def without_rivals(self, index: int | slice) -> Tensor:
        """Return the same clips with the background in place of all rivals.

        Returns:
            ``(B, T, C, H, W)`` float32, equal to the clips outside the rivals; no batch axis for an int index.
        """
        return self._replaced(index, lambda scene: scene.rivals)

    def only_evidence(self, index: int | slice) -> Tensor:
        """Return the same clips with mid gray (128) everywhere outside the truth.

        Returns:
            ``(B, T, C, H, W)`` float32, equal to the clips inside the truth; no batch axis for an int index.
        """
        gray = torch.tensor(GRAY, dtype=torch.uint8)
        levels = [_round(s.frames + s.noise).where(s.truth[..., None], gray) for s in self._scenes(index)]
        return self._stack(index, list(_to_clip(torch.stack(levels))))

    def described(self) -> dict[str, Any]:
        """Return the settings that determine the clips, as plain values for the record of a comparison."""
        footage = [hashlib.sha256(part.numpy().tobytes()).hexdigest()[:16] for part in self._footage]
        return {"seed": self.seed, "n": self.n, **asdict(self.options), "background": footage}

    def _replaced(self, index: int | slice, mask_of: Callable[[Scene], Tensor]) -> Tensor:
        levels = [
            _round(scene.frames.where(~mask_of(scene)[..., None], scene.background) + scene.noise)
            for scene in self._scenes(index)
        ]
        return self._stack(index, list(_to_clip(torch.stack(levels))))

    @staticmethod
    def _stack(index: int | slice, items: list[Tensor]) -> Tensor:
        return torch.stack(items) if isinstance(index, slice) else items[0]

    def _scenes(self, index: int | slice) -> list[Scene]:
        if isinstance(index, slice):
            if not (positions := range(self.n)[index]):
                raise ValueError(
                    f"index must be a slice that selects at least one of {self.n} clips, got {index}. Widen the slice."
                )
            return [self._scene(i) for i in positions]
        position = operator.index(index)
        if not -self.n <= position < self.n:
            raise IndexError(f"index must be from {-self.n} to {self.n - 1} for {self.n} clips, got {index}")
        return [self._scene(position % self.n)]

    def _scene(self, i: int) -> Scene:
        count = len(self.labels)
        order = Draw(self.seed, i // count, 1).permutation(count)  # each class once in every `count` clips
        draw = Draw(self.seed, i, 0)
        label = int(order[i % count])
        other = (label + draw.integer(1, count - 1)) % count
        footage = self._footage[draw.integer(0, len(self._footage) - 1)] if self._footage else None
        return draw_scene(self.options, (label, other) if self.options.two_classes else (label,), draw, footage)


def _round(levels: Tensor) -> Tensor:
    return levels.round().clamp_(0, 255).to(torch.uint8)


def _to_clip(frames: Tensor) -> Tensor:
    """uint8 (..., T, H, W, 3) to float32 (..., T, 3, H, W), exactly ``(frames / 255 - 0.5) / 0.5``."""
    return frames.movedim(-1, -3).contiguous().float().div_(255).sub_(0.5).div_(0.5)


def _pair(name: str, pair: Any) -> tuple[int, int]:
    """Return a checked pair of integers, the smaller one first."""
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_integer, pair))):
        raise TypeError(f"{name} must be two ints (fewest, most), got {pair!r}. Pass {name}=(5, 7), for example.")
    if not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"{name} must be (fewest, most) with 1 <= fewest <= most, got {pair}. Swap or raise them.")
    return int(pair[0]), int(pair[1])


def _window(task: str, num_frames: int) -> tuple[int, int]:
    """Return the default fewest and most frames of a phase or event for clips of any length."""
    if task == "order":
        return max(num_frames * 3 // 16, 1), max(num_frames // 4, 1)
    return max(num_frames // 4, 1), max(-(-num_frames // 3), num_frames // 2 - 1)


def _speed(speed: object, options: SceneOptions) -> tuple[float, float]:
    """Return the checked speed: a path must fit into the part of the frame that belongs to the object."""
    free = free_pixels(options, options.rivals + (2 if options.two_classes else 1))
    fastest = free / (options.window[1] - 1)
    if speed is None:
        speed = (0.75 * fastest, fastest)
    if not (isinstance(speed, (tuple, list)) and len(speed) == 2 and all(map(is_number, speed))):
        raise TypeError(
            f"speed must be two numbers (slowest, fastest), got {speed!r}. Pass speed=(1.5, 2.0), for example."
        )
    if not 0 < speed[0] <= speed[1] <= fastest:
        raise ValueError(
            f"speed must be (slowest, fastest) with 0 < slowest <= fastest <= {fastest:g} pixels per frame, so that "
            f"{options.window[1]} frames fit into the {free} pixels that an object can move, got {speed}. Lower it, or "
            f"raise image_size."
        )
    return float(speed[0]), float(speed[1])


def _check(options: SceneOptions) -> None:
    """Raise unless the evidence fits into the clip."""
    for name in ("noise", "contrast"):
        if not is_number(value := getattr(options, name)):
            raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    task, frames, window = options.task, options.num_frames, options.window
    objects = options.rivals + (2 if task == "order" or options.two_classes else 1)
    rows = cells_per_side(objects)
    if task == "order":
        fits, needed = frames > 2 * window[1], f"at least {2 * window[1] + 1} frames"
    else:
        fits = bool(cuts(frames, PHASES, window))
        needed = f"{PHASES * window[0]} to {PHASES * window[1]} frames"
    checks = [
        (
            0 <= options.noise <= 1,
            f"noise must be a fraction of the range 0..255, got {options.noise}. Divide gray levels by 255.",
        ),
        (
            0 < options.contrast <= 0.5,
            f"contrast must be above 0 and at most 0.5, got {options.contrast}. Divide gray levels by 255.",
        ),
        (
            options.patch_size % 2 == 0,
            f"patch_size must be even, as an object has four quarters, got {options.patch_size}. Add 1.",
        ),
        (
            options.image_size >= rows * options.patch_size,
            f"image_size must be at least {rows} times patch_size={options.patch_size} for {objects} objects, got "
            f"{options.image_size}. Raise it, or lower patch_size or rivals.",
        ),
        (
            fits,
            f"num_frames must fit window={window}, which takes {needed} for task={task!r}, got {frames}. "
            f"Leave window out, or change either.",
        ),
        (
            task != "motion" or window[0] >= 2,
            f"window must begin at 2 frames or more for task='motion', or nothing moves, got {window}. Raise it.",
        ),
        (
            task != "order" or not options.two_classes,
            "two_classes must be False for task='order', whose classes share their evidence, got True. "
            "Use 'pattern' or 'motion'.",
        ),
    ]
    for valid, message in checks:
        if not valid:
            raise ValueError(message)


def _checked_footage(background: Footage | Sequence[Footage], options: SceneOptions) -> list[Tensor]:
    parts = list(background) if isinstance(background, (list, tuple)) else [background]
    if not parts:
        raise ValueError(
            "background must hold at least one array of frames, got an empty list. Leave background out to draw one."
        )
    footage = []
    for part in parts:
        if not isinstance(part, (Tensor, np.ndarray)):
            raise TypeError(f"background must be a uint8 tensor or array (F, H, W, 3), got {type(part).__name__}")
        frames = torch.as_tensor(part)
        if frames.dtype != torch.uint8:
            raise TypeError(f"background must be uint8 (F, H, W, 3), got {frames.dtype}. Pass gray levels 0..255.")
        if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < options.num_frames or 0 in frames.shape:
            raise ValueError(
                f"background must be (F, H, W, 3) with at least num_frames={options.num_frames} frames, got shape "
                f"{tuple(frames.shape)}. Pass longer footage."
            )
        footage.append(frames)
    return footage
