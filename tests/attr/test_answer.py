"""Attribution of the tokens of an answer: equal to slow formulas, and what it leaves as it was."""

from __future__ import annotations

import copy

import pytest
import slow_answer
import torch
from tiny_language import FAMILIES, clips_of, question, size_of, tiny_vlm
from torch import nn

from captum_staa import AnswerAttribution, VideoLanguageModel, baselines
from captum_staa.attention.decomposition import decompose
from captum_staa.attr.answer import contrast, contributions
from captum_staa.models import AnswerClassifier

ANSWER = "it is right"
NAME = "qwen3_vl"


def classifier(name: str = NAME, versus=None) -> AnswerClassifier:
    return tiny_vlm(name).as_classifier(question(name), ANSWER, versus)


# --- relevance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_is_that_of_a_model_frozen_module_by_module(name):
    clip, clf = clips_of(name, 2), classifier(name, "left")
    maps, logits = contributions(clip, clf, [0, 2, 3])
    with torch.no_grad():
        assert torch.allclose(clf.scores(logits), clf(clip), atol=1e-5)
    for found, token in zip(maps, (0, 2, 3), strict=True):
        expected = slow_answer.relevance(clf, clip, token)
        assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_and_constants_sum_to_the_score(name):
    """``decompose`` counts the share of constants independently, and warns if a part of the score is missing."""
    clip, clf = clips_of(name), classifier(name, "left")
    prompt = clf.prompt_for(clip)
    result = decompose(
        _Logits(clf, prompt), clip, lambda logits: contrast(logits.unflatten(1, (3, -1)), clf)[:, 2], pattern_weight=0
    )
    (found,), _ = contributions(clip, clf, [2])
    assert torch.allclose(found, result.contributions.sum(2), atol=1e-5)
    assert result.remainder.abs() < 1e-3 * result.score.abs() + 1e-3


def test_an_operation_without_a_rule_is_named():
    clip, clf = clips_of(NAME), classifier()
    norm = next(module for name, module in clf.named_modules() if name.endswith("layers.0.post_attention_layernorm"))
    handle = norm.register_forward_hook(lambda module, inputs, output: output + output.logsumexp(-1, keepdim=True))
    with pytest.warns(UserWarning, match="got LogsumexpBackward0. Contributions are a first-order approximation"):
        contributions(clip, clf, [0])
    handle.remove()


class _Logits(nn.Module):
    def __init__(self, clf, prompt):
        super().__init__()
        self.vlm, self.answer, self.prompt = clf.vlm, clf.answer, prompt

    def forward(self, clip):
        return self.vlm.answer_logits(clip, self.prompt, self.answer).flatten(1)


def test_without_other_words_a_token_is_explained_against_the_mean_of_the_vocabulary():
    vlm, clip, clf = tiny_vlm(NAME), clips_of(NAME), classifier()
    with torch.no_grad():
        logits = vlm.answer_logits(clip, vlm.prompt(question(NAME), size_of(NAME)), clf.answer)[0, 2]
    rest = torch.ones(len(logits), dtype=torch.bool).index_fill(0, clf.answer[2], False)
    scores = contrast(contributions(clip, clf, [2])[1], clf)
    assert torch.isclose(scores[0, 2], logits[clf.answer[2]] - logits[rest].mean(), atol=1e-5)


def test_maps_are_contributions_merged_over_neighboring_patches():
    clip, clf = clips_of(NAME), classifier(versus="left")
    (raw,), _ = contributions(clip, clf, [2], 0.125)
    joint = AnswerAttribution(clf).attribute_maps(clip, target=2).joint
    assert torch.allclose(joint.sum((1, 2, 3)), raw.sum((1, 2, 3)), atol=1e-4)  # sums are kept
    assert torch.allclose(joint, slow_answer.merged(raw, patch=4), atol=1e-5)


