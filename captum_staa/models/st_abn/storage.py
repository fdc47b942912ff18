"""An ST-ABN's folder: config.json and model.safetensors, with the trunk or with the name of the model it is for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from captum_staa.files import save_tensors, together
from captum_staa.models import preprocessing, zoo
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.models.resnet3d import ResNet3D, ResNet3DConfig
from captum_staa.models.slow_resnet import SlowResNet
from captum_staa.models.st_abn.build import BranchConfig

ADDED = ("branch.", "mechanism.")
TRUNKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "resnet3d": lambda config: ResNet3D(ResNet3DConfig(**config)),
    "slow_resnet": lambda config: SlowResNet(**config),
}


@dataclass(frozen=True)
class Stored:
    """What a folder holds.

    Attributes:
        folder: which.
        config: how the branch is built.
        trunk: the 3D CNN around it, untrained; None where it was added to another model.
        frames: T of the clips, where the trunk does not say it itself.
        base: shipped name or folder of that other model, where there is one.
        labels: a name per class, or None.
        image_size: ``(H, W)`` of the clips, or None.
        preprocessing: from frames to clips, or None.
        weights: of all, or of what was added.
    """

    folder: Path
    config: BranchConfig
    trunk: nn.Module | None
    frames: int | None
    base: str | None
    labels: list[str] | None
    image_size: tuple[int, int] | None
    preprocessing: Preprocessing | None
    weights: dict[str, Tensor]

    def fill(self, network: nn.Module) -> None:
        """Give the network its weights.

        Raises:
            ValueError: they do not fit it.
        """
        own = network.state_dict()
        expected = {name for name in own if self.trunk is not None or name.startswith(ADDED)}
        shapes = [name for name in sorted(expected & set(self.weights)) if own[name].shape != self.weights[name].shape]
        if misfits := sorted(expected ^ set(self.weights)) or shapes:
            raise ValueError(
                f"the weights in {str(self.folder)!r} do not fit its config or this model: {misfits[:3]} "
                f"({len(misfits)} in all)"
            )
        network.load_state_dict(self.weights, strict=False)


def write(
    folder: Path,
    network: nn.Module,
    config: BranchConfig,
    steps: int,
    trunk: nn.Module,
    labels: list[str] | None,
    base: str | None,
    half: bool,
) -> None:
    """Write config and weights, both or neither; :meth:`STABN.save_pretrained` says the rest."""
    if (folder / "config.json").exists():
        raise ValueError(f"{str(folder)!r} holds a model already; name another folder, or delete it first")
    if config.body == "own":
        raise ValueError("a branch with a body of yours cannot be built from a config: keep st_abn.state_dict()")
    described = _described(trunk) if config.mechanism == "mix" and base is None else None
    stored = {
        "model_type": "st_abn",
        "architectures": ["STABN"],
        "trunk": described,
        "base": base,
        "branch": asdict(config),
        "steps": steps,
        "id2label": {str(i): label for i, label in enumerate(labels or [])},
    }
    dtype = torch.float16 if half else torch.float32
    kept = {name: value for name, value in network.state_dict().items() if described or name.startswith(ADDED)}
    weights = {
        name: value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in kept.items()
    }
    # the config last: where it is, the model is whole
    with together(folder, ["model.safetensors", "config.json"], overwrite=True) as part:
        save_tensors(save_file, weights, part / "model.safetensors", {"format": "pt"})
        (part / "config.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")


def read(name_or_folder: str | os.PathLike[str]) -> Stored:
    """What :func:`write` wrote, in a folder or shipped with this package.

    Raises:
        ValueError: there is no such folder, or it holds another kind of model, or a part of one.
    """
    folder = zoo.folder(os.fspath(name_or_folder)) or Path(name_or_folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json of an ST-ABN in {os.fspath(name_or_folder)!r}; shipped are {zoo.names()}")
    try:
        return _stored(folder)
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config.json and model.safetensors in {str(folder)!r} hold no whole ST-ABN ({type(error).__name__}: "
            f"{error}); copy the folder again"
        ) from error


def _stored(folder: Path) -> Stored:
    try:
        stored: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(folder / 'config.json')!r} is no JSON: {error}") from error
    if (kind := stored.get("model_type")) != "st_abn":
        raise ValueError(f"model_type = {kind!r} in {str(folder)!r}, expected 'st_abn': VideoClassifier reads others")
    described = stored["trunk"] or {"config": {}}
    edge = described["config"].get("image_size")
    weights = load_file(folder / "model.safetensors")
    base = stored["base"]
    # a folder must not have a model fetched from the hub that its reader never asked for
    near = base is not None and (zoo.folder(base) is not None or Path(os.path.expanduser(base)).is_dir())
    return Stored(
        folder=folder,
        config=BranchConfig(**{f.name: stored["branch"][f.name] for f in fields(BranchConfig)}),
        trunk=TRUNKS[described["model_type"]](described["config"]) if stored["trunk"] else None,
        frames=None if "num_frames" in described["config"] else stored["steps"],  # steps may be fewer than frames
        base=base if near else None,
        labels=list(stored["id2label"].values()) or None,
        image_size=None if edge is None else (edge, edge),
        preprocessing=preprocessing.find(lambda file: path if (path := folder / file).is_file() else None),
        weights={name: value.float() if value.is_floating_point() else value for name, value in weights.items()},
    )


def _described(trunk: nn.Module) -> dict[str, Any]:
    if isinstance(trunk, ResNet3D):
        return {"model_type": "resnet3d", "config": asdict(trunk.config)}
    if isinstance(trunk, SlowResNet):
        return {"model_type": "slow_resnet", "config": trunk.config}
    raise ValueError(f"a trunk of class {type(trunk).__name__} cannot be built from a config: keep st_abn.state_dict()")
