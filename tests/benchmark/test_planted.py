"""PlantedClips: evidence and rivals that differ only in what a model was trained to recognize."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from covering import in_one_case

from captum_staa import io, metrics
from captum_staa._utils.tensors import gaussian
from captum_staa.benchmark import PlantedClips, SceneOptions
from captum_staa.benchmark.scenes import TEXTURES
from captum_staa.models import resnet3d

TASKS = ("pattern", "motion", "order")
WEIGHTS = Path(resnet3d.__file__).parent / "weights"


# ---------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("task", TASKS)
def test_items_depend_on_seed_and_index_only(task: str) -> None:
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
def test_global_generators_are_not_used(task: str) -> None:
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = PlantedClips(0, 4, task)[:][0]
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()
    torch.rand(3)
    assert torch.equal(PlantedClips(0, 4, task)[:][0], first)


@pytest.mark.parametrize("task", TASKS)
def test_clips_are_the_rounded_frames(task: str) -> None:
    planted = PlantedClips(1, 3, task, scene=SceneOptions(num_frames=18, image_size=40))
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


def test_iteration_ends_and_invalid_indices_raise() -> None:
    assert len(list(PlantedClips(0, 3))) == 3
    with pytest.raises(IndexError, match=r"from -3 to 2.*got 3"):
        PlantedClips(0, 3)[3]
    with pytest.raises(ValueError, match="at least one of 3 clips"):
        PlantedClips(0, 3)[3:]


def made(n: int, task: str = "pattern", background: object = None, **scene: object) -> PlantedClips:
    return PlantedClips(0, n, task, scene=SceneOptions(**scene), background=background)


@in_one_case()
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"task": "color"}, ValueError, "'color'"),
        ({"n": 0}, ValueError, "0"),
        ({"noise": 15}, ValueError, "got 15.*Divide"),
        ({"noise": "much"}, TypeError, "got 'much'"),
        ({"contrast": 0.0}, ValueError, "got 0.0"),
        ({"patch_size": 11}, ValueError, "even.*got 11"),
        ({"image_size": 20}, ValueError, "2 times patch_size=12 for 4 objects, got 20"),
        ({"rivals": 4}, ValueError, None),  # five objects need nine cells, each as large as a patch
        ({"rivals": 9}, ValueError, "4 times patch_size=12 for 10 objects, got 36"),
        ({"window": (7, 5)}, ValueError, r"got \(7, 5\)"),
        ({"window": (1.5, 3)}, TypeError, "two ints"),
        ({"window": (6, 7)}, ValueError, "18 to 21 frames.*got 16"),
        ({"task": "order", "window": (8, 8)}, ValueError, "at least 17 frames.*got 16"),
        ({"task": "motion", "num_frames": 3, "window": (1, 1)}, ValueError, "nothing moves"),
        ({"task": "motion", "speed": (2, 3)}, ValueError, r"<= 2 pixels per frame.*got \(2, 3\)"),
        ({"task": "motion", "speed": 2}, TypeError, "got 2"),
        ({"task": "order", "two_classes": True}, ValueError, "'pattern' or 'motion'"),
        ({"background": []}, ValueError, "empty list"),
        ({"background": torch.zeros(16, 48, 48, 3)}, TypeError, "uint8.*float32"),
        ({"background": torch.zeros(8, 48, 48, 3, dtype=torch.uint8)}, ValueError, r"num_frames=16.*\(8, 48, 48, 3\)"),
    ],
)
def test_errors_name_the_received_value_and_the_fix(options: dict, error: type[Exception], message: str | None) -> None:
    if "rivals" in options:
        options = {"image_size": 36, **options}
    if message is None:
        made(**{"n": 1, **options})[0]
        return
    with pytest.raises(error, match=message):
        made(**{"n": 4, **options})


# ------------------------------------------------------------------------------------- evidence and rivals


@pytest.mark.parametrize("task", TASKS)
def test_masks_are_where_objects_change_pixels(task: str) -> None:
    planted, everything = PlantedClips(11, 24, task), slice(None)
    clips, _, truth = planted[:]
    rivals = planted.rivals(everything)
    assert not (truth & rivals).any()
    for mask, without in ((truth, planted.without_evidence), (rivals, planted.without_rivals)):
        differs = (clips != without(everything)).any(2)
        assert not (differs & ~mask).any()
        assert differs[mask].float().mean() > 0.95  # the rest is equal by chance
    assert torch.equal(planted.without_rivals(2), planted.without_rivals(everything)[2])
    both = planted.without(2, torch.stack([truth[2], rivals[2]]))
    assert torch.equal(both, torch.stack([planted.without_evidence(2), planted.without_rivals(2)]))


@pytest.mark.parametrize("task", TASKS)
def test_only_evidence_is_gray_outside_the_truth(task: str) -> None:
    planted = PlantedClips(11, 6, task)
    clips, _, truth = planted[:]
    alone, inside = planted.only_evidence(slice(None)), truth[:, :, None].expand_as(clips)
    assert torch.equal(alone[inside], clips[inside])
    assert (alone[~inside] == (torch.tensor(128.0) / 255 - 0.5) / 0.5).all()
    assert torch.equal(planted.only_evidence(2), alone[2])


@in_one_case()
@pytest.mark.parametrize(("task", "rivals"), [("pattern", 3), ("motion", 2), ("order", 1), ("pattern", 0)])
def test_objects_are_the_truth_and_then_each_rival(task: str, rivals: int) -> None:
    planted = PlantedClips(3, 6, task, scene=SceneOptions(rivals=rivals))
    truth, objects = planted[:][2], planted.objects(slice(None))
    assert objects.shape == (6, 1 + rivals, 16, 48, 48)
    assert torch.equal(objects[:, 0], truth)
    assert (objects.sum(1) <= 1).all()  # none covers another
    assert not (objects[:, 1:].any(1) & ~planted.rivals(slice(None))).any()
    assert objects.flatten(2).any(2).all()


@pytest.mark.parametrize("task", ["pattern", "motion"])
def test_clips_of_two_classes_have_a_truth_for_each(task: str) -> None:
    planted = PlantedClips(3, 12, task, scene=SceneOptions(two_classes=True))
    _, labels, truth = planted[:]
    assert labels.shape == (12, 2) and (labels[:, 0] != labels[:, 1]).all()
    assert truth.shape == (12, 2, 16, 48, 48)
    assert not truth.all(1).any() and truth.flatten(2).any(2).all()
    assert not (truth.any(1) & planted.rivals(slice(None))).any()
    assert torch.equal(planted.objects(slice(None))[:, :2], truth)


def test_evidence_fills_one_phase_of_frames() -> None:
    for task in ("pattern", "motion"):
        seen = PlantedClips(2, 60, task)[:][2].flatten(2).any(2)  # (B, T)
        assert set(seen.sum(1).tolist()) == {4, 5, 6, 7}
        assert (seen.int().diff(dim=1).abs().sum(1) <= 2).all()  # on once, off once
        assert (PlantedClips(2, 20, task)[:][2].flatten(2).sum(2).unique() == torch.tensor([0, 144])).all()


def _texture(clip: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return quarters (2, 2) of the object in a frame (3, H, W) without noise: 1 bright, -1 dark."""
    mean = (clip.mean(0) - clip.mean(0)[mask].mean()).sign().where(mask, torch.nan)
    for axis in (0, 1):
        empty = mean.isnan().all(1 - axis)
        mean = mean.roll(-int(((~empty) & empty.roll(1)).nonzero()[0]), axis)
    return mean[:12, :12][3::6, 3::6]


