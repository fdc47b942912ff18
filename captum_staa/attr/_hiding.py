"""The clips of which nothing is shown: what each word for a way of hiding makes of a clip."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_staa import baselines
from captum_staa.layout import VideoLayout
from captum_staa.perturbation.blends import BlendName, BlurPyramid

OF_SEVERAL_FRAMES = ("mean_frame", "shuffle", "freeze", "blur_time")
_BLURRED = {"blur": (1, 0), "blur_time": (0, 1), "blur_both": (1, 1)}  # along space, along time
_SPACE = 20 / 112  # widest standard deviation, of the shorter side: the paper's 20 pixels of 112
_TIME = 1 / 4  # and of the clip's length


def blend_of(name: BlendName, clip: Tensor, layout: VideoLayout, baseline: Tensor, levels: int) -> BlurPyramid:
    """The blend of a name, with its clips made once.

    Example:
        >>> clip = torch.rand(1, 4, 3, 8, 8)
        >>> blend = blend_of("blur", clip, VideoLayout("BTCHW"), torch.zeros_like(clip), levels=8)
        >>> bool((blend(torch.ones(1, 1, 4, 8, 8)) == clip).all())
        True

    Args:
        name: ``"fade"``, towards the baseline; ``"mean_frame"``, ``"shuffle"``, ``"freeze"`` or ``"noise"``, towards
            the one of ``captum_staa.baselines``; ``"blur"``, through less and less blurred frames, from a standard
            deviation of 18 % of the shorter side (20 pixels of 112); ``"blur_time"``, the same over frames, from a
            quarter of the clip's length; ``"blur_both"``, in space and time at once.
        clip: ``(B, ...)``.
        layout: the order of its axes.
        baseline: of the clip's shape; for ``"fade"`` only.
        levels: how many clips a blur goes through, the clip itself included: the paper's 8, or 2 for a fade to the
            most blurred one, which takes an eighth of the time.

    Returns:
        A :class:`BlurPyramid`.

    Reference:
        Fong, Patrick and Vedaldi, ICCV 2019, section 3.3, in space; Li et al., IEEE TCSVT 2021, for clips.
    """
    if name == "fade":
        return BlurPyramid((baseline, clip), layout)
    if name not in _BLURRED:
        # clip by clip: what is drawn at random must not depend on a clip's place in its batch
        alone = [getattr(baselines, name)(clip[i : i + 1], layout) for i in range(len(clip))]
        return BlurPyramid((torch.cat(alone), clip), layout)
    space, time = _BLURRED[name]
    sizes = layout.size(clip)
    widest = (_SPACE * min(sizes["H"], sizes["W"]) * space, _TIME * sizes["T"] * time)
    parts = [1 - level / (levels - 1) for level in range(levels - 1)]
    blurred = [baselines.blur(clip, layout, space=part * widest[0], time=part * widest[1]) for part in parts]
    return BlurPyramid((*blurred, clip), layout)
