"""Folder of an ST-ABN: config.json and model.safetensors, with the trunk or with the name of its base model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from captum_staa.models.resnet3d import ResNet3D, ResNet3DConfig, SlowResNet
from captum_staa.models.st_abn.branch import BranchConfig

if TYPE_CHECKING:
    from captum_staa.models.st_abn.network import STABN

ADDED = ("branch.", "mechanism.")
TRUNKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "resnet3d": lambda config: ResNet3D(ResNet3DConfig(**config)),
    "slow_resnet": lambda config: SlowResNet(**config),
}


@dataclass(frozen=True)
class Stored:
    """The content of a folder.

    Attributes:
        folder: the folder.
        layer: name of the branch's layer.
        config: options of the branch.
        trunk: the 3D CNN, untrained; None if the branch was added to another model.
        frames: T of the clips, if the trunk does not define it.
        base: bundled name or folder of the base model to which the branch was added, or None.
        labels: one name per class, or None.
        image_size: ``(H, W)`` of the clips; that of the trunk if none was stored; or None.
        preprocessing: from frames to clips, or None.
        weights: of the whole network, or only of the added modules.
    """

    folder: Path
    layer: str
    config: BranchConfig
    trunk: nn.Module | None
    frames: int | None
    base: str | None
    labels: list[str] | None
    image_size: tuple[int, int] | None
    preprocessing: Preprocessing | None
    weights: dict[str, Tensor]

    def base_model(self) -> VideoClassifier:
        """Return the base model, loaded by its name, with the stored clip size and preprocessing.

        Raises:
            ValueError: the base model is not named.
        """
        if self.base is None:
            raise ValueError(
                f"the branch in {str(self.folder)!r} needs its base model, got no model and no stored name. Pass "
                f"model=your_model."
            )
        clips: dict[str, Any] = {"image_size": self.image_size, "preprocessing": self.preprocessing}
        known = {name: value for name, value in clips.items() if value is not None}
        return VideoClassifier.from_pretrained(self.base, **known)

    def fill(self, st_abn: STABN) -> None:
        """Load the weights into an ST-ABN that was built from :attr:`config`.

        Raises:
            ValueError: the weights do not fit the network.
        """
        current = st_abn.state_dict()
        whole = self.trunk is not None or self.config.mechanism == "bottleneck"
        expected = {name for name in current if whole or name.startswith(ADDED)}
        shapes = [
            name for name in sorted(expected & set(self.weights)) if current[name].shape != self.weights[name].shape
        ]
        if misfits := sorted(expected ^ set(self.weights)) or shapes:
            raise ValueError(
                f"the weights in {str(self.folder)!r} must fit its config and this model, got other names or shapes at "
                f"{misfits[:3]} ({len(misfits)} in all). Pass the model for which the branch was saved."
            )
        st_abn.load_state_dict(self.weights, strict=False)


def write(folder: Path, st_abn: STABN, base: str | None, half: bool) -> None:
    """Write config, weights and preprocessing, all or none. See :meth:`STABN.save_pretrained`."""
    model, config = st_abn.model, st_abn.config
    if (folder / "config.json").exists():
        raise ValueError(
            f"folder must not contain a model, got {str(folder)!r} with a config.json. Use another folder, or "
            f"delete it first."
        )
    if isinstance(config.body, nn.Module):
        raise ValueError(
            "the body of a saved branch must be built from its config, got a custom body. Save st_abn.state_dict() "
            "with torch.save instead."
        )
    if base is not None and not st_abn.injected:
        raise ValueError(
            f"base must be None for an ST-ABN with its own trunk, got {base!r}. Leave base out: only an "
            f"injected branch has a base model."
        )
    if not isinstance(model.preprocessing, Preprocessing | None):
        raise ValueError(
            f"st_abn.model.preprocessing must be a Preprocessing or None, got {type(model.preprocessing).__name__}, "
            f"which cannot be saved in a config. Set it to Preprocessing(...) or None."
        )
    stored = {
        "model_type": "st_abn",
        "architectures": ["STABN"],
        "trunk": None if st_abn.injected else _described(model.module),
        "base": base,
        "branch": {"layer": st_abn.layer, **asdict(config)},
        "steps": st_abn.branch.steps,
        "image_size": model.image_size,
        "id2label": {str(i): label for i, label in enumerate(model.labels or [])},
    }
    dtype = torch.float16 if half else torch.float32
    weights = {
        name: value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous().clone()
        for name, value in st_abn.state_dict().items()
        # the model behind a bottleneck is trained with it
        if not st_abn.injected or config.mechanism == "bottleneck" or name.startswith(ADDED)
    }
    # The config is written last, so that it exists only beside a complete model. Existing files of another processor
    # would be read as files of this model.
    with atomic_files(folder, ["model.safetensors", *preprocessing.FILES, "config.json"]) as part:
        save_tensors(save_file, weights, part / "model.safetensors", {"format": "pt"})
        if model.preprocessing is not None:
            _write_json(part / "preprocessor_config.json", model.preprocessing.to_config())
        _write_json(part / "config.json", stored)


def read(name_or_folder: str | os.PathLike[str]) -> Stored:
    """Return the content of a folder written by :func:`write`, or of an ST-ABN bundled with this package.

    Raises:
        ValueError: the folder does not exist, or it holds another kind of model or an incomplete one.
    """
    folder = bundled_folder(os.fspath(name_or_folder)) or Path(name_or_folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"name_or_folder must be a bundled model or a folder with a config.json of an ST-ABN, got "
            f"{os.fspath(name_or_folder)!r}. Bundled models are {bundled_names()}."
        )
    try:
        return _stored(folder)
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config.json and model.safetensors in {str(folder)!r} must hold a complete ST-ABN, got "
            f"{type(error).__name__}: {error}. Copy the folder again."
        ) from error


def _stored(folder: Path) -> Stored:
    try:
        stored: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(folder / 'config.json')!r} must be valid JSON, got the error: {error}. Copy the folder again."
        ) from error
    if (kind := stored.get("model_type")) != "st_abn":
        raise ValueError(
            f"model_type in {str(folder)!r} must be 'st_abn', got {kind!r}. Load other models with "
            f"VideoClassifier.from_pretrained."
        )
    described = stored["trunk"] or {"config": {}}
    edge = described["config"].get("image_size")
    size = stored.get("image_size") or (edge and (edge, edge))
    weights = load_file(folder / "model.safetensors")
    base = stored["base"]
    # Loading a folder must not download a model from the hub without the user's request.
    near = base is not None and (bundled_folder(base) is not None or Path(os.path.expanduser(base)).is_dir())
    return Stored(
        folder=folder,
        layer=stored["branch"]["layer"],
        config=BranchConfig(
            **{f.name: stored["branch"][f.name] for f in fields(BranchConfig) if f.name in stored["branch"]}
        ),
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
    raise ValueError(
        f"the trunk must be a ResNet3D or a SlowResNet to be saved with a config, got {type(trunk).__name__}. Save "
        f"st_abn.state_dict() with torch.save instead."
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
