"""Figures are drawn without a window, and closed after each test."""

from collections.abc import Iterator

import matplotlib
import pytest
from matplotlib import pyplot


@pytest.fixture(autouse=True)
def headless() -> Iterator[None]:
    pyplot.close("all")  # figures of another backend
    matplotlib.use("Agg")
    yield
    pyplot.close("all")
