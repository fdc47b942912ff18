"""Draw the clips of :class:`captum_staa.benchmark.PlantedClips`: moving objects over a background.

Each object moves in a separate cell, so that objects never overlap, and goes through a few phases. All objects of a
clip have the same size, contrast and lifetime, and their colors, speeds, places and phases are drawn from the same
distributions. In one phase, an evidence object shows evidence for the class. In all other phases, and in all
phases of the other objects (the rivals), objects show a twin that does not determine the class: the same texture
mirrored, or the same movement rotated by 90 degrees. So every statistic that is invariant to mirroring, inverting and
rotating a picture has the same distribution for evidence and rivals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GRAY = 128  # mid gray; all colors are drawn around this level

LABELS = {
    "pattern": ("bright-right", "bright-bottom", "bright-diagonal"),
    "motion": ("left", "right"),
    "order": ("right-first", "bottom-first"),
}
PHASES = 3  # phases of each object; in ``order``, an object has two events instead
# The quarters of a patch, bright (1) or dark (-1). The twin of a texture is its mirror image, which is also its
# negative. Different textures are uncorrelated. So if an object shows each of them once, some as twins, evidence
# is not closer to the object's mean over time than twins are.
TEXTURES = torch.tensor(
    [
        [[-1, 1], [-1, 1]],  # bright on the right
        [[-1, -1], [1, 1]],  # bright at the bottom
        [[1, -1], [-1, 1]],  # bright on the main diagonal
    ]
)


@dataclass(frozen=True)
class SceneOptions:
    """Options that all clips of one sequence share; see :class:`captum_staa.benchmark.PlantedClips`."""

    task: str
    num_frames: int
    image_size: int
    patch_size: int
    window: tuple[int, int]
    speed: tuple[float, float]
    noise: float
    contrast: float
    rivals: int
    two_classes: bool


class Draw:
    """Random numbers from one generator, in the forms that a scene needs."""

    def __init__(self, seed: int, *key: int) -> None:
        self.generator = generator_of(seed, *key)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return integers from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def integer(self, low: int, high: int) -> int:
        return int(self.integers(low, high))

    def signs(self, *shape: int) -> Tensor:
        """Return -1 or 1 with equal probability."""
        return self.integers(0, 1, *shape) * 2 - 1

    def permutation(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self.generator)

    def phases(self, num_frames: int, count: int, bounds: tuple[int, int]) -> Tensor:
        """Return the phase of each frame, ``(T,)`` int64; all valid phase lengths are equally likely."""
        ways = cuts(num_frames, count, bounds)
        return torch.arange(count).repeat_interleave(torch.tensor(ways[self.integer(0, len(ways) - 1)]))


@dataclass(frozen=True)
class Objects:
    """Positions, textures and evidence of the K objects of one clip in its T frames.

    Attributes:
        paths: ``(K, T, 2)`` float, pixels down and right, relative to the start of a path.
        parts: ``(K, T)`` int64, index of the path that a frame belongs to; an object jumps between two paths.
        textures: ``(K, T, side, side)`` float in [-1, 1], brightness of each object's pixels.
        evidence: ``(K, T)`` bool, True where an object shows evidence. Objects that show evidence are first.
        twins: ``(K, T)`` bool, True where an object shows a twin of the evidence.
    """

    paths: Tensor
    parts: Tensor
    textures: Tensor
    evidence: Tensor
    twins: Tensor


@dataclass(frozen=True)
class Scene:
    """One clip before rounding.

    Attributes:
        background: ``(T, H, W, 3)`` float, gray levels 0..255.
        frames: the same with the objects.
        noise: ``(T, H, W, 3)`` float, added to either.
        shown: ``(T, H, W)`` int64, index of the object that is visible at a pixel, -1 for the background.
        objects: the objects of the clip.
        classes: the class of the clip, or its two classes.
    """

    background: Tensor
    frames: Tensor
    noise: Tensor
    shown: Tensor
    objects: Objects
    classes: tuple[int, ...]

    def where(self, shows: Tensor) -> Tensor:
        """Return ``(K, T, H, W)`` bool: the pixels of each object in the frames where ``shows`` (K, T) is True."""
        numbers = torch.arange(len(shows))[:, None, None, None]
        return (self.shown == numbers) & shows[:, :, None, None]

    @property
    def truth(self) -> Tensor:
        """``(T, H, W)`` bool, True where evidence is visible."""
        return self.where(self.objects.evidence).any(0)

    @property
    def rivals(self) -> Tensor:
        """``(T, H, W)`` bool, True where a twin of the evidence is visible."""
        return self.where(self.objects.twins).any(0)


def generator_of(seed: int, *key: int) -> torch.Generator:
    """Return a generator for a seed and any number of integers; neighboring seeds give unrelated numbers."""
    state = np.random.SeedSequence([seed % 2**64, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


@cache
def cuts(num_frames: int, count: int, bounds: tuple[int, int]) -> list[tuple[int, ...]]:
    """Return all ways to divide a clip into ``count`` phases of ``bounds`` frames, both included, as phase lengths."""
    lengths = range(bounds[0], bounds[1] + 1)
    return [way for way in product(lengths, repeat=count) if sum(way) == num_frames]


def draw_scene(options: SceneOptions, classes: tuple[int, ...], draw: Draw, footage: Tensor | None) -> Scene:
    """Draw a clip of one class, or of two.

    Args:
        options: options that all clips share.
        classes: class of the evidence; two for a clip that contains evidence of both.
        draw: random numbers of this clip.
        footage: ``(F, H', W', 3)`` uint8, frames from which the background is cut; None for a still texture.
    """
    size, side = options.image_size, options.patch_size
    background = _texture(options, draw) if footage is None else _cut(footage, options, draw)
    objects = {"pattern": _pattern, "motion": _motion, "order": _order}[options.task](options, classes, draw)
    count = len(objects.evidence)
    # A patch without texture must differ from the background in its color.
    tones = draw.signs(count, 1) * options.contrast * 255 if options.task == "motion" else 0
    colors = GRAY + tones + draw.uniform(-25, 25, count, 3)  # (K, 3)

    rows = cells_per_side(count)
    cell = size // rows
    cells = draw.permutation(rows**2)[:count]  # the cell of each object
    corners = torch.stack([cells // rows, cells % rows], 1) * cell + draw.integers(0, size - 1, 2)  # (K, 2)
    corners = corners[:, None] + _placed(objects.paths, objects.parts, cell - side, draw)  # (K, T, 2)
    offsets = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (P, 2)
    places = (corners[:, :, None] + offsets) % size  # (K, T, P, 2)

    frames = background.clone()
    shown = torch.full((options.num_frames, size, size), -1)
    times = torch.arange(options.num_frames)[:, None]
    levels = colors[:, None, None] + objects.textures.flatten(2)[..., None] * options.contrast * 255  # (K, T, P, 3)
    frames[times, places[..., 0], places[..., 1]] = levels
    shown[times, places[..., 0], places[..., 1]] = torch.arange(count)[:, None, None]
    noise = draw.normal(*frames.shape).mul_(options.noise * 255)
    return Scene(background, frames, noise, shown, objects, classes)


def cells_per_side(objects: int) -> int:
    """Return the number of rows and columns of a grid that has a cell for every object."""
    return math.isqrt(objects - 1) + 1


def free_pixels(options: SceneOptions, count: int) -> int:
    """Return the number of pixels that each of ``count`` objects can move within its cell."""
    return options.image_size // cells_per_side(count) - options.patch_size


def _placed(paths: Tensor, parts: Tensor, free: int, draw: Draw) -> Tensor:
    """Return paths ``(K, T, 2)`` int64 in cells with ``free`` pixels to move; all valid starts are equally likely."""
    placed = torch.zeros_like(paths)
    for part in range(int(parts.max()) + 1):
        selected = (parts == part)[..., None]
        low = paths.where(selected, torch.inf).amin(1, keepdim=True)
        high = paths.where(selected, -torch.inf).amax(1, keepdim=True)
        starts = draw.uniform(0, 1, len(paths), 1, 2) * (free - (high - low)) - low
        placed = torch.where(selected, paths + starts, placed)
    return placed.round().long()


def _texture(options: SceneOptions, draw: Draw) -> Tensor:
    """Return a smooth, still color texture, ``(T, H, W, 3)``."""
    size = options.image_size
    coarse = draw.normal(1, 3, 5, 5) * 15 + draw.uniform(-15, 15, 3)[:, None, None] + GRAY
    texture = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0]  # (3, H, W)
    return texture.permute(1, 2, 0).expand(options.num_frames, size, size, 3)


def _cut(footage: Tensor, options: SceneOptions, draw: Draw) -> Tensor:
    """Return a random run of frames and a random square of real footage, resized to ``(T, H, W, 3)``."""
    frames, height, width = footage.shape[:3]
    side = draw.integer(min(options.image_size, height, width), min(height, width))
    start = draw.integer(0, frames - options.num_frames)
    top, left = draw.integer(0, height - side), draw.integer(0, width - side)
    part = footage[start : start + options.num_frames, top : top + side, left : left + side].permute(0, 3, 1, 2)
    size = (options.image_size, options.image_size)
    return F.interpolate(part.float(), size=size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def _pattern(options: SceneOptions, classes: tuple[int, ...], draw: Draw) -> Objects:
    """Draw objects that show all three textures in turn; the texture of the class is evidence, others are twins."""
    count = len(classes) + options.rivals
    phases = torch.stack([draw.phases(options.num_frames, PHASES, options.window) for _ in range(count)])
    numbers = torch.stack([draw.permutation(len(TEXTURES)) for _ in range(count)]).gather(1, phases)  # (K, T)
    texture = torch.tensor([*classes, *[-1] * options.rivals])[:, None]  # -1 matches no texture
    evidence = numbers == texture
    return _drifting(options, draw, _textures(options, numbers, evidence), evidence, ~evidence)


def _order(options: SceneOptions, classes: tuple[int, ...], draw: Draw) -> Objects:
    """Draw objects that show two textures for a while; for each of the first two objects, one of the two is evidence.

    The evidence of object 0 is bright on the right, that of object 1 at the bottom; the class is their order.
    """
    count, first = 2 + options.rivals, classes[0]
    while True:  # one pair in four has separate events in the required order
        starts, ends, textures = map(torch.stack, zip(*(_events(options, draw) for _ in range(count)), strict=True))
        at = [int((textures[k] == k).nonzero()) for k in (0, 1)]  # which of its two events is evidence
        if ends[first, at[first]] < starts[1 - first, at[1 - first]]:  # at least one frame lies between them
            break
    frames = torch.arange(options.num_frames)
    during = (frames >= starts[..., None]) & (frames < ends[..., None])  # (K, 2, T)
    numbers = torch.where(during[:, 0], textures[:, :1], textures[:, 1:])
    evidence = torch.zeros(count, options.num_frames, dtype=torch.bool)
    for k in (0, 1):
        evidence[k] = during[k, at[k]]
    visible = during.any(1)
    shown = _textures(options, numbers, evidence) * visible[..., None, None]
    return _drifting(options, draw, shown, evidence, visible & ~evidence)


def _events(options: SceneOptions, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Return starts, ends and textures of the two events of an object, ``(2,)`` each."""
    lengths = draw.integers(*options.window, 2)
    spare = options.num_frames - int(lengths.sum()) - 1  # at least one frame lies between them
    before, after = draw.integers(0, spare, 2).sort().values
    starts = torch.stack([before, after + lengths[0] + 1])
    return starts, starts + lengths, draw.permutation(2)


