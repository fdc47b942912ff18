"""Read and write video files with few frames in memory at a time. Writing is atomic."""

from captum_staa._utils.files import FilePath
from captum_staa.io.reading import Sampling, Video, VideoInfo, frame_times, iter_windows, probe, read_video
from captum_staa.io.writing import video_writer, write_video

__all__ = [
    "read_video",
    "iter_windows",
    "probe",
    "frame_times",
    "write_video",
    "video_writer",
    "Video",
    "VideoInfo",
    "FilePath",
    "Sampling",
]
