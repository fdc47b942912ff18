"""Load a model by its name: a bundled model, a local folder, or a model on the Hugging Face hub."""

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
WEIGHT_FILES = {".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".pkl", ".onnx", ".pyth"}
TIMEOUT = 5  # seconds until the hub must answer


def bundled_names() -> list[str]:
    """Return the names of the models bundled with this package, which load without a network connection.

    Example:
        >>> bundled_names()[0], len(bundled_names())
        ('tiny-resnet3d-motion', 22)
    """
    return sorted(path.parent.name for path in _WEIGHTS.glob("*/config.json"))


def bundled_folder(name: str) -> Path | None:
    """Return the folder of a bundled model, or None if there is no bundled model with this name.

    Example:
        >>> bundled_folder("tiny-videomae-pattern").name
        'tiny-videomae-pattern'
        >>> bundled_folder("no-such-model") is None
        True
    """
    return _WEIGHTS / name if name in bundled_names() else None


def notice_in(folder: Path | None) -> str:
    """Return what the training record of a model says must be shown with its answers; an empty text without one.

    Example:
        >>> notice_in(bundled_folder("tiny-videomae-pattern"))
        'toy model, knows 3 synthetic patterns; its labels mean nothing on real video'

    Args:
        folder: the folder of a model; its record is the entry ``notice`` of ``training.json``.
    """
    try:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):  # a record of another program
        return ""
    return str(record.get("notice") or "") if isinstance(record, dict) else ""


HUB_OPTIONS = {"attn_implementation", "revision", "token", "cache_dir", "local_files_only"}
# Listed here because AutoModelForVideoClassification of older transformers releases does not know all of them.
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
    """Load a model. Returns the module, and keyword arguments of ``VideoClassifier`` that its folder specifies.

    Example:
        >>> load("no-such-model")
        Traceback (most recent call last):
        ValueError: there is no model 'no-such-model'. ...

    Args:
        name_or_path: name of a bundled model, a folder, or ``owner/name`` on the hub.
        read_preprocessing: whether to read the files of the processor.
        **hub: any of ``HUB_OPTIONS``.

    Raises:
        ValueError: the model does not exist, is not a video classifier, or has missing weights.
        ImportError: the model requires transformers, which is not installed.
    """
    name = os.fspath(name_or_path)
    folder = _folder(name)
    if folder is None:
        hub, unreachable = on_hub(hub)
        return _transformers(name, hub, unreachable), _hub_preprocessing(name, hub) if read_preprocessing else {}
    if not (folder / "config.json").is_file():
        files = sorted(path.name for path in folder.iterdir())[:10]
        raise ValueError(
            f"the folder {str(folder)!r} must contain config.json, got only {files}. save_pretrained writes it."
        )
    config = _config(folder / "config.json")
    if reader := READERS.get(str(config.get("model_type"))):
        try:
            module, settings = reader(folder)
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError) as error:
            raise ValueError(
                f"config.json and model.safetensors in {str(folder)!r} must contain a complete {config['model_type']}, "
                f"got {type(error).__name__}: {' '.join(str(error).split())[:300]}. Copy the folder again."
            ) from error
    else:
        _check_weights(folder)
        module, settings = _transformers(str(folder), hub), {}
    settings["notice"] = notice_in(folder)
    if not read_preprocessing:
        settings.pop("preprocessing", None)
    elif "preprocessing" not in settings:
        settings["preprocessing"] = preprocessing.find(lambda file: p if (p := folder / file).is_file() else None)
    return module, settings


def _check_weights(folder: Path) -> None:
    """Raise ValueError for a folder whose only weights are pickled, with the way to convert them."""
    if any(folder.glob("*.safetensors")) or not (pickled := sorted(folder.glob("pytorch_model*.bin"))):
        return
    raise ValueError(
        f"the folder {str(folder)!r} must contain model.safetensors, got {pickled[0].name}, which is a pickle and can "
        f"run code when it is read. If you trust the file, convert it once: model = "
        f"transformers.AutoModelForVideoClassification.from_pretrained({str(folder)!r}, use_safetensors=False); "
        f"model.save_pretrained(other_folder)."
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} must be a JSON file, got an error: {error}. Copy the folder of the model again."
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{str(path)!r} must contain a JSON object with the settings of a model, got {type(config).__name__}"
        )
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


# For each model_type in config.json, a function that reads a folder and returns the module and keyword arguments of
# VideoClassifier. Other types are Hugging Face models. models/__init__.py adds the types that need VideoClassifier.
READERS: dict[str, Callable[[Path], tuple[nn.Module, dict[str, Any]]]] = {"resnet3d": _read_resnet3d}


