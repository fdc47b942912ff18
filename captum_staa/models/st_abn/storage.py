"""An ST-ABN's folder: config.json and model.safetensors, with the trunk or with the name of the model it is for."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from captum_staa._utils.files import atomic_files, save_tensors
from captum_staa.models import preprocessing
from captum_staa.models.classifier import VideoClassifier, edges_of
from captum_staa.models.labels import in_order
from captum_staa.models.loading import bundled_folder, bundled_names
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.models.resnet3d import ResNet3D, ResNet3DConfig
from captum_staa.models.slow_resnet import SlowResNet
from captum_staa.models.st_abn.build import BranchConfig

ADDED = ("branch.", "mechanism.")
TRUNKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "resnet3d": lambda config: ResNet3D(ResNet3DConfig(**config)),
    "slow_resnet": lambda config: SlowResNet(**config),
}


class Branched(Protocol):
    """What is written of an ST-ABN."""

    model: VideoClassifier
    config: BranchConfig
    branch: Any
    injected: bool

    def state_dict(self) -> dict[str, Any]: ...


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
        image_size: ``(H, W)`` of the clips, the trunk's own where none was stored, or None.
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

    def base_model(self) -> VideoClassifier:
        """The model that the branch was added to, by its name, for clips as they were then.

        Raises:
            ValueError: it has no name.
        """
        if self.base is None:
            raise ValueError(f"the branch in {str(self.folder)!r} is for a model of yours: pass model=")
        clips: dict[str, Any] = {"image_size": self.image_size, "preprocessing": self.preprocessing}
        known = {name: value for name, value in clips.items() if value is not None}
        return VideoClassifier.from_pretrained(self.base, **known)

    @property
    def options(self) -> dict[str, Any]:
        """How the branch was added, as keywords of :meth:`STABN.inject`."""
        names = ("mechanism", "width", "maps", "temporal", "dropout")
        return {name: getattr(self.config, name) for name in names}

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


def write(folder: Path, network: Branched, base: str | None, half: bool) -> None:
    """Write config, weights and preprocessing, all or none; :meth:`STABN.save_pretrained` says the rest."""
    model, config = network.model, network.config
    if (folder / "config.json").exists():
        raise ValueError(f"{str(folder)!r} holds a model already; name another folder, or delete it first")
    if config.body == "own":
        raise ValueError("a branch with a body of yours cannot be built from a config: keep st_abn.state_dict()")
    if base is not None and not network.injected:
        raise ValueError(f"base={base!r} names what a branch was added to, but this one has a trunk; leave base out")
    if not isinstance(model.preprocessing, Preprocessing | None):
        raise ValueError(
            f"a preprocessing of class {type(model.preprocessing).__name__} cannot be built from a config: set "
            f"st_abn.model.preprocessing to a Preprocessing(...) or None"
        )
    stored = {
        "model_type": "st_abn",
        "architectures": ["STABN"],
        "trunk": None if network.injected else _described(model.module),
        "base": base,
        "branch": asdict(config),
        "steps": network.branch.steps,
        "image_size": model.image_size,
        "id2label": {str(i): label for i, label in enumerate(model.labels or [])},
    }
    dtype = torch.float16 if half else torch.float32
    weights = {
        name: value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous()
        for name, value in network.state_dict().items()
        if not network.injected or name.startswith(ADDED)
    }
    # The config last: where it is, the model is whole. Any other processor's file would be read as this model's.
    with atomic_files(folder, ["model.safetensors", *preprocessing.FILES, "config.json"]) as part:
        save_tensors(save_file, weights, part / "model.safetensors", {"format": "pt"})
        if model.preprocessing is not None:
            _write_json(part / "preprocessor_config.json", model.preprocessing.to_config())
        _write_json(part / "config.json", stored)


def read(name_or_folder: str | os.PathLike[str]) -> Stored:
    """What :func:`write` wrote, in a folder or shipped with this package.

    Raises:
        ValueError: there is no such folder, or it holds another kind of model, or a part of one.
    """
    folder = bundled_folder(os.fspath(name_or_folder)) or Path(name_or_folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"no config.json of an ST-ABN in {os.fspath(name_or_folder)!r}; shipped are {bundled_names()}")
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
    size = stored.get("image_size") or (edge and (edge, edge))
    weights = load_file(folder / "model.safetensors")
    base = stored["base"]
    # a folder must not have a model fetched from the hub that its reader never asked for
    near = base is not None and (bundled_folder(base) is not None or Path(os.path.expanduser(base)).is_dir())
    return Stored(
        folder=folder,
        config=BranchConfig(**{f.name: stored["branch"][f.name] for f in fields(BranchConfig)}),
        trunk=TRUNKS[described["model_type"]](described["config"]) if stored["trunk"] else None,
        frames=None if "num_frames" in described["config"] else stored["steps"],  # steps may be fewer than frames
        base=base if near else None,
        labels=in_order(stored["id2label"]),
        image_size=None if size is None else edges_of(size),
        preprocessing=preprocessing.find(lambda file: path if (path := folder / file).is_file() else None),
        weights={name: value.float() if value.is_floating_point() else value for name, value in weights.items()},
    )


def _described(trunk: nn.Module) -> dict[str, Any]:
    if isinstance(trunk, ResNet3D):
        return {"model_type": "resnet3d", "config": asdict(trunk.config)}
    if isinstance(trunk, SlowResNet):
        return {"model_type": "slow_resnet", "config": trunk.config}
    raise ValueError(f"a trunk of class {type(trunk).__name__} cannot be built from a config: keep st_abn.state_dict()")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
