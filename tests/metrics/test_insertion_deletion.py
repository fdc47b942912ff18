"""Insertion and deletion equal a loop over steps, cells and voxels, and find planted evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from covering import in_one_case
from torch import nn

from captum_staa import VideoClassifier, feature_masks
from captum_staa.benchmark import PlantedClips
from captum_staa.metrics.insertion_deletion import deletion, insertion, insertion_deletion

SIZES = (2, 5, 3, 7, 6)  # B, T, C, H, W: all differ, so that swapped axes are found
CELLS = (2, 3, 4)  # none divides its axis


def logits(clip: torch.Tensor) -> torch.Tensor:
    """Logits of three classes, nonlinear, with a different weight for each voxel. Examples are independent."""
    places = torch.arange(clip[0].numel(), dtype=torch.float64).reshape(clip.shape[1:])
    weights = torch.stack([(places * step).sin() for step in (0.7, 1.3, 2.9)])
    return torch.tanh((clip.double()[:, None] * weights).sum((2, 3, 4, 5)) / 4) * 2


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a clip BTCHW, attributions of its shape and a baseline."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(SIZES, generator=generator) for _ in range(3))


def boxes(cells: tuple[int, int, int]) -> list[tuple[slice, ...]]:
    """The cells of a clip, by a loop."""
    t, h, w = cells
    return [
        (slice(a, a + t), slice(None), slice(b, b + h), slice(c, c + w))
        for a in range(0, SIZES[1], t)
        for b in range(0, SIZES[3], h)
        for c in range(0, SIZES[4], w)
    ]


def members(mask: np.ndarray) -> list[np.ndarray]:
    """The voxels of a mask's features in one clip, as bool arrays (T, C, H, W)."""
    whole = np.broadcast_to(mask, SIZES[1:])
    return [whole == unit for unit in sorted(set(whole.flatten().tolist()))]


def walked(clip, attributions, baseline, units, *, target, steps, most_first=True, insert=True, probability=True):
    """Score, curve and fractions of one clip by definition: sort, replace unit by unit, call the model on one clip."""
    clip, baseline = clip.numpy(), baseline.numpy()
    by_place = attributions.double().numpy().sum(1, keepdims=True)  # (T, 1, H, W)
    means = [float(np.broadcast_to(by_place, SIZES[1:])[unit].mean()) for unit in units]
    ranking = sorted(range(len(units)), key=lambda unit: (-means[unit], unit))
    ranking = ranking if most_first else ranking[::-1]
    count = len(units)
    steps = min(steps, count)
    curve, fractions = [], []
    for k in range(steps + 1):
        inserted = (
            math.floor(k * count / steps + 0.5) if insert else count - math.floor((steps - k) * count / steps + 0.5)
        )
        altered, source = (baseline.copy(), clip) if insert else (clip.copy(), baseline)
        for unit in ranking[:inserted]:
            altered[units[unit]] = source[units[unit]]
        answer = logits(torch.from_numpy(altered)[None])[0].numpy()
        curve.append((np.exp(answer) / np.exp(answer).sum() if probability else answer)[target])
        fractions.append(inserted / count)
    area = sum((fractions[k] - fractions[k - 1]) * (curve[k] + curve[k - 1]) / 2 for k in range(1, steps + 1))
    return area, curve, fractions


def same(found, expected, row):
    area, curve, fractions = expected
    assert found.score.dtype == found.curve.dtype == torch.float64
    assert found.curve[row].tolist() == pytest.approx(curve, rel=1e-9)
    assert found.fractions[row].tolist() == pytest.approx(fractions, abs=1e-12)
    assert found.score[row].item() == pytest.approx(area, rel=1e-9)


