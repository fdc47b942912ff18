"""Bundled models that several files compare methods on."""

import pytest

from captum_staa import VideoClassifier


@pytest.fixture(scope="module")
def clf() -> VideoClassifier:
    return VideoClassifier.from_pretrained("tiny-videomae-pattern")


@pytest.fixture(scope="module")
def cnn() -> VideoClassifier:
    return VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
