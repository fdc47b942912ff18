"""Unusual but intact video files: each gives the frames that a player shows, or an error that says what it is."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_files as hostile
import numpy as np
import pytest
from covering import in_one_case, over_values
from hostile_files import HEIGHT, WIDTH, av, noise, numbers, quartered, write

from captum_staa import VideoClassifier, io
from captum_staa.__main__ import main
from captum_staa.benchmark import Videos

CENTERS = ((8, 12), (8, 50), (40, 12), (40, 50))  # of the quadrants
READERS: list[Callable[[Path], object]] = [io.probe, io.read_video, lambda path: list(io.iter_windows(path, 2))]
BT601, BT709, BT2020, LIMITED, FULL = 5, 1, 9, 1, 2
# file, encoder, pixel format, other arguments, tolerance of a color
FORMATS: dict[str, tuple[str, str, str, dict[str, Any], int]] = {
    "4:2:0": ("a.mp4", "libx264", "yuv420p", {}, 4),
    "4:2:2": ("a.mp4", "libx264", "yuv422p", {}, 4),
    "4:4:4": ("a.mp4", "libx264", "yuv444p", {}, 3),
    "full range": ("a.mp4", "libx264", "yuvj420p", {"colors": (BT601, FULL)}, 4),
    "BT.709": ("a.mp4", "libx264", "yuv420p", {"colors": (BT709, LIMITED)}, 4),
    "BT.709, full range": ("a.mp4", "libx264", "yuv420p", {"colors": (BT709, FULL)}, 4),
    "BT.2020, 10 bit": ("a.mp4", "libx264", "yuv420p10le", {"colors": (BT2020, LIMITED)}, 4),
    "10 bit": ("a.mp4", "libx264", "yuv420p10le", {}, 4),
    "16 bit": ("a.mkv", "ffv1", "yuv444p16le", {}, 1),
    "10 bit ProRes": ("a.mov", "prores_ks", "yuv422p10le", {}, 4),
    "ProRes with alpha": ("a.mov", "prores_ks", "yuva444p10le", {"alpha": 100}, 3),
    "VP9 with alpha": ("a.webm", "libvpx-vp9", "yuva420p", {"alpha": 0, "options": {"crf": "4", "b": "0"}}, 4),
    "FFV1 with alpha": ("a.mkv", "ffv1", "bgra", {"alpha": 0}, 0),
    "QuickTime with alpha": ("a.mov", "qtrle", "argb", {"alpha": 1}, 0),
    "moving JPEG": ("a.avi", "mjpeg", "yuvj420p", {}, 8),
    "moving PNG": ("a.apng", "apng", "rgba", {"alpha": 10}, 0),
    "moving GIF": ("a.gif", "gif", "rgb8", {}, 60),  # 256 colors
    "MPEG-4 part 2": ("a.avi", "mpeg4", "yuv420p", {"options": {"qscale": "1", "flags": "qscale"}}, 8),
    "MPEG-2 stream": ("a.ts", "mpeg2video", "yuv420p", {"options": {"b": "4000000"}}, 8),
}


@in_one_case()
@pytest.mark.parametrize("kind", FORMATS)
def test_pixel_formats_are_converted_to_rgb(tmp_path, kind):
    """An alpha channel is dropped. The colors are the stored ones, also of transparent pixels."""
    name, codec, pix_fmt, more, tolerance = FORMATS[kind]
    truth = quartered(6)
    video = io.read_video(write(tmp_path / name, truth, codec, pix_fmt, **more))
    assert video.frames.shape == truth.shape and video.indices.tolist() == list(range(6))
    for row, column in CENTERS:
        near = video.frames[:, row, column].astype(int) - truth[:, row, column]
        assert np.abs(near).max() <= tolerance, (row, column)
    if kind != "moving GIF":
        assert numbers(video.frames) == list(range(6))
    assert io.probe(tmp_path / name) == (6, pytest.approx(10), HEIGHT, WIDTH)


@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "gray"), ("libx264", "gray10le"), ("qtrle", "gray")])
def test_gray_has_three_equal_channels(tmp_path, codec, pix_fmt):
    truth = quartered(4)
    colors = (BT601, FULL) if codec == "libx264" else None
    frames = io.read_video(write(tmp_path / "gray.mov", truth, codec, pix_fmt, colors=colors)).frames
    assert (frames[..., 0] == frames[..., 1]).all() and (frames[..., 1] == frames[..., 2]).all()
    luma = truth @ np.array([0.299, 0.587, 0.114])
    for row, column in CENTERS:
        assert np.abs(frames[:, row, column, 0] - luma[:, row, column]).max() < 7


@over_values
@pytest.mark.parametrize("size", [(1, 1), (33, 47), (2, 300)])
@pytest.mark.parametrize(("name", "codec", "pix_fmt"), [("a.mkv", "ffv1", "yuv420p"), ("a.mov", "qtrle", "rgb24")])
def test_odd_sizes_keep_every_pixel(tmp_path, size, name, codec, pix_fmt):
    truth = np.broadcast_to(np.arange(4, dtype=np.uint8)[:, None, None, None] * 60, (4, *size, 3))
    frames = io.read_video(write(tmp_path / name, truth, codec, pix_fmt)).frames
    np.testing.assert_allclose(frames, truth, atol=1)
    assert io.probe(tmp_path / name)[2:] == size


@in_one_case("degrees")
@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write a rotation")
@pytest.mark.parametrize("mirrors", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_rotated_and_mirrored_videos(tmp_path, degrees, mirrors):
    """All orientations of a phone: first the counterclockwise rotation, then the reflections."""
    stored = quartered(3)
    path = write(tmp_path / "turned.mp4", stored, display=(degrees, *mirrors))
    shown = np.rot90(stored, degrees // 90, axes=(1, 2))
    shown = shown[:, :: -1 if mirrors[1] else 1, :: -1 if mirrors[0] else 1]
    frames = io.read_video(path).frames
    assert frames.shape == shown.shape and io.probe(path)[2:] == shown.shape[1:3]
    assert np.abs(frames.astype(int) - shown).mean() < 6  # colors are blurred at the edges of quadrants
    ((_, window),) = io.iter_windows(path, 3)
    np.testing.assert_array_equal(window, frames)


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write a rotation")
def test_other_rotations_are_rounded_to_right_angles(tmp_path):
    path = write(tmp_path / "tilted.mp4", quartered(3), display=(70,))
    assert io.read_video(path).frames.shape[1:3] == (WIDTH, HEIGHT) == io.probe(path)[2:]
    path = write(tmp_path / "hardly.mp4", quartered(3), display=(20,))
    assert io.read_video(path).frames.shape[1:3] == (HEIGHT, WIDTH) == io.probe(path)[2:]


def test_videos_that_change_their_size(tmp_path):
    """All frames get the size of the first one. Video calls change their size if the connection changes."""
    parts = [
        write(tmp_path / f"{edge}.mjpeg", quartered(3, edge, edge), "mjpeg", "yuvj420p", container="mjpeg").read_bytes()
        for edge in (48, 96, 32)
    ]
    path = tmp_path / "call.mjpeg"
    path.write_bytes(b"".join(parts))
    frames = io.read_video(path).frames
    assert frames.shape == (9, 48, 48, 3) and numbers(frames) == [0, 1, 2] * 3
    truth = quartered(3, 48, 48)
    for row, column in ((8, 8), (8, 40), (40, 8), (40, 40)):
        assert np.abs(frames[:, row, column].astype(int) - truth[0, row, column]).max() < 12
    assert [frames.shape for _, frames in io.iter_windows(path, 4)] == [(4, 48, 48, 3)] * 3


TIMES = [0, 100, 200, 300, 400, 500, 2000, 2100, 9000, 9100]  # milliseconds


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "ffv1"), ("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_variable_frame_rates_are_sampled_by_index(tmp_path, name, codec):
    """Damage is not reported, because the last frame ends at the announced time."""
    path = write(tmp_path / name, quartered(10), codec, times=TIMES, options={"crf": "10"} if codec != "ffv1" else None)
    video = io.read_video(path)
    assert numbers(video.frames) == video.indices.tolist() == list(range(10)) and io.probe(path).num_frames == 10
    some = io.read_video(path, num_frames=5)
    assert numbers(some.frames) == some.indices.tolist() == [1, 3, 5, 7, 9]
    np.testing.assert_allclose(io.frame_times(path), np.array(TIMES) / 1000, atol=1e-6)


def test_frame_times_begin_at_zero(tmp_path):
    path = write(tmp_path / "late.mkv", quartered(3), times=[500, 600, 900])
    np.testing.assert_allclose(io.frame_times(path), [0, 0.1, 0.4], atol=1e-6)


def test_frame_times_without_timestamps_are_evenly_spaced(tmp_path):
    """AVI stores no timestamps, only the mean frame rate."""
    path = write(tmp_path / "a.avi", quartered(5), "mpeg4")
    np.testing.assert_allclose(io.frame_times(path), np.arange(5) / 10)


def test_explain_reports_the_times_of_variable_frame_rates(tmp_path, capsys):
    times = [int(100 * i + 3000 * (i >= 20)) for i in range(40)]
    path = write(tmp_path / "a.mkv", np.repeat(quartered(8), 5, axis=0), "ffv1", times=times)
    assert main(["explain", str(path), "--model", "tiny-videomae-pattern", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    truth = [times[index] / 1000 for index in result["frame_indices"]]
    np.testing.assert_allclose(result["frame_times"], truth, atol=1e-6)
    assert f"from {truth[0]:.2f} s to {truth[-1]:.2f} s" in capsys.readouterr().out
    page = (tmp_path / "out" / "player.html").read_text()
    assert f'"frame {result["frame_indices"][3]}"' in page  # without seconds, which would be index / fps


@in_one_case("reader")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("name", "codec"), [("none.mp4", "libx264"), ("none.mkv", "ffv1"), ("none.avi", "mpeg4")])
def test_a_stream_without_frames_is_rejected(tmp_path, name, codec, reader):
    path = hostile.without_frames(tmp_path / name, codec)
    with pytest.raises(
        ValueError,
        match=rf"{name}.*no video|none of the frames .* in .*{name}|in {name} contains no frames|streams in .*{name}",
    ):
        reader(path)


# ---------------------------------------------------------------- file names and types

NAMES = [
    "two words.mp4", "ünï ½.mp4", "-dash.mp4", "new\nline.mp4", "per%cent%03d.mp4", "*?[x].mp4", "pipe:0", "http:a.mp4",
    "concat:a.mp4|b.mp4", "file:a.mp4", "...mp4", "wrong.avi", "wrong.jpg", "wrong.txt", "none",
]  # fmt: skip


@in_one_case()
@pytest.mark.parametrize("name", NAMES)
def test_unusual_file_names_are_read(tmp_path, monkeypatch, name):
    """A name is not an option, a pattern or an address. The content decides the format, not the suffix."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "made.mp4", quartered(3)).rename(tmp_path / name)
    for path in (Path(name), tmp_path / name):
        assert numbers(io.read_video(path).frames) == [0, 1, 2]


