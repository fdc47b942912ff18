"""The networks that a forward function uses, and what in them spoils maps: lost gradients, writes, random numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def networks_of(forward_func: object) -> list[nn.Module]:
    """Return the modules that a forward function uses.

    They are searched in the function itself: a module, a method of a module, a ``functools.partial``, the variables
    that a function or a lambda uses, and the attributes of a callable object.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> networks_of(lambda x: net(x).softmax(1)) == [net]
        True
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            found[id(value)] = value
            return
        if depth == 0 or id(value) in seen or isinstance(value, (type, ModuleType, Tensor, str)):
            return
        seen.add(id(value))
        for part in _parts(value):
            visit(part, depth - 1)

    visit(forward_func, depth=4)
    return list(found.values())


def _parts(value: Any) -> Iterable[Any]:
    """Return the values that a function, a container or an object refers to."""
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        used = [value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__]
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return *cells, *defaults, *(part for part in used if isinstance(part, nn.Module) or callable(part))
    return vars(value).values() if hasattr(value, "__dict__") else ()


def _names(code: CodeType) -> set[str]:
    """Return the global names that a function and the functions defined in it use."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is not assigned yet
        return False


_INPLACE = "modified by an inplace operation"


def lost_gradient(forward_func: object, run: Callable[[], Any]) -> str:
    """Return a sentence that names the module in which the gradient of the outputs is lost, or an empty string.

    Example:
        >>> class Rounds(nn.Module):
        ...     def forward(self, x):
        ...         return x.round()
        >>> net = nn.Sequential(nn.Linear(2, 2), Rounds())
        >>> lost_gradient(net, lambda: net(torch.rand(1, 2).requires_grad_()))
        "The gradient is lost in module '1' (Rounds)."

    Args:
        forward_func: the model, or a function that uses it.
        run: function that runs the model on inputs that require a gradient, and returns its outputs.
    """
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    with torch.enable_grad(), _hooked(forward_func, lambda *call: calls.append(call)):
        outputs: Any = run()
    for name, module, inside, outside in calls:
        if lacks_backward(outside.grad_fn, inside.grad_fn):
            return f"The gradient is lost in module {name!r} ({type(module).__name__}), which has no backward pass."
    reached: set[int] = set()
    if getattr(outputs, "requires_grad", False):
        taking = [tensor for *_, inside, outside in calls for tensor in (inside, outside) if tensor.requires_grad]
        try:
            slopes: Any = torch.autograd.grad(outputs.sum(), taking, allow_unused=True) if taking else ()
        except RuntimeError:
            return ""
        reached = {
            id(tensor)
            for tensor, slope in zip(taking, slopes, strict=True)
            if slope is not None and bool((slope != 0).any())
        }
    for name, module, inside, outside in reversed(calls):
        lost = id(outside) in reached or not outside.requires_grad
        if lost and inside.requires_grad and id(inside) not in reached:
            return f"The gradient is lost in module {name!r} ({type(module).__name__})."
    last = next((call for call in reversed(calls) if call[3].requires_grad), None)
    return "" if last is None else f"The last module with a gradient is {last[0]!r} ({type(last[1]).__name__})."


def lacks_backward(node: Any, until: Any = None) -> bool:
    """Return whether a graph contains an operation without a backward, such as a quantized layer.

    Torch takes the gradient of such an operation as zero, with a warning.

    Args:
        node: ``grad_fn`` of the outputs.
        until: ``grad_fn`` of the inputs, beyond which the graph is not searched.
    """
    return any("NotImplemented" in each.name() for each in _graph(node, until))


def leaves_before(value: Tensor) -> list[Tensor]:
    """Return the leaves with a gradient on which a value depends.

    Example:
        >>> first, second = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
        >>> [leaf is first for leaf in leaves_before(first.exp() + second.detach())]
        [True]
    """
    if value.grad_fn is None:
        return [value] if value.requires_grad else []
    return [node.variable for node in _graph(value.grad_fn) if hasattr(node, "variable")]


def _graph(node: Any, until: Any = None) -> Iterator[Any]:
    """Yield the nodes of a graph that begins with ``grad_fn`` of the outputs, except ``until`` and those before it."""
    seen, open_nodes = {until}, [node]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        open_nodes += [following for following, _ in node.next_functions]


def refuse_missing_backward(outputs: Tensor, forward_func: object, run: Callable[[], Any]) -> None:
    """Raise a ValueError if the graph of outputs contains an operation without a backward.

    Its gradient would be zero, and a map would be wrong in silence where a residual connection passes it by.

    Args:
        outputs: what is differentiated.
        forward_func: the model, or a function that uses it.
        run: function that runs the model on inputs that require a gradient, and returns its outputs.
    """
    if lacks_backward(outputs.grad_fn):
        raise ValueError(missing_backward(forward_func, run))


def missing_backward(forward_func: object, run: Callable[[], Any]) -> str:
    """Return the error message for a model that contains an operation without a backward."""
    where = lost_gradient(forward_func, run)
    return (
        f"the model must be differentiable, got an operation without a backward pass, such as a quantized layer, whose "
        f"gradient would be zero.{f' {where}' if where else ''} Explain the model before its quantization, or use "
        f"VideoOcclusion, VideoFeatureAblation, RISE or the metrics, which need no gradient."
    )


# how torch words that the tensors of a module do not fit together
SHAPES_DIFFER = re.compile(
    r"[Tt]he size of tensor a|shapes cannot be multiplied|is invalid for input of size|[Ss]izes of tensors must match|"
    r"[Tt]he expanded size of the tensor|[Kk]ernel size can't be greater than actual input size|must match the size|"
    r"must be equal to input_size|expected input with shape|[Oo]utput size is too small"
)
OTHER_CHANNELS = re.compile(r"to have (\d+) channels, but got (\d+) channels")
_SIZE_NAMES = ("img_size", "image_size", "input_size", "num_frames", "clip_length")


def stated_sizes(module: nn.Module) -> dict[str, Any]:
    """Return the sizes of clips that a module states in attributes with usual names, such as ``img_size``."""
    found: dict[str, Any] = {}
    for part in module.modules():
        for name in _SIZE_NAMES:
            value = vars(part).get(name)
            if isinstance(value, (int, tuple)) and not isinstance(value, bool):
                found.setdefault(name, value)
    return found


def sizes_explained(forward_func: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
    """Return the function, whose error about shapes that do not fit becomes a ValueError with the shape and the fix.

    Only that of the first call: later inputs have the same size, so their errors have another cause.

    Args:
        forward_func: the model, or a function that uses it.
        count: how many of its arguments are clips.
    """
    ran = False

    def forward(*args: Any) -> Any:
        nonlocal ran
        try:
            outputs = forward_func(*args)
        except RuntimeError as error:
            if ran or not (message := _size_message(forward_func, args[:count], str(error))):
                raise
            raise ValueError(message) from error
        ran = True
        return outputs

    return forward


def _size_message(forward_func: object, clips: tuple[Tensor, ...], error: str) -> str:
    """Return the message for clips of a wrong size or order of axes, or an empty string for another error."""
    channels = OTHER_CHANNELS.search(error)
    if not channels and not SHAPES_DIFFER.search(error):
        return ""
    network = next(iter(networks_of(forward_func)), None)
    name = "the model" if network is None else type(network).__name__
    got = f"got shape {' and '.join(str(tuple(clip.shape)) for clip in clips)}"
    if channels:
        return (
            f"inputs must have the order of axes that {name} takes, {got}, of which a layer for {channels[1]} channels "
            f"gets {channels[2]}. Pass inputs.transpose(1, 2), and the layout of that. The error of the model: {error}"
        )
    sizes = {} if network is None else stated_sizes(network)
    stated = ", ".join(f"{attribute}={value}" for attribute, value in sizes.items()) or "it does not state its size"
    return (
        f"inputs must have the size for which {name} was built ({stated}), {got}. Pass as many frames as it takes, and "
        f"resize them with torch.nn.functional.interpolate. If the size is right, the model itself fails. Its error: "
        f"{error}"
    )


@contextmanager
def inplace_explained(forward_func: object, run: Callable[[], Any]) -> Iterator[None]:
    """Turn torch's error about an operation in place into a ValueError that names the module and the way out.

    Args:
        forward_func: the model, or a function that uses it.
        run: function that runs the model on the inputs of the failing call.
    """
    try:
        yield
    except RuntimeError as error:
        if _INPLACE not in str(error):
            raise
        raise ValueError(
            f"the model must be differentiable, but an operation in place (such as x += y) changes a value that its "
            f"backward pass needs.{_changed_in_place(forward_func, run)} Write it as x = x + y in the model. "
            f"VideoOcclusion, VideoFeatureAblation, RISE and the metrics need no gradient. The error of torch: {error}"
        ) from error


def _changed_in_place(forward_func: object, run: Callable[[], Any]) -> str:
    calls: list[tuple[str, nn.Module, Tensor, int]] = []
    try:
        with torch.enable_grad(), _hooked(forward_func, lambda n, m, i, out: calls.append((n, m, out, out._version))):
            run()
    except Exception:  # the model is only run to name a module in another error
        return ""
    changed = [f"{name!r} ({type(module).__name__})" for name, module, out, version in calls if out._version != version]
    return f" The output of module {' or '.join(changed[:3])} is changed after it is returned." if changed else ""


@contextmanager
def _hooked(forward_func: object, keep: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Pass the name, the first input and the first output of every innermost module to ``keep`` as it runs.

    A module is innermost if it calls no other module. It may contain some, as quantized layers contain their weights.
    """
    handles: list[Any] = []
    calls_others: list[bool] = []  # one item per module that is running

    def begin(module: nn.Module, args: Any) -> None:
        if calls_others:
            calls_others[-1] = True
        calls_others.append(False)

    for network in networks_of(forward_func):
        for name, module in network.named_modules():

            def end(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if not calls_others or calls_others.pop():
                    return
                inside = next((value for value in args if isinstance(value, Tensor)), None)
                outside = next((value for value in _flat(output) if isinstance(value, Tensor)), None)
                if inside is not None and outside is not None:
                    keep(name, module, inside, outside)

            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _flat(output: Any) -> tuple[Any, ...]:
    return tuple(output) if isinstance(output, (tuple, list)) else (output,)


@contextmanager
def random_draws_reported(forward_func: object, run: Callable[[], Any]) -> Iterator[None]:
    """Warn after the block if the model draws random numbers from torch's global generators in it.

    Methods and metrics use separate generators, so that only the model, or a function of the caller, changes the
    global ones. The model is run once more to find the module, only if they changed.

    Args:
        forward_func: the model, or a function that uses it.
        run: function that runs the model on the inputs of the block.
    """
    before = _random_states()
    yield
    if all(map(torch.equal, before, _random_states())):
        return
    if where := _drawing_module(forward_func, run):
        warnings.warn(
            f"the model must give the same outputs for the same clip. It draws random numbers in eval mode {where}. "
            f"Attributions and scores then differ from call to call. Draw them in train mode only, as F.dropout(x, p, "
            f"training=self.training) does, or average over several calls inside models.model_state('as_is').",
            stacklevel=5,
        )


def _random_states() -> list[Tensor]:
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpu]


def _drawing_module(forward_func: object, run: Callable[[], Any]) -> str:
    """Return which module draws random numbers, as a phrase, or an empty string if none does."""
    names: list[str] = []
    handles: list[Any] = []
    draws = _Draws(names)
    for network in networks_of(forward_func):
        for name, module in network.named_modules():
            described = f"in module {name!r} ({type(module).__name__})" if name else f"in {type(module).__name__}"

            def enter(module: nn.Module, args: Any, described: str = described) -> None:
                names.append(described)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                names.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with draws:
            run()
    except Exception:  # the model is only run to name a module in a warning
        return ""
    finally:
        for handle in handles:
            handle.remove()
    return draws.found or ""


class _Draws(TorchDispatchMode):
    """Context manager that finds the first operation of this thread that draws from a global generator."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.names = names
        self.found: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is not None or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = _random_states()
        result = func(*args, **(kwargs or {}))
        if not all(map(torch.equal, before, _random_states())):
            where = self.names[-1] if self.names else "in the forward function"
            self.found = f"{where}, by torch.{func.overloadpacket.__name__}"
        return result
