"""ST-ABN over a residual 3D CNN is the paper's: its sizes, its numbers, its branch; but without peaks at the ends."""

from __future__ import annotations

import numpy as np
import pytest
import slow_st_abn
import torch
from covering import in_one_case
from st_abn_networks import clips_of, seeded, settled, slow_resnet
from tiny_models import randomize
from torch import Tensor, nn

from captum_staa.models import STABN
from captum_staa.models.resnet3d import ResNet3D, SlowResNet, from_pretrained, save_pretrained


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---------------------------------------------------------------- the paper's network


def test_shapes_and_parameters_equal_the_paper():
    """K = 174, T = 32, 224 pixels, without a single number in memory."""
    with torch.device("meta"):
        st_abn = STABN(174, "resnet50", temporal="fixed")
        clip = torch.zeros(1, 3, 32, 224, 224)
    trunk = st_abn.model.module
    features = trunk.stages[:3](trunk.stem(clip))
    assert features.shape == (1, 1024, 32, 14, 14) and trunk.stages(trunk.stem(clip)).shape == (1, 2048, 32, 7, 7)
    logits, gates = st_abn.eval().forward_with_gates(clip)
    assert logits.shape == gates.logits.shape == (1, 174)
    assert gates.spatial.shape == (1, 1, 32, 14, 14) and gates.temporal.shape == (1, 1, 32, 1, 1)
    assert gates.evidence.shape == (1, 174, 32, 14, 14)

    k, t = 174, 32
    bottlenecks, c_in = 0, 1024  # the last stage's three; the first one also has a shortcut
    for shortcut in (1024 * 2048 + 2 * 2048, 0, 0):
        bottlenecks += 3 * c_in * 512 + 9 * 512 * 512 + 512 * 2048 + 2 * (512 + 512 + 2048) + shortcut
        c_in = 2048
    assert bottlenecks == 20_207_616 == count(trunk.stages[3]) == count(st_abn.branch.body)
    parts = {
        "": bottlenecks + 2 * 2048 + k * 2048 + 2 * k,  # layer4, BN, conv to K, BN
        "temporal": 27 * k + 2 + t * t + 2 * (t * t + t),  # 3x3x3 to 1, BN, T to T, two linear layers
        "classes": k * k + k * k * t + k,
        "spatial": k + 2,
        "mechanism": 2048 * 1024 + 2 * 1024,
    }
    assert count(st_abn.branch) + count(st_abn.mechanism) == sum(parts.values())
    assert count(st_abn.mechanism) == parts["mechanism"]
    assert round(sum(parts.values()) / 1e6, 2) == 23.67
    stem = 3 * 64 * 49 + 2 * 64
    assert count(trunk.stem) == stem and count(trunk.head) == 174 * 2049
    assert round(100 * sum(parts.values()) / count(trunk)) == 74


def test_trunk_keeps_all_frames_and_mixes_them_in_its_last_two_stages_only():
    trunk = settled(slow_resnet())
    clip = clips_of(5, 32)
    other = clip.clone()
    other[:, :, 2] += 1
    for depth in range(5):
        first, second = (trunk.stages[:depth](trunk.stem(x)) for x in (clip, other))
        assert first.shape[2] == 5
        moved = (first != second).any(1).flatten(2).any(2).any(0)
        expected = {0: [2], 1: [2], 2: [2], 3: [1, 2, 3], 4: [0, 1, 2, 3, 4]}[depth]
        assert moved.nonzero()[:, 0].tolist() == expected
    assert [trunk.stages[:d](trunk.stem(clip)).shape[3] for d in range(5)] == [8, 8, 4, 2, 1]


@pytest.mark.parametrize("body", ["stage", "light"])
@pytest.mark.parametrize("temporal", ["fixed", "any"])
def test_forward_equals_the_paper(body, temporal):
    """g' = relu(BN(conv[(1 + M) g; alpha g])), and the rest of the trunk on g'."""
    st_abn = settled(STABN(5, slow_resnet(), body=body, temporal=temporal, num_frames=6))
    trunk, clip = st_abn.model.module, clips_of(6, 48)
    with torch.no_grad():
        logits, found = st_abn.forward_with_gates(clip)
        with st_abn.branch_disabled():
            g = trunk.stages[:3](trunk.stem(clip))
        expected = slow_st_abn.gates(st_abn.branch, g)
        mixed = slow_st_abn.mechanism(st_abn.mechanism, "mix", g, expected.spatial, expected.temporal)
        answer = trunk.head(trunk.stages[3](mixed).mean((2, 3, 4)))
    assert expected.spatial.std() > 0.01 and expected.temporal.std() > 0.005 and answer.std() > 0.01
    torch.testing.assert_close(found.spatial[:, 0], expected.spatial, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.temporal[:, 0, :, 0, 0], expected.temporal, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.evidence, expected.evidence, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, answer, rtol=0, atol=1e-5)
    assert torch.equal(st_abn(clip), logits)
    explained = st_abn.explain(clip)
    assert torch.equal(explained.logits, logits) and torch.equal(explained.attention_logits, found.logits)
    assert explained.grid == (6, 3, 3) and torch.equal(explained.temporal_gates, found.temporal[:, 0, :, 0, 0])