def _motion(options: SceneOptions, classes: tuple[int, ...], draw: Draw) -> Objects:
    """Draw plain patches that move up or down and jump twice; evidence moves left or right between two jumps."""
    count, frames = len(classes) + options.rivals, options.num_frames
    phases = torch.stack([draw.phases(frames, PHASES, options.window) for _ in range(count)])  # (K, T)
    evidence = (phases == draw.integers(0, PHASES - 1, count, 1)) & (torch.arange(count) < len(classes))[:, None]
    travel = draw.uniform(*options.speed, count, 1) * torch.arange(frames)  # (K, T)
    vertical = travel * draw.signs(count, PHASES).gather(1, phases)
    signs = torch.tensor([1 if LABELS["motion"][label] == "right" else -1 for label in classes])
    horizontal = travel * torch.cat([signs, torch.zeros(options.rivals, dtype=torch.int64)])[:, None]
    paths = torch.stack([vertical.where(~evidence, 0), horizontal.where(evidence, 0)], -1)  # (K, T, 2)
    plain = torch.zeros(count, frames, options.patch_size, options.patch_size)
    return Objects(paths, phases, plain, evidence, ~evidence)


def _drifting(options: SceneOptions, draw: Draw, textures: Tensor, evidence: Tensor, twins: Tensor) -> Objects:
    """Return objects that move slowly along a straight line through the whole clip."""
    count, frames = evidence.shape
    reach = free_pixels(options, count) / frames
    paths = draw.uniform(-reach, reach, count, 1, 2) * torch.arange(frames)[:, None]
    return Objects(paths, torch.zeros(count, frames, dtype=torch.int64), textures, evidence, twins)


def _textures(options: SceneOptions, numbers: Tensor, evidence: Tensor) -> Tensor:
    """Return textures ``(K, T, side, side)`` by number ``(K, T)``; textures that are not evidence become twins."""
    half = options.patch_size // 2
    pixels = TEXTURES.float().repeat_interleave(half, 1).repeat_interleave(half, 2)
    return pixels[numbers] * torch.where(evidence, 1, -1)[..., None, None]
