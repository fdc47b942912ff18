"""Sources of clips for a comparison: planted clips, videos, or any iterable, converted to one form."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_staa import io
from captum_staa.benchmark.planted import PlantedClips
from captum_staa.layout import WORKING, VideoLayout
from captum_staa.metrics import boxes_to_truth
from captum_staa.models import VideoClassifier
from captum_staa.models.classifier import DEFAULT_FRAMES


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


Box = tuple[float, float, float, float]


# --- folders of videos ------------------------------------------------------------------------------------------------


class Videos(Sequence[tuple[Tensor, int, Tensor | None]]):
    """Video files as clips, decoded when they are read: evenly spaced frames, as many as the model takes.

    Example:
        >>> import tempfile, numpy as np
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = io.write_video(folder / "a.mp4", np.zeros((20, 64, 96, 3), dtype=np.uint8), fps=10)
        >>> _ = (folder / "labels.csv").write_text("name,label\\na.mp4,bright-bottom\\n")
        >>> _ = (folder / "boxes.csv").write_text("name,frame,x0,y0,x1,y1\\na.mp4,0,16,0,48,32\\n")
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip, target, truth = Videos(folder, folder / "labels.csv", clf, boxes=folder / "boxes.csv")[0]
        >>> clip.shape, target, int(truth[0, 0].sum())  # the 32 x 32 pixels became 24 x 24
        (torch.Size([1, 16, 3, 48, 48]), 1, 576)

    Args:
        folder: folder of the video files.
        labels: CSV file with the columns ``name`` (path of the file relative to ``folder``) and ``label`` (a class name
            of the model, in any case, or an index). Other columns are ignored.
        classifier: the model that the clips are for; it must have its preprocessing.
        boxes: CSV file with the columns ``name``, ``frame``, ``x0``, ``y0``, ``x1``, ``y1``: half-open boxes in pixels
            of the frames of the file, and the index of the frame in the file, from 0. The truth of a frame is the union
            of its boxes. A frame without a row has no evidence, so every frame that may be chosen must be annotated. A
            clip without any row has no truth.

    Raises:
        ValueError: a table lacks a column or rows, a name occurs twice or leads out of the folder, a label is not a
            class of the model, a box is invalid, or the classifier does not have its preprocessing.
        FileNotFoundError: a table or a video does not exist.
    """

    def __init__(
        self, folder: io.FilePath, labels: io.FilePath, classifier: VideoClassifier, boxes: io.FilePath | None = None
    ) -> None:
        self._folder, self._classifier = Path(folder), classifier
        if classifier.preprocessing is None:
            raise ValueError(
                "classifier must have its preprocessing, which converts frames to clips, got preprocessing=None. Pass "
                "VideoClassifier(..., preprocessing=...)."
            )
        rows = _read(labels, ("name", "label"))
        self.names = [row["name"] for _, row in rows]
        check_unique(self.names)
        _check_inside(rows, labels)
        self._targets = [_target(classifier, row["label"], f"{labels}, line {line}") for line, row in rows]
        if missing := [name for name in self.names if not (self._folder / name).is_file()]:
            raise FileNotFoundError(
                f"the column 'name' of {labels} must hold paths of videos relative to {self._folder}, with file "
                f"extensions, got {len(missing)} of {len(self.names)} names without a file: {missing[:3]}. Correct the "
                f"names or the folder."
            )
        self._boxes = {} if boxes is None else _boxes(boxes, set(self.names))
        tables = [Path(table) for table in (labels, boxes) if table is not None]
        self._tables = [hashlib.sha256(table.read_bytes()).hexdigest() for table in tables]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor | None]:  # type: ignore[override]
        name = self.names[index]
        video = io.read_video(self._folder / name, self._classifier.num_frames or DEFAULT_FRAMES)
        clip = self._classifier.preprocess(video.frames)
        truth = None
        if name in self._boxes:
            truth = self._truth(self._boxes[name], video, self._classifier.layout.size(clip))
        return clip, self._targets[index], truth

    def described(self) -> dict[str, Any]:
        """Return the settings that determine the clips, for the record of a run. Videos are not read for it."""
        return {"videos": str(self._folder.resolve()), "length": len(self), "tables": self._tables}

    def _truth(self, boxes: dict[int, list[Box]], video: io.Video, sizes: dict[str, int]) -> Tensor:
        """Return the boxes as truth, bool ``(1, T, H, W)`` in pixels of the clip, without parts outside the crop."""
        top, left, height, width = self._classifier.crop_box(*video.frames.shape[1:3])
        down, across = sizes["H"] / height, sizes["W"] / width
        truth = torch.zeros(1, sizes["T"], sizes["H"], sizes["W"], dtype=torch.bool)
        for at, frame in enumerate(video.indices.tolist()):
            for x0, y0, x1, y1 in boxes.get(frame, ()):
                edges = (
                    ((x0 - left) * across, sizes["W"]),
                    ((y0 - top) * down, sizes["H"]),
                    ((x1 - left) * across, sizes["W"]),
                    ((y1 - top) * down, sizes["H"]),
                )
                # integer corners that enclose the same pixel centers; a box may shrink to nothing
                inside = [min(max(math.ceil(edge - 0.5), 0), most) for edge, most in edges]
                if inside[0] < inside[2] and inside[1] < inside[3]:
                    corners = torch.tensor(inside).view(1, 1, 4)
                    truth[:, at] |= boxes_to_truth(corners, (sizes["H"], sizes["W"]))[:, 0]
        return truth


def _read(table: io.FilePath, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV file with their line numbers."""
    path = Path(table)
    if not path.is_file():
        raise FileNotFoundError(
            f"the table must be an existing CSV file, got {path} in the working folder {Path.cwd()}. Check the path."
        )
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
        reader = csv.DictReader(file)
        if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise ValueError(
                f"{path} must have the columns {', '.join(columns)}, got {reader.fieldnames}. Add {missing}."
            )
        rows = [(reader.line_num, row) for row in reader]
    if not rows:
        raise ValueError(f"{path} must have at least one row, got a header only. Add rows.")
    if short := [line for line, row in rows if any(not row[column] for column in columns)]:
        raise ValueError(
            f"{path}, line {short[0]}: the columns {', '.join(columns)} must not be empty, got an empty cell"
        )
    return rows


