"""An ST-ABN in a file: its state_dict, and folders with its trunk or with what was added to a model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from branched_models import add, answer_of, case, hooks_of, injected, taught
from safetensors.torch import load_file, save_file
from st_abn_networks import clips_of, settled, slow_resnet
from tiny_models import randomize
from torch import nn

from captum_staa import VideoClassifier
from captum_staa.models import STABN
from captum_staa.models.preprocessing import Preprocessing
from captum_staa.models.resnet3d import ResNet3D
from captum_staa.models.resnet3d import save_pretrained as save_resnet3d


def trunk(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A trunk and the options of STABN; in the second one time is halved before the branch."""
    if name == "slow_resnet":
        return slow_resnet(4), {"num_frames": 6, "temporal": "fixed"}
    options = {"small": {"padding_mode": "replicate", "time_strides_from": 2}, "steps are not frames": {}}[name]
    return ResNet3D(4, width=4, num_frames=8, image_size=24, **options), {"body": "light", "dropout": 0.25}


@pytest.mark.parametrize("name", ["small", "steps are not frames", "slow_resnet"])
def test_whole_network_is_saved_and_loaded(name, tmp_path):
    net, options = trunk(name)
    st_abn = settled(STABN(4, net, labels=["a", "b", "c", "d"], **options))
    clip = clips_of(6 if name == "slow_resnet" else 8, 32 if name == "slow_resnet" else 24)
    folder = tmp_path / "deep" / "model"
    st_abn.save_pretrained(folder)
    other = STABN.from_pretrained(folder)
    assert not any(module.training for module in other.modules())
    assert (other.layer, other.config) == (st_abn.layer, st_abn.config) and other.model.labels == ["a", "b", "c", "d"]
    one, two = st_abn.explain(clip), other.explain(clip)
    for mine, theirs in ((one.logits, two.logits), (one.attention_logits, two.attention_logits)):
        assert torch.equal(mine, theirs)
    assert torch.equal(one.spatial_gates, two.spatial_gates) and torch.equal(one.temporal_gates, two.temporal_gates)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert other.branch.dropout.p == options.get("dropout", 0.5)


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    net, options = trunk("slow_resnet")
    st_abn = settled(STABN(4, net, **options))
    counted = [module for module in st_abn.modules() if isinstance(module, nn.BatchNorm3d)]
    counted[0].num_batches_tracked.fill_(100_001)  # more than float16 can tell
    st_abn.save_pretrained(tmp_path, half=True)
    weights = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16, torch.int64}
    other = STABN.from_pretrained(tmp_path)
    own = other.state_dict()
    assert {value.dtype for value in own.values()} == {torch.float32, torch.int64}
    for name, value in st_abn.state_dict().items():
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(own[name], expected), name


@pytest.mark.parametrize("name", ["videomae", "tensor"])
@pytest.mark.parametrize("mechanism", ["residual", "observe", "mix"])
def test_added_modules_are_saved_and_loaded(name, mechanism, tmp_path):
    sizes = {"tensor": {"width": 5, "maps": 2, "dropout": 0.1}, "videomae": {"width": 7, "temporal": "fixed"}}[name]
    st_abn, model, clip = injected(name, mechanism=mechanism, **sizes)
    st_abn.save_pretrained(tmp_path)
    assert all(key.startswith(("branch.", "mechanism.")) for key in load_file(tmp_path / "model.safetensors"))
    expected = st_abn.explain(clip)
    st_abn.remove()
    if name == "tensor":
        with pytest.raises(ValueError, match=r"must fit its config and this model, got .*\['branch.classify.weight'\]"):
            STABN.from_pretrained(tmp_path, VideoClassifier(model, "BCTHW", num_frames=16))
        other = STABN.from_pretrained(tmp_path, VideoClassifier(model, "BCTHW", num_frames=4))
    else:
        other = STABN.from_pretrained(tmp_path, model)
    found = other.explain(clip)
    assert (other.layer, other.config, other.injected) == (st_abn.layer, st_abn.config, True)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.attention_logits, expected.attention_logits)
    assert torch.equal(found.spatial_gates, expected.spatial_gates)
    assert torch.equal(found.temporal_gates, expected.temporal_gates)


def test_base_model_is_loaded_by_its_name(tmp_path):
    base = tmp_path / "base"
    save_resnet3d(randomize(ResNet3D(3, width=4, num_frames=4, image_size=12), 0), base, ["a", "b", "c"])
    st_abn = taught(STABN.inject(VideoClassifier.from_pretrained(base), "stages.0"))
    st_abn.save_pretrained(tmp_path / "branch", base=str(base))
    clip = torch.rand(2, 3, 4, 12, 12)
    other = STABN.from_pretrained(tmp_path / "branch")
    assert torch.equal(other(clip), st_abn(clip)) and other.model.labels == ["a", "b", "c"]
    st_abn.save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match=r"needs its base model.*Pass model="):
        STABN.from_pretrained(tmp_path / "nameless")


