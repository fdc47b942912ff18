"""Run every Python block of README and docs."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from captum_staa import io
from captum_staa.benchmark import PlantedClips

ROOT = Path(__file__).parents[2]
OPTIONAL = ("torchvision", "peft")  # packages of users' models, which the tests do not install

# Larger steps in examples of methods that run the model for every region; a slow test runs the unchanged code.
LESS = {
    "(4, 12, 12), (2, 6, 6)": "(8, 24, 24), (8, 24, 24)",
    '(4, 12, 12), "strides": (4, 6, 6)': '(8, 24, 24), "strides": (8, 24, 24)',
    "sliding_window_shapes=(4, 12, 12),": "sliding_window_shapes=(8, 24, 24),",
    "strides=(2, 6, 6)": "strides=(8, 24, 24)",
    "steps=16": "steps=4",
}


def lessened(code):
    for old, new in LESS.items():
        code = code.replace(old, new)
    return code


def blocks():
    for path in sorted((ROOT / "docs").glob("*.md")):
        found = re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        for i, code in enumerate(found):
            less = lessened(code)
            yield pytest.param(less, id=f"{path.name}-{i}")
            if less != code:
                yield pytest.param(code, id=f"{path.name}-{i}-whole", marks=pytest.mark.slow)


@pytest.mark.parametrize("code", list(blocks()))
def test_code_block_runs(code, tmp_path, monkeypatch):
    for package in OPTIONAL:
        if re.search(rf"^from {package}\b", code, re.MULTILINE):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "block"})
    plt.close("all")


def test_code_fits_a_page_of_1280_pixels():
    wide = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for code in re.findall(r"```py(?:thon)?\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            wide += [f"{path.name}: {line}" for line in code.splitlines() if len(line) > 88]
    assert not wide


def test_readme_example_finds_the_evidence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 8
    io.write_video("video.mp4", PlantedClips(seed=12, n=20).frames(16), fps=8)
    exec(compile(code, "README.md", "exec"), {"__name__": "block"})
    (frame,) = re.findall(r"strongest frame: (\d+)", capsys.readouterr().out)
    _, _, truth = PlantedClips(seed=12, n=20)[16]
    assert truth[int(frame)].any()
    assert {path.name for path in tmp_path.iterdir()} == {"player.html", "video.mp4"}
