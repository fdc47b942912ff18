"""Fixtures of several test files."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, so more threads are slower


def pytest_collection_finish() -> None:
    """Freeze the imported and collected objects, so that garbage collection does not scan half a million objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """Return the folder of real clips, which are not part of the project. Without it, the test is skipped."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "videos"
    folder = Path(os.environ.get("CAPTUM_STAA_VIDEOS") or beside)
    if not folder.is_dir():
        pytest.skip(f"needs real clips, but {folder} does not exist. Set CAPTUM_STAA_VIDEOS to their folder.")
    return folder


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a planted clip, with margins that the crop of the model cuts off."""
    from command_line import PLANTED, write_planted

    return write_planted(tmp_path_factory.mktemp("videos") / "planted.mp4", PLANTED)


@pytest.fixture(scope="session")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a planted clip of 44 frames, which is more than one window."""
    from command_line import write_planted

    from captum_staa.benchmark import PlantedClips, SceneOptions

    return write_planted(
        tmp_path_factory.mktemp("videos") / "long.mp4", PlantedClips(seed=1, n=1, scene=SceneOptions(num_frames=44))
    )


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn off pictures, which take most of the time, in tests of numbers."""
    from captum_staa.cli import output

    monkeypatch.setattr(output, "draw", lambda *args, **options: None)


@pytest.fixture
def ctrl_c_reaches_python() -> Iterator[None]:
    """Restore Python's handler of Ctrl-C, which background jobs of a shell ignore, and their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
