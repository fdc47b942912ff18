"""Visualization of attributions: contact sheets, timelines, slices, animations and an HTML player.

All frames of a clip share one color scale.
"""

from .animation import save_animation
from .comparison import compare_methods
from .frames import show_frames
from .html import to_html
from .slices import show_slices
from .summary import show_summary
from .timeline import show_timeline

__all__ = [
    "compare_methods",
    "save_animation",
    "show_frames",
    "show_slices",
    "show_summary",
    "show_timeline",
    "to_html",
]
