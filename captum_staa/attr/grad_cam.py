"""Grad-CAM for video: the activation of a layer, weighted by the gradient of the target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_staa._utils.captum import (
    TargetType,
    _format_additional_forward_args,
    _run_forward,
    log_usage,
)
from captum_staa._utils.checks import check_choice
from captum_staa._utils.model_state import frozen_parameters, in_eval_mode, without_compiling
from captum_staa._utils.networks import leaves_before, lost_gradient, refuse_missing_backward
from captum_staa.attr._base import VideoMethod, extent, like_inputs, refuse_inference_mode, target_values
from captum_staa.grid import TokenGrid
from captum_staa.layout import VideoLayout, layout_of
from captum_staa.models.classifier import classifier_of
from captum_staa.models.layers import (
    MODES,
    ChannelWitness,
    LayerAxes,
    axes_of,
    covered,
    find_layer,
    first_tensor,
    network_of,
    to_pixels,
)
from captum_staa.result import VideoAttribution, clips_in

# Functions from the gradient (B, C, t, h, w) to the factor of the activation.
WEIGHTINGS = {
    "gradcam": lambda gradient: gradient.mean((2, 3, 4), keepdim=True),
    "hirescam": lambda gradient: gradient,
    "layercam": torch.relu,
}


class GradCAM(VideoMethod):
    """Attribution method that multiplies a layer's activation by the gradient of the target and sums over channels.

    The map is interpolated to the size of the clip.

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
        forward_func: a :class:`VideoClassifier`, or any module that returns one row of outputs per example.
        layer: the layer, or its name in ``named_modules()`` of the model (of the classifier's ``.module``). Its
            output, or the first item of a tuple or of a Hugging Face output, must be one of

            - ``(B, C, t, h, w)``, the output of a 3D convolution; or ``(B, t, h, w, C)``, as in Swin transformers;
            - ``(B*T, C, h, w)`` or ``(B*T, h, w, C)``, for the frames of all clips, clip after clip; or
              ``(B, C, h, w)`` in each of T calls, if the model loops over frames;
            - ``(B, T, C)``, the output of a recurrent layer, which gives a map in time alone;
            - ``(B, N, D)`` followed by ``(t, h, w)``, as in MViT;
            - ``(B, N, D)``, the tokens of ``grid``, with or without its prefix, which is dropped; inside divided
              attention also ``(B*t, h*w, D)`` with frames in the batch axis, or ``(B*h*w, t, D)`` with positions in the
              batch axis.
        layout: the order of the clips' axes, such as ``"BCTHW"``. Optional for a classifier, which has a layout.
        grid: the grid of the tokens. Optional for a classifier around a known transformer, which has a grid.
        weighting: ``"hirescam"``: the gradient at each position; ``"layercam"``: its positive part; ``"gradcam"``: the
            mean gradient of each channel over space and time, as in the Grad-CAM paper.
        upsampling: from the layer's cells to pixels, ``"trilinear"`` or ``"nearest"``.
        layer_axes: the order of the axes of the layer's output, such as ``"BTHWC"`` or ``"(BT)HWC"`` (see
            :class:`captum_staa.models.layers.LayerAxes`). None reads it from the modules that compute and read the
            output, and raises an error where it stays ambiguous.
        reshape: function that rearranges the layer's output to ``(B, C, t, h, w)``, for any other order.

    Raises:
        TypeError: ``forward_func`` is not a module, or an argument has the wrong type.
        ValueError: the layer does not exist, the layout is missing or differs from the classifier's, or an option is
            unknown.

    Note:
        The value of a cell is spread over its pixels and channels, so the attribution has the same sum as the layer's
        map (approximately, if a cell is not an integer number of pixels). If only a mean over positions and a linear
        head follow the layer, the sum with ``"hirescam"`` is the output minus its bias, and ``"gradcam"`` gives the
        same map. Captum's ``LayerGradCam`` and ``interpolate`` give this map times the number of pixels per cell.

        If the head reads only a class token, the other tokens of the last block's output have no gradient, and such a
        layer raises a ValueError. The norm before the attention of this block has a gradient, for example
        ``"vivit.layers.11.layernorm_before"``.

        Try several layers. Late layers contain more information about the class, but the content of a late cell or
        token may come from other positions of the clip. Early layers keep positions, but contain less information about
        the class. On planted clips, maps of the first stage of a 3D CNN, smoothed with their signs
        (:func:`captum_staa.smooth`), separate evidence from rivals. ``"hirescam"`` also separates the classes, and
        ``"layercam"`` hardly does. The last layer is weak, and at chance with ``"gradcam"`` (docs/grad_cam.md). Measure
        this on your own model, for example with :func:`captum_staa.metrics.evidence_against_rivals` and
        :func:`captum_staa.metrics.class_discrimination`.

        If only a normalization reads the layer, such as the output of the last block of some transformers, the sum over
        channels of activation times gradient is always zero. ``"hirescam"`` raises a ValueError for such a layer. Use
        the normalization as the layer.

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
        layer_axes: str | None = None,
        reshape: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not isinstance(forward_func, nn.Module):
            raise TypeError(
                f"forward_func must be an nn.Module, got {type(forward_func).__name__}. Pass the model itself: GradCAM "
                f"reads one of its layers."
            )
        super().__init__(forward_func)
        layout = layout_of(forward_func, layout)
        if grid is not None and not isinstance(grid, TokenGrid):
            raise TypeError(f"grid must be a TokenGrid or None, got {grid!r}. Pass grid=TokenGrid(...).")
        check_choice("weighting", weighting, WEIGHTINGS)
        check_choice("upsampling", upsampling, MODES)
        if layer_axes is not None:
            LayerAxes(layer_axes, (1, 1, 1))  # reject a wrong pattern now
        if layer_axes is not None and reshape is not None:
            raise ValueError("layer_axes and reshape state the same thing, got both. Leave one of them out.")
        self.layout, self.weighting, self.upsampling = layout, weighting, upsampling
        self.layer_axes, self.reshape = layer_axes, reshape
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
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the shape of the clip, spread evenly over channels.

        Args:
            inputs: clip in the layout, or a tuple of clips of the same number of frames (RGB and flow).
            target: as in Captum, or a label that the classifier knows. Required if the model has several classes.
            additional_forward_args: further positional arguments of the model.
            relu_attributions: whether to set negative cells of the layer's map to 0, as in the paper.

        Returns:
            Like ``inputs`` (float32 if they are of half precision), in units of the output: contiguous, detached and
            signed. Positive values are evidence for the target. Of several inputs, each on which the layer depends gets
            the layer's map, and the others get 0: a layer of the RGB stream does not explain the flow.

        Raises:
            ValueError: the layer's output has an unknown shape, the forward does not call the layer, the target's
                gradient does not reach it, the target is missing, a clip has the wrong shape, the call is under
                ``torch.inference_mode()``, or the layer of a model of several inputs is cut off from all of them.
        """
        maps = self._maps(inputs, target, additional_forward_args, relu_attributions)
        return like_inputs(inputs, self.layout, *(part.joint for part in maps))

    def attribute_maps(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object = None,
        *,
        relu_attributions: bool = False,
    ) -> VideoAttribution | tuple[VideoAttribution, ...]:
        """Return the same attribution as :class:`VideoAttribution`, with the model's output as its logits.

        For several inputs, it returns a tuple with one per input.
        """
        maps = self._maps(inputs, target, additional_forward_args, relu_attributions)
        return maps if len(maps) > 1 else maps[0]

    def get_name(self) -> str:
        """Return the name with the weighting, unless it is the default: ``"GradCAM"``, ``"GradCAM (layercam)"``."""
        return "GradCAM" if self.weighting == "hirescam" else f"GradCAM ({self.weighting})"

    @in_eval_mode
    def _maps(
        self, inputs: Tensor | tuple[Tensor, ...], target: TargetType, additional_forward_args: object, relu: bool
    ) -> tuple[VideoAttribution, ...]:
        clips = tuple(self.layout.to_working(clip) for clip in clips_in(inputs, self.layout))
        sizes, batch = [extent(clip) for clip in clips], len(clips[0])
        if len({frames for frames, *_ in sizes}) > 1:
            raise ValueError(
                f"all inputs must have the same number of frames, got (T, H, W) = {' and '.join(map(str, sizes))}. "
                f"Pass one of them, and the others as additional_forward_args."
            )
        forward = self.layout.forward_from_working(self.forward_func, len(clips))
        refuse_inference_mode(self.get_name())
        extra = _format_additional_forward_args(additional_forward_args)

        def run(several: bool) -> tuple[Any, tuple[Tensor, ...]]:
            """Run the model on copies, which it may change; they are part of a graph if there are several."""
            leaves = tuple(clip.detach().clone().requires_grad_(several) for clip in clips)
            copies = tuple(leaf.clone() for leaf in leaves) if several else leaves
            return _run_forward(forward, copies, None, extra), leaves

        with torch.enable_grad(), frozen_parameters(self.forward_func):
            witness = ChannelWitness()
            watching = witness.watching(network_of(self.forward_func), self.layer)
            with watching, _cut(self.layer, witness) as (outputs, sources):
                answer, leaves = run(len(clips) > 1)
            if not isinstance(answer, Tensor) or answer.shape[:1] != (batch,):
                shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                raise ValueError(
                    f"the model must return a tensor with one row per example, {batch} here, got {shape}. Wrap a "
                    f"Hugging Face model in VideoClassifier, which returns the logits."
                )
            if len(clips) == 1:
                self._check_grid(sizes[0])  # after the model, whose own error about the clip is more exact
            activation = self._stacked(outputs, batch, sizes[0][0])
            read = [len(clips) == 1 or id(leaf) in sources for leaf in leaves]
            self._check_sources(read, sizes)
            size = sizes[read.index(True)]
            fold = self._folding(activation, batch, size, witness)
            score = target_values(self.forward_func, answer, target).sum()
            refuse_missing_backward(score, self.forward_func, lambda: run(True)[0])
            if score.requires_grad:
                gradients = torch.autograd.grad(score, outputs, materialize_grads=True)
            else:  # the output does not depend on the layer
                gradients = tuple(torch.zeros_like(output) for output in outputs)
        gradient = fold(self._stacked(gradients, batch, size[0]))
        if max(size) > 1:  # a clip of one pixel has one cell
            self._check_reach(gradient, lambda: run(True)[0])
        products = WEIGHTINGS[self.weighting](gradient) * fold(activation)
        joint = products.sum(1)  # (B, t, h, w)
        self._check_cancelling(joint, products, outputs[0].dtype)
        joint = joint.relu() if relu else joint
        pixels = (
            self._to_pixels(joint, own) if reads else joint.new_zeros(batch, *own)
            for reads, own in zip(read, sizes, strict=True)
        )
        return tuple(VideoAttribution.from_joint(values, answer.detach()) for values in pixels)

    # --- from a layer's output to pixels ------------------------------------------------------------------------

    def _stacked(self, outputs: Sequence[Tensor], batch: int, frames: int) -> Tensor:
        """Return the output of the layer in float32 or wider; for a layer that is called once per frame, of all."""
        shapes = [tuple(output.shape) for output in outputs]
        if not shapes:
            raise ValueError(
                f"the forward must call {self._name}, got no call. Choose a layer that the model calls in this thread, "
                f"not a ModuleList or a part of a scripted model."
            )
        value = outputs[0].detach()
        if len(shapes) == frames and set(shapes) == {(batch, *shapes[0][1:])} and value.ndim in (2, 4):
            value = torch.stack([output.detach() for output in outputs], 1).flatten(0, 1)  # a loop over frames
        elif len(shapes) > 1:
            raise ValueError(
                f"the forward must call {self._name} once, got {len(shapes)} calls with outputs of shape {shapes[0]}. "
                f"Choose a layer that is called once, or once per frame with (B, C, h, w)."
            )
        return value.to(torch.promote_types(value.dtype, torch.float32))

    def _folding(
        self, value: Tensor, batch: int, size: tuple[int, int, int], witness: ChannelWitness
    ) -> Callable[[Tensor], Tensor]:
        """Return the function that converts what the layer returned to ``(B, C, t, h, w)``."""
        if self.reshape is not None:
            folded: Any = self.reshape(value)
            if not isinstance(folded, Tensor) or folded.ndim != 5 or len(folded) != batch:
                shape = tuple(folded.shape) if isinstance(folded, Tensor) else type(folded).__name__
                raise ValueError(
                    f"reshape must return (B, C, t, h, w) with B = {batch}, got {shape} for an output of shape "
                    f"{tuple(value.shape)}."
                )
            return self.reshape
        return axes_of(
            value,
            batch,
            size,
            self.grid,
            witness,
            name=self._name,
            stated=self.layer_axes,
            recurrent=self.layer if isinstance(self.layer, nn.RNNBase) else None,
            other_way="reshape=function to (B, C, t, h, w)",
        ).fold

    def _to_pixels(self, maps: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Return the value of each cell spread over its pixels, so that the sum is kept."""
        share = prod(maps.shape[1:]) / prod(covered(maps, size, self.grid))
        return to_pixels(maps, size, self.grid, self.upsampling) * share

    # --- checks against wrong maps -------------------------------------------------------------------------------

    def _check_grid(self, size: tuple[int, int, int]) -> None:
        """Raise a ValueError if the grid does not fit the clip: it is larger, or another token would fit."""
        if self.grid is None:
            return
        left = [pixels - covered for pixels, covered in zip(size, self.grid.pixels, strict=True)]
        if any(not 0 <= rest < side for rest, side in zip(left, self.grid.tubelet, strict=True)):
            raise ValueError(
                f"the grid must cover the clip of {size} (T, H, W), got {self.grid}, which covers {self.grid.pixels}. "
                f"Set t, h, w of the grid to those of the layer, and tubelet to the pixels of one token."
            )

    def _check_sources(self, read: list[bool], sizes: list[tuple[int, int, int]]) -> None:
        """Raise a ValueError if no input reaches the layer in the graph, or the grid does not fit one that does."""
        if not any(read):
            raise ValueError(
                f"the output of {self._name} must depend on one of the {len(read)} inputs by a gradient, got none, so "
                f"that it is unknown which of them its map explains. Leave out torch.no_grad() and detach() before the "
                f"layer; or pass the input of the layer alone, and the others as additional_forward_args."
            )
        for size, reads in zip(sizes, read, strict=True):
            if reads:
                self._check_grid(size)

    def _check_reach(self, gradient: Tensor, run: Callable[[], Any]) -> None:
        """Raise a ValueError if the gradient reaches no cell, or only the first one: the map would be empty."""
        cells = gradient.flatten(2).any(1)  # (B, n)
        unreached = ~cells[:, 1:].any(1)
        if not bool(unreached.any()):
            return
        clips = unreached.nonzero().flatten().tolist()
        lost = lost_gradient(self.forward_func, run)
        with torch.enable_grad():
            detached = not getattr(run(), "requires_grad", False)
        if detached or "is lost" in lost:
            raise ValueError(
                f"the target's gradient must reach the cells of {self._name}, got none in clips {clips}: it is lost "
                f"behind the layer. {lost} Leave out detach() and no_grad() there, or use RISE or VideoOcclusion: "
                f"they need no gradient."
            )
        where = "one at the first cell alone" if bool(cells[unreached].any()) else "none"
        raise ValueError(
            f"the target's gradient must reach the cells of {self._name}, got {where} in clips {clips}. The head reads "
            f"only a class token, or a value that was pooled earlier. Choose an earlier layer, such as the norm before "
            f"the last attention."
        )

    def _check_cancelling(self, joint: Tensor, products: Tensor, dtype: torch.dtype) -> None:
        """Raise a ValueError if a normalization after the layer makes the sum over channels zero in every cell.

        If the output does not change when the vector of a cell is scaled, its gradient is orthogonal to this vector.
        """
        least = max(1e-3, 4 * torch.finfo(dtype).eps)
        largest = products.abs().sum(1).flatten(1).amax(1)
        cancels = (joint.abs().flatten(1).amax(1) < least * largest) & (largest > 0)
        if bool(cancels.any()):
            raise ValueError(
                f"weighting={self.weighting!r} needs a layer whose scale affects the output, got {self._name}, which "
                f"only a normalization reads: gradient times activation sums to zero in every cell of clips "
                f"{cancels.nonzero().flatten().tolist()}. Use this normalization as the layer (such as the norm before "
                f"the next attention), or pass weighting='gradcam'."
            )


