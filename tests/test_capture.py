"""Reading attention changes no logit, reads what the formula says, and leaves nothing behind."""

from __future__ import annotations

import copy
import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    ALL,
    NAMES,
    OWN,
    CallsSdpa,
    OwnViT,
    classifier,
    clip_for,
    own,
    own_family,
    randomise,
    snapshot,
    tiny,
)
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from captum_staa import STAA, VideoClassifier
from captum_staa.attention import tiles
from captum_staa.attention.capture import AttentionCall, capture
from captum_staa.models import AttentionSite

READINGS: dict[str, Callable[[AttentionCall], Tensor]] = {
    "row": lambda call: call.row(),
    "column_means": lambda call: call.column_means(),
    "head_mean": lambda call: call.head_mean(),
    "probabilities": lambda call: call.probabilities(),
}
OF_FULL: dict[str, Callable[[Tensor], Tensor]] = {  # the same, from explicit probabilities (B, h, Q, N)
    "row": lambda full: full.mean(1)[:, 0],
    "column_means": lambda full: full.mean((1, 2)),
    "head_mean": lambda full: full.mean(1),
    "probabilities": lambda full: full,
}


def sites_of(clf: VideoClassifier) -> list[AttentionSite]:
    return list(clf.family.attention(clf.module))


def read(clf: VideoClassifier, clip: Tensor, reading: str = "head_mean", **options: Any) -> tuple[Tensor, dict]:
    logits = torch.empty(0)
    with capture(clf.module, sites_of(clf), READINGS[reading], **options) as readings:
        logits = clf(clip)
    return logits, readings


@contextmanager
def probabilities_of(clf: VideoClassifier) -> Iterator[dict[str, Tensor]]:
    """Every site's explicit attention, by hooks of this file's own and the models' own eager code."""
    model, found, handles = clf.module, {}, []
    if hasattr(model, "set_attn_implementation") and "Timesformer" not in type(model).__name__:
        model.set_attn_implementation("eager")

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(module, nn.Dropout):
                found[name] = output
            elif isinstance(module, CallsSdpa):
                found[name] = module.explicit(args[0])
            elif isinstance(module, nn.MultiheadAttention):
                x = args[0] if module.batch_first else args[0].transpose(0, 1)
                q, k, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
                q, k = (y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for y in (q, k))
                found[name] = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
            else:
                found[name] = output[1]  # transformers' attention modules return (output, weights)

        return hook

    for site in sites_of(clf):
        handles.append(model.get_submodule(site.module).register_forward_hook(keep(site.module)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ALL)
def test_readings_and_logits(name, reading):
    clf = classifier(name)
    clip = clip_for(clf)
    slow = copy.deepcopy(clf)
    with torch.no_grad(), probabilities_of(slow) as full:
        expected = slow(clip)
    with torch.no_grad():
        plain = clf(clip)
        logits, readings = read(clf, clip, reading)
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-6 * max(1, plain.abs().max().item()))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert list(readings) == sites_of(clf)  # all of them, in the order in which they ran
    for site, value in readings.items():
        torch.testing.assert_close(value, OF_FULL[reading](full[site.module]), rtol=0, atol=1e-5)
        far = full[site.module].amax(-1) * full[site.module].shape[-1]
        assert far.mean() > 1.2, f"attention at {site.module} is nearly uniform: this test would see nothing"


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "videoprism", *OWN])
def test_gradients_pass_a_reading_unchanged(name, reading):
    clf = classifier(name)
    clip = clip_for(clf).requires_grad_()
    plain = clf(clip)[:, 1].sum()
    (expected,) = torch.autograd.grad(plain, clip)
    logits, readings = read(clf, clip, reading)
    gradients = torch.autograd.grad(
        logits[:, 1].sum(), [clip, *(readings.values() if reading == "probabilities" else [])]
    )
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    assert all(slope.abs().sum() > 0 for slope in gradients[1:])  # the probabilities are on the way to the logits
    if reading in ("column_means", "head_mean"):
        assert not any(value.requires_grad for value in readings.values())


