"""The layout of whatever a method or a metric is given to explain."""

from __future__ import annotations

from captum_staa.layout import VideoLayout
from captum_staa.models.classifier import VideoClassifier


def layout_of(forward_func: object, layout: VideoLayout | str | None) -> VideoLayout:
    """The layout that was given, or the classifier's own; the two must agree, and one must be there."""
    found = layout_if_known(forward_func, layout)
    if found is None:
        raise ValueError("the axes of a clip must be named: pass layout='BCTHW' or 'BTCHW', or a VideoClassifier")
    return found


def layout_if_known(forward_func: object, layout: VideoLayout | str | None) -> VideoLayout | None:
    """The same for a method that takes inputs of any shape, too."""
    own = forward_func.layout if isinstance(forward_func, VideoClassifier) else None
    if layout is None:
        return own
    given = VideoLayout.of(layout)
    if own is not None and own.axes != given.axes:
        raise ValueError(
            f"layout={given.axes!r} came, but the VideoClassifier takes clips in {own.axes!r}; leave the layout out"
        )
    return given
