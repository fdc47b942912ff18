"""Visualization of attributions: contact sheets, timelines, slices, animations and an HTML player.

Every function takes the attributions first, and then the frames of the clip: :class:`Frames`, or a uint8 array ``(T, H,
W, 3)``. :class:`Style` says how maps are drawn. All frames of a clip share one color scale.
"""

from .animation import save_animation
from .frames import Frames
from .html import to_html
from .overlay import Overlay, overlay
from .sheet import compare_methods, show_frames
from .slices import show_slices
from .style import Style
from .summary import show_summary
from .timeline import show_timeline
from .words import show_words

__all__ = [
    "Frames",
    "Style",
    "show_frames",
    "show_timeline",
    "show_summary",
    "compare_methods",
    "show_slices",
    "show_words",
    "save_animation",
    "to_html",
    "overlay",
    "Overlay",
]