def test_gradient_of_probabilities_is_a_finite_difference():
    """For nn.MultiheadAttention, whose own weights have no gradient: d logit / d A by moving A."""
    clf = own("mha").double()
    clip = clip_for(clf, batch=1, dtype=torch.float64)
    site = sites_of(clf)[-1]
    with capture(clf.module, [site], READINGS["probabilities"]) as readings:
        logit = clf(clip)[0, 1]
    (slope,) = torch.autograd.grad(logit, readings[site])
    module, step = clf.module.get_submodule(site.module), 1e-4
    x = torch.empty(0)
    handle = module.register_forward_pre_hook(lambda module, args: globals().__setitem__("_x", args[0]))
    with torch.no_grad():
        clf(clip)
    handle.remove()
    x = globals().pop("_x")
    v = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)[2].unflatten(-1, (2, -1)).transpose(1, 2)
    for head, token in ((0, 3), (1, 0), (1, 17)):
        delta = torch.zeros_like(readings[site])
        delta[0, head, 0, token] = step  # what the class token takes from one token in one head
        moved = F.linear((delta @ v).transpose(1, 2).flatten(2), module.out_proj.weight)
        expected = (moved[0, 0] @ clf.module.head.weight[1]) / step
        torch.testing.assert_close(slope[0, head, 0, token], expected, rtol=1e-6, atol=1e-9)


def test_vivit_keeps_its_attention_mask():
    clf = tiny("vivit")
    clip = clip_for(clf)
    mask = torch.ones(2, 25, dtype=torch.long)
    mask[0, 3:9] = 0
    for reading in READINGS:
        for implementation in ("sdpa", "eager"):
            clf.module.set_attn_implementation(implementation)
            with torch.no_grad():
                plain = clf.module(clip, attention_mask=mask).logits
                with capture(clf.module, sites_of(clf), READINGS[reading]) as readings:
                    logits = clf.module(clip, attention_mask=mask).logits
                assert (plain - clf(clip)).abs().max() > 1e-2  # the mask matters
            torch.testing.assert_close(logits, plain, rtol=0, atol=1e-5)
            for value in readings.values():
                assert value[0, ..., 3:9].abs().max() < 1e-6 < value[1, ..., 3:9].abs().max()
    # a module that makes its mask from the config lent to it: without a function of that name it would make none
    assert ALL_MASK_ATTENTION_FUNCTIONS["captum_staa"] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.parametrize("reading", READINGS)
def test_videoprism_keeps_its_softcap(reading):
    clf = tiny("videoprism")
    clip = clip_for(clf)
    with torch.no_grad():
        logits, capped = read(clf, clip, reading)
        for layer in (*clf.module.vision_model.spatial_layers, *clf.module.vision_model.temporal_layers):
            layer.attention.attn_logit_softcapping = None
        uncapped_logits, uncapped = read(clf, clip, reading)
        torch.testing.assert_close(uncapped_logits, clf(clip), rtol=0, atol=1e-5)
    assert (logits - uncapped_logits).abs().max() > 1e-3
    first = sites_of(clf)[0]
    assert (capped[first] - uncapped[first]).abs().max() > 1e-3


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vjepa2", "videoprism", "sdpa", "mha"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-5), (torch.bfloat16, 0.15)])
def test_other_precisions(name, reading, dtype, close):
    clf = classifier(name).to(dtype)
    clip = clip_for(clf, dtype=dtype)
    with torch.no_grad():
        plain = clf(clip)
        logits, readings = read(clf, clip, reading)
        _, single = read(copy.deepcopy(clf).float(), clip.float(), reading)
    assert logits.dtype == plain.dtype == dtype
    # transformers' eager code takes the softmax in float32 whatever came; ours keeps float64
    exact = 1e-10 if dtype == torch.float64 and name != "videoprism" else close
    torch.testing.assert_close(logits, plain, rtol=exact, atol=exact)
    for site, value in readings.items():
        assert value.dtype == (dtype if reading == "probabilities" else torch.float32)
        torch.testing.assert_close(value.float(), single[site], rtol=0, atol=close)


# --- nothing is left behind -------------------------------------------------------------------------------------


class _Boom(Exception):
    pass


def _boom(*args: Any) -> None:
    raise _Boom


