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
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa._utils.checks import check_choice, check_count, is_integer, is_number
from captum_staa._utils.tensors import gaussian

GRAY = 128  # mid gray; all colors are drawn around this level

LABELS = {
    "pattern": ("bright-right", "bright-bottom", "bright-diagonal"),
    "motion": ("left", "right"),
    "order": ("right-first", "bottom-first"),
}
RIVALS = {"pattern": 3, "motion": 3, "order": 2}  # four objects in all
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
    """Options of planted clips, the same for all tasks.

    Attributes:
        num_frames: T, frames per clip.
        image_size: H and W, in pixels.
        noise: standard deviation of the pixel noise, as a fraction of the range 0..255.
        contrast: distance of bright and dark from an object's mean color (``motion``: of an object from mid gray), as
            a fraction of the range 0..255.
        patch_size: side of an object, in pixels, an even number.
        window: fewest and most frames that show evidence, both included; for ``order``, those of each of its two
            textures. None chooses it from ``num_frames``: (4, 7) for 16 frames, or (3, 4) for ``order``.
        speed: slowest and fastest movement in ``motion``, in pixels per frame. None takes the highest speed that
            keeps the object in its part of the frame, and three quarters of it: (1.5, 2.0) by default.
        rivals: number of objects that show twins only. None takes 3, or 2 for ``order``: four objects in all.
        two_classes: whether each clip contains evidence of two classes, in two objects. Then labels are ``(B, 2)`` and
            truth is ``(B, 2, T, H, W)``. Not for ``order``, whose classes share their evidence.
        blend: whether objects have the brightness and color of the background around them, and are as blurred as it.
            Their edges fade inside their own pixels, so the truth stays exact. For real footage.
    """

    num_frames: int = 16
    image_size: int = 48
    noise: float = 0.06
    contrast: float = 0.3
    patch_size: int = 12
    window: tuple[int, int] | None = None
    speed: tuple[float, float] | None = None
    rivals: int | None = None
    two_classes: bool = False
    blend: bool = False


@dataclass(frozen=True)
class Recipe:
    """A task and its options, with values in place of None.

    Attributes:
        task: ``"pattern"``, ``"motion"`` or ``"order"``.
        options: as passed.
        window: fewest and most frames that show evidence.
        speed: slowest and fastest movement; zeros except in ``motion``.
        rivals: number of objects that show twins only.
    """

    task: str
    options: SceneOptions
    window: tuple[int, int]
    speed: tuple[float, float]
    rivals: int

    @property
    def evidence_objects(self) -> int:
        """Number of objects that show evidence."""
        return 2 if self.task == "order" or self.options.two_classes else 1


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


def recipe_of(task: str, options: SceneOptions) -> Recipe:
    """Return a task with its options, with values in place of None.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: the task is unknown, an option is out of range, or the evidence does not fit into the clip.
    """
    check_choice("task", task, tuple(LABELS))
    if not isinstance(options, SceneOptions):
        raise TypeError(
            f"scene must be a SceneOptions or None, got {options!r}. Pass SceneOptions(num_frames=32), for example."
        )
    for name in ("num_frames", "image_size", "patch_size"):
        check_count(name, getattr(options, name))
    rivals = RIVALS[task] if options.rivals is None else options.rivals
    check_count("rivals", rivals, least=0)
    counts: dict[str, Any] = {name: int(getattr(options, name)) for name in ("num_frames", "image_size", "patch_size")}
    options = replace(options, **counts, two_classes=bool(options.two_classes), blend=bool(options.blend))
    window = _pair("window", _window(task, options.num_frames) if options.window is None else options.window)
    recipe = Recipe(task, options, window, (0.0, 0.0), int(rivals))
    _check(recipe)
    return replace(recipe, speed=_speed(recipe)) if task == "motion" else recipe


