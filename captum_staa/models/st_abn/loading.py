"""An ST-ABN in a folder: config.json and model.safetensors, with the trunk or with the name of the model it is for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from captum_staa.models import preprocessing, zoo
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.resnet3d import ResNet3D, ResNet3DConfig
from captum_staa.models.slow_resnet import SlowResNet
from captum_staa.models.st_abn.build import BranchConfig
from captum_staa.models.st_abn.network import STABN

ADDED = ("branch.", "mechanism.")
TRUNKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "resnet3d": lambda config: ResNet3D(ResNet3DConfig(**config)),
    "slow_resnet": lambda config: SlowResNet(**config),
}


def save_pretrained(
    st_abn: STABN, folder: str | os.PathLike[str], *, base: str | None = None, half: bool = False
) -> None:
    """Write an ST-ABN, in the manner of Hugging Face.

    Args:
        st_abn: the network. Of one over a :class:`ResNet3D` or :class:`SlowResNet` all is written; of one injected into
            another model, what was added.
        folder: made if it is not there.
        base: name of that other model, for ``from_pretrained`` to find it again.
        half: store float16, half the size; it is float32 again when read.

    Raises:
        ValueError: the folder holds a model already, or the branch has a body of your own (keep its ``state_dict``).
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise ValueError(f"{str(folder)!r} holds a model already; name another folder, or delete it first")
    if st_abn.config.body == "own":
        raise ValueError("a branch with a body of yours cannot be built from a config: keep st_abn.state_dict()")
    trunk = _trunk(st_abn.model.module) if st_abn.config.mechanism == "mix" and base is None else None
    config = {
        "model_type": "st_abn",
        "architectures": ["STABN"],
        "trunk": trunk,
        "base": base,
        "branch": asdict(st_abn.config),
        "steps": st_abn.branch.steps,
        "id2label": {str(i): label for i, label in enumerate(st_abn.model.labels or [])},
    }
    dtype = torch.float16 if half else torch.float32
    kept = {name: value for name, value in st_abn.state_dict().items() if trunk or name.startswith(ADDED)}
    weights = {
        name: value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in kept.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.chmod(0o644)  # safetensors writes for the owner alone
    os.replace(part, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def from_pretrained(name_or_folder: str | os.PathLike[str], model: nn.Module | None = None) -> STABN:
    """Read what :func:`save_pretrained` wrote, or an ST-ABN shipped with this package: float32, in eval mode.

    Raises:
        ValueError: there is no such folder, it holds another kind of model, or its weights do not fit.
    """
    folder = zoo.folder(os.fspath(name_or_folder)) or Path(name_or_folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json of an ST-ABN in {os.fspath(name_or_folder)!r}; shipped are {zoo.names()}")
    stored: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (kind := stored.get("model_type")) != "st_abn":
        raise ValueError(f"model_type = {kind!r} in {str(folder)!r}, expected 'st_abn': VideoClassifier reads others")
    config = BranchConfig(**{f.name: stored["branch"][f.name] for f in fields(BranchConfig)})
    if stored["trunk"] is not None:
        trunk = stored["trunk"]["config"]
        frames = None if "num_frames" in trunk else stored["steps"]  # steps may be fewer than frames
        st_abn = STABN.__new__(STABN)
        labels = list(stored["id2label"].values()) or None
        st_abn._over(TRUNKS[stored["trunk"]["model_type"]](trunk), config, labels, frames)
        st_abn.model.preprocessing = preprocessing.find(
            lambda file: path if (path := folder / file).is_file() else None
        )
        if "image_size" in trunk:
            st_abn.model.image_size = (trunk["image_size"], trunk["image_size"])
    elif model is None and stored["base"] is None:
        raise ValueError(f"the branch in {str(folder)!r} is for a model of yours: from_pretrained(name, model=model)")
    else:
        st_abn = STABN.inject(
            VideoClassifier.from_pretrained(stored["base"]) if model is None else model,
            config.layer,
            mechanism=config.mechanism,
            width=config.width,
            maps=config.maps,
            temporal=config.temporal,
            dropout=config.dropout,
        )
    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    own = st_abn.state_dict()
    expected = {name for name in own if stored["trunk"] is not None or name.startswith(ADDED)}
    misfits = sorted(expected ^ set(weights)) or [n for n in expected if own[n].shape != weights[n].shape]
    if misfits:
        raise ValueError(
            f"the weights in {str(folder)!r} do not fit its config or this model: {misfits[:3]} ({len(misfits)} in all)"
        )
    st_abn.load_state_dict(weights, strict=False)
    return st_abn.eval()


def _trunk(trunk: nn.Module) -> dict[str, Any]:
    if isinstance(trunk, ResNet3D):
        return {"model_type": "resnet3d", "config": asdict(trunk.config)}
    if isinstance(trunk, SlowResNet):
        return {"model_type": "slow_resnet", "config": trunk.config}
    raise ValueError(f"a trunk of class {type(trunk).__name__} cannot be built from a config: keep st_abn.state_dict()")
