"""Feature masks for video: which voxels are one feature, for every method that takes Captum's ``feature_mask``.

Each function takes a clip, floats of five axes, and returns int64 ids ``0 .. n-1`` without gaps on the clip's device,
broadcastable to the clip: five axes in the clip's layout, of size 1 where the ids are the same all along. The channel
axis always is; the batch axis is, where the regions are the same for every clip.
"""

from captum_staa.feature_masks.flow import flow_tubes
from captum_staa.feature_masks.regular import frames, grid, segments, tubelets
from captum_staa.feature_masks.slic import supervoxels

__all__ = ["flow_tubes", "frames", "grid", "segments", "supervoxels", "tubelets"]
