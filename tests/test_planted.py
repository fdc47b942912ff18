"""PlantedClips: the answer, the evidence and nothing else; and the shipped models that read it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from captum_staa.benchmark.planted import PlantedClips
from captum_staa.models import resnet3d

TASKS = ("pattern", "motion", "order")
WEIGHTS = Path(resnet3d.__file__).parent / "weights"


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("task", TASKS)
def test_items_depend_on_seed_and_index_alone(task: str) -> None:
    planted = PlantedClips(7, 12, task)
    clips, labels, truth = planted[2:9:3]
    longer = PlantedClips(7, 100, task)
    for row, i in reversed(list(enumerate((2, 5, 8)))):  # another order, one by one, from a longer sequence
        clip, label, where = longer[i]
        assert torch.equal(clip, clips[row]) and label == labels[row] and torch.equal(where, truth[row])
    assert torch.equal(planted[-4][0], planted[8][0])
    assert not torch.equal(PlantedClips(8, 12, task)[2][0], clips[0])
    assert not torch.equal(planted[3][0], planted[2][0])


@pytest.mark.parametrize("task", TASKS)
def test_global_generators_are_left_alone(task: str) -> None:
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = PlantedClips(0, 4, task)[:][0]
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.rand(3)  # nor do they listen to it
    assert torch.equal(PlantedClips(0, 4, task)[:][0], first)


@pytest.mark.parametrize("task", TASKS)
def test_clips_are_the_quantised_frames(task: str) -> None:
    planted = PlantedClips(1, 3, task, num_frames=18, image_size=40)
    clips, labels, truth = planted[:]
    assert clips.shape == (3, 18, 3, 40, 40) and clips.dtype == torch.float32 and clips.is_contiguous()
    assert labels.shape == (3,) and labels.dtype == torch.int64
    assert truth.shape == (3, 18, 40, 40) and truth.dtype == torch.bool
    frames = planted.frames(1)
    assert frames.shape == (18, 40, 40, 3) and frames.dtype == np.uint8
    expected = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    assert torch.equal(clips[1], expected)


@pytest.mark.parametrize("task", TASKS)
def test_classes_are_balanced_and_not_in_a_fixed_order(task: str) -> None:
    planted = PlantedClips(5, 48, task)
    k = len(planted.labels)
    labels = planted[:][1].view(-1, k)
    assert (labels.sort(1).values == torch.arange(k)).all()
    assert len({tuple(block) for block in labels.tolist()}) > 1


def test_an_iteration_ends() -> None:
    assert len(list(PlantedClips(0, 3))) == 3
    with pytest.raises(IndexError, match="index = 3"):
        PlantedClips(0, 3)[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "colour"}, "task = 'colour'.*'pattern', 'motion', 'order'"),
        ({"n": 0}, "n is a whole number of at least 1, but 0 came"),
        ({"noise": 15}, "noise = 15.*divide"),
        ({"contrast": 0.0}, "contrast = 0.0"),
        ({"patch_size": 10}, "patch_size = 10.*multiple of 4"),
        ({"image_size": 20}, "image_size = 20.*patch_size = 12"),
        ({"window": (7, 5)}, r"window = \(7, 5\)"),
        ({"window": (17, 17)}, "num_frames = 16, expected 17"),
        ({"task": "order", "window": (8, 8)}, "num_frames = 16, expected 17"),
        ({"task": "motion", "window": (1, 4)}, r"window = \(1, 4\).*nothing moves"),
        ({"task": "motion", "speed": (2, 24)}, r"speed = \(2, 24\)"),
    ],
)
def test_errors_name_what_came_and_the_fix(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlantedClips(**{"seed": 0, "n": 4, **options})
    with pytest.raises(ValueError, match="picks none of the 4 clips"):
        PlantedClips(0, 4)[4:]


# ---------------------------------------------------------------------------------------------- evidence


@pytest.mark.parametrize("task", TASKS)
def test_truth_is_where_the_evidence_makes_a_difference(task: str) -> None:
    planted = PlantedClips(11, 24, task)
    clips, _, truth = planted[:]
    differs = (clips != planted.without_evidence(slice(None))).any(2)
    assert not (differs & ~truth).any()
    assert differs[truth].float().mean() > 0.98  # the rest is equal by chance
    per_clip = (differs & truth).flatten(1).sum(1) / truth.flatten(1).sum(1)
    assert per_clip.min() > 0.8  # the evidence is not behind the distractor in any of them


@pytest.mark.parametrize("task", TASKS)
def test_only_evidence_is_grey_elsewhere(task: str) -> None:
    planted = PlantedClips(11, 6, task)
    clips, _, truth = planted[:]
    alone, inside = planted.only_evidence(slice(None)), truth[:, :, None].expand_as(clips)
    assert torch.equal(alone[inside], clips[inside])
    assert (alone[~inside] == (torch.tensor(128.0) / 255 - 0.5) / 0.5).all()
    assert torch.equal(planted.only_evidence(2), alone[2])
    assert torch.equal(planted.without_evidence(2), planted.without_evidence(slice(None))[2])


def test_evidence_fills_one_window_of_frames() -> None:
    for task, (low, high) in {"pattern": (5, 7), "motion": (7, 10)}.items():
        seen = PlantedClips(2, 40, task)[:][2].flatten(2).any(2)  # (B, T)
        assert set(seen.sum(1).tolist()) == set(range(low, high + 1))
        assert (seen.int().diff(dim=1).abs().sum(1) <= 2).all()  # on once, off once
    assert (PlantedClips(2, 20, "pattern")[:][2].flatten(2).sum(2).unique() == torch.tensor([0, 144])).all()


@pytest.mark.parametrize("window", [(3, 4), (1, 1), (7, 7)])
def test_order_is_the_order_of_disc_and_ring(window: tuple[int, int]) -> None:
    planted = PlantedClips(3, 40, "order", noise=0.0, window=window)
    clips, labels, truth = planted[:]
    bright = clips.mean(2) > 0
    disc, ring = (truth & bright).flatten(2).any(2), (truth & ~bright).flatten(2).any(2)  # (B, T)
    assert not (disc & ring).any() and (disc.any(1) & ring.any(1)).all()
    frames = torch.arange(16)
    for b in range(len(planted)):
        discs, rings = frames[disc[b]], frames[ring[b]]
        first, last = (discs, rings) if discs[0] < rings[0] else (rings, discs)
        assert last.min() - first.max() >= 2  # a frame between them
        assert planted.labels[labels[b]] == ("disc-first" if first is discs else "ring-first")


def test_pattern_is_the_class_and_has_the_mean_colour_of_the_distractor() -> None:
    planted = PlantedClips(4, 40, "pattern", noise=0.0)
    for (clip, label, where), behind in zip(planted, planted.without_evidence(slice(None)), strict=True):
        frame = int(where.flatten(1).any(1).nonzero()[0])
        y, x = where[frame].nonzero(as_tuple=True)
        colours = clip[frame][:, y, x]  # (3, 144)
        light = torch.full((48, 48), torch.nan)
        light[y, x] = torch.where(colours.mean(0) > colours.mean(), 1.0, -1.0)
        light = _unwrapped(light)  # (12, 12)
        same_right = (light[:, 1:] == light[:, :-1]).float().mean()
        same_down = (light[1:] == light[:-1]).float().mean()
        same_diagonal = (light[1:, :-1] == light[:-1, 1:]).float().mean()
        found = {
            "horizontal": same_right == 1 and same_down < 1,
            "vertical": same_down == 1 and same_right < 1,
            "diagonal": same_diagonal == 1 and same_right < 1 and same_down < 1,
            "checkerboard": max(same_right, same_down, same_diagonal) < 1,
        }
        assert [name for name, yes in found.items() if yes] == [planted.labels[label]]
        # The distractor is drawn in one colour, the commonest of what is behind.
        plain, counts = behind[frame].flatten(1).T.unique(dim=0, return_counts=True)
        assert counts.max() >= 144
        assert (plain[counts.argmax()] - colours.mean(1)).abs().max() < 2 / 255


def _unwrapped(image: torch.Tensor) -> torch.Tensor:
    """The square of an image which is not NaN, also where it goes around the border."""
    for axis in (0, 1):
        empty = image.isnan().all(1 - axis)
        image = image.roll(-int(((~empty) & empty.roll(1)).nonzero()[0]), axis)
    return image[~image.isnan().all(1)][:, ~image.isnan().all(0)]


def _centres(truth: torch.Tensor) -> list[complex]:
    """Centre of the evidence in each frame that has some, along x, as an angle on the torus."""
    angle = torch.arange(truth.shape[-1]) * (2j * torch.pi / truth.shape[-1])
    return [(seen.any(0) * angle.exp()).sum() for seen in truth if seen.any()]


def _steps(truth: torch.Tensor) -> list[float]:
    """Pixels to the right from each frame to the next, the short way around the border."""
    centres = _centres(truth)
    pixels = truth.shape[-1] / (2 * torch.pi)
    return [float((b * a.conj()).angle() * pixels) for a, b in pairwise(centres)]


@pytest.mark.parametrize("speed", [(2, 3), (1, 5), (23, 23)])
def test_motion_goes_where_the_label_says_and_back_in_reversed_time(speed: tuple[int, int]) -> None:
    planted = PlantedClips(6, 24, "motion", speed=speed)
    _, labels, truth = planted[:]
    for label, where in zip(labels, truth, strict=True):
        sign = 1 if planted.labels[label] == "right" else -1
        steps = [sign * step for step in _steps(where)]
        assert steps == pytest.approx([round(steps[0])] * len(steps), abs=1e-3)
        assert speed[0] <= round(steps[0]) <= speed[1]
        assert _steps(where.flip(0)) == pytest.approx([-sign * step for step in steps], abs=1e-3)


def test_motion_cannot_be_told_from_unordered_frames() -> None:
    """What the frames show, read without their order, is spread alike in both classes."""
    planted = PlantedClips(9, 600, "motion", num_frames=10, image_size=24, patch_size=4, window=(3, 5))
    summary: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for clip, label, truth in planted:
        times = truth.flatten(1).any(1).nonzero()[:, 0].float()
        place = torch.stack(_centres(truth)).angle()
        colour = clip.movedim(1, -1)[truth].mean(0)  # (3,)
        shade = colour - 0.5 * colour.mean().sign()  # light and dark patches brought together
        seen = [times[0], times[-1], clip.mean(), place.cos().mean(), place.sin().mean(), *place[0:1].sin()]
        summary[int(label)].append(torch.stack([*seen, *colour, *shade]))
    left, right = (torch.stack(summary[k]) for k in (0, 1))
    error = (left.var(0) / len(left) + right.var(0) / len(right)).sqrt()
    assert ((left.mean(0) - right.mean(0)).abs() < 4 * error).all()


# ------------------------------------------------------------------------------------------ shipped models


def _load(family: str, task: str) -> torch.nn.Module:
    folder = WEIGHTS / f"tiny-{family}-{task}"
    if family == "resnet3d":
        return resnet3d.from_pretrained(folder)
    transformers = pytest.importorskip("transformers")
    model_class = {
        "videomae": "VideoMAEForVideoClassification",
        "timesformer": "TimesformerForVideoClassification",
        "vivit": "VivitForVideoClassification",
        "vjepa2": "VJEPA2ForVideoClassification",
    }[family]
    return getattr(transformers, model_class).from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def _answers(family: str, model: torch.nn.Module, clips: torch.Tensor) -> torch.Tensor:
    if family == "resnet3d":
        return model(clips.transpose(1, 2)).argmax(1)
    return torch.cat([model(part).logits.argmax(1) for part in clips.split(25)])


OTHERS = ("timesformer", "vivit", "vjepa2", "resnet3d")
MODELS = [("videomae", task) for task in TASKS] + [
    pytest.param(family, task, marks=pytest.mark.slow) for family in OTHERS for task in TASKS
]
FEW = [(*model, 60) for model in MODELS[:3]]
MANY = [pytest.param(family, task, 200, marks=pytest.mark.slow) for family in ("videomae", *OTHERS) for task in TASKS]


@pytest.mark.parametrize(("family", "task", "count"), [*FEW, *MANY])
def test_shipped_models_answer_from_the_evidence(family: str, task: str, count: int) -> None:
    planted, model = PlantedClips(20_000, count, task), _load(family, task)
    clips, labels, _ = planted[:]
    chance = 1 / len(planted.labels)

    def accuracy(inputs: torch.Tensor) -> float:
        return float((_answers(family, model, inputs) == labels).float().mean())

    assert accuracy(clips) >= 0.95
    assert accuracy(planted.only_evidence(slice(None))) >= 0.9
    assert abs(accuracy(planted.without_evidence(slice(None))) - chance) <= 0.08 * (200 / count) ** 0.5
    if task != "pattern":  # both tasks turn into the other class in reversed time, which needs all of time
        assert float((_answers(family, model, clips.flip(1)) == 1 - labels).float().mean()) >= 0.95


@pytest.mark.parametrize(("family", "task"), MODELS)
def test_shipped_folders_are_complete_and_small(family: str, task: str) -> None:
    folder = WEIGHTS / f"tiny-{family}-{task}"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == family and config["architectures"]
    assert tuple(config["id2label"][str(i)] for i in range(len(config["id2label"]))) == PlantedClips(0, 1, task).labels
    kind = "video_preprocessor" if family == "vjepa2" else "preprocessor"
    preprocessor = json.loads((folder / f"{kind}_config.json").read_text())
    assert preprocessor["crop_size"] == {"height": 48, "width": 48} and preprocessor["image_mean"] == [0.5] * 3
    training = json.loads((folder / "training.json").read_text())
    assert training["task"] == task and training["accuracy"] >= 0.95
    assert (folder / "model.safetensors").stat().st_size < 1_000_000


def test_resnet3d_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    model = resnet3d.ResNet3D(num_classes=3, width=8, num_frames=9).eval()
    resnet3d.save_pretrained(model, tmp_path / "new", ["a", "b", "c"])
    clips = torch.randn(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(resnet3d.from_pretrained(tmp_path / "new")(clips), model(clips))
        assert torch.allclose(model(clips)[:1], model(clips[:1]), atol=1e-6)  # clips do not see each other
    with pytest.raises(ValueError, match=r"shape \(2, 9, 3, 32, 32\), expected .*\(3, 9\).*transpose"):
        model(clips.transpose(1, 2))
    with pytest.raises(ValueError, match="2 labels"):
        resnet3d.save_pretrained(model, tmp_path, ["a", "b"])
    (tmp_path / "new" / "config.json").write_text('{"model_type": "videomae"}')
    with pytest.raises(ValueError, match="model_type = 'videomae'"):
        resnet3d.from_pretrained(tmp_path / "new")