def test_injected_mix_branch_saves_only_added_modules(tmp_path):
    """How a branch acts does not say whose the trunk is."""
    st_abn, model, clip = injected("resnet3d", mechanism="mix")
    st_abn.save_pretrained(tmp_path)
    assert all(key.startswith(("branch.", "mechanism.")) for key in load_file(tmp_path / "model.safetensors"))
    expected = st_abn(clip)
    st_abn.remove()
    with pytest.raises(ValueError, match=r"needs its base model.*Pass model="):
        STABN.from_pretrained(tmp_path)
    assert torch.equal(STABN.from_pretrained(tmp_path, VideoClassifier(model, "BCTHW", num_frames=4))(clip), expected)


def test_injected_branch_with_a_stage_as_body_is_saved_and_loaded(tmp_path):
    st_abn, model, clip = injected("resnet3d", body="stage")
    expected = st_abn(clip)
    st_abn.save_pretrained(tmp_path)
    st_abn.remove()
    assert torch.equal(STABN.from_pretrained(tmp_path, VideoClassifier(model, "BCTHW", num_frames=4))(clip), expected)


STEPS = Preprocessing(resize=31, crop=(24, 20), resample=3, mean=(0.1, 0.2, 1 / 3), std=(0.5, 0.6, 0.7))


def test_clip_size_and_preprocessing_are_restored(tmp_path):
    net, options = trunk("small")
    for preprocessing, size in ((STEPS, (24, 20)), (None, (20, 24)), (None, None)):
        folder = tmp_path / f"{preprocessing is None} {size}"
        st_abn = STABN(4, net, **options)
        st_abn.model.preprocessing, st_abn.model.image_size = preprocessing, size
        st_abn.save_pretrained(folder)
        st_abn.remove()
        files = ["config.json", "model.safetensors"] + ["preprocessor_config.json"] * (preprocessing is not None)
        assert sorted(path.name for path in folder.iterdir()) == files
        for found in (STABN.from_pretrained(folder).model, VideoClassifier.from_pretrained(folder)):
            assert found.preprocessing == preprocessing
            assert found.image_size == (size or (24, 24)), "the trunk's own where nothing was said"


def test_base_model_gets_the_stored_clip_size(tmp_path):
    base = tmp_path / "base"
    save_resnet3d(ResNet3D(3, width=4, num_frames=4, image_size=12), base, ["a", "b", "c"])
    clf = VideoClassifier.from_pretrained(base, image_size=(24, 20), preprocessing=STEPS)
    STABN.inject(clf, "stages.0").save_pretrained(tmp_path / "branch", base=str(base))
    found = VideoClassifier.from_pretrained(tmp_path / "branch")
    assert (found.image_size, found.preprocessing) == ((24, 20), STEPS)
    other = VideoClassifier.from_pretrained(base)
    STABN.from_pretrained(tmp_path / "branch", other)
    assert (other.image_size, other.preprocessing) == ((12, 12), None), "a model of yours keeps its own"


def test_labels_are_sorted_by_id(tmp_path):
    names = [f"c{index}" for index in range(11)]
    net = ResNet3D(11, width=4, num_frames=4, image_size=12)
    STABN(11, net, body="light", labels=names).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))  # "10" comes before "2"
    assert list(json.loads(path.read_text())["id2label"].values()) != names
    assert STABN.from_pretrained(tmp_path).model.labels == names


@pytest.mark.parametrize("name", ["videomae", "timesformer", "tensor"])
def test_a_state_dict_through_safetensors(name, tmp_path):
    """All of it, and the branch alone."""
    st_abn, _, clip = injected(name)
    save_file(st_abn.state_dict(), tmp_path / "all.safetensors")
    save_file(st_abn.branch.state_dict(), tmp_path / "branch.safetensors")
    expected = st_abn.explain(clip)
    other = injected(name)[0]
    taught(other, seed=9)
    randomize(other.model, seed=10)
    assert not torch.equal(other(clip), expected.logits)
    other.load_state_dict(load_file(tmp_path / "all.safetensors"))
    found = other.explain(clip)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.spatial_gates, expected.spatial_gates)
    randomize(other.branch, seed=11)
    other.branch.load_state_dict(load_file(tmp_path / "branch.safetensors"))
    assert torch.equal(other(clip), expected.logits)
    plain = case(name)[0]
    prefix = "model." if isinstance(plain, VideoClassifier) else "model.module."
    of_model = {key for key in st_abn.state_dict() if not key.startswith(("branch.", "mechanism."))}
    assert of_model == {prefix + key for key in plain.state_dict()}, "the model's own names, and no branch among them"


