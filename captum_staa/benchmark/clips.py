"""Sources of clips for a comparison: planted clips, videos, or any iterable, converted to one form."""

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
    """One clip with its target and its known masks.

    Attributes:
        clip: ``(1, ...)``, in the classifier's layout and on its device.
        target: index of the class to explain.
        truth: bool ``(1, T, H, W)``, True where the evidence is; None if unknown.
        rivals: bool ``(1, T, H, W)``, True where objects are that look like evidence and are not; None if unknown.
        objects: bool ``(1, K, T, H, W)``, one mask for the evidence and one for each rival, the evidence first; None if
            unknown.
    """

    clip: Tensor
    target: int
    truth: Tensor | None = None
    rivals: Tensor | None = None
    objects: Tensor | None = None


MASKS = ("truth", "rivals", "objects")  # fields of Sample
Load = Callable[[], Sample]


class Planted(Sequence[tuple[Tensor, ...]]):
    """Planted clips in the layout of a classifier, with a name for each clip.

    Example:
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> clips = Planted(PlantedClips(seed=0, n=8), clf.layout)
        >>> clips.names[3], clips[3][0].shape, clips[3][4].shape
        ('pattern-00003', torch.Size([1, 3, 16, 48, 48]), torch.Size([1, 4, 16, 48, 48]))

    In clips with evidence of two classes, the first class is the target, and the evidence of the second is a rival.

    Args:
        planted: the clips, in layout BTCHW.
        layout: layout of the returned clips.
    """

    def __init__(self, planted: PlantedClips, layout: VideoLayout) -> None:
        self._planted, self._layout = planted, layout
        self.names = [f"{planted.task}-{index:05d}" for index in range(len(planted))]

    def __len__(self) -> int:
        return len(self._planted)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Return clip, label, truth, rivals and objects with a batch axis of 1, as :func:`checked` takes them."""
        clip, label, truth, rivals, objects = self._planted.with_masks(index)
        if self._planted.scene.two_classes:
            first, second = truth
            label, truth, rivals = label[0], first, (rivals | second) & ~first
        clip = self._layout.from_working(clip[None]).contiguous()
        return clip, label, truth[None], rivals[None], objects[None]

    def described(self) -> dict[str, Any]:
        """Return the settings that determine the clips, for the record of a run."""
        return {"planted": self._planted.described()}


def source_of(clips: Any, classifier: VideoClassifier) -> Iterable[Any]:
    """Return the clips as a checked source, before the first of them is loaded.

    Args:
        clips: :class:`PlantedClips`; a sequence of items as for :func:`checked`, such as
            :class:`captum_staa.benchmark.Videos`; or any other iterable of such items. A sequence may have methods
            ``rivals(index)`` and ``objects(index)``. They are called if its items do not contain these masks.
        classifier: the model that the clips are for.

    Raises:
        ValueError: a sequence is empty, or its ``names`` are not one per clip or not unique.
        TypeError: ``clips`` is not an iterable.
    """
    if isinstance(clips, PlantedClips):
        clips = Planted(clips, classifier.layout)
    if not (_indexed(clips) or hasattr(clips, "__iter__")) or isinstance(clips, (str, Tensor, dict)):
        raise TypeError(
            f"clips must be PlantedClips, Videos, or an iterable of (clip, target), (clip, target, truth) or "
            f"(clip, target, truth, rivals), got {type(clips).__name__}. Pass a list of such items."
        )
    if _indexed(clips):
        if len(clips) == 0:
            raise ValueError(f"clips must hold at least one clip, got an empty {type(clips).__name__}. Add clips.")
        names = names_of(clips)
        if len(names) != len(clips):
            raise ValueError(
                f"names must hold one name for each of the {len(clips)} clips, got {len(names)} names. Correct the "
                f"attribute names of the clips."
            )
        check_unique(names)
    return clips


def check_unique(names: Sequence[str]) -> None:
    """Raise unless all names are different, because names identify the clips in the rows of a comparison."""
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(
            f"names of clips must be unique, got {len(duplicates)} names more than once: {duplicates[:3]}. Rename them."
        )


def names_of(clips: Any) -> list[str]:
    """Return the names of the clips of a sequence: its attribute ``names``, or numbers if it has none."""
    names = getattr(clips, "names", None)
    return [_number(index) for index in range(len(clips))] if names is None else [str(name) for name in names]


def name_of(clips: Any) -> Callable[[int], str]:
    """Return a function that returns the name of the clip of an index, as :func:`each` yields it."""
    if not _indexed(clips):
        return _number
    names = names_of(clips)
    return lambda index: names[index] if index < len(names) else ""  # no clip has an empty name


def described(clips: Any) -> dict[str, Any]:
    """Return the settings that determine the clips, for the record of a run; for a plain iterable only its type."""
    if hasattr(clips, "described"):
        return dict(clips.described())
    if not _indexed(clips):
        return {"iterable": type(clips).__name__}
    digest = hashlib.sha256("\n".join(names_of(clips)).encode()).hexdigest()
    return {"sequence": type(clips).__name__, "length": len(clips), "names": digest}


def each(clips: Iterable[Any], classifier: VideoClassifier, rank: int, world: int) -> Iterator[tuple[int, str, Load]]:
    """Yield the clips of one process, every ``world``-th: index, name, and a function that loads the clip.

    The clips of a sequence are loaded only when they are needed. So clips that are already done cost nothing, and an
    unreadable clip does not affect the others. Every process iterates over the whole of any other iterable.

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
    """Return the number of clips that :func:`each` yields; None if the clips have no length."""
    return len(range(rank, len(clips), world)) if _indexed(clips) else None