@pytest.mark.parametrize("reader", READERS)
def test_pipes_and_devices_are_rejected(tmp_path, reader):
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match=rf"got a pipe or a device: .*{path.name}"):
            reader(path)


@in_one_case()
@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.ffconcat", "list.sdp", "list.mpd"])
def test_playlists_are_rejected_without_opening_connections(tmp_path, name):
    write(tmp_path / "part.ts", quartered(3), "mpeg2video")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        port = server.getsockname()[1]
        head = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n"
        for address in ("part.ts", f"http://127.0.0.1:{port}/part.ts"):
            text = {
                "list.ffconcat": f"ffconcat version 1.0\nfile {address}\n",
                "list.mp4": f"ffconcat version 1.0\nfile {address}\n",
                "list.sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
                f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
                "list.mpd": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet>'
                f"<Representation><BaseURL>{address}</BaseURL></Representation></AdaptationSet></Period></MPD>",
            }.get(name, f"{head}{address}\n#EXT-X-ENDLIST\n")
            (tmp_path / name).write_text(text)
            with pytest.raises(
                ValueError, match=rf"got a playlist .*{name}|{name}, which contains \d+ bytes but no video"
            ):
                io.read_video(tmp_path / name)
        with pytest.raises(BlockingIOError):
            server.accept()