# ---------------------------------------------------------------- bad input


def test_folder_with_a_model_is_not_overwritten(tmp_path):
    st_abn = injected("tensor")[0]
    st_abn.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"must not contain a model, got .*another folder"):
        taught(st_abn, seed=9).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("file", ["model.safetensors", "preprocessor_config.json", "video_preprocessor_config.json"])
def test_files_of_another_model_raise(file, tmp_path):
    """A processor's file that lies there would be read as this model's."""
    (tmp_path / file).write_text('{"size": 7}')
    with pytest.raises(FileExistsError, match=file):
        injected("tensor")[0].save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file] and (tmp_path / file).read_text() == '{"size": 7}'


def test_failed_loading_leaves_no_hook(tmp_path):
    st_abn, model, clip = injected("videomae")
    st_abn.save_pretrained(tmp_path)
    st_abn.remove()
    weights = load_file(tmp_path / "model.safetensors")
    del weights["branch.to_maps.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    before = answer_of(model, clip)
    with pytest.raises(ValueError, match="must fit its config and this model"):
        STABN.from_pretrained(tmp_path, model)
    assert not hooks_of(model, st_abn.layer) and torch.equal(answer_of(model, clip), before)


def test_custom_modules_cannot_be_saved(tmp_path):
    model, layer, clip, options = case("tensor")
    own_body = add(model, layer, clip, body=nn.Conv3d(6, 4, 1), **options)
    with pytest.raises(ValueError, match=r"got a custom body\. Save st_abn\.state_dict\(\)"):
        own_body.save_pretrained(tmp_path / "a")

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages, self.head = nn.Sequential(nn.Conv3d(3, 4, 1), nn.Conv3d(4, 4, 1)), nn.Linear(4, 2)

        def forward(self, clip: torch.Tensor) -> torch.Tensor:
            return self.head(self.stages(clip).mean((2, 3, 4)))

    st_abn = STABN(2, Trunk())
    assert st_abn(torch.rand(1, 3, 5, 8, 8)).shape == (1, 2)
    with pytest.raises(ValueError, match=r"must be a ResNet3D or a SlowResNet .*got Trunk"):
        st_abn.save_pretrained(tmp_path / "b")
    net, options = trunk("small")
    st_abn = STABN(4, net, **options)
    with pytest.raises(ValueError, match=r"base must be None .*got 'a name'\. Leave base out"):
        st_abn.save_pretrained(tmp_path / "c", base="a name")
    st_abn.model.preprocessing = lambda frames: frames  # type: ignore[assignment]
    with pytest.raises(ValueError, match="must be a Preprocessing or None, got function"):
        st_abn.save_pretrained(tmp_path / "d")
    assert not any(tmp_path.iterdir())


def test_missing_or_wrong_folders_raise(tmp_path):
    with pytest.raises(
        ValueError, match=r"config\.json of an ST-ABN, got 'no-such-model'\. Bundled models are \['tiny-"
    ):
        STABN.from_pretrained("no-such-model")
    with pytest.raises(ValueError, match=r"model_type in .* must be 'st_abn', got 'resnet3d'\. Load .*VideoClassifier"):
        STABN.from_pretrained("tiny-resnet3d-pattern")


@pytest.mark.parametrize("size", ["ab", [24], 24, [24, "b"]], ids=str)
def test_invalid_image_size_raises(size, tmp_path):
    net, options = trunk("small")
    STABN(4, net, **options).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": size}))
    with pytest.raises(ValueError, match=r"must hold a complete ST-ABN, got .*image_size"):
        STABN.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["a weight less", "a weight more", "another shape"])
def test_weights_that_do_not_fit_raise(change, tmp_path):
    net, options = trunk("small")
    STABN(4, net, **options).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if change == "a weight less":
        del weights["branch.to_maps.weight"]
    elif change == "a weight more":
        weights["branch.to_nothing.weight"] = torch.zeros(3)
    else:
        weights["branch.to_maps.weight"] = torch.zeros(5, 32, 1, 1, 1)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"must fit its config and this model, got .*\['branch\.to_.*\(1 in all\)"):
        STABN.from_pretrained(tmp_path)


def test_the_config_is_plain_json(tmp_path):
    net, options = trunk("small")
    STABN(4, net, labels=["a", "b", "c", "d"], **options).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["model_type"] == "st_abn" and config["branch"]["layer"] == "stages.1"
    assert config["trunk"]["config"]["padding_mode"] == "replicate" and config["id2label"]["2"] == "c"


def test_model_argument_for_a_whole_network_raises(tmp_path):
    net, options = trunk("small")
    STABN(4, net, **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model must be None .*Leave model out"):
        STABN.from_pretrained(tmp_path, model=net)
