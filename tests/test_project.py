"""Project rules: versions agree, imports have no side effects and follow the layers, the wheel is complete."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import matplotlib
import matplotlib.font_manager  # builds the font cache of matplotlib, which must exist before the audited import below
import pytest
from breakages import BREAKAGES
from source_files import MODULES, PACKAGE, ROOT, imported_names

import captum_staa
from captum_staa.benchmark.records import versions


def test_packages_import_only_from_lower_layers():
    """The contract is in pyproject.toml, under [tool.importlinter]."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_private_helpers_of_captum_are_imported_in_one_file():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in MODULES
        if path != PACKAGE / "_utils" / "captum.py"
        for line, name in imported_names(path, ROOT)
        if name.split(".")[0] == "captum" and any(part.startswith("_") for part in name.split(".")[1:])
    ]
    assert not found, "\n".join(["", *found])


def test_every_module_has_a_docstring():
    missing = [
        str(path.relative_to(ROOT)) for path in MODULES if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert not missing, f"modules without a docstring: {missing}"


def test_breakages_still_fit_the_code():
    """Each replaces a text that is in its file once (tests/_helpers/breakages.py)."""
    counts = {each.name: (PACKAGE / each.file).read_text("utf-8").count(each.old) for each in BREAKAGES}
    assert not (wrong := {name: count for name, count in counts.items() if count != 1}), wrong
    assert len(counts) == len(BREAKAGES) > 200, "two breakages have the same name"


# Runs in a new interpreter and records the side effects of `import captum_staa` with Python's audit events. The
# optional dependencies are hidden, so the test also checks that the core does not need them.
AUDIT = """
import json, os, sys
for optional in ("av", "skimage", "sklearn", "pytest"):
    sys.modules[optional] = None
seen = []
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "subprocess.Popen")
def hook(event, args):
    if event in NETWORK or event in CHANGES:
        seen.append((event, repr(args)))
    elif event == "open" and isinstance(args[2], int) and args[2] & WRITES and args[0] != os.devnull:
        seen.append((event, repr(args)))
sys.addaudithook(hook)
import {module}
print(json.dumps(seen))
"""


def audited_import(module: str, folder: Path) -> subprocess.CompletedProcess[str]:
    home, scratch = folder / "home", folder / "scratch"
    home.mkdir()
    scratch.mkdir()
    keep = {"PATH", "LD_LIBRARY_PATH", "SYSTEMROOT"}
    environment = {name: value for name, value in os.environ.items() if name in keep} | {
        "HOME": str(home),
        "TMPDIR": str(scratch),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]),
    }
    code = AUDIT.replace("{module}", module)
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_import_has_no_side_effects(tmp_path):
    done = audited_import("captum_staa", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    # matplotlib, which Captum imports, writes a font cache. torch._dynamo, which transformers imports, creates a
    # temporary folder. torch for CUDA runs ldconfig to find its libraries.
    known = (matplotlib.get_cachedir(), str(tmp_path / "scratch"), "ldconfig")
    seen = [(event, what) for event, what in json.loads(done.stdout) if not any(folder in what for folder in known)]
    assert seen == []
    assert list((tmp_path / "home").iterdir()) == []


@pytest.mark.parametrize(
    ("code", "event"),
    [
        ("open('note.txt', 'w').write('x')", "open"),
        ("import os; os.mkdir('cache')", "os.mkdir"),
        ("import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('127.0.0.1', 9))", "socket.connect"),
    ],
)
def test_audit_detects_side_effects(tmp_path, code, event):
    (tmp_path / "with_side_effect.py").write_text(f"import warnings; warnings.simplefilter('ignore')\n{code}\n")
    done = audited_import("with_side_effect", tmp_path)
    assert done.returncode == 0, done.stderr
    assert event in [name for name, _ in json.loads(done.stdout)]


def test_versions_agree():
    core = pytest.importorskip("hatchling.metadata.core")
    manager = pytest.importorskip("hatchling.plugin.manager")
    assert core.ProjectMetadata(str(ROOT), manager.PluginManager()).version == captum_staa.__version__
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert citation is not None
    assert citation[1] == captum_staa.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(rf"^## \[?{re.escape(captum_staa.__version__)}\b", changelog, re.MULTILINE)


def test_citation_file_is_readable():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["cff-version"]) == "1.2.0"
    assert {"message", "title", "authors", "version"} <= citation.keys()
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year", "url"} <= reference.keys(), reference
        assert all({"given-names", "family-names"} <= author.keys() for author in reference["authors"])
    assert [r["url"].rsplit("/")[-1] for r in citation["references"]] == ["2411.00630", "2109.00222", "2110.15574"]


def test_constraints_pin_every_dependency():
    requirements = pytest.importorskip("packaging.requirements")
    utils = pytest.importorskip("packaging.utils")
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {utils.canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = re.findall(r'"([A-Za-z0-9_.-]+>=[0-9.]+|furo)"', text)
    assert len(required) > 12, f"{required = }"
    assert not {utils.canonicalize_name(requirements.Requirement(entry).name) for entry in required} - pinned


@pytest.mark.slow
def test_the_wheel_contains_exactly_the_package(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 15_000_000
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert "captum_staa/py.typed" in names
    assert any(name.startswith("captum_staa/models/weights/") and name.endswith(".safetensors") for name in names)


def test_versions_name_what_the_numbers_depend_on():
    assert {"python", "captum_staa", "captum", "torch", "numpy", "transformers", "pillow", "av"} <= set(versions())
