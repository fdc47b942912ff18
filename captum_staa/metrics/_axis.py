"""What a metric compares or replaces: voxels, or what spans a clip from end to end, along time or within frames."""

from __future__ import annotations

from typing import Literal

Axis = Literal["joint", "space", "time"]
SPANNED: dict[Axis, str] = {"joint": "", "space": "T", "time": "HW"}  # the axes of a clip that are one