@in_one_case("steps", "order")
@pytest.mark.parametrize(("axis", "cells"), [("joint", CELLS), ("space", (5, 3, 4)), ("time", (2, 7, 6))])
@pytest.mark.parametrize("steps", [1, 5, 8, 1000])
@pytest.mark.parametrize("order", ["morf", "lerf"])
def test_insertion_and_deletion_equal_a_loop_over_cells(axis, cells, steps, order):
    clip, attributions, baseline = drawn()
    options = {"target": [1, 2], "layout": "BTCHW", "cells": CELLS, "axis": axis, "baselines": baseline}
    for call, insert in ((insertion, True), (deletion, False)):
        found = call(logits, clip, attributions, steps=steps, order=order, **options)
        for row, target in enumerate((1, 2)):
            parts = clip[row], attributions[row], baseline[row], boxes(cells)
            how = {"steps": steps, "most_first": order == "morf", "insert": insert}
            same(found, walked(*parts, target=target, **how), row)


def test_insertion_deletion_equals_single_calls_and_computes_each_clip_once():
    clip, attributions, baseline = drawn(1)
    examples = []

    def counted(inputs: torch.Tensor) -> torch.Tensor:
        examples.append(len(inputs))
        return logits(inputs)

    options = {"target": 0, "layout": "BTCHW", "cells": CELLS, "baselines": baseline, "steps": 7}
    found = insertion_deletion(counted, clip, attributions, perturbations_per_eval=4, **options)
    assert examples == [8, 8, 8, 4]  # two clips each: both ends, and six points of each curve
    for name, call, order in (
        ("insertion", insertion, "morf"),
        ("deletion", deletion, "morf"),
        ("insertion_lerf", insertion, "lerf"),
        ("deletion_lerf", deletion, "lerf"),
    ):
        for one, other in zip(
            getattr(found, name), call(logits, clip, attributions, order=order, **options), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.insertion.curve[:, 0], logits(baseline).softmax(1)[:, 0])
    torch.testing.assert_close(found.deletion.curve[:, 0], logits(clip).softmax(1)[:, 0])
    assert torch.equal(found.deletion.score, found.insertion_lerf.score)


@pytest.mark.parametrize("layout", ["BTCHW", "BCTHW"])
def test_masks_with_a_different_number_of_features_per_clip(layout):
    """A clip with fewer features than the others gets all its features inserted, and the same score as alone."""
    clip, attributions, baseline = drawn(2)
    mask = torch.randint(0, 9, (2, 5, 1, 7, 6), generator=torch.Generator().manual_seed(4))
    mask[1][mask[1] > 3] = 0  # four features here, nine there
    turn = (lambda x: x) if layout == "BTCHW" else (lambda x: x.transpose(1, 2).contiguous())
    given = [turn(x) for x in (clip, attributions, baseline, mask)]

    def model(x: torch.Tensor) -> torch.Tensor:
        return logits(turn(x))

    options = {"target": 1, "layout": layout, "steps": 6}
    found = insertion(model, *given[:2], baselines=given[2], feature_mask=given[3], **options)
    for row in range(2):
        units = members(mask[row].numpy())
        alone = [x[row : row + 1] for x in given]
        single = insertion(model, *alone[:2], baselines=alone[2], feature_mask=alone[3], **options)
        expected = walked(clip[row], attributions[row], baseline[row], units, target=1, steps=6)
        same(single, expected, 0)
        assert found.score[row].item() == pytest.approx(expected[0], rel=1e-12)
    assert [len(members(mask[row].numpy())) for row in range(2)] == [9, 4]
    everywhere = mask[:1].expand(SIZES)  # the same for both clips, expanded along channels
    torch.testing.assert_close(
        insertion(model, *given[:2], baselines=0, feature_mask=turn(everywhere), **options).curve,
        insertion(model, *given[:2], baselines=None, feature_mask=turn(mask[:1]), **options).curve,
    )


