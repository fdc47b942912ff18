"""Calls of the methods that read the attention of a model: STAA and the attention branch."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from captum_staa import STAA, AttentionBranch, Focus

from . import values
from .calls import ABSENT, Call
from .hostile import Bad, malformed
from .models import TRANSFORMERS, branched, transformer
from .twins import close, form, malformed_call, valid_call

LAYERS = ([99], [-3], [], [0.5], ["a"], 3, torch.tensor([0]), "some", "", [None], (-99,), [True, 5])


def staa(draw: Any) -> Call:
    name = draw(st.sampled_from(TRANSFORMERS))
    axes = draw(st.sampled_from(["BTCHW", "BCTHW", "BWHTC"]))
    model = transformer(name, axes)
    sizes = {"B": draw(st.integers(1, 2)), "T": model.num_frames, "C": 3, "H": 24, "W": 16}
    memory = ("contiguous", "permuted", "stepped", "channels last", "requires grad")
    clip = values.clip_of(draw, axes, sizes, dtypes=(torch.float32, torch.bfloat16), memory=memory)
    options: dict[str, Any] = {"mode": draw(st.sampled_from(["attention", "relevance"]))}
    if options["mode"] == "relevance":
        options["rule"] = draw(st.sampled_from(["decomposition", "chefer"]))
    if options.get("rule") != "decomposition":  # the decomposition uses no attention maps, and is signed
        options["layers"] = draw(st.sampled_from(["all", "mean", [-1], [0, 1], (0,)]))
        options["upsampling"] = draw(st.sampled_from(["nearest", "trilinear"]))
        options["focus"] = draw(st.sampled_from([None, Focus()]))
    target = values.target_of(draw, len(clip))

    def explain(inputs: Any, axes: str, target: Any, model: Any = ABSENT, **made: Any) -> Any:
        explained = transformer(name, axes) if model is ABSENT else model
        explained = explained if inputs_are_not_double(inputs) else transformer(name, axes, True)
        return STAA(explained, **made).attribute(inputs, target)

    if draw(st.booleans()):
        relations = ("memory", "layout", "alone", "order of the batch", "tuple")
        scale = 0.05 if options.get("focus") else 0.0  # its thresholds amplify rounding errors
        call = valid_call(
            draw,
            f"STAA {name}",
            explain,
            clip,
            axes,
            {"target": target, **options},
            relations=relations,
            scale=scale,
            models=(model,),
        )
        return _with_sum(call, options)
    kinds = {"inputs": "clip", "mode": "word", "layers": "word", "rule": "word", "upsampling": "word", "model": "model"}
    kinds["focus"] = "model?"
    if options["mode"] == "relevance":
        kinds["target"] = "target"
    good = {"inputs": clip, "target": target, **options}
    args, argument, bad = malformed(draw, good, kinds)
    if argument == "layers" and draw(st.booleans()):
        bad = Bad(draw(st.sampled_from(LAYERS)))
        args[argument] = bad.value
    if argument == "layers" and bad.value == ["all"]:
        bad = Bad(bad.value)
    run = lambda: explain(args.pop("inputs"), axes, **args)  # noqa: E731
    return malformed_call(f"STAA {name}", run, argument, bad, lambda x: form(x, clip), inputs=(clip,), models=(model,))


def inputs_are_not_double(inputs: Any) -> bool:
    return not (isinstance(inputs, Tensor) and inputs.dtype == torch.float64)


def _with_sum(call: Call, options: dict[str, Any]) -> Call:
    """Check shares of attention: none is negative, and the sum of a clip is at most 1. Contributions are signed."""
    if options.get("rule") == "decomposition":
        return call

    def check(result: Tensor) -> None:
        call.check(result)
        assert bool((result >= 0).all()), "negative attention"
        if options["mode"] == "attention" and options["focus"] is None:
            total = float(result.double().sum((1, 2, 3, 4)).max())
            assert total <= 1.001, f"{total} of the attention"

    return Call(call.description, call.run, check, inputs=call.inputs, models=call.models)


def branch(draw: Any) -> Call:
    model = branched()
    sizes = {"B": draw(st.integers(1, 3)), "C": 3, "T": 4, "H": 12, "W": 10}
    clip = values.clip_of(draw, "BCTHW", sizes, dtypes=(torch.float32,))
    target = values.target_of(draw, len(clip))
    weighting = draw(st.sampled_from([None, "gate", "grad_gate", "class_map"]))
    upsampling = draw(st.sampled_from(["nearest", "trilinear"]))

    def explain(inputs: Any, axes: str, st_abn: Any = model, upsampling: Any = upsampling, **rest: Any) -> Any:
        return AttentionBranch(st_abn, upsampling=upsampling).attribute(inputs, **rest)

    options = {"target": target, "weighting": weighting}
    if draw(st.booleans()):
        relations = ("memory", "alone", "order of the batch", "tuple")
        call = valid_call(
            draw, "AttentionBranch", explain, clip, "BCTHW", options, relations=relations, scale=0.1, models=(model,)
        )

        def check(result: Tensor) -> None:
            call.check(result)
            if weighting == "gate":
                close(result.sum((1, 2, 3, 4)), torch.ones(len(clip)), torch.float32, what="shares of gates")

        return Call(call.description, call.run, check, inputs=call.inputs, models=call.models)
    kinds = {"inputs": "clip", "weighting": "word?", "upsampling": "word", "st_abn": "model"}
    if weighting in ("grad_gate", "class_map"):
        kinds["target"] = "target"
    args, name, bad = malformed(draw, {"inputs": clip, **options}, kinds)
    run = lambda: explain(args.pop("inputs"), "BCTHW", **args)  # noqa: E731
    return malformed_call("AttentionBranch", run, name, bad, lambda x: form(x, clip), inputs=(clip,), models=(model,))


ENTRIES = {"STAA": staa, "AttentionBranch": branch}
