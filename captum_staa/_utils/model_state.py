"""Context managers that change the state of a model and restore it: eval mode, frozen parameters, no compiling, ...

All of them can be nested, and can be used by several threads that share a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from inspect import signature
from threading import Lock
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from captum_staa._utils.checks import check_choice
from captum_staa._utils.networks import inplace_explained, networks_of, random_draws_reported
from captum_staa._utils.tensors import version_of

P = ParamSpec("P")
R = TypeVar("R")


class _Saved(NamedTuple):
    """The state of one module before a block: its mode, and its buffers with their versions and values."""

    training: bool
    buffers: dict[str, tuple[Tensor, int | None, Tensor]]


# One item per open block, in the order in which the blocks were entered. If two threads share a model, the first thread
# that leaves its block must not set the other thread's modules to training.
_open: list[dict[nn.Module, _Saved]] = []
_modes_lock = Lock()
_as_is: ContextVar[bool] = ContextVar("captum_staa_model_state", default=False)


@contextmanager
def model_state(state: Literal["eval", "as_is"]) -> Iterator[None]:
    """Context manager that sets in which mode methods, metrics and streams run the model, in this thread.

    Example:
        >>> from captum_staa import STAA, VideoClassifier
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clip = torch.rand(1, 16, 3, 48, 48)
        >>> with model_state("as_is"):  # dropout is active if the model is in train mode, for Monte Carlo dropout
        ...     maps = [STAA(clf.train(), mode="attention").attribute(clip) for sample in range(3)]

    Args:
        state: ``"eval"``, the default outside the block, runs all modules in eval mode. ``"as_is"`` leaves each module
            in the mode in which it is. Buffers, such as the running statistics of a BatchNorm, are restored in both.
    """
    check_choice("state", state, ("eval", "as_is"))
    token = _as_is.set(state == "as_is")
    try:
        yield
    finally:
        _as_is.reset(token)


@contextmanager
def eval_mode(forward_func: object, *, restore_buffers: bool = True) -> Iterator[None]:
    """Set the networks of a forward function to eval mode inside the block, and restore modes and buffers afterwards.

    Only the flag ``training`` is set: ``train()`` and ``eval()`` of some modules also change weights.

    Args:
        forward_func: a module, or a function that uses modules (see :func:`networks_of`).
        restore_buffers: if False, buffers keep the values that they get inside the block, as for training.
    """
    modules = [module for network in networks_of(forward_func) for module in network.modules()]
    with _modes_lock:
        before = {module: _state_of(module, restore_buffers) for module in modules}
        _open.append(before)
        if not _as_is.get():
            for module in modules:
                if module.training:
                    module.training = False
    try:
        with _differentiable_rnns(modules):
            yield
    finally:
        with _modes_lock:
            at = next(index for index, block in enumerate(_open) if block is before)
            _, *later = _open[at:]
            del _open[at]
            for module, state in before.items():
                still_open = next((block for block in later if module in block), None)
                if still_open is None:
                    _restore(module, state)
                else:  # the last block to leave restores the state
                    still_open[module] = state


def in_eval_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator that runs a method of an ``Attribution``, or a function of ``forward_func``, in :func:`eval_mode`.

    It also explains torch's error about models that cannot be differentiated because they work in place, and warns
    about models that draw random numbers in eval mode. A ``target`` of labels becomes one of class indices, if
    ``forward_func`` knows them.
    """
    names = list(signature(function).parameters)
    place = names.index("target") if "target" in names else None

    @wraps(function)
    def run(*given: P.args, **options: P.kwargs) -> R:
        explained = given[0] if given else options.get("forward_func")
        forward_func: Any = getattr(explained, "forward_func", explained)
        args: Any = given
        kwargs: Any = options
        if place is not None and len(given) > place:
            args = (*given[:place], known_target(given[place], forward_func), *given[place + 1 :])
        elif "target" in options:
            kwargs = {**options, "target": known_target(options["target"], forward_func)}

        def again() -> Any:
            inputs: Any = args[1] if len(args) > 1 else kwargs["inputs"]
            inputs = inputs if isinstance(inputs, tuple) else (inputs,)
            extra: Any = kwargs.get("additional_forward_args")
            extra = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
            return forward_func(*(part.detach().clone().requires_grad_() for part in inputs), *extra)

        with eval_mode(forward_func), inplace_explained(forward_func, again):
            if _as_is.get():
                return function(*args, **kwargs)
            with random_draws_reported(forward_func, again):
                return function(*args, **kwargs)

    return run


def known_target(target: Any, model: object) -> Any:
    """Return :func:`class_indices`, checked by the model if it has a method ``check_target``."""
    indices = class_indices(target, model)
    check = getattr(uncompiled(model) if isinstance(model, nn.Module) else model, "check_target", None)
    if check is not None:
        check(indices)
    return indices


def class_indices(target: Any, model: object) -> Any:
    """Return ``target`` with each label replaced by its class index. Other targets are returned as they are.

    Example:
        >>> from captum_staa import VideoClassifier
        >>> clf = VideoClassifier(nn.Linear(1, 2), layout="BCTHW", labels=["waving", "jumping"])
        >>> class_indices("jumping", clf), class_indices(["jumping", "waving"], clf), class_indices(1, clf)
        (1, [1, 0], 1)

    Args:
        target: as in Captum, with labels in the place of class indices.
        model: a model with a method ``class_index``, such as a ``VideoClassifier``.

    Raises:
        ValueError: the label does not exist, or the classifier has no labels.
        TypeError: the model is not a classifier, so it does not know labels.
    """
    if isinstance(target, (list, tuple)):
        known = [class_indices(part, model) for part in target]
        return target if all(a is b for a, b in zip(known, target, strict=True)) else type(target)(known)
    if not isinstance(target, str):
        return target
    class_index = getattr(uncompiled(model) if isinstance(model, nn.Module) else model, "class_index", None)
    if class_index is None:
        raise TypeError(
            f"target must be a class index for a model that does not know labels, got {target!r} for "
            f"{type(model).__name__}. Pass an index, or explain VideoClassifier(model, ..., labels=[...])."
        )
    return class_index(target)


