"""Pictures of attributions: contact sheets, timelines and moving pictures, on one scale per clip."""

from .animation import save_animation
from .frames import show_frames
from .timeline import show_timeline

__all__ = ["save_animation", "show_frames", "show_timeline"]
