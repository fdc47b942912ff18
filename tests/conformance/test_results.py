"""Tests of the numbers: they equal a slow formula, in every layout, memory order, batch and precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import randomize

from .models import TWINS, case, fresh
from .subjects import over
from .trials import Trial, as_tuple, assert_close


@over(every_model=True)
def test_equals_the_slow_formula(trial: Trial) -> None:
    expected = trial.expected()
    assert_close(trial.attribute(), expected)
    assert all(part[0].std() > 0 for part in expected), "a flat map would agree with many"


@over("conv-btchw", "two-stream", "timesformer", "videomae", per="kind", together=True)
def test_shape_and_dtype_of_the_result(trial: Trial) -> None:
    found = trial.attribute()
    assert isinstance(found, tuple) == (len(trial.case.inputs) > 1)
    for part, clip in zip(as_tuple(found), trial.case.inputs, strict=True):
        assert part.shape == clip.shape and part.dtype == clip.dtype and part.device == clip.device
        assert part.is_contiguous() and part.grad_fn is None and not part.requires_grad and part.isfinite().all()
        assert part.untyped_storage().nbytes() == part.nbytes, "a view of something larger"


@over("conv", "videomae", per="class", together=True)
def test_tuple_input_returns_a_tuple(trial: Trial) -> None:
    found = trial.attribute(trial.case.inputs)
    assert isinstance(found, tuple) and len(found) == 1
    assert torch.equal(found[0], trial.attribute())


@over("conv", "videomae", per="kind", together=True)
def test_results_are_reproducible(trial: Trial) -> None:
    method = trial.method
    first, second = (method.attribute(trial.case.clips, **trial.keywords) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, trial.attribute())


@over("conv", "cnn-lstm", "two-stream", "timesformer", "videomae")
def test_batch_equals_single_clips(trial: Trial) -> None:
    """Every clip has its own target, as in Captum's test_targets."""
    together = as_tuple(trial.attribute())
    alone = [as_tuple(trial.on(trial.case.part(i)).attribute()) for i in range(len(trial.case.target))]
    assert_close(together, tuple(torch.cat(parts) for parts in zip(*alone, strict=True)))


@over(*TWINS, every_model=True)
def test_layout_does_not_change_results(trial: Trial) -> None:
    """With the same weights and another order of axes, the numbers are the same."""
    twin = trial.on(case(TWINS[trial.case.name]))
    assert twin.case.layout.axes != trial.case.layout.axes
    assert_close(twin.attribute().transpose(1, 2), trial.attribute(), within=1e-6)


@over("conv", "vivit", "own", per="kind", together=True)
def test_memory_order_does_not_change_results(trial: Trial) -> None:
    (clip,) = trial.case.inputs
    orders = {
        "strided": clip.permute(0, 4, 2, 1, 3).contiguous().permute(0, 3, 2, 4, 1),
        "channels last": clip.to(memory_format=torch.channels_last_3d),
        "a part of a larger clip": torch.cat([clip, clip], 4)[..., : clip.shape[4]],
    }
    expected = trial.attribute()
    for order, other in orders.items():
        assert torch.equal(other, clip) and not other.is_contiguous(), order
        found = trial.attribute(other)
        assert found.is_contiguous(), order
        assert_close(found, expected)


@over("conv", "two-stream", "timesformer", "videomae", per="kind", together=True)
def test_double_precision(trial: Trial) -> None:
    wide = trial.on(trial.case.to(torch.float64))
    found = as_tuple(wide.attribute())
    assert all(part.dtype == torch.float64 for part in found)
    assert_close(tuple(part.float() for part in found), trial.attribute())


@over("conv", "videomae", ours=True)
def test_half_precision(trial: Trial) -> None:
    """The map is float32, and close to the map of the same weights and clips in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        half = trial.on(trial.case.to(dtype))
        rounded = trial.on(half.case.to(torch.float32))
        found = as_tuple(half.attribute())
        assert all(part.dtype == torch.float32 and part.isfinite().all() for part in found)
        for part, wanted in zip(found, as_tuple(rounded.attribute()), strict=True):
            similar = torch.nn.functional.cosine_similarity(part.flatten(1), wanted.flatten(1))
            assert (similar > 0.97).all(), (dtype, similar)


@over("conv", "vivit")
def test_map_depends_on_the_weights(trial: Trial) -> None:
    """The sanity check of Adebayo et al. (NeurIPS 2018): a map of the clip alone would not change."""
    other = trial.on(fresh(trial.case.name))
    randomize(other.case.model, seed=5)
    found, before = other.attribute(), trial.attribute()
    related = torch.corrcoef(torch.stack([found.flatten(), before.flatten()]))[0, 1]
    assert related < 0.9
    assert_close(found, other.expected())


@over("conv", "vivit")
def test_map_depends_on_the_clip(trial: Trial) -> None:
    (clip,) = trial.case.inputs
    flipped = replace(trial.case, inputs=(clip.flip(trial.case.layout.time),))
    found, before = trial.on(flipped).attribute(), trial.attribute()
    assert not torch.allclose(found, before) and not torch.allclose(found, before.flip(trial.case.layout.time))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@over("conv", "two-stream", "vivit", per="kind", together=True)
def test_on_a_gpu(trial: Trial) -> None:
    there = fresh(trial.case.name)
    there = replace(there, model=there.model.cuda(), inputs=tuple(clip.cuda() for clip in there.inputs))
    found = as_tuple(trial.on(there).attribute())
    assert all(part.is_cuda for part in found)
    assert_close(tuple(part.cpu() for part in found), trial.attribute(), within=1e-3)
