"""Captum's private helpers. Only this file imports them, so a Captum release that moves one is fixed here."""

from captum._utils.common import (
    ExpansionTypes,
    _expand_additional_forward_args,
    _expand_target,
    _format_additional_forward_args,
    _format_output,
    _is_tuple,
    _run_forward,
    _select_targets,
)
from captum._utils.progress import NullProgress, progress
from captum._utils.typing import BaselineType
from captum._utils.typing import TargetType as IndexTarget
from captum.log import log_usage

TargetType = IndexTarget | str | list[str]  # labels, if the model knows them

__all__ = [
    "BaselineType",
    "ExpansionTypes",
    "NullProgress",
    "TargetType",
    "_expand_additional_forward_args",
    "_expand_target",
    "_format_additional_forward_args",
    "_format_output",
    "_is_tuple",
    "_run_forward",
    "_select_targets",
    "log_usage",
    "progress",
]
