"""AttentionBranch: its three weightings are what they say, in space and in time, for any layer and target."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import slow_st_abn
import torch
from branched_models import add, case, injected, net, taught
from captum.attr import NoiseTunnel
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from st_abn_networks import clips_of, settled, slow_resnet
from tiny_models import randomize, snapshot
from torch import Tensor, nn

from captum_staa import TokenGrid, VideoClassifier
from captum_staa.attr import AttentionBranch
from captum_staa.models import STABN, BranchConfig

WEIGHTINGS = ("gate", "grad_gate", "class_map")
TARGETS = [2, 0]


class Linear(nn.Module):
    """A network whose every part after the layer is linear, and without a bias on the way: logits = w . features."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 4, 1)
        self.head = nn.Linear(4 * 4 * 6 * 5, 3)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(nn.functional.avg_pool3d(self.first(clip), (1, 2, 2)).flatten(1))


def linear() -> tuple[STABN, Tensor]:
    clip = torch.randn(2, 3, 4, 12, 10, generator=torch.Generator().manual_seed(1)).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, config = randomize(Linear(), 0).double(), BranchConfig(width=6)
        return taught(STABN.inject(model, "first", "BCTHW", config=config, example=clip)), clip


def assert_close(found: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected.to(found), rtol=0, atol=within * expected.abs().max().item())


# ---------------------------------------------------------------- gate


