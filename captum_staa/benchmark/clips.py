"""Where clips come from: planted ones, a folder of videos with a table of labels, or any iterable, in one form."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_staa.benchmark.planted import PlantedClips
from captum_staa.layout import WORKING, VideoLayout
from captum_staa.models import VideoClassifier


class Sample(NamedTuple):
    """One clip with what is known of it.

    Attributes:
        clip: ``(1, ...)``, in the classifier's layout and on its device.
        target: index of the class that is explained.
        truth: bool ``(1, T, H, W)``, where the evidence is; None where unknown, as for the next two.
        rivals: bool ``(1, T, H, W)``, where objects are that look like evidence and are not.
        objects: bool ``(1, K, T, H, W)``, the evidence and each rival as an object of its own, the evidence first.
    """

    clip: Tensor
    target: int
    truth: Tensor | None = None
    rivals: Tensor | None = None
    objects: Tensor | None = None


MASKS = ("truth", "rivals", "objects")  # fields of Sample
Load = Callable[[], Sample]


class Planted(Sequence[tuple[Tensor, Tensor, Tensor]]):
    """Planted clips in the order of axes that a classifier takes, under names of their own.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> clips = Planted(PlantedClips(seed=0, n=8), clf.layout)
        >>> clips.names[3], clips[3][0].shape, clips.objects(3).shape
        ('pattern-00003', torch.Size([1, 3, 16, 48, 48]), torch.Size([1, 4, 16, 48, 48]))

    In clips with evidence of two classes the first class is explained, and the evidence of the second is a rival.

    Args:
        planted: the clips, in layout BTCHW.
        layout: the order of axes wanted.
    """

    def __init__(self, planted: PlantedClips, layout: VideoLayout) -> None:
        self._planted, self._layout = planted, layout
        self.names = [f"{planted.task}-{index:05d}" for index in range(len(planted))]

    def __len__(self) -> int:
        return len(self._planted)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        clip, label, truth = self._planted[index]
        if self._planted.options.two_classes:
            label, truth = label[0], truth[0]
        return self._layout.from_working(clip[None]).contiguous(), label, truth[None]

    def rivals(self, index: int) -> Tensor:
        """bool ``(1, T, H, W)``."""
        rivals = self._planted.rivals(index)
        if self._planted.options.two_classes:
            first, second = self._planted[index][2]
            rivals = (rivals | second) & ~first
        return rivals[None]

    def objects(self, index: int) -> Tensor:
        """bool ``(1, K, T, H, W)``, the evidence first."""
        return self._planted.objects(index)[None]

    def described(self) -> dict[str, Any]:
        """What fixes the clips, for the record of a run."""
        return {"planted": self._planted.described()}


def source_of(clips: Any, classifier: VideoClassifier) -> Iterable[Any]:
    """Clips that know their names where they can, checked as a whole before the first is loaded.

    Args:
        clips: :class:`PlantedClips`; a sequence of items as for :func:`checked`, such as
            :class:`captum_staa.benchmark.Videos`; or any other iterable of these. A sequence may have methods
            ``rivals(index)`` and ``objects(index)``, which are asked for what its items do not contain.
        classifier: who is to see them.

    Raises:
        ValueError: a sequence is empty, its ``names`` are not one for each, or not all different.
        TypeError: ``clips`` is no iterable.
    """
    if isinstance(clips, PlantedClips):
        clips = Planted(clips, classifier.layout)
    if not (_indexed(clips) or hasattr(clips, "__iter__")) or isinstance(clips, (str, Tensor, dict)):
        raise TypeError(
            f"clips must be PlantedClips, Videos, or an iterable of (clip, target), (clip, target, truth) or "
            f"(clip, target, truth, rivals), got {type(clips).__name__}"
        )
    if _indexed(clips):
        if len(clips) == 0:
            raise ValueError(f"there are no clips to compare methods on: {type(clips).__name__} is empty")
        names = names_of(clips)
        if len(names) != len(clips):
            raise ValueError(f"each of {len(clips)} clips needs one name, got {len(names)} names")
        check_unique(names)
    return clips


def check_unique(names: Sequence[str]) -> None:
    """Raise unless all names of clips are different: rows are told apart by them."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"clips are told apart by their names, got {len(twice)} twice: {twice[:3]}; rename them")


def names_of(clips: Any) -> list[str]:
    """The names of a sequence's clips: its own, or numbers."""
    own = getattr(clips, "names", None)
    return [_number(index) for index in range(len(clips))] if own is None else [str(name) for name in own]


