"""Two clips of different classes joined in time: temporal truth for any labelled set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_staa.benchmark.clips import Sample, checked, described, source_of
from captum_staa.benchmark.planted import generator_of
from captum_staa.checks import check_count
from captum_staa.models import VideoClassifier


def joined(
    clips: Iterable[Any], classifier: VideoClassifier, n: int | None = None, *, seed: int = 0
) -> Sequence[tuple[Tensor, int, Tensor]]:
    """Clips whose one half is of the target's class and whose other half is of another.

    Example:
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> pairs = joined(PlantedClips(seed=0, n=8), clf)
        >>> clip, target, truth = pairs[0]
        >>> clip.shape, len(pairs)
        (torch.Size([1, 16, 3, 48, 48]), 8)
        >>> sorted({tuple(map(int, pairs[i][2][0, :, 0, 0])) for i in range(8)})  # frames of the target's class
        [(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0)]

    A model takes a fixed number of frames, so each clip gives every second of its own. Which comes first is drawn, and
    so is the other clip. All pixels of the target's frames are truth: read ``auroc_time`` and ``temporal_pointing``,
    which compare frames, and not the metrics of places.

    Args:
        clips: a sequence as for :func:`captum_staa.benchmark.compare`, of two classes at least and two frames each.
        classifier: who is to see them.
        n: how many; None makes one of each clip. The target of the i-th is that of clip ``i % len(clips)``.
        seed: -2^63 to 2^63 - 1; draws partners and order. The i-th depends on ``seed`` and ``i`` only, not on ``n`` nor
            on the order of reading.

    Returns:
        A sequence of ``(clip, target, truth)`` that is made when read.

    Raises:
        ValueError: there are no clips, or ``n`` or ``seed`` is out of range; or, when read: all clips are of one class,
            or of unequal size, or one has a single frame, which has no halves.
        TypeError: ``clips`` is no sequence, because partners must be looked up; ``n`` or ``seed`` is no whole number.

    Reference:
        Adel Bargal et al., "Excitation Backprop for RNNs", CVPR (2018), on pairs of joined clips.
    """
    source: Any = source_of(clips, classifier)
    if not hasattr(source, "__getitem__"):
        raise TypeError(f"joined looks partners up, so clips are a sequence, but {type(clips).__name__} came")
    if n is not None:
        check_count("n", n)
    check_count("seed", seed, least=-(2**63), most=2**63 - 1)
    return _Joined(source, classifier, len(source) if n is None else int(n), int(seed))


class _Joined(Sequence[tuple[Tensor, int, Tensor]]):
    def __init__(self, source: Any, classifier: VideoClassifier, n: int, seed: int) -> None:
        self._source, self._classifier, self._n, self._seed = source, classifier, n, seed
        self.names = [f"joined-{index:05d}" for index in range(n)]

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:  # type: ignore[override]
        at = range(self._n)[index]
        draw = generator_of(self._seed, at)
        own = checked(self._source[at % len(self._source)], self._classifier)
        other = self._partner(own, draw)
        layout = self._classifier.layout
        frames = own.clip.shape[layout.time]
        if frames < 2:
            raise ValueError(
                f"joined clips are half of one and half of another, but clip {at % len(self._source)} of shape "
                f"{tuple(own.clip.shape)} has {frames} frame; give clips of two frames or more"
            )
        half = frames // 2
        halves = [(own, half), (other, frames - half)]
        truth = torch.arange(frames) < half
        if int(torch.randint(2, (), generator=draw)):
            halves, truth = halves[::-1], torch.arange(frames) >= frames - half
        sizes, others = layout.size(own.clip), layout.size(other.clip)
        if any(sizes[letter] != others[letter] for letter in "CHW"):
            raise ValueError(
                f"joined clips have one size, but clip {at % len(self._source)} of shape {tuple(own.clip.shape)} met "
                f"one of {tuple(other.clip.shape)}; bring all to one first, as VideoClassifier.preprocess does"
            )
        parts = [_thinned(sample.clip, layout.time, count) for sample, count in halves]
        everywhere = truth[None, :, None, None].expand(1, frames, sizes["H"], sizes["W"])
        return torch.cat(parts, layout.time).contiguous(), own.target, everywhere

    def described(self) -> dict[str, Any]:
        """What fixes the clips, for the record of a run."""
        return {"joined": {"of": described(self._source), "n": self._n, "seed": self._seed}}

    def _partner(self, own: Sample, draw: torch.Generator) -> Sample:
        """The first clip of another class in a random order."""
        for at in torch.randperm(len(self._source), generator=draw).tolist():
            other = checked(self._source[at], self._classifier)
            if other.target != own.target:
                return other
        raise ValueError(f"all {len(self._source)} clips are of class {own.target}: two classes are needed to join")


def _thinned(clip: Tensor, time: int, count: int) -> Tensor:
    """The middle frames of so many equal parts."""
    frames = clip.shape[time]
    at = [(2 * i + 1) * frames // (2 * count) for i in range(count)]
    return clip.index_select(time, torch.tensor(at, device=clip.device))
