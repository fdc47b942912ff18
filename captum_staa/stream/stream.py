"""STAA on a stream of frames: the options of a stream and its windows."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal, SupportsIndex

from torch import nn

from captum_staa._utils.checks import check_choice, check_count
from captum_staa.attr.staa import STAA, Mode
from captum_staa.stream.run import StreamRun, WindowExplainer
from captum_staa.stream.sources import Dropping, Source, Waiting

Policy = Literal["wait", "drop"]


class STAAStream:
    """Explain a stream of frames: prediction, map and temporal signal of every frame.

    With ``mode="relevance"``, the default, a forward and a backward pass per window give the prediction and the map of
    what adds to it. With ``mode="attention"``, the forward pass gives both, and the map is of no class.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips, SceneOptions
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> planted = PlantedClips(seed=1, n=1, scene=SceneOptions(num_frames=40))
        >>> frames = planted.frames(0)  # or frames of a camera, one by one
        >>> stream = STAAStream(clf, window=16, stride=4)
        >>> stream.latency  # fewest and most frames that a result waits for
        (12, 15)
        >>> results = list(stream(frames))
        >>> len(results), results[20].joint.shape, results[20].windows
        (40, torch.Size([48, 48]), 4)

    A window of ``window`` frames starts at every ``stride``-th frame. At the end, one more window ends with the last
    frame. The map, temporal signal and probabilities of a frame are means over the windows that contain it.
    They are returned, and do not change any more, once no later window at a multiple of the stride can contain the
    frame.

    Args:
        clf: a :class:`VideoClassifier` with a transformer of a known family, such a transformer, or a :class:`STAA`
            instance.
        window: frames per window; it must be the number of frames of the model, if that is fixed. None takes that
            number.
        stride: frames from the start of a window to the start of the next, 1 to ``window``. None takes half of the
            window.
        mode: as in :class:`STAA`. None is ``"relevance"``, whose maps are signed, or the mode of the STAA instance.
            ``"attention"`` needs no backward pass, but its maps do not tell evidence from similar objects.
        target: class to explain, label or index, for ``mode="relevance"``. None is the most likely class per window.
        policy: what happens if frames arrive faster than they are explained. ``"wait"``: each frame is read when it is
            needed, and the source waits. ``"drop"``: a thread reads all frames, and only the newest complete window is
            explained. Earlier windows are skipped with one warning, and at most ``window + stride`` unread frames are
            kept.

    Attributes:
        latency: ``(fewest, most)`` frames that arrive after a frame before its result, if no frames are dropped.

    Raises:
        TypeError: ``clf`` is neither a module nor a STAA, or an option has the wrong type.
        ValueError: the model does not belong to a known family, does not have its preprocessing, or takes another
            number of frames than ``window``; or an option is out of range.
    """

    def __init__(
        self,
        clf: nn.Module | STAA,
        window: int | None = None,
        stride: int | None = None,
        *,
        mode: Mode | None = None,
        target: str | SupportsIndex | None = None,
        policy: Policy = "wait",
    ) -> None:
        if isinstance(clf, STAA):
            if mode not in (None, clf.mode):
                raise ValueError(f"mode must equal the mode {clf.mode!r} of the STAA, got {mode!r}. Leave mode out.")
            self.explainer = clf
        else:
            self.explainer = STAA(clf, mode=mode or "relevance")
        classifier = self.explainer.forward_func
        if classifier.preprocessing is None:
            raise ValueError(
                "the classifier must have its preprocessing, which converts frames to clips, got preprocessing=None. "
                + classifier.how_to_preprocess()
            )
        wanted = classifier.num_frames
        if window is None and wanted is None:
            raise ValueError(
                "window must be an integer for a model that takes any number of frames, got None. Pass window=16, for "
                "example."
            )
        check_count("window", wanted if window is None else window)
        self.window = int(window or wanted)
        if wanted not in (None, self.window):
            raise ValueError(
                f"window must be {wanted}, the number of frames that the model takes, got {window}. Pass "
                f"window={wanted}. To cover a longer time, pass every n-th frame: itertools.islice(frames, 0, None, n)."
            )
        check_count("stride", 1 if stride is None else stride)
        self.stride = int(stride or max(self.window // 2, 1))
        if self.stride > self.window:
            raise ValueError(
                f"stride must be at most window={self.window}, or some frames are in no window, got {stride}. Lower it."
            )
        check_choice("policy", policy, ("wait", "drop"))
        if target is not None and self.explainer.mode != "relevance":
            raise ValueError(
                f"target must be None for mode={self.explainer.mode!r}, whose maps are not specific to a class, got "
                f"{target!r}. Leave target out, or pass mode='relevance'."
            )
        self.policy = policy
        self.target = None if target is None else classifier.class_index(target)

    @property
    def latency(self) -> tuple[int, int]:
        """``(fewest, most)`` frames; in each stride, the last frame waits least, the first longest."""
        return self.window - self.stride, self.window - 1

    def __call__(self, frames: Iterable[Any]) -> StreamRun:
        """Explain a stream.

        Args:
            frames: an iterable of uint8 ``(H, W, 3)`` RGB frames of one size, arrays or tensors: a generator, a list,
                or a video ``(T, H, W, 3)``. It may be endless.

        Returns:
            :class:`StreamRun`, an iterator of one :class:`FrameResult` per frame in order. If you stop before its end,
            use it in a ``with`` block or call ``close()``.

        Raises:
            TypeError: ``frames`` is not an iterable of frames; while results are read, a frame is not uint8.
            ValueError: while results are read, a frame has another shape or size, or the stream has fewer frames than
                one window. An exception of ``frames`` is raised after the results of the frames before it.
        """
        if isinstance(frames, (str, os.PathLike)) or not isinstance(frames, Iterable):
            raise TypeError(
                f"frames must be an iterable of uint8 (H, W, 3) frames, got {type(frames).__name__}. For a file, pass "
                f"(frames[0] for _, frames in io.iter_windows(path, 1))."
            )
        source: Source = Waiting(frames)
        if self.policy == "drop":
            source = Dropping(frames, self.window + self.stride)
        return StreamRun(WindowExplainer(self.explainer, self.target), self.window, self.stride, source)