# ---------------------------------------------------------------- headers


def test_header_text_may_be_invalid_unicode(tmp_path):
    path = write(tmp_path / "title.mkv", quartered(3), "ffv1", title="XXXXé")
    path.write_bytes(path.read_bytes().replace("XXXXé".encode(), b"XXXX\xe9\xe9"))
    assert numbers(io.read_video(path).frames) == [0, 1, 2] and io.probe(path).num_frames == 3


@pytest.mark.parametrize("garbled", [b"ab:cd:ef.3", b"nn:in:nan.", b"99:99:99.9"])
def test_an_invalid_duration_in_the_header(tmp_path, garbled):
    path = write(tmp_path / "long.mkv", quartered(3), "ffv1")
    path.write_bytes(path.read_bytes().replace(b"00:00:00.3", garbled))
    if garbled.startswith(b"99"):
        with pytest.warns(UserWarning, match=r"only 3 frames of .*long\.mkv .* header announces 362439\.90 s"):
            frames = io.read_video(path).frames
    else:
        frames = io.read_video(path).frames
    assert numbers(frames) == [0, 1, 2]


def test_large_headers_are_read(tmp_path):
    whole = write(tmp_path / "a.mkv", quartered(3), "ffv1", title="long " * 400_000)
    assert numbers(io.read_video(whole).frames) == [0, 1, 2]
    whole = io.write_video(tmp_path / "a.mp4", quartered(3), 10).read_bytes()
    spare = tmp_path / "spare.mp4"
    spare.write_bytes(whole + struct.pack(">I", 8 + 20_000_000) + b"free" + bytes(20_000_000))
    assert numbers(io.read_video(spare).frames) == [0, 1, 2]
    for box in (struct.pack(">I", 0x7FFFFFFF) + b"free", struct.pack(">I", 1) + b"free" + struct.pack(">Q", 2**62)):
        (tmp_path / "after.mp4").write_bytes(whole + box)
        assert numbers(io.read_video(tmp_path / "after.mp4").frames) == [0, 1, 2]
        (tmp_path / "before.mp4").write_bytes(box + whole)
        with pytest.raises(ValueError, match=r"before\.mp4, which contains \d+ bytes but no video"):
            io.read_video(tmp_path / "before.mp4")


