"""Preprocessing: equal to the processors of transformers, and the region of the frame that the model sees."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from covering import in_one_case
from PIL import Image

from captum_staa.models.preprocessing import Preprocessing

transformers = pytest.importorskip("transformers")

SIZES = [(60, 81), (81, 60), (64, 64), (37, 120), (20, 18), (48, 49)]
VIDEOMAE = {
    "image_processor_type": "VideoMAEImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 48},
    "resample": 2,
    "do_center_crop": True,
    "crop_size": {"height": 48, "width": 48},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
VIVIT = {
    **VIDEOMAE,
    "image_processor_type": "VivitImageProcessor",
    "size": {"shortest_edge": 56},
    "rescale_factor": 1 / 127.5,
    "offset": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def make_frames(height: int, width: int, count: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def theirs(config: dict, frames: np.ndarray) -> torch.Tensor:
    """Return the clip of the Pillow processor of transformers."""
    name = config["image_processor_type"]
    processor_class = getattr(transformers, name + "Pil", None) or getattr(transformers, name)
    processor = processor_class(**{key: value for key, value in config.items() if key != "image_processor_type"})
    out = processor([Image.fromarray(frame) for frame in frames], return_tensors="np")["pixel_values"]
    return torch.from_numpy(np.asarray(out))


@in_one_case()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "config",
    [
        VIDEOMAE,
        VIVIT,
        {**VIDEOMAE, "size": {"height": 40, "width": 52}},  # the crop pads one axis and crops the other
        {**VIDEOMAE, "size": {"shortest_edge": 31}},  # an odd margin at both edges of the crop
        {**VIDEOMAE, "resample": 3, "do_normalize": False},
        {**VIDEOMAE, "resample": 0, "do_center_crop": False, "size": {"height": 40, "width": 52}},
        {**VIDEOMAE, "do_resize": False, "do_rescale": False},
        {**VIVIT, "offset": False},
        {**VIVIT, "do_normalize": False},
    ],
    ids=["videomae", "vivit", "pad", "odd", "bicubic", "nearest", "unscaled", "no-offset", "unnormalized"],
)
def test_preprocessing_equals_transformers(config: dict, size: tuple[int, int]) -> None:
    frames = make_frames(*size)
    expected = theirs(config, frames)
    clip = Preprocessing.from_config(config)(frames)
    assert clip.shape == expected.shape and clip.dtype == torch.float32
    torch.testing.assert_close(clip, expected, atol=1e-6, rtol=0)


def test_defaults_equal_those_of_the_processor() -> None:
    frames = make_frames(250, 300, count=1)
    for name in ("VideoMAEImageProcessor", "VivitImageProcessor"):
        config = {"image_processor_type": name}
        torch.testing.assert_close(Preprocessing.from_config(config)(frames), theirs(config, frames), atol=1e-6, rtol=0)


def test_vivit_rescales_subtracts_one_and_normalizes() -> None:
    frames = np.full((1, 8, 8, 3), 200, np.uint8)
    config = {"rescale_factor": 1 / 127.5, "offset": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    assert Preprocessing.from_config(config)(frames).unique().item() == pytest.approx(
        ((200 / 127.5 - 1) - 0.5) / 0.25, abs=1e-6
    )


def test_vjepa2_derives_its_size_from_the_crop() -> None:
    config = {"video_processor_type": "VJEPA2VideoProcessor", "size": {"shortest_edge": 1}, "crop_size": 256}
    assert Preprocessing.from_config(config).resize == 292
    assert Preprocessing.from_config({**config, "crop_size": {"height": 384, "width": 384}}).resize == 438
    default = Preprocessing.from_config({"video_processor_type": "VJEPA2VideoProcessor"})
    assert (default.resize, default.crop, default.mean) == (292, (256, 256), (0.485, 0.456, 0.406))


def test_unknown_processors_have_no_defaults() -> None:
    assert Preprocessing.from_config({"image_mean": None}) == Preprocessing()
    assert Preprocessing.from_config({"size": 32}).resize == 32
    assert Preprocessing.from_config({"size": {"shortest_edge": 32, "height": None}}).resize == 32
    assert Preprocessing.from_config({"image_mean": 0.5, "image_std": 0.25}).std == (0.25, 0.25, 0.25)


def test_flip_channels_returns_bgr() -> None:
    frames = make_frames(8, 8)
    plain = Preprocessing.from_config({})(frames)
    assert torch.equal(Preprocessing.from_config({"do_flip_channel_order": True})(frames), plain.flip(2))


def test_tensors_views_and_arrays_give_equal_clips() -> None:
    frames, preprocessing = make_frames(30, 40, count=6), Preprocessing.from_config(VIDEOMAE)
    expected = preprocessing(np.ascontiguousarray(frames[::2, ::-1]))
    assert torch.equal(preprocessing(frames[::2, ::-1]), expected)
    assert torch.equal(preprocessing(torch.from_numpy(frames)[::2].flip(1)), expected)
    assert expected.is_contiguous()


WRITTEN = [
    Preprocessing(),
    Preprocessing(resize=31, crop=(24, 20), resample=3, factor=0.1, mean=(0.1, 0.2, 1 / 3), std=(0.5, 0.6, 0.7)),
    Preprocessing(resize=(40, 52), factor=1 / 127.5, offset=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    Preprocessing(crop=(16, 24), resample=0, factor=None, flip_channels=True),
]


@in_one_case()
@pytest.mark.parametrize("steps", WRITTEN, ids=range(len(WRITTEN)))
def test_to_config_and_from_folder_are_inverse(steps: Preprocessing, tmp_path) -> None:
    write(tmp_path, "preprocessor_config.json", steps.to_config())
    assert Preprocessing.from_folder(tmp_path) == steps


@pytest.mark.parametrize("steps", [steps for steps in WRITTEN if not steps.flip_channels], ids=range(3))
def test_transformers_reads_the_written_config(steps: Preprocessing) -> None:
    """VivitImageProcessor has all steps except for the flip of channels."""
    frames = make_frames(60, 81)
    config = {"image_processor_type": "VivitImageProcessor", **steps.to_config()}
    torch.testing.assert_close(theirs(config, frames), steps(frames), atol=1e-6, rtol=0)


def test_an_offset_without_factor_is_written_as_factor_one() -> None:
    steps, frames = Preprocessing(factor=None, offset=True), make_frames(8, 8)
    assert torch.equal(Preprocessing.from_config(steps.to_config())(frames), steps(frames))


def write(folder, name: str, config: dict) -> None:
    (folder / name).write_text(json.dumps(config))


def test_video_processor_files_have_precedence_over_image_files(tmp_path) -> None:
    write(tmp_path, "preprocessor_config.json", {"size": 10})
    assert Preprocessing.from_folder(tmp_path).resize == 10
    write(tmp_path, "processor_config.json", {"processor_class": "X", "image_processor": {"size": 20}})
    assert Preprocessing.from_folder(tmp_path).resize == 20
    write(tmp_path, "video_preprocessor_config.json", {"size": 30})
    assert Preprocessing.from_folder(tmp_path).resize == 30
    write(tmp_path, "processor_config.json", {"video_processor": {"size": 40}, "image_processor": {"size": 20}})
    assert Preprocessing.from_folder(tmp_path).resize == 40


def test_from_folder_errors_name_the_files(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"must contain one of processor_config.json, video_pre"):
        Preprocessing.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="must contain a JSON object"):
        Preprocessing.from_folder(tmp_path)


@in_one_case()
@pytest.mark.parametrize("size", [(120, 160), (160, 120), (90, 90), (61, 203)])
@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(resize=64, crop=(56, 56), factor=None),
        Preprocessing(resize=(50, 70), crop=(41, 60), factor=None),
        Preprocessing(crop=(48, 52), factor=None),
        Preprocessing(resize=40, factor=None),
        Preprocessing(resize=40, crop=(48, 64), factor=None),  # black borders: the box extends beyond the frame
    ],
    ids=["shortest", "exact", "crop-only", "resize-only", "padded"],
)
def test_crop_box_locates_a_white_square(preprocessing: Preprocessing, size: tuple[int, int]) -> None:
    height, width = size
    row, column, edge = height // 2 - 9, width // 2 + 3, 12
    frames = np.zeros((1, height, width, 3), np.uint8)
    frames[:, row : row + edge, column : column + edge] = 255
    bright = preprocessing(frames)[0, 0, 0]  # (H', W')
    top, left, box_height, box_width = preprocessing.crop_box(height, width)
    down, right = bright.shape[0] / box_height, bright.shape[1] / box_width
    weight = bright / bright.sum()
    center = (
        float((weight.sum(1) * (torch.arange(bright.shape[0]) + 0.5)).sum()),
        float((weight.sum(0) * (torch.arange(bright.shape[1]) + 0.5)).sum()),
    )
    expected = ((row + edge / 2 - top) * down, (column + edge / 2 - left) * right)
    assert center == pytest.approx(expected, abs=0.06)
    assert float(bright.sum() / 255) == pytest.approx(edge * down * edge * right, rel=0.03)


def test_crop_box_of_a_padded_crop_extends_beyond_the_frame() -> None:
    assert Preprocessing(crop=(20, 10)).crop_box(10, 20) == (-5.0, 5.0, 20.0, 10.0)


@in_one_case()
@pytest.mark.parametrize(
    ("frames", "error", "text"),
    [
        ([[1]], TypeError, "got list"),
        (np.zeros((2, 8, 8, 3), np.float32), TypeError, r"float32 of shape \(2, 8, 8, 3\).*255"),
        (np.zeros((2, 3, 8, 8), np.uint8), ValueError, r"got shape \(2, 3, 8, 8\)"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"\(T, H, W, 3\), got shape \(8, 8, 3\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, r"\(0, 8, 8, 3\)"),
    ],
)
def test_invalid_frames_are_rejected(frames, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Preprocessing()(frames)


@in_one_case()
@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"size": {"longest_edge": 5}}, "longest_edge.*preprocessing=Preprocessing"),
        ({"crop_size": {"shortest_edge": 5}}, "crop_size"),
        ({"do_resize": True}, "do_resize is true without size"),
        ({"size": 0}, "1 pixel or more"),
        ({"resample": 9}, "filters 0..5"),
        ({"image_mean": [0.5, 0.5], "image_std": [1, 1]}, "three numbers"),
        ({"image_mean": 0.5, "image_std": 0}, "must not contain 0"),
        ({"image_mean": 0.5}, "image_std"),
    ],
)
def test_invalid_configs_are_rejected(config: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Preprocessing.from_config(config)
