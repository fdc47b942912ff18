"""Sources of clips of a comparison: planted clips, joined clips, a folder of videos with tables, any iterable."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from covering import in_one_case

from captum_staa import VideoClassifier, io
from captum_staa.benchmark import JoinedClips, PlantedClips, Videos, compare
from captum_staa.benchmark.clips import checked, described, each, share, source_of
from captum_staa.metrics import class_discrimination, evidence_against_rivals

PLANTED = PlantedClips(seed=12, n=6)
FACTOR, MARGIN = 4, 24  # by which planted frames grow in a file; columns beside them, which the center crop cuts off


def loaded(source, classifier) -> list:
    return [load() for _, _, load in each(source_of(source, classifier), classifier, 0, 1)]


def test_planted_clips_have_the_layout_of_the_classifier(cnn):
    samples = loaded(PLANTED, cnn)
    clips, labels, truth = PLANTED[:6]
    assert torch.equal(torch.cat([sample.clip for sample in samples]), clips.transpose(1, 2))
    assert [sample.target for sample in samples] == labels.tolist()
    assert torch.equal(torch.cat([sample.truth for sample in samples]), truth)
    assert all(sample.clip.is_contiguous() for sample in samples)


@in_one_case()
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_clip_is_in_the_share_of_exactly_one_process(clf, world):
    for make in (lambda: source_of(PLANTED, clf), lambda: iter([PLANTED[i] for i in range(6)])):
        found = [(index, name) for rank in range(world) for index, name, _ in each(make(), clf, rank, world)]
        assert sorted(index for index, _ in found) == list(range(6))
        assert len({name for _, name in found}) == 6
    assert sum(share(PLANTED, rank, world) for rank in range(world)) == 6
    assert share(iter([]), 0, world) is None


def test_clips_of_a_sequence_are_loaded_lazily(clf):
    seen = []

    class Watched:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int):
            seen.append(index)
            return PLANTED[index]

    loads = [load for _, _, load in each(source_of(Watched(), clf), clf, 1, 2)]
    assert seen == []
    assert torch.equal(loads[1]().clip[0], PLANTED[3][0]) and seen == [3]


def test_iterables_may_hold_labels_or_indices_and_omit_the_batch_axis(clf):
    clip, label, truth = PLANTED[0]
    forms = [(clip, label), [clip[None], clf.labels[int(label)].upper(), truth[None]], (clip, int(label), None)]
    samples = loaded(iter(forms), clf)
    assert {sample.target for sample in samples} == {int(label)}
    assert all(torch.equal(sample.clip, clip[None]) for sample in samples)
    assert torch.equal(samples[1].truth, truth[None]) and samples[0].truth is samples[2].truth is None


CLIP, LABEL, TRUTH = PLANTED[0]


@in_one_case()
@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (CLIP, TypeError, "got Tensor"),
        ((CLIP,), TypeError, "got tuple of 1"),
        ((CLIP, 0, TRUTH, ~TRUTH, TRUTH[None], None), TypeError, "got tuple of 6"),
        ((CLIP[None].expand(2, -1, -1, -1, -1), 0), ValueError, r"batch size of 1, got shape \(2, 16"),
        ((CLIP, "sideways"), ValueError, "no label 'sideways'"),
        ((CLIP, 4), ValueError, "class index must be .*, got 4"),
        ((CLIP, 0, TRUTH.float()), ValueError, "float32 of shape"),
        ((CLIP, 0, TRUTH[:8]), ValueError, r"\(1, 16, 48, 48\)"),
        ((CLIP, 0, TRUTH.numpy()), TypeError, "truth must be a bool tensor or None, got ndarray"),
        ((CLIP, 0, TRUTH, TRUTH[:, :9]), ValueError, r"rivals must be bool \(1, T, H, W\)"),
        ((CLIP, 0, TRUTH, TRUTH), ValueError, r"truth and rivals must not overlap, got \d+ voxels"),
        ((CLIP, 0, TRUTH, None, TRUTH), ValueError, r"objects must be bool \(1, K, T, H, W\)"),
        ((CLIP / 0, 0), ValueError, "nan or infinite"),
    ],
)
def test_invalid_items_raise(clf, item, error, message):
    with pytest.raises(error, match=message):
        checked(item, clf)


@in_one_case()
@pytest.mark.parametrize(
    ("clips", "error"), [([], ValueError), ("folder", TypeError), (CLIP, TypeError), (3, TypeError)]
)
def test_invalid_sources_raise(clf, clips, error):
    with pytest.raises(error):
        source_of(clips, clf)


def test_names_are_checked_before_the_first_clip_is_loaded(clf):
    class Named(list):
        names = ("a", "b", "a")

    with pytest.raises(ValueError, match=r"more than once: \['a'\]"):
        compare(clf, Named([PLANTED[i] for i in range(3)]), ["STAA"], show_progress=False)
    with pytest.raises(ValueError, match=r"one name .* got 3 names"):
        source_of(Named([PLANTED[0]]), clf)


def test_clips_joined_in_time_hold_half_of_each_clip_and_truth_marks_the_target(clf):
    pairs = JoinedClips(PLANTED, clf, n=20, seed=3)
    clips, labels, _ = PLANTED[:6]
    firsts = 0
    for index in range(20):
        clip, target, truth = pairs[index]
        own = index % 6
        when = truth[0, :, 0, 0]
        assert target == int(labels[own])
        assert (truth == when[None, :, None, None]).all() and int(when.sum()) == 8
        assert torch.equal(clip[0, when], clips[own, 1::2])  # every second of its frames, in order
        others = [at for at in range(6) if torch.equal(clip[0, ~when], clips[at, 1::2])]
        assert len(others) == 1 and labels[others[0]] != target
        classes = torch.where(truth, target, int(labels[others[0]]))
        assert torch.equal(pairs.rivals(index), ~truth) and torch.equal(pairs.classes(index), classes)
        firsts += bool(when[0])
    assert 2 < firsts < 18


def test_clips_joined_in_a_grid_are_four_small_clips_and_truth_marks_the_target(clf):
    grids = JoinedClips(PLANTED, clf, n=12, seed=3, arrangement="grid")
    clips, labels, _ = PLANTED[:6]
    small = torch.nn.functional.avg_pool2d(clips.flatten(0, 1), 2).view(6, 16, 3, 24, 24)
    places = []
    for index in range(12):
        clip, target, truth = grids[index]
        assert clip.shape == (1, 16, 3, 48, 48) and clip.is_contiguous()
        assert truth.shape == (1, 16, 48, 48) and truth.dtype == torch.bool
        shown, expected = [], torch.zeros_like(truth)
        for y in (0, 24):
            for x in (0, 24):
                quarter = clip[0, ..., y : y + 24, x : x + 24]
                (at,) = (at for at in range(6) if torch.allclose(quarter, small[at], rtol=0, atol=1e-6))
                assert (grids.classes(index)[..., y : y + 24, x : x + 24] == labels[at]).all()
                shown.append(at)
                expected[..., y : y + 24, x : x + 24] = at == index % 6
        assert target == int(labels[index % 6]) and shown.count(index % 6) == 1
        assert sorted(int(labels[at]) == target for at in shown) == [False, False, False, True]
        assert len(set(shown)) == 4  # where there are enough clips of other classes, none is shown twice
        assert torch.equal(truth, expected) and torch.equal(grids.rivals(index), ~expected)
        places.append(shown.index(index % 6))
    assert set(places) == {0, 1, 2, 3}


@pytest.mark.parametrize("arrangement", ["time", "grid"])
def test_joined_clips_depend_on_seed_and_index_only(clf, cnn, arrangement):
    def made(classifier=clf, n=20, seed=3):
        return JoinedClips(PLANTED, classifier, n=n, seed=seed, arrangement=arrangement)

    items = made()
    assert torch.equal(made()[7][0], items[7][0])
    assert any(not torch.equal(made(seed=4)[i][0], items[i][0]) for i in range(4))
    fewer = made(n=8)  # how many there are changes none of them
    assert all(torch.equal(fewer[i][0], items[i][0]) for i in (0, 5, 7))
    volume = made(cnn)[7]
    assert torch.equal(volume[0].transpose(1, 2), items[7][0]) and torch.equal(volume[2], items[7][2])
    assert len(items) == 20 and torch.equal(items[-1][0], items[19][0]) and len(set(items.names)) == 20
    with pytest.raises(IndexError):
        items[20]


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(0, [(0, 4), (1, 0), (4, 2), (5, 3), (4, 2), (5, 3)]), (3, [(4, 0), (1, 3), (4, 2), (3, 2), (4, 0), (5, 3)])],
)
def test_items_joined_in_time_equal_those_of_the_first_version(seed, expected):
    """The choice of the other clip, and the order of the two."""
    labels = (0, 1, 0, 2, 1, 0)
    clips = [(torch.full((2, 3, 2, 2), float(at)), label) for at, label in enumerate(labels)]
    pairs = JoinedClips(clips, VideoClassifier(torch.nn.Identity(), "BTCHW"), seed=seed)
    assert [tuple(pairs[i][0][0, :, 0, 0, 0].int().tolist()) for i in range(6)] == expected


def test_a_grid_of_few_clips_repeats_those_of_other_classes():
    classifier = VideoClassifier(torch.nn.Identity(), "BCTHW")
    clips = [(torch.full((3, 1, 4, 6), float(label)), label) for label in (0, 1)]
    clip, target, truth = JoinedClips(clips, classifier, arrangement="grid")[1]
    assert target == 1 and clip.shape == (1, 3, 1, 4, 6)
    assert torch.equal(clip[:, 0], truth.float()) and truth.float().mean() == 0.25


def test_a_grid_averages_2_by_2_pixels():
    classifier = VideoClassifier(torch.nn.Identity(), "BTCHW")
    ramp = torch.arange(24.0).reshape(1, 1, 4, 6)
    clip, _, truth = JoinedClips([(ramp, 0), (-ramp, 1)], classifier, arrangement="grid")[0]
    assert clip[0, 0, 0][truth[0, 0]].tolist() == [3.5, 5.5, 7.5, 15.5, 17.5, 19.5]


def test_joined_clips_raise_for_clips_that_cannot_be_joined(clf):
    one_class = [PLANTED[i] for i in range(6) if int(PLANTED[i][1]) == 0]
    volumes = VideoClassifier(torch.nn.Identity(), "BCTHW")
    for arrangement in ("time", "grid"):
        with pytest.raises(ValueError, match=r"at least two classes, got .* all of class 0\. Add clips"):
            JoinedClips(one_class, clf, arrangement=arrangement)[0]
        unequal = [(torch.rand(3, 4, 8, 8 + 2 * label), label) for label in (0, 1)]
        with pytest.raises(ValueError, match=r"got shapes \(1, 3, 4, 8, 10\) and \(1, 3, 4, 8, 8\) in layout BCTHW"):
            JoinedClips(unequal, volumes, arrangement=arrangement)[1]
    with pytest.raises(TypeError, match=r"must be a sequence.* got list_iterator. Pass list\(clips\)"):
        JoinedClips(iter(one_class), clf)
    with pytest.raises(ValueError, match="n must be an integer"):
        JoinedClips(PLANTED, clf, n=0)
    for seed, error in ((1.5, TypeError), ("1", TypeError), (2**63, ValueError)):
        with pytest.raises(error, match="seed must be an integer"):
            JoinedClips(PLANTED, clf, seed=seed)
    with pytest.raises(ValueError, match="arrangement must be one of 'time', 'grid', got 'space'"):
        JoinedClips(PLANTED, clf, arrangement="space")
    assert JoinedClips(PLANTED, clf, seed=-1)[0][0].shape == PLANTED[:1][0].shape
    flat = [(torch.rand(3, 1, 8, 8), label) for label in (0, 1)]
    with pytest.raises(ValueError, match=r"at least 2 frames .* \(1, 3, 1, 8, 8\) .* Use arrangement='grid'"):
        JoinedClips(flat, volumes)[1]
    assert JoinedClips(flat, volumes, arrangement="grid")[1][0].shape == (1, 3, 1, 8, 8)
    longer = [(torch.rand(3, 4 + label, 8, 8), label) for label in (0, 1)]
    assert JoinedClips(longer, volumes)[1][0].shape == (1, 3, 5, 8, 8)  # each gives half of the target's frames
    with pytest.raises(ValueError, match="agree in the axes C, T, H, W"):
        JoinedClips(longer, volumes, arrangement="grid")[1]
    for size in ((7, 8), (8, 7)):
        odd = [(torch.rand(3, 4, *size), label) for label in (0, 1)]
        with pytest.raises(ValueError, match=f"must be even .* got {size[0]} x {size[1]} .* Crop or resize the clips"):
            JoinedClips(odd, volumes, arrangement="grid")[0]
        assert JoinedClips(odd, volumes)[0][0].shape == (1, 3, 4, *size)


def test_occlusion_finds_the_target_in_clips_joined_in_time(cnn):
    """The pattern of the other class is not evidence: covering it lowers another output than the target's."""
    wanted = ["auroc_time", "temporal_pointing"]
    pairs = JoinedClips(PLANTED, cnn)
    means = compare(cnn, pairs, ["VideoFeatureAblation (frames)"], wanted, show_progress=False).means()
    found = means["VideoFeatureAblation (frames)"]
    assert found["temporal_pointing"].value > 0.7 and found["auroc_time"].value > 0.7
    assert means["uniform"]["auroc_time"].value == 0.5