def checked(item: Any, classifier: VideoClassifier, **more: Tensor | None) -> Sample:
    """Return an item as a checked :class:`Sample`.

    Args:
        item: ``(clip, target)``, ``(clip, target, truth)``, ``(clip, target, truth, rivals)`` or ``(clip, target,
            truth, rivals, objects)``. The clip is of floats in the classifier's layout; the target is a label or an
            index; truth and rivals are bool ``(T, H, W)``, objects are bool ``(K, T, H, W)`` with the evidence first.
            A batch axis of 1 may be there or not. Each of the masks may be None.
        classifier: the model that the clip is for.
        **more: ``rivals`` and ``objects``, used if the item does not contain them.

    Raises:
        ValueError: a shape or dtype is wrong, truth and rivals overlap, or the classifier does not have the class.
        TypeError: a part of the item has the wrong type.
    """
    if not isinstance(item, (tuple, list)) or not 2 <= len(item) <= len(Sample._fields):
        received = f"{type(item).__name__} of {len(item)}" if isinstance(item, (tuple, list)) else type(item).__name__
        raise TypeError(
            f"a clip must be (clip, target), (clip, target, truth), (clip, target, truth, rivals) or (clip, target, "
            f"truth, rivals, objects), got {received}"
        )
    clip, target, *masks = item
    layout = classifier.layout
    if isinstance(clip, Tensor) and clip.ndim == 4:
        clip = clip[None]
    layout.check_values(clip, "clip")
    if len(clip) != 1:
        raise ValueError(
            f"clip must have a batch size of 1, got shape {tuple(clip.shape)}. Pass the clips of the batch one by one."
        )
    index = classifier.class_index(target if isinstance(target, str) else int(target))
    device = next((parameter.device for parameter in classifier.parameters()), clip.device)
    all_masks = more | {name: mask for name, mask in zip(MASKS, masks, strict=False) if mask is not None}
    extent = tuple(layout.size(clip)[axis] for axis in WORKING if axis not in "BC")
    known = {name: _mask(name, mask, extent, device) for name, mask in all_masks.items() if mask is not None}
    sample = Sample(clip.detach().to(device), index, **known)
    if sample.truth is not None and sample.rivals is not None:
        both = int((sample.truth & sample.rivals).sum())
        if both:
            raise ValueError(f"truth and rivals must not overlap, got {both} voxels in both. Pass rivals & ~truth.")
    return sample


def _mask(name: str, mask: object, extent: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a mask as ``(1, T, H, W)``, objects as ``(1, K, T, H, W)``; a missing batch axis is added."""
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
    getters = {name: getattr(clips, name, None) for name in MASKS[1:]}
    return checked(item, classifier, **{name: get(index) for name, get in getters.items() if callable(get)})


def _indexed(clips: object) -> bool:
    return hasattr(clips, "__len__") and hasattr(clips, "__getitem__")


def _number(index: int) -> str:
    return f"clip-{index:05d}"