def _pair(name: str, pair: Any) -> tuple[int, int]:
    """Return a checked pair of integers, the smaller one first."""
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_integer, pair))):
        raise TypeError(f"{name} must be two ints (fewest, most), got {pair!r}. Pass {name}=(5, 7), for example.")
    if not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"{name} must be (fewest, most) with 1 <= fewest <= most, got {pair}. Swap or raise them.")
    return int(pair[0]), int(pair[1])


def _window(task: str, num_frames: int) -> tuple[int, int]:
    """Return the default fewest and most frames of a phase or event for clips of any length."""
    if task == "order":
        return max(num_frames * 3 // 16, 1), max(num_frames // 4, 1)
    return max(num_frames // 4, 1), max(-(-num_frames // 3), num_frames // 2 - 1)


def _speed(recipe: Recipe) -> tuple[float, float]:
    """Return the checked speed: a path must fit into the part of the frame that belongs to the object."""
    speed: Any = recipe.options.speed
    free = free_pixels(recipe, recipe.rivals + recipe.evidence_objects)
    fastest = free / (recipe.window[1] - 1)
    if speed is None:
        speed = (0.75 * fastest, fastest)
    if not (isinstance(speed, (tuple, list)) and len(speed) == 2 and all(map(is_number, speed))):
        raise TypeError(
            f"speed must be two numbers (slowest, fastest), got {speed!r}. Pass speed=(1.5, 2.0), for example."
        )
    if not 0 < speed[0] <= speed[1] <= fastest:
        raise ValueError(
            f"speed must be (slowest, fastest) with 0 < slowest <= fastest <= {fastest:g} pixels per frame, so that "
            f"{recipe.window[1]} frames fit into the {free} pixels that an object can move, got {speed}. Lower it, or "
            f"raise image_size."
        )
    return float(speed[0]), float(speed[1])


def _check(recipe: Recipe) -> None:
    """Raise unless the evidence fits into the clip."""
    options = recipe.options
    for name in ("noise", "contrast"):
        if not is_number(value := getattr(options, name)):
            raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    task, frames, window = recipe.task, options.num_frames, recipe.window
    objects = recipe.rivals + recipe.evidence_objects
    rows = cells_per_side(objects)
    if task == "order":
        fits, needed = frames > 2 * window[1], f"at least {2 * window[1] + 1} frames"
    else:
        fits = bool(cuts(frames, PHASES, window))
        needed = f"{PHASES * window[0]} to {PHASES * window[1]} frames"
    checks = [
        (
            0 <= options.noise <= 1,
            f"noise must be a fraction of the range 0..255, got {options.noise}. Divide gray levels by 255.",
        ),
        (
            0 < options.contrast <= 0.5,
            f"contrast must be above 0 and at most 0.5, got {options.contrast}. Divide gray levels by 255.",
        ),
        (
            options.patch_size % 2 == 0,
            f"patch_size must be even, as an object has four quarters, got {options.patch_size}. Add 1.",
        ),
        (
            options.image_size >= rows * options.patch_size,
            f"image_size must be at least {rows} times patch_size={options.patch_size} for {objects} objects, got "
            f"{options.image_size}. Raise it, or lower patch_size or rivals.",
        ),
        (
            fits,
            f"num_frames must fit window={window}, which takes {needed} for task={task!r}, got {frames}. "
            f"Leave window out, or change either.",
        ),
        (
            task != "motion" or window[0] >= 2,
            f"window must begin at 2 frames or more for task='motion', or nothing moves, got {window}. Raise it.",
        ),
        (
            task != "order" or not options.two_classes,
            "two_classes must be False for task='order', whose classes share their evidence, got True. "
            "Use 'pattern' or 'motion'.",
        ),
    ]
    for valid, message in checks:
        if not valid:
            raise ValueError(message)


def draw_scene(recipe: Recipe, classes: tuple[int, ...], draw: Draw, footage: Tensor | None) -> Scene:
    """Draw a clip of one class, or of two.

    Args:
        recipe: the task and the options that all clips share.
        classes: class of the evidence; two for a clip that contains evidence of both.
        draw: random numbers of this clip.
        footage: ``(F, H', W', 3)`` uint8, frames from which the background is cut; None for a still texture.
    """
    size, side = recipe.options.image_size, recipe.options.patch_size
    background = _texture(recipe, draw) if footage is None else _cut(footage, recipe, draw)
    objects = {"pattern": _pattern, "motion": _motion, "order": _order}[recipe.task](recipe, classes, draw)
    count = len(objects.evidence)
    # A patch without texture must differ from the background in its color.
    tones = draw.signs(count, 1) * recipe.options.contrast * 255 if recipe.task == "motion" else 0
    colors = GRAY + tones + draw.uniform(-25, 25, count, 3)  # (K, 3)

    rows = cells_per_side(count)
    cell = size // rows
    cells = draw.permutation(rows**2)[:count]  # the cell of each object
    corners = torch.stack([cells // rows, cells % rows], 1) * cell + draw.integers(0, size - 1, 2)  # (K, 2)
    corners = corners[:, None] + _placed(objects.paths, objects.parts, cell - side, draw)  # (K, T, 2)
    offsets = torch.cartesian_prod(torch.arange(side), torch.arange(side))  # (P, 2)
    places = (corners[:, :, None] + offsets) % size  # (K, T, P, 2)
    times = torch.arange(recipe.options.num_frames)[:, None]

    if recipe.options.blend:
        colors = _matched_colors(
            background[times, places[..., 0], places[..., 1]], tones, recipe.options.contrast * 255
        )
    frames = background.clone()
    shown = torch.full((recipe.options.num_frames, size, size), -1)
    textures = objects.textures.flatten(2)[..., None]  # (K, T, P, 1)
    levels = colors[:, None, None] + textures * recipe.options.contrast * 255  # (K, T, P, 3)
    frames[times, places[..., 0], places[..., 1]] = levels
    shown[times, places[..., 0], places[..., 1]] = torch.arange(count)[:, None, None]
    if recipe.options.blend:
        frames = _blended(background, frames, shown >= 0, min(blur_of(background), side / 8))
    noise = draw.normal(*frames.shape).mul_(recipe.options.noise * 255)
    return Scene(background, frames, noise, shown, objects, classes)


def _matched_colors(behind: Tensor, tones: Tensor | int, margin: float) -> Tensor:
    """Return the mean color ``(K, 3)`` of objects in front of pixels ``(K, T, P, 3)`` of the background.

    The parts of a texture are brighter and darker than this by ``margin``. In front of black, the darker part would be
    black too, and one could not tell which side of the object it is. So in front of very dark (or bright) pixels, both
    parts are brighter (or darker) than these. Plain objects are brighter or darker than the background by ``margin``:
    as the sign of their tone says, or the opposite if that does not fit into the gray levels.
    """
    mean = behind.mean((1, 2))
    level = mean.mean(1, keepdim=True)
    if isinstance(tones, int):
        dark, bright = level < margin / 2, level > 255 - margin / 2
        shift = 1.5 * margin * (dark.float() - bright.float())
        return (mean + shift).where(dark | bright, mean.clamp(margin, 255 - margin))
    signs = tones.sign().where(level <= 255 - margin, -1.0).where(level >= margin, 1.0)
    return (mean + signs * margin).clamp(0, 255)


def blur_of(frames: Tensor) -> float:
    """Return the standard deviation, in pixels, of a Gaussian whose blurred edges are as steep as those of frames.

    A step that is blurred by ``s`` pixels has second differences of ``sqrt(2 / pi) / s`` times its first differences,
    as sums of magnitudes.

    Example:
        >>> step = torch.zeros(1, 40, 40, 3)
        >>> step[:, :, 20:] = 255
        >>> from captum_staa._utils.tensors import gaussian
        >>> [round(blur_of(gaussian(step.movedim(-1, 0), (0, s, s)).movedim(0, -1)), 1) for s in (1.0, 2.0)]
        [1.0, 2.0]

    Args:
        frames: ``(T, H, W, 3)`` float.
    """
    first = sum(frames.diff(dim=axis).abs().sum() for axis in (1, 2))
    second = sum(frames.diff(n=2, dim=axis).abs().sum() for axis in (1, 2))
    return math.sqrt(2 / math.pi) * float(first) / max(float(second), 1e-9)


def _blended(background: Tensor, frames: Tensor, shown: Tensor, sigma: float) -> Tensor:
    """Return frames whose objects are blurred, and fade into the background inside their own pixels.

    Args:
        background: ``(T, H, W, 3)`` float.
        frames: ``(T, H, W, 3)`` float, with sharp objects.
        shown: ``(T, H, W)`` bool, True where an object is visible.
        sigma: standard deviation of the blur, in pixels.
    """
    reach = math.ceil(3 * sigma)
    if reach == 0:  # frames of one color, as between two scenes
        return frames
    solid = shown[..., None].float()
    layers = torch.cat([frames * solid, solid], -1).movedim(-1, 0)  # (4, T, H, W)
    padded = F.pad(layers, (reach,) * 4, mode="circular")  # an object at a border goes on at the other side
    blurred = gaussian(padded, (0, sigma, sigma))[..., reach:-reach, reach:-reach].movedim(0, -1)  # (T, H, W, 4)
    levels, share = blurred[..., :3] / blurred[..., 3:].clamp_min(1e-6), blurred[..., 3:]
    inside = (2 * share - 1).clamp(0, 1) * solid
    return inside * levels + (1 - inside) * background


def cells_per_side(objects: int) -> int:
    """Return the number of rows and columns of a grid that has a cell for every object."""
    return math.isqrt(objects - 1) + 1


def free_pixels(recipe: Recipe, count: int) -> int:
    """Return the number of pixels that each of ``count`` objects can move within its cell."""
    return recipe.options.image_size // cells_per_side(count) - recipe.options.patch_size


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


def _texture(recipe: Recipe, draw: Draw) -> Tensor:
    """Return a smooth, still color texture, ``(T, H, W, 3)``."""
    size = recipe.options.image_size
    coarse = draw.normal(1, 3, 5, 5) * 15 + draw.uniform(-15, 15, 3)[:, None, None] + GRAY
    texture = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0]  # (3, H, W)
    return texture.permute(1, 2, 0).expand(recipe.options.num_frames, size, size, 3)


def _cut(footage: Tensor, recipe: Recipe, draw: Draw) -> Tensor:
    """Return a random run of frames and a random square of real footage, resized to ``(T, H, W, 3)``."""
    frames, height, width = footage.shape[:3]
    side = draw.integer(min(recipe.options.image_size, height, width), min(height, width))
    start = draw.integer(0, frames - recipe.options.num_frames)
    top, left = draw.integer(0, height - side), draw.integer(0, width - side)
    part = footage[start : start + recipe.options.num_frames, top : top + side, left : left + side].permute(0, 3, 1, 2)
    size = (recipe.options.image_size, recipe.options.image_size)
    return F.interpolate(part.float(), size=size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def _pattern(recipe: Recipe, classes: tuple[int, ...], draw: Draw) -> Objects:
    """Draw objects that show all three textures in turn; the texture of the class is evidence, others are twins."""
    count = len(classes) + recipe.rivals
    phases = torch.stack([draw.phases(recipe.options.num_frames, PHASES, recipe.window) for _ in range(count)])
    numbers = torch.stack([draw.permutation(len(TEXTURES)) for _ in range(count)]).gather(1, phases)  # (K, T)
    texture = torch.tensor([*classes, *[-1] * recipe.rivals])[:, None]  # -1 matches no texture
    evidence = numbers == texture
    return _drifting(recipe, draw, _textures(recipe, numbers, evidence), evidence, ~evidence)


def _order(recipe: Recipe, classes: tuple[int, ...], draw: Draw) -> Objects:
    """Draw objects that show two textures for a while; for each of the first two objects, one of the two is evidence.

    The evidence of object 0 is bright on the right, that of object 1 at the bottom; the class is their order.
    """
    count, first = 2 + recipe.rivals, classes[0]
    while True:  # one pair in four has separate events in the required order
        starts, ends, textures = map(torch.stack, zip(*(_events(recipe, draw) for _ in range(count)), strict=True))
        at = [int((textures[k] == k).nonzero()) for k in (0, 1)]  # which of its two events is evidence
        if ends[first, at[first]] < starts[1 - first, at[1 - first]]:  # at least one frame lies between them
            break
    frames = torch.arange(recipe.options.num_frames)
    during = (frames >= starts[..., None]) & (frames < ends[..., None])  # (K, 2, T)
    numbers = torch.where(during[:, 0], textures[:, :1], textures[:, 1:])
    evidence = torch.zeros(count, recipe.options.num_frames, dtype=torch.bool)
    for k in (0, 1):
        evidence[k] = during[k, at[k]]
    visible = during.any(1)
    shown = _textures(recipe, numbers, evidence) * visible[..., None, None]
    return _drifting(recipe, draw, shown, evidence, visible & ~evidence)


def _events(recipe: Recipe, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
    """Return starts, ends and textures of the two events of an object, ``(2,)`` each."""
    lengths = draw.integers(*recipe.window, 2)
    spare = recipe.options.num_frames - int(lengths.sum()) - 1  # at least one frame lies between them
    before, after = draw.integers(0, spare, 2).sort().values
    starts = torch.stack([before, after + lengths[0] + 1])
    return starts, starts + lengths, draw.permutation(2)


def _motion(recipe: Recipe, classes: tuple[int, ...], draw: Draw) -> Objects:
    """Draw plain patches that move up or down and jump twice; evidence moves left or right between two jumps."""
    count, frames = len(classes) + recipe.rivals, recipe.options.num_frames
    phases = torch.stack([draw.phases(frames, PHASES, recipe.window) for _ in range(count)])  # (K, T)
    evidence = (phases == draw.integers(0, PHASES - 1, count, 1)) & (torch.arange(count) < len(classes))[:, None]
    travel = draw.uniform(*recipe.speed, count, 1) * torch.arange(frames)  # (K, T)
    vertical = travel * draw.signs(count, PHASES).gather(1, phases)
    signs = torch.tensor([1 if LABELS["motion"][label] == "right" else -1 for label in classes])
    horizontal = travel * torch.cat([signs, torch.zeros(recipe.rivals, dtype=torch.int64)])[:, None]
    paths = torch.stack([vertical.where(~evidence, 0), horizontal.where(evidence, 0)], -1)  # (K, T, 2)
    plain = torch.zeros(count, frames, recipe.options.patch_size, recipe.options.patch_size)
    return Objects(paths, phases, plain, evidence, ~evidence)


def _drifting(recipe: Recipe, draw: Draw, textures: Tensor, evidence: Tensor, twins: Tensor) -> Objects:
    """Return objects that move slowly along a straight line through the whole clip."""
    count, frames = evidence.shape
    reach = free_pixels(recipe, count) / frames
    paths = draw.uniform(-reach, reach, count, 1, 2) * torch.arange(frames)[:, None]
    return Objects(paths, torch.zeros(count, frames, dtype=torch.int64), textures, evidence, twins)


def _textures(recipe: Recipe, numbers: Tensor, evidence: Tensor) -> Tensor:
    """Return textures ``(K, T, side, side)`` by number ``(K, T)``; textures that are not evidence become twins."""
    half = recipe.options.patch_size // 2
    pixels = TEXTURES.float().repeat_interleave(half, 1).repeat_interleave(half, 2)
    return pixels[numbers] * torch.where(evidence, 1, -1)[..., None, None]