class Colors(torch.nn.Module):
    """Model whose logits are the means of the channels."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.mean((1, 3, 4))  # (B, T, C, H, W) to (B, C)


def test_joined_clips_distinguish_class_maps_from_contrast_detectors():
    classifier = VideoClassifier(Colors(), "BTCHW")
    noise = torch.rand(8, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 10
    clips = [(torch.eye(3)[at % 3][:, None, None] + noise[at], at % 3) for at in range(8)]
    for arrangement, axis in (("time", "time"), ("grid", "space")):
        joined, detected = JoinedClips(clips, classifier, arrangement=arrangement), []
        for index in range(8):
            clip, target, truth = joined[index]
            rivals, classes = joined.rivals(index), joined.classes(index)
            maps = [clip[:, :, k] for k in range(3)]  # what each pixel adds to logit k
            for compared in (axis, "joint"):
                assert evidence_against_rivals(maps[target], truth, rivals, compared).item() == 1
            other = int(classes[rivals][0])
            pair = truth, classes == other
            assert class_discrimination(maps[target], maps[other], *pair).item() == 1
            contrast = clip.abs().sum(2)
            assert class_discrimination(contrast, contrast, *pair).item() == 0.5
            detected.append(evidence_against_rivals(contrast, truth, rivals).item())
        assert np.mean(detected) == pytest.approx(0.5, abs=0.1), arrangement


def test_described_contains_all_settings_of_the_clips(clf):
    first, other = (described(source_of(PlantedClips(seed, 6), clf)) for seed in (12, 13))
    assert first != other and first == described(source_of(PLANTED, clf))
    made = [JoinedClips(PLANTED, clf), JoinedClips(PLANTED, clf, seed=1), JoinedClips(PLANTED, clf, arrangement="grid")]
    assert len({str(described(joined)) for joined in made}) == 3
    assert described(iter([])) == {"iterable": "list_iterator"}
    assert described([1, 2]) != described([1, 2, 3])


# --- videos ------------------------------------------------------------------------------------------------------

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two planted clips in wider frames in a subfolder, with tables of labels and of boxes around the truth."""
    root = tmp_path_factory.mktemp("set")
    (root / "sub").mkdir()
    labels, boxes = ["name,label,comment"], ["name,frame,x0,y0,x1,y1"]
    for index in (0, 1):
        frames = PLANTED.frames(index).repeat(FACTOR, axis=1).repeat(FACTOR, axis=2)
        frames = np.pad(frames, ((0, 0), (0, 0), (MARGIN, MARGIN), (0, 0)))
        name = f"sub/{index}.mp4"
        io.write_video(root / name, frames, 8, crf=4)
        _, label, truth = PLANTED[index]
        labels.append(f"{name},{PLANTED.labels[int(label)].capitalize()},x")
        for frame in range(16):
            for y, x in truth[frame].nonzero().tolist():  # a box per pixel: evidence may wrap around the border
                left, top = MARGIN + FACTOR * x, FACTOR * y
                boxes.append(f"{name},{frame},{left},{top},{left + FACTOR},{top + FACTOR}")
    (root / "labels.csv").write_text("\ufeff" + "\n".join(labels) + "\n", encoding="utf-8")
    (root / "boxes.csv").write_text("\n".join(boxes) + "\n", encoding="utf-8")
    return root


