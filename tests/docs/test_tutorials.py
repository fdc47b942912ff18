"""Tests of the tutorials: their code runs without a warning, and the committed outputs belong to this code."""

from __future__ import annotations

import ast
import copy
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from covering import in_one_case

import captum_staa
from captum_staa import benchmark, io

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tutorials"
WEIGHTS = ROOT / "captum_staa" / "models" / "weights"
LANGUAGE_MODEL = ROOT / "captum_staa" / "models" / "video_language" / "weights" / "tiny-qwen2_5_vl"
DIGEST = runpy.run_path(str(FOLDER / "build.py"))["digest"]
LIMIT = 2 * 2**20  # bytes
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:[\w.-]+/)+[\w.-]*|\b[A-Z]:\\\w|file://")
SWAP = "## Swap in your checkpoint"
NAMES = ["01_explain_your_first_video", "02_methods_against_planted_truth", "03_is_my_explanation_faithful"]
NAMES += ["04_bring_your_own_model", "05_a_network_that_explains_itself", "06_which_frames_made_the_model_say_that"]
# Expressions that a reader writes into the swap cell; `clip.mp4` is in the working directory of the code.
VIDEO = {"checkpoint": repr(str(WEIGHTS / "tiny-videomae-pattern")), "video": '"clip.mp4"'}
ASKED = VIDEO | {"checkpoint": repr(str(LANGUAGE_MODEL)), "prompt": '"which pattern ?"'}
SWAPS = {
    **dict.fromkeys(NAMES, VIDEO),
    NAMES[3]: {"checkpoint": 'folder / "my_cnn.safetensors"'},
    NAMES[5]: ASKED,
}
# Replacements that make the code faster: fewer clips and steps. A slow test runs the unchanged code.
LESS = {
    NAMES[0]: {"sliding_window_shapes=(4, 12, 12), strides=(2, 6, 6)": "(8, 12, 12), (8, 12, 12)"},
    NAMES[1]: {
        "PlantedClips(seed=5, n=4)": "PlantedClips(seed=5, n=1)",
        "n_steps=12": "n_steps=2",
        "(4, 12, 12), (4, 6, 6)": "(8, 12, 12), (8, 12, 12)",
        "iterations=10": "iterations=2",
        "MetricOptions(steps=8)": "MetricOptions(steps=2)",
        '["STAA (relevance)", "IntegratedGradients", "VideoOcclusion"],  #': '["STAA (relevance)"],  #',
    },
    NAMES[2]: {
        "steps=16)\n    print(f": "steps=4)\n    print(f",
        "baselines=hiding, steps=8)": "baselines=hiding, steps=2)",
        "(4, 12, 12))": "(8, 16, 16))",
        '"n_steps": 10': '"n_steps": 2',
        "n_perturb_samples=20, normalize": "n_perturb_samples=4, normalize",
        "n_perturb_samples=3": "n_perturb_samples=1",
        "PlantedClips(seed=21, n=4)": "PlantedClips(seed=21, n=2)",
        "MetricOptions(steps=8)": "MetricOptions(steps=2)",
    },
    NAMES[3]: {
        "n=256": "n=64",
        "steps=48": "steps=4",
        "steps=40": "steps=4",
        "range(40)": "range(4)",
        "(4, 12, 12), (4, 6, 6)": "(8, 12, 12), (8, 12, 12)",
    },
    NAMES[4]: {"seed=3, n=12": "seed=3, n=2", "seed=seed, n=8": "seed=seed, n=2", "range(4)": "range(1)"},
    NAMES[5]: {"n_steps=8": "n_steps=2", "(4, 12, 12), (4, 6, 6)": "(8, 12, 12), (8, 12, 12)", "steps=16": "steps=4"},
}

# Runs in a new interpreter. Warnings during the import of third-party packages are not counted.
RUNNER = """
import json, sys, warnings
import matplotlib.pyplot as plt
import torch
import captum_staa
torch.set_num_threads(1)
warnings.simplefilter("error")
for name, cells in json.load(sys.stdin):
    namespace = {"__name__": "__main__"}
    for ident, source in cells:
        print(f"<{name}: {ident}>", flush=True)
        exec(compile(source, f"cell {ident} of {name}", "exec"), namespace)
        plt.close("all")
"""


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def code_of(notebook: dict[str, Any]) -> list[tuple[str, str]]:
    return [(cell["id"], "".join(cell["source"])) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def filled(source: str, values: dict[str, str]) -> str:
    """Return the swap cell with the values of a reader."""
    for variable, expression in values.items():
        source, count = re.subn(rf"(?m)^{variable} = None\b", lambda _, e=expression, v=variable: f"{v} = {e}", source)
        assert count == 1, f"the swap cell has no line `{variable} = None`"
    return source


def lessened(source: str, changes: dict[str, str], made: set[str]) -> str:
    """Return a cell with fewer clips and steps. The applied changes are added to ``made``."""
    for old, new in changes.items():
        if old in source:
            made.add(old)
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize(
    "names", [NAMES, *(pytest.param([name], marks=pytest.mark.slow) for name in NAMES)], ids=" ".join
)
def test_tutorial_code_and_swap_cell_run(names, tmp_path):
    """All tutorials with fewer clips and steps, in one interpreter; slow: each of them unchanged, in its own."""
    runs = []
    for name in names:
        cells = code_of(read(name))
        if names is NAMES:
            made: set[str] = set()
            cells = [(ident, lessened(source, LESS[name], made)) for ident, source in cells]
            assert made == set(LESS[name]), f"{name} has changed"
        swap = next(source for ident, source in cells if ident == "swap")
        runs.append([name, [*cells, ("swapped", filled(swap, SWAPS[name]))]])
    frames = benchmark.PlantedClips(seed=12, n=20).frames(16).repeat(4, axis=1).repeat(4, axis=2)
    shutil.copy(FOLDER / "nasa_film.mp4", tmp_path)
    (tmp_path / "files").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(runs),
        cwd=io.write_video(tmp_path / "clip.mp4", frames, fps=4).parent,
        env={
            **os.environ,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(tmp_path / "files"),
        },
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    for name in names:
        printed = run.stdout.split(f"<{name}: swapped>")[1].split("\n<")[0]
        assert printed.strip() or name == NAMES[0], f"the swap cell of {name} prints nothing"
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mp4", "nasa_film.mp4", "files"}, (
        "files in other folders"
    )


