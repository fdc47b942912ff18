"""Load a video language model by its name: a bundled model, a local folder, or a model on the Hugging Face hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from captum_staa.models import preprocessing
from captum_staa.models.loading import HUB_OPTIONS, bundled_folder, not_cached, notice_in, on_hub

_WEIGHTS = Path(__file__).parent / "weights"
_OPTIONS = {"processor", "family", "fps", "preprocessing"}


def bundled_language_models() -> list[str]:
    """Return the names of the video language models bundled with this package."""
    return sorted(path.parent.name for path in _WEIGHTS.glob("*/config.json"))


def load_language_model(
    name_or_path: str | os.PathLike[str], options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model and its processor or tokenizer. Reads only safetensors, and never runs code.

    Args:
        name_or_path: name of a bundled model, a folder, or ``owner/name`` on the hub.
        options: options of ``VideoLanguageModel.from_pretrained``.

    Returns:
        The model, and keyword arguments of ``VideoLanguageModel``.

    Raises:
        TypeError: an option is unknown.
        ValueError: the model does not exist or has missing weights.
    """
    import transformers

    if unknown := set(options) - _OPTIONS - HUB_OPTIONS:
        raise TypeError(f"options must be among {sorted(_OPTIONS | HUB_OPTIONS)}, got {sorted(unknown)}")
    hub = {name: options[name] for name in HUB_OPTIONS & set(options)}
    settings = {name: options[name] for name in _OPTIONS & set(options)}
    name = os.fspath(name_or_path)
    if bundled_folder(name) is not None:
        raise ValueError(
            f"a video language model is needed, got the bundled video classifier {name!r}, which answers no questions. "
            f"Load it with VideoClassifier.from_pretrained, or pass one of {bundled_language_models()}."
        )
    folder = _WEIGHTS / name if name in bundled_language_models() else Path(os.path.expanduser(name))
    bundled = folder.resolve().parent == _WEIGHTS.resolve()
    settings["notice"] = notice_in(folder if folder.is_dir() else None)
    source = str(folder) if folder.is_dir() else name
    unreachable = ""
    if not folder.is_dir():
        hub, unreachable = on_hub(hub)
    files = {key: value for key, value in hub.items() if key != "attn_implementation"}
    try:
        # First the config: without a network, the search for adapters of PEFT would ask the hub again and again.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False, **files)
        # dtype of the file is not used: the weights are converted by the caller
        model, report = transformers.AutoModelForImageTextToText.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **hub
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if unreachable:
            raise ValueError(not_cached(name, unreachable)) from error
        raise ValueError(
            f"no video language model could be loaded from {name!r}: {reason[0]} It must contain config.json and "
            f"model.safetensors. A name on the hub requires a network connection or a filled cache. The bundled models "
            f"are {bundled_language_models()}."
        ) from error
    if missing := set(report["missing_keys"]) & {key for key, _ in model.named_parameters()}:
        raise ValueError(
            f"{name!r} has no weights for {sorted(missing)[:3]} ({len(missing)} in total), so its answers would be "
            f"random. Load a trained model with a language head."
        )
    if "processor" not in settings:
        settings["processor"] = _processor(source, files, tokenizer_only=bundled)
    if "preprocessing" not in settings and folder.is_dir() and not hasattr(settings["processor"], "video_processor"):
        try:
            settings["preprocessing"] = preprocessing.find(lambda file: p if (p := folder / file).is_file() else None)
        except ValueError:  # sizes of these processors depend on the video
            settings["preprocessing"] = None
    return model, settings


def _processor(source: str, files: dict[str, Any], tokenizer_only: bool) -> Any:
    """Return the processor, or the tokenizer if the processor needs packages that are not installed."""
    import transformers
    from transformers.utils import is_torchvision_available

    if is_torchvision_available() and not tokenizer_only:
        try:
            return transformers.AutoProcessor.from_pretrained(source, trust_remote_code=False, **files)
        except (ImportError, OSError, ValueError, KeyError, TypeError):
            pass
    return transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **files)
