"""A folder of videos with a table of labels and, optionally, a table of boxes."""

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