@contextmanager
def _cut(layer: nn.Module, witness: ChannelWitness) -> Iterator[tuple[list[Tensor], set[int]]]:
    """Make every output of the layer in this thread a leaf of the graph.

    So no graph of the computation before the layer is kept. A compiled model runs uncompiled inside the block, because
    every new hook would cause a recompilation.

    Yields:
        These leaves, and the ids of the leaves before the layer on which its outputs depend.
    """
    leaves: list[Tensor] = []
    sources: set[int] = set()
    thread = get_ident()

    def cut(module: nn.Module, args: object, output: Any) -> Any:
        if get_ident() != thread:
            return output
        first, replace_first = first_tensor(output)
        if not isinstance(first, Tensor) or not first.is_floating_point():
            kind = f"a tensor of {first.dtype}" if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(
                f"the layer {type(module).__name__} must return a tensor of floats, or a container that begins with "
                f"one, got {kind}. Choose a layer inside it."
            )
        leaf = first.detach().requires_grad_()
        leaves.append(leaf)
        sources.update(id(source) for source in leaves_before(first))
        onward = leaf.clone()  # the model may modify it in place, as nn.ReLU(inplace=True) does
        witness.watch(onward, output)
        return replace_first(onward)

    handle = layer.register_forward_hook(cut)
    try:
        with without_compiling():
            yield leaves, sources
    finally:
        handle.remove()
