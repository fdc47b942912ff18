"""What several test files share."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: further threads only wait for each other


def pytest_collection_finish() -> None:
    """What is imported and collected stays: every search for garbage would look through half a million things."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """The folder of real clips, which never travel with the project; without it the test is skipped."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "videos"
    folder = Path(os.environ.get("CAPTUM_STAA_VIDEOS") or beside)
    if not folder.is_dir():
        pytest.skip(f"needs real clips: {folder} does not exist; set CAPTUM_STAA_VIDEOS to their folder")
    return folder


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted clip as a file, with margins that the model's crop cuts off."""
    from command_line import PLANTED, write_planted

    return write_planted(tmp_path_factory.mktemp("videos") / "planted.mp4", PLANTED)


@pytest.fixture(scope="session")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of 44 frames: more than one window."""
    from command_line import write_planted

    from captum_staa.benchmark import PlantedClips

    return write_planted(tmp_path_factory.mktemp("videos") / "long.mp4", PlantedClips(seed=1, n=1, num_frames=44))


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers alone, where pictures are not what is tested; they take most of the time."""
    from captum_staa.cli import output

    monkeypatch.setattr(output, "draw", lambda *args, **options: None)


@pytest.fixture
def ctrl_c_reaches_python() -> Iterator[None]:
    """A shell starts its background jobs with Ctrl-C ignored, and programs they start inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