@pytest.mark.parametrize("edge", [9000, 16000, 60000])
def test_frames_above_the_size_limit_are_rejected(tmp_path, edge):
    path = tmp_path / "vast.png"
    path.write_bytes(hostile.png(edge, edge) if edge < 60000 else hostile.png(64, 8).replace(b"\0\0\0@", b"\0\1\0\0"))
    assert path.stat().st_size < 50_000
    with pytest.raises(
        ValueError, match=r"pixels, got .* in the header of .*vast\.png|none of the frames .* in .*vast\.png"
    ):
        io.read_video(path)


def test_an_impossible_number_of_frames_is_corrected(tmp_path):
    """The AVI header announces two billion frames."""
    path = write(tmp_path / "a.avi", noise(6), "mjpeg", "yuvj420p")
    whole = path.read_bytes()
    at = whole.index(b"avih") + 8 + 16
    length = whole.index(b"strh") + 8 + 32
    many = struct.pack("<I", 2_000_000_000)
    path.write_bytes(whole[:at] + many + whole[at + 4 : length] + many + whole[length + 4 :])
    with pytest.warns(UserWarning, match="only 6 frames"):
        assert io.probe(path).num_frames == 6


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("outside", ["../secret.mp4", "inner/../../secret.mp4", "{folder}/secret.mp4"])
def test_tables_cannot_refer_to_files_outside_their_folder(tmp_path, outside):
    io.write_video(tmp_path / "secret.mp4", quartered(20), 10)
    folder = tmp_path / "videos"
    folder.mkdir()
    io.write_video(folder / "a.mp4", quartered(20), 10)
    name = outside.format(folder=tmp_path)
    (folder / "labels.csv").write_text(f"name,label\na.mp4,0\n{name},1\n")
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    with pytest.raises(ValueError, match=r"labels\.csv, line 3: .* inside the folder .* got '.*secret\.mp4'"):
        Videos(folder, folder / "labels.csv", clf)
