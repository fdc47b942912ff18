"""Make the blend of a name: the baselines that removed voxels are replaced with, for each name in ``BLENDS``."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_staa import baselines
from captum_staa.layout import VideoLayout
from captum_staa.perturbation.blends import BlendName, BlurPyramid

OF_SEVERAL_FRAMES = ("mean_frame", "shuffle", "freeze", "blur_time")
_BLURRED = {"blur": (1, 0), "blur_time": (0, 1), "blur_both": (1, 1)}  # whether to blur space, time
_SPACE = 20 / 112  # largest standard deviation, as a fraction of the shorter side; 20 of 112 pixels in the paper
_TIME = 1 / 4  # largest standard deviation, as a fraction of the clip's length


def blend_of(name: BlendName, clip: Tensor, layout: VideoLayout, baseline: Tensor, levels: int) -> BlurPyramid:
    """Return the blend of this name, with its baseline clips computed once.

    Example:
        >>> clip = torch.rand(1, 4, 3, 8, 8)
        >>> blend = blend_of("blur", clip, VideoLayout("BTCHW"), torch.zeros_like(clip), levels=8)
        >>> bool((blend(torch.ones(1, 1, 4, 8, 8)) == clip).all())
        True

    Args:
        name: name of the blend.

            - ``"fade"``: blends with ``baseline``.
            - ``"mean_frame"``, ``"shuffle"``, ``"freeze"`` or ``"noise"``: blends with the baseline of this name in
              ``captum_staa.baselines``.
            - ``"blur"``: a pyramid of frames with decreasing blur. The largest standard deviation is 18 % of the
              shorter side (20 of 112 pixels).
            - ``"blur_time"``: a pyramid of blur along time. The largest standard deviation is a quarter of the clip's
              length.
            - ``"blur_both"``: blur in space and time.

        clip: ``(B, ...)``, floats of five axes.
        layout: the order of the axes of the clip.
        baseline: tensor of the clip's shape, used by ``"fade"`` only.
        levels: number of clips in a blur pyramid, including the clip itself. The paper uses 8. With 2, the clip blends
            with the most blurred one, which takes an eighth of the time.

    Returns:
        A :class:`BlurPyramid`.

    Reference:
        Fong, Patrick and Vedaldi, ICCV 2019, section 3.3, in space; Li et al., IEEE TCSVT 2021, for clips.
    """
    if name == "fade":
        return BlurPyramid((baseline, clip), layout)
    if name not in _BLURRED:
        # one clip at a time: random draws must not depend on the position of a clip in its batch
        per_clip = [getattr(baselines, name)(clip[i : i + 1], layout) for i in range(len(clip))]
        return BlurPyramid((torch.cat(per_clip), clip), layout)
    space, time = _BLURRED[name]
    sizes = layout.size(clip)
    widest = (_SPACE * min(sizes["H"], sizes["W"]) * space, _TIME * sizes["T"] * time)
    factors = [1 - level / (levels - 1) for level in range(levels - 1)]
    blurred = [baselines.blur(clip, layout, space=factor * widest[0], time=factor * widest[1]) for factor in factors]
    return BlurPyramid((*blurred, clip), layout)