def test_body_is_a_copy_of_the_last_stage_with_stride_one():
    trunk = settled(slow_resnet())
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    st_abn = STABN(5, trunk.train())  # building it must not move the copy's running statistics either
    stage, body = trunk.stages[3].state_dict(), st_abn.branch.body.state_dict()
    assert stage.keys() == body.keys()
    for name, value in stage.items():
        assert torch.equal(value, body[name]), name
        assert value.data_ptr() != body[name].data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())
    strides = [module.stride for module in st_abn.branch.body.modules() if isinstance(module, nn.Conv3d)]
    assert set(strides) == {(1, 1, 1)} and trunk.stages[3][0].conv2.stride == (1, 2, 2)
    with torch.no_grad():
        next(st_abn.branch.body.parameters()).add_(1)
    assert torch.equal(trunk.stages[3][0].conv1.weight, before["stages.3.0.conv1.weight"])


def test_small_network_is_resnet3d_with_replicated_padding():
    st_abn = STABN(4)
    trunk = st_abn.model.module
    assert isinstance(trunk, ResNet3D) and (trunk.config.padding_mode, trunk.config.time_strides_from) == (
        "replicate",
        2,
    )
    assert st_abn.layer == "stages.1" and st_abn.explain(torch.rand(1, 3, 16, 48, 48)).grid == (16, 6, 6)
    assert st_abn.layout.axes == "BCTHW" and st_abn.grid is None and st_abn.model.num_frames == 16


# ---------------------------------------------------------------- the ends of a clip, and any number of frames


def still(frames: int, side: int = 48) -> Tensor:
    frame = torch.rand(1, 3, 1, side, side, generator=torch.Generator().manual_seed(2))
    return frame.expand(-1, -1, frames, -1, -1).contiguous()


def test_static_clip_has_no_temporal_peaks_at_its_ends():
    st_abn = randomize(seeded(STABN, 4), seed=3)
    gates = st_abn.explain(still(16)).gates
    assert gates.spatial.std(dim=(3, 4)).min() > 0.01, "flat in space as well would be no news"
    torch.testing.assert_close(gates.spatial, gates.spatial[:, :, :1].expand_as(gates.spatial), rtol=0, atol=1e-6)
    torch.testing.assert_close(gates.temporal, gates.temporal[:, :, :1].expand_as(gates.temporal), rtol=0, atol=1e-6)


def test_zero_padding_causes_temporal_peaks():
    """What the test above would see in the paper's padding."""
    trunk = seeded(ResNet3D, 4, time_strides_from=2)
    gates = randomize(STABN(4, trunk), seed=3).explain(still(16)).gates
    assert (gates.temporal[0, 0, [0, -1]] - gates.temporal[0, 0, 8]).abs().max() > 1e-4


