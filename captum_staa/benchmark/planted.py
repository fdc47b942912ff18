"""Clips whose evidence is planted, so that the right explanation of a right answer is known."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_staa.checks import check_count, is_number, is_whole

GREY = 128  # what `only_evidence` puts everywhere else, and the level all colours are drawn around

LABELS = {
    "pattern": ("horizontal", "vertical", "diagonal", "checkerboard"),
    "motion": ("left", "right"),
    "order": ("disc-first", "ring-first"),
}
WINDOWS = {"pattern": (5, 7), "motion": (7, 10), "order": (3, 4)}  # frames, both ends included

# To draw: frames (N,), its place in each frame (T, 2), its pixels (P, 2), its colour (3,) or colours (P, 3).
_Part = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _Scene:
    """One clip before noise and rounding: what is behind the evidence, the evidence, and where it is."""

    behind: Tensor  # (T, H, W, 3) float32, grey levels
    front: Tensor  # (T, H, W, 3) float32, `behind` with the evidence drawn over it
    truth: Tensor  # (T, H, W) bool
    noise: Tensor  # (T, H, W, 3) float32, the same with and without evidence
    label: int


class PlantedClips(Sequence[tuple[Tensor, Tensor, Tensor]]):
    """Small made-up clips with a known answer and a known place in space and time where it can be seen.

        >>> clips, labels, truth = PlantedClips(seed=0, n=8, task="motion")[:4]
        >>> clips.shape, labels.shape, truth.shape
        (torch.Size([4, 16, 3, 48, 48]), torch.Size([4]), torch.Size([4, 16, 48, 48]))
        >>> PlantedClips(seed=0, n=8, task="motion").labels
        ('left', 'right')

    Every clip has a smooth, still colour texture, noise in each pixel of each frame, and a distractor which
    is there all the time. Movement wraps around the border: a place in one frame says nothing of direction.

    ``pattern``: for some frames a moving patch wears one of four patterns; the distractor is a plain moving
    patch of the same size and mean colour. One frame is enough to answer.
    ``motion``: for some frames a plain patch moves left or right, drifting up or down; the distractor is its
    still twin. No frame, and no unordered set of frames, tells the answer.
    ``order``: a bright disc and a dark ring each show for a few frames; the answer is which comes first, and
    the distractor is a plain still patch. Both events are evidence.

    Item ``i`` depends on the arguments, ``seed`` and ``i`` only: not on ``n``, on the order of reading, nor
    on PyTorch's global generator, which is left alone. Classes are balanced in every ``len(labels)`` clips.

    Args:
        seed: any int of at most 63 bits.
        n: number of clips, at least 1.
        task: ``"pattern"``, ``"motion"`` or ``"order"``.
        num_frames: T, frames per clip.
        image_size: H and W, pixels.
        noise: standard deviation of the pixel noise, as a fraction of the range 0..255.
        contrast: distance of the drawn colours from mid grey (``pattern``: from the patch's mean colour),
            as a fraction of the range 0..255.
        patch_size: side of a patch and diameter of an event, pixels, a multiple of 4.
        window: fewest and most frames the evidence shows for (``order``: each event), both included.
            None takes (5, 7) for ``pattern``, (7, 10) for ``motion``, (3, 4) for ``order``.
        speed: fewest and most pixels per frame the patch of ``motion`` moves, whole numbers, both included.

    Raises:
        TypeError: an argument is no number, or not a whole one where it must be.
        ValueError: an argument is outside what is said above, or the evidence does not fit into the clip.
    """

    def __init__(
        self,
        seed: int,
        n: int,
        task: str = "pattern",
        num_frames: int = 16,
        image_size: int = 48,
        *,
        noise: float = 0.06,
        contrast: float = 0.25,
        patch_size: int = 12,
        window: tuple[int, int] | None = None,
        speed: tuple[int, int] = (2, 3),
    ) -> None:
        if task not in LABELS:
            raise ValueError(f"{task = }, expected one of {', '.join(map(repr, LABELS))}: pick one of these")
        window = WINDOWS[task] if window is None else window
        check_count("seed", seed, least=-(2**63), most=2**63 - 1)
        counts = {"n": n, "num_frames": num_frames, "image_size": image_size, "patch_size": patch_size}
        for name, count in counts.items():
            check_count(name, count)
        _check_pairs(window=window, speed=speed)
        if not (is_number(noise) and is_number(contrast)):
            raise TypeError(f"noise and contrast are numbers, but {noise = }, {contrast = } came")
        needed = 2 * window[1] + 1 if task == "order" else window[1]
        checks = [
            (
                0 <= noise <= 1,
                f"{noise = }, expected a fraction of the range 0..255: divide grey levels by 255",
            ),
            (0 < contrast <= 0.5, f"{contrast = }, expected above 0, at most 0.5: divide grey levels by 255"),
            (
                patch_size % 4 == 0,
                f"{patch_size = }, expected a positive multiple of 4, as a "
                "patch shows two periods of half light, half dark: round it",
            ),
            (
                image_size >= 2 * patch_size,
                f"{image_size = }, expected twice {patch_size = } or more: change either",
            ),
            (
                1 <= window[0] <= window[1],
                f"{window = }, expected (fewest, most) frames, 1 or more: swap or raise",
            ),
            (
                num_frames >= needed,
                f"{num_frames = }, expected {needed} or more for {task = }, {window = }: pass "
                "more frames or a shorter window",
            ),
            (
                task != "motion" or window[0] >= 2,
                f"{window = }, expected 2 frames or more, else nothing moves: raise",
            ),
            # At half the side or more, a step to the left is also a step to the right around the border.
            (
                1 <= speed[0] <= speed[1] < image_size / 2,
                f"{speed = }, expected (fewest, most) pixels per frame, 1 "
                f"or more and below image_size / 2 = {image_size / 2}: swap, raise or lower",
            ),
        ]
        for good, message in checks:
            if not good:
                raise ValueError(message)
        self.seed, self.n, self.task = int(seed), int(n), task
        self.num_frames, self.image_size, self.patch_size = num_frames, image_size, patch_size
        self.noise, self.contrast, self.window, self.speed = noise, contrast, window, speed
        self.labels: tuple[str, ...] = LABELS[task]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int | slice) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Clips, labels and truth.

        Returns:
            clips: (B, T, C, H, W) float32 in [-1, 1]; labels: (B,) int64; truth: (B, T, H, W) bool, True
            where the evidence is. An int index gives the same without the batch axis.
        """
        scenes, single = self._scenes(index)
        clips = _to_clip(torch.stack([_round(s.front + s.noise) for s in scenes]))
        labels = torch.tensor([s.label for s in scenes])
        truth = torch.stack([s.truth for s in scenes])
        return (clips[0], labels[0], truth[0]) if single else (clips, labels, truth)

    def frames(self, index: int) -> np.ndarray:
        """Clip ``index`` as a picture: (T, H, W, 3) uint8. The clip is ``(frames / 255 - 0.5) / 0.5``."""
        scene = self._scene(self._position(index))
        return _round(scene.front + scene.noise).numpy()

    def without_evidence(self, index: int | slice) -> Tensor:
        """The same clips, noise and distractor without the evidence: what was behind it is seen instead.

        Returns:
            (B, T, C, H, W) float32, equal to the clips outside the truth; no batch axis for an int index.
        """
        scenes, single = self._scenes(index)
        clips = _to_clip(torch.stack([_round(s.behind + s.noise) for s in scenes]))
        return clips[0] if single else clips

    def only_evidence(self, index: int | slice) -> Tensor:
        """The same clips with neutral grey (128) everywhere outside the truth.

        Returns:
            (B, T, C, H, W) float32, equal to the clips inside the truth; no batch axis for an int index.
        """
        scenes, single = self._scenes(index)
        grey = torch.tensor(GREY, dtype=torch.uint8)
        clips = _to_clip(torch.stack([_round(s.front + s.noise).where(s.truth[..., None], grey) for s in scenes]))
        return clips[0] if single else clips

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if not -self.n <= position < self.n:
            raise IndexError(f"{index = }, expected {-self.n} .. {self.n - 1} as there are {self.n} clips")
        return position % self.n

    def _scenes(self, index: int | slice) -> tuple[list[_Scene], bool]:
        if not isinstance(index, slice):
            return [self._scene(self._position(index))], True
        positions = range(self.n)[index]
        if not positions:
            raise ValueError(f"{index} picks none of the {self.n} clips, expected one at least: widen the slice")
        return [self._scene(i) for i in positions], False

    def _scene(self, i: int) -> _Scene:
        classes = len(self.labels)
        block = generator_of(self.seed, i // classes, 1)
        label = int(torch.randperm(classes, generator=block)[i % classes])
        draw = _Draw(generator_of(self.seed, i, 0))
        t, size = self.num_frames, self.image_size

        coarse = draw.normal(1, 3, 5, 5) * 15 + draw.uniform(-15, 15, 3)[:, None, None] + GREY
        texture = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0]  # (3, H, W)
        behind = texture.permute(1, 2, 0).expand(t, size, size, 3).contiguous()
        paint = {"pattern": self._pattern, "motion": self._motion, "order": self._order}[self.task]
        front, truth = paint(behind, label, draw)
        noise = draw.normal(t, size, size, 3).mul_(self.noise * 255)
        return _Scene(behind, front, truth, noise, label)

    # Each of the three draws the distractor into `behind`, and the evidence into a copy of it.

    def _pattern(self, behind: Tensor, label: int, draw: _Draw) -> tuple[Tensor, Tensor]:
        size, side, t = self.image_size, self.patch_size, torch.arange(self.num_frames)
        colour = GREY + draw.uniform(-30, 30, 3)
        plain_path = (draw.uniform(0, size, 2) + t[:, None] * draw.uniform(-1.5, 1.5, 2)).round().long()
        _paint(behind, t, plain_path, _square(side), colour)

        start, length = draw.window(self.num_frames, self.window)
        path = (draw.uniform(0, size, 2) + t[:, None] * draw.uniform(-1.5, 1.5, 2)).round().long()
        where = _square(side)
        y, x = where.unbind(1)
        stripe, phase = side // 4, draw.integer(0, side // 2)  # two periods of light and dark per patch
        light = (
            (y + phase) // stripe % 2,
            (x + phase) // stripe % 2,
            (x + y + phase) // stripe % 2,
            ((x + phase) // stripe + (y + phase) // stripe) % 2,
        )[label]
        colours = colour + (2 * light[:, None] - 1) * self.contrast * 255  # (P, 3), its mean is `colour`
        return self._with_evidence(behind, [(t[start : start + length], path, where, colours)])

    def _motion(self, behind: Tensor, label: int, draw: _Draw) -> tuple[Tensor, Tensor]:
        size, side, t = self.image_size, self.patch_size, torch.arange(self.num_frames)
        tone = 1 if draw.integer(0, 1) else -1
        colour = GREY + tone * self.contrast * 255 + draw.uniform(-20, 20, 3)
        start, length = draw.window(self.num_frames, self.window)
        dx = draw.integer(*self.speed) * (1 if self.labels[label] == "right" else -1)
        dy = draw.integer(-1, 1)
        y, x, other_x = draw.integer(0, size - 1), draw.integer(0, size - 1), draw.integer(0, size - 1)
        path = torch.stack([y + dy * (t - start), x + dx * (t - start)], dim=1)  # (T, 2)
        # The twin keeps to rows the patch does not cross: where they meet, removing one changes nothing.
        other_y = y + dy * (length - 1) // 2 + size // 2 + draw.integer(-2, 2)
        where = _square(side)
        _paint(behind, t, torch.tensor([[other_y, other_x]]).expand(len(t), 2), where, colour)
        return self._with_evidence(behind, [(t[start : start + length], path, where, colour)])

    def _order(self, behind: Tensor, label: int, draw: _Draw) -> tuple[Tensor, Tensor]:
        size, side, t = self.image_size, self.patch_size, torch.arange(self.num_frames)
        place = torch.tensor([draw.integer(0, size - 1), draw.integer(0, size - 1)])
        _paint(behind, t, place.expand(len(t), 2), _square(side), GREY + draw.uniform(-40, 40, 3))

        lengths = [draw.integer(*self.window), draw.integer(*self.window)]
        spare = self.num_frames - sum(lengths) - 1  # one frame at least lies between the events
        before, after = sorted((draw.integer(0, spare), draw.integer(0, spare)))
        starts = [before, after + lengths[0] + 1]
        shapes = [(_disc(side), 1), (_ring(side), -1)]
        events = []
        shapes = shapes if label == 0 else shapes[::-1]
        for start, length, (where, tone) in zip(starts, lengths, shapes, strict=True):
            place = torch.tensor([draw.integer(0, size - 1), draw.integer(0, size - 1)])
            colour = GREY + tone * self.contrast * 255 + draw.uniform(-20, 20, 3)
            events.append((t[start : start + length], place.expand(len(t), 2), where, colour))
        return self._with_evidence(behind, events)

    @staticmethod
    def _with_evidence(behind: Tensor, parts: list[_Part]) -> tuple[Tensor, Tensor]:
        front, truth = behind.clone(), torch.zeros(behind.shape[:3], dtype=torch.bool)
        for times, path, where, colours in parts:
            _paint(front, times, path[times], where, colours)
            _paint(truth, times, path[times], where, torch.tensor(True))
        return front, truth


class _Draw:
    """Random numbers from one generator, in the few shapes a scene needs."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, low: float, high: float, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator) * (high - low) + low

    def integer(self, low: int, high: int) -> int:
        """A whole number of low .. high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def window(self, num_frames: int, bounds: tuple[int, int]) -> tuple[int, int]:
        """First frame and length of a stretch of frames; uniform, so it looks alike in reversed time."""
        length = self.integer(*bounds)
        return self.integer(0, num_frames - length), length


def generator_of(seed: int, *key: int) -> torch.Generator:
    # Neighbouring seeds of a Mersenne twister are alike in their first numbers; SeedSequence mixes them.
    state = np.random.SeedSequence([seed % 2**64, *key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def _paint(canvas: Tensor, times: Tensor, path: Tensor, where: Tensor, colours: Tensor) -> None:
    """Write colours (), (3,) or (P, 3) at pixels `where` (P, 2), moved along `path` (N, 2), on a torus."""
    at = (path[:, None, :] + where) % torch.tensor(canvas.shape[1:3])  # (N, P, 2)
    canvas[times[:, None], at[..., 0], at[..., 1]] = colours


def _pixels(side: int, inside: Callable[[Tensor], Tensor]) -> Tensor:
    steps = torch.arange(side) - (side - 1) / 2
    return inside((steps[:, None] ** 2 + steps**2).sqrt()).nonzero()  # (P, 2)


def _square(side: int) -> Tensor:
    return _pixels(side, lambda radius: radius >= 0)


def _disc(side: int) -> Tensor:
    return _pixels(side, lambda radius: radius <= side / 2)


def _ring(side: int) -> Tensor:
    return _pixels(side, lambda radius: (radius <= side / 2) & (radius > side / 4))


def _round(levels: Tensor) -> Tensor:
    return levels.round().clamp_(0, 255).to(torch.uint8)


def _to_clip(frames: Tensor) -> Tensor:
    """uint8 (..., T, H, W, 3) to float32 (..., T, 3, H, W), exactly ``(frames / 255 - 0.5) / 0.5``."""
    return frames.movedim(-1, -3).contiguous().float().div_(255).sub_(0.5).div_(0.5)


def _check_pairs(**given: object) -> None:
    """Raise unless each is a pair of whole numbers."""
    for name, pair in given.items():
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_whole, pair))):
            came = f"{pair!r} of type {type(pair).__name__}"
            raise TypeError(f"{name} is two whole numbers, fewest and most, but {came} came")
