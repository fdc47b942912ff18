"""STAA: spatio-temporal attention attribution of video transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import Any, Literal, NoReturn

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_staa._utils.captum import (
    TargetType,
    _format_additional_forward_args,
    _format_output,
    _format_tensor_into_tuples,
    _is_tuple,
    _run_forward,
    log_usage,
)
from captum_staa._utils.checks import check_choice, check_count, generator_or_seeded, is_number
from captum_staa._utils.gaussian import SPREAD, gaussian
from captum_staa._utils.model_state import frozen_parameters, uncompiled
from captum_staa.attention.capture import AttentionCall, capture
from captum_staa.attention.decomposition import class_contrast, decompose_classifier
from captum_staa.attention.focus import Focus
from captum_staa.attention.released import released_maps
from captum_staa.attention.rollout import (
    TemporalCarry,
    blocks_of,
    gradient_weighted,
    light_reader,
    output_weights,
    pull,
    rollout,
    rollout_reader,
)
from captum_staa.attr._arguments import one_clip, outputs_of, refuse_inference_mode, score_of
from captum_staa.grid import TokenGrid
from captum_staa.models.classifier import VideoClassifier, classifier_of
from captum_staa.models.families import AttentionLayer, wrapped_family
from captum_staa.result import VideoAttribution

Mode = Literal["attention", "relevance", "released"]
Rule = Literal["decomposition", "chefer"]
PATTERN_WEIGHT = 0.125  # weight of the effect of a token on attention patterns
Readings = Mapping[AttentionLayer, Any]


class STAA(Attribution):
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
        forward_func: a :class:`VideoClassifier` around a transformer of a known family, or such a model itself.
        mode: ``"relevance"``: class-specific, with one forward and one backward. It gives the signed contribution of
            each token to the target's output. ``"attention"``: class-agnostic, with one forward. It gives the tokens
            that the output attends to. ``"released"``: the maps of the authors' public code, with its defects, for
            comparison (see Note).
        layers: the residual blocks that are used. ``"all"`` computes attention rollout through all blocks; ``"mean"``
            averages the maps of all blocks; a list of indices such as ``[-1]`` averages the maps of these blocks. Only
            for ``mode="attention"`` and ``rule="chefer"``, which combine several layers.
        focus: a :class:`Focus` that suppresses noise, or None.
        rule: for ``"relevance"``: ``"decomposition"`` (see Note) or ``"chefer"`` (Chefer et al., ICCV 2021, generic
            rule: attention weighted by its positive gradient, rolled out).
        pattern_weight: for ``"decomposition"``: weight of the effect of a token on the attention of other tokens, at
            least 0. With 0, the shares are exact: with the constants, they sum to the score.
        upsampling: from tokens to pixels, ``"trilinear"`` or ``"nearest"``. Only for ``mode="attention"`` and
            ``rule="chefer"``.
        generator: for ``"released"``: draws the random thresholds. None uses a new generator with seed 0 in each call.

    Raises:
        TypeError: ``forward_func`` is not a module, or an option has the wrong type.
        ValueError: the model does not belong to a known family, or an option is unknown or does not fit the mode.

    Note:
        ``"decomposition"``: with attention patterns, normalization scales and activation ratios held constant, a
        transformer is an affine function of its patch embeddings. Then gradient times embedding is each token's signed
        share of the target's output minus the mean of the others, through all layers, values and residual connections
        included. The shares of all tokens, plus that of biases, position embeddings and class tokens, sum to this
        difference (:func:`captum_staa.attention.decomposition.decompose`). The exact share of a token does not include
        its effect on the attention of other tokens, so it explains models badly whose decision depends on where they
        attend. Therefore an eighth (``pattern_weight``) of this effect, in first order, is added. ``pattern_weight=0``
        gives the exact sum. Each share is smoothed by a Gaussian of three quarters of a tubelet, which keeps the sum.
        A model whose :class:`captum_staa.models.Family` has no ``patch_embedding`` is decomposed into pixels instead.

        Maps of ``mode="attention"`` do not depend on the class.

        ``"released"`` keeps four defects of the public code. (1) It reads ``S[0, i+1, p]``, the attention of a patch of
        frame 0, instead of ``S[i, 0, 1:]``, the attention of the class token of frame i. (2) Its temporal attention is
        the mean of a softmax row, which is constant except for the class token's share, so the min-max normalization
        amplifies noise. (3) Its threshold is random. (4) Its map is stretched over the whole frame although the
        processor cropped the frame. Figures of this library undo the crop, but ``attribute`` does not know the crop.

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
        focus: Focus | None = None,
        *,
        rule: Rule = "decomposition",
        pattern_weight: float = PATTERN_WEIGHT,
        upsampling: Literal["trilinear", "nearest"] = "trilinear",
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(forward_func, nn.Module):
            raise TypeError(
                f"forward_func must be an nn.Module, got {type(forward_func).__name__}. Pass the model itself: STAA "
                f"reads the attention of its layers."
            )
        classifier = classifier_of(forward_func) or VideoClassifier(forward_func)
        if classifier.family is None:
            raise ValueError(
                f"forward_func must belong to a known family of video transformers, got "
                f"{type(classifier.module).__name__}. Describe the model with captum_staa.models.Family and pass "
                f"VideoClassifier(model, family=...). Methods of Captum work with any network"
                f"{wrapped_family(classifier.module)}"
            )
        check_choice("mode", mode, ("attention", "relevance", "released"))
        check_choice("rule", rule, ("decomposition", "chefer"))
        check_choice("upsampling", upsampling, ("trilinear", "nearest"))
        if focus is not None and not isinstance(focus, Focus):
            raise TypeError(f"focus must be a Focus or None, got {focus!r}. Pass, for example, focus=Focus().")
        if mode != "relevance" and rule != "decomposition":
            raise ValueError(
                f"rule must be left out unless mode='relevance', got {rule = } with {mode = }. Leave rule out, or use "
                f"mode='relevance'."
            )
        if mode == "released" and focus is not None:
            raise ValueError(
                f"focus must be None with mode='released', which has its own threshold, got {focus!r}. Leave focus out."
            )
        composed = mode == "attention" or (mode == "relevance" and rule == "chefer")
        if not composed and (layers != "all" or upsampling != "trilinear"):
            which = f"mode={mode!r}" if mode == "released" else f"rule={rule!r}"
            raise ValueError(
                f"layers and upsampling must be left out unless mode='attention' or rule='chefer', which combine "
                f"several layers, got layers={layers!r}, upsampling={upsampling!r} with {which}. Leave them out."
            )
        if mode == "relevance" and rule == "decomposition" and focus is not None:
            raise ValueError(
                f"focus must be None with rule='decomposition', whose maps are signed, got {focus!r}. Leave focus out, "
                f"or use mode='attention'."
            )
        if not is_number(pattern_weight) or not 0 <= pattern_weight < inf:
            raise ValueError(
                f"pattern_weight must be a finite number of at least 0, got {pattern_weight!r}. Use, e.g., 0.125."
            )
        if not (mode == "relevance" and rule == "decomposition") and pattern_weight != PATTERN_WEIGHT:
            raise ValueError(
                f"pattern_weight must be left out unless mode='relevance' and rule='decomposition', got "
                f"{pattern_weight!r} with mode={mode!r}, rule={rule!r}. Leave it out."
            )
        super().__init__(classifier)
        self.mode, self.layers, self.focus, self.rule = mode, layers, focus, rule
        self.pattern_weight = pattern_weight
        self.upsampling, self.generator = upsampling, generator
        generator_or_seeded(generator)  # reject a wrong generator now
        self._blocks()  # reject wrong layers now

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the shape of the clip, spread evenly over channels.

        Args:
            inputs: clip in the classifier's layout, or a tuple of one clip.
            target: as in Captum. Required for ``mode="relevance"`` if the model has several classes; otherwise unused.
            additional_forward_args: further positional arguments of the model.
            show_progress: accepted for compatibility with Captum and ignored, because there is one forward only.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), contiguous and detached. For attention modes: the
            non-negative share of attention on each voxel, so that a clip sums to 1 minus the share of special tokens.
            For relevance by decomposition: signed, in units of the logit, for the target's logit minus the mean of the
            others. By Chefer's rule: non-negative, without a unit.

        Raises:
            ValueError: the target is missing, the clip has the wrong shape, or the call is under
                ``torch.inference_mode()``.
        """
        parts = self._parts(inputs, target, additional_forward_args, logits=False)
        clip = _format_tensor_into_tuples(inputs)[0]
        return _format_output(_is_tuple(inputs), (self.forward_func.layout.expand(parts.joint, clip),))

    def attribute_maps(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        show_progress: bool = False,
    ) -> VideoAttribution:
        """Return the same attribution as :class:`VideoAttribution`, in float32, with the logits of the forward.

        ``temporal`` is the sum of the attribution over each frame and ``spatial`` its sum over time. ``"released"``
        computes its temporal signal separately.
        """
        return self._parts(inputs, target, additional_forward_args, logits=True)

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
        clip = one_clip(inputs, self.forward_func.layout, self.get_name())
        model, attention_layers = self._model(), self._family().attention(self._model())
        fits = (self.mode, self.layers, self.focus) == ("attention", "all", None)
        if not fits or any(layer.role not in ("joint", "pool") for layer in attention_layers):
            raise ValueError(
                f"attribute_temporal needs mode='attention', layers='all', focus=None and joint attention, got "
                f"mode={self.mode!r}, layers={self.layers!r}, focus={self.focus!r} on {self._family().name!r}. Use "
                f"attribute_maps(...).temporal instead."
            )
        grid = self.forward_func.grid
        carry = TemporalCarry(grid, len(clip), clip.device)
        extra = _format_additional_forward_args(additional_forward_args)
        with torch.no_grad():
            with capture(model, attention_layers, carry, stop=True):
                self._forward(clip, extra)
            steps = carry.result(output_weights(self._family().pooling(model), len(clip), grid, clip.device))
        return grid.to_frames(steps / grid.tubelet[0], clip.shape[self.forward_func.layout.time])

    def attribute_future(self) -> NoReturn:
        """Raise NotImplementedError: Captum's futures are for remote models, and attention is read in this process."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    @classmethod
    def get_name(cls) -> str:
        """Return ``"STAA"``."""
        return "STAA"

    # --- one call -----------------------------------------------------------------------------------------------

    def _parts(
        self, inputs: Tensor | tuple[Tensor, ...], target: TargetType, additional_forward_args: object, logits: bool
    ) -> VideoAttribution:
        clip = one_clip(inputs, self.forward_func.layout, self.get_name())
        size = self.forward_func.layout.extent(clip)
        grid = self.forward_func.grid
        assert grid is not None  # a known family defines a grid
        extra = _format_additional_forward_args(additional_forward_args)
        if self.mode == "released":
            return self._released(clip, extra, grid, size)
        if self.mode == "attention":
            joint, answer = self._attention(clip, extra, grid, size, logits)
        else:
            joint, answer = self._relevance(clip, target, extra, grid, size)
        if self.focus is not None:
            joint = self.focus(joint, tuple(side // 2 * 2 + 1 for side in grid.tubelet))
        return VideoAttribution.from_joint(joint, answer)

    def _attention(
        self, clip: Tensor, extra: Any, grid: TokenGrid, size: tuple[int, int, int], logits: bool
    ) -> tuple[Tensor, Tensor | None]:
        attention_layers = self._attention_layers()
        read = self._reader(attention_layers)
        answer = None
        with torch.no_grad():
            with capture(self._model(), attention_layers, read, stop=not logits) as readings:
                answer = self._forward(clip, extra)
            return self._to_pixels(self._compose(readings, clip, grid), grid, size), answer

    def _relevance(
        self, clip: Tensor, target: TargetType, extra: Any, grid: TokenGrid, size: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        refuse_inference_mode("mode='relevance'")
        if self.rule == "decomposition":
            return self._decomposed(clip, target, extra, grid, size)
        with torch.enable_grad(), frozen_parameters(self.forward_func):
            leaf = clip.detach().clone().requires_grad_()
            with capture(self._model(), self._attention_layers(), _read_probabilities) as readings:
                answer = self._forward(leaf, extra)
            gradients = torch.autograd.grad(score_of(answer, target), list(readings.values()))
        matrices = {
            layer: gradient_weighted(attention, gradient)
            for (layer, attention), gradient in zip(readings.items(), gradients, strict=True)
        }
        return self._to_pixels(self._compose(matrices, clip, grid, torch.add), grid, size), answer.detach()

    def _decomposed(
        self, clip: Tensor, target: TargetType, extra: Any, grid: TokenGrid, size: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor]:
        where: Literal["tokens", "pixels"] = "pixels" if self._family().patch_embedding is None else "tokens"
        result = decompose_classifier(
            self.forward_func,
            clip,
            lambda outputs: class_contrast(outputs, outputs_of(outputs, target)),
            extra,
            where=where,
            pattern_weight=self.pattern_weight,
        )
        t, h, w = grid.tubelet
        joint = result.contributions
        if where == "tokens":
            joint = grid.to_pixels(joint, "nearest", size) / (t * h * w)
        # Neighboring tokens of one object often have opposite signs. Their mean is the contribution of the object.
        spread = (SPREAD * t, SPREAD * h, SPREAD * w)
        return gaussian(joint, spread, keep_sums=True), result.outputs

    def _released(self, clip: Tensor, extra: Any, grid: TokenGrid, size: tuple[int, int, int]) -> VideoAttribution:
        layer = [layer for layer in self._family().attention(self._model()) if layer.role != "temporal"][-1]
        generator = generator_or_seeded(self.generator)
        with torch.no_grad():
            with capture(self._model(), [layer], lambda call: call.head_mean()) as readings:
                answer = self._forward(clip, extra)
            maps, weights = released_maps(readings[layer], layer.role, len(clip), grid, generator)
        seen = torch.nn.functional.pad(maps, (0, size[2] - maps.shape[3], 0, size[1] - maps.shape[2]))
        joint = grid.to_frames(seen, size[0])
        return VideoAttribution(joint, joint.sum(1), grid.to_frames(weights, size[0]), answer)

    def _forward(self, clip: Tensor, extra: Any) -> Tensor:
        return _run_forward(self.forward_func, clip.clone(), None, extra)  # a copy: models may write into their input

    def _attention_layers(self) -> list[AttentionLayer]:
        return [layer for block in self._blocks() for layer in block]

    def _reader(self, attention_layers: Sequence[AttentionLayer]) -> Callable[[AttentionCall], Tensor]:
        pooling = self._family().pooling(self._model())
        return rollout_reader(pooling, attention_layers[-1]) if self.layers == "all" else light_reader(pooling)

    # --- from readings to pixels --------------------------------------------------------------------------------

    def _compose(self, readings: Readings, clip: Tensor, grid: TokenGrid, *residual: Any) -> Tensor:
        """Return the weights of the tokens, ``(B, N)``, from the readings of the chosen blocks."""
        model, blocks = self._model(), self._blocks()
        weights = output_weights(self._family().pooling(model), len(clip), grid, clip.device)
        if self.layers == "all":
            return rollout(weights, blocks, readings, grid, *residual)
        return torch.stack([pull(weights, block, readings, grid) for block in blocks]).mean(0)

    def _to_pixels(self, tokens: Tensor, grid: TokenGrid, size: tuple[int, int, int]) -> Tensor:
        """Return the weight of each token spread over the pixels of its tubelet, so that the sum is kept."""
        t, h, w = grid.tubelet
        return grid.to_pixels(grid.to_grid(tokens), self.upsampling, size) / (t * h * w)

    # --- properties of the model --------------------------------------------------------------------------------

    def _model(self) -> nn.Module:
        return uncompiled(self.forward_func.module)

    def _family(self) -> Any:
        return self.forward_func.family

    def _blocks(self) -> list[list[AttentionLayer]]:
        """Return the residual blocks that ``layers`` selects."""
        blocks = blocks_of(self._family().attention(self._model()))
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


def _read_probabilities(call: AttentionCall) -> Tensor:
    return call.probabilities()