def test_all_forms_of_attributions_give_the_same_score():
    clip, attributions, baseline = drawn(3)
    options = {"target": 2, "cells": CELLS, "steps": 9, "baselines": baseline}
    expected = insertion_deletion(logits, clip, attributions, layout="BTCHW", **options)
    for form in (attributions.double().sum(2), attributions.double().sum(2).numpy(), attributions.numpy()):
        assert torch.equal(
            insertion_deletion(logits, clip, form, layout="BTCHW", **options).insertion.curve, expected.insertion.curve
        )
    flipped = clip.transpose(1, 2)  # a view that is not contiguous
    options["baselines"] = baseline.transpose(1, 2)
    found = insertion_deletion(
        lambda x: logits(x.transpose(1, 2)), flipped, attributions.transpose(1, 2), layout="BCTHW", **options
    )
    torch.testing.assert_close(found.deletion.curve, expected.deletion.curve)


@pytest.mark.parametrize("perturbations_per_eval", [1, 3, 1000])
def test_perturbations_per_eval_does_not_change_results(perturbations_per_eval):
    clip, attributions, _ = drawn(5)
    offsets = torch.tensor([0.5, -1.0])

    def model(x: torch.Tensor, offset: torch.Tensor, scale: float) -> torch.Tensor:
        answer = logits(x) + offset[:, None] * scale * torch.arange(3)
        x.zero_()  # a model may write to its input
        return answer

    options = {"target": torch.tensor([0, 2]), "layout": "BTCHW", "cells": CELLS, "steps": 10}
    options["additional_forward_args"] = (offsets, 2.0)
    before = clip.clone()
    expected = [
        insertion(
            model,
            clip[i : i + 1],
            attributions[i : i + 1],
            **options
            | {
                "target": [(0, 2)[i]],
                "additional_forward_args": (offsets[i : i + 1], 2.0),
                "perturbations_per_eval": 2,
            },
        )
        for i in range(2)
    ]
    found = insertion(model, clip, attributions, perturbations_per_eval=perturbations_per_eval, **options)
    torch.testing.assert_close(found.curve, torch.cat([one.curve for one in expected]), rtol=1e-12, atol=0)
    assert torch.equal(clip, before)


def test_only_the_order_of_a_map_counts_and_clips_are_independent():
    clip = drawn(6)[0]
    maps = feature_masks.grid(clip, "BTCHW", CELLS)[:, :, 0].double()  # constant in each cell, 0 .. 17
    maps = (maps * 5 + torch.tensor([0.0, 3.0]).view(2, 1, 1, 1)) % 18
    options = {"target": 1, "layout": "BTCHW", "cells": CELLS, "steps": 12}
    expected = insertion(logits, clip, maps, **options)
    for raised in (maps.exp(), maps * 0.1 - 7, maps.sqrt()):
        assert torch.equal(insertion(logits, clip, raised, **options).curve, expected.curve)
    assert torch.equal(deletion(logits, clip, -maps, **options).score, expected.score)  # the reversed order
    swapped = insertion(logits, clip.flip(0), maps.flip(0), **options)
    assert torch.equal(swapped.score, expected.score.flip(0))


def test_equal_attributions_come_in_a_fixed_random_order():
    """Sums of 0.1 are not exact, and cells at the border are smaller: rounding errors must not break the tie."""
    clip, _, baseline = drawn(7)
    options = {"target": 1, "layout": "BTCHW", "cells": CELLS, "steps": 12, "baselines": baseline}
    found = insertion_deletion(logits, clip, torch.full((2, 5, 7, 6), 0.1, dtype=torch.float64), **options)
    expected = insertion_deletion(logits, clip, torch.zeros(2, 5, 7, 6), **options)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.curve, other.curve)
    alone = insertion(logits, clip[1:], torch.zeros(1, 5, 7, 6), **{**options, "baselines": baseline[1:]})
    torch.testing.assert_close(alone.curve, found.insertion.curve[1:], rtol=1e-12, atol=0)
    ids = feature_masks.grid(clip, "BTCHW", CELLS).expand(SIZES).double()
    for swept in (ids, -ids):  # in the order of ids, a constant map would go through the clip from start to end
        assert not torch.allclose(insertion(logits, clip, swept, **options).curve, found.insertion.curve)


