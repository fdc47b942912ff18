"""Integer arguments: all functions accept Python and NumPy integers in range, and reject booleans and floats."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from covering import in_one_case
from tiny_models import tiny
from torch import Tensor

from captum_staa import RISE, STAA, SpatioTemporalPerturbation, TokenGrid, VideoLayout, VideoOcclusion
from captum_staa import feature_masks as masks
from captum_staa import metrics as m
from captum_staa._utils.checks import check_count, check_sides
from captum_staa.attr import VideoFeatureAblation
from captum_staa.models.resnet3d import ResNet3DConfig, SlowResNet
from captum_staa.models.st_abn import BranchConfig

CLIP = torch.rand(2, 4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
MAPS = CLIP.sum(2)
BOXES = torch.tensor([[[1.0, 0.0, 4.0, 2.0]]])
ARGUMENTS = {"inputs": CLIP, "attributions": MAPS, "layout": "BTCHW", "target": 0, "cells": (2, 3, 4)}


def model(clip: Tensor) -> Tensor:
    frames = clip.mean((2, 3, 4))
    return torch.stack([frames[:, 0], frames[:, 1] * frames[:, 2], frames.square().sum(1)], 1)


def explained(method: Any, *args: Any, **options: Any) -> Any:
    return lambda **number: method.attribute(CLIP, *args, target=0, **options, **number)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "insertion": (lambda **n: m.insertion(model, **ARGUMENTS | n), {"steps": 3, "perturbations_per_eval": 2}),
    "cells": (lambda **n: m.insertion_deletion(model, **ARGUMENTS | {"steps": 2} | n), {"cells": (2, 3, 4)}),
    "aopc": (lambda **n: m.aopc(model, **ARGUMENTS | n), {"steps": 3}),
    "saco": (lambda **n: m.saco(model, **ARGUMENTS | n), {"groups": 3, "perturbations_per_eval": 2}),
    "correlation": (lambda **n: m.faithfulness_correlation(model, **ARGUMENTS | n), {"n_subsets": 3}),
    "pointing_game": (lambda **n: m.pointing_game(MAPS, MAPS > 1.5, **n), {"tolerance": (0, 1, 2)}),
    "boxes_to_truth": (lambda **n: m.boxes_to_truth(BOXES, **n), {"size": (3, 5)}),
    "reliability": (lambda **n: m.reliability(MAPS[0, 0], **n), {"random": 0, "n_bootstrap": 9}),
    "noise": (
        lambda **n: m.noise.tubelet_noise("BTCHW", std=0.1, **n).for_sensitivity()(CLIP, 0.1),
        {"cells": (2, 3, 4)},
    ),
    "shuffle": (
        lambda **n: m.noise.frame_shuffle("BTCHW", **n).for_sensitivity()(CLIP, 0.1),
        {"window": 2},
    ),
    "segments": (lambda **n: masks.segments(CLIP, "BTCHW", **n), {"n": 3}),
    "grid": (lambda **n: masks.grid(CLIP, "BTCHW", **n), {"cells": (3, 2, 4)}),
    "RISE": (explained(RISE(model, "BTCHW")), {"n_samples": 5, "n_cells": (2, 2, 2), "perturbations_per_eval": 2}),
    "occlusion": (
        explained(VideoOcclusion(model, "BTCHW")),
        {"sliding_window_shapes": (2, 3, 4), "strides": (1, 2, 2), "perturbations_per_eval": 2},
    ),
    "occlusion, one stride": (explained(VideoOcclusion(model, "BTCHW"), (2, 3, 4)), {"strides": 2}),
    "ablation": (
        explained(VideoFeatureAblation(model, "BTCHW"), feature_mask=masks.grid(CLIP, "BTCHW", (2, 3, 4))),
        {"perturbations_per_eval": 2},
    ),
    "perturbation": (
        explained(SpatioTemporalPerturbation(model, "BTCHW"), iterations=2),
        {"perturbations_per_eval": 2},
    ),
    "layers": (lambda **n: STAA(tiny("videomae"), "attention", **n).layers, {"layers": [0, -1]}),
    "layout": (lambda **n: VideoLayout("BTCHW", **n).size(CLIP), {"channels": 3}),
    "TokenGrid": (lambda **n: TokenGrid(**n), {"t": 2, "h": 3, "w": 4, "prefix": 1}),
    "ResNet3D": (lambda **n: json.dumps(vars(ResNet3DConfig(**n))), {"num_classes": 2, "width": 4, "stages": 2}),
    "SlowResNet": (
        lambda **n: json.dumps(SlowResNet(layers=(1, 1, 1, 1), **n).config),
        {"num_classes": 2, "width": 4},
    ),
    "BranchConfig": (lambda **n: json.dumps(vars(BranchConfig(**n))), {"width": 3, "maps": 2}),
}


def converted(number: Any, convert: Any) -> Any:
    """Convert a number, or each item of a tuple or list."""
    return type(number)(map(convert, number)) if isinstance(number, (tuple, list)) else convert(number)


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, tuple) and expected and isinstance(expected[0], (tuple, Tensor)):
        return all(map(same, found, expected))
    return found == expected


@in_one_case()
@pytest.mark.parametrize("name", CALLS)
def test_numpy_integers_are_accepted(name):
    call, numbers = CALLS[name]
    expected = call(**numbers)
    for kind in (np.int64, np.int8):
        assert same(call(**{key: converted(number, kind) for key, number in numbers.items()}), expected)


def test_small_numpy_integers_do_not_overflow():
    eight = np.int8(8)
    assert TokenGrid(eight, eight, eight, tubelet=(eight, eight, eight)).num_patches == 512
    for metric in (m.insertion, m.aopc):
        options: dict[str, Any] = ARGUMENTS | {"cells": (1, 1, 1)}
        assert same(metric(model, **options, steps=np.int8(127)), metric(model, **options, steps=127))
    few = explained(RISE(model, "BTCHW"), n_cells=(2, 2, 2), perturbations_per_eval=40)
    assert same(few(n_samples=np.int8(127)), few(n_samples=127))


@in_one_case()
@pytest.mark.parametrize(("name", "key"), [(name, key) for name in CALLS for key in CALLS[name][1]])
def test_booleans_and_floats_are_rejected(name, key):
    call, numbers = CALLS[name]
    for kind in (float, bool):
        with pytest.raises(TypeError, match=r"must be an integer .* of type (float|bool)"):
            call(**numbers | {key: converted(numbers[key], kind)})


@in_one_case()
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"value": 0}, ValueError, "n must be an integer of at least 1, got 0"),
        ({"value": np.int64(0)}, ValueError, "n must be an integer of at least 1, got 0"),
        ({"value": 4, "most": 3, "of": "frames"}, ValueError, "n must be an integer from 1 to 3 (frames), got 4"),
        ({"value": -3, "least": -2, "most": 1}, ValueError, "n must be an integer from -2 to 1, got -3"),
        ({"value": True}, TypeError, "n must be an integer of at least 1, got True of type bool"),
        ({"value": np.True_}, TypeError, "of type bool"),
        ({"value": 2.0}, TypeError, "got 2.0 of type float"),
        ({"value": "2"}, TypeError, "got '2' of type str"),
        ({"value": None}, TypeError, "got None of type NoneType"),
        ({"value": torch.tensor(2)}, TypeError, "of type Tensor"),
    ],
)
def test_check_count_reports_expected_and_received_value(options, error, message):
    with pytest.raises(error) as caught:
        check_count("n", **options)
    assert message in str(caught.value)


def test_check_count_includes_both_ends_of_the_range():
    for value, least, most in ((1, 1, None), (0, 0, 0), (-2, -2, 1), (1, -2, 1), (10**30, 1, None)):
        check_count("n", value, least, most)


def test_check_sides_requires_three_integers():
    check_sides("cells", [1, np.int32(2), 3])
    for value in (3, (1, 2), (1, 2, 3, 4), "123", None):
        with pytest.raises(ValueError, match=r"cells must be \(t, h, w\), three integers of at least 1, got .*"):
            check_sides("cells", value)
    with pytest.raises(ValueError, match=r"h of cells = \(1, 0, 3\) must be an integer of at least 1, got 0"):
        check_sides("cells", (1, 0, 3))
