"""STAA: spatio-temporal attention attribution of video transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from captum_staa._utils.captum import (
    TargetType,
    _format_additional_forward_args,
    _run_forward,
    log_usage,
)
from captum_staa._utils.checks import check_choice, check_count, is_number
from captum_staa._utils.model_state import frozen_parameters, in_eval_mode
from captum_staa._utils.networks import lost_gradient, refuse_missing_backward
from captum_staa.attention.capture import AttentionCall, capture
from captum_staa.attention.decomposition import class_contrast, relevance_maps, rest_contrast
from captum_staa.attention.focus import Focus
from captum_staa.attention.rollout import (
    TemporalCarry,
    blocks_of,
    gradient_weighted,
    layer_sum,
    output_weights,
    pull,
    reader,
    rollout,
)
from captum_staa.attr._base import (
    VideoMethod,
    like_inputs,
    one_clip,
    refuse_inference_mode,
    target_outputs,
    target_values,
)
from captum_staa.grid import TokenGrid, TokenRows
from captum_staa.models.classifier import VideoClassifier, classifier_of
from captum_staa.models.discovery import Needs, described
from captum_staa.models.families import AttentionLayer
from captum_staa.models.outputs import OutputKind, minus_other
from captum_staa.result import VideoAttribution

Mode = Literal["attention", "relevance"]
Rule = Literal["decomposition", "chefer", "layer_gradients"]
PATTERN_WEIGHT = 0.125  # weight of the effect of a token on attention patterns
Readings = Mapping[AttentionLayer, Any]
Target: TypeAlias = (
    TargetType | Callable[[Tensor], TargetType]
)  # as in Captum, or a function of the outputs of the one forward


class STAA(VideoMethod):
    """Attribution method that explains a video transformer by its attention in space and time.

    Example:
        >>> import torch
        >>> from captum_staa import STAA, VideoClassifier
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-videomae-pattern")
        >>> clips, labels, truth = PlantedClips(seed=1, n=2)[:2]
        >>> attributions = STAA(clf).attribute(clips, target=labels)
        >>> attributions.shape == clips.shape
        True
        >>> parts = STAA(clf, mode="attention").attribute_maps(clips)
        >>> parts.joint.shape, parts.spatial.shape, parts.temporal.shape
        (torch.Size([2, 16, 48, 48]), torch.Size([2, 48, 48]), torch.Size([2, 16]))

    Args:
        forward_func: a :class:`VideoClassifier` around a video transformer, or a transformer of a known family itself.
            Attention and tokens of other transformers are found with the first clip.
        mode: ``"relevance"``: class-specific, with one forward and one backward. It gives the signed contribution of
            each token to the target's output. ``"attention"``: class-agnostic, with one forward. It gives the tokens
            that the output attends to.
        layers: the residual blocks that are used. ``"all"`` computes attention rollout through all blocks; ``"mean"``
            averages the maps of all blocks; a list of indices such as ``[-1]`` averages the maps of these blocks. Not
            for ``rule="decomposition"``, which combines no layers. ``rule="layer_gradients"`` adds the maps of
            all blocks up with ``"all"``.
        focus: a :class:`Focus` that suppresses noise, or None.
        rule: for ``"relevance"``: ``"decomposition"`` (see Note); ``"chefer"`` (Chefer et al., ICCV 2021, generic
            rule: attention weighted by its positive gradient, rolled out); or ``"layer_gradients"``: the same weighted
            attention, averaged over heads and queries, summed over layers. This needs no path from layer to layer,
            so it works where rollout does not, such as with layers that run side by side.
        pattern_weight: for ``"decomposition"``: weight of the effect of a token on the attention of other tokens, at
            least 0. With 0, the shares are exact: with the constants, they sum to the score.
        upsampling: from tokens to pixels, ``"trilinear"`` or ``"nearest"``. Not for ``rule="decomposition"``.

    Raises:
        TypeError: ``forward_func`` is not a module, or an option has the wrong type.
        ValueError: the model is not a transformer that STAA can explain, or an option is unknown or does not fit the
            mode.

    Note:
        ``"decomposition"``: with attention patterns, normalization scales and activation ratios held constant, a
        transformer is an affine function of its patch embeddings. Then gradient times embedding is each token's signed
        share of the target's output minus the mean of the others, through all layers, values and residual connections
        included. The shares of all tokens, plus that of biases, position embeddings and class tokens, sum to this
        difference (:func:`captum_staa.attention.decomposition.decompose`). The exact share of a token does not include
        its effect on the attention of other tokens, so it explains models badly whose decision depends on where they
        attend. Therefore an eighth (``pattern_weight``) of this effect, in first order, is added. ``pattern_weight=0``
        gives the exact sum. Each share is smoothed by a Gaussian of three quarters of a tubelet, which keeps the sum;
        where tokens are merged between layers, it is as wide as for the tokens among which most layers attend. A model
        whose patch embedding is not known is decomposed into pixels instead. Each call checks that shares and
        constants sum to the difference. If a part is missing, a warning names the module in which it is lost; if it is
        too much, a ValueError.

        With :meth:`VideoClassifier.versus`, shares sum to the difference of two logits; for ``"rest"``, to the target's
        logit minus the mean of the others, weighted by their softmax, whose gradient is that of the log odds.

        Maps of ``mode="attention"`` do not depend on the class. :class:`captum_staa.attr.ReleasedSTAA` computes the
        maps of the authors' public code.

    Reference:
        Frozen patterns: Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021; Ali et al., "XAI for
        Transformers: Better Explanations through Conservative Propagation", ICML 2022, arXiv 2202.07304.
        Wang and Liu, "STAA: Spatio-Temporal Attention Attribution for Real-Time Interpreting Transformer-based Video
        Models", arXiv 2411.00630. ``"attention"`` is STAA as described there. The equations of
        the journal version were not available, so equality with them is not claimed.
    """

    def __init__(
        self,
        forward_func: nn.Module,
        mode: Mode = "relevance",
        layers: Sequence[int] | Literal["mean", "all"] = "all",
        *,
        focus: Focus | None = None,
        rule: Rule = "decomposition",
        pattern_weight: float = PATTERN_WEIGHT,
        upsampling: Literal["trilinear", "nearest"] = "trilinear",
    ) -> None:
        classifier = transformer_of(forward_func)
        check_choice("mode", mode, get_args(Mode))
        check_choice("rule", rule, get_args(Rule))
        check_choice("upsampling", upsampling, ("trilinear", "nearest"))
        if focus is not None and not isinstance(focus, Focus):
            raise TypeError(f"focus must be a Focus or None, got {focus!r}. Pass, for example, focus=Focus().")
        if mode != "relevance" and rule != "decomposition":
            raise ValueError(
                f"rule must be left out unless mode='relevance', got {rule = } with {mode = }. Leave rule out, or use "
                f"mode='relevance'."
            )
        decomposed = mode == "relevance" and rule == "decomposition"
        if decomposed and (layers != "all" or upsampling != "trilinear"):
            raise ValueError(
                f"layers and upsampling must be left out unless mode='attention' or rule='chefer' or "
                f"'layer_gradients', which combine several layers, got layers={layers!r}, upsampling={upsampling!r} "
                f"with rule={rule!r}. Leave them out."
            )
        if decomposed and focus is not None:
            raise ValueError(
                f"focus must be None with rule='decomposition', whose maps are signed, got {focus!r}. Leave focus out, "
                f"or use mode='attention'."
            )
        if not is_number(pattern_weight) or not 0 <= pattern_weight < inf:
            raise ValueError(
                f"pattern_weight must be a finite number of at least 0, got {pattern_weight!r}. Use, e.g., 0.125."
            )
        if not decomposed and pattern_weight != PATTERN_WEIGHT:
            raise ValueError(
                f"pattern_weight must be left out unless mode='relevance' and rule='decomposition', got "
                f"{pattern_weight!r} with mode={mode!r}, rule={rule!r}. Leave it out."
            )
        super().__init__(classifier)
        self.mode, self.layers, self.focus, self.rule = mode, layers, focus, rule
        self.pattern_weight, self.upsampling = pattern_weight, upsampling
        if classifier.family is not None and not decomposed:
            self._blocks(classifier)  # reject wrong layers now

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the shape of the clip, spread evenly over channels.

        Args:
            inputs: clip in the classifier's layout, or a tuple of one clip.
            target: as in Captum, or a label that the classifier knows. Required for ``mode="relevance"`` if
                the model has several classes; otherwise unused.
            additional_forward_args: further positional arguments of the model.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), contiguous and detached. For attention modes: the
            non-negative share of attention on each voxel, so that a clip sums to 1 minus the share of special tokens.
            For relevance by decomposition: signed, in units of the logit, for the target's logit minus the mean of the
            others. By the other rules: non-negative, without a unit.

        Raises:
            ValueError: the target is missing, the clip has the wrong shape, or the call is under
                ``torch.inference_mode()``.
        """
        maps = self._maps(inputs, target, additional_forward_args, logits=False)
        return like_inputs(inputs, self.forward_func.layout, maps.joint)

    def attribute_maps(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
    ) -> VideoAttribution:
        """Return the same attribution as :class:`VideoAttribution`, in float32, with the logits of the forward.

        ``temporal`` is the sum of the attribution over each frame and ``spatial`` its sum over time.
        """
        return self._maps(inputs, target, additional_forward_args, logits=True)

    def attribute_predicted(
        self, inputs: Tensor | tuple[Tensor, ...], additional_forward_args: object = None
    ) -> VideoAttribution:
        """Return :meth:`attribute_maps` for the most likely class of each clip, found in the same forward pass.

        For ``mode="attention"`` it is the same as ``attribute_maps``.
        """
        return self._maps(inputs, _most_likely, additional_forward_args, logits=True)

    @in_eval_mode
    def attribute_temporal(self, inputs: Tensor | tuple[Tensor, ...], additional_forward_args: object = None) -> Tensor:
        """Return the temporal part of the attention rollout, computed without N x N matrices.

        It equals ``attribute_maps(...).temporal`` with ``upsampling="nearest"``. It requires ``mode="attention"``,
        ``layers="all"`` and a model with joint attention. It needs the memory of one forward, and a few percent more
        time than a forward.

        Args:
            inputs: clip in the classifier's layout, or a tuple of one clip.
            additional_forward_args: further positional arguments of the model.

        Returns:
            ``(B, T)``, the share of each frame in the output's attention. The share of a tubelet is spread evenly over
            its frames.

        Raises:
            ValueError: the mode, ``layers`` or ``focus`` has another value, or the attention is not joint.
        """
        extra = _format_additional_forward_args(additional_forward_args)
        clip, model = self._described(inputs, extra)
        layers = model.family.attention(model.transformer)
        fits = (self.mode, self.layers, self.focus) == ("attention", "all", None)
        if not fits or any(layer.role not in ("joint", "pool") or layer.rows is not None for layer in layers):
            raise ValueError(
                f"attribute_temporal needs mode='attention', layers='all', focus=None and joint attention, got "
                f"mode={self.mode!r}, layers={self.layers!r}, focus={self.focus!r} on {model.family.name!r}. Use "
                f"attribute_maps(...).temporal instead."
            )
        carry = TemporalCarry(model.grid, len(clip), clip.device)
        with torch.no_grad():
            with capture(model.transformer, layers, carry, stop=True):
                self._forward(clip, extra)
            pooling = model.read_tokens(clip, *(extra or ()))
            steps = carry.result(output_weights(pooling, len(clip), model.grid, clip.device))
        return model.grid.spread_frames(steps, clip.shape[model.layout.time])

    def get_name(self) -> str:
        """Return the name with the rule, such as ``"STAA"`` for attention and ``"STAA (relevance)"``."""
        if self.mode == "attention":
            return "STAA"
        return {"chefer": "STAA (Chefer)", "layer_gradients": "STAA (layer gradients)"}.get(
            self.rule, "STAA (relevance)"
        )

    # --- one call -----------------------------------------------------------------------------------------------

    @in_eval_mode
    def _maps(
        self, inputs: Tensor | tuple[Tensor, ...], target: Target, additional_forward_args: object, logits: bool
    ) -> VideoAttribution:
        extra = _format_additional_forward_args(additional_forward_args)
        clip, model = self._described(inputs, extra)
        size = model.layout.extent(clip)
        if self.mode == "attention":
            joint, answer = self._attention(model, clip, extra, size, logits)
        else:
            joint, answer = self._relevance(model, clip, target, extra, size)
        if self.focus is not None:
            joint = self.focus(joint, tuple(side // 2 * 2 + 1 for side in model.grid.cell))
        return VideoAttribution.from_joint(joint, answer)

    def _described(self, inputs: Tensor | tuple[Tensor, ...], extra: Any) -> tuple[Tensor, Any]:
        """Return the clip, and the classifier with its family: declared, or found by running the model."""
        clip = one_clip(inputs, self.forward_func.layout, self.get_name())
        of_rule: dict[str, Needs] = {"decomposition": "grid", "layer_gradients": "layers", "chefer": "rollout"}
        needs = of_rule[self.rule] if self.mode == "relevance" else "rollout"
        return clip, described(self.forward_func, clip, extra, needs=needs)

    def _attention(
        self, model: Any, clip: Tensor, extra: Any, size: tuple[int, int, int], logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        plan = _Plan.of(model, self._blocks(model), self.layers, clip, extra)
        answer = None
        with torch.no_grad():
            with capture(model.transformer, plan.layers, plan.reader(), stop=not logits) as readings:
                answer = self._forward(clip, extra).detach()
            return self._to_pixels(plan.compose(readings), model.grid, size), answer

    def _relevance(
        self, model: Any, clip: Tensor, target: Target, extra: Any, size: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        refuse_inference_mode("mode='relevance'")
        if self.rule == "decomposition":
            return self._decomposed(model, clip, target, extra)
        blocks, plan = self._blocks(model), None
        if self.rule == "chefer":
            plan = _Plan.of(model, blocks, self.layers, clip, extra)
            blocks = plan.blocks
        layers = [layer for block in blocks for layer in block]
        with torch.enable_grad(), frozen_parameters(self.forward_func):
            leaf = clip.detach().clone().requires_grad_()
            with capture(model.transformer, layers, _read_probabilities) as readings:
                answer = self._forward(leaf, extra)
            explained = target_values(self.forward_func, answer, _resolved(target, answer))
            gradients = self._gradients(explained.sum(), readings, leaf, extra)
        matrices = {
            layer: gradient_weighted(attention, gradient)
            for (layer, attention), gradient in zip(readings.items(), gradients, strict=True)
        }
        if plan is not None:
            tokens = plan.compose(matrices, torch.add)
        else:
            tokens = layer_sum(matrices, {layer: _rows_of(model, layer) for layer in layers}, len(clip))
            tokens = tokens if self.layers == "all" else tokens / len(blocks)
        return self._to_pixels(tokens, model.grid, size), answer.detach()

    def _gradients(self, score: Tensor, readings: Readings, leaf: Tensor, extra: Any) -> tuple[Tensor, ...]:
        """Return the gradients of the score with respect to attention probabilities."""
        attention = list(readings.values())
        refuse_missing_backward(score, self.forward_func, lambda: self._forward(leaf, extra))
        gradients = torch.autograd.grad(score, attention, allow_unused=True) if score.requires_grad else ()
        if len(gradients) < len(attention) or any(gradient is None for gradient in gradients):
            where = lost_gradient(self.forward_func, lambda: self._forward(leaf, extra))
            raise ValueError(
                f"rule={self.rule!r} needs the gradient of the output with respect to the attention of every layer, "
                f"got none at some. {where} Use mode='attention', or RISE or VideoOcclusion, which need no gradient."
            )
        return gradients

    def _decomposed(self, model: Any, clip: Tensor, target: Target, extra: Any) -> tuple[Tensor, Tensor]:
        working = model.layout.to_working(clip)
        if not model.against_rest:
            maps, result = relevance_maps(
                model, working, lambda values: self._contrast(values, target), extra, pattern_weight=self.pattern_weight
            )
            return maps, result.outputs
        single = model.alone()

        def against_rest(values: Tensor) -> Tensor:
            if values.ndim > 2 or not single.exclusive:
                return self._contrast(minus_other(values, single.output, "rest", single.num_classes), target)
            _refuse_probabilities(values, single.output)
            index = torch.arange(values.shape[1], device=values.device).expand(values.shape)
            return rest_contrast(values, target_outputs(index, _resolved(target, values)))

        maps, result = relevance_maps(single, working, against_rest, extra, pattern_weight=self.pattern_weight)
        return maps, minus_other(result.outputs, single.output, "rest", single.num_classes)

    def _contrast(self, values: Tensor, target: Target) -> Tensor:
        """Return what is explained, ``(B,)``: the target's logit minus the mean of the others, or a label's own."""
        classifier = self.forward_func
        _refuse_probabilities(values, classifier.output)
        chosen = target_outputs(values, _resolved(target, values))
        contrasted = classifier.exclusive and values.ndim == 2  # outputs per frame are explained as they are
        return class_contrast(values, chosen) if contrasted else chosen.flatten().float()

    def _forward(self, clip: Tensor, extra: Any) -> Tensor:
        return _run_forward(self.forward_func, clip.clone(), None, extra)  # a copy: models may write into their input

    def _to_pixels(self, tokens: Tensor, grid: TokenGrid, size: tuple[int, int, int]) -> Tensor:
        """Return the weight of each token spread over the pixels of its tubelet, so that the sum is kept."""
        return grid.spread(grid.to_grid(tokens), self.upsampling, size)

    def _blocks(self, model: Any) -> list[list[AttentionLayer]]:
        """Return the residual blocks that ``layers`` selects."""
        blocks = blocks_of(model.family.attention(model.transformer))
        if isinstance(self.layers, str):
            check_choice("layers", self.layers, ("mean", "all"))
            return blocks
        count = len(blocks)
        indices: Any = self.layers
        if not (isinstance(indices, Sequence) and indices):
            raise ValueError(
                f"layers must be 'all', 'mean' or a list of block indices, got {self.layers!r}. Pass, e.g., [-1]."
            )
        for index in indices:
            check_count(f"an index of layers={indices!r}", index, -count, count - 1, f"of this model's {count} blocks")
        return [blocks[i] for i in sorted({i % count for i in self.layers})]


@dataclass(frozen=True)
class _Plan:
    """Which attention is read, and how it is composed into weights of the tokens.

    Attributes:
        blocks: the chosen residual blocks.
        every: whether attention is rolled out through all blocks; otherwise the maps of single blocks are averaged.
        weights: ``(B, N)``, what the head takes from each token.
        rows: the tokens of the rows of each layer.
    """

    blocks: list[list[AttentionLayer]]
    every: bool
    weights: Tensor
    rows: dict[AttentionLayer, TokenRows]

    @classmethod
    def of(cls, model: Any, blocks: list[list[AttentionLayer]], layers: Any, clip: Tensor, extra: Any) -> _Plan:
        pooling = model.read_tokens(clip, *(extra or ()))
        weights = output_weights(pooling, len(clip), model.grid, clip.device)
        rows = {layer: _rows_of(model, layer) for block in blocks for layer in block}
        if layers == "all":
            return cls(blocks, True, weights, rows)
        patches = model.grid.indices()
        seeing = [block for block in blocks if bool(torch.isin(rows[block[0]].keys, patches).any())]
        if not seeing or (layers != "mean" and len(seeing) < len(blocks)):
            raise ValueError(
                f"layers must select blocks that attend to tokens of pixels, got layers={layers!r}, with attention "
                f"among tokens such as one per frame. Use layers='all', which follows them back to pixels."
            )
        return cls(seeing, False, weights, rows)

    @property
    def layers(self) -> list[AttentionLayer]:
        return [layer for block in self.blocks for layer in block]

    def reader(self) -> Callable[[AttentionCall], Tensor]:
        """Return a reader of full matrices. Where only the head's weights times a matrix are needed, it reads that."""
        last = [block[-1] for block in self.blocks]
        return reader(self.weights, last[-1:] if self.every else last, self.rows)

    def compose(self, readings: Readings, *residual: Any) -> Tensor:
        """Return the weights of the tokens, ``(B, N)``, from the readings of the layers."""
        if self.every:
            return rollout(self.weights, self.blocks, readings, self.rows, *residual)
        return torch.stack([pull(self.weights, block, readings, self.rows) for block in self.blocks]).mean(0)


def _rows_of(model: Any, layer: AttentionLayer) -> TokenRows:
    return model.family.rows(model.transformer, layer, model.grid) or layer.rows_on(model.grid)


def _refuse_probabilities(values: Tensor, kind: OutputKind) -> None:
    """Raise ValueError if values are probabilities, in which evidence does not add up, and not the logits of them."""
    if kind == "probabilities" and bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"outputs of a model with output='probabilities' must be the direct result of a softmax or sigmoid, got "
            f"values of shape {tuple(values.shape)} that were computed from it, such as a mean over views. Explain one "
            f"view, or remove the last operations from the module."
        )


def transformer_of(forward_func: nn.Module) -> VideoClassifier:
    """Return the model as a classifier.

    Raises:
        TypeError: ``forward_func`` is not a module.
        ValueError: the model is not a recognized transformer, so that the layout of its clips is unknown.
    """
    if not isinstance(forward_func, nn.Module):
        raise TypeError(
            f"forward_func must be an nn.Module, got {type(forward_func).__name__}. Pass the model itself: STAA reads "
            f"the attention of its layers."
        )
    return classifier_of(forward_func) or VideoClassifier(forward_func)


def _most_likely(outputs: Tensor) -> TargetType:
    """Return the class with the highest output of each example, ``(B,)``; None if there is one output."""
    return outputs.argmax(1) if outputs.numel() > len(outputs) else None


def _resolved(target: Target, outputs: Tensor) -> TargetType:
    return target(outputs) if callable(target) else target


def _read_probabilities(call: AttentionCall) -> Tensor:
    return call.probabilities()
