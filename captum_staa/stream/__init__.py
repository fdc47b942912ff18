"""STAA beside a live model: frames in as they come, one result per frame out."""

from captum_staa.stream.results import FrameResult, StreamStats
from captum_staa.stream.run import StreamRun
from captum_staa.stream.stream import STAAStream

__all__ = ["FrameResult", "STAAStream", "StreamRun", "StreamStats"]
