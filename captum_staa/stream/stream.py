"""STAA beside a live model: what is asked, and the windows it is asked of."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal, SupportsIndex

from torch import nn

from captum_staa._utils.checks import check_choice, check_count
from captum_staa.attr.staa import STAA, Mode
from captum_staa.stream.run import StreamRun
from captum_staa.stream.sources import Dropping, Source, Waiting
from captum_staa.stream.window import WindowExplainer

Policy = Literal["wait", "drop"]


class STAAStream:
    """Prediction, map and timeline of every frame of a stream, from the forwards that the model runs anyway.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> frames = PlantedClips(seed=1, n=1, num_frames=40).frames(0)  # or a camera's, one by one
        >>> stream = STAAStream(clf, window=16, stride=4)
        >>> stream.latency  # frames that a result waits for: fewest, most
        (12, 15)
        >>> results = list(stream(frames))
        >>> len(results), results[20].joint.shape, results[20].windows
        (40, torch.Size([48, 48]), 4)

    Windows of ``window`` frames begin at every ``stride``-th frame; where the stream ends, one more ends with its last
    frame. A frame's map, timeline value and probabilities are the mean over the windows that saw it, and are given out
    once no later window on the steps can see it: a result is final.

    Args:
        clf: a :class:`VideoClassifier` around a transformer of a known family, such a model itself, or a
            :class:`STAA` with options of its own.
        window: frames per window, the model's own number; None takes that.
        stride: frames from one window to the next, at most ``window``; None takes half of the window.
        mode: as for :class:`STAA`; None is ``"attention"``, or the mode of the STAA that came. ``"attention"`` reads
            prediction and map from one forward. ``"relevance"`` adds a backward, and a forward where there is no
            ``target``; its maps are signed.
        target: class to explain, label or index, for ``mode="relevance"``; None is each window's likeliest class.
        policy: what happens when frames come faster than they are explained. ``"wait"``: each is read when it is
            needed, and the source waits. ``"drop"``: a thread reads on, only the newest complete window is explained,
            windows before it are skipped with one warning, and frames beyond ``window + stride`` unread ones dropped.

    Attributes:
        latency: ``(fewest, most)`` frames that come after a frame before its result, while nothing is dropped.

    Raises:
        TypeError: ``clf`` is no module and no STAA, or an option has the wrong type.
        ValueError: the model is of no known family, does not know its preprocessing, or takes another number of
            frames than ``window``; or an option is out of range.
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
                raise ValueError(f"an STAA of mode={clf.mode!r} came, and {mode = } with it; leave mode out")
            self.explainer = clf
        else:
            self.explainer = STAA(clf, mode=mode or "attention")
        classifier = self.explainer.forward_func
        if classifier.preprocessing is None:
            raise ValueError(
                "a stream's frames must become clips, but this classifier does not know its preprocessing: give it "
                "one with VideoClassifier(..., preprocessing=Preprocessing(...))"
            )
        wanted = classifier.num_frames
        if window is None and wanted is None:
            raise ValueError("this model takes any number of frames, so window must be given, such as window=16")
        check_count("window", wanted if window is None else window)
        self.window = int(window or wanted)
        if wanted not in (None, self.window):
            raise ValueError(
                f"the model takes {wanted} frames, got {window = }; pass window={wanted}; to see a longer time, "
                f"give every n-th frame: itertools.islice(frames, 0, None, n)"
            )
        check_count("stride", 1 if stride is None else stride)
        self.stride = int(stride or max(self.window // 2, 1))
        if self.stride > self.window:
            raise ValueError(
                f"{stride = } leaves frames between windows of {self.window} that nobody sees; pass at most the window"
            )
        check_choice("policy", policy, ("wait", "drop"))
        if target is not None and self.explainer.mode != "relevance":
            raise ValueError(f"{target = } needs mode='relevance'; {self.explainer.mode!r} is about no class; drop it")
        self.policy = policy
        self.target = None if target is None else classifier.class_index(target)

    @property
    def latency(self) -> tuple[int, int]:
        """``(fewest, most)`` frames: the last frame of a step waits for the fewest, the first one for the most."""
        return self.window - self.stride, self.window - 1

    def __call__(self, frames: Iterable[Any]) -> StreamRun:
        """Explain a stream.

        Args:
            frames: gives uint8 ``(H, W, 3)`` RGB frames of one size, arrays or tensors: a generator, a list, a video
                ``(T, H, W, 3)``. Endless ones are welcome.

        Returns:
            :class:`StreamRun`, an iterator of one :class:`FrameResult` per frame in order. Leave it by a ``with``
            block or ``close()`` where it does not run to its end.

        Raises:
            TypeError: ``frames`` gives no frames. While the results are read also: a frame is not uint8.
            ValueError: while the results are read: a frame has another shape or size, or the stream ended before its
                first window was full. What ``frames`` itself raises is passed on after the frames before it.
        """
        if isinstance(frames, (str, os.PathLike)) or not isinstance(frames, Iterable):
            raise TypeError(
                f"frames is an iterable of uint8 (H, W, 3) frames, got {type(frames).__name__}; for a file, give "
                f"(frames[0] for _, frames in io.iter_windows(path, 1))"
            )
        source: Source = Waiting(frames)
        if self.policy == "drop":
            source = Dropping(frames, self.window + self.stride)
        return StreamRun(WindowExplainer(self.explainer, self.target), self.window, self.stride, source)
