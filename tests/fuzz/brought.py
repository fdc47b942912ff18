"""Calls on models as users bring them: in train mode, with any output, packed, undeclared, and language models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st
from model_kinds import Trained
from tiny_language import FAMILIES, clips_of, question, tiny_vlm
from torch import Tensor, nn
from undeclared_models import MODELS, undeclared
from undeclared_models import SIZE as UNDECLARED_SIZE

from captum_staa import RISE, STAA, AnswerAttribution, GradCAM, VideoClassifier, VideoFeatureAblation, VideoOcclusion
from captum_staa.attr import StepAblation
from captum_staa.models import AnswerClassifier, VideoLanguageModel

from . import values
from .calls import Call
from .hostile import malformed
from .twins import close, form, malformed_call, valid_call

# --- outputs, containers, packs and modes -----------------------------------------------------------------------------

PACKS: dict[str, Callable[[Tensor], Any] | None] = {
    "none": None,
    "argument": lambda clip: clip * 1,
    "list": lambda clip: [clip[:, :, ::2], clip],
    "tuple": lambda clip: (clip[:, :, ::2], clip),
    "dict": lambda clip: {"fast": clip, "slow": clip[:, :, ::2]},
}
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda logits: logits,
    "probabilities": lambda logits: logits.softmax(1),
    "sigmoid": lambda logits: logits,
    "score": lambda logits: logits,
}
CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda outputs: outputs,
    "dict": lambda outputs: {"loss": outputs.sum(), "logits": outputs},
    "tuple": lambda outputs: (outputs,),
}


def _joined(fast: Tensor, slow: Tensor) -> Tensor:
    return fast * (1 + 0.3 * slow.mean((1, 2, 3, 4), keepdim=True))


class Brought(nn.Module):
    """A network whose train mode differs from its eval mode, which takes and returns what its options say."""

    def __init__(self, pack: str, end: str, container: str) -> None:
        super().__init__()
        self.network, self.pack, self.end, self.container = Trained(), pack, end, container

    def forward(self, clips: Any) -> Any:
        return self.outputs(_joined(clips[1], clips[0]) if self.pack == "list" else clips)

    def outputs(self, clip: Tensor) -> Any:
        return CONTAINERS[self.container](ENDS[self.end](self.network(clip)))


class BroughtPair(Brought):
    """The same with two arguments."""

    def forward(self, slow: Tensor, fast: Tensor) -> Any:
        return self.outputs(_joined(fast, slow))


@cache
def brought(pack: str, end: str, container: str, training: str) -> VideoClassifier:
    """Return a classifier that all calls share. ``training`` names the part of it that is in train mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = (BroughtPair if pack in ("tuple", "dict") else Brought)(pack, end, container).eval()
        network.network.norm.running_mean.normal_()
    clf = VideoClassifier(network, "BCTHW", ["a", "b", "c"], output=end, pack=PACKS[pack])
    if training == "all":
        clf.train()
    elif training == "a part":
        network.network.norm.train()
        network.network.drop.train()
    return clf


def brought_model(draw: Any) -> Call:
    pack, end, container = (draw(st.sampled_from(tuple(options))) for options in (PACKS, ENDS, CONTAINERS))
    training = draw(st.sampled_from(["all", "a part"]))
    sizes = {"B": draw(st.integers(1, 3)), "C": 3, "T": draw(st.integers(1, 4)), "H": draw(st.integers(3, 6))}
    sizes["W"] = draw(st.integers(3, 6))
    clip = values.clip_of(draw, "BCTHW", sizes, dtypes=(torch.float32, torch.bfloat16))
    method = draw(st.sampled_from(["VideoOcclusion", "VideoFeatureAblation", "GradCAM", "RISE"]))
    options: dict[str, Any] = {"target": values.target_of(draw, len(clip))}
    if method == "VideoOcclusion":
        options["sliding_window_shapes"] = tuple(draw(st.integers(1, side)) for side in values.extent(clip, "BCTHW"))
    elif method == "VideoFeatureAblation":
        options["feature_mask"] = values.mask_of(draw, clip, "BCTHW")
    elif method == "RISE":
        options |= {"n_samples": draw(st.integers(2, 4))}

    def explain(inputs: Any, axes: str, training: str = training, **made: Any) -> Any:
        return _attribute(method, brought(pack, end, container, training), inputs, made)

    def expected() -> Tensor:
        """The same network in eval mode, without pack and container. A class of probabilities is that of its logits."""
        plain = brought(pack, end, container, training).module.network
        copy = VideoClassifier(_Plain(plain, pack, end), "BCTHW", output=end)
        with torch.no_grad():
            return _attribute(method, copy, clip.detach(), options)

    clf = brought(pack, end, container, training)
    described = f"{method} of {end} in a {container}, pack {pack}, training {training}"
    if draw(st.booleans()):
        relations = ("memory", "alone", "order of the batch", "tuple")
        scale = 20.0 if method == "RISE" else 1.0
        return valid_call(
            draw, described, explain, clip, "BCTHW", options, relations=relations, expected=expected, scale=scale,
            refusals=("reaches no cell",), models=(clf,),
        )  # fmt: skip
    kinds = {"inputs": "clip", "target": "target", "n_samples": "count", "sliding_window_shapes": "triple"}
    good = {"inputs": clip, **options}
    args, name, bad = malformed(draw, good, {key: kind for key, kind in kinds.items() if key in good})
    run = lambda: explain(args.pop("inputs"), "BCTHW", **args)  # noqa: E731
    return malformed_call(
        described, run, name, bad, lambda found: form(found, clip), inputs=(clip,), models=(clf,),
        refusals=("reaches no cell",),
    )  # fmt: skip


