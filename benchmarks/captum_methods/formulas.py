"""Plain and slow formulas for what a method should give, and how its results are compared with them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from captum_methods.subjects import TARGET, Subject

Tensors = tuple[Tensor, ...]
GRAPH = "the result keeps the graph: take its `.detach()`"


class Wrong(Exception):
    """A method ran, and did not give what it should: in a few words for the cell, and more for below the table."""

    def __init__(self, short: str, why: str = "") -> None:
        super().__init__(why or short)
        self.short = short


def logits(s: Subject, clips: Tensors, net: nn.Module | None = None) -> Tensor:
    dtype = next(s.net.parameters()).dtype
    return s.call(net or s.net, *(clip.to(dtype) for clip in clips)).flatten(1)  # VideoPrism has one axis too many


def score(s: Subject, clips: Tensors, net: nn.Module | None = None) -> Tensor:
    """``(B,)``, the targets' logits."""
    answer = logits(s, clips, net)
    return answer[torch.arange(len(answer)), torch.tensor(TARGET).repeat_interleave(len(answer) // 2)]


def gradients(s: Subject, clips: Tensors | None = None, net: nn.Module | None = None) -> Tensors:
    leaves = tuple(clip.detach().clone().requires_grad_() for clip in clips or s.inputs)
    return torch.autograd.grad(score(s, leaves, net).sum(), leaves)


def times_input(s: Subject) -> Tensors:
    return tuple(clip * gradient for clip, gradient in zip(s.inputs, gradients(s), strict=True))


@torch.no_grad()
def change(s: Subject, baselines: Tensors | None = None) -> Tensor:
    """``(B,)``: the score less that of the baselines, zeros by default."""
    return score(s, s.inputs) - score(s, baselines or tuple(torch.zeros_like(clip) for clip in s.inputs))


def parts(s: Subject, joint: bool = False) -> Tensors:
    """A mask per input: halves in time; unless joint, also in width, with separate ids for each input."""
    found = []
    for number, clip in enumerate(s.inputs):
        sizes = s.layout.size(clip)
        when = torch.arange(sizes["T"]).view(1, -1, 1, 1, 1) // (sizes["T"] // 2)
        where = torch.arange(sizes["W"]).view(1, 1, 1, 1, -1) // (sizes["W"] // 2)
        found.append(s.layout.from_working(when if joint else 4 * number + 2 * when + where))
    return tuple(found)


def masks(s: Subject, joint: bool = False) -> Tensor | Tensors:
    """The same as Captum takes them."""
    found = parts(s, joint)
    return found if len(found) > 1 else found[0]


def windows(s: Subject) -> tuple[int, ...] | tuple[tuple[int, ...], ...]:
    """The window that covers a part, over all axes but the batch; one per input where there are several."""
    sizes = [s.layout.size(clip) for clip in s.inputs]
    found = [tuple(size // (2 if axis in "TW" else 1) for axis, size in own.items() if axis != "B") for own in sizes]
    return tuple(found) if len(found) > 1 else found[0]


@torch.no_grad()
def falls(s: Subject, other: Callable[[Tensor], Tensor]) -> Tensors:
    """How much the score falls when a part is taken from another clip."""
    where = parts(s)
    found = [torch.zeros_like(clip) for clip in s.inputs]
    for number in torch.cat([mask.flatten() for mask in where]).unique():
        pairs = list(zip(s.inputs, where, strict=True))
        fall = score(s, s.inputs) - score(s, tuple(torch.where(mask == number, other(x), x) for x, mask in pairs))
        for part, mask in zip(found, where, strict=True):
            part += fall.view(-1, 1, 1, 1, 1) * (mask == number)
    return tuple(found)


class _Rectified(torch.autograd.Function):
    """ReLU whose gradient is rectified, and with ``guided`` also stopped where ReLU stops it."""

    @staticmethod
    def forward(context, value, guided):
        context.save_for_backward(value)
        context.guided = guided
        return value.relu()

    @staticmethod
    def backward(context, gradient):
        (value,) = context.saved_tensors
        return gradient.clamp(min=0) * (value > 0 if context.guided else 1), None


class _ReLU(nn.Module):
    def __init__(self, guided: bool) -> None:
        super().__init__()
        self.guided = guided

    def forward(self, value: Tensor) -> Tensor:
        return _Rectified.apply(value, self.guided)


def rectified(s: Subject, guided: bool) -> Tensors:
    """Gradients of a copy with every ReLU replaced."""
    net = copy.deepcopy(s.net)
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, _ReLU(guided))
    return gradients(s, net=net)


def cam(s: Subject) -> Tensor:
    """``(B, t, h, w)``: Selvaraju et al., ICCV 2017, before its ReLU."""
    outputs: list[Tensor] = []
    with s.layer.register_forward_hook(
        lambda module, args, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    ):
        total = score(s, s.inputs).sum()
    asked = s.fold(torch.autograd.grad(total, outputs[0])[0])  # (B, C, t, h, w)
    return (asked.mean((2, 3, 4), keepdim=True) * s.fold(outputs[0])).sum(1).detach()


def two_frames(s: Subject) -> np.ndarray:
    """``(2, H, W)``: the frames of a map with the most and the least of it."""
    maps = s.layout.to_working(gradients(s)[0])[0].abs().sum(1).double()  # (T, H, W)
    strongest = maps.amax((1, 2))
    return maps[[int(strongest.argmax()), int(strongest.argmin())]].numpy()


# --- comparisons --------------------------------------------------------------------------------------------------


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether all numbers are as expected, up to a fraction of the largest."""
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def ready(s: Subject, found: Tensor | Tensors) -> Tensors:
    """The result as a tuple, if Captum's own tools can go on with it."""
    found = found if isinstance(found, tuple) else (found,)
    if [part.shape for part in found] != [clip.shape for clip in s.inputs]:
        raise Wrong(f"the result is of shape {', '.join(str(tuple(part.shape)) for part in found)}")
    if not all(bool(part.isfinite().all()) for part in found):
        raise Wrong("the result is not finite")
    if not all(part.is_contiguous() for part in found):
        raise Wrong("strided", "the result is strided, and Captum's sensitivity_max calls `.view` on it")
    return found


def same(s: Subject, found: Tensor | Tensors, expected: Tensors, tolerance: float = 1e-5) -> str | None:
    """None or a remark; raises Wrong unless all numbers are as expected."""
    found = ready(s, found)
    if not all(near(part, right, tolerance) for part, right in zip(found, expected, strict=True)):
        raise Wrong("the numbers are not those of the definition")
    return GRAPH if any(part.requires_grad for part in found) else None


def complete(s: Subject, found: Tensor | Tensors, expected: Tensor, tolerance: float) -> None:
    """Raise Wrong unless attributions sum to the change of the score, up to a fraction of the larger change."""
    total = sum(part.flatten(1).sum(1) for part in ready(s, found)).detach()
    short = ((total - expected).abs().max() / expected.abs().max()).item()
    if short > tolerance:
        raise Wrong(
            f"not complete (off by {short:.0%})",
            "attributions should sum to the output's change, and miss so much of it",
        )
