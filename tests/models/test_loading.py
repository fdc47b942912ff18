"""VideoClassifier with every Hugging Face family, and loading of bundled models, folders and cached hub models."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from captum.metrics import sensitivity_max
from covering import in_one_case
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from captum_staa.models import VideoLanguageModel, resnet3d
from captum_staa.models.classifier import VideoClassifier
from captum_staa.models.labels import in_order
from captum_staa.models.loading import bundled_folder, bundled_names, notice_in
from captum_staa.models.preprocessing import Preprocessing, published

transformers = pytest.importorskip("transformers")

FRAMES, SIZE, CLASSES = 4, 16, 3
# Captum warns if a gradient method gets a tensor without requires_grad
pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
LABELS = {0: "Waving", 1: "Jumping jacks", 2: "running"}
COMMON: dict[str, Any] = {"id2label": LABELS, "num_attention_heads": 2, "hidden_size": 24}
SMALL: dict[str, Any] = {"image_size": SIZE, "num_frames": FRAMES, "num_hidden_layers": 2, "intermediate_size": 16}
PREDICTOR = {"pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}
VJEPA = {"crop_size": SIZE, "patch_size": 8, "frames_per_clip": FRAMES, "tubelet_size": 2, "num_hidden_layers": 2}
PRISM = {"tubelet_size": [1, 8, 8], "num_spatial_layers": 2, "num_temporal_layers": 1}
MAKERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "videomae": ("VideoMAEConfig", "VideoMAEForVideoClassification", {**SMALL, "patch_size": 8}),
    "timesformer": ("TimesformerConfig", "TimesformerForVideoClassification", {**SMALL, "patch_size": 8}),
    "vivit": ("VivitConfig", "VivitForVideoClassification", {**SMALL, "tubelet_size": [2, 8, 8]}),
    "vjepa2": (
        "VJEPA2Config",
        "VJEPA2ForVideoClassification",
        {**VJEPA, **PREDICTOR, "num_pooler_layers": 1, "pred_num_mask_tokens": 2},
    ),
    "videoprism": ("VideoPrismVisionConfig", "VideoPrismForVideoClassification", {**SMALL, **PRISM}),
}
GRIDS = {"timesformer": (4, 2, 2), "videoprism": (4, 2, 2)}
families = pytest.mark.parametrize("name", [name for name in MAKERS if hasattr(transformers, MAKERS[name][1])])


def build(name: str) -> nn.Module:
    config_class, model_class, options = MAKERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**COMMON, **options})
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():  # the outputs of a random head are nearly constant and would hide a wrong input
        model.classifier.weight.normal_()
    return model


def save(name: str, folder: Path, **processor: Any) -> nn.Module:
    model = build(name)
    model.save_pretrained(folder)
    config = {"size": {"shortest_edge": 20}, "crop_size": SIZE, "image_mean": 0.5, "image_std": 0.25, **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return model


def clip_of(batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(batch, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drop(folder: Path, part: str) -> None:
    """Remove the weights with ``part`` in their name from a saved model."""
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if part not in key}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def raw_logits(model: nn.Module, clip: Tensor) -> Tensor:
    with torch.no_grad():
        return model(clip).logits.reshape(len(clip), CLASSES)  # VideoPrism returns (B, 1, K)


# ---------------------------------------------------------------- Hugging Face families, from a folder


@families
def test_a_loaded_model_equals_the_original(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path)
    clf = VideoClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(clf(clip_of()), raw_logits(model, clip_of()), atol=1e-6, rtol=1e-6)
    assert clf.labels == list(LABELS.values())
    assert (clf.layout.axes, clf.num_frames, clf.image_size) == ("BTCHW", FRAMES, (SIZE, SIZE))
    assert clf.grid is not None and clf.grid.shape == GRIDS.get(name, (2, 2, 2))
    assert clf.family is not None and clf.family.name == name
    assert not any(module.training for module in clf.modules())
    assert {p.dtype for p in clf.parameters()} == {torch.float32}


@families
def test_gradients_are_contiguous_and_equal_the_original(name: str) -> None:
    model = build(name)
    clf = VideoClassifier(model)
    channels_last = clip_of().contiguous(memory_format=torch.channels_last_3d)
    for clip in (clip_of(), clip_of().transpose(3, 4), channels_last):
        expected = torch.autograd.grad(model(leaf := clip.clone().requires_grad_()).logits[..., 1].sum(), leaf)[0]
        gradient = torch.autograd.grad(clf(leaf := clip.detach().requires_grad_())[:, 1].sum(), leaf)[0]
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


@families
def test_sensitivity_of_saliency_equals_a_loop(name: str) -> None:
    clf, clip = VideoClassifier(build(name)), clip_of(1)
    saliency, radius, samples = Saliency(clf), 0.05, 3
    noises = [
        torch.empty_like(clip).uniform_(-radius, radius, generator=torch.Generator().manual_seed(i))
        for i in range(samples)
    ]
    queue = iter(noises)

    def perturb(inputs: Tensor, perturb_radius: float) -> Tensor:
        return inputs + next(queue)

    result = sensitivity_max(
        saliency.attribute,
        clip,
        perturb,
        perturb_radius=radius,
        n_perturb_samples=samples,
        target=1,
        max_examples_per_batch=1,
    )
    plain = saliency.attribute(clip, target=1)
    slow = max(float((saliency.attribute(clip + noise, target=1) - plain).norm() / plain.norm()) for noise in noises)
    assert slow > 0
    assert result.item() == pytest.approx(slow, rel=1e-4)


@families
def test_another_layout_is_converted(name: str) -> None:
    model = build(name)
    clf = VideoClassifier(model, layout="BCTHW")
    torch.testing.assert_close(clf(clip_of().transpose(1, 2)), raw_logits(model, clip_of()), atol=1e-6, rtol=1e-6)
    clf.preprocessing = Preprocessing(crop=(SIZE, SIZE))
    assert clf.preprocess(np.zeros((FRAMES, 20, 24, 3), np.uint8)).shape == (1, 3, FRAMES, SIZE, SIZE)


@families
def test_logits_and_gradients_have_the_right_dtype(name: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    single = VideoClassifier.from_pretrained(tmp_path)
    expected = single(clip_of()).detach()
    for dtype, tolerance in ((torch.float64, 1e-4), (torch.bfloat16, 0.15)):
        clf = VideoClassifier.from_pretrained(tmp_path, dtype=dtype)
        for clip in (clip_of(), clip_of(dtype=torch.float64)):
            logits = clf(clip)
            assert logits.dtype == dtype
            assert (logits.float() - expected).abs().max() < tolerance * expected.abs().max()
        leaf = clip_of().requires_grad_()
        gradient = torch.autograd.grad(clf(leaf)[:, 0].sum(), leaf)[0]
        assert gradient.dtype == torch.float32 and gradient.is_contiguous()
    torch.testing.assert_close(single.to(torch.float64)(clip_of()).float(), expected, atol=1e-4, rtol=1e-4)


@families
def test_invalid_clips_are_rejected(name: str) -> None:
    clf = VideoClassifier(build(name))
    with pytest.raises(
        ValueError, match=r"must have 4 frames, got 2 .*\(1, 2, 3, 16, 16\).*read_video\(\.\.\., num_frames=4\)"
    ):
        clf(clip_of(1)[:, :2])
    with pytest.raises(ValueError, match=r"swapped.*\(1, 3, 4, 16, 16\).*clip.transpose\(1, 2\)"):
        clf(clip_of(1).transpose(1, 2))
    with pytest.raises(ValueError, match=r"16 x 16 pixels, got 16 x 12.*clf.preprocess"):
        clf(clip_of(1)[..., :12])
    with pytest.raises(ValueError, match=r"must have 3 channels, got 1"):
        clf(clip_of(1)[:, :, :1])
    with pytest.raises(ValueError, match=r"got shape \(4, 3, 16, 16\).*unsqueeze\(0\)"):
        clf(clip_of(1)[0])
    with pytest.raises(ValueError, match=r"uint8.*clf.preprocess"):
        clf((clip_of(1) * 255).byte())
    with pytest.raises(TypeError, match="got ndarray"):
        clf(clip_of(1).numpy())


def test_num_frames_and_image_size_change_the_grid() -> None:
    model = build("vjepa2")  # rotary positions: any number of tubelets
    clf = VideoClassifier(model, num_frames=8)
    assert clf.grid is not None and clf.grid.shape == (4, 2, 2)
    assert clf(clip_of().repeat(1, 2, 1, 1, 1)).shape == (2, CLASSES)
    larger = VideoClassifier(model, image_size=(32, 24))
    assert larger.grid is not None and larger.grid.shape == (2, 4, 3)


def test_preprocess_and_crop_box_equal_the_processor(tmp_path: Path) -> None:
    model = save("videomae", tmp_path)
    clf = VideoClassifier.from_pretrained(tmp_path)
    frames = np.random.default_rng(0).integers(0, 256, (FRAMES, 40, 31, 3), dtype=np.uint8)
    processor = (
        transformers.VideoMAEImageProcessorPil
        if hasattr(transformers, "VideoMAEImageProcessorPil")
        else transformers.VideoMAEImageProcessor
    )
    options = {"size": {"shortest_edge": 20}, "crop_size": {"height": SIZE, "width": SIZE}}
    theirs = processor(**options, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    expected = torch.from_numpy(
        np.asarray(theirs([Image.fromarray(f) for f in frames], return_tensors="np")["pixel_values"])
    )
    clip = clf.preprocess(frames)
    torch.testing.assert_close(clip, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(clf(clip), raw_logits(model, expected), atol=1e-6, rtol=1e-6)
    assert clf.crop_box(40, 31) == Preprocessing(resize=20, crop=(SIZE, SIZE)).crop_box(40, 31)
    with pytest.raises(ValueError, match=r"must have 4 frames, got 3 \(shape \(3, 40, 31, 3\)\).*read_video"):
        clf.preprocess(frames[:3])


# ---------------------------------------------------------------- errors and options of from_pretrained


def test_preprocessing_is_none_without_processor_files(tmp_path: Path) -> None:
    build("vivit").save_pretrained(tmp_path)
    assert VideoClassifier.from_pretrained(str(tmp_path)).preprocessing is None


PUBLISHED = {  # of MCG-NJU, facebook and google on the hub: mean, std, and the shorter edge for an input of 224 pixels
    "videomae": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224),
    "timesformer": ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225), 224),
    "vivit": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 256),
    "vjepa2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256),
    "videoprism": (None, None, None),
}


@families
def test_a_folder_without_processor_files_names_the_numbers_of_its_family(name: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    clf = VideoClassifier.from_pretrained(tmp_path)
    frames = np.full((FRAMES, 20, 24, 3), 255, np.uint8)
    calls = (lambda: clf.preprocess(frames), lambda: clf.crop_box(20, 24), lambda: Preprocessing.from_folder(tmp_path))
    found = []
    for call in calls:
        with pytest.raises(ValueError, match="the numbers of the published") as raised:
            call()
        found.append(re.search(r"preprocessing=(Preprocessing\(.*?\)) to", str(raised.value))[1])
    assert len(set(found)) == 1
    clf.preprocessing = eval(found[0], {"Preprocessing": Preprocessing})
    mean, std, edge = PUBLISHED[name]
    assert (clf.preprocessing.mean, clf.preprocessing.std) == (mean, std)
    white = 1.0 if mean is None else (1 - np.array(mean)) / np.array(std)
    clip = clf.preprocess(frames)
    torch.testing.assert_close(clip[0, 0, :, 0, 0], torch.as_tensor(white).float().expand(3))
    assert clf(clip).shape == (1, 3)  # of the size that the model takes
    published_size = published(name, (224, 224))
    assert published_size.resize == (edge or (224, 224)) and published_size.crop == (edge and (224, 224))


def test_the_suggested_steps_of_a_model_of_no_family_are_open(tmp_path: Path) -> None:
    for content in ("", "[]", '{"model_type": "videomae"}', '{"model_type": "resnet3d", "image_size": 16}'):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"Preprocessing\(resize=\.\.\..*with which the model was trained"):
            Preprocessing.from_folder(tmp_path)


def test_the_commands_print_the_processor_file_of_the_family(tmp_path: Path) -> None:
    from captum_staa.cli.loading import load

    build("vivit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="That of the published vivit models would be") as raised:
        load(str(tmp_path), None)
    (tmp_path / "preprocessor_config.json").write_text(str(raised.value).split("would be ")[1])
    assert load(str(tmp_path), None).preprocessing == published("vivit", (SIZE, SIZE))


def test_options_override_the_folder(tmp_path: Path) -> None:
    save("videomae", tmp_path, size={"longest_edge": 3})  # invalid, but not read
    steps = Preprocessing(crop=(SIZE, SIZE))
    clf = VideoClassifier.from_pretrained(tmp_path, preprocessing=steps, labels=["a", "b", "c"], layout="BCTHW")
    assert clf.preprocessing is steps and clf.labels == ["a", "b", "c"] and clf.layout.axes == "BCTHW"
    with pytest.raises(ValueError, match="longest_edge"):
        VideoClassifier.from_pretrained(tmp_path)


def test_half_precision_weights_are_loaded_as_float32(tmp_path: Path) -> None:
    build("videomae").to(torch.float16).save_pretrained(tmp_path)
    assert VideoClassifier.from_pretrained(tmp_path)(clip_of()).dtype == torch.float32


def test_a_backbone_without_a_head_is_rejected(tmp_path: Path) -> None:
    build("vivit").vivit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no weights for .*classifier.*not a fine-tuned classifier"):
        VideoClassifier.from_pretrained(tmp_path)


def test_unused_weights_may_be_missing(tmp_path: Path) -> None:
    model = save("vjepa2", tmp_path)
    drop(tmp_path, ".predictor.")
    clf = VideoClassifier.from_pretrained(tmp_path)
    torch.testing.assert_close(clf(clip_of()), raw_logits(model, clip_of()), atol=1e-6, rtol=1e-6)


def test_missing_weights_are_rejected(tmp_path: Path) -> None:
    save("vivit", tmp_path)
    drop(tmp_path, "layernorm_before")
    with pytest.raises(
        ValueError, match=r"no weights for .*4 in total\)\. transformers .* pip install -U transformers"
    ):
        VideoClassifier.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = save("videomae", tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model.safetensors"):
        VideoClassifier.from_pretrained(tmp_path)


def test_unknown_names_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model 'no-such-model'.*neither a folder.*bundled models are \["):
        VideoClassifier.from_pretrained("no-such-model")
    with pytest.raises(ValueError, match="no model '/no/such/folder'"):
        VideoClassifier.from_pretrained("/no/such/folder")
    with pytest.raises(ValueError, match=r"must contain config.json, got only"):
        VideoClassifier.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="no video classifier could be loaded"):
        VideoClassifier.from_pretrained(tmp_path)


def test_hub_models_that_are_not_cached_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loaded from 'owner/missing'.*filled cache\. The bundled models are \["):
        VideoClassifier.from_pretrained("owner/missing", cache_dir=tmp_path, local_files_only=True)


def test_hub_models_are_loaded_from_the_cache(tmp_path: Path) -> None:
    """Weights, config and processor file are found offline in a cache with the structure of huggingface_hub."""
    revision = "0" * 40
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    folder = repository / "snapshots" / revision
    folder.mkdir(parents=True)
    model = save("timesformer", folder)
    clf = VideoClassifier.from_pretrained("some/model", cache_dir=tmp_path, local_files_only=True)
    torch.testing.assert_close(clf(clip_of()), raw_logits(model, clip_of()), atol=1e-6, rtol=1e-6)
    assert clf.preprocessing == Preprocessing.from_folder(folder)


@pytest.mark.parametrize("load", [VideoClassifier.from_pretrained, VideoLanguageModel.from_pretrained])
def test_without_a_network_a_hub_name_fails_at_once_with_the_reason(load, tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(url)
            raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", Session)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("no retries"))
    says = r"'owner/missing' must be a folder.*, but https://.* cannot be reached \(\[Errno -2\] Name or service"
    with pytest.raises(ValueError, match=says):
        load("owner/missing", cache_dir=tmp_path)
    assert len(asked) == 1


def test_without_a_network_a_cached_hub_model_is_loaded(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    (tmp_path / "models--some--model" / "refs").mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    folder.mkdir(parents=True)
    save("timesformer", folder)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: None)  # has no method head
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("no retries"))
    assert VideoClassifier.from_pretrained("some/model", cache_dir=tmp_path).family.name == "timesformer"


def test_notice_is_that_of_the_training_record_and_not_of_the_name(tmp_path: Path) -> None:
    folder = tmp_path / "renamed"
    shutil.copytree(bundled_folder("tiny-resnet3d-motion"), folder)
    clf = VideoClassifier.from_pretrained(folder)
    assert (
        clf.notice
        == "toy model, knows 2 directions of motion in synthetic clips; its labels mean nothing on real video"
    )
    assert clf.versus("left").notice == clf.notice
    for record in ("no json", "[]", "{}"):
        (folder / "training.json").write_text(record)
        assert VideoClassifier.from_pretrained(folder).notice == ""


def test_every_bundled_model_says_that_it_is_a_toy() -> None:
    assert {notice_in(bundled_folder(name)).split(",")[0] for name in bundled_names()} == {"toy model"}
    vlm = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl")
    assert vlm.notice.startswith("toy model, ")


@in_one_case()
@pytest.mark.parametrize("name", ["model.pth", "nowhere/epoch_3.ckpt", "weights.safetensors", "a.onnx"])
def test_a_file_of_weights_is_refused_with_the_way_to_explain_it(name: str) -> None:
    with pytest.raises(ValueError, match=rf"got the file '{name}'.*Build the network in Python.*VideoClassifier\(net"):
        VideoClassifier.from_pretrained(name)


def test_unknown_options_are_rejected(tmp_path: Path) -> None:
    for option in ({"trust_remote_code": True}, {"torch_dtype": torch.float32}):
        with pytest.raises(TypeError, match=f"attn_implementation.*got .*{next(iter(option))}"):
            VideoClassifier.from_pretrained(tmp_path, **option)


def test_attn_implementation_reaches_the_model(tmp_path: Path) -> None:
    save("videomae", tmp_path)
    clf = VideoClassifier.from_pretrained(tmp_path, attn_implementation="eager")
    assert clf.module.config._attn_implementation == "eager"


@in_one_case()
@pytest.mark.parametrize("name", bundled_names())
def test_bundled_models_load(name: str) -> None:
    clf = VideoClassifier.from_pretrained(name)
    assert clf.num_frames and clf.image_size and clf.labels
    assert not any(module.training for module in clf.modules())
    frames = np.zeros((clf.num_frames, *clf.image_size, 3), np.uint8)
    assert len(clf.predict(clf.preprocess(frames))) == min(5, len(clf.labels))


def test_resnet3d_folders_load(tmp_path: Path) -> None:
    model = resnet3d.ResNet3D(num_classes=2, width=4, stages=2, num_frames=FRAMES, image_size=SIZE).eval()
    resnet3d.save_pretrained(model, tmp_path, ["left", "right"])
    clf = VideoClassifier.from_pretrained(tmp_path)
    clip = clip_of().transpose(1, 2)
    torch.testing.assert_close(clf(clip), model(clip))
    assert (clf.layout.axes, clf.labels, clf.num_frames, clf.grid) == ("BCTHW", ["left", "right"], FRAMES, None)
    assert clf.image_size == (SIZE, SIZE)
    with pytest.raises(ValueError, match="swapped"):
        clf(clip_of())


def test_save_pretrained_does_not_overwrite_by_default(tmp_path: Path) -> None:
    models = [resnet3d.ResNet3D(2, width=4, stages=2, num_frames=FRAMES, image_size=SIZE) for _ in range(2)]
    resnet3d.save_pretrained(models[0], tmp_path, ["left", "right"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        resnet3d.save_pretrained(models[1], tmp_path, ["up", "down"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    resnet3d.save_pretrained(models[1], tmp_path, ["up", "down"], overwrite=True)
    assert VideoClassifier.from_pretrained(tmp_path).labels == ["up", "down"]


def test_labels_with_gaps_keep_their_indices():
    assert in_order({"2": "c", 0: "a"}) == ["a", "1", "c"]
    with pytest.raises(ValueError, match=r"class indices to names, got the keys \['LABEL_0'\]"):
        in_order({"LABEL_0": "a"})


def test_a_folder_with_pickled_weights_alone_names_the_way_out(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "videomae", "architectures": ["VideoMAEForVideoClassification"]}'
    )
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle that is never read")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*pickle.*use_safetensors=False.*save_pretrained"):
        VideoClassifier.from_pretrained(tmp_path)