@pytest.mark.parametrize("end", ["success", "stop", "model raises", "reader raises", "site missing", "never run"])
@pytest.mark.parametrize("name", ["videomae", "timesformer", "vivit", "vjepa2", "videoprism", "sdpa", "mha"])
def test_nothing_is_left(name, end):
    clf = classifier(name)
    clip, sites = clip_for(clf), sites_of(clf)
    parameters = list(clf.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.ones_like(parameters[1])
    clf.module.get_submodule(sites[0].module).training = True
    if name in ("videomae", "vivit"):
        clf.module.config.output_hidden_states = True  # transformers' own collector runs, too
        clf(clip)
    before, global_stance = snapshot(clf), torch._dynamo.eval_frame._stance
    plain = clf(clip)
    bad = [*sites, AttentionSite("head.nowhere", 99)] if end == "site missing" else sites
    reader = _boom if end == "reader raises" else READINGS["head_mean"]
    handle = clf.module.get_submodule(sites[-1].module).register_forward_pre_hook(_boom)
    if end != "model raises":
        handle.remove()
    errors = {"model raises": _Boom, "reader raises": _Boom, "site missing": ValueError, "never run": ValueError}
    reached = False
    try:
        with capture(clf.module, bad, reader, stop=end == "stop") as readings:
            if end != "never run":
                clf(clip)
                reached = True
    except (_Boom, ValueError) as error:
        raised: type | None = type(error)
    else:
        raised = None
        assert list(readings) == sites
    assert raised is errors.get(end)
    assert reached == (end == "success")
    handle.remove()
    assert snapshot(clf) == before
    assert torch._dynamo.eval_frame._stance is global_stance
    torch.testing.assert_close(clf(clip), plain, rtol=0, atol=0)
    again, _ = read(clf, clip)  # and a next capture works
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)


def test_stop_ends_the_forward_after_the_last_site():
    clf = tiny("videomae")
    ran: list[str] = []
    for i, layer in enumerate(clf.module.videomae.encoder.layer):
        layer.output.register_forward_hook(lambda *_, i=i: ran.append(f"mlp {i}"))
    clf.module.classifier.register_forward_hook(lambda *_: ran.append("head"))
    with torch.no_grad(), capture(clf.module, sites_of(clf)[:1], READINGS["row"], stop=True) as readings:
        clf(clip_for(clf))
    assert ran == [] and len(readings) == 1
    with torch.no_grad(), capture(clf.module, sites_of(clf)[1:], READINGS["row"], stop=True):
        clf(clip_for(clf))
    assert ran == ["mlp 0"]


def test_a_model_that_catches_everything_cannot_catch_the_stop():
    class Careful(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, clip: Tensor) -> Tensor:
            try:
                return self.inner(clip)
            except Exception:
                return torch.zeros(1, 3)

    clf = own("sdpa")
    site = AttentionSite("inner.blocks.1.attn", 1)
    with torch.no_grad(), capture(Careful(clf.module), [site], READINGS["row"], stop=True) as readings:
        Careful(clf.module)(clip_for(clf))
    # another module than the captured one wraps it: the site is found all the same, and has been read
    assert list(readings) == [site]


# --- captures beside and inside each other ----------------------------------------------------------------------


def _same(readings: dict, expected: dict) -> None:
    assert list(readings) == list(expected)
    for site, value in readings.items():
        torch.testing.assert_close(value, expected[site], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["videomae", "timesformer", "sdpa", "mha"])
def test_nested_captures(name):
    """Each reads the forwards of its own block alone, and the inner one may run inside the outer one's reader."""
    clf = classifier(name)
    first, second = clip_for(clf, seed=1), clip_for(clf, seed=2)
    sites = sites_of(clf)
    with torch.no_grad():
        alone = [read(clf, clip)[1] for clip in (first, second)]
        with capture(clf.module, sites, READINGS["head_mean"]) as outer:
            with capture(clf.module, sites[-1:], READINGS["head_mean"]) as inner:
                clf(second)
            assert not outer
            clf(first)
        _same(inner, {sites[-1]: alone[1][sites[-1]]})
        _same(outer, alone[0])

        def reader(call: AttentionCall) -> Tensor:
            with capture(clf.module, sites, READINGS["head_mean"]) as within:
                clf(second)
            _same(within, alone[1])
            return call.head_mean()

        with capture(clf.module, sites, reader) as outer:
            logits = clf(first)
        torch.testing.assert_close(logits, clf(first), rtol=0, atol=1e-5)
        _same(outer, alone[0])


