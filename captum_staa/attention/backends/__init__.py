"""Backends of ``capture``: one context manager for each way in which models compute attention."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from captum_staa.attention.backends.hf import hf_backend
from captum_staa.attention.backends.sdpa import CallMode, sdpa_backend
from captum_staa.attention.backends.softmax import softmax_backend
from captum_staa.attention.capture_state import CaptureState
from captum_staa.models.families import AttentionLayer

__all__ = ["BACKENDS", "CallMode"]

BACKENDS: dict[str, Callable[[nn.Module, AttentionLayer, CaptureState], AbstractContextManager[None]]] = {
    "softmax": softmax_backend,
    "hf": hf_backend,
    "sdpa": sdpa_backend,
}
