"""Captum's LLMAttribution on video: its own class fails, and the repaired one equals a hand computation."""

from __future__ import annotations

import pytest
import torch
from captum.attr import FeatureAblation, ShapleyValues
from tiny_language import FAMILIES, clips_of, question, size_of, tiny_vlm, tokenizer

from captum_staa import baselines, feature_masks
from captum_staa.attr import VideoLLMAttribution, VideoMaskInput

ANSWER = "it is right"


def by_hand(name: str, clip) -> torch.Tensor:
    """Sum and values of the log-probabilities of the tokens, from a forward for each."""
    vlm = tiny_vlm(name)
    prompt = vlm.prompt(question(name), size_of(name))
    ids = tokenizer().convert_tokens_to_ids(["it", "\u0120is", "\u0120right"])
    logs = []
    with torch.no_grad():
        for i, own in enumerate(ids):
            arguments = vlm.inputs(clip, prompt, torch.tensor(ids[:i], dtype=torch.long))
            logs.append(vlm.model(**arguments).logits[0, -1].log_softmax(-1)[own])
    return torch.stack([sum(logs), *logs])


@pytest.mark.parametrize("name", FAMILIES)
def test_feature_ablation_equals_a_hand_computation(name):
    vlm, clip = tiny_vlm(name), clips_of(name)
    mask = feature_masks.frames(clip, "BTCHW")
    inp = VideoMaskInput(vlm, clip, question(name), mask, baselines.mean_frame)
    result = VideoLLMAttribution(FeatureAblation(vlm.model), vlm.tokenizer).attribute(inp, target=ANSWER)
    whole, mean = by_hand(name, clip), baselines.mean_frame(clip, "BTCHW")
    for frame in (0, 4):
        hidden = clip.clone()
        hidden[:, frame] = mean[:, frame]
        fall = whole - by_hand(name, hidden)
        assert torch.allclose(result.seq_attr[frame], fall[0], atol=1e-5)
        assert torch.allclose(result.token_attr[:, frame], fall[1:], atol=1e-5)
    maps = inp.format_video_attr(result.token_attr)
    assert maps.shape == (3, *size_of(name)) and torch.equal(maps[1, 4, 0, 0], result.token_attr[1, 4])


def test_shapley_values_share_the_difference_of_two_clips():
    name = "qwen3_vl"
    vlm, clip = tiny_vlm(name), clips_of(name)
    mask = torch.tensor([0, 0, 1, 1, 2]).view(1, 5, 1, 1, 1)
    inp = VideoMaskInput(vlm, clip, question(name), mask)
    result = VideoLLMAttribution(ShapleyValues(vlm.model), vlm.tokenizer).attribute(inp, target=ANSWER)
    difference = by_hand(name, clip) - by_hand(name, torch.zeros_like(clip))
    assert torch.allclose(result.token_attr.sum(1), difference[1:], atol=1e-4)
    assert torch.allclose(result.seq_attr.sum(), difference[0], atol=1e-4)


def test_without_a_target_the_model_answers():
    name = "qwen2_5_vl"
    vlm, clip = tiny_vlm(name), clips_of(name)
    inp = VideoMaskInput(vlm, clip, question(name), feature_masks.frames(clip, "BTCHW"))
    llm = VideoLLMAttribution(FeatureAblation(vlm.model), vlm.tokenizer)
    made = llm._get_target_tokens(inp, None, {"max_new_tokens": 3, "do_sample": False})
    expected = vlm.generate(clip, question(name), 3)
    vlm.model.model.rope_deltas = None
    assert torch.equal(made[: len(expected)], expected)


def test_bad_input_is_refused():
    name = "internvl"
    vlm, clip = tiny_vlm(name), clips_of(name)
    mask = feature_masks.frames(clip, "BTCHW")
    with pytest.raises(ValueError, match="must be one clip, got a batch of 2"):
        VideoMaskInput(vlm, clips_of(name, 2), question(name), mask)
    with pytest.raises(ValueError, match="without gaps"):
        VideoMaskInput(vlm, clip, question(name), mask * 2)
    inp = VideoMaskInput(vlm, clip, question(name), mask)
    with pytest.raises(ValueError, match="one perturbation per call"):
        inp.perturbed_clip(torch.ones(2, 5))
    llm = VideoLLMAttribution(FeatureAblation(vlm.model), vlm.tokenizer)
    with pytest.raises(ValueError, match="must not contain the tokens of a video or an image"):
        llm.attribute(inp, target="it <IMG_CONTEXT> is")
    with pytest.raises(ValueError, match="answer must be a text or a non-empty list of token ids"):
        llm.attribute(inp, target="")
