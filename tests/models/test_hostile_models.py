"""Models from untrusted folders: only safetensors are read, no code is run, and no network connection is opened."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from covering import in_one_case, over_values
from safetensors.torch import load_file, save_file

from captum_staa import VideoClassifier
from captum_staa.models import STABN
from captum_staa.models.loading import bundled_folder, bundled_names
from captum_staa.models.resnet3d import ResNet3D, save_pretrained

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for folder in ("captum_staa", "benchmarks", "docs", "tests") for path in (ROOT / folder).rglob("*.py")]
CHECKED = ("captum_staa", "benchmarks")  # tests and docs run their examples with exec
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
READS = {("torch", "load"), ("torch", "jit"), ("hub", "load")}


def risks(source: str) -> list[str]:
    """Return statements that can run untrusted code: pickles, and code from the hub."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in ("eval", "exec"):
                found.append(called.id)
            if isinstance(called, ast.Attribute):
                owner = (
                    called.value.attr if isinstance(called.value, ast.Attribute) else getattr(called.value, "id", "")
                )
                if (owner, called.attr) in READS:
                    found.append(f"{owner}.{called.attr}")
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (keyword.arg, value) in {
                    ("trust_remote_code", True),
                    ("use_safetensors", False),
                    ("allow_pickle", True),
                }:
                    found.append(f"{keyword.arg}={value}")
                if keyword.arg == "trust_remote_code" and not isinstance(keyword.value, ast.Constant):
                    found.append("trust_remote_code")
    return found


def test_no_source_file_reads_pickles_or_runs_code_from_the_hub():
    texts = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in SOURCES}
    assert sum(name.startswith(CHECKED) for name in texts) > 100
    assert {name: found for name, text in texts.items() if name.startswith(CHECKED) and (found := risks(text))} == {}
    code_of_the_hub = {name: risks(text) for name, text in texts.items() if "trust_remote_code" in text}
    assert not [risk for found in code_of_the_hub.values() for risk in found if "trust" in risk]


RISKY = [
    "import pickle",
    "from joblib import load",
    "torch.load('a')",
    "torch.hub.load('a', 'b')",
    "f(trust_remote_code=True)",
    "f(trust_remote_code=option)",
    "f(use_safetensors=False)",
    "np.load('a', allow_pickle=True)",
    "eval('1')",
]


@in_one_case()
@pytest.mark.parametrize("source", RISKY)
def test_risks_finds_each_risk(source):
    assert len(risks(source)) == 1
    assert risks("f(trust_remote_code=False, use_safetensors=True); load_file('a'); model.eval()") == []


# ---------------------------------------------------------------- damaged and invalid folders


def resnet(folder: Path) -> None:
    save_pretrained(ResNet3D(2, width=4, stages=2, num_frames=4, image_size=16), folder, ["a", "b"])


def st_abn(folder: Path) -> None:
    STABN(2, ResNet3D(2, width=4, num_frames=4, image_size=16), body="light").save_pretrained(folder)


def videomae(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"image_size": 16, "num_frames": 4, "num_hidden_layers": 1, "intermediate_size": 16, "patch_size": 8}
    config = transformers.VideoMAEConfig(**sizes, hidden_size=24, num_attention_heads=2, num_labels=2)
    transformers.VideoMAEForVideoClassification(config).save_pretrained(folder)


KINDS: dict[str, Callable[[Path], None]] = {"resnet3d": resnet, "st_abn": st_abn, "videomae": videomae}


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


VAST = b'{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4]}}'
WEIGHTS = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a header longer than the file": header(b"{}", 2**62),
    "all ones": b"\xff" * 64,
    "no JSON": header(b"{'a': " * 10),
    "a tensor larger than the file": header(VAST) + b"\0" * 4,
    "no tensor": header(b"{}"),
    "a web page": b"<!DOCTYPE html><html>404</html>",
    "a pickle": b"\x80\x04\x95" + b"\0" * 64,
}


