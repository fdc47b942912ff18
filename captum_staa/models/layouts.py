"""The layout of whatever a method or a metric is given to explain."""

from __future__ import annotations

from captum_staa.layout import VideoLayout


def layout_of(forward_func: object, layout: VideoLayout | str | None) -> VideoLayout:
    """The layout that was given, or the classifier's own; the two must agree, and one must be there."""
    found = layout_if_known(forward_func, layout)
    if found is None:
        raise ValueError("the axes of a clip must be named: pass layout='BCTHW' or 'BTCHW', or a VideoClassifier")
    return found


def layout_if_known(forward_func: object, layout: VideoLayout | str | None) -> VideoLayout | None:
    """The same for a method that takes inputs of any shape, too."""
    own = getattr(forward_func, "layout", None)  # a VideoClassifier's, an ST-ABN's, or that of a module of yours
    own = own if isinstance(own, VideoLayout) else None
    if layout is None:
        return own
    given = VideoLayout.of(layout)
    if own is not None and own.axes != given.axes:
        raise ValueError(
            f"layout={given.axes!r} came, but the {type(forward_func).__name__} takes clips in {own.axes!r}; leave the "
            f"layout out"
        )
    return given
