"""What the output of a video model means: where it is in what the module returns, and how it becomes a probability.

A model's output is one of four kinds (:data:`OutputKind`):

- ``"logits"``: one number per class, of which one is right. A softmax gives probabilities. A class is explained against
  the mean of the others.
- ``"probabilities"``: the same after a softmax or a sigmoid, which is undone to explain a class.
- ``"sigmoid"``: one logit per label, each of which may be right. A sigmoid gives probabilities. A label is explained by
  its own logit.
- ``"score"``: numbers that are not classes, such as a regression or a similarity. They have no probabilities, and are
  explained as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_staa._utils.model_state import uncompiled
from captum_staa._utils.tensors import wide

OutputKind = Literal["logits", "probabilities", "sigmoid", "score"]
KINDS: tuple[OutputKind, ...] = get_args(OutputKind)
FunctionName = Literal["softmax", "sigmoid"]
FUNCTIONS: tuple[FunctionName, ...] = get_args(FunctionName)
OutputKey = str | int | tuple[str | int, ...]

_CONFIG_KINDS: dict[str, OutputKind] = {
    "regression": "score",
    "single_label_classification": "logits",
    "multi_label_classification": "sigmoid",
}


def kind_in_config(module: nn.Module) -> OutputKind | None:
    """Return the kind of output that a Hugging Face config declares, or None if it does not.

    Example:
        >>> from types import SimpleNamespace
        >>> net = nn.Linear(2, 2)
        >>> net.config = SimpleNamespace(problem_type="multi_label_classification", num_labels=2)
        >>> kind_in_config(net)
        'sigmoid'
    """
    config = getattr(module, "config", None)
    declared = getattr(config, "problem_type", None)
    if declared in _CONFIG_KINDS:
        return _CONFIG_KINDS[declared]
    # without a problem type, transformers trains a single output as a regression
    return "score" if isinstance(config, object) and getattr(config, "num_labels", None) == 1 else None


# --- where the output is ----------------------------------------------------------------------------------------


def find_outputs(returned: Any, batch: int, classes: int | None = None, key: OutputKey | None = None) -> Tensor:
    """Return the output of a model from what its module returned.

    Example:
        >>> find_outputs({"loss": torch.tensor(0.5), "logits": torch.tensor([[1.0, 2.0]])}, batch=1)
        tensor([[1., 2.]])
        >>> features, logits = torch.zeros(1, 512), torch.tensor([[1.0, 2.0]])
        >>> find_outputs((features, logits), batch=1, classes=2)
        tensor([[1., 2.]])

    Args:
        returned: a tensor, or a tuple, list, mapping, dataclass or Hugging Face output that contains it.
        batch: B, number of clips.
        classes: K, if it is known. If several tensors could be the output, those with K columns are considered.
        key: name or index of the output, or a path of these, such as ``("head", 0)``.

    Returns:
        ``(B, K)``. Axes of size 1 after the batch are dropped. An output with several axes, such as one of class scores
        per frame ``(B, T, K)``, is returned as it is.

    Raises:
        TypeError: none of the tensors is floating-point.
        ValueError: several tensors could be the output, ``key`` does not exist, or there is not one row per clip.
    """
    if key is None and not isinstance(returned, Tensor):
        key = path_of_outputs(returned, batch, classes)
    return _rows(returned if key is None else _at(returned, key), batch)


def _at(returned: Any, key: OutputKey) -> Tensor:
    found = returned
    for part in key if isinstance(key, tuple) else (key,):
        try:
            found = found[part] if not isinstance(part, str) or isinstance(found, Mapping) else getattr(found, part)
        except (KeyError, IndexError, AttributeError, TypeError):
            raise ValueError(
                f"output_key must name a tensor in what the module returns, got {key!r}. {_listed(returned)}"
            ) from None
    if not isinstance(found, Tensor):
        raise ValueError(
            f"output_key must name a tensor, got {key!r}, which is a {type(found).__name__}. {_listed(returned)}"
        )
    return found


def path_of_outputs(
    returned: Any, batch: int, classes: int | None = None, known: tuple[str | int, ...] | None = None
) -> tuple[str | int, ...]:
    """Return the path of the one tensor that can be the output: ``logits``, the only one, or that with K columns.

    Args:
        returned: a container of tensors.
        batch: B, number of clips.
        classes: K, if it is known.
        known: the path in an earlier call, which decides if several tensors could be the output. None if there is none.

    Raises:
        TypeError: none of the tensors is floating-point.
        ValueError: several tensors could be the output.
    """
    tensors = dict(tensors_in(returned))
    if not tensors:
        raise TypeError(
            f"the module must return a floating-point tensor (B, K), or a container of tensors, got "
            f"{type(returned).__name__}. Wrap it in a module that returns the class scores."
        )
    if ("logits",) in tensors:
        return ("logits",)
    rows = {path: tensor for path, tensor in tensors.items() if tensor.ndim and len(tensor) == batch}
    candidates = rows or tensors
    if len(candidates) > 1 and classes is not None:
        candidates = {path: tensor for path, tensor in candidates.items() if classes in tensor.shape[1:]} or candidates
        flat = {path: tensor for path, tensor in candidates.items() if tensor[0].numel() == classes}
        candidates = flat or candidates
    if known in candidates:
        return known
    if len(candidates) > 1:
        what = "the number of classes is unknown" if classes is None else f"several could hold {classes} classes"
        raise ValueError(
            f"the module must return one output per clip, got {len(candidates)} tensors, and {what}. "
            f"{_listed(returned)} Pass VideoClassifier(..., output_key=...) with one of these names"
            f"{', or labels=[...]' if classes is None else ''}."
        )
    return next(iter(candidates))


def tensors_in(returned: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """Yield the floating-point tensors of a container with their paths."""
    if isinstance(returned, Tensor):
        if returned.is_floating_point():
            yield path, returned
        return
    items: Any = ()
    if isinstance(returned, Mapping):
        items = returned.items()
    elif isinstance(returned, tuple) and hasattr(returned, "_fields"):
        items = zip(returned._fields, returned, strict=True)
    elif isinstance(returned, (tuple, list)):
        items = enumerate(returned)
    elif is_dataclass(returned):
        items = ((field.name, getattr(returned, field.name)) for field in fields(returned))
    elif hasattr(returned, "__dict__"):
        items = vars(returned).items()
    for name, value in items:
        yield from tensors_in(value, (*path, name))


def _listed(returned: Any) -> str:
    names = {path[0] if len(path) == 1 else path: tuple(tensor.shape) for path, tensor in tensors_in(returned)}
    listed = ", ".join(f"{name!r} of shape {shape}" for name, shape in names.items()) or "none"
    return f"It returns these tensors: {listed}."


def _rows(outputs: Tensor, batch: int) -> Tensor:
    """Return outputs as ``(B, K)``, or with further axes as they are."""
    if outputs.ndim == 0 or (outputs.ndim == 1 and batch == 1):
        outputs = outputs.reshape(1, -1)  # a module that squeezes drops the batch axis of one clip
    elif outputs.ndim == 1:
        outputs = outputs[:, None]
    if len(outputs) != batch:
        raise ValueError(
            f"the module must return one row per clip, {batch} here, got outputs of shape {tuple(outputs.shape)}. If "
            f"it returns one row per frame or view, average these in a module around it."
        )
    if outputs.ndim > 2 and outputs[0].numel() == max(outputs.shape[1:]):
        outputs = outputs.flatten(1)  # (B, 1, K) from VideoPrism's pooling query, (B, K, 1, 1, 1) from a 3D CNN's pool
    return outputs


# --- what it means ----------------------------------------------------------------------------------------------


def kind_of(forward_func: object, outputs: Tensor) -> OutputKind:
    """Return what the outputs of any forward function are.

    A :class:`captum_staa.VideoClassifier` knows it. The outputs of another function are a ``"score"`` if there is one
    per example, ``"probabilities"`` if all rows sum to 1, and else ``"logits"``.

    Args:
        forward_func: the model or function that returned the outputs.
        outputs: ``(B,)``, ``(B, K)`` or with further axes.
    """
    known = getattr(uncompiled(forward_func) if isinstance(forward_func, nn.Module) else forward_func, "output", None)
    if isinstance(known, str) and known in KINDS:
        return known
    if outputs.ndim < 2 or outputs.numel() == len(outputs):
        return "score"
    return "probabilities" if sums_to_one(outputs) else "logits"


def probabilities(outputs: Tensor, kind: OutputKind, classes: int | None = None) -> Tensor:
    """Return the probability of each class, in float32 or wider.

    Example:
        >>> probabilities(torch.tensor([[0.0, 0.0]]), "logits"), probabilities(torch.tensor([[0.0]]), "sigmoid")
        (tensor([[0.5000, 0.5000]]), tensor([[0.5000]]))

    Args:
        outputs: ``(B, K)`` or with further axes.
        kind: what they are.
        classes: K, which names the class axis of logits with several axes.

    Raises:
        ValueError: outputs of this kind have no probabilities, or the class axis is unknown.
    """
    return log_probabilities(outputs, kind, classes).exp() if kind != "probabilities" else wide(outputs)


def log_probabilities(outputs: Tensor, kind: OutputKind, classes: int | None = None) -> Tensor:
    """Return the logarithm of :func:`probabilities`, computed without rounding small probabilities to 0."""
    values = wide(outputs)
    if kind == "probabilities":
        return values.clamp(min=torch.finfo(values.dtype).tiny).log()
    if kind == "sigmoid":
        return torch.nn.functional.logsigmoid(values)
    if kind == "score":
        raise ValueError(
            f"outputs must be logits, probabilities or sigmoid logits to compute probabilities, got a score of shape "
            f"{tuple(outputs.shape)}. Explain the score itself (output='logit' of a metric), or pass "
            f"VideoClassifier(..., output='sigmoid') if the model is a classifier."
        )
    return values.log_softmax(class_axis(values, classes))


def class_axis(outputs: Tensor, classes: int | None) -> int:
    """Return the axis of the classes of logits.

    Raises:
        ValueError: there are several axes after the batch, and not exactly one of them has K entries; or there is only
            one output.
    """
    if outputs.ndim == 2:
        if outputs.shape[1] == 1:
            raise ValueError(
                f"logits must have at least two classes, got outputs of shape {tuple(outputs.shape)}. Pass "
                f"VideoClassifier(..., output='sigmoid') for one logit of a yes-no question, or output='score'."
            )
        return 1
    axes = [axis for axis in range(1, outputs.ndim) if outputs.shape[axis] == classes]
    if len(axes) != 1:
        raise ValueError(
            f"the class axis must be known to compute probabilities, got outputs of shape {tuple(outputs.shape)} and "
            f"{'no' if classes is None else classes} labels. Pass VideoClassifier(..., labels=[...]), or use the "
            f"output itself (output='logit' of a metric)."
        )
    return axes[0]


def exclusive(outputs: Tensor, kind: OutputKind) -> bool:
    """Return whether exactly one class is right: logits, or probabilities whose rows sum to 1."""
    return kind == "logits" or (kind == "probabilities" and sums_to_one(outputs))


def decision_values(outputs: Tensor, kind: OutputKind) -> Tensor:
    """Return the outputs in units of a logit, in which evidence adds up, in float32 or wider.

    Probabilities become their logarithms if their rows sum to 1, which are the logits up to a constant per row, and
    log odds otherwise. Other outputs are returned unchanged.
    """
    values = wide(outputs)
    if kind != "probabilities":
        return values
    tiny = torch.finfo(values.dtype).tiny
    logs = values.clamp(min=tiny).log()
    return logs if exclusive(outputs, kind) else logs - (1 - values).clamp(min=torch.finfo(values.dtype).eps).log()


def minus_other(outputs: Tensor, kind: OutputKind, other: int | Literal["rest"], classes: int | None = None) -> Tensor:
    """Return each class's value minus that of another class, or minus that of all other classes together.

    Example:
        >>> minus_other(torch.tensor([[3.0, 1.0]]), "logits", 1)
        tensor([[2., 0.]])

    Args:
        outputs: ``(B, K)``; or with further axes, for ``"rest"``.
        kind: what they are.
        other: index of the other class; or ``"rest"``, which gives the log odds of each class.
        classes: K, which names the class axis of logits with several axes.

    Returns:
        Like ``outputs``, in units of a logit.

    Raises:
        ValueError: ``other`` is ``"rest"`` for scores, which have no probabilities that sum to 1.
    """
    if other == "rest" and kind == "score":
        raise ValueError(
            f"versus('rest') needs classes, of which the log odds are computed, got a score of shape "
            f"{tuple(outputs.shape)}. Use versus(index) for the difference of two scores, or the scores themselves."
        )
    values = decision_values(outputs, kind)
    if other != "rest":
        return values - values[:, other, None]
    if not exclusive(outputs, kind):
        return values  # a sigmoid logit is the log odds already
    axis = class_axis(values, classes)
    total = values.logsumexp(axis, keepdim=True)
    highest = values.argmax(axis, keepdim=True)
    is_highest = torch.zeros_like(values, dtype=torch.bool).scatter(axis, highest, True)
    # log(total - own) is log(total) + log(1 - p). The p of the highest class may round to 1, so its rest is summed.
    rest = total + torch.log1p(-(values - total).exp().masked_fill(is_highest, 0))
    return values - rest.where(~is_highest, values.masked_fill(is_highest, -torch.inf).logsumexp(axis, keepdim=True))


class Contrast(Tensor):
    """Outputs of ``clf.versus(other)``: to explain the output of the other class, which is always 0, is a ValueError.

    Methods of Captum do not know it, and would return a map of zeros. They select the target's output, or (DeepLift)
    differentiate no other. The results of all operations are plain tensors.
    """

    _check: Callable[[Any], None]

    @classmethod
    def of(cls, outputs: Tensor, check: Callable[[Any], None]) -> Contrast:
        """Return the same outputs, with a function that raises ValueError for targets that must not be selected."""
        if outputs.requires_grad and outputs.ndim == 2:

            def refuse(gradient: Tensor) -> None:
                alone = gradient.count_nonzero(1) == 1
                check(gradient[alone].ne(0).int().argmax(1))

            outputs.register_hook(refuse)
        own = outputs.as_subclass(cls)
        own._check = check
        return own

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check what is selected, and run the operation on the plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            first = args[0] if args else None
            if isinstance(first, Contrast):
                if func is Tensor.__getitem__ and isinstance(args[1], tuple) and len(args[1]) > 1:
                    first._check(args[1][1] if isinstance(args[1][1], int) else None)
                elif func in (torch.gather, Tensor.gather) and len(args) > 2:
                    first._check(args[2])
                args = (first.as_subclass(Tensor), *args[1:])
            return func(*args, **(kwargs or {}))


# --- whether the kind is right ----------------------------------------------------------------------------------


def sums_to_one(outputs: Tensor) -> bool:
    """Return whether outputs are ``(B, K)`` of several classes, non-negative, and sum to 1 per row: a softmax."""
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        return False
    rows = wide(outputs.detach())
    tolerance = max(1e-4, 4 * torch.finfo(outputs.dtype).eps)
    return bool((rows >= 0).all() & ((rows.sum(1) - 1).abs() <= tolerance * rows.shape[1] ** 0.5).all())


def check_kind(outputs: Tensor, kind: OutputKind, last: FunctionName | None) -> None:
    """Raise ValueError if outputs cannot be of this kind.

    Args:
        outputs: ``(B, K)`` or with further axes.
        kind: what they should be.
        last: the function that computed them, if :class:`LastFunction` found one.
    """
    shape, values = tuple(outputs.shape), outputs.detach()
    if kind in ("logits", "sigmoid"):
        what = "probabilities, which sum to 1 in every row" if sums_to_one(values) else None
        if what is None and last is not None:
            what = f"probabilities, computed by a {last}"
        if what is not None:
            raise ValueError(
                f"outputs must be {'logits' if kind == 'logits' else 'logits of independent labels'} with "
                f"output={kind!r}, got {what} (shape {shape}). Pass VideoClassifier(..., output='probabilities'), or "
                f"remove the last {last or 'softmax'} of the module."
            )
    if kind == "logits" and outputs.ndim == 2 and outputs.shape[1] < 2:
        raise ValueError(
            f"logits must have at least two classes, got outputs of shape {shape}. Pass output='sigmoid' for one logit "
            f"of a yes-no question, 'probabilities' if the module applies the sigmoid, or 'score' for a regression."
        )
    if kind == "probabilities" and not bool(((values >= 0) & (values <= 1 + 1e-3)).all()):
        low, high = float(values.min()), float(values.max())
        raise ValueError(
            f"outputs must be from 0 to 1 with output='probabilities', got values from {low:.4g} to {high:.4g} (shape "
            f"{shape}). Pass VideoClassifier(..., output='logits') or output='sigmoid'."
        )


class LastFunction(TorchFunctionMode):
    """Context manager that finds whether a softmax or a sigmoid computed the outputs of a forward inside the block.

    Example:
        >>> with LastFunction() as last:
        ...     outputs = torch.zeros(1, 2).sigmoid()
        >>> last.name(outputs), last.argument(outputs)
        ('sigmoid', tensor([[0., 0.]]))
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[FunctionName, tuple[Tensor, Tensor]] = {}  # result and argument of the last call of each

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in FUNCTIONS and isinstance(result, Tensor):
            self._last[name] = result.detach(), args[0] if args else (kwargs or {})["input"]
        return result

    def name(self, outputs: Tensor) -> FunctionName | None:
        """Return the function whose result the outputs are, perhaps reshaped, or (from their graph) averaged."""
        return self._matching(outputs) or _function_in_graph(outputs)

    def argument(self, outputs: Tensor) -> Tensor | None:
        """Return the argument of the function whose result the outputs are, perhaps reshaped: the logits; or None."""
        name = self._matching(outputs)
        return None if name is None else self._last[name][1].reshape(outputs.shape)

    def _matching(self, outputs: Tensor) -> FunctionName | None:
        values = outputs.detach()
        for name, (result, _) in self._last.items():
            if result.numel() == values.numel() and torch.equal(result.flatten().to(values), values.flatten()):
                return name
        return None


_PASSED = ("View", "Reshape", "Squeeze", "Unsqueeze", "Mean", "Select", "Slice", "ToCopy", "Alias", "Clone", "Permute")


def _function_in_graph(outputs: Tensor) -> FunctionName | None:
    node = outputs.grad_fn
    while node is not None and node.name().startswith(_PASSED):
        node = node.next_functions[0][0] if node.next_functions else None
    kind = "" if node is None else node.name().lower()
    return next((function for function in FUNCTIONS if kind.startswith(function)), None)