@pytest.mark.parametrize("name", ["videomae", "timesformer", "sdpa", "mha"])
def test_threads(name):
    """Two threads read one model, a third another one of its kind, and a fourth runs plain forwards meanwhile."""
    clf = classifier(name)
    other = copy.deepcopy(clf)
    clips = [clip_for(clf, seed=seed) for seed in range(4)]
    with torch.no_grad():
        plain = [clf(clip) for clip in clips]
        alone = [read(clf, clip)[1] for clip in clips]
    before = snapshot(clf), snapshot(other), torch._dynamo.eval_frame._stance
    errors: list[BaseException] = []
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        try:
            torch.set_num_threads(1)
            barrier.wait()
            with torch.no_grad():
                for turn in range(12):
                    model, clip = (other if index == 2 else clf), clips[index]
                    if index == 3:
                        logits, readings = model(clip), {}
                    else:
                        logits, readings = read(model, clip, stop=turn % 3 == 2)
                    if logits.numel():
                        torch.testing.assert_close(logits, plain[index], rtol=0, atol=1e-5)
                    assert index == 3 or len(readings) == len(sites_of(clf))
                    for site, value in readings.items():
                        torch.testing.assert_close(value, alone[index][site], rtol=0, atol=1e-6)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert (snapshot(clf), snapshot(other), torch._dynamo.eval_frame._stance) == before


def test_captures_that_overlap_in_time_restore_the_model_and_the_compiler():
    """First in, first out: the order in which a naive 'put back what was there' leaves the first one's state."""
    clf = tiny("vivit")
    before, stance = snapshot(clf), torch._dynamo.eval_frame._stance
    steps = [threading.Event() for _ in range(3)]

    def first() -> None:
        with capture(clf.module, sites_of(clf), READINGS["row"]):
            steps[0].set()
            steps[1].wait()
            clf(clip_for(clf))
        steps[2].set()

    def second() -> None:
        steps[0].wait()
        with capture(clf.module, sites_of(clf), READINGS["row"]):
            steps[1].set()
            steps[2].wait()
            assert torch._dynamo.eval_frame._stance.stance == "force_eager"
            clf(clip_for(clf))

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot(clf) == before
    assert torch._dynamo.eval_frame._stance is stance


def test_a_copy_made_after_use_is_independent():
    clf = tiny("videomae")
    clip = clip_for(clf)
    with torch.no_grad():
        plain, readings = read(clf, clip)
        twin = copy.deepcopy(clf)
        for parameter in clf.parameters():
            parameter.zero_()
        logits, again = read(twin, clip)
    assert torch.equal(logits, plain) and all(torch.equal(again[site], readings[site]) for site in readings)


# --- what cannot be read says so --------------------------------------------------------------------------------


def test_errors():
    clf = own("sdpa")
    clip = clip_for(clf)
    with pytest.raises(ValueError, match="pass at least one AttentionSite"), capture(clf.module, [], _boom):
        pass
    with (
        pytest.raises(ValueError, match=r"OwnViT has no module 'blocks\.9\.attn'.*named_modules"),
        capture(clf.module, [AttentionSite("blocks.9.attn", 0)], READINGS["row"]),
    ):
        clf(clip)
    with (
        pytest.raises(ValueError, match=r"no attention at \['blocks\.0\.norm'\]; a site with door='call' must"),
        capture(clf.module, [AttentionSite("blocks.0.norm", 0)], READINGS["row"]),
    ):
        clf(clip)