def _check_inside(rows: list[tuple[int, dict[str, str]]], table: io.FilePath) -> None:
    """Raise if a name leads out of the folder: a table from an unknown source must not read other files."""
    for line, row in rows:
        path = Path(row["name"])
        if path.is_absolute() or path.drive or ".." in path.parts:
            raise ValueError(
                f"{table}, line {line}: a name must be a path inside the folder of the videos, relative to it, got "
                f"{row['name']!r}. Name a file in that folder."
            )


def _target(classifier: VideoClassifier, label: str, where: str) -> int:
    """Return the index of a label; an error names the line of the table."""
    try:
        return classifier.class_index(label)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _boxes(table: io.FilePath, names: set[str]) -> dict[str, dict[int, list[Box]]]:
    """Return the boxes of a table by name and frame."""
    boxes: dict[str, dict[int, list[Box]]] = defaultdict(lambda: defaultdict(list))
    for line, row in _read(table, ("name", "frame", "x0", "y0", "x1", "y1")):
        if row["name"] not in names:
            raise ValueError(
                f"{table}, line {line}: a name must be one of the videos in the table of labels, got {row['name']!r}. "
                f"Correct the name."
            )
        try:
            frame = int(row["frame"])
            x0, y0, x1, y1 = (float(row[corner]) for corner in ("x0", "y0", "x1", "y1"))
        except ValueError as error:
            raise ValueError(
                f"{table}, line {line}: frame must be an integer, and x0, y0, x1 and y1 must be numbers: {error}"
            ) from error
        if not (frame >= 0 and x0 < x1 and y0 < y1 and all(map(math.isfinite, (x0, y0, x1, y1)))):
            raise ValueError(
                f"{table}, line {line}: a box must have x0 < x1 and y0 < y1, all finite, and frame >= 0, got "
                f"{frame=}, {x0=}, {y0=}, {x1=}, {y1=}"
            )
        boxes[row["name"]][frame].append((x0, y0, x1, y1))
    return {name: dict(frames) for name, frames in boxes.items()}