def test_output_logit_uses_the_target_output():
    clip, attributions, baseline = drawn(8)
    options = {"layout": "BTCHW", "cells": CELLS, "steps": 4, "baselines": baseline, "output": "logit"}
    parts = clip[1], attributions[1], baseline[1], boxes(CELLS)
    expected = walked(*parts, target=2, steps=4, probability=False)
    same(insertion(logits, clip, attributions, target=2, **options), expected, 1)
    same(insertion(lambda x: logits(x)[:, 2], clip, attributions, **options), expected, 1)  # one number per clip
    options["output"] = "probability"
    half = insertion(lambda x: logits(x).half(), clip, attributions, target=2, **options)
    wide = insertion(lambda x: logits(x).half().float(), clip, attributions, target=2, **options)
    assert torch.equal(half.curve, wide.curve)


def test_default_cells_are_tubelets_or_16_x_16_per_frame():
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clip, label, truth = PlantedClips(seed=3, n=2)[:1]
    steps, maps = {"target": label, "steps": 2}, truth.float()
    expected = insertion(clf, clip, maps, feature_mask=feature_masks.tubelets(clip, clf), **steps)
    assert torch.equal(insertion(clf, clip, maps, **steps).curve, expected.curve)
    space = insertion(clf, clip, maps, axis="space", target=label, steps=1000)
    time = insertion(clf, clip, maps, axis="time", target=label, steps=1000)
    assert (space.curve.shape[1], time.curve.shape[1]) == (36 + 1, 8 + 1)  # 6 x 6 patches, 8 pairs of frames
    small = torch.randn(1, 3, 2, 40, 8)  # 2 frames, 40 x 8 pixels: cells of 1 x 3 x 1, the last row cut off

    def answer(x: torch.Tensor) -> torch.Tensor:
        return x.sum((1, 2, 3, 4))

    plain = insertion(answer, small, small, layout="BCTHW", output="logit", steps=1000, perturbations_per_eval=500)
    assert plain.curve.shape[1] == 2 * 14 * 8 + 1


def test_planted_evidence_scores_better_than_random_and_inverted():
    clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
    clips, labels, truth = PlantedClips(seed=12, n=24)[:6]
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    maps = {"true": truth.float(), "random": noise, "inverted": -truth.float()}
    found = {name: insertion_deletion(clf, clips, values, target=labels, steps=16) for name, values in maps.items()}
    rising = torch.stack([found[name].insertion.score for name in ("inverted", "random", "true")])
    falling = torch.stack([found[name].deletion.score for name in ("inverted", "random", "true")])
    assert bool((rising.mean(1).diff() > 0.05).all()), rising.mean(1)
    assert bool((falling.mean(1).diff() < -0.05).all()), falling.mean(1)
    assert int((rising[2] > rising[0] + 0.2).sum()) >= 5  # for nearly every clip
    assert int((falling[2] < falling[0] - 0.2).sum()) >= 5


def test_higher_is_better():
    assert (insertion.higher_is_better, deletion.higher_is_better, insertion_deletion.higher_is_better) == (
        True,
        False,
        None,
    )


class Untouched(nn.Module):
    """A model that fails if it is called."""

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the model was called")


CLIP = torch.zeros(1, 5, 3, 7, 6)
MAP = torch.zeros(1, 5, 7, 6)
IDS = torch.zeros(1, 5, 1, 7, 6, dtype=torch.long)


