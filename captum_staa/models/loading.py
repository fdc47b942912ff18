"""Finding a model by name: shipped with this package, in a local folder, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from captum_staa.models import preprocessing, resnet3d
from captum_staa.models.labels import in_order

_WEIGHTS = Path(__file__).parent / "weights"


def bundled_names() -> list[str]:
    """Names that ``VideoClassifier.from_pretrained`` finds without a network.

    Example:
        >>> bundled_names()[0], len(bundled_names())
        ('tiny-resnet3d-motion', 21)
    """
    return sorted(path.parent.name for path in _WEIGHTS.glob("*/config.json"))


def bundled_folder(name: str) -> Path | None:
    """The folder of a shipped model, or None where there is none of that name.

    Example:
        >>> bundled_folder("tiny-videomae-pattern").name
        'tiny-videomae-pattern'
        >>> bundled_folder("no-such-model") is None
        True
    """
    return _WEIGHTS / name if name in bundled_names() else None


HUB_OPTIONS = {"attn_implementation", "revision", "token", "cache_dir", "local_files_only"}
# Named here as well, because older releases of transformers miss some of them in AutoModelForVideoClassification.
_CLASSES = {
    "videomae": "VideoMAEForVideoClassification",
    "timesformer": "TimesformerForVideoClassification",
    "vivit": "VivitForVideoClassification",
    "vjepa2": "VJEPA2ForVideoClassification",
    "videoprism_vision_model": "VideoPrismForVideoClassification",
}


def load(
    name_or_path: str | os.PathLike[str], *, read_preprocessing: bool = True, **hub: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """The module, and what its folder says about it, as keywords of ``VideoClassifier``.

    Example:
        >>> load("no-such-model")
        Traceback (most recent call last):
        ValueError: there is no model 'no-such-model'; ...

    Args:
        name_or_path: a shipped name, a folder, or ``owner/name`` on the hub.
        read_preprocessing: look for the processor's files too.
        **hub: any of ``HUB_OPTIONS``.

    Raises:
        ValueError: there is no such model, it is no video classifier, or weights are missing from it.
        ImportError: the model needs transformers, which is not installed.
    """
    name = os.fspath(name_or_path)
    folder = _folder(name)
    if folder is None:
        return _transformers(name, hub), _hub_preprocessing(name, hub) if read_preprocessing else {}
    if not (folder / "config.json").is_file():
        held = sorted(path.name for path in folder.iterdir())[:10]
        raise ValueError(f"the folder {str(folder)!r} has no config.json, only {held}; save_pretrained writes one")
    config = _config(folder / "config.json")
    if reader := READERS.get(str(config.get("model_type"))):
        try:
            module, found = reader(folder)
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"config.json and model.safetensors in {str(folder)!r} hold no whole {config['model_type']} "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}); copy the folder again"
            ) from error
    else:
        module, found = _transformers(str(folder), hub), {}
    if not read_preprocessing:
        found.pop("preprocessing", None)
    elif "preprocessing" not in found:
        found["preprocessing"] = preprocessing.find(lambda file: p if (p := folder / file).is_file() else None)
    return module, found


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}; copy the model's folder again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} holds {type(config).__name__}, expected the settings of a model by name")
    return config


def _read_resnet3d(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edge = config.get("image_size")
    return resnet3d.from_pretrained(folder), {
        "layout": "BCTHW",
        "labels": in_order(config.get("id2label")),
        "num_frames": config.get("num_frames"),
        "image_size": (edge, edge) if isinstance(edge, int) else edge,
    }


# By the model_type in config.json: from a folder to the module and keywords of VideoClassifier. What is not here is a
# Hugging Face model. models/__init__.py adds the kinds that are themselves made of classifiers.
READERS: dict[str, Callable[[Path], tuple[nn.Module, dict[str, Any]]]] = {"resnet3d": _read_resnet3d}


def _folder(name: str) -> Path | None:
    """The local folder behind a name; None where the name can only be one on the hub."""
    if (shipped := bundled_folder(name)) is not None:
        return shipped
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and ".." not in parts and parts[0] != "." and parts[0][0] != "~":
        return None
    names = bundled_names()
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"there is no model {name!r}; looked for a folder of this name (in {os.getcwd()!r}) and a model "
        f"shipped under it. {hint}Shipped are {names}; a model on the hub is named 'owner/name'"
    )


def _transformers(name: str, hub: dict[str, Any]) -> nn.Module:
    """A Hugging Face video classifier from a folder or the hub: safetensors only, and never code from there."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{name!r} is a Hugging Face model: pip install transformers") from error
    files = {key: value for key, value in hub.items() if key != "attn_implementation"}
    try:
        # False, not None: without an answer transformers would ask on the terminal whether to run the code
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **files)
        kind = _CLASSES.get(config.model_type, "AutoModelForVideoClassification")
        model_class = getattr(transformers, kind, transformers.AutoModelForVideoClassification)
        model, report = model_class.from_pretrained(
            name, config=config, use_safetensors=True, output_loading_info=True, **hub
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"no video classifier could be loaded from {name!r}: {said[0]} Looked for config.json and "
            f"model.safetensors there (a hub name needs the network or a filled cache). Shipped are {bundled_names()}"
        ) from error
    # transformers fills missing weights with random numbers and only warns; explaining those would be nonsense. That
    # is a backbone without a head, but also releases 5.5.4 to 5.17, which drop the attention biases of every VideoMAE.
    # V-JEPA 2's predictor takes no part in classification.
    missing = set(report["missing_keys"]) & {key for key, _ in model.named_parameters()}
    if missing := {key for key in missing if ".predictor." not in key}:
        headless = any(not key.startswith(f"{model.base_model_prefix}.") for key in missing)
        fix = (
            "it is no fine-tuned classifier. Take one that is, or VideoClassifier(model) for one you train yourself"
            if headless
            else f"transformers {transformers.__version__} finds none in this file: pip install -U transformers"
        )
        raise ValueError(f"{name!r} has no weights for {sorted(missing)[:3]} ({len(missing)} in all): {fix}")
    return model


def _hub_preprocessing(name: str, hub: dict[str, Any]) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    files = {key: value for key, value in hub.items() if key != "attn_implementation"}

    def locate(file: str) -> str | None:
        try:
            return hf_hub_download(name, file, **files)
        except EntryNotFoundError:  # not there, or (offline) not in the cache
            return None

    return {"preprocessing": preprocessing.find(locate)}