def test_gate_sums_to_one_per_clip():
    st_abn, _, clip = injected("tensor")
    parts = AttentionBranch(st_abn, upsampling="nearest").attribute_maps(clip)
    gates = st_abn.explain(clip).gates
    product = (gates.spatial * gates.temporal)[:, 0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(parts.joint, product / product.sum((1, 2, 3), keepdim=True))
    torch.testing.assert_close(parts.joint.sum((1, 2, 3)), torch.ones(2))
    assert_close(parts.spatial, parts.joint.sum(1))
    assert torch.equal(parts.temporal, gates.temporal[:, 0, :, 0, 0]), "the temporal gates alone, as they are"
    assert not torch.allclose(parts.temporal, parts.joint.sum((2, 3)), rtol=0.1)
    assert torch.equal(parts.logits, st_abn(clip).detach()) and torch.equal(parts.attention_logits, gates.logits)
    assert parts.weighting == "gate"


def test_gates_of_an_override_are_used():
    st_abn, _, clip = injected("tensor")
    one = torch.zeros(1, 4)
    one[0, 2] = 1
    with st_abn.override(temporal=one):
        found = AttentionBranch(st_abn).attribute_maps(clip)
        with st_abn.override(spatial=torch.zeros(1, 4, 6, 5)):
            shut = AttentionBranch(st_abn).attribute_maps(clip)
    assert (found.joint.sum((2, 3)) > 0).tolist() == [[False, False, True, False]] * 2
    assert torch.equal(found.temporal, one.expand(2, 4))
    assert not shut.joint.any(), "nothing is open, so nothing is shown"


# ---------------------------------------------------------------- grad_gate


def test_grad_gate_equals_the_effect_of_closing_a_gate_in_a_linear_model():
    """Exactly: the logit falls by a cell's value when its two gates are shut; by all of them when all are."""
    st_abn, clip = linear()
    gates, whole = st_abn.explain(clip).gates, st_abn(clip).detach()
    spatial, temporal = gates.spatial[:, 0], gates.temporal[:, 0, :, 0, 0]
    parts = AttentionBranch(st_abn, upsampling="nearest").attribute_maps(clip, TARGETS)
    rows = torch.arange(2)

    def fall(where: Tensor, when: Tensor) -> Tensor:
        with torch.no_grad(), st_abn.override(spatial=where, temporal=when):
            return (whole - st_abn(clip))[rows, TARGETS]

    assert parts.weighting == "grad_gate"
    assert_close(parts.joint.sum((1, 2, 3)), fall(spatial * 0, temporal * 0))
    for t in range(4):
        shut = temporal.clone()
        shut[:, t] = 0
        assert_close(parts.temporal[:, t], fall(spatial, shut))
        assert_close(parts.joint[:, t].sum((1, 2)), fall(spatial * (torch.arange(4) != t).view(-1, 1, 1), shut))


def test_grad_gate_equals_a_finite_difference():
    st_abn, clip = (x.double() for x in (injected("tensor")[0], injected("tensor")[2]))
    gates = st_abn.explain(clip).gates
    spatial, temporal = gates.spatial[:, 0].double(), gates.temporal[:, 0, :, 0, 0].double()
    parts = AttentionBranch(st_abn, upsampling="nearest").attribute_maps(clip, TARGETS)
    rows, step = torch.arange(2), 1e-3

    def slope(where: Tensor, when: Tensor) -> Tensor:
        """Of the target's logit, as these gates move."""
        ends = []
        for sign in (step, -step):
            with torch.no_grad(), st_abn.override(spatial=spatial + sign * where, temporal=temporal + sign * when):
                ends.append(st_abn(clip)[rows, TARGETS])
        return (ends[0] - ends[1]) / (2 * step)

    of_time = []
    for t in range(4):
        when = torch.zeros(2, 4)
        when[:, t] = 1
        of_time.append(temporal[:, t] * slope(spatial * 0, when))
    assert_close(parts.temporal, torch.stack(of_time, 1), within=1e-3)
    of_frames = [slope(spatial * (torch.arange(4) == t).view(-1, 1, 1), temporal * 0) for t in range(4)]
    assert_close(parts.joint.sum((2, 3)), torch.stack(of_frames, 1) + torch.stack(of_time, 1), within=1e-3)


def test_value_of_a_step_is_spread_over_its_frames():
    st_abn, _, clip = injected("videomae")  # two frames in a step, 8 x 8 pixels in a token
    parts = AttentionBranch(st_abn, upsampling="nearest").attribute_maps(clip, TARGETS)
    steps = parts.joint.unflatten(1, (4, 2))
    assert torch.equal(steps[:, :, 0], steps[:, :, 1]) and torch.equal(parts.temporal[:, ::2], parts.temporal[:, 1::2])
    assert parts.resolution == "each bar covers 2 frames, each cell 8 x 8 pixels"
    cells = parts.joint[:, ::2, ::8, ::8] * 128
    smooth = AttentionBranch(st_abn).attribute_maps(clip, TARGETS)
    assert_close(smooth.joint.sum((1, 2, 3)), cells.sum((1, 2, 3)))
    assert torch.equal(smooth.temporal, parts.temporal)
    with torch.enable_grad():
        logits, gates = st_abn.forward_with_gates(clip, leaves=True)
        slopes = torch.autograd.grad(logits[0, 2] + logits[1, 0], (gates.spatial, gates.temporal))
    expected = (gates.spatial * slopes[0] + gates.temporal * slopes[1])[:, 0].detach()
    assert_close(cells, expected)
    assert_close(parts.temporal.unflatten(1, (4, 2)).sum(2), (gates.temporal * slopes[1]).sum((1, 3, 4)).detach())


@pytest.mark.parametrize("weighting", ["grad_gate", "class_map"])
def test_pixels_outside_the_tokens_get_zero_and_the_sum_is_kept(weighting):
    """3 x 2 patches of 8 pixels in frames of 27 x 17, two frames each in clips of 5."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Conv3d(3, 8, (2, 8, 8), (2, 8, 8)), nn.Identity(), nn.Linear(8, 3)

        def forward(self, clip: Tensor) -> Tensor:
            return self.head(self.mix(self.embed(clip).flatten(2).transpose(1, 2)).tanh().mean(1))

    grid = TokenGrid(2, 3, 2, tubelet=(2, 8, 8))
    clip = torch.randn(2, 3, 5, 27, 17, generator=torch.Generator().manual_seed(0))
    st_abn = taught(STABN.inject(randomize(Patches(), 0), "mix", "BCTHW", grid, example=clip))
    parts = AttentionBranch(st_abn).attribute_maps(clip, TARGETS, weighting=weighting)
    assert not parts.joint[:, 4:].any() and not parts.joint[:, :, 24:].any() and not parts.joint[..., 16:].any()
    assert parts.temporal[:, :4].all() and not parts.temporal[:, 4:].any()
    logits, gates = st_abn.forward_with_gates(clip, leaves=True)
    if weighting == "class_map":
        expected = (gates.logits - st_abn.branch.classify.bias)[torch.arange(2), TARGETS].detach()
        of_time = expected
    else:
        slopes = torch.autograd.grad(logits[0, 2] + logits[1, 0], (gates.spatial, gates.temporal))
        of_time = (gates.temporal * slopes[1]).sum((1, 2, 3, 4)).detach()
        expected = of_time + (gates.spatial * slopes[0]).sum((1, 2, 3, 4)).detach()
    assert_close(parts.joint.sum((1, 2, 3)), expected)
    assert_close(parts.temporal.sum(1), of_time)


# ---------------------------------------------------------------- class_map


@pytest.mark.parametrize("frames", [6, 9])
def test_class_map_sums_to_the_logit_of_the_branch_minus_its_bias(frames):
    """Also where steps are averaged to the head's six bins."""
    st_abn, clip = settled(STABN(5, slow_resnet(), body="light", num_frames=6)), clips_of(frames, 32)
    parts = AttentionBranch(st_abn).attribute_maps(clip, [4, 1], weighting="class_map")
    head = st_abn.branch.classify
    logits = st_abn.explain(clip).attention_logits
    assert_close(parts.joint.sum((1, 2, 3)), (logits - head.bias.detach())[torch.arange(2), [4, 1]])
    assert_close(parts.temporal, parts.joint.sum((2, 3)))
    evidence = st_abn.explain(clip).gates.evidence.clone().requires_grad_()
    of_head = sum(slow_st_abn.parts(st_abn.branch, evidence))
    (slope,) = torch.autograd.grad(of_head[0, 4] + of_head[1, 1], evidence)
    assert_close(parts.temporal, (evidence * slope).detach().sum((1, 3, 4)))
    assert torch.equal(parts.attention_logits, logits)


# ---------------------------------------------------------------- targets, defaults, and what it refuses


def test_default_weighting():
    st_abn, _, clip = injected("tensor")
    method = AttentionBranch(st_abn)
    assert method.attribute_maps(clip).weighting == "gate"
    assert method.attribute_maps(clip, 1).weighting == "grad_gate"
    assert torch.equal(method.attribute(clip, 1), method.attribute(clip, 1, weighting="grad_gate"))
    watching = AttentionBranch(injected("tensor", mechanism="observe")[0])
    assert watching.attribute_maps(clip).weighting == watching.attribute_maps(clip, 1).weighting == "gate"
    assert watching.attribute_maps(clip, 1, weighting="class_map").joint.any()


@pytest.mark.parametrize("weighting", ["grad_gate", "class_map"])
def test_target_forms(weighting):
    st_abn, _, clip = injected("tensor")
    method = AttentionBranch(st_abn)
    expected = torch.cat([method.attribute(clip[i : i + 1], t, weighting=weighting) for i, t in enumerate(TARGETS)])
    for target in (TARGETS, torch.tensor(TARGETS), [(2,), (0,)]):
        assert_close(method.attribute(clip, target, weighting=weighting), expected)
    for target in (1, torch.tensor(1), torch.tensor([1]), [1, 1], (1,)):
        found = method.attribute(clip, target, weighting=weighting)
        assert torch.equal(found, method.attribute(clip, [1, 1], weighting=weighting))
    for target in (None, 3, [0, 1, 2], "1"):
        with pytest.raises((TypeError, ValueError)):
            method.attribute(clip, target, weighting=weighting)


@pytest.mark.filterwarnings("ignore")  # torch deprecates quantize_dynamic, and warns about missing backward passes
def test_grad_gate_raises_if_a_quantized_layer_hides_a_part_of_the_gradient():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blend, self.head = nn.Conv3d(3, 4, 1), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, clip: Tensor) -> Tensor:
            features = self.first(clip).mean((2, 3, 4))
            return self.head(features + self.blend(features))

    clip = torch.rand(2, 3, 4, 12, 10, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        st_abn = taught(STABN.inject(Residual().eval(), "first", "BCTHW", config=BranchConfig(width=6), example=clip))
    name = next(name for name, _ in st_abn.named_modules() if name.endswith(".blend"))
    torch.ao.quantization.quantize_dynamic(st_abn, {name}, dtype=torch.qint8, inplace=True)
    with pytest.raises(ValueError, match=r"without a backward pass.*blend' \(Linear\)"):
        AttentionBranch(st_abn).attribute(clip, target=1, weighting="grad_gate")
    assert AttentionBranch(st_abn).attribute(clip, target=1, weighting="gate").shape == clip.shape


def test_grad_gate_raises_if_the_output_does_not_depend_on_the_gates():
    model, layer, clip, options = case("tensor")
    for st_abn in (injected("tensor", mechanism="observe")[0], add(model, layer, clip, **options)):
        kind = st_abn.config.mechanism
        message = rf"'grad_gate' needs .*mechanism='{kind}'.*fit_st_abn, or use weighting='gate'"
        before = snapshot(st_abn)
        with pytest.raises(ValueError, match=message):
            AttentionBranch(st_abn).attribute(clip, 1, weighting="grad_gate")
        assert snapshot(st_abn) == before


def test_invalid_options_raise():
    st_abn, _, clip = injected("tensor")
    with pytest.raises(ValueError, match=r"weighting .*'gate', 'grad_gate', 'class_map', got 'grad_cam'"):
        AttentionBranch(st_abn).attribute(clip, 1, weighting="grad_cam")
    with pytest.raises(ValueError, match=r"upsampling .*'trilinear', 'nearest', got 'cubic'"):
        AttentionBranch(st_abn, upsampling="cubic")


def test_other_models_raise():
    for model in (net(), VideoClassifier(net(), "BCTHW")):
        with pytest.raises(TypeError, match=r"must be a models\.STABN.* got .*STABN\.inject\(model, layer\)"):
            AttentionBranch(model)


def test_removed_branch_raises():
    st_abn, _, clip = injected("tensor")
    method = AttentionBranch(st_abn)
    st_abn.remove()
    for weighting in WEIGHTINGS:
        with pytest.raises(ValueError, match="removed"):
            method.attribute(clip, 1, weighting=weighting)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_st_abn_in_a_classifier_or_compiled(weighting):
    st_abn, _, clip = injected("tensor")
    expected = AttentionBranch(st_abn).attribute(clip, 1, weighting=weighting)
    for model in (VideoClassifier(st_abn, "BCTHW"), torch.compile(st_abn, backend="eager")):
        method = AttentionBranch(model)
        assert method.forward_func is model and torch.equal(method.attribute(clip, 1, weighting=weighting), expected)


def test_two_branches_of_one_model_are_independent():
    first, model, clip = injected("tensor")
    second = taught(add(model, "first", clip, layout="BCTHW"), seed=7)
    maps = [AttentionBranch(branch).attribute(clip, 1) for branch in (first, second)]
    assert not torch.allclose(*maps, rtol=0.1)
    second.remove()
    assert not torch.equal(AttentionBranch(first).attribute(clip, 1), maps[0]), "what comes before it has changed"


# ---------------------------------------------------------------- Captum's tools around it


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_captum_noise_tunnel_and_metrics_work(weighting):
    """Without noise a tunnel changes nothing and no map moves; infidelity asks for the fall to a black clip."""
    st_abn, _, clip = injected("tensor")
    method, more = AttentionBranch(st_abn), {"target": TARGETS, "weighting": weighting}
    expected = method.attribute(clip, **more)
    tunnel = NoiseTunnel(method).attribute(clip, nt_samples=2, stdevs=0.0, **more)
    assert_close(tunnel, expected)

    def still(inputs: Any, radius: float = 0.0) -> Any:
        return tuple(1 * x for x in inputs) if isinstance(inputs, tuple) else 1 * inputs

    assert (sensitivity_max(method.attribute, clip, perturb_func=still, n_perturb_samples=2, **more) < 1e-5).all()
    zeros: Any = infidelity_perturb_func_decorator(multiply_by_inputs=False)(lambda x: torch.zeros_like(x))
    found = infidelity(st_abn, zeros, clip, expected, target=TARGETS, n_perturb_samples=1)
    with torch.no_grad():
        fell = (st_abn(clip) - st_abn(clip * 0))[torch.arange(2), TARGETS]
    torch.testing.assert_close(found, ((expected * clip).sum((1, 2, 3, 4)) - fell).square(), rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- a bottleneck, and gates that are not used


def test_bottleneck_is_explained_by_its_gates():
    """With a target, too; gate times gradient of its only gate, M alpha, is the slope along scaled gates."""
    st_abn, _, clip = injected("tensor", mechanism="bottleneck", body="light")
    st_abn, clip = st_abn.double(), clip.double()
    method = AttentionBranch(st_abn)
    assert method.attribute_maps(clip, 1).weighting == "gate"
    assert torch.equal(method.attribute(clip, 1), method.attribute(clip))
    found = method.attribute_maps(clip, TARGETS, weighting="grad_gate").joint.sum((1, 2, 3))
    gates, sides = st_abn.explain(clip).gates, []
    for scale in (1 - 1e-3, 1 + 1e-3):
        with st_abn.override(spatial=scale * gates.spatial[:, 0]), torch.no_grad():
            sides.append(st_abn(clip)[torch.arange(2), TARGETS])
    assert_close(found, (sides[1] - sides[0]) / 2e-3, within=1e-4)


def test_unused_gates_warn_once_per_network():
    model, layer, clip, options = case("tensor")
    st_abn = add(model, layer, clip, **options)  # untrained, so its gates do nothing
    method = AttentionBranch(st_abn)
    with pytest.warns(UserWarning, match=r"does not use its gates: .*less than 1% .*attention_usage.*'bottleneck'"):
        method.attribute(clip)
    other = add(net(), layer, clip, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.attribute(clip)
        AttentionBranch(st_abn).attribute(clip)
        AttentionBranch(injected("tensor", mechanism="observe")[0]).attribute(clip)
        used = injected("tensor", mechanism="bottleneck", body="light")[0]
        with torch.no_grad():
            used.branch.to_spatial.weight.mul_(50)
        AttentionBranch(used).attribute(clip)
    with pytest.warns(UserWarning, match="does not use its gates"):
        AttentionBranch(other).attribute(clip)
    closed = injected("tensor", mechanism="bottleneck", body="light")[0]
    with torch.no_grad():
        closed.branch.to_spatial.weight.zero_()
    with pytest.warns(UserWarning, match=r"does not use its gates: .* Train this bottleneck longer"):
        AttentionBranch(closed).attribute(clip)
