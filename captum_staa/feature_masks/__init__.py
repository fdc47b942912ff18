"""Feature masks for video: they group voxels into features, for every method with Captum's ``feature_mask`` argument.

Each function takes clips, a float tensor of five axes, and returns int64 ids ``0 .. n-1`` without gaps on the same
device. The mask has five axes in the layout of the clips and is broadcastable to them: an axis has size 1 if the ids do
not depend on it. The channel axis always has size 1. The batch axis has size 1 if the regions are the same for every
clip.
"""

from captum_staa.feature_masks.regions import flow_tubes, supervoxels
from captum_staa.feature_masks.regular import frames, grid, segments, tubelets

__all__ = ["flow_tubes", "frames", "grid", "segments", "supervoxels", "tubelets"]