def test_pattern_is_the_class_in_evidence_and_a_mirror_image_in_rivals() -> None:
    planted = PlantedClips(4, 30, "pattern", scene=SceneOptions(noise=0.0))
    for i, (clip, label, truth) in enumerate(planted):
        frame = int(truth.flatten(1).any(1).nonzero()[0])
        assert torch.equal(_texture(clip[frame], truth[frame]), TEXTURES[label].float())
        for rival in planted.objects(i)[1:]:
            worn = [_texture(clip[t], rival[t]).tolist() for t in range(16)]
            mirrored = [(-texture).float().tolist() for texture in TEXTURES]
            assert {mirrored.index(each) for each in worn} == {0, 1, 2}  # all three, and nothing else
    for texture in TEXTURES:
        assert any(torch.equal(-texture, texture.flip(axis)) for axis in (0, 1))  # its negative is its mirror image


def test_order_is_the_order_of_the_two_textures() -> None:
    planted = PlantedClips(3, 30, "order", scene=SceneOptions(noise=0.0))
    for clip, label, truth in planted:
        first: dict[int, list[int]] = {0: [], 1: []}
        for t in range(16):
            corners = truth[t].nonzero()
            if len(corners) == 144:  # frames with one of the two
                first[[each.float().tolist() for each in TEXTURES].index(_texture(clip[t], truth[t]).tolist())].append(
                    t
                )
        right, bottom = first[0], first[1]
        assert right and bottom
        assert (
            (max(right) < min(bottom) - 1) if planted.labels[label] == "right-first" else (max(bottom) < min(right) - 1)
        )


