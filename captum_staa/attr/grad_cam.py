"""Grad-CAM for video: what the channels of one layer hold, weighted by what the target's gradient asks of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from threading import get_ident
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
from captum_staa._utils.checks import check_choice
from captum_staa._utils.model_state import frozen_parameters, without_compiling
from captum_staa.attr._arguments import one_clip, refuse_inference_mode, score_of
from captum_staa.grid import TokenGrid
from captum_staa.layout import VideoLayout
from captum_staa.models.classifier import classifier_of
from captum_staa.models.layers import MODES, covered, find_layer, to_pixels
from captum_staa.models.layouts import layout_of
from captum_staa.result import VideoAttribution

# From the gradient (B, C, t, h, w) to what the activation is multiplied by.
WEIGHTINGS = {
    "gradcam": lambda gradient: gradient.mean((2, 3, 4), keepdim=True),
    "hirescam": lambda gradient: gradient,
    "layercam": torch.relu,
}


class GradCAM(Attribution):
    """Activation of a layer times the gradient of the target's output, summed over channels, stretched to the clip.

    Example:
        >>> from captum_staa import VideoClassifier, VideoAttribution
        >>> from captum_staa.benchmark import PlantedClips
        >>> clf = VideoClassifier.from_pretrained("tiny-resnet3d-pattern")
        >>> clip, label, truth = PlantedClips(seed=12, n=20)[16:17]
        >>> clip = clf.layout.from_working(clip)  # the 3D network takes (B, C, T, H, W)
        >>> attributions = GradCAM(clf, "stem", weighting="layercam").attribute(clip, target=label)
        >>> when = VideoAttribution.from_attributions(attributions, clf.layout).temporal[0].argmax()
        >>> bool(truth[0, when].any())
        True

    Args:
        forward_func: a :class:`VideoClassifier`, or any module of clips that gives one row of outputs per example.
        layer: the layer, or its name among ``named_modules()`` of the model (of the classifier's ``.module``). Its
            output, or the first item of the tuple that it returns, is one of

            - ``(B, C, t, h, w)``, a 3D convolution's;
            - ``(B*T, C, h, w)``, a 2D convolution's over the frames of all clips, clip after clip; or ``(B, C, h, w)``
              on each of T calls, where the model loops over frames;
            - ``(B, N, D)``, the tokens of ``grid``, with or without its prefix, which is dropped; and inside divided
              attention ``(B*t, h*w, D)``, frames in the batch axis, or ``(B*h*w, t, D)``, places in the batch axis.
        layout: the order of the clips' axes; may be left out for a classifier, which knows its own.
        grid: where the tokens stand; a classifier around a known transformer brings its own.
        weighting: ``"hirescam"``, the gradient of each position; ``"layercam"``, its positive part; ``"gradcam"``, each
            channel's mean gradient over all of space and time, as in the paper of Grad-CAM.
        upsampling: from the layer's cells to pixels, ``"trilinear"`` or ``"nearest"``.

    Raises:
        TypeError: ``forward_func`` is not a module, or an argument has the wrong type.
        ValueError: no such layer, no layout or another than the classifier's, or an unknown option.

    Note:
        A cell's value is spread over its pixels and channels, so that an attribution sums to what the layer's map sums
        to (nearly, where a cell is no whole number of pixels). With ``"hirescam"`` that is the output less its bias
        where only a mean over positions and a linear head follow the layer; ``"gradcam"`` gives the same map there.
        Captum's ``LayerGradCam`` and ``interpolate`` give the same times the number of pixels per cell.

        A head that reads a class token alone gives the other tokens of the last block's output no gradient; such a
        layer is refused. The norm in front of that block's attention still has one, as in
        ``"vivit.layers.11.layernorm_before"``.

        Try several layers. Late layers know more about the class, but what a late cell or token contains need not come
        from its own place in the clip. Early layers keep places, but know less about the class. On planted clips the
        first stage of a 3D CNN with ``"hirescam"``, smoothed with its signs (:func:`captum_staa.smooth`), tells
        evidence from rivals best; the last layer is at chance or worse (docs/grad_cam.md). Measure it on your own
        model, with :func:`captum_staa.metrics.evidence_against_rivals` for example.

        A sum over channels of activation times gradient is zero, whatever the model has learned, where only a
        normalization reads the layer, such as the output of the last block of some transformers. ``"hirescam"`` refuses
        such a layer: name the normalization.

    Reference:
        ``"gradcam"``: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
        Localization", ICCV 2017, equations 1 and 2. ``"hirescam"``: Draelos and Carin, "Use HiResCAM instead of
        Grad-CAM for faithful explanations of convolutional neural networks", arXiv 2011.08891.
        ``"layercam"``: Jiang et al., "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", IEEE
        TIP 2021.
    """

    def __init__(
        self,
        forward_func: nn.Module,
        layer: nn.Module | str,
        layout: VideoLayout | str | None = None,
        grid: TokenGrid | None = None,
        *,
        weighting: Literal["gradcam", "hirescam", "layercam"] = "hirescam",
        upsampling: Literal["trilinear", "nearest"] = "trilinear",
    ) -> None:
        if not isinstance(forward_func, nn.Module):
            raise TypeError(f"GradCAM reads a layer of a module, got {type(forward_func).__name__}")
        super().__init__(forward_func)
        found = layout_of(forward_func, layout)
        if grid is not None and not isinstance(grid, TokenGrid):
            raise TypeError(f"grid is a TokenGrid(...) or None, got {grid!r}")
        check_choice("weighting", weighting, WEIGHTINGS)
        check_choice("upsampling", upsampling, MODES)
        self.layout, self.weighting, self.upsampling = found, weighting, upsampling
        self.layer, name = find_layer(forward_func, layer)
        self._name = f"layer {name!r}"
        classifier = classifier_of(forward_func)
        self.grid = classifier.grid if grid is None and classifier is not None else grid

    @log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        relu_attributions: bool = False,
        show_progress: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attributions of the clip's own shape, spread evenly over channels.

        Args:
            inputs: clip in the layout, or a tuple of one clip.
            target: as in Captum; needed where the model has several classes.
            additional_forward_args: further positional arguments of the model.
            relu_attributions: keep positive evidence only, as in the paper: cells of the layer's map below 0 become 0.
            show_progress: accepted as everywhere in Captum; one forward has no progress to show.

        Returns:
            Like ``inputs`` (float32 where they are of half precision), in units of the output: contiguous, detached,
            signed. Positive is evidence for the target.

        Raises:
            ValueError: a layer whose output cannot be folded, or which the forward does not call, or whose cells the
                target's gradient does not reach; no target where one is needed, a clip of the wrong shape, or a call
                under inference_mode.
        """
        parts = self._parts(inputs, target, additional_forward_args, relu_attributions)
        clip = _format_tensor_into_tuples(inputs)[0]
        return _format_output(_is_tuple(inputs), (self.layout.expand(parts.joint, clip),))

    def attribute_maps(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        relu_attributions: bool = False,
        show_progress: bool = False,
    ) -> VideoAttribution:
        """Return the same attribution as :class:`VideoAttribution`, with the model's output as its logits."""
        return self._parts(inputs, target, additional_forward_args, relu_attributions)

    def attribute_future(self) -> NoReturn:
        """Not offered: Captum's futures are for remote models, and a layer is read in this process."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    @classmethod
    def get_name(cls) -> str:
        """``"GradCAM"``; Captum would spell it out."""
        return "GradCAM"

    def _parts(
        self, inputs: Tensor | tuple[Tensor, ...], target: TargetType, additional_forward_args: object, relu: bool
    ) -> VideoAttribution:
        clip = one_clip(inputs, self.layout, self.get_name())
        size = self.layout.extent(clip)
        self._check_grid(size)
        refuse_inference_mode(self.get_name())
        extra = _format_additional_forward_args(additional_forward_args)
        with torch.enable_grad(), frozen_parameters(self.forward_func):
            with _cut(self.layer) as outputs:
                answer = _run_forward(self.forward_func, clip.detach().clone(), None, extra)
            if not isinstance(answer, Tensor) or answer.shape[:1] != clip.shape[:1]:
                shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                raise ValueError(
                    f"the model must give a tensor with a row per example, {len(clip)} here, got {shape}; "
                    f"VideoClassifier takes the logits out of what a Hugging Face model returns"
                )
            activation = self._fold(outputs, len(clip), size)
            score = score_of(answer, target)
            if score.requires_grad:
                gradients = torch.autograd.grad(score, outputs, materialize_grads=True)
            else:  # nothing in the output depends on the layer
                gradients = tuple(torch.zeros_like(output) for output in outputs)
        gradient = self._fold(gradients, len(clip), size)
        self._check_reach(gradient)
        products = WEIGHTINGS[self.weighting](gradient) * activation
        joint = products.sum(1)  # (B, t, h, w)
        self._check_cancelling(joint, products, outputs[0].dtype)
        return VideoAttribution.from_joint(self._to_pixels(joint.relu() if relu else joint, size), answer.detach())

    # --- from a layer's output to pixels ------------------------------------------------------------------------

    def _fold(self, outputs: Any, batch: int, size: tuple[int, int, int]) -> Tensor:
        """``(B, C, t, h, w)`` in float32 at least, of what the layer gave on each of its calls."""
        shapes = [tuple(output.shape) for output in outputs]
        if not shapes:
            raise ValueError(
                f"the forward never called {self._name}; name a layer that it runs itself, in this thread: neither "
                f"a ModuleList nor a part of a scripted model is"
            )
        value = outputs[0].detach()
        if len(shapes) == size[0] and set(shapes) == {(batch, *shapes[0][1:])} and value.ndim == 4:
            value = torch.stack([output.detach() for output in outputs], 1).flatten(0, 1)  # a loop over frames
        elif len(shapes) > 1:
            raise ValueError(
                f"the forward called {self._name} {len(shapes)} times, with outputs of shape {shapes[0]}; name a layer "
                f"that is called once, or once per frame with (B, C, h, w)"
            )
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        folded = None
        if value.ndim == 5 and len(value) == batch:
            folded = value
        elif value.ndim == 4 and len(value) == batch * size[0]:
            folded = value.unflatten(0, (batch, size[0])).transpose(1, 2)
        elif value.ndim == 3 and self.grid is not None:
            folded = _fold_tokens(value, batch, self.grid)
        # A layer with channels last shows here: as width they are too many.
        if folded is None or any(cells > pixels for cells, pixels in zip(folded.shape[2:], size, strict=True)):
            tokens = self.grid or "a grid: pass grid=TokenGrid(...), or a VideoClassifier around a known transformer"
            raise ValueError(
                f"{self._name} gives {shapes[0]}, which cannot be folded to (B, C, t, h, w) for {batch} clips of "
                f"{size} (T, H, W). What fits: (B, C, t, h, w), (B*T, C, h, w), or tokens (B, N, D), (B*t, h*w, D), "
                f"(B*h*w, t, D) of {tokens}"
            )
        return folded

    def _to_pixels(self, maps: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Each cell's value spread over its pixels, so that the sum is kept."""
        share = prod(maps.shape[1:]) / prod(covered(maps, size, self.grid))
        return to_pixels(maps, size, self.grid, self.upsampling) * share

    # --- what would give a wrong map without a word --------------------------------------------------------------

    def _check_grid(self, size: tuple[int, int, int]) -> None:
        """Raise where the grid leaves pixels over that would fill another token, or needs more than there are."""
        if self.grid is None:
            return
        left = [pixels - covered for pixels, covered in zip(size, self.grid.pixels, strict=True)]
        if any(not 0 <= rest < side for rest, side in zip(left, self.grid.tubelet, strict=True)):
            raise ValueError(
                f"the tokens of {self.grid} cover {self.grid.pixels} (T, H, W), but the clip has {size}; set the "
                f"grid's t, h, w to the layer's and its tubelet to the pixels behind one token"
            )

    def _check_reach(self, gradient: Tensor) -> None:
        """Raise where a map would be empty: a class token, or the first of all tokens, is all that the head reads."""
        reached = gradient.flatten(2).any(1)[:, 1:].any(1)  # (B,)
        if not bool(reached.all()):
            raise ValueError(
                f"the target's gradient reaches no cell of {self._name} (or only the first) in clips "
                f"{(~reached).nonzero().flatten().tolist()}, so there is no map to show. The head reads a class token, "
                f"or a value pooled before: name an earlier layer, such as the norm in front of the last attention"
            )

    def _check_cancelling(self, joint: Tensor, products: Tensor, dtype: torch.dtype) -> None:
        """Raise where a normalization after the layer makes the sum over channels zero in every cell, up to rounding.

        An output that does not change when a cell's vector is scaled has a gradient at right angles to that vector.
        """
        least = max(1e-3, 4 * torch.finfo(dtype).eps)
        largest = products.abs().sum(1).flatten(1).amax(1)
        cancels = (joint.abs().flatten(1).amax(1) < least * largest) & (largest > 0)
        if bool(cancels.any()):
            raise ValueError(
                f"weighting={self.weighting!r} needs a layer whose scale matters to the output, got {self._name}, "
                f"which only a normalization reads: gradient times activation sums to zero in every cell of clips "
                f"{cancels.nonzero().flatten().tolist()}. Name that normalization as the layer (such as the norm in "
                f"front of the next attention), or pass weighting='gradcam'"
            )


@contextmanager
def _cut(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Every output of the layer in this thread, as a leaf from which the rest of the forward is computed.

    So no graph is kept of what comes before the layer. A compiled model runs uncompiled meanwhile: every new hook would
    have it compiled again.
    """
    leaves: list[Tensor] = []
    thread = get_ident()

    def cut(module: nn.Module, args: object, output: Any) -> Any:
        if get_ident() != thread:
            return output
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor) or not first.is_floating_point():
            kind = f"a tensor of {first.dtype}" if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(
                f"the layer {type(module).__name__} must give a tensor of floats, or a tuple that begins with one, but "
                f"{kind} came; name a layer inside it"
            )
        leaf = first.detach().requires_grad_()
        leaves.append(leaf)
        onward = leaf.clone()  # the model may write into it, as nn.ReLU(inplace=True) does
        return getattr(output, "_make", tuple)((onward, *output[1:])) if isinstance(output, tuple) else onward

    handle = layer.register_forward_hook(cut)
    try:
        with without_compiling():
            yield leaves
    finally:
        handle.remove()


def _fold_tokens(tokens: Tensor, batch: int, grid: TokenGrid) -> Tensor | None:
    """``(B, D, t, h, w)`` of all tokens, or of those inside divided attention; None where the shape does not tell."""
    rows, count, _ = tokens.shape
    places = grid.h * grid.w
    if rows == batch and count in (grid.num_patches, grid.num_tokens):
        return grid.to_grid(tokens.transpose(1, 2))
    by_frame = rows == batch * grid.t and count in (places, grid.prefix + places)
    by_place = rows == batch * places and count in (grid.t, grid.prefix + grid.t)
    if by_frame and not by_place:
        return tokens[:, -places:].unflatten(1, (grid.h, grid.w)).unflatten(0, (batch, grid.t)).movedim(-1, 1)
    if by_place and not by_frame:
        return tokens[:, -grid.t :].unflatten(0, (batch, grid.h, grid.w)).permute(0, 4, 3, 1, 2)
    return None
