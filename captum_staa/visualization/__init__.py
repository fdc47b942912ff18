"""Visualization of attributions: contact sheets, timelines, slices, animations and an HTML player.

Every function takes the attributions first, and then the frames of the clip: :class:`Frames`, or a uint8 array ``(T, H,
W, 3)``. :class:`Style` says how maps are drawn. All frames of a clip share one color scale.
"""

from captum_staa.visualization.animation import save_animation
from captum_staa.visualization.figure import Style
from captum_staa.visualization.frames import Frames
from captum_staa.visualization.html import to_html
from captum_staa.visualization.overlay import Overlay, overlay
from captum_staa.visualization.sheet import compare_methods, show_frames
from captum_staa.visualization.slices import show_slices
from captum_staa.visualization.summary import show_summary
from captum_staa.visualization.timeline import show_timeline
from captum_staa.visualization.words import show_words

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
