"""A folder of videos with a table of their labels, and where there is one, a table of boxes."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_staa import io
from captum_staa.benchmark.clips import check_unique
from captum_staa.metrics import boxes_to_truth
from captum_staa.models import VideoClassifier
from captum_staa.models.classifier import DEFAULT_FRAMES

Box = tuple[float, float, float, float]


class Videos(Sequence[tuple[Tensor, int, Tensor | None]]):
    """Video files as clips, decoded when asked for: evenly chosen frames, as many as the model takes.

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
        folder: where the files lie.
        labels: CSV with the columns ``name`` (the file, from ``folder`` on) and ``label`` (as the model spells it, in
            any case, or an index); others are passed over.
        classifier: who is to see them; it knows its preprocessing.
        boxes: CSV with the columns ``name``, ``frame``, ``x0``, ``y0``, ``x1``, ``y1``: a box in pixels of the file's
            frames, half-open, and the frame's number in the file from 0 on. Several rows of a frame are joined. A frame
            without a row has no evidence, so every frame that may be chosen must be annotated; a clip without any row
            has no truth at all.

    Raises:
        ValueError: a table misses a column or names nothing, a name stands twice, a label is none of the model's, a
            box is no box, a name leads out of the folder, or the classifier came without its preprocessing.
        FileNotFoundError: a table or a video is not there.
    """

    def __init__(
        self, folder: io.FilePath, labels: io.FilePath, classifier: VideoClassifier, boxes: io.FilePath | None = None
    ) -> None:
        self._folder, self._classifier = Path(folder), classifier
        if classifier.preprocessing is None:
            raise ValueError(
                "the classifier does not know how frames become its clips: VideoClassifier(..., preprocessing=...)"
            )
        rows = _read(labels, ("name", "label"))
        self.names = [row["name"] for _, row in rows]
        check_unique(self.names)
        _check_inside(rows, labels)
        self._targets = [_target(classifier, row["label"], f"{labels}, line {line}") for line, row in rows]
        if missing := [name for name in self.names if not (self._folder / name).is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(self.names)} videos in {labels} are not in {self._folder}: {missing[:3]}; "
                f"the column 'name' holds the file's path from that folder on, with its ending"
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
        """What fixes the clips, for the record of a run; the files' own bytes are not read for it."""
        return {"videos": str(self._folder.resolve()), "length": len(self), "tables": self._tables}

    def _truth(self, boxes: dict[int, list[Box]], video: io.Video, sizes: dict[str, int]) -> Tensor:
        """bool ``(1, T, H, W)``, from the file's pixels to the clip's: what lies outside of the crop is cut off."""
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
                # whole corners around the same pixels' centers: what is left of a box may lie within one pixel
                inside = [min(max(math.ceil(edge - 0.5), 0), most) for edge, most in edges]
                if inside[0] < inside[2] and inside[1] < inside[3]:
                    corners = torch.tensor(inside).view(1, 1, 4)
                    truth[:, at] |= boxes_to_truth(corners, (sizes["H"], sizes["W"]))[:, 0]
        return truth


def _read(table: io.FilePath, columns: tuple[str, ...]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with the numbers of their lines."""
    path = Path(table)
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {path} (from the folder {Path.cwd()}); check the path")
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte-order mark
        reader = csv.DictReader(file)
        if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} needs the columns {', '.join(columns)}, but has {reader.fieldnames}: {missing=}")
        rows = [(reader.line_num, row) for row in reader]
    if not rows:
        raise ValueError(f"{path} has a head and no rows")
    if short := [line for line, row in rows if any(not row[column] for column in columns)]:
        raise ValueError(f"{path}, line {short[0]}: one of {', '.join(columns)} is empty")
    return rows


def _check_inside(rows: list[tuple[int, dict[str, str]]], table: io.FilePath) -> None:
    """A table that somebody sent must not reach for files elsewhere on the disk."""
    for line, row in rows:
        path = Path(row["name"])
        if path.is_absolute() or path.drive or ".." in path.parts:
            raise ValueError(
                f"{table}, line {line}: the name {row['name']!r} leads out of the folder of the videos; name a file in "
                f"it, from that folder on"
            )


def _target(classifier: VideoClassifier, label: str, where: str) -> int:
    try:
        return classifier.class_index(label)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _boxes(table: io.FilePath, names: set[str]) -> dict[str, dict[int, list[Box]]]:
    """By name and frame."""
    found: dict[str, dict[int, list[Box]]] = defaultdict(lambda: defaultdict(list))
    for line, row in _read(table, ("name", "frame", "x0", "y0", "x1", "y1")):
        if row["name"] not in names:
            raise ValueError(f"{table}, line {line}: there is no video {row['name']!r} among the labels")
        try:
            frame = int(row["frame"])
            x0, y0, x1, y1 = (float(row[corner]) for corner in ("x0", "y0", "x1", "y1"))
        except ValueError as error:
            raise ValueError(f"{table}, line {line}: {error}; a frame is a whole number, a corner a number") from error
        if not (frame >= 0 and x0 < x1 and y0 < y1 and all(map(math.isfinite, (x0, y0, x1, y1)))):
            raise ValueError(
                f"{table}, line {line}: a box is x0 < x1 and y0 < y1, all finite, in a frame from 0 on, but "
                f"{frame=}, {x0=}, {y0=}, {x1=}, {y1=} came"
            )
        found[row["name"]][frame].append((x0, y0, x1, y1))
    return {name: dict(frames) for name, frames in found.items()}
