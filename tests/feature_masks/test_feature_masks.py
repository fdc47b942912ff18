"""Feature masks: regular masks equal loops over voxels; all masks work for any clip, layout and dtype."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from itertools import product

import pytest
import torch
from covering import in_one_case
from tiny_models import NAMES, clip_for, tiny
from torch import Tensor, nn

from captum_staa import VideoClassifier, VideoLayout, feature_masks

SHAPE = {"B": 2, "T": 5, "C": 3, "H": 12, "W": 14}


def clip_of(layout: str = "BTCHW", seed: int = 0, **sizes: int) -> Tensor:
    """Smooth random colors, which have regions to segment."""
    sizes = SHAPE | sizes
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(sizes["B"] * sizes["T"], sizes["C"], 4, 4, generator=generator)
    frames = nn.functional.interpolate(coarse, size=(sizes["H"], sizes["W"]), mode="bilinear")
    return VideoLayout(layout).from_working(frames.unflatten(0, (sizes["B"], sizes["T"]))).contiguous()


MASKS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "frames": feature_masks.frames,
    "segments": lambda clip, layout: feature_masks.segments(clip, layout, 3),
    "grid": lambda clip, layout: feature_masks.grid(clip, layout, (2, 5, 4)),
    "supervoxels": lambda clip, layout: feature_masks.supervoxels(clip, layout, 8),
    "flow_tubes": lambda clip, layout: feature_masks.flow_tubes(clip, layout, 5),
}
PER_CLIP = ("supervoxels", "flow_tubes")
each_mask = pytest.mark.parametrize("name", MASKS)


@functools.cache
def known(name: str) -> Tensor:
    """The mask of the clip of :func:`clip_of`, computed once."""
    return MASKS[name](clip_of(), "BTCHW")


def test_frames_ids_are_frame_indices():
    assert feature_masks.frames(clip_of(), "BTCHW").tolist() == torch.arange(5).view(1, 5, 1, 1, 1).tolist()
    assert feature_masks.frames(clip_of("BCTHW"), "BCTHW").tolist() == torch.arange(5).view(1, 1, 5, 1, 1).tolist()


@in_one_case()
@pytest.mark.parametrize("count", range(1, 13))
def test_segments_have_almost_equal_lengths(count):
    clip = clip_of(B=1, T=count, C=1, H=2, W=2)
    for n in range(1, count + 1):
        ids = feature_masks.segments(clip, "BTCHW", n).flatten().tolist()
        assert ids == sorted(ids) and sorted(set(ids)) == list(range(n))
        lengths = [ids.count(i) for i in range(n)]
        assert max(lengths) - min(lengths) <= 1, (count, n, lengths)


@in_one_case()
@pytest.mark.parametrize("cell", [(1, 1, 1), (2, 5, 4), (5, 12, 14), (3, 7, 1), (1, 12, 5)])
def test_grid_counts_cells_along_time_then_height_then_width(cell):
    mask = feature_masks.grid(clip_of(), "BTCHW", cell)
    places = [tuple(i // side for i, side in zip(at, cell, strict=True)) for at in product(*map(range, (5, 12, 14)))]
    order = {place: i for i, place in enumerate(sorted(set(places)))}
    assert mask.shape == (1, 5, 1, 12, 14)
    assert mask.flatten().tolist() == [order[place] for place in places]


@pytest.mark.parametrize("name", NAMES)
def test_tubelets_are_the_pixel_blocks_of_tokens(name):
    clf = tiny(name)
    mask = feature_masks.tubelets(clip_for(clf), clf)[0, :, 0]
    assert clf.grid is not None
    t, h, w = clf.grid.tubelet
    for at in product(range(clf.num_frames), range(24), range(16)):
        i, j, k = at[0] // t, at[1] // h, at[2] // w
        assert mask[at] == (i * clf.grid.h + j) * clf.grid.w + k
        values = torch.zeros(1, clf.grid.num_patches)
        token = (j * clf.grid.w + k) * clf.grid.t + i if clf.grid.order == "hwt" else int(mask[at])
        values[0, token] = 1
        assert clf.grid.to_grid(values).flatten()[mask[at]] == 1  # ids follow the order of the token grid


def test_tubelets_are_the_pixels_that_change_the_embedding_of_a_token():
    """A change of a tubelet changes the embedding of its token only."""
    clf = tiny("videomae")
    clip = clip_for(clf, batch=1)
    mask = feature_masks.tubelets(clip, clf)
    embed = clf.module.videomae.embeddings
    with torch.no_grad():
        before = embed(clip, None)[0]
        for feature in range(int(mask.max()) + 1):
            changed = (embed(clip.masked_fill(mask == feature, 0.0), None)[0] != before).any(1)
            assert changed.nonzero().flatten().tolist() == [feature]


@pytest.mark.parametrize("layout", ["BTCHW", "BCTHW"])
def test_pixels_without_a_token_are_the_last_feature(layout):
    clf = VideoClassifier(
        tiny("videomae").module, layout, image_size=(27, 16), num_frames=9
    )  # the model reads 8 x 24 x 16
    mask = VideoLayout(layout).to_working(feature_masks.tubelets(clip_of(layout, T=9, H=27, W=16), clf))[0, :, 0]
    rest = torch.ones(9, 27, 16, dtype=torch.bool)
    rest[:8, :24] = False
    assert mask[rest].unique().tolist() == [24]
    assert mask[~rest].unique().tolist() == list(range(24))
    assert mask[:8, :24].equal(feature_masks.tubelets(clip_of(T=8, H=24, W=16), tiny("videomae"))[0, :, 0])


@in_one_case()
@each_mask
def test_mask_is_broadcastable_to_its_clip(name):
    clip = clip_of()
    kept = clip.clone()
    mask = MASKS[name](clip, "BTCHW")
    assert mask.dtype == torch.int64 and mask.is_contiguous() and clip.equal(kept)
    assert mask.expand_as(clip).shape == clip.shape and mask.shape[2] == 1
    assert len(mask) == (2 if name in PER_CLIP else 1)
    for ids in mask:
        assert ids.unique().tolist() == list(range(int(ids.max()) + 1))


@in_one_case()
@each_mask
@pytest.mark.parametrize("layout", ["BCTHW", "BCHWT", "BWHCT"])
def test_mask_does_not_depend_on_the_layout(name, layout):
    found = MASKS[name](clip_of(layout), layout)
    assert VideoLayout(layout).to_working(found).equal(known(name)) and found.is_contiguous()


@in_one_case()
@each_mask
def test_mask_of_a_clip_does_not_depend_on_other_clips(name):
    clips = clip_of(seed=1)
    whole = MASKS[name](clips, "BTCHW")
    for i in range(2):
        assert MASKS[name](clips[i : i + 1], "BTCHW").equal(whole[i if name in PER_CLIP else 0][None])


@in_one_case()
@each_mask
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels(name, channels):
    clip = torch.zeros(1, 5, channels, 12, 14)
    clip[:, :, -1, :, 6:] = 1.0  # an edge in one channel only
    mask = MASKS[name](clip, "BTCHW")
    if name in PER_CLIP:
        assert not set(mask[..., :6].unique().tolist()) & set(mask[..., 6:].unique().tolist())
    else:
        assert mask.equal(MASKS[name](clip_of(B=1), "BTCHW"))


@in_one_case()
@each_mask
def test_mask_does_not_use_global_randomness_and_ignores_gradients_and_dtype(name):
    clip = clip_of()
    before = torch.get_rng_state()
    assert MASKS[name](clip.clone().requires_grad_(), "BTCHW").equal(known(name))
    assert torch.get_rng_state().equal(before)
    exact = (clip * 16).round() / 16  # the same in every dtype
    first = MASKS[name](exact, "BTCHW")
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert MASKS[name](exact.to(dtype), "BTCHW").equal(first)


@in_one_case()
@each_mask
@pytest.mark.parametrize(
    ("clip", "layout", "error", "message"),
    [
        (clip_of()[0], "BTCHW", ValueError, "(5, 3, 12, 14)"),
        (clip_of()[:0], "BTCHW", ValueError, "(0, 5, 3, 12, 14)"),
        (clip_of(), "BTHW", ValueError, "'BTHW'"),
        (clip_of("BCTHW"), "BTCHW", ValueError, "Pass layout='BCTHW'"),
        (torch.full((1, 5, 3, 12, 14), torch.nan), "BTCHW", ValueError, "got 2520 nan or infinite values out of 2520"),
        (clip_of().int(), "BTCHW", TypeError, "torch.int32"),
        ([1.0], "BTCHW", TypeError, "list"),
    ],
)
def test_invalid_clip_raises_error(name, clip, layout, error, message):
    with pytest.raises(error) as caught:
        MASKS[name](clip, layout)
    assert message in str(caught.value)


@in_one_case()
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda clip: feature_masks.segments(clip, "BTCHW", 0), ValueError, "1 to 5 (frames"),
        (lambda clip: feature_masks.segments(clip, "BTCHW", 6), ValueError, "1 to 5 (frames"),
        (lambda clip: feature_masks.segments(clip, "BTCHW", 2.0), TypeError, "2.0 of type float"),
        (lambda clip: feature_masks.segments(clip, "BTCHW", True), TypeError, "True of type bool"),
        (lambda clip: feature_masks.grid(clip, "BTCHW", (2, 0, 4)), ValueError, "side h of cells = (2, 0, 4)"),
        (lambda clip: feature_masks.grid(clip, "BTCHW", (6, 1, 1)), ValueError, "side t of cells = (6, 1, 1)"),
        (lambda clip: feature_masks.grid(clip, "BTCHW", (1, 1, 15)), ValueError, "1 to 14 (frames or pixels"),
        (lambda clip: feature_masks.grid(clip, "BTCHW", (1, 1.5, 1)), TypeError, "1.5 of type float"),
        (lambda clip: feature_masks.grid(clip, "BTCHW", (4, 4)), ValueError, "cells must be (t, h, w)"),
        (lambda clip: feature_masks.grid(clip, "BTCHW", 4), ValueError, "got 4"),
        (lambda clip: feature_masks.supervoxels(clip, "BTCHW", 0), ValueError, "from 1 to 840 (voxels"),
        (lambda clip: feature_masks.flow_tubes(clip, "BTCHW", 841), ValueError, "from 1 to 840 (voxels"),
        (lambda clip: feature_masks.supervoxels(clip, "BTCHW", 8, compactness=0), ValueError, "compactness"),
        (lambda clip: feature_masks.flow_tubes(clip, "BTCHW", 8, compactness=torch.nan), ValueError, "nan"),
        (lambda clip: feature_masks.flow_tubes(clip[..., :1], "BTCHW", 2), ValueError, "2 x 2 pixels"),
        (lambda clip: feature_masks.supervoxels(clip, "BTCHW", 8, time=2), TypeError, "time"),
    ],
)
def test_invalid_option_raises_error(call, error, message):
    with pytest.raises(error) as caught:
        call(clip_of())
    assert message in str(caught.value)


def test_tubelets_of_an_invalid_classifier_or_clip_raise_error():
    clf = tiny("videomae")
    cnn = VideoClassifier(nn.Conv3d(3, 2, 3), "BTCHW")
    for call, error, message in (
        (lambda: feature_masks.tubelets(clip_of(), cnn), ValueError, "feature_masks.grid(inputs, layout, (t, h, w))"),
        (lambda: feature_masks.tubelets(clip_of(), nn.Linear(2, 2)), TypeError, "Linear"),
        (
            lambda: feature_masks.tubelets(clip_of(T=8, H=24, W=24), clf),
            ValueError,
            "must have (T, H, W) = (8, 24, 16)",
        ),
        (lambda: feature_masks.tubelets(clip_of(T=6, H=24, W=16), clf), ValueError, "(T, H, W) = (6, 24, 16)"),
        (lambda: feature_masks.tubelets(clip_of("BCTHW", T=8, H=24, W=16), clf), ValueError, "layout='BCTHW'"),
        (lambda: feature_masks.tubelets(torch.zeros(1, 8, 24, 16), clf), ValueError, "(1, 8, 24, 16)"),
        (lambda: feature_masks.tubelets(torch.full((1, 8, 3, 24, 16), torch.nan), clf), ValueError, "got 9216 nan"),
    ):
        with pytest.raises(error) as caught:
            call()
        assert message in str(caught.value)


def test_clip_smaller_than_the_tokens_raises_value_error():
    """A family may have no fixed size. Its grid still defines the pixels of the tokens."""
    clf = tiny("videomae")
    clf.num_frames = clf.image_size = None
    assert int(feature_masks.tubelets(clip_of(T=9, H=24, W=18), clf).max()) == 24
    with pytest.raises(ValueError, match=r"must have \(T, H, W\) = \(8, 24, 16\)"):
        feature_masks.tubelets(clip_of(T=8, H=23, W=16), clf)


@pytest.mark.parametrize("name", PER_CLIP)
def test_missing_scikit_image_raises_import_error_with_install_command(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r'pip install "captum_staa\[supervoxels\]"'):
        MASKS[name](clip_of(), "BTCHW")