def test_a_module_that_attends_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = CallsSdpa(16, 2), CallsSdpa(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    clf = VideoClassifier(randomise(OwnViT(Twice), 0), family=own_family())
    clip, before = clip_for(clf), snapshot(clf)
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn' computes attention more than once.*declare the module"):
        read(clf, clip)
    assert snapshot(clf) == before
    inside = [AttentionSite("blocks.0.attn.b", 0)]
    with torch.no_grad(), capture(clf.module, inside, READINGS["head_mean"]) as readings:
        clf(clip)
    assert len(readings) == 1


def test_an_attention_that_failed_does_not_lend_its_name_to_the_next():
    class Fallback(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.broken, self.sound = nn.Module(), CallsSdpa(16, 2)
            self.broken.forward = _boom  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.broken(x)
            except _Boom:
                return self.sound(x)
            raise AssertionError

    clf = VideoClassifier(randomise(OwnViT(Fallback), 0), family=own_family())
    sites = [AttentionSite("blocks.0.attn.broken", 0)]
    with pytest.raises(ValueError, match="computed no attention"), capture(clf.module, sites, READINGS["row"]):
        clf(clip_for(clf))


class _Shapes(nn.Module):
    """One call of F.scaled_dot_product_attention with given operands."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> None:
        super().__init__()
        self.operands, self.options = (query, key, value), options
        self.inner = nn.Identity()
        self.inner.forward = lambda: F.scaled_dot_product_attention(*self.operands, **self.options)  # type: ignore

    def forward(self) -> Tensor:
        return self.inner()


def explicit_sdpa(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None, causal: bool) -> Tensor:
    scores = torch.einsum("...qd,...nd->...qn", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        bias = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if bias is not None:
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(-1).nan_to_num(0)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(
    ("lead", "options"),
    [
        ((2, 3), {}),
        ((2, 3), {"scale": 0.7}),
        ((2, 3), {"is_causal": True}),
        ((2, 3), {"attn_mask": torch.randn(5, 7, generator=torch.Generator().manual_seed(0))}),
        ((2, 3), {"attn_mask": torch.randn(2, 1, 5, 7) > 0}),
        ((2, 3), {"attn_mask": torch.tensor([True, True, False, True, True, False, True])[None]}),
        ((2, 3), {"attn_mask": torch.tensor([True, False, True, True, True])[:, None].expand(5, 7)}),
        ((4,), {}),  # no axis of heads
        ((4,), {"attn_mask": torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))}),
        ((2, 4, 3), {}),  # two batch axes
        ((2, 4, 3), {"attn_mask": torch.randn(2, 1, 3, 5, 7, generator=torch.Generator().manual_seed(0))}),
        ((2, 4, 3), {"attn_mask": torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) > -1}),
        ((2, 6), {"enable_gqa": True}),
    ],
)
def test_every_form_of_scaled_dot_product_attention(lead, options, reading):
    generator = torch.Generator().manual_seed(3)
    shared = (*lead[:-1], 3) if options.get("enable_gqa") else lead
    q = torch.randn(*lead, 5, 4, generator=generator)
    k, v = (torch.randn(*shared, 7, d, generator=generator) for d in (4, 6))
    model = _Shapes(q, k, v, **options)
    with torch.no_grad():
        plain = model()
        with capture(model, [AttentionSite("inner", 0)], READINGS[reading]) as readings:
            output = model()
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-5)
    if options.get("enable_gqa"):
        k = k.repeat_interleave(2, -3)
    full = explicit_sdpa(q, k, options.get("attn_mask"), options.get("scale"), options.get("is_causal", False))
    full = full[:, None] if len(lead) == 1 else full.flatten(0, len(lead) - 2)
    (value,) = readings.values()
    torch.testing.assert_close(value, OF_FULL[reading](full), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reading", READINGS)
def test_multihead_masks_and_options(reading):
    """Masks, unbatched input, weights on request, extra keys: whatever nn.MultiheadAttention takes."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 8, generator=generator) for n in (5, 6))
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    blocked = torch.ones(5, 6, dtype=torch.bool).triu(2)
    cases: list[tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = [
        ({}, (x, y, y), {"key_padding_mask": padding}),
        ({}, (x, y, y), {"attn_mask": blocked}),
        ({}, (x, y, y), {"attn_mask": blocked, "key_padding_mask": padding, "average_attn_weights": False}),
        ({}, (x[0], y[0], y[0]), {}),
        ({}, (x[0], y[0], y[0]), {"average_attn_weights": False}),
        ({"add_bias_kv": True, "add_zero_attn": True}, (x, y, y), {}),
        ({"kdim": 3, "vdim": 4}, (x, y[..., :3], y[..., :4]), {}),
    ]
    for made, operands, options in cases:
        model = nn.Module()
        model.inner = randomise(nn.MultiheadAttention(8, 2, batch_first=True, **made), 1)
        model.forward = model.inner.forward  # type: ignore[method-assign]
        with torch.no_grad():
            plain, weights = model.inner(*operands, **options)
            _, full = model.inner(*operands, **{**options, "average_attn_weights": False})
            with capture(model, [AttentionSite("inner", 0)], READINGS[reading]) as readings:
                output, same = model.inner(*operands, **options)
        torch.testing.assert_close(output, plain, rtol=0, atol=1e-6)
        torch.testing.assert_close(same, weights, rtol=0, atol=1e-6)
        full = full if full.ndim == 4 else full[None]
        (value,) = readings.values()
        torch.testing.assert_close(value, OF_FULL[reading](full), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vivit", "sdpa", "mha"])
def test_a_model_in_training_keeps_its_dropout(name):
    """Attention that is dropped out stays so: a reading beside it uses up the same random numbers."""
    clf = classifier(name)
    for module in clf.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.5
    if name == "sdpa":
        for block in clf.module.blocks:
            block["attn"].forward = _dropping(block["attn"])
    clf.train()
    clip = clip_for(clf)
    for reading in ("row", "column_means", "head_mean"):
        with torch.no_grad():
            torch.manual_seed(5)
            if name == "mha":  # asked for weights, torch drops out by other random numbers than if not
                outcomes = {round(read(clf, clip, reading)[0][0, 0].item(), 5) for _ in range(4)}
                assert len(outcomes) == 4
                continue
            plain = clf(clip)
            assert (plain - clf(clip)).abs().max() > 1e-4
            torch.manual_seed(5)
            logits, _ = read(clf, clip, reading)
        torch.testing.assert_close(logits, plain, rtol=0, atol=1e-6)


def _dropping(module: CallsSdpa) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        q, k, v = module.qkv(x).unflatten(-1, (3, module.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        dropped = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if module.training else 0.0)
        return module.out(dropped.transpose(1, 2).flatten(2))

    return forward


@pytest.mark.parametrize("fast", ["mha", "encoder layer"])
def test_fused_kernels_do_not_run_past_the_door(fast):
    """In eval mode and without gradients torch takes one fused kernel for all of these."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    model = nn.Sequential(layer) if fast == "mha" else nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    randomise(model, 0)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    name = "0" if fast == "mha" else "self_attn"

    def run() -> Tensor:
        return model[0](x, x, x)[0] if fast == "mha" else model(x)  # type: ignore[index]

    with torch.no_grad():
        plain = run()
        with capture(model, [AttentionSite(name, 0)], READINGS["head_mean"]) as readings:
            output = run()
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-5)
    (matrix,) = readings.values()
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, 5))


# --- tiles --------------------------------------------------------------------------------------------------------

BIASES: dict[str, tuple[int, ...] | None] = {
    "none": None,
    "(N)": (1, 9),
    "(Q, N)": (6, 9),
    "(h, Q, N)": (3, 6, 9),
    "(B, 1, 1, N)": (2, 1, 1, 9),
    "(B, 1, Q, N)": (2, 1, 6, 9),
    "(1, h, Q, 1)": (1, 3, 6, 1),
    "(B, h, Q, N)": (2, 3, 6, 9),
}


@pytest.mark.parametrize("budget", [1, 7, 20, 100, 250, 1 << 18])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("boolean", [False, True])
def test_tiles_of_any_size(monkeypatch, budget, bias, boolean):
    """The tiles' cuts fall between rows, between heads and between examples; none of it shows."""
    monkeypatch.setattr(tiles, "CPU_TILE_PER_THREAD", budget)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, d, generator=generator) for n, d in ((6, 4), (9, 4), (9, 5)))
    shape = BIASES[bias]
    mask = None if shape is None else torch.randn(shape, generator=generator)
    if mask is not None and boolean:
        mask = mask > -0.7
    softcap = 1.5
    x = tiles.Operands(q, k, v, 0.6, mask, softcap)
    scores = softcap * torch.tanh(0.6 * torch.einsum("bhqd,bhnd->bhqn", q, k) / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if boolean else scores + mask
    full = scores.softmax(-1).nan_to_num(0)
    output, columns = tiles.attend_and_average_rows(x)
    torch.testing.assert_close(output, full @ v)
    torch.testing.assert_close(columns, full.mean((1, 2)))
    output, matrix = tiles.attend_and_average_heads(x)
    torch.testing.assert_close(output, full @ v)
    torch.testing.assert_close(matrix, full.mean(1))
    torch.testing.assert_close(tiles.average_rows(x), full.mean((1, 2)))
    torch.testing.assert_close(tiles.average_heads(x), full.mean(1))
    for capped in (x, dataclasses.replace(x, softcap=None)):
        plain = full if capped is x else explicit_sdpa(q, k, mask, 0.6, False)
        for width in (1, 4):  # narrower and wider, with the values, than a query
            columns = torch.randn(2, 9, width, generator=generator)
            output, carried = tiles.attend_and_carry(dataclasses.replace(capped, value=v[..., :2]), columns)
            torch.testing.assert_close(output, plain @ v[..., :2], rtol=0, atol=1e-5)
            torch.testing.assert_close(carried, plain.mean(1) @ columns, rtol=0, atol=1e-5)
    torch.testing.assert_close(x.probabilities(), full)
    torch.testing.assert_close(x.probabilities(slice(2, 5)), full[:, :, 2:5])
    torch.testing.assert_close(x.row(4), full[:, :, 4].mean(1))


@pytest.mark.parametrize("name", NAMES)
def test_tile_size_changes_no_number(monkeypatch, name):
    clf = tiny(name)
    clip = clip_for(clf, batch=3)
    with torch.no_grad():
        for reading in ("column_means", "head_mean"):
            monkeypatch.undo()
            logits, readings = read(clf, clip, reading)
            monkeypatch.setattr(tiles, "CPU_TILE_PER_THREAD", 11)
            small_logits, small = read(clf, clip, reading)
            torch.testing.assert_close(small_logits, logits, rtol=0, atol=1e-5)
            for site in readings:
                torch.testing.assert_close(small[site], readings[site], rtol=0, atol=1e-6)


def test_tiles_are_bounded(monkeypatch):
    """No tile is larger than its budget allows, and none is smaller than one row."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x = tiles.Operands(torch.randn(2, 3, 50, 4), torch.randn(2, 3, 40, 4), torch.randn(2, 3, 40, 4), 1.0)
    for budget in (1, 79, 80, 2000, 4000, 4001, 10**6):
        monkeypatch.setattr(tiles, "CPU_TILE_PER_THREAD", budget)
        covered = torch.zeros(6, 50)
        for group, rows, tile in tiles._tiles(x, None):
            assert tile.numel() <= max(budget, 40)
            covered[group, rows] += 1
        assert covered.eq(1).all()


def test_flash_attentions_two_dimensional_mask():
    """Flash attention is handed (B, N); on a CPU it cannot run, but its mask can be read."""
    clf = tiny("vivit")
    site = sites_of(clf)[0]
    module = clf.module.get_submodule(site.module)
    q = torch.randn(2, 2, 25, 12, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(2, 25, dtype=torch.long)
    keep[1, 20:] = 0
    wrapper = _Calls(module, q, keep)
    with (
        torch.no_grad(),
        capture(wrapper, [AttentionSite("inner", 0, "joint", "interface")], READINGS["head_mean"]) as r,
    ):
        wrapper()
    (matrix,) = r.values()
    assert matrix[1, :, 20:].max() == 0 < matrix[0, :, 20:].min()


class _Calls(nn.Module):
    def __init__(self, inner: nn.Module, q: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.inner, self.q, self.mask = inner, q, mask

    def forward(self) -> Any:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.inner.config._attn_implementation, None)
        return attend(self.inner, self.q, self.q, self.q, self.mask, scaling=0.3)


def test_a_forward_that_ends_early_keeps_no_activation_alive():
    """The exception that ends it knows the frames, and the frames the activations: nothing may hold on to it."""
    clf = VideoClassifier.from_pretrained("tiny-vivit-pattern")
    seen = []
    handle = clf.module.vivit.embeddings.register_forward_hook(lambda m, a, out: seen.append(weakref.ref(out)))
    gc.collect()
    gc.disable()
    try:
        STAA(clf, mode="attention", layers=[-1]).attribute(torch.zeros(1, 16, 3, 48, 48))
        assert seen[0]() is None
    finally:
        gc.enable()
        handle.remove()
