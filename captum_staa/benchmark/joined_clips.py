"""Clips of different classes joined in time or in space, which gives a known truth for any labeled data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from captum_staa._utils.checks import check_choice, check_count
from captum_staa.benchmark.clips import Sample, checked, described, source_of
from captum_staa.benchmark.scenes import generator_of
from captum_staa.models import VideoClassifier

Arrangement = Literal["time", "grid"]
RIVALS: dict[Arrangement, int] = {"time": 1, "grid": 3}  # how many clips of other classes an item holds


class JoinedClips(Sequence[tuple[Tensor, int, Tensor]]):
    """Clips of which one part shows the target's class and the rest shows other classes.

    Example:
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> pairs = JoinedClips(PlantedClips(seed=0, n=8), clf)
        >>> clip, target, truth = pairs[0]
        >>> clip.shape, len(pairs)
        (torch.Size([1, 16, 3, 48, 48]), 8)
        >>> sorted({tuple(map(int, pairs[i][2][0, :, 0, 0])) for i in range(8)})  # frames of the target's class
        [(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)]
        >>> grids = JoinedClips(PlantedClips(seed=0, n=8), clf, arrangement="grid")
        >>> grids[0][0].shape, grids[0][2].float().mean().item(), grids.rivals(0).float().mean().item()
        (torch.Size([1, 16, 3, 48, 48]), 0.25, 0.75)

    ``arrangement="time"`` joins two clips, one after the other. A model takes a fixed number of frames, so each clip
    gives half of them: the middle frames of equal parts. The truth is all pixels of the target's frames.
    ``arrangement="grid"`` shows four clips at once, in a grid of 2 x 2. A model takes a fixed size, so each clip is
    reduced to half its height and half its width by averaging 2 x 2 pixels. The truth is the target's quarter in all
    frames. The other clips, and the places of all clips, are drawn at random. If fewer than three clips are of other
    classes, a grid shows some of them twice.

    An item is ``(clip, target, truth)``: the clip in the classifier's layout with a batch axis of 1, the target as an
    int, and bool ``(1, T, H, W)``. Items are made when they are read. Item ``i`` depends on ``seed`` and ``i`` only.

    Args:
        clips: a sequence as for :func:`captum_staa.benchmark.compare`, with clips of at least two classes. For
            ``"time"``, each clip has at least two frames. For ``"grid"``, all clips have the same size, and their
            height and width are even.
        classifier: the model that the clips are for.
        n: number of items; None makes one of each clip. The target of item ``i`` is that of clip ``i % len(clips)``.
        seed: integer from -2^63 to 2^63 - 1.
        arrangement: ``"time"`` or ``"grid"``.

    Raises:
        ValueError: there are no clips, or ``n``, ``seed`` or ``arrangement`` is out of range. When an item is read:
            all clips are of one class, or their sizes differ or cannot be halved.
        TypeError: ``clips`` is not a sequence, or ``n`` or ``seed`` is not an integer.

    Reference:
        In time: Adel Bargal et al., "Excitation Backprop for RNNs", CVPR (2018). In a grid: Böhle, Fritz and Schiele,
        "Convolutional Dynamic Alignment Networks for Interpretable Classifications", CVPR (2021), for images.
    """

    def __init__(
        self,
        clips: Iterable[Any],
        classifier: VideoClassifier,
        n: int | None = None,
        *,
        seed: int = 0,
        arrangement: Arrangement = "time",
    ) -> None:
        check_choice("arrangement", arrangement, tuple(RIVALS))
        source: Any = source_of(clips, classifier)
        if not hasattr(source, "__getitem__"):
            raise TypeError(
                f"clips must be a sequence, because clips of other classes are looked up by index, got "
                f"{type(clips).__name__}. Pass list(clips)."
            )
        if n is not None:
            check_count("n", n)
        check_count("seed", seed, least=-(2**63), most=2**63 - 1)
        self._source, self._classifier = source, classifier
        self._n, self._seed = len(source) if n is None else int(n), int(seed)
        self._arrangement: Arrangement = arrangement
        self.names = [f"joined-{index:05d}" for index in range(self._n)]

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:  # type: ignore[override]
        clip, target, classes = self._joined(index)
        return clip, target, classes == target

    def rivals(self, index: int) -> Tensor:
        """Return where the clips of other classes are: the complement of the truth.

        Args:
            index: index of the item.

        Returns:
            bool ``(1, T, H, W)``.
        """
        return ~self[index][2]

    def classes(self, index: int) -> Tensor:
        """Return the class of the clip at each voxel.

        Example:
            >>> from captum_staa.benchmark import PlantedClips
            >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
            >>> pairs = JoinedClips(PlantedClips(seed=0, n=8), clf)
            >>> classes, (_, target, truth) = pairs.classes(0), pairs[0]
            >>> bool(((classes == target) == truth).all()), len(classes.unique())
            (True, 2)

        Args:
            index: of the item.

        Returns:
            int64 ``(1, T, H, W)``.
        """
        return self._joined(index)[2]

    def described(self) -> dict[str, Any]:
        """Return the settings that determine the clips, for the record of a run."""
        settings = {"n": self._n, "seed": self._seed, "arrangement": self._arrangement}
        return {"joined": {"of": described(self._source), **settings}}

    def _joined(self, index: int) -> tuple[Tensor, int, Tensor]:
        """Return the clip, the target, and the class at each voxel, int64 ``(1, T, H, W)``."""
        at = range(self._n)[index]
        draw = generator_of(self._seed, at)
        first = checked(self._source[at % len(self._source)], self._classifier)
        samples = [first, *self._others(first, RIVALS[self._arrangement], draw)]
        clip, classes = self._in_time(samples, draw) if self._arrangement == "time" else self._in_grid(samples, draw)
        return clip.contiguous(), first.target, classes

    def _others(self, first: Sample, count: int, draw: torch.Generator) -> list[Sample]:
        """Return clips of other classes in a random order, repeated if there are too few."""
        others: list[Sample] = []
        for at in torch.randperm(len(self._source), generator=draw).tolist():
            other = checked(self._source[at], self._classifier)
            if other.target != first.target:
                others.append(other)
            if len(others) == count:
                return others
        if not others:
            raise ValueError(
                f"clips must be of at least two classes, got {len(self._source)} clips that are all of class "
                f"{first.target}. Add clips of another class."
            )
        return [others[i % len(others)] for i in range(count)]

    def _in_time(self, samples: list[Sample], draw: torch.Generator) -> tuple[Tensor, Tensor]:
        layout = self._classifier.layout
        frames, height, width = layout.extent(samples[0].clip)
        if frames < 2:
            raise ValueError(
                f"clips must have at least 2 frames to be joined in time, got a clip of shape "
                f"{tuple(samples[0].clip.shape)} in layout {layout.axes}. Use arrangement='grid'."
            )
        self._check_sizes(samples, "CHW")
        halves = [(samples[0], frames // 2), (samples[1], frames - frames // 2)]
        if int(torch.randint(2, (), generator=draw)):
            halves.reverse()
        clip = torch.cat([_thinned(sample.clip, layout.time, count) for sample, count in halves], layout.time)
        when = torch.cat([torch.full((count,), sample.target) for sample, count in halves])  # (T,)
        return clip, when[None, :, None, None].expand(1, frames, height, width).contiguous()

    def _in_grid(self, samples: list[Sample], draw: torch.Generator) -> tuple[Tensor, Tensor]:
        layout = self._classifier.layout
        frames, height, width = layout.extent(samples[0].clip)
        if height % 2 or width % 2:
            raise ValueError(
                f"the height and width of clips must be even to be halved in a grid, got {height} x {width} in a clip "
                f"of shape {tuple(samples[0].clip.shape)} in layout {layout.axes}. Crop or resize the clips, or use "
                f"arrangement='time'."
            )
        self._check_sizes(samples, "CTHW")
        quarters = [samples[i] for i in torch.randperm(4, generator=draw).tolist()]
        small = [_halved(layout.to_working(sample.clip)) for sample in quarters]  # (1, T, C, H / 2, W / 2) each
        targets = [torch.full((1, frames, height // 2, width // 2), sample.target) for sample in quarters]
        return layout.from_working(_grid(small)), _grid(targets)

    def _check_sizes(self, samples: list[Sample], axes: str) -> None:
        layout = self._classifier.layout
        first, *others = (sample.clip for sample in samples)
        for other in others:
            if any(layout.size(first)[axis] != layout.size(other)[axis] for axis in axes):
                raise ValueError(
                    f"clips that are joined must agree in the axes {', '.join(axes)}, got shapes {tuple(first.shape)} "
                    f"and {tuple(other.shape)} in layout {layout.axes}. Bring all clips to one size first, for example "
                    f"with VideoClassifier.preprocess."
                )


def _thinned(clip: Tensor, time: int, count: int) -> Tensor:
    """Return the middle frames of ``count`` equal parts."""
    frames = clip.shape[time]
    at = [(2 * i + 1) * frames // (2 * count) for i in range(count)]
    return clip.index_select(time, torch.tensor(at, device=clip.device))


def _halved(clip: Tensor) -> Tensor:
    """Return the means of 2 x 2 pixels: ``(..., H, W)`` becomes ``(..., H / 2, W / 2)``."""
    return clip.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).mean((-1, -3))


def _grid(quarters: list[Tensor]) -> Tensor:
    """Return four tensors ``(..., h, w)``, in row order, as one tensor ``(..., 2 h, 2 w)``."""
    return torch.cat([torch.cat(quarters[:2], -1), torch.cat(quarters[2:], -1)], -2)
