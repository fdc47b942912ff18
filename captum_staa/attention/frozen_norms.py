"""Normalization functions whose scale is a constant for autograd."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa.attention.linear_graph import FrozenLayerNorm, FrozenRatio


def layer_norm(func: Any, args: Any, kwargs: Any) -> Any:
    def run(
        input: Tensor,
        normalized_shape: Iterable[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> Any:
        return FrozenLayerNorm.apply(input, tuple(normalized_shape), weight, bias, eps)

    return run(*args, **kwargs)


def rms_norm(func: Any, args: Any, kwargs: Any) -> Any:
    def run(
        input: Tensor, normalized_shape: Iterable[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Any:
        dims = tuple(range(-len(tuple(normalized_shape)), 0))

        def evaluate(x: Tensor) -> tuple[Tensor, ...]:
            scale = _inverse_root(_wide(x).square().mean(dims, keepdim=True), eps, x.dtype)
            return (func(x, normalized_shape, weight, eps), scale, *([] if weight is None else [weight.detach()]))

        return FrozenRatio.apply(input, evaluate)

    return run(*args, **kwargs)


def group_norm(func: Any, args: Any, kwargs: Any) -> Any:
    def run(
        input: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        x = _wide(input).reshape(len(input), num_groups, -1)
        centered = x - x.mean(-1, keepdim=True)
        scale = _inverse_root(centered.detach().square().mean(-1, keepdim=True), eps, input.dtype)
        return _per_channel((centered * scale).reshape(input.shape), weight, bias).to(input.dtype)

    return run(*args, **kwargs)


def instance_norm(func: Any, args: Any, kwargs: Any) -> Any:
    def run(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        use_input_stats: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Any:
        if not use_input_stats:
            return func(*args, **kwargs)  # already affine
        return group_norm(func, (input, input.shape[1], weight, bias, eps), {})

    return run(*args, **kwargs)


def batch_norm(func: Any, args: Any, kwargs: Any) -> Any:
    """Rule of batch norm. Mean and scale are constants, because batch statistics mix the examples of a batch."""

    def run(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Any:
        if not training:
            return func(*args, **kwargs)
        dims = (0, *range(2, input.ndim))

        def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
            scale = _inverse_root(_wide(x).var(dims, unbiased=False, keepdim=True), eps, x.dtype)
            value = func(x, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
            return value, _per_channel(scale, weight, None)

        return FrozenRatio.apply(input, evaluate)

    return run(*args, **kwargs)


def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Return the cosine similarity as a product of two normalized tensors, written with functions that have rules."""
    return (F.normalize(x1, dim=dim, eps=eps) * F.normalize(x2, dim=dim, eps=eps)).sum(dim)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_root(squares: Tensor, eps: float | None, dtype: torch.dtype) -> Tensor:
    return (squares + (torch.finfo(dtype).eps if eps is None else eps)).rsqrt()


def _per_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    x = x if weight is None else x * weight.detach().view(shape)
    return x if bias is None else x + bias.view(shape)