def test_each_clip_has_its_own_token_and_a_batch_equals_single_clips():
    clips, method = clips_of(NAME, 3), AnswerAttribution(classifier())
    together = method.attribute(clips, target=[2, 0, 3])
    for i, target in enumerate((2, 0, 3)):
        assert torch.allclose(together[i], method.attribute(clips[i : i + 1], target=target)[0], atol=1e-5)
    whole = sum(method.attribute(clips[2:], target=at) for at in range(3))
    assert torch.allclose(together[2:], whole, atol=1e-5)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_that_of_eager_code(name):
    clip, clf = clips_of(name, 2), classifier(name)
    tokens = clf.prompt_for(clip).tokens
    method = AnswerAttribution(clf, mode="attention")
    for target in (0, 2, 3):
        maps = method.attribute_maps(clip, target=target)
        assert torch.allclose(tokens.from_pixels(maps.joint), slow_answer.attention(clf, clip, target), atol=1e-5)
        assert (maps.joint.sum((1, 2, 3)) < 1).all()


# --- whole answers --------------------------------------------------------------------------------------------------


def test_maps_of_an_answer_are_those_of_its_tokens_and_reliance_compares_two_clips():
    clip, vlm = clips_of(NAME), tiny_vlm(NAME)
    method = AnswerAttribution(vlm)
    others = clips_of(NAME, 3, seed=5)
    maps = method.attribute_answer(clip, question(NAME), ANSWER, "left", counterfactual=others)
    clf = classifier()
    for i in range(3):
        expected = AnswerAttribution(classifier(versus="left")).attribute_maps(clip, target=i)
        assert torch.allclose(maps.joint[i], expected.joint[0], atol=1e-5)
    with torch.no_grad():
        own, without = clf(clip)[0, :3], clf(others)[:, :3]
    assert torch.allclose(maps.log_probabilities, own, atol=1e-5)
    assert torch.allclose(maps.falls, own - without, atol=1e-5)
    assert torch.equal(maps.reliance, maps.falls.amax(0))
    assert maps.tokens == ("it", "is", "right") and torch.equal(maps.ids, clf.answer)
    assert torch.allclose(maps.temporal, maps.joint.sum((2, 3))) and torch.allclose(maps.spatial, maps.joint.sum(1))
    assert "right" in str(maps) and "reliance" in str(maps)
    usual = AnswerAttribution(clf).attribute_answer(clip)
    blurred = AnswerAttribution(clf).attribute_answer(clip, counterfactual=baselines.blur)
    functions = (baselines.blur, baselines.mean_frame, baselines.reverse)
    with torch.no_grad():
        falls = own - torch.cat([clf(function(clip, "BTCHW"))[:, :3] for function in functions])
    assert torch.allclose(usual.falls, falls, atol=1e-5) and torch.allclose(blurred.falls, falls[:1], atol=1e-5)


def test_without_an_answer_the_model_gives_its_own():
    clip, vlm = clips_of("smolvlm"), tiny_vlm("smolvlm")
    maps = AnswerAttribution(vlm, mode="attention").attribute_answer(clip, question("smolvlm"))
    assert torch.equal(maps.ids, vlm.generate(clip, question("smolvlm")))


# --- state and bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["relevance", "attention"])
def test_model_and_clip_are_as_before_also_after_an_error(mode):
    vlm = VideoLanguageModel(copy.deepcopy(tiny_vlm(NAME).model).train(), tiny_vlm(NAME).processor)
    clf, clip = vlm.as_classifier(question(NAME), ANSWER), clips_of(NAME)
    vlm.model.model.rope_deltas = None
    state = {key: value.clone() for key, value in vlm.state_dict().items()}
    configs = [module.config._attn_implementation for module in vlm.model.modules() if hasattr(module, "config")]
    method = AnswerAttribution(clf, mode=mode)
    before = torch.get_rng_state()
    method.attribute(clip, target=1)
    with pytest.raises(ZeroDivisionError), _failing(vlm.model.lm_head):
        method.attribute(clip, target=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in vlm.model.modules())
    assert all(p.requires_grad and p.grad is None for p in vlm.parameters()) and not clip.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in vlm.state_dict().items())
    after = [module.config._attn_implementation for module in vlm.model.modules() if hasattr(module, "config")]
    assert after == configs and vlm.model.model.rope_deltas is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vlm.model.modules())


def _failing(module: nn.Module):
    def fail(*_):
        raise ZeroDivisionError

    return module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("mode", ["relevance", "attention"])
def test_one_forward_is_enough_for_all_tokens(mode):
    clf, clip, calls = classifier(), clips_of(NAME), []
    handle = clf.vlm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        AnswerAttribution(clf, mode=mode).attribute(clip, target=2)
        assert len(calls) == 1
        AnswerAttribution(clf, mode=mode).attribute_answer(clip)
        assert len(calls) == 5  # and one for each of three counterfactual clips
    finally:
        handle.remove()