def _steps(mask: torch.Tensor) -> list[tuple[float, float]]:
    """Return pixels down and right from each frame (T, H, W) to the next, the short way around the border."""
    size, centers = mask.shape[-1], []
    turn = (torch.arange(size) * (2j * torch.pi / size)).exp()
    for frame in mask:
        centers.append([(frame.any(1 - axis) * turn).sum() for axis in (0, 1)])
    pixels = size / (2 * torch.pi)
    return [
        tuple(float((b * a.conj()).angle() * pixels) for a, b in zip(*pair, strict=True)) for pair in pairwise(centers)
    ]


def test_motion_is_sideways_in_evidence_and_vertical_in_rivals() -> None:
    planted = PlantedClips(6, 24, "motion")
    for i, (_, label, truth) in enumerate(planted):
        seen = truth[truth.flatten(1).any(1)]
        sign = 1 if planted.labels[label] == "right" else -1
        for down, right in _steps(seen):
            assert abs(down) < 0.01 and 0.99 < sign * right < 2.01
        reversed_steps = [right for _, right in _steps(seen.flip(0))]
        assert all(sign * right < 0 for right in reversed_steps)
        for rival in planted.objects(i)[1:]:
            moves = _steps(rival)
            still = [abs(right) < 0.01 and 0.99 < abs(down) < 2.01 for down, right in moves]
            assert sum(still) >= len(moves) - 2  # all steps but two jumps


def test_motion_classes_cannot_be_distinguished_from_unordered_frames() -> None:
    """The unordered frames have the same distribution in both classes."""
    planted = PlantedClips(9, 600, "motion", scene=SceneOptions(num_frames=12, image_size=24, patch_size=4))
    summary: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    turn = (torch.arange(24) * (2j * torch.pi / 24)).exp()
    for clip, label, truth in planted:
        times = truth.flatten(1).any(1).nonzero()[:, 0].float()
        place = torch.stack([(frame.any(0) * turn).sum() for frame in truth if frame.any()]).angle()
        color = clip.movedim(1, -1)[truth].mean(0)  # (3,)
        seen = [times[0], times[-1], clip.mean(), clip.var(), place.cos().mean(), place.sin().mean()]
        summary[int(label)].append(torch.stack([*seen, *color]))
    left, right = (torch.stack(summary[k]) for k in (0, 1))
    error = (left.var(0) / len(left) + right.var(0) / len(right)).sqrt()
    assert ((left.mean(0) - right.mean(0)).abs() < 4 * error).all()


@pytest.mark.parametrize(("task", "footage"), [("pattern", False), ("motion", True), ("order", False)])
def test_model_free_maps_do_not_distinguish_evidence_from_rivals(task: str, footage: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (40, 9, 12, 3), generator=generator, dtype=torch.uint8).repeat_interleave(10, 1)
    planted = PlantedClips(31, 36, task, background=[real.repeat_interleave(10, 2)] if footage else None)
    found: dict[str, list[torch.Tensor]] = {}
    for start in range(0, 36, 18):
        part = slice(start, start + 18)
        (clips, _, truth), rivals = planted[part], planted.rivals(part)
        for name, maps in metrics.model_free_controls(clips, "BTCHW").items():
            for axis in ("joint", "space", "time"):
                score = metrics.evidence_against_rivals(maps, truth, rivals, axis=axis)
                found.setdefault(f"{name}, {axis}", []).append(score)
    for name, scores in found.items():
        values = torch.cat(scores)
        values = values[~values.isnan()]
        error = float(values.std() / len(values) ** 0.5)
        # Of several objects in a frame, the spectral residual marks each one less, and a frame with evidence holds more
        # of them in ``order``, whose objects are plain in between: there the map is below chance.
        least = 0.3 if (task, name) == ("order", "spectral residual, time") else 0.5 - max(0.05, 3 * error)
        assert least < float(values.mean()) < 0.5 + max(0.05, 3 * error), name


