"""Tests of the gotchas about language models."""

from __future__ import annotations

import torch
from gotcha_page import FIXED, close, entry, page

from captum_staa import VideoLanguageModel


@entry("LLMAttribution drops the video")
def test_llm_attribution(gotcha):
    wrong = gotcha.wrong()
    assert (wrong.attributions == 0).all(), FIXED
    with gotcha.still_fails():
        wrong.Ablation(wrong.FeatureAblation(wrong.vlm.model), wrong.vlm.tokenizer).attribute(
            wrong.inp, target="it is right .", use_cached_outputs=False
        )
    clip = page().clip
    clf = VideoLanguageModel.from_pretrained("tiny-qwen2_5_vl").as_classifier("which pattern ?", "it is right .")
    falls = []
    for segment in range(4):
        hidden = clip.clone()
        hidden[:, 4 * segment : 4 * segment + 4] = 0
        with torch.no_grad():
            falls.append((clf(clip) - clf(hidden))[0, :-1])
    close(gotcha.right().attributions, torch.stack(falls, 1), atol=1e-4)
