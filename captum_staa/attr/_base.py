"""The base class of all attribution methods, and the parts of ``attribute`` that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from typing import Any, NoReturn

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_staa._utils.captum import NullProgress, TargetType, _format_additional_forward_args, _run_forward, progress
from captum_staa._utils.model_state import in_eval_mode
from captum_staa.layout import VideoLayout, check_dense, layout_of
from captum_staa.masking.arguments import selected
from captum_staa.models.classifier import classifier_of
from captum_staa.models.outputs import decision_values, kind_of
from captum_staa.result import VideoAttribution, as_tuple, check_same_batch, clips_in


class VideoMethod(Attribution):
    """Base class of the attribution methods of this library.

    A class that is also a Captum ``PerturbationAttribution`` names this class first among its bases.
    """

    def get_name(self) -> str:
        """Return the name of the method in tables and messages: that of its class, with its rule if it has several.

        In Captum this is a class method. Here the rule belongs to the instance.
        """
        return type(self).__name__

    @in_eval_mode
    def attribute_maps(self, inputs: Tensor | tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
        """Return the same attribution as :class:`VideoAttribution`, in float32 or wider, with the model's output.

        Args:
            inputs: clips, or a tuple of inputs (RGB and flow).
            *args: this and all other arguments are those of :meth:`attribute`.

        Returns:
            :class:`VideoAttribution`. ``joint`` is the sum over channels, ``spatial`` its sum over frames, and
            ``temporal`` its sum over the pixels of each frame. ``logits`` is the model's output for the clips; the
            model is called once more for it. A tuple of several inputs gives a tuple, one per input.

        Raises:
            ValueError: the method has no layout. Otherwise as :meth:`attribute`.
        """
        layout = layout_of(self.forward_func, getattr(self, "layout", None))
        attributions = as_tuple(self.attribute(inputs, *args, **kwargs))
        given = signature(self.attribute).bind(inputs, *args, **kwargs).arguments
        extra = _format_additional_forward_args(given.get("additional_forward_args"))
        with torch.no_grad():
            own = tuple(clip.detach().clone() for clip in as_tuple(inputs))  # a model may write into its input
            outputs = _run_forward(self.forward_func, own, None, extra)
        maps = (VideoAttribution.from_attributions(part, layout) for part in attributions)
        parts = tuple(replace(part, logits=outputs.detach()) for part in maps)
        return parts if len(parts) > 1 else parts[0]

    def attribute_future(self) -> NoReturn:
        """Raise NotImplementedError: Captum's futures are for remote models, and this method runs in this process."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")


# --- checks of arguments ----------------------------------------------------------------------------------------------


def one_clip(inputs: Tensor | tuple[Tensor, ...], layout: VideoLayout, method: str) -> Tensor:
    """Return the clip of a method that explains one tensor of floats per example."""
    clips = as_tuple(inputs)
    if len(clips) != 1:
        channels = tuple(clip.shape[layout.channel] for clip in clips if clip.ndim == 5)
        raise ValueError(
            f"{method} explains one clip tensor, got a tuple of {len(clips)} inputs. Pass one of them, and the others "
            f"as additional_forward_args; or explain them together, as one clip torch.cat(inputs, {layout.channel}) of "
            f"VideoClassifier(model, layout={layout.axes!r}, pack=lambda clip: clip.split({channels}, "
            f"{layout.channel}))."
        )
    layout.check_values(clips[0])
    return clips[0]


def clips_of(inputs: Tensor | tuple[Tensor, ...], layout: VideoLayout | None) -> tuple[Tensor, ...]:
    """Return the tensors of a method that takes one or several per example, checked as clips if a layout is given."""
    if layout is not None:
        return clips_in(inputs, layout)
    clips = as_tuple(inputs)
    for i, clip in enumerate(clips):
        name = "inputs" if len(clips) == 1 else f"inputs[{i}]"
        if clip.ndim == 0 or clip.numel() == 0:
            raise ValueError(
                f"{name} must be a non-empty tensor with one row per example, got shape {tuple(clip.shape)}. Add a "
                f"batch dimension, or pass at least one example."
            )
        check_dense(clip, name)
        if clip.is_floating_point() and not bool(clip.isfinite().all()):
            raise ValueError(
                f"{name} must be finite, got nan or infinity in a tensor of shape {tuple(clip.shape)}. Replace these "
                f"values with torch.nan_to_num."
            )
    check_same_batch(clips)
    return clips


def refuse_inference_mode(what: str) -> None:
    """Raise a ValueError under ``torch.inference_mode()``, because gradients cannot be enabled there."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{what} needs a gradient, which torch.inference_mode() forbids. Call it under torch.no_grad() instead: "
            f"gradients are enabled inside. VideoOcclusion and RISE do not need gradients."
        )


def extent(clip: Tensor) -> tuple[int, int, int]:
    """Return ``(T, H, W)`` of a clip ``(B, T, C, H, W)``."""
    return clip.shape[1], clip.shape[3], clip.shape[4]


# --- from the model's outputs to attributions -------------------------------------------------------------------------


def target_outputs(outputs: Tensor, target: TargetType) -> Tensor:
    """Return the output of each example for the target, as Captum selects it: B numbers, usually ``(B,)``."""
    if target is None and outputs.ndim > 1 and outputs.shape[1] > 1:
        raise ValueError(
            f"target must not be None for a model with {outputs.shape[1]} classes, got None: a gradient needs a "
            f"target. Pass target=class index, or one index per example. For a transformer, STAA(mode='attention') "
            f"needs no target."
        )
    chosen = selected(outputs, target)
    if chosen.numel() != len(outputs):
        raise ValueError(
            f"target must select one output per example, got {target = }, which selects {chosen.numel()} values from "
            f"outputs of shape {tuple(outputs.shape)} for {len(outputs)} examples. Pass one index per axis after the "
            f"batch."
        )
    return chosen


def target_values(forward_func: nn.Module, outputs: Tensor, target: TargetType) -> Tensor:
    """Return :func:`target_outputs`, in units of a logit if ``forward_func`` is a classifier of probabilities."""
    if classifier_of(forward_func) is not None:
        outputs = decision_values(outputs, kind_of(forward_func, outputs))
    return target_outputs(outputs, target)


def like_inputs(inputs: Tensor | tuple[Tensor, ...], layout: VideoLayout, *maps: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Return one map ``(B, T, H, W)`` per clip, spread evenly over channels, as a tensor or a tuple like ``inputs``."""
    attributions = tuple(layout.expand(values, clip) for values, clip in zip(maps, as_tuple(inputs), strict=True))
    return attributions if isinstance(inputs, tuple) else attributions[0]


def attribution_dtype(clip: Tensor) -> torch.dtype:
    """Return the dtype of attributions of a clip: its own, or float32 for half precision and integers."""
    return torch.promote_types(clip.dtype, torch.float32)


# --- progress ---------------------------------------------------------------------------------------------------------


def call_bar(name: str, calls: int, show: bool) -> Any:
    """Return Captum's progress bar over ``calls`` calls of the model, or a bar that shows nothing."""
    return progress(desc=f"{name} attribution", total=calls, leave=None) if show else NullProgress()


@contextmanager
def evaluations(name: str, perturbations: int, perturbations_per_eval: int, show: bool) -> Iterator[Callable[[], None]]:
    """Show a progress bar over the calls of the model, one unperturbed call included, and yield its update function."""
    with call_bar(name, 1 + -(-perturbations // perturbations_per_eval), show) as bar:
        yield bar.update