def _folder(name: str) -> Path | None:
    """Return the local folder of a model, or None if the name can only be a name on the hub."""
    if (bundled := bundled_folder(name)) is not None:
        return bundled
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        return path
    if path.is_file() or path.suffix in WEIGHT_FILES:
        raise ValueError(
            f"a model must be a folder with config.json and model.safetensors, a bundled model or a name on the hub, "
            f"got the file {name!r}: weights alone do not say which network they belong to. Build the network in "
            f"Python, and explain it there: net.load_state_dict(torch.load({path.name!r}, weights_only=True)), then "
            f"VideoClassifier(net, layout='BCTHW', labels=[...]). A model of transformers is saved as a folder by "
            f"save_pretrained(folder)."
        )
    parts = name.split("/")
    if len(parts) == 2 and all(parts) and ".." not in parts and parts[0] != "." and parts[0][0] != "~":
        return None
    names = bundled_names()
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"there is no model {name!r}. {hint}It is neither a folder (in {os.getcwd()!r}) nor a bundled model. "
        f"The bundled models are {names}. Models on the Hugging Face hub have names such as 'owner/name'."
    )


def on_hub(hub: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the options of a model on the hub, and why the hub cannot be reached; an empty text if it answers.

    Only the cache is read then. Otherwise transformers would ask the hub for each file again and again, for half a
    minute, before it takes a file from the cache or gives up.
    """
    if hub.get("local_files_only"):
        return hub, ""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of httpx or requests, depending on the release of huggingface_hub
        reason = " ".join(str(error).split()) or type(error).__name__
        return {**hub, "local_files_only": True}, f"{constants.ENDPOINT} cannot be reached ({reason})"
    return hub, ""


def not_cached(name: str, unreachable: str) -> str:
    """Return the message about a model that is neither in the cache nor on a hub that can be reached."""
    return (
        f"{name!r} must be a folder, or a model on the hub that can be downloaded, but {unreachable}, and the cache "
        f"has no complete copy of it. Connect to the network, or pass a folder with config.json and model.safetensors."
    )


def _transformers(name: str, hub: dict[str, Any], unreachable: str = "") -> nn.Module:
    """Load a Hugging Face video classifier from a folder or the hub. Reads only safetensors, and never runs code."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"loading {name!r} requires transformers. Install it with: pip install transformers"
        ) from error
    files = {key: value for key, value in hub.items() if key != "attn_implementation"}
    try:
        # False, not None: with None, transformers would ask on the terminal whether to run the code
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **files)
        kind = _CLASSES.get(config.model_type, "AutoModelForVideoClassification")
        model_class = getattr(transformers, kind, transformers.AutoModelForVideoClassification)
        model, report = model_class.from_pretrained(
            name, config=config, use_safetensors=True, output_loading_info=True, **hub
        )
    except Exception as error:  # transformers raises errors of many kinds for damaged files
        reason = (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
        if unreachable:
            raise ValueError(not_cached(name, unreachable)) from error
        if Path(name).is_dir():
            raise ValueError(
                f"no video classifier could be loaded from the folder {name!r}: {reason}. Its config.json and "
                f"model.safetensors must be those of a video classifier of transformers, and complete. Copy the folder "
                f"again, or load the model in Python and use VideoClassifier(model)."
            ) from error
        raise ValueError(
            f"no video classifier could be loaded from {name!r}: {reason}. It must contain config.json and "
            f"model.safetensors. A name on the hub requires a network connection or a filled cache. The bundled models "
            f"are {bundled_names()}."
        ) from error
    # transformers initializes missing weights at random and only warns, so an explanation would be meaningless. Weights
    # are missing in a backbone without a head, and in every VideoMAE with transformers 5.5.4 to 5.17, which drop its
    # attention biases. The predictor of V-JEPA 2 is not used for classification.
    missing = set(report["missing_keys"]) & {key for key, _ in model.named_parameters()}
    if missing := {key for key in missing if ".predictor." not in key}:
        headless = any(not key.startswith(f"{model.base_model_prefix}.") for key in missing)
        fix = (
            "It is not a fine-tuned classifier. Load a fine-tuned one, or train it and use VideoClassifier(model)."
            if headless
            else f"transformers {transformers.__version__} does not find them in the file. Update it with: pip install "
            f"-U transformers"
        )
        raise ValueError(f"{name!r} has no weights for {sorted(missing)[:3]} ({len(missing)} in total). {fix}")
    return model


def _hub_preprocessing(name: str, hub: dict[str, Any]) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    files = {key: value for key, value in hub.items() if key != "attn_implementation"}

    def locate(file: str) -> str | None:
        try:
            return hf_hub_download(name, file, **files)
        except EntryNotFoundError:  # the file does not exist, or (offline) is not in the cache
            return None

    return {"preprocessing": preprocessing.find(locate)}