class _Plain(nn.Module):
    """The network of a :class:`Brought`, in eval mode, with its pathways written out."""

    def __init__(self, network: Trained, pack: str, end: str) -> None:
        super().__init__()
        self.weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
        self.network = Trained()
        self.network.load_state_dict(self.weights)
        self.pack, self.end = pack, end
        self.eval()

    def forward(self, clip: Tensor) -> Tensor:
        clip = clip if self.pack in ("none", "argument") else _joined(clip, clip[:, :, ::2])
        return ENDS[self.end](self.network(clip))


def _attribute(method: str, clf: VideoClassifier, inputs: Any, options: dict[str, Any]) -> Any:
    if method == "GradCAM":
        layer = next(name for name, module in clf.named_modules() if name.endswith("conv"))
        return GradCAM(clf, layer.removeprefix("module."), weighting="hirescam").attribute(inputs, **options)
    explainer = {"VideoOcclusion": VideoOcclusion, "VideoFeatureAblation": VideoFeatureAblation, "RISE": RISE}[method]
    return explainer(clf).attribute(inputs, **options)


# --- undeclared transformers ------------------------------------------------------------------------------------------


@cache
def _undeclared(name: str, training: bool) -> VideoClassifier:
    model = undeclared(name)
    return VideoClassifier(model.train(training), MODELS[name].layout)


def discovered(draw: Any) -> Call:
    name, training = draw(st.sampled_from(tuple(MODELS))), draw(st.booleans())
    axes, (t, h, w) = MODELS[name].layout, UNDECLARED_SIZE
    sizes = {"B": draw(st.integers(1, 2)), "T": t, "C": 3, "H": h, "W": w}
    memory = ("contiguous", "permuted", "stepped", "channels last", "requires grad")
    clip = values.clip_of(draw, axes, sizes, dtypes=(torch.float32,), memory=memory)
    options: dict[str, Any] = {"mode": draw(st.sampled_from(["attention", "relevance"]))}
    options["target"] = values.target_of(draw, len(clip))
    if options["mode"] == "attention":
        options["layers"] = draw(st.sampled_from(["all", "mean", [-1], [0, 1]]))
    clf = _undeclared(name, training)

    def explain(inputs: Any, axes: str, target: Any, model: Any = clf, **made: Any) -> Any:
        return STAA(model, **made).attribute(inputs, target)

    described = f"STAA of an undeclared model, {name}, {'train' if training else 'eval'} mode"
    if draw(st.booleans()):
        relations = ("memory", "alone", "order of the batch", "tuple")
        call = valid_call(
            draw, described, explain, clip, axes, options, relations=relations, scale=0.05, models=(clf,),
            refusals=("layers must select blocks that attend to tokens of pixels",),
            expected=lambda: explain(clip.detach(), axes, model=_undeclared(name, False), **options),
        )  # fmt: skip

        def check(result: Tensor) -> None:
            call.check(result)
            if options["mode"] == "attention":
                total = float(result.double().sum((1, 2, 3, 4)).max())
                assert bool((result >= 0).all()) and total <= 1.001, f"{total} of the attention"

        return Call(call.description, call.run, check, inputs=call.inputs, models=call.models)
    kinds = {"inputs": "clip", "mode": "word", "target": "target" if options["mode"] == "relevance" else "target?"}
    kinds |= {"model": "model"} | ({"layers": "word"} if "layers" in options else {})
    if options["mode"] == "attention":
        del kinds["target"]  # attention is that of no class
    args, argument, bad = malformed(draw, {"inputs": clip, **options}, kinds)
    run = lambda: explain(args.pop("inputs"), axes, **args)  # noqa: E731
    return malformed_call(described, run, argument, bad, lambda x: form(x, clip), inputs=(clip,), models=(clf,))


# --- language models --------------------------------------------------------------------------------------------------

ANSWER = " is right"
WORDS = 2  # tokens of the answer; with the whole answer as many outputs as other models have classes


@cache
def _used(family: str) -> VideoLanguageModel:
    """Return a model after its first forward, in which transformers installs hooks that stay."""
    vlm = tiny_vlm(family)
    with torch.no_grad():
        vlm.as_classifier(question(family), ANSWER)(clips_of(family))
    return vlm