@in_one_case()
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"inputs": CLIP[0]}, ValueError, "(5, 3, 7, 6)"),
        ({"inputs": CLIP.long()}, TypeError, "inputs must"),
        ({"inputs": CLIP * math.nan}, ValueError, "got 630 nan or infinite values"),
        ({"layout": None}, ValueError, "'BTCHW'"),
        ({"layout": "BTHW"}, ValueError, "'BTHW'"),
        ({"attributions": MAP[:, :4]}, ValueError, "(1, 4, 7, 6)"),
        ({"attributions": CLIP[:, :, :1]}, ValueError, "(1, 5, 1, 7, 6)"),
        ({"attributions": MAP[0]}, ValueError, "(5, 7, 6)"),
        ({"attributions": MAP / 0}, ValueError, "nan or infinite"),
        ({"attributions": MAP.bool()}, TypeError, "torch.bool"),
        ({"attributions": [1.0]}, TypeError, "list"),
        ({"cells": (1, 2)}, ValueError, "(1, 2)"),
        ({"cells": (0, 1, 1)}, ValueError, "got 0"),
        ({"cells": (1, 1, 7)}, ValueError, "got 7"),
        ({"cells": (1, 1.0, 1)}, TypeError, "1.0 of type float"),
        ({"cells": (1, 1, 1), "feature_mask": IDS}, ValueError, "feature_mask"),
        ({"axis": "time", "feature_mask": IDS}, ValueError, "axis = 'time'"),
        ({"axis": "frames"}, ValueError, "'frames'"),
        ({"feature_mask": IDS.float()}, TypeError, "torch.float32"),
        ({"feature_mask": IDS.mT}, ValueError, "(1, 5, 1, 6, 7)"),
        ({"feature_mask": IDS[:, :4]}, ValueError, "(1, 4, 1, 7, 6)"),
        ({"feature_mask": torch.arange(3).view(1, 1, 3, 1, 1)}, ValueError, "(1, 1, 3, 1, 1)"),
        ({"baselines": CLIP[0]}, ValueError, "(5, 3, 7, 6)"),
        ({"baselines": math.inf}, ValueError, "finite"),
        ({"baselines": 1e300}, ValueError, "torch.float32"),
        ({"baselines": "blur"}, TypeError, "str"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 2.0}, TypeError, "got 2.0"),
        ({"perturbations_per_eval": 0}, ValueError, "perturbations_per_eval"),
        ({"output": "softmax"}, ValueError, "'softmax'"),
        ({"order": "MoRF"}, ValueError, "'MoRF'"),
        ({"nowhere": 1}, TypeError, "nowhere"),
    ],
)
def test_invalid_arguments_raise_before_the_model_is_called(change, error, message):
    arguments = {"inputs": CLIP, "attributions": MAP, "target": 0, "layout": "BTCHW", "order": "morf"} | change
    calls = [insertion, deletion] if "order" in change else [insertion, deletion, insertion_deletion]
    for call in calls:
        given = {name: value for name, value in arguments.items() if name != "order" or call is not insertion_deletion}
        with pytest.raises(error) as caught:
            call(Untouched(), **given)
        assert message in str(caught.value)


@pytest.mark.parametrize("answer", [lambda x: x.sum((1, 2, 3, 4)), lambda x: x.sum((2, 3, 4))[:, :1]])
def test_a_single_output_is_a_score_without_a_target(answer):
    found = insertion(answer, CLIP, MAP, layout="BTCHW").curve
    assert torch.equal(found, insertion(answer, CLIP, MAP, layout="BTCHW", output="logit").curve)


def test_probabilities_of_several_classes_need_a_target_and_a_class_axis():
    with pytest.raises(ValueError, match="target=class index"):
        insertion(lambda x: x.flatten(1)[:, :3], CLIP, MAP, layout="BTCHW")
    with pytest.raises(ValueError, match=r"class axis.*output='logit'"):
        insertion(lambda x: x, CLIP, MAP, target=(0, 0, 0, 0), layout="BTCHW")


def test_a_layout_different_from_the_classifiers_raises():
    clf = VideoClassifier(Untouched(), layout="BTCHW")
    with pytest.raises(ValueError, match="layout"):
        insertion(clf, CLIP, MAP, target=0, layout="BCTHW")