def test_embeddings_that_require_gradients_change_nothing():
    """PEFT and gradient checkpointing make the embeddings of text a leaf of the graph."""
    clip, model = clips_of(NAME), copy.deepcopy(tiny_vlm(NAME).model)
    model.enable_input_require_grads()
    clf = VideoLanguageModel(model, tiny_vlm(NAME).processor).as_classifier(question(NAME), ANSWER, "left")
    (found,), _ = contributions(clip, clf, [2])  # warnings are errors
    assert torch.equal(found, contributions(clip, classifier(versus="left"), [2])[0][0])


@pytest.mark.filterwarnings("ignore")  # torch deprecates quantize_dynamic, and warns about missing backward passes
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("all", r"without a backward pass.*model\.visual\.blocks\.0\.attn\.qkv' \(Linear\)"),
        # residual connections pass the quantized layers by
        ("down_proj", r"without a backward pass.*model\.language_model\.layers\.0\.mlp\.down_proj' \(Linear\)"),
        ("no_grad", r"needs a gradient of the logits with respect to the clip, got none\."),
    ],
)
def test_a_model_without_the_gradient_of_the_clip_is_an_error_of_relevance_alone(part, message):
    model, clip = copy.deepcopy(tiny_vlm(NAME).model), clips_of(NAME)
    if part == "no_grad":
        model.model.visual.forward = torch.no_grad()(model.model.visual.forward)
    else:
        names = {
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and part in (name.split(".")[-1], "all")
        }
        model = torch.ao.quantization.quantize_dynamic(model, names, dtype=torch.qint8)
    clf = VideoLanguageModel(model, tiny_vlm(NAME).processor).as_classifier(question(NAME), ANSWER)
    with pytest.raises(ValueError, match=message):
        AnswerAttribution(clf).attribute(clip, target=2)
    found, full = (AnswerAttribution(each, mode="attention").attribute(clip, target=2) for each in (clf, classifier()))
    assert torch.allclose(found, full, atol=0.1 * float(full.max()))


def test_bad_input_is_refused():
    clip, clf, vlm = clips_of(NAME), classifier(), tiny_vlm(NAME)
    with pytest.raises(TypeError, match=r"must be a VideoLanguageModel or what its as_classifier.*got Linear"):
        AnswerAttribution(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="mode must be one of"):
        AnswerAttribution(clf, mode="rollout")
    with pytest.raises(ValueError, match="pattern_weight must be a finite number"):
        AnswerAttribution(clf, pattern_weight=-1)
    with pytest.raises(TypeError, match="which does not know prompt and answer"):
        AnswerAttribution(vlm).attribute(clip, target=0)
    with pytest.raises(ValueError, match="target must not be None"):
        AnswerAttribution(clf).attribute(clip)
    with pytest.raises(ValueError, match="target must be a valid index"):
        AnswerAttribution(clf).attribute(clip, target=9)
    with pytest.raises(ValueError, match="additional_forward_args must be None"):
        AnswerAttribution(clf).attribute(clip, target=0, additional_forward_args=(1,))
    with pytest.raises(ValueError, match="prompt is required"):
        AnswerAttribution(vlm).attribute_answer(clip)
    with pytest.raises(ValueError, match="must be one clip, got a batch of 2"):
        AnswerAttribution(clf).attribute_answer(clips_of(NAME, 2))
    with pytest.raises(ValueError, match=r"counterfactual must be clips of shape \(5, 3, 16, 24\)"):
        AnswerAttribution(clf).attribute_answer(clip, counterfactual=clip[:, :4])
    for wrong in ("blur", [], [clip]):
        with pytest.raises(TypeError, match="counterfactual must be clips"):
            AnswerAttribution(clf).attribute_answer(clip, counterfactual=wrong)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        AnswerAttribution(clf).attribute(clip, target=0)


def test_a_prompt_in_place_of_a_target_names_attribute_answer():
    with pytest.raises(TypeError, match=r"got a VideoLanguageModel.*or attribute_answer\(\)"):
        AnswerAttribution(tiny_vlm(NAME)).attribute(clips_of(NAME), "which came first ?")
