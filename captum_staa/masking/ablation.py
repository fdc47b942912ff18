"""Ablate regions: compute how much the score decreases when a region is replaced by the baseline.

Occlusion and feature ablation share this code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_staa.masking.regions import Place, Regions

Score = Callable[[tuple[Tensor, ...], int], Tensor]


@torch.no_grad()
def ablate(
    score: Score,
    inputs: tuple[Tensor, ...],
    baselines: tuple[Tensor, ...],
    regions: Regions,
    perturbations_per_eval: int,
    tick: Callable[[], object],
) -> Tensor:
    """Return the decrease of the score for every region and example.

    The batch of copies is allocated once. For each region, only its voxels are written, and restored afterwards. The
    cost outside the model is therefore proportional to the size of the region and not to the size of the clip.

    Args:
        score: function from inputs of ``copies * B`` examples and ``copies`` to scores ``(copies, B)``.
        inputs: tensors ``(B, ...)``. The model receives copies, never these tensors.
        baselines: replacement values, one tensor per input, of the same shape.
        regions: the sets of voxels that are replaced together.
        perturbations_per_eval: regions per call of the model. It changes memory and time, not the result.
        tick: called after every call of the model.

    Returns:
        ``(n, B)``, the score of the unperturbed inputs minus the score without the region.
    """
    count = len(regions)
    copies = min(perturbations_per_eval, count)
    batch = [value.detach()[None].repeat(copies, *[1] * value.ndim) for value in inputs]  # (copies, B, ...)

    def write(values: tuple[Tensor, ...], chunk: list[list[Place]]) -> None:
        for row, places in enumerate(chunk):
            for tensor, where in places:
                batch[tensor][row][where] = values[tensor][where]

    def call(rows: int) -> Tensor:
        """Return the scores ``(rows, B)`` of the first copies. Restore the copies if the model wrote into them."""
        before = [_version(copy) for copy in batch]
        value = score(
            tuple(copy[:rows].flatten(0, 1) for copy in batch), rows
        ).clone()  # the model's output may be a view of its input
        for copy, original, version in zip(batch, inputs, before, strict=True):
            if version is None or _version(copy) != version:
                copy.copy_(original)
        tick()
        return value

    whole = call(1)
    decreases = []
    for first in range(0, count, copies):
        chunk = [list(regions.places(region)) for region in range(first, min(first + copies, count))]
        write(baselines, chunk)
        decreases.append(whole - call(len(chunk)))
        write(inputs, chunk)
    return torch.cat(decreases)


def _version(value: Tensor) -> int | None:
    """Return the tensor's version, which increases with every in-place write. None under inference_mode."""
    return None if value.is_inference() else value._version