@over_values
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_invalid_weights_are_rejected(tmp_path, kind, weights):
    KINDS[kind](tmp_path)
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS[weights])
    with pytest.raises(ValueError, match=tmp_path.name):
        VideoClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_weights_and_wrong_shapes_are_rejected(tmp_path, kind):
    KINDS[kind](tmp_path)
    path = tmp_path / "model.safetensors"
    whole, weights = path.read_bytes(), load_file(path)
    for part in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:part])
        with pytest.raises(ValueError, match=tmp_path.name):
            VideoClassifier.from_pretrained(tmp_path)
    name = max(weights, key=lambda name: weights[name].numel())
    save_file({**weights, name: torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=r"."):
        VideoClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_pickled_weights_are_not_loaded(tmp_path, kind):
    KINDS[kind](tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.safetensors.pkl"):
        torch.save(weights, tmp_path / name)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        VideoClassifier.from_pretrained(tmp_path)


@in_one_case()
@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '"resnet3d"', "[" * 100_000, "\udcff"])
def test_invalid_configs_are_rejected(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"config\.json"):
        VideoClassifier.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["resnet3d", "st_abn"])
def test_incomplete_configs_are_rejected(tmp_path, kind):
    KINDS[kind](tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("num_classes", "trunk", "branch"):
        if name in config:
            path.write_text(json.dumps({key: value for key, value in config.items() if key != name}))
            with pytest.raises(ValueError, match=r"config\.json"):
                VideoClassifier.from_pretrained(tmp_path)


@in_one_case()
@pytest.mark.parametrize(
    "name",
    ["../../etc", "..", "/etc", "tiny/../../etc", "./../weights", "~nobody/x", "~noone/x", "x/..", "a/../b", "\0"],
)
def test_paths_with_parent_folders_are_rejected(tmp_path, monkeypatch, name):
    """A name is a bundled model, an existing folder, or a hub name. A path cannot reach the weights of the package."""
    monkeypatch.chdir(tmp_path)
    assert bundled_folder(name) is None and bundled_folder(f"../weights/{bundled_names()[0]}") is None
    with pytest.raises(ValueError, match=r"no model|must contain config\.json"):
        VideoClassifier.from_pretrained(name)


OFFLINE = """
import json, os, sys
calls = []
def hook(event, arguments):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        calls.append(event)
        raise RuntimeError(f"{event}: no connection is allowed")
sys.addaudithook(hook)
import warnings
warnings.simplefilter("ignore")
from captum_staa import VideoClassifier
errors = []
for name in sys.argv[1:]:
    try:
        VideoClassifier.from_pretrained(name)
        errors.append("")
    except (ValueError, OSError) as error:
        errors.append(str(error))
print(json.dumps([errors, calls]))
"""


def test_loading_opens_no_connection_and_runs_no_code(tmp_path):
    """Bundled models, folders, folders without a processor, a folder with code, and a folder that refers to the hub."""
    folders = {name: tmp_path / name for name in (*KINDS, "code", "named")}
    for kind, make in KINDS.items():
        make(folders[kind])
    videomae(folders["code"])
    config = json.loads((folders["code"] / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForVideoClassification": "evil.M"},
    }
    (folders["code"] / "config.json").write_text(json.dumps(config))
    (folders["code"] / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass M: pass\n"
    )
    clf = VideoClassifier.from_pretrained(folders["resnet3d"])
    STABN.inject(clf, "stages.0").save_pretrained(folders["named"], base="owner/missing")
    names = ["tiny-resnet3d-pattern", *map(str, folders.values())]
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = keep | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", OFFLINE, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    errors, calls = json.loads(done.stdout.splitlines()[-1])
    assert calls == [] and not (tmp_path / "ran").exists()
    assert errors[:4] == [""] * 4
    assert "no video classifier could be loaded" in errors[4] and "ass model=" in errors[5]