def _state_of(module: nn.Module, with_buffers: bool) -> _Saved:
    buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and with_buffers}
    with torch.no_grad():
        saved = {name: (buffer, version_of(buffer), buffer.clone()) for name, buffer in buffers.items()}
    return _Saved(module.training, saved)


def _restore(module: nn.Module, state: _Saved) -> None:
    if module.training != state.training:
        module.training = state.training
    for name, (buffer, version, values) in state.buffers.items():
        if module._buffers.get(name) is not buffer:
            module._buffers[name] = buffer
        # no copy without need: autograd refuses a graph whose saved buffer has another version
        unchanged = version is not None and version == version_of(buffer)
        if unchanged and state.training and not buffer.is_meta:  # a batch norm in train mode does not count its updates
            unchanged = bool(((buffer == values) | ((buffer != buffer) & (values != values))).all())
        if not unchanged:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(values)


@contextmanager
def _differentiable_rnns(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run recurrent layers on a GPU without cuDNN where a gradient is wanted: cuDNN refuses it in eval mode."""
    handles: list[Any] = []
    before: list[bool] = []

    def disable(module: nn.Module, inputs: Any) -> None:
        before.append(torch.backends.cudnn.enabled)
        if torch.is_grad_enabled():
            torch.backends.cudnn.enabled = False

    def restore(module: nn.Module, inputs: Any, outputs: Any) -> None:
        torch.backends.cudnn.enabled = before.pop()

    for module in modules:
        if isinstance(module, nn.RNNBase) and not module.training and _on_gpu(module):
            handles.append(module.register_forward_pre_hook(disable))
            handles.append(module.register_forward_hook(restore, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_gpu(module: nn.Module) -> bool:
    return any(parameter.is_cuda for parameter in module.parameters())


# Number of open blocks per parameter, so that two threads with one model do not restore each other's state.
_frozen: dict[Tensor, int] = {}
_frozen_lock = Lock()


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Set ``requires_grad`` of all parameters to False inside the block, and restore it afterwards.

    A backward pass to the input then does not need to keep the inputs of each layer, which saves memory.
    """
    with _frozen_lock:
        frozen_here = [p for p in model.parameters() if p.requires_grad or p in _frozen]
        for parameter in frozen_here:
            _frozen[parameter] = _frozen.get(parameter, 0) + 1
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        with _frozen_lock:
            for parameter in frozen_here:
                _frozen[parameter] -= 1
                if not _frozen[parameter]:
                    del _frozen[parameter]
                    parameter.requires_grad_(True)


_stance: list[Any] = []  # the compiler's stance, one item per open block. The first item restores the original stance
_stance_lock = Lock()


@contextmanager
def without_compiling() -> Iterator[None]:
    """Run compiled models eagerly inside the block, because compiled graphs skip hooks.

    The compiler's stance is global, so all threads share it.
    """
    with _stance_lock:
        _stance.append(None if _stance else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _stance_lock:
            if len(_stance) > 1:
                _stance.pop()  # other blocks are still open
            else:
                _stance.pop().__exit__(None, None, None)


_checkpointed: ContextVar[bool] = ContextVar("captum_staa_checkpointed", default=True)
_checkpoint_functions: dict[str, Any] = {}  # those of torch, while a block is open
_checkpoint_blocks = [0]  # how many are open
_checkpoint_lock = Lock()


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Run parts of a model with gradient checkpointing as they are inside the block, in this thread.

    Checkpointing repeats a forward during the backward, where function modes and hooks of the first one are gone. Torch
    has no switch for it, so while a block is open, the functions in which it happens are replaced.
    """
    with _checkpoint_lock:
        if not _checkpoint_blocks[0]:
            replaced = {name: new for name, new in _replaced_checkpoints().items() if hasattr(checkpoint, name)}
            _checkpoint_functions.update({name: getattr(checkpoint, name) for name in replaced})
            for name, function in replaced.items():
                setattr(checkpoint, name, function)
        _checkpoint_blocks[0] += 1
    token = _checkpointed.set(False)
    try:
        yield
    finally:
        _checkpointed.reset(token)
        with _checkpoint_lock:
            _checkpoint_blocks[0] -= 1
            if not _checkpoint_blocks[0]:
                for name, function in _checkpoint_functions.items():
                    setattr(checkpoint, name, function)


def _replaced_checkpoints() -> dict[str, Any]:
    """Return what replaces functions of :mod:`torch.utils.checkpoint`. In other threads, checkpointing goes on."""

    def generator(name: str) -> Any:
        def without_reentrant(function: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
            """The caller runs the function between both parts of this generator."""
            if _checkpointed.get():
                yield from _checkpoint_functions[name](function, *args, **kwargs)
            else:
                yield

        return without_reentrant

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve: bool, *args: Any) -> Any:
            if _checkpointed.get():
                return _checkpoint_functions["CheckpointFunction"].apply(function, preserve, *args)
            return function(*args)

    names = ("_checkpoint_without_reentrant_generator", "_checkpoint_without_reentrant_generator_impl")  # from 2.14 on
    return {**{name: generator(name) for name in names}, "CheckpointFunction": Reentrant}


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module inside a ``torch.compile`` wrapper, or ``model`` itself if it is not compiled."""
    return getattr(model, "_orig_mod", model)