def test_videos_with_boxes_are_the_clips_that_were_written(clf, folder):
    videos = Videos(folder, folder / "labels.csv", clf, boxes=folder / "boxes.csv")
    assert videos.names == ["sub/0.mp4", "sub/1.mp4"]
    for sample, index in zip(loaded(videos, clf), (0, 1), strict=True):
        clip, label, truth = PLANTED[index]
        assert sample.target == int(label)
        assert torch.equal(sample.truth[0], truth)  # through the file's pixels, the resize and the crop
        assert (sample.clip[0] - clip).abs().mean() < 0.1  # the codec takes some color away
    without = Videos(folder, folder / "labels.csv", clf)
    assert without[0][2] is None and described(without) != described(videos)


def test_boxes_are_cut_at_the_crop_and_frames_without_boxes_have_no_truth(clf, folder, tmp_path):
    tables = tmp_path / "boxes.csv"
    tables.write_text(
        "name,frame,x0,y0,x1,y1\n"
        f"sub/0.mp4,2,0,0,{MARGIN + 8},8\n"  # reaches in from the left margin
        f"sub/0.mp4,2,{MARGIN + 12.1},0,{MARGIN + 13.2},4\n"  # less than a pixel, around no center
        f"sub/0.mp4,3,0,0,{MARGIN},{MARGIN}\n"  # all outside
        "sub/0.mp4,4,-50,-50,900,900\n"  # all
    )
    videos = Videos(folder, folder / "labels.csv", clf, boxes=tables)
    truth = videos[0][2][0]
    assert [int(frame.sum()) for frame in truth] == [0, 0, 4, 0, 48 * 48, *[0] * 11]
    assert truth[2, :2, :2].all()
    assert videos[1][2] is None


