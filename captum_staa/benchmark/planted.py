"""Synthetic clips with planted evidence among rivals, so that the correct explanation is known."""

from __future__ import annotations

import hashlib
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_staa import io
from captum_staa._utils.checks import check_count
from captum_staa._utils.files import FilePath
from captum_staa.benchmark.scenes import GRAY, LABELS, Draw, Scene, SceneOptions, draw_scene, recipe_of

Footage = Tensor | np.ndarray[Any, Any]
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".gif")
MOST_FRAMES = 256  # of each video of a folder


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

    Each clip has four moving objects of the same size, contrast and lifetime. One of them shows the evidence in some
    frames (its window). All other objects are rivals, and outside its window this object is a rival too. Rivals show
    twins of the evidence, which differ from it only in what the model was trained to recognize. Contrast, color,
    gradients, frame differences, optical flow and the spectrum are alike, so only the model can distinguish them.

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
        scene: :class:`SceneOptions`, the length and size of clips and the properties of their objects. None takes
            its defaults.
        background: real footage ``(F, H', W', 3)`` uint8, or a list of such arrays, or a folder of video files, of
            which at most 256 frames each are read. Each clip takes a random run of frames of one of them, and a random
            square of these. None draws a smooth, still texture. With ``SceneOptions(blend=True)``, the objects have
            the brightness and the blur of the footage.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or the evidence does not fit into the clip.
    """

    def __init__(
        self,
        seed: int,
        n: int,
        task: str = "pattern",
        *,
        scene: SceneOptions | None = None,
        background: Footage | Sequence[Footage] | FilePath | None = None,
    ) -> None:
        check_count("seed", seed, least=-(2**63), most=2**63 - 1)
        check_count("n", n)
        self._recipe = recipe_of(task, SceneOptions() if scene is None else scene)
        self.seed, self.n, self.task, self.scene = int(seed), int(n), task, self._recipe.options
        self.labels: tuple[str, ...] = LABELS[task]
        self._footage = [] if background is None else _checked_footage(background, self.scene.num_frames)

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
        labels = torch.tensor([self._labels(scene) for scene in scenes])
        truth = torch.stack([self._truth(scene) for scene in scenes])
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
            truths of the two classes first. No batch axis for an int index. An object that shows evidence in its window
            is left out in all other frames.
        """
        return self._stack(index, [self._objects(scene) for scene in self._scenes(index)])

    def with_masks(self, index: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return clip, label, truth, rivals and objects of one clip, which is drawn only once."""
        (scene,) = self._scenes(operator.index(index))
        clip = _to_clip(_round(scene.frames + scene.noise))
        label = torch.tensor(self._labels(scene))
        return clip, label, self._truth(scene), scene.rivals, self._objects(scene)

    def frames(self, index: int) -> np.ndarray:
        """Return the frames of clip ``index``: ``(T, H, W, 3)`` uint8. The clip is ``(frames / 255 - 0.5) / 0.5``."""
        (scene,) = self._scenes(operator.index(index))
        return _round(scene.frames + scene.noise).numpy()

    def without_evidence(self, index: int | slice) -> Tensor:
        """Return the same clips with the background in place of the evidence: :meth:`without` of the truth."""
        return self._replaced(index, lambda scene: scene.truth)

    def without_rivals(self, index: int | slice) -> Tensor:
        """Return the same clips with the background in place of all rivals: :meth:`without` of the rivals."""
        return self._replaced(index, lambda scene: scene.rivals)

    def without(self, index: int, masks: Tensor) -> Tensor:
        """Return a clip several times, each time with the background in place of other pixels.

        Args:
            index: of the clip.
            masks: bool ``(M, T, H, W)``, True where the background is shown.

        Returns:
            ``(M, T, C, H, W)`` float32, equal to the clip outside the masks.
        """
        (scene,) = self._scenes(operator.index(index))
        return _to_clip(torch.stack([_without(scene, mask) for mask in masks]))

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
        recipe = asdict(self._recipe)
        return {"seed": self.seed, "n": self.n, **recipe.pop("options"), **recipe, "background": footage}

    def _labels(self, scene: Scene) -> int | tuple[int, ...]:
        return scene.classes if self.scene.two_classes else scene.classes[0]

    def _truth(self, scene: Scene) -> Tensor:
        return scene.where(scene.objects.evidence)[:2] if self.scene.two_classes else scene.truth

    def _objects(self, scene: Scene) -> Tensor:
        truths = self._truth(scene) if self.scene.two_classes else scene.truth[None]
        return torch.cat([truths, scene.where(scene.objects.twins)[self._recipe.evidence_objects :]])

    def _replaced(self, index: int | slice, mask_of: Callable[[Scene], Tensor]) -> Tensor:
        levels = [_without(scene, mask_of(scene)) for scene in self._scenes(index)]
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
        return draw_scene(self._recipe, (label, other) if self.scene.two_classes else (label,), draw, footage)


def _round(levels: Tensor) -> Tensor:
    return levels.round().clamp_(0, 255).to(torch.uint8)


def _without(scene: Scene, mask: Tensor) -> Tensor:
    """Return the uint8 frames of a scene with the background where the mask ``(T, H, W)`` is True."""
    return _round(scene.frames.where(~mask[..., None], scene.background) + scene.noise)


def _to_clip(frames: Tensor) -> Tensor:
    """uint8 (..., T, H, W, 3) to float32 (..., T, 3, H, W), exactly ``(frames / 255 - 0.5) / 0.5``."""
    return frames.movedim(-1, -3).contiguous().float().div_(255).sub_(0.5).div_(0.5)


def _read_folder(folder: Path) -> list[np.ndarray[Any, Any]]:
    """Return the middle frames of each video in a folder, in the order of their names."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in VIDEOS) if folder.is_dir() else []
    if not paths:
        what = "no video" if folder.is_dir() else "no such folder"
        raise ValueError(
            f"background must be a folder with video files ({', '.join(VIDEOS)}), got {what} in {folder}. Pass another "
            f"folder, or frames."
        )
    read = []
    for path in paths:
        frames = io.read_video(path).frames
        start = max(0, len(frames) - MOST_FRAMES) // 2
        read.append(frames[start : start + MOST_FRAMES].copy())
    return read


def _checked_footage(background: Footage | Sequence[Footage] | FilePath, num_frames: int) -> list[Tensor]:
    if isinstance(background, (str, os.PathLike)):
        background = _read_folder(Path(background))
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
        if frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < num_frames or 0 in frames.shape:
            raise ValueError(
                f"background must be (F, H, W, 3) with at least num_frames={num_frames} frames, got shape "
                f"{tuple(frames.shape)}. Pass longer footage."
            )
        footage.append(frames)
    return footage
