"""What drawn calls found, each as the call that found it: once a wrong map or an error from deep inside."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from covering import in_one_case
from tiny_language import FAMILIES, clips_of, question, tiny_vlm
from tiny_models import clip_for, tiny
from torch import Tensor, nn

from captum_staa import (
    RISE,
    STAA,
    AnswerAttribution,
    GradCAM,
    SpatioTemporalPerturbation,
    TokenGrid,
    VideoAttribution,
    VideoClassifier,
    VideoFeatureAblation,
    VideoLayout,
    VideoOcclusion,
    baselines,
    feature_masks,
    io,
    metrics,
    smooth,
    visualization,
)
from captum_staa.attr import ReleasedSTAA
from captum_staa.benchmark import PlantedClips, SceneOptions, compare
from captum_staa.metrics import noise, sanity
from captum_staa.perturbation import PRESETS
from fuzz.models import anything, convolutions

CLIP = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
MAPS = CLIP.sum(2)
TRUTH = MAPS > 0
NAN, INF = math.nan, math.inf


def occlude(inputs: Any = CLIP, **options: Any) -> Tensor:
    options = {"sliding_window_shapes": (2, 3, 3), "strides": (2, 3, 3), "target": 1, **options}
    return VideoOcclusion(anything("BTCHW")).attribute(inputs, **options)


def ablate(**options: Any) -> Tensor:
    options = {"feature_mask": torch.zeros(1, 1, 1, 1, 1).long(), "target": 1, **options}
    return VideoFeatureAblation(anything("BTCHW")).attribute(CLIP, **options)


def grad_cam(target: Any, **options: Any) -> Tensor:
    return GradCAM(convolutions("BTCHW", 3), "first", **options).attribute(CLIP, target)


def staa(target: Any = 1, **options: Any) -> Tensor:
    clf = tiny("videomae")
    return STAA(clf, **options).attribute(clip_for(clf), target)


def faithful(**options: Any) -> Tensor:
    return metrics.faithfulness(anything("BTCHW"), CLIP, MAPS, **options)


# --- targets: Captum reads -1 as the last class, and an empty tuple as all of them ------------------------------------


EXPLAIN: dict[str, Callable[[Any], Tensor]] = {
    "occlusion": lambda target: occlude(target=target),
    "grad-cam": grad_cam,
    "staa": staa,
    "faithfulness": lambda target: faithful(target=target),
}
TARGETS = {
    "-1": -1,
    "-1 for a clip": [0, -1],
    "-1 in a tensor": torch.tensor([-1, 0]),
    "-1 in a tuple": (-1,),
    "beyond": 3,
    "beyond in a tensor": torch.tensor([0, 3]),
    "beyond any integer": 2**70,
    "no index": (),
    "too many indices": (0, 0),
    "too many targets": [0, 1, 2],
}
NO_INDICES = {
    "fraction": 0.5,
    "fractions": [0.5, 1.0],
    "words": ["cat", "dog"],
    "tensor of fractions": torch.tensor([0.5, 1.0]),
    "tensor of two axes": torch.tensor([[0, 1]]),
    "tensor without values": torch.tensor(0, device="meta"),
}


@in_one_case()
@pytest.mark.parametrize("method", EXPLAIN)
@pytest.mark.parametrize("kind", TARGETS)
def test_targets_that_do_not_fit(method: str, kind: str) -> None:
    with pytest.raises(ValueError, match=r"target must be a valid index for outputs of shape .*, got "):
        EXPLAIN[method](TARGETS[kind])


@in_one_case()
@pytest.mark.parametrize("method", EXPLAIN)
@pytest.mark.parametrize("kind", NO_INDICES)
def test_targets_that_are_no_indices(method: str, kind: str) -> None:
    labels = method == "staa" and kind == "words"  # this classifier knows labels, and these are not among them
    expected = (ValueError, "there is no label 'cat'") if labels else (TypeError, "target must be a class index")
    with pytest.raises(expected[0], match=expected[1]):
        EXPLAIN[method](NO_INDICES[kind])


@in_one_case()
@pytest.mark.parametrize("method", EXPLAIN)
@pytest.mark.parametrize(
    "target",
    [np.int64(1), torch.tensor(1), torch.tensor([1, 1], dtype=torch.uint8), [np.int64(1)] * 2, (1,), [(1,)] * 2],
)
def test_targets_in_other_forms(method: str, target: Any) -> None:
    assert torch.equal(EXPLAIN[method](target), EXPLAIN[method](1))


def test_a_gradient_is_of_one_output_per_example() -> None:
    """The sum over all outputs of a row was once explained without a word."""
    model = nn.Sequential(nn.Conv3d(4, 5, 1), nn.Flatten(2), nn.Linear(90, 2))  # (B, 5, 2)
    with pytest.raises(ValueError, match=r"selects 4 values from outputs of shape \(2, 5, 2\) for 2 examples"):
        GradCAM(model, "0", "BTCHW").attribute(CLIP, 1)


# --- everything else, by the argument that was malformed --------------------------------------------------------------


class Sensitive:
    """Ways to disturb a clip, run."""

    @staticmethod
    def run(name: str, radius: Any = 0.1, **options: Any) -> Any:
        return getattr(noise, name)("BTCHW", **options).for_sensitivity()(CLIP, radius)


COMPLEX = torch.ones(1, 1, 1, 1, 1, dtype=torch.complex64)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a list of numbers": (lambda: occlude(CLIP.tolist()), TypeError, "inputs must be a tensor"),
    "no inputs": (lambda: occlude(()), TypeError, "inputs must be a tensor"),
    "a tuple with None": (lambda: occlude((CLIP, None)), TypeError, "'NoneType'"),
    "a sparse clip": (lambda: occlude(CLIP.to_sparse()), TypeError, "dense.*torch.sparse_coo"),
    "a meta clip": (lambda: smooth(CLIP.to("meta"), "BTCHW"), TypeError, "dense.*device meta"),
    "complex attributions": (
        lambda: VideoAttribution.from_attributions(CLIP + 0j, "BTCHW"),
        TypeError,
        "real.*complex64",
    ),
    "a complex baseline": (lambda: occlude(baselines=COMPLEX), TypeError, "real.*complex64"),
    "a sparse baseline": (lambda: occlude(baselines=CLIP.to_sparse()), TypeError, "dense"),
    "a huge baseline": (lambda: occlude(baselines=10**400), ValueError, "finite"),
    "a sparse mask": (lambda: ablate(feature_mask=TRUTH[:, :, None].long().to_sparse()), TypeError, "dense"),
    "a meta mask": (lambda: ablate(feature_mask=torch.zeros(1).long().to("meta")), TypeError, "dense"),
    "an array for a word": (lambda: grad_cam(1, weighting=np.array(["a"])), ValueError, "weighting must be one of"),
    "a dict for a word": (lambda: grad_cam(1, upsampling={}), ValueError, "upsampling must be one of"),
    "a number for a generator": (
        lambda: ReleasedSTAA(tiny("videomae"), generator=3),
        TypeError,
        "generator must be a torch.Generator or None, got 3",
    ),
    "a word for a width": (lambda: smooth(CLIP, "BTCHW", space="4"), ValueError, "space = '4'"),
    "a complex width": (lambda: smooth(CLIP, "BTCHW", time=1j), ValueError, "time = 1j"),
    "a word for a blur": (lambda: baselines.blur(CLIP, "BTCHW", space="4"), ValueError, "space = '4'"),
    "a word for a deviation": (lambda: baselines.noise(CLIP, "BTCHW", std="4"), ValueError, "std .* '4'"),
    "a word for a frame": (lambda: baselines.freeze(CLIP, "BTCHW", frame="4"), TypeError, "frame .* '4'"),
    "a word for compactness": (
        lambda: feature_masks.supervoxels(CLIP, "BTCHW", 3, compactness="4"),
        ValueError,
        "compactness .* '4'",
    ),
    "a ragged cell": (lambda: feature_masks.grid(CLIP, "BTCHW", ([1], 1, 1)), TypeError, r"\[1\]"),
    "a word for three sides": (lambda: feature_masks.grid(CLIP, "BTCHW", "111"), ValueError, "cells must be .* '111'"),
    "a word for a fraction": (lambda: faithful(kept="0.5"), TypeError, "kept .* '0.5'"),
    "words for fractions": (
        lambda: metrics.monotonicity(anything("BTCHW"), CLIP, MAPS, fractions=("a", "b")),
        ValueError,
        "fractions must be",
    ),
    "a word for a subset": (
        lambda: metrics.faithfulness_correlation(anything("BTCHW"), CLIP, MAPS, target=1, fraction="a"),
        TypeError,
        "fraction must be a number",
    ),
    "a word for an area": (lambda: metrics.iou(MAPS, TRUTH, area="a"), ValueError, "area must be .*'a'"),
    "a complex tolerance": (lambda: metrics.pointing_game(MAPS, TRUTH, tolerance=(1j, 0, 0)), TypeError, "1j"),
    "a size of one": (lambda: metrics.boxes_to_truth(torch.ones(1, 1, 4), 5), ValueError, "size must be .*got 5"),
    "sides of words": (lambda: Sensitive.run("tubelet_noise", cells=("1",) * 3, std=1), TypeError, "t of cells = "),
    "a word for a share": (lambda: Sensitive.run("frame_drop", share="1"), ValueError, "share .* '1'"),
    "a window of words": (lambda: Sensitive.run("frame_shuffle", window="2"), TypeError, "window .* '2'"),
    "a word for noise": (lambda: Sensitive.run("brightness_flicker", std="1"), ValueError, "std .* '1'"),
    "a word for a radius": (lambda: Sensitive.run("brightness_flicker", "1", std=1), ValueError, "perturb_radius"),
    "an array of words": (lambda: metrics.sparsity(np.array([["a"]])), TypeError, "array of <U1"),
    "maps without values": (lambda: metrics.auroc(MAPS.to("meta"), TRUTH), TypeError, "dense.*device meta"),
    "nothing to explain by": (
        lambda: sanity.randomization("saliency", nn.Linear(1, 1), CLIP),
        TypeError,
        "explain must be a function",
    ),
    "True for layers": (
        lambda: sanity.randomization(lambda *_: MAPS, nn.Linear(1, 1), CLIP, layers=True),
        TypeError,
        "layers must be a list of names",
    ),
    "a word for classes": (
        lambda: sanity.class_sensitivity(lambda *_: MAPS, nn.Linear(1, 1), CLIP, "cat", [1]),
        TypeError,
        "target must be .*'cat'",
    ),
    "a word for others": (
        lambda: sanity.class_sensitivity(lambda *_: MAPS, nn.Linear(1, 1), CLIP, 0, "ab"),
        TypeError,
        "others must be a list",
    ),
    "a dict for rows": (lambda: TokenGrid(2, {}, 2), TypeError, "integer"),
    "True for rows": (lambda: TokenGrid(2, True, 2), TypeError, "integer"),
    "two sides of a tubelet": (lambda: TokenGrid(2, 2, 2, tubelet=(1, 1)), ValueError, "tubelet must be .* three"),
    "a size of two": (
        lambda: TokenGrid(1, 1, 1).to_pixels(torch.ones(1, 1, 1, 1), size=(1, 1)),
        ValueError,
        r"size must be \(t, h, w\)",
    ),
    "a word for channels": (lambda: VideoLayout("BTCHW", "3"), TypeError, "channels must be an integer"),
    "a word for outliers": (
        lambda: visualization.Style(outlier_perc="2"),
        ValueError,
        "outlier_perc .* '2'",
    ),
    "a crop of three": (
        lambda: visualization.Frames(np.zeros((4, 5, 6, 3), np.uint8), crop=(0, 0, 5)),
        TypeError,
        "crop must be four numbers",
    ),
    "a window of one number": (
        lambda: PlantedClips(0, 1, scene=SceneOptions(window=(3,))),
        TypeError,
        "window must be two ints",
    ),
    "a word for a seed": (lambda: PlantedClips("0", 1), TypeError, "seed must be an integer"),
    "a word for planted noise": (
        lambda: PlantedClips(0, 1, scene=SceneOptions(noise="0.1")),
        TypeError,
        "noise must be a number",
    ),
    "nan for methods": (lambda: compare(tiny("videomae"), [], NAN), TypeError, "methods must be a list"),
    "a number for metrics": (
        lambda: compare(tiny("videomae"), [], ["STAA"], 1j),
        TypeError,
        "metrics must be a list",
    ),
    "a number that half precision has not": (
        lambda: VideoFeatureAblation(anything("BTCHW")).attribute(CLIP.bfloat16(), 10.0**120, 1),
        ValueError,
        r"baselines .* finite in torch.bfloat16, at most 3.39e\+38, got 1e\+120",
    ),
    "a class for smoothness": (
        lambda: SpatioTemporalPerturbation(anything("BTCHW"), "BTCHW").attribute(CLIP, target=1, regularizer=int),
        TypeError,
        "regularizer must be .* a function of masks, got <class 'int'>",
    ),
    "no word for a scale": (
        lambda: PRESETS["nested"].changed(scale=""),
        ValueError,
        "scale must be one of",
    ),
    "a class for a baseline": (
        lambda: noise.frame_drop("BTCHW", 0.5, baseline=int),
        TypeError,
        "baseline must be a number or a function .* got type",
    ),
    "bools for boxes": (
        lambda: metrics.boxes_to_truth(torch.tensor([[[False, False, True, True]]]), (4, 4)),
        TypeError,
        r"bool of shape \(1, 1, 4\)",
    ),
    "frames without values": (
        lambda: io.write_video("never.mp4", torch.empty(2, 4, 6, 3, dtype=torch.uint8, device="meta"), 25),
        TypeError,
        "frames must be a dense tensor .* device meta",
    ),
    "an object for frames": (
        lambda: visualization.Frames(NAN.__class__),
        TypeError,
        "frames must be .* got an array of object <class 'float'>",
    ),
    "a class for a frame": (
        lambda: baselines.freeze(CLIP, "BTCHW", int),
        TypeError,
        "frame must be an integer index.*int",
    ),
    "a class that explains": (
        lambda: sanity.class_sensitivity(nn.Module, nn.Linear(1, 1), CLIP, 0, [1]),
        TypeError,
        "explain must be a function",
    ),
    "a negative class": (
        lambda: sanity.class_sensitivity(lambda *_: MAPS, nn.Linear(1, 1), CLIP, (-1, -1), [1]),
        ValueError,
        r"at least 0.* got \(-1, -1\)",
    ),
    "a bare model to compare": (lambda: compare(nn.Identity(), []), TypeError, "VideoClassifier, got Identity"),
}


@in_one_case()
@pytest.mark.parametrize("found", REFUSED)
def test_malformed_arguments(found: str) -> None:
    run, error, message = REFUSED[found]
    with pytest.raises(error) as raised:
        run()
    assert re.search(message, str(raised.value)), raised.value


def test_numbers_of_numpy_are_numbers() -> None:
    """They were refused in one place, and taken in another."""
    assert torch.equal(smooth(CLIP, "BTCHW", np.float32(2), np.int64(1)), smooth(CLIP, "BTCHW", 2.0, 1.0))
    assert torch.equal(occlude(baselines=np.float32(0.5)), occlude(baselines=0.5))
    assert RISE(anything("BTCHW")).attribute(CLIP, np.float64(0.5), 1, n_samples=2).shape == CLIP.shape


def test_arrays_that_are_flipped_along_an_axis_of_one_are_drawn() -> None:
    """Numpy counts them as contiguous, in spite of their negative stride."""
    frames = np.random.default_rng(0).integers(0, 255, (1, 4, 5, 3), dtype=np.uint8)
    maps = np.random.default_rng(1).random((1, 1, 4, 5))
    drawn = [
        visualization.show_frames(m, f, use_pyplot=False)[0] for f, m in ((frames, maps), (frames[::-1], maps[:, ::-1]))
    ]
    pictures = [np.asarray(figure.axes[0].images[0].get_array()) for figure in drawn]
    np.testing.assert_array_equal(*pictures)


def test_a_layer_of_one_cell_has_a_map() -> None:
    clip, model = CLIP[:, :1, :, :1, :1], convolutions("BTCHW", 3)
    features = model.first(clip.transpose(1, 2)).detach().requires_grad_()
    (slopes,) = torch.autograd.grad(
        model.head(model.second(features.tanh()).square().mean((2, 3, 4)))[:, 1].sum(), features
    )
    found = GradCAM(model, "first", layout="BTCHW").attribute_maps(clip, 1, relu_attributions=False).joint
    torch.testing.assert_close(found, (features * slopes).sum(1).detach())


def test_places_of_any_memory_order_are_ranked_without_a_warning() -> None:
    scores = torch.rand(1, 3, 1, 3, generator=torch.Generator().manual_seed(0)).permute(3, 1, 2, 0)
    truth = scores > 0.5
    torch.testing.assert_close(metrics.iou(scores, truth), metrics.iou(scores.contiguous(), truth), equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_explains_a_clip_of_any_strides(family: str) -> None:
    """SmolVLM views its frames, which needs contiguous ones."""
    clf = tiny_vlm(family).as_classifier(question(family), " is right")
    clip = clips_of(family, 2)
    strided = clip.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    found, wanted = (AnswerAttribution(clf).attribute(one, target=1) for one in (strided, clip))
    assert torch.allclose(found, wanted, atol=1e-6)


@in_one_case()
@pytest.mark.parametrize(
    ("pack", "inputs"),
    [
        (lambda clip: (clip, clip), CLIP),
        (lambda clip: {"frames": clip}, CLIP),
        (lambda clip: clip * 1, (CLIP, CLIP)),
    ],
)
def test_what_the_module_does_not_take_is_a_matter_of_pack(pack: Any, inputs: Any) -> None:
    clf = VideoClassifier(anything("BTCHW"), "BTCHW", pack=pack)
    with pytest.raises(
        ValueError, match=r"pack must return what the module takes, got a \w+( of \d)? and Anything.forward"
    ):
        RISE(clf).attribute(inputs, target=0, n_samples=2)


@in_one_case()
@pytest.mark.parametrize("answer", [["a"], [None], [[1], 2], 3, math.nan])
def test_an_answer_that_holds_no_ids_is_named(answer: Any) -> None:
    with pytest.raises(ValueError, match="answer must be a text or a non-empty list of token ids"):
        tiny_vlm("qwen2_5_vl").as_classifier(question("qwen2_5_vl"), answer)


@in_one_case()
@pytest.mark.parametrize("wrong", [int, lambda *_: 3, lambda clip, layout: clip[:, 1:]])
def test_a_function_that_makes_no_counterfactual_clip_is_named(wrong: Any) -> None:
    clf = tiny_vlm("internvl").as_classifier(question("internvl"), " is right")
    for functions in (wrong, [wrong], [lambda clip, layout: clip, wrong]):
        with pytest.raises((TypeError, ValueError), match="counterfactual must"):
            AnswerAttribution(clf).attribute_answer(clips_of("internvl"), counterfactual=functions)