def test_an_unreadable_video_is_one_error_row(clf, folder, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    (tmp_path / "good.mp4").write_bytes((folder / "sub/0.mp4").read_bytes())
    (tmp_path / "labels.csv").write_text("name,label\nbad.mp4,0\ngood.mp4,1\n")
    found = compare(clf, Videos(tmp_path, tmp_path / "labels.csv", clf), ["STAA"], ["sparsity"], show_progress=False)
    (lost,) = found.failures
    assert lost[:3] == ("bad.mp4", "*", "error") and "no video" in lost.reason
    assert {row.clip for row in found.rows if not row.reason} == {"good.mp4"}


@in_one_case()
@pytest.mark.parametrize(
    ("labels", "boxes", "error", "message"),
    [
        ("name,label\nsub/0.mp4,sideways\n", None, ValueError, "line 2: there is no label 'sideways'"),
        ("name,label\nsub/0.mp4,7\n", None, ValueError, "line 2: class index must be from 0 to 2, got 7"),
        ("name,label\nsub/0.mp4,0\nsub/0.mp4,1\n", None, ValueError, r"more than once: \['sub/0.mp4'\]"),
        ("name,label\nno.mp4,0\nsub/0.mp4,1\n", None, FileNotFoundError, r"1 of 2 names .* \['no.mp4'\]"),
        ("file,label\nsub/0.mp4,0\n", None, ValueError, r"must have the columns name, label, got \['file'"),
        ("name,label\n", None, ValueError, "at least one row"),
        ("", None, ValueError, "must have the columns"),
        ("name,label\nsub/0.mp4\n", None, ValueError, "line 2: the columns name, label must not be empty"),
        (None, None, FileNotFoundError, "existing CSV file, got .*labels.csv"),
        ("name,label\nsub/0.mp4,0\n", "name,frame,x0,y0,x1\n", ValueError, "y1"),
        ("name,label\nsub/0.mp4,0\n", "name,frame,x0,y0,x1,y1\nx.mp4,0,0,0,1,1\n", ValueError, "line 2: .*got 'x.mp4'"),
        ("name,label\nsub/0.mp4,0\n", "name,frame,x0,y0,x1,y1\nsub/0.mp4,0,5,0,1,1\n", ValueError, "x0 < x1"),
        ("name,label\nsub/0.mp4,0\n", "name,frame,x0,y0,x1,y1\nsub/0.mp4,one,0,0,1,1\n", ValueError, "line 2"),
        ("name,label\nsub/0.mp4,0\n", "name,frame,x0,y0,x1,y1\nsub/0.mp4,0,nan,0,1,1\n", ValueError, "x0 < x1"),
        ("name,label\nsub/0.mp4,0\n", "name,frame,x0,y0,x1,y1\nsub/0.mp4,0,0,0,inf,1\n", ValueError, "all finite"),
        ("name,label\nsub/0.mp4,0\n", "name,frame,x0,y0,x1,y1\nsub/0.mp4,0,0,-inf,1,1\n", ValueError, "all finite"),
    ],
)
def test_invalid_tables_raise(clf, folder, tmp_path, labels, boxes, error, message):
    for name, text in (("labels.csv", labels), ("boxes.csv", boxes)):
        (tmp_path / name).unlink(missing_ok=True)
        if text is not None:
            (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        Videos(folder, tmp_path / "labels.csv", clf, boxes=None if boxes is None else tmp_path / "boxes.csv")
