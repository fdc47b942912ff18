"""Attributions from the attention branch of an ST-ABN: its gates, gates times gradient, or its class map."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, get_args
from weakref import WeakSet

import torch
from torch import Tensor, nn

from captum_staa._utils import notebook
from captum_staa._utils.captum import TargetType, _format_additional_forward_args, log_usage
from captum_staa._utils.checks import check_choice
from captum_staa._utils.model_state import frozen_parameters, in_eval_mode, without_compiling
from captum_staa._utils.networks import refuse_missing_backward
from captum_staa._utils.tensors import short_repr, wide
from captum_staa.attr._base import VideoMethod, extent, like_inputs, one_clip, refuse_inference_mode, target_outputs
from captum_staa.models.layers import MODES, covered, to_pixels
from captum_staa.models.st_abn.answers import as_logits, chances, change, rule_of
from captum_staa.models.st_abn.branch import UNUSED, Gates, resolution
from captum_staa.models.st_abn.network import STABN, st_abn_of
from captum_staa.result import VideoAttribution

Weighting = Literal["gate", "grad_gate", "class_map"]
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
_CHECKED: WeakSet[STABN] = WeakSet()  # networks whose use of the gates was tested, so that a warning comes once


@dataclass(frozen=True)
class BranchAttribution(VideoAttribution):
    """:class:`VideoAttribution` of an attention branch, with the logits of the branch and the resolution of the gates.

    Attributes:
        joint: ``(B, T, H, W)``, the map that :meth:`AttentionBranch.attribute` spreads over channels.
        spatial: ``(B, H, W)``, the sum of ``joint`` over frames.
        temporal: ``(B, T)``, computed from the temporal gates only. All frames of a step have the same value.
        logits: ``(B, K)``, the logits of the model.
        attention_logits: ``(B, K)``, the logits of the branch.
        weighting: ``"gate"``, ``"grad_gate"`` or ``"class_map"``.
        resolution: the resolution of the gates, such as ``"each bar covers 2 frames, each cell 8 x 8 pixels"``.
    """

    attention_logits: Tensor | None = None
    weighting: str = "gate"
    resolution: str = ""

    __repr__ = short_repr

    def _repr_html_(self) -> str:
        rows = []
        if self.logits is not None and self.attention_logits is not None:
            answers = [logits.float().softmax(1).max(1) for logits in (self.logits, self.attention_logits)]
            columns = [column.tolist() for answer in answers for column in (answer.indices, answer.values)]
            rows = [(clip, *row) for clip, row in enumerate(zip(*columns, strict=True))]
        head = ("clip", "the model's class", "probability", "the branch's class", "probability")
        title = f"weighting: {self.weighting}; {self.resolution}"
        return f"<div>{super()._repr_html_()}{notebook.block(title, notebook.table(head, rows) if rows else '')}</div>"


class AttentionBranch(VideoMethod):
    """Attribution method that explains an ST-ABN by its attention branch.

    Example:
        >>> import torch
        >>> from captum_staa.models import STABN, VideoClassifier
        >>> st_abn = STABN.inject(VideoClassifier.from_pretrained("tiny-resnet3d-pattern"), "stages.0")
        >>> parts = AttentionBranch(st_abn).attribute_maps(torch.rand(1, 3, 16, 48, 48))
        >>> parts.joint.shape, parts.resolution
        (torch.Size([1, 16, 48, 48]), 'each bar covers 1 frame, each cell 4 x 4 pixels')

    Args:
        st_abn: a :class:`STABN`, or a :class:`VideoClassifier` around one.
        upsampling: from the layer's cells to pixels, ``"trilinear"`` or ``"nearest"``.

    Raises:
        TypeError: ``st_abn`` is not a :class:`STABN`.
        ValueError: an option is unknown.

    Warns:
        UserWarning: the network does not use its gates: its probabilities change by less than 1 % on average if both
            gates of the first clips are replaced by their means. This is tested once per network, with one more
            forward, but not for a branch that only observes or for a single output.

    Note:
        A gate shows where the branch is open. It does not show that the output depends on the gate: a network may
        ignore its gates, and jointly trained networks often do. With ``mechanism="bottleneck"`` it cannot.
        ``metrics.attention_usage`` measures this.

    Reference:
        ``"gate"``: Mitsuhara et al., arXiv 2110.15574. ``"grad_gate"`` weights each gate by the target's gradient, as
        Grad-CAM (Selvaraju et al., ICCV 2017) does channels. ``"class_map"``: the branch's head read as a class
        activation map (Zhou et al., CVPR 2016).
    """

    def __init__(self, st_abn: nn.Module, *, upsampling: Literal["trilinear", "nearest"] = "trilinear") -> None:
        network = st_abn_of(st_abn)
        if network is None:
            raise TypeError(
                f"st_abn must be a models.STABN, or a VideoClassifier around one, got {type(st_abn).__name__}. Add a "
                f"branch to any video model with STABN.inject(model, layer), and train it with fit_st_abn."
            )
        check_choice("upsampling", upsampling, MODES)
        super().__init__(st_abn)
        self.st_abn, self.layout, self.upsampling = network, network.layout, upsampling

    @property
    def class_weighting(self) -> Weighting:
        """The default weighting if a target is given.

        Gates of an observing branch have no gradient, and the gates of a bottleneck are what the network can use.
        """
        return "gate" if self.st_abn.config.mechanism in ("observe", "bottleneck") else "grad_gate"

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        weighting: Weighting | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the shape of the clip, spread evenly over channels.

        Args:
            inputs: clip in the network's layout, or a tuple of one clip.
            target: as in Captum, or a label that the classifier knows. Not needed for ``"gate"``, which does
                not depend on the class.
            additional_forward_args: further positional arguments of the model.
            weighting: one of

                - ``"gate"``: M alpha, normalized to a sum of 1 per clip. It shows where the branch is open and does not
                  depend on the class. The default without a target, for a bottleneck, and for a branch that only
                  observes.
                - ``"grad_gate"``: the sum over both gates of gate times gradient of the target's output. This is the
                  first-order decrease of the output if the gate were closed, signed, in units of the output. The
                  default with a target. For a bottleneck, whose only gate is M alpha, it is M alpha times gradient.
                - ``"class_map"``: the signed contribution of every cell to the branch's logit of the target. A clip
                  sums to this logit minus its bias.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), contiguous and detached.

        Raises:
            ValueError: the weighting is unknown, the target is missing, the clip has the wrong shape, the output does
                not depend on the gates (for ``"grad_gate"``), or the call is under ``torch.inference_mode()``.
        """
        maps = self.attribute_maps(inputs, target, additional_forward_args, weighting=weighting)
        return like_inputs(inputs, self.layout, maps.joint)

    @in_eval_mode
    def attribute_maps(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        weighting: Weighting | None = None,
    ) -> BranchAttribution:
        """Return the same attribution as :class:`BranchAttribution`, in float32 or wider."""
        clip = self.layout.to_working(one_clip(inputs, self.layout, self.get_name()))
        if weighting is None:
            weighting = "gate" if target is None else self.class_weighting
        check_choice("weighting", weighting, WEIGHTINGS)
        logits, gates, (joint, temporal) = self._weighted(clip, target, additional_forward_args, weighting)
        self._warn_if_unused(clip, additional_forward_args, logits, gates)
        size = extent(clip)
        grid = tuple(joint.shape[1:])
        pixels = to_pixels(joint, size, self.st_abn.grid, self.upsampling)
        steps = temporal[:, :, None, None].expand(-1, -1, *grid[1:])
        frames = to_pixels(steps, size, self.st_abn.grid, "nearest")[:, :, 0, 0]
        if weighting == "gate":
            total = pixels.sum((1, 2, 3), keepdim=True)
            pixels = pixels / total.clamp(min=torch.finfo(total.dtype).tiny)  # an override may close all gates
        else:  # spread the value of a cell over its pixels, and that of a step over its frames
            sizes = covered(joint, size, self.st_abn.grid)
            pixels, frames = pixels * (prod(grid) / prod(sizes)), frames * (grid[0] / sizes[0])
        return BranchAttribution(
            joint=pixels,
            spatial=pixels.sum(1),
            temporal=frames,
            logits=logits.detach(),
            attention_logits=gates.logits.detach(),
            weighting=weighting,
            resolution=resolution(grid, size),
        )

    def _weighted(
        self, clip: Tensor, target: TargetType, additional_forward_args: object, weighting: Weighting
    ) -> tuple[Tensor, Gates, tuple[Tensor, Tensor]]:
        """Return the logits, the gates, and the weighted maps: joint ``(B, t, h, w)`` and temporal ``(B, t)``."""
        extra = _format_additional_forward_args(additional_forward_args) or ()
        forward = self.layout.forward_from_working(partial(self.st_abn.forward_with_gates, leaves=weighting != "gate"))
        clip = clip.detach().clone()  # the model may write into it
        if weighting == "gate":
            with torch.no_grad(), without_compiling():
                logits, gates = forward(clip, *extra)
            temporal = wide(gates.temporal)[:, 0]
            return logits, gates, (wide(gates.spatial)[:, 0] * temporal, temporal[..., 0, 0])
        refuse_inference_mode(self.get_name())
        with torch.enable_grad(), frozen_parameters(self.st_abn), without_compiling():
            logits, gates = forward(clip, *extra)
            if weighting == "class_map":
                evidence = gates.evidence.detach().requires_grad_()
                head = self.st_abn.branch.classify(self.st_abn.branch.pooled(evidence))
                (slope,) = torch.autograd.grad(target_outputs(head, target).sum(), evidence)
                joint = (wide(evidence.detach()) * slope).sum(1)
                return logits, gates, (joint, joint.sum((2, 3)))
            score = target_outputs(logits, target).sum()
            leaf = clip.detach().clone().requires_grad_()
            refuse_missing_backward(score, self.st_abn, lambda: forward(leaf.clone(), *extra)[0])
            taken = (gates.spatial, gates.temporal)
            slopes = torch.autograd.grad(score, taken, materialize_grads=True) if score.requires_grad else ()
        if not any(bool(slope.any()) for slope in slopes):
            raise ValueError(
                f"weighting='grad_gate' needs an output that depends on the gates, got gradients of zero with "
                f"mechanism={self.st_abn.config.mechanism!r}. Train the branch with fit_st_abn, or use "
                f"weighting='gate'."
            )
        of_space, of_time = ((wide(gate.detach()) * slope)[:, 0] for gate, slope in zip(taken, slopes, strict=True))
        joint = of_time if self.st_abn.config.mechanism == "bottleneck" else of_space + of_time
        return logits, gates, (joint, of_time.sum((2, 3)))

    @torch.no_grad()
    def _warn_if_unused(self, clip: Tensor, additional_forward_args: object, logits: Tensor, gates: Gates) -> None:
        """Warn if the network ignores its gates, once per network."""
        if self.st_abn.config.mechanism == "observe" or self.st_abn in _CHECKED:
            return
        _CHECKED.add(self.st_abn)
        without = self.layout.forward_from_working(partial(self.st_abn.forward_with_gates, given=gates.flat()))
        extra = _format_additional_forward_args(additional_forward_args) or ()
        with without_compiling():
            other, _ = without(clip.clone(), *extra)
        rule = rule_of(self.st_abn.model)
        before, after = (chances(as_logits(outputs, self.st_abn.model), rule) for outputs in (logits, other))
        if float(change(before, after, rule).amax(1).mean()) < UNUSED:
            what = "scores" if rule == "scores" else "probabilities"
            fix = (
                "Train this bottleneck longer: its gates are still about the same everywhere."
                if self.st_abn.config.mechanism == "bottleneck"
                else "See metrics.attention_usage, and mechanism='bottleneck', whose gates cannot be ignored."
            )
            warnings.warn(
                f"the network does not use its gates: its {what} change by less than {UNUSED:.0%} if they are "
                f"flattened, so the map does not explain its output. {fix}",
                stacklevel=2,
            )