@pytest.mark.parametrize("frames", [1, 4, 9])
def test_any_number_of_frames(frames):
    st_abn = settled(STABN(5, slow_resnet(), body="light", num_frames=6))
    clip = clips_of(frames, 32)
    with torch.no_grad():
        logits, found = st_abn.forward_with_gates(clip)
        trunk = st_abn.model.module
        with st_abn.branch_disabled():
            g = trunk.stages[:3](trunk.stem(clip))
        expected = slow_st_abn.gates(st_abn.branch, g)
    torch.testing.assert_close(found.temporal[:, 0, :, 0, 0], expected.temporal, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    assert logits.shape == (2, 5) and st_abn.explain(clip).spatial_gates.shape == (2, frames, 32, 32)


def test_fixed_head_raises_for_another_number_of_frames():
    st_abn = settled(STABN(5, slow_resnet(), temporal="fixed", num_frames=6))
    with pytest.raises(ValueError, match="must have 6 frames, got 9"):
        st_abn(clips_of(9, 32))
    with pytest.raises(ValueError, match=r"must have 6 steps.*\(2, 5, 9, 2, 2\).*temporal='any'"):
        st_abn.branch(torch.zeros(2, 64, 9, 2, 2))


def test_gates_are_mapped_to_frames_and_pixels():
    """A step's frames have its weight; between cells M is linear, and at a cell's center it is the cell's."""
    st_abn = randomize(STABN(4, ResNet3D(4, width=4), body="light"), seed=0)  # halves time once: 8 steps of 16 frames
    explained = st_abn.explain(torch.rand(2, 3, 16, 36, 36, generator=torch.Generator().manual_seed(0)))
    assert explained.grid == (8, 5, 5) and explained.spatial_gates.shape == (2, 16, 36, 36)
    steps = explained.gates.temporal[:, 0, :, 0, 0]
    assert torch.equal(explained.temporal_gates, steps.repeat_interleave(2, 1)) and steps.std() > 0
    assert explained.resolution == "each bar covers 2 frames, each cell 7.2 x 7.2 pixels"
    cells = explained.gates.spatial[:, 0]
    for axis, (count, size) in enumerate(((8, 16), (5, 36), (5, 36)), start=1):
        centers, pixels = (np.arange(count) + 0.5) / count, (np.arange(size) + 0.5) / size
        weights = torch.from_numpy(np.stack([np.interp(pixels, centers, cell) for cell in np.eye(count)])).float()
        cells = torch.tensordot(cells, weights, ([axis], [0])).movedim(-1, axis)
    torch.testing.assert_close(explained.spatial_gates, cells, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- the trunk's two new options, and wrong ones


def test_padding_and_strides_of_the_trunk_are_saved(tmp_path):
    model = randomize(seeded(ResNet3D, 3, width=4, padding_mode="replicate", time_strides_from=0), seed=0)
    assert model.config.time_steps == 2
    save_pretrained(model, tmp_path, ["a", "b", "c"])
    clip = clips_of(16, 24)
    assert torch.equal(from_pretrained(tmp_path)(clip), model(clip))
    stays = ResNet3D(3, width=4, time_strides_from=3)
    assert stays.config.time_steps == 16 and stays.stages(stays.stem(clip)).shape[2] == 16


@in_one_case()
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: STABN(4, "resnet18"), "trunk .*'small', 'resnet50', got 'resnet18'"),
        (lambda: STABN(4, nn.Conv3d(3, 4, 1)), r"residual 3D CNN whose \.stages.*got Conv3d.*STABN\.inject"),
        (lambda: STABN(4, ResNet3D(4, width=4, stages=1)), "two or more"),
        (lambda: STABN(4, ResNet3D(4, width=4), body="deep"), "body .*got 'deep'"),
        (lambda: STABN(4, ResNet3D(4, width=4), body="own"), "body .*'stage', 'light', 'stages', 'pyramid', got 'own'"),
        (lambda: STABN(4, ResNet3D(4, width=4), temporal="some"), "temporal .*'any', 'fixed'"),
        (lambda: STABN(4, mechanism="observe"), "mechanism .*'mix', 'bottleneck', got 'observe'"),
        (lambda: STABN(4, ResNet3D(4, width=4), dropout=1.0), r"dropout must be .*got 1\.0"),
        (lambda: STABN(0), "num_classes"),
        (lambda: SlowResNet(4, layers=(1, 1)), "one entry per stage"),
        (lambda: SlowResNet(4, layers=(1, 0, 1, 1)), "layers of at least 1"),
        (lambda: SlowResNet(4, layers=(1, 1, 1, 1), width=0), "width .*at least 1, got 0"),
        (lambda: ResNet3D(4, width=0), "width .*at least 1, got 0"),
        (lambda: ResNet3D(4, padding_mode="reflect"), "padding_mode .*'zeros', 'replicate'"),
        (lambda: ResNet3D(4, time_strides_from=-1), "time_strides_from .*at least 0, got -1"),
    ],
)
def test_invalid_options_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_trunk_with_other_classes_is_unchanged():
    trunk = ResNet3D(7, width=4)
    with pytest.raises(ValueError, match="outputs of the trunk, 7, got 4"):
        STABN(4, trunk)
    assert not any(module._forward_hooks for module in trunk.modules())


@pytest.mark.parametrize("shape", [(1, 4, 3, 16, 16), (3, 4, 16, 16)])
def test_trunk_raises_for_another_layout(shape):
    with pytest.raises(ValueError, match=r"must be \(B, 3, T, H, W\), got shape .* Swap axes"):
        slow_resnet()(torch.zeros(shape))