def test_backgrounds_are_runs_of_real_frames() -> None:
    footage = (
        torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 60, 80, 3) * 10
    )  # brighter and brighter
    planted = PlantedClips(0, 8, scene=SceneOptions(noise=0.0), background=[footage.contiguous()])
    clips, _, truth = planted[:]
    behind = ~(truth | planted.rivals(slice(None)))
    for clip, mask in zip(clips, behind, strict=True):
        levels = torch.stack([frame.mean(0)[where].mean() for frame, where in zip(clip, mask, strict=True)])
        levels = ((levels * 0.5 + 0.5) * 255).round()
        assert (levels.diff() == 10).all()
    assert planted.described()["background"] != PlantedClips(0, 8, background=footage.flip(0)).described()["background"]


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


# Models that want a longer training: what they reach is lower than the 97 % of the goal.
LEAST = {("vjepa2", "order"): 0.88, ("vjepa2", "pattern"): 0.9}
OTHERS = ("timesformer", "vivit", "vjepa2", "resnet3d")
MODELS = [("videomae", task) for task in TASKS] + [
    pytest.param(family, task, marks=pytest.mark.slow) for family in OTHERS for task in TASKS
]
FEW = [(*model, 40) for model in MODELS[:3]]
MANY = [pytest.param(family, task, 200, marks=pytest.mark.slow) for family in ("videomae", *OTHERS) for task in TASKS]


@pytest.mark.parametrize(("family", "task", "count"), [*FEW, *MANY])
def test_bundled_models_predict_from_the_evidence(family: str, task: str, count: int) -> None:
    planted, model = PlantedClips(20_000, count, task), _load(family, task)
    clips, labels, _ = planted[:]
    chance = 1 / len(planted.labels)

    def accuracy(inputs: torch.Tensor) -> float:
        return float((_answers(family, model, inputs) == labels).float().mean())

    assert accuracy(clips) >= LEAST.get((family, task), 0.93)
    assert accuracy(planted.only_evidence(slice(None))) >= 0.85
    assert accuracy(planted.without_rivals(slice(None))) >= 0.85
    assert abs(accuracy(planted.without_evidence(slice(None))) - chance) <= 0.1 * (200 / count) ** 0.5
    if task != "pattern":  # both tasks turn into the other class in reversed time, which needs all of time
        assert float((_answers(family, model, clips.flip(1)) == 1 - labels).float().mean()) >= LEAST.get(
            (family, task), 0.93
        )


@pytest.mark.parametrize(("family", "task"), MODELS)
def test_bundled_model_folders_are_complete_and_small(family: str, task: str) -> None:
    folder = WEIGHTS / f"tiny-{family}-{task}"
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == family and config["architectures"]
    assert tuple(config["id2label"][str(i)] for i in range(len(config["id2label"]))) == PlantedClips(0, 1, task).labels
    kind = "video_preprocessor" if family == "vjepa2" else "preprocessor"
    preprocessor = json.loads((folder / f"{kind}_config.json").read_text())
    assert preprocessor["crop_size"] == {"height": 48, "width": 48} and preprocessor["image_mean"] == [0.5] * 3
    training = json.loads((folder / "training.json").read_text())
    assert training["task"] == task and training["accuracy"] >= LEAST.get((family, task), 0.93)
    assert (folder / "model.safetensors").stat().st_size < 1_000_000


