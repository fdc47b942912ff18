"""One random call, and its outcome: right, a clear error, or wrong."""

from __future__ import annotations

import linecache
import random
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import snapshot
from torch import Tensor, nn

import captum_staa

PACKAGE = Path(captum_staa.__file__).parent
ABSENT = object()  # in place of an argument that is not passed
RIGHT, CLEAR, WRONG = "right", "clear error", "wrong"
CLEAR_ERRORS = (TypeError, ValueError, NotImplementedError)
INTENDED = ("ignores its attention", "does not use its gates", "learning stopped")  # intended warnings of the library


@dataclass(frozen=True)
class Call:
    """A call of one entry point.

    Attributes:
        description: name of the call in the report.
        run: the call.
        check: raises AssertionError if a result is wrong. Every result must pass it.
        must_fail: whether every result would be wrong.
        changed: name and value of the malformed argument; None for a valid call, which must not raise an error.
        refusals: texts of errors that a valid call may raise, because the requested result may be impossible.
        inputs: tensors of the caller, which must not change.
        models: modules of the caller, which must not change.
    """

    description: str
    run: Callable[[], Any]
    check: Callable[[Any], None]
    must_fail: bool = False
    changed: tuple[str, Any] | None = None
    refusals: tuple[str, ...] = ()
    inputs: tuple[Any, ...] = ()
    models: tuple[nn.Module, ...] = field(default=(), repr=False)


def judge(call: Call) -> tuple[str, str]:
    """Run a call. Return its outcome, and the reason if it is wrong."""
    before = _world(call)
    error: BaseException | None = None
    result = None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            result = call.run()
        except Exception as raised:
            error = raised
    if left := _differences(before, _world(call)):
        return WRONG, f"{call.description}: left behind: {left}"
    if strange := [str(w.message) for w in seen if not any(text in str(w.message) for text in INTENDED)]:
        return WRONG, f"{call.description}: warned: {strange[0]}"
    if error is not None:
        return _of_error(call, error)
    if call.must_fail:
        return WRONG, f"{call.description}: accepted, and gave {_shown(result)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.check(result)
    except AssertionError as complaint:
        return WRONG, f"{call.description}: {complaint}"
    except Exception as error:  # of a twin of the call
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename}:{where.lineno}"
        return WRONG, f"{call.description}: a twin raised {type(error).__name__}: {error} at {place}"
    return RIGHT, ""


def _of_error(call: Call, error: Exception) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    refused = any(refusal in str(error) for refusal in call.refusals)
    if call.changed is None and not refused:
        return WRONG, f"{call.description}: a valid call raised {text} at {where}"
    if not isinstance(error, CLEAR_ERRORS):
        return WRONG, f"{call.description}: {text} at {where}"
    if not _intended(error):
        return WRONG, f"{call.description}: an error by accident: {text} at {where}"
    if call.changed is not None and not refused and not _names(str(error), *call.changed):
        return WRONG, f"{call.description}: names neither the value nor the argument: {text} at {where}"
    return CLEAR, ""


def _intended(error: BaseException) -> bool:
    """Return whether the library raised the error itself, and not Python or torch in one of its lines."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    if "unexpected keyword argument" in str(error) or "required positional argument" in str(error):
        return True
    inside = Path(last.filename).is_relative_to(PACKAGE)
    return inside and linecache.getline(last.filename, last.lineno or 0).strip().startswith("raise")


def _names(message: str, name: str, value: Any) -> bool:
    words = {name, type(value).__name__, repr(value), str(value)}
    if isinstance(value, Tensor):
        words |= {str(tuple(value.shape)), str(value.dtype), str(value.device), str(value.layout)}
        words |= {"nan", "infinit"} if value.is_floating_point() else {" ids "}
    if isinstance(value, np.ndarray):
        words |= {str(value.shape), str(value.dtype)}
    if isinstance(value, (list, tuple)):
        words |= {f"got {len(value)}", *(word for part in value for word in (repr(part), type(part).__name__))}
        words |= {str(tuple(part.shape)) for part in value if isinstance(part, Tensor)}
    return any(word and word in message for word in words)


def _world(call: Call) -> dict[str, Any]:
    """Return the state that a call must not change."""
    state: dict[str, Any] = {
        "torch's random state": torch.get_rng_state().tolist(),
        "numpy's random state": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "Python's random state": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    for i, model in enumerate(call.models):
        state |= {f"model {i} {key}": value for key, value in snapshot(model).items()}
    for i, value in enumerate(call.inputs):
        if isinstance(value, Tensor):
            state[f"input {i}"] = (value._version, value.requires_grad, None if not value.is_leaf else value.grad)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            state[f"input {i}"] = value.tobytes()
    return state


def _differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    return ", ".join(key for key in before if before[key] != after.get(key))


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} in {value.flatten()[:4].tolist() if value.numel() else []}"
    return repr(value)[:200]