def described(clips: Any) -> dict[str, Any]:
    """What fixes the clips, for the record of a run; of an unknown iterable little is known."""
    if hasattr(clips, "described"):
        return dict(clips.described())
    if not _indexed(clips):
        return {"iterable": type(clips).__name__}
    digest = hashlib.sha256("\n".join(names_of(clips)).encode()).hexdigest()
    return {"sequence": type(clips).__name__, "length": len(clips), "names": digest}


def each(clips: Iterable[Any], classifier: VideoClassifier, rank: int, world: int) -> Iterator[tuple[int, str, Load]]:
    """The share of one process: every ``world``-th clip, as its number, its name and what loads it.

    A sequence's clips are loaded only when asked for, so that those already done cost nothing, and one that cannot be
    read spoils no other. Another iterable is run through by every process.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> source = source_of(PlantedClips(seed=0, n=5), clf)
        >>> [(index, name) for index, name, load in each(source, clf, rank=1, world=2)]
        [(1, 'pattern-00001'), (3, 'pattern-00003')]
    """
    if _indexed(clips):
        names = names_of(clips)
        for index in range(rank, len(names), world):
            yield index, names[index], partial(_load, clips, index, classifier)
        return
    for index, item in enumerate(clips):
        if index % world == rank:
            yield index, _number(index), partial(checked, item, classifier)


def share(clips: Any, rank: int, world: int) -> int | None:
    """How many clips :func:`each` gives; None where nobody knows."""
    return len(range(rank, len(clips), world)) if _indexed(clips) else None


def checked(item: Any, classifier: VideoClassifier, **more: Tensor | None) -> Sample:
    """One clip in the form that everything here takes.

    Args:
        item: ``(clip, target)``, ``(clip, target, truth)``, ``(clip, target, truth, rivals)`` or ``(clip, target,
            truth, rivals, objects)``. The clip is of floats in the classifier's layout; the target is a label or an
            index; truth and rivals are bool ``(T, H, W)``, objects are bool ``(K, T, H, W)`` with the evidence first.
            A batch axis of 1 may be there or not. Each of the masks may be None.
        classifier: who is to see it.
        **more: ``rivals`` and ``objects``, used where the item does not contain them.

    Raises:
        ValueError, TypeError: something is not as said above; the classifier has no such class.
    """
    if not isinstance(item, (tuple, list)) or not 2 <= len(item) <= len(Sample._fields):
        came = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
        raise TypeError(
            f"a clip must be (clip, target), (clip, target, truth), (clip, target, truth, rivals) or (clip, target, "
            f"truth, rivals, objects), got {came}"
        )
    clip, target, *masks = item
    layout = classifier.layout
    if isinstance(clip, Tensor) and clip.ndim == 4:
        clip = clip[None]
    layout.check_values(clip, "clip")
    if len(clip) != 1:
        raise ValueError(f"clips come one by one, got a batch of shape {tuple(clip.shape)}; iterate over it")
    index = classifier.class_index(target if isinstance(target, str) else int(target))
    device = next((parameter.device for parameter in classifier.parameters()), clip.device)
    given = more | {name: mask for name, mask in zip(MASKS, masks, strict=False) if mask is not None}
    extent = tuple(layout.size(clip)[axis] for axis in WORKING if axis not in "BC")
    known = {name: _mask(name, mask, extent, device) for name, mask in given.items() if mask is not None}
    sample = Sample(clip.detach().to(device), index, **known)
    if sample.truth is not None and sample.rivals is not None:
        both = int((sample.truth & sample.rivals).sum())
        if both:
            raise ValueError(f"truth and rivals must not overlap, got {both} voxels in both. Pass rivals & ~truth.")
    return sample


def _mask(name: str, mask: object, extent: tuple[int, ...], device: torch.device) -> Tensor:
    """``(1, T, H, W)``, or ``(1, K, T, H, W)`` for objects, with the batch axis added where it is missing."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a bool tensor or None, got {type(mask).__name__}. Use torch.as_tensor.")
    axes = "1KTHW" if name == "objects" else "1THW"
    full = mask[None] if mask.ndim == len(axes) - 1 else mask
    shape = tuple(full.shape)
    if len(shape) != len(axes) or shape[0] != 1 or shape[-3:] != extent or mask.dtype != torch.bool:
        raise ValueError(
            f"{name} must be bool ({', '.join(axes)}) with (1, T, H, W) = {(1, *extent)}, got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    return full.to(device)


def _load(clips: Any, index: int, classifier: VideoClassifier) -> Sample:
    item = clips[index]
    asked = {name: getattr(clips, name, None) for name in MASKS[1:]}
    return checked(item, classifier, **{name: ask(index) for name, ask in asked.items() if callable(ask)})


def _indexed(clips: object) -> bool:
    return hasattr(clips, "__len__") and hasattr(clips, "__getitem__")


def _number(index: int) -> str:
    return f"clip-{index:05d}"
