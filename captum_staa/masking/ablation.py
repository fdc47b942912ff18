"""How much the score falls when a region's voxels are replaced: the engine of occlusion and of feature ablation."""

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
    """The fall of the score for every region and example.

    Only the voxels of a region are written, into a batch of copies that is made once, and put back afterwards: what a
    region costs outside the model grows with the region, not with the clip.

    Args:
        score: inputs of ``copies * B`` examples, and ``copies``, to ``(copies, B)``.
        inputs: ``(B, ...)`` each; the model never gets these themselves, only copies.
        baselines: of the inputs' shapes.
        regions: what is replaced together.
        perturbations_per_eval: regions per call of the model; changes memory and time, no number.
        tick: called after every call of the model.

    Returns:
        ``(n, B)``: score of the whole minus score without the region.
    """
    count = len(regions)
    copies = min(perturbations_per_eval, count)
    batch = [value.detach()[None].repeat(copies, *[1] * value.ndim) for value in inputs]  # (copies, B, ...)

    def write(values: tuple[Tensor, ...], chunk: list[list[Place]]) -> None:
        for row, places in enumerate(chunk):
            for tensor, where in places:
                batch[tensor][row][where] = values[tensor][where]

    def call(rows: int) -> Tensor:
        """The scores ``(rows, B)`` of the first copies, which are left as they are also where the model writes."""
        before = [_version(copy) for copy in batch]
        value = score(tuple(copy[:rows].flatten(0, 1) for copy in batch), rows).clone()  # it may be a view of its input
        for copy, original, version in zip(batch, inputs, before, strict=True):
            if version is None or _version(copy) != version:
                copy.copy_(original)
        tick()
        return value

    whole = call(1)
    falls = []
    for first in range(0, count, copies):
        chunk = [list(regions.places(region)) for region in range(first, min(first + copies, count))]
        write(baselines, chunk)
        falls.append(whole - call(len(chunk)))
        write(inputs, chunk)
    return torch.cat(falls)


def _version(value: Tensor) -> int | None:
    """Grows with every write in place; None under inference_mode, where nobody counts."""
    return None if value.is_inference() else value._version
