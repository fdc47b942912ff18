"""Explanations of a video stream while a model runs on it: one result per frame."""

from captum_staa.stream.run import FrameResult, StreamRun, StreamStats
from captum_staa.stream.stream import STAAStream

__all__ = ["FrameResult", "STAAStream", "StreamRun", "StreamStats"]