@cache
def _answered(family: str, versus: bool) -> AnswerClassifier:
    return _used(family).as_classifier(question(family), ANSWER, " left" if versus else None)


def answer(draw: Any) -> Call:
    family, versus = draw(st.sampled_from(FAMILIES)), draw(st.booleans())
    clf = _answered(family, versus)
    plain = clips_of(family, draw(st.integers(1, 2)), draw(values.seeds))
    memory = draw(st.sampled_from(["contiguous", "permuted", "stepped", "channels last", "requires grad"]))
    clip = values.in_memory(draw, plain, memory)
    steps = draw(st.integers(0, 2)) == 0
    options: dict[str, Any] = {"target": values.target_of(draw, len(clip), WORDS + 1)}
    if steps:
        options |= {"replacement": draw(st.sampled_from(["mean", "zero", "before"]))}
        options |= {"perturbations_per_eval": draw(st.sampled_from([1, 2, 99]))}
    else:
        options |= {"mode": draw(st.sampled_from(["relevance", "attention"]))}
        options |= {"pattern_weight": draw(st.sampled_from([0.125, 0, 1.0]))}

    def explain(inputs: Any, axes: str, target: Any, model: Any = clf, **made: Any) -> Any:
        if steps:
            chunk = made.pop("perturbations_per_eval")
            return StepAblation(model, **made).attribute(inputs, target, perturbations_per_eval=chunk)
        return AnswerAttribution(model, **made).attribute(inputs, target)

    described = f"{'StepAblation' if steps else 'AnswerAttribution'} of {family}, {versus=}"
    if draw(st.booleans()):
        relations = ("memory", "alone", "order of the batch", "tuple", *(["chunks"] if steps else []))
        return valid_call(
            draw, described, explain, clip, "BTCHW", options, relations=relations, scale=0.1, models=(clf.vlm,)
        )
    kinds = {"inputs": "clip", "target": "target", "model": "model"}
    kinds |= (
        {"replacement": "word", "perturbations_per_eval": "count"}
        if steps
        else {"mode": "word", "pattern_weight": "number"}
    )
    args, name, bad = malformed(draw, {"inputs": clip, **options}, kinds)
    run = lambda: explain(args.pop("inputs"), "BTCHW", **args)  # noqa: E731
    return malformed_call(described, run, name, bad, lambda x: form(x, clip), inputs=(clip,), models=(clf.vlm,))


def whole_answer(draw: Any) -> Call:
    family = draw(st.sampled_from(FAMILIES))
    vlm, clip = _used(family), clips_of(family, 1, draw(values.seeds))
    good: dict[str, Any] = {"inputs": clip, "prompt": question(family), "answer": ANSWER}
    good |= {"versus": draw(st.sampled_from([None, " left", [" left", " bottom"]]))}
    good |= {"counterfactual": draw(st.sampled_from([clip.flip(1), torch.cat([clip * 0, clip.flip(1)])]))}
    mode = draw(st.sampled_from(["relevance", "attention"]))
    explainer = AnswerAttribution(vlm, mode)

    def check(maps: Any) -> None:
        assert maps.joint.shape == (WORDS, clip.shape[1], *clip.shape[3:]) and bool(maps.joint.isfinite().all())
        close(maps.temporal, maps.joint.sum((2, 3)), torch.float32, 0.1, "temporal")
        clf = vlm.as_classifier(good["prompt"], ANSWER)
        with torch.no_grad():
            own, others = clf(clip)[0, :WORDS], [clf(one[None])[0, :WORDS] for one in good["counterfactual"]]
        close(maps.log_probabilities, own, torch.float32, 1.0, "log-probabilities")
        close(maps.reliance, (own - torch.stack(others)).amax(0), torch.float32, 1.0, "reliance")
        asked = AnswerAttribution(vlm.as_classifier(good["prompt"], ANSWER, good["versus"]), mode)
        word = asked.attribute_maps(clip, target=1).joint[0]
        close(maps.joint[1], word, torch.float32, 0.1, "the map of a word alone")

    if draw(st.booleans()):
        described = f"attribute_answer({family}, {mode}, versus={good['versus']})"
        return Call(described, lambda: explainer.attribute_answer(**good), check, inputs=(clip,), models=(vlm,))
    kinds = {"inputs": "clip", "prompt": "prompt", "answer": "answer?", "counterfactual": "counterfactual"}
    args, name, bad = malformed(draw, good, kinds)
    run = lambda: explainer.attribute_answer(**args)  # noqa: E731
    return malformed_call("attribute_answer", run, name, bad, lambda maps: None, inputs=(clip,), models=(vlm,))


ENTRIES = {
    "models as they come": brought_model,
    "discovered transformers": discovered,
    "AnswerAttribution": answer,
    "attribute_answer": whole_answer,
}