def outputs_of(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def private_names(source: str) -> list[str]:
    """Return private names of the package and private attributes in a piece of code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            found.append(node.attr)
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if "._" in f".{alias.name}"]
        if isinstance(node, ast.ImportFrom):
            public = None
            if (node.module or "").split(".")[0] == captum_staa.__name__:
                public = getattr(importlib.import_module(node.module), "__all__", None)
            for alias in node.names:
                hidden = "._" in f".{node.module}.{alias.name}"
                if hidden or (public is not None and alias.name not in public):
                    found.append(f"{node.module}.{alias.name}")
    return found


def faults(notebook: dict[str, Any]) -> list[str]:
    """Return the faults of a committed notebook, a few words each."""
    found = []
    outputs = outputs_of(notebook)
    written = json.dumps(notebook)
    text = "".join(
        "".join(part) if isinstance(part, list) else str(part)
        for output in outputs
        for part in (output.get("text", ""), *(v for k, v in output.get("data", {}).items() if "image" not in k))
    )
    if notebook["metadata"].get("captum_staa", {}).get("sources") != DIGEST(notebook):
        found.append("stale: run `make tutorials`")
    if not any("image/png" in output.get("data", {}) for output in outputs):
        found.append("no picture")
    if any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs):
        found.append("error")
    if any(cell["cell_type"] == "code" and cell["execution_count"] is None for cell in notebook["cells"]):
        found.append("not run")
    if path := ABSOLUTE.search(text + "\n".join(source for _, source in code_of(notebook))):
        found.append(f"path: {path.group()}")
    if len(written) > LIMIT:
        found.append("size")
    markdown = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    if not any(cell.startswith(SWAP) for cell in markdown) or "swap" not in dict(code_of(notebook)):
        found.append("no swap cell")
    if hidden := [name for _, source in code_of(notebook) for name in private_names(source)]:
        found.append(f"private: {hidden}")
    links = [link.split("#")[0] for cell in markdown for link in re.findall(r"\]\(([^)]+)\)", cell)]
    if lost := [link for link in links if "//" not in link and not (FOLDER / link).is_file()]:
        found.append(f"links: {lost}")
    return found


@in_one_case()
@pytest.mark.parametrize("name", NAMES)
def test_committed_notebook_has_no_faults(name):
    assert faults(read(name)) == []


def test_folder_has_exactly_these_tutorials():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


def _break(notebook: dict[str, Any], how: str) -> None:
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code" and cell["outputs"])
    text = next(cell for cell in notebook["cells"] if "".join(cell["source"]).startswith(SWAP))
    breakages = {
        "stale": lambda: code["source"].append("\n1"),
        "no picture": lambda: [output.get("data", {}).pop("image/png", None) for output in outputs_of(notebook)],
        "error": lambda: code["outputs"].append({"output_type": "error", "ename": "ValueError"}),
        "not run": lambda: code.update(execution_count=None),
        "path": lambda: code["outputs"].append(
            {"output_type": "stream", "name": "stdout", "text": ["in /srv/me/clip.mp4"]}
        ),
        "size": lambda: text["source"].append("x" * LIMIT),
        "no swap cell": lambda: text.update(source=["## Something else"]),
        "private": lambda: code["source"].append("\nfrom captum_staa.attr import _base"),
        "links": lambda: text["source"].append("[gone](../docs/gone.md)"),
    }
    breakages[how]()


@in_one_case()
@pytest.mark.parametrize(
    "how", ["stale", "no picture", "error", "not run", "path", "size", "no swap cell", "private", "links"]
)
def test_faults_finds_a_broken_notebook(how):
    notebook = copy.deepcopy(read(NAMES[0]))
    _break(notebook, how)
    assert any(fault.startswith(how) for fault in faults(notebook))


@in_one_case()
@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("from captum_staa.attr._base import one_clip", True),
        ("import captum_staa._utils.captum", True),
        ("from captum_staa.metrics import Array", True),  # exists, but is not in __all__
        ("clf._check(clip)", True),
        ("from captum_staa import STAA, metrics\nfrom captum_staa.models.preprocessing import Preprocessing", False),
        ("class A:\n    def __init__(self):\n        super().__init__()", False),
    ],
)
def test_private_names_finds_private_names(source, private):
    assert bool(private_names(source)) == private
