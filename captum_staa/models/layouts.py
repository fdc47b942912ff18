"""The layout of the clips that a method or a metric gets."""

from __future__ import annotations

from captum_staa.layout import VideoLayout


def layout_of(forward_func: object, layout: VideoLayout | str | None) -> VideoLayout:
    """Return ``layout``, or the layout of ``forward_func`` if it is None.

    Args:
        forward_func: the function or model to explain. A VideoClassifier, an ST-ABN or any module with a ``layout``
            attribute of type :class:`VideoLayout` has a layout.
        layout: the layout that the caller passes, or None.

    Raises:
        ValueError: neither of them has a layout, or the two layouts differ.
    """
    known = layout_if_known(forward_func, layout)
    if known is None:
        raise ValueError(
            f"layout is required for a {type(forward_func).__name__}, got None. Pass layout='BCTHW' or 'BTCHW', or a "
            f"VideoClassifier, which knows its layout."
        )
    return known


def layout_if_known(forward_func: object, layout: VideoLayout | str | None) -> VideoLayout | None:
    """Return the same as :func:`layout_of`, or None without a layout, for methods that accept inputs of any shape."""
    own = getattr(forward_func, "layout", None)
    own = own if isinstance(own, VideoLayout) else None
    if layout is None:
        return own
    layout = VideoLayout.of(layout)
    if own is not None and own.axes != layout.axes:
        raise ValueError(
            f"layout must be {own.axes!r}, the layout of the {type(forward_func).__name__}, got {layout.axes!r}. Leave "
            f"layout out."
        )
    return layout
