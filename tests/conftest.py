"""What several test files share."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: further threads only wait for each other


@pytest.fixture(scope="session")
def shared_videos() -> Path:
    """The folder of real clips, which never travel with the project; without it the test is skipped."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "videos"
    folder = Path(os.environ.get("CAPTUM_STAA_VIDEOS") or beside)
    if not folder.is_dir():
        pytest.skip(f"needs real clips: {folder} does not exist; set CAPTUM_STAA_VIDEOS to their folder")
    return folder