def test_resnet3d_is_restored_as_saved(tmp_path: Path) -> None:
    model = resnet3d.ResNet3D(num_classes=3, width=8, num_frames=9).eval()
    resnet3d.save_pretrained(model, tmp_path / "new", ["a", "b", "c"])
    clips = torch.randn(2, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(resnet3d.from_pretrained(tmp_path / "new")(clips), model(clips))
        assert torch.allclose(model(clips)[:1], model(clips[:1]), atol=1e-6)  # clips do not see each other
    with pytest.raises(ValueError, match=r"\(3, 9\), got shape \(2, 9, 3, 32, 32\).*transpose"):
        model(clips.transpose(1, 2))
    with pytest.raises(ValueError, match="3 names, one per class, got 2"):
        resnet3d.save_pretrained(model, tmp_path, ["a", "b"])
    (tmp_path / "new" / "config.json").write_text('{"model_type": "videomae"}')
    with pytest.raises(ValueError, match="model_type = 'videomae'"):
        resnet3d.from_pretrained(tmp_path / "new")


def real_footage(low: float, high: float, soft: float) -> torch.Tensor:
    """Return frames of blurred noise with a range of gray levels and a sharpness, as real footage has."""
    noise = gaussian(torch.rand(3, 20, 60, 60, generator=torch.Generator().manual_seed(0)), (0, soft, soft))
    noise = (noise - noise.amin()) / (noise.amax() - noise.amin())
    return (low + noise * (high - low)).movedim(0, -1).byte()


@pytest.mark.parametrize(("low", "high"), [(0, 40), (60, 190), (215, 255)])
@pytest.mark.parametrize("task", ["pattern", "motion", "order"])
def test_blended_objects_have_the_brightness_and_the_blur_of_the_footage(task, low, high) -> None:
    options = SceneOptions(noise=0.0, contrast=0.1, blend=True)
    footage = real_footage(low, high, soft=1.5)
    planted = PlantedClips(3, 6, task, scene=options, background=footage)
    sharp = PlantedClips(3, 6, task, scene=SceneOptions(noise=0.0, contrast=0.1), background=footage)
    clips, _, truth = planted[:6]
    objects = truth | planted.rivals(slice(6))
    hard, _, same_truth = sharp[:6]
    assert torch.equal(truth, same_truth)  # the masks do not depend on it
    plain = planted.without_evidence(slice(6))
    levels = (clips * 0.5 + 0.5) * 255
    behind = (plain * 0.5 + 0.5) * 255
    shown = truth[:, :, None].expand_as(levels)
    assert (levels[shown] - behind[shown]).abs().mean() < 0.1 * 255 + 20  # not mid gray on black, nor on white
    assert (levels[shown] - behind[shown]).abs().amax() > 10  # but visible
    if task != "motion":
        assert abs(float(levels[shown].mean() - behind[shown].mean())) < 0.1 * 255
    edges = [x.movedim(2, -1).diff(n=2, dim=3).abs().amax() for x in (levels, (hard * 0.5 + 0.5) * 255)]
    assert edges[0] < 0.8 * edges[1]
    others = ~objects.any(0).any(0)
    assert torch.equal(clips[:, :, :, others], planted.without_rivals(slice(6))[:, :, :, others])


@pytest.mark.parametrize("level", [0, 30, 128, 255])
def test_no_part_of_a_blended_texture_looks_like_the_background(level: int) -> None:
    """Otherwise one could not tell on which side of an object its visible part is, which is the class."""
    options = SceneOptions(noise=0.0, contrast=0.2, blend=True)
    footage = torch.full((20, 60, 60, 3), level, dtype=torch.uint8)
    planted = PlantedClips(3, 8, scene=options, background=footage)
    for index in range(8):
        clip, _, truth = planted[index]
        levels = (clip * 0.5 + 0.5).mean(1)[truth] * 255
        parts = levels.quantile(torch.tensor([0.1, 0.9])) - level
        assert (parts.abs() > 0.2 * 255 / 4).all() and parts[1] - parts[0] > 0.2 * 255


def test_blended_evidence_is_still_the_texture_of_its_class() -> None:
    options = SceneOptions(noise=0.0, contrast=0.2, blend=True)
    planted = PlantedClips(3, 12, scene=options, background=real_footage(60, 190, soft=2.0))
    patterns = TEXTURES.float().repeat_interleave(6, 1).repeat_interleave(6, 2)
    for index in range(12):
        clip, label, truth = planted[index]
        frame = int(truth.any(2).any(1).nonzero()[0])
        mask, picture = truth[frame], clip[frame].mean(0)
        for axis in (0, 1):  # an object may go over a border: begin at a line without it
            start = -int((~mask.any(1 - axis)).nonzero()[0])
            mask, picture = mask.roll(start, axis), picture.roll(start, axis)
        patch = picture[mask].view(12, 12)
        scores = (patterns * (patch - patch.mean())).sum((1, 2))
        assert int(scores.argmax()) == int(label), planted.labels[int(label)]


def test_a_folder_of_videos_is_a_background(tmp_path) -> None:
    pytest.importorskip("av")
    frames = real_footage(20, 230, soft=2.0).numpy()
    for name, part in (("b.mp4", frames), ("a.mp4", frames[::-1].copy())):
        io.write_video(tmp_path / name, part, fps=10, crf=1)
    (tmp_path / "notes.txt").write_text("no video")
    planted = PlantedClips(0, 4, background=tmp_path)
    read = [io.read_video(tmp_path / name).frames for name in ("a.mp4", "b.mp4")]
    listed = PlantedClips(0, 4, background=read)
    assert planted.described() == listed.described() and torch.equal(planted[:4][0], listed[:4][0])
    with pytest.raises(ValueError, match="no video in"):
        PlantedClips(0, 4, background=tmp_path / "..")
    with pytest.raises(ValueError, match="no such folder"):
        PlantedClips(0, 4, background=str(tmp_path / "missing"))
