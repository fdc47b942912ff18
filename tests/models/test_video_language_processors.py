"""Clips, prompts and positions are those of the processors of transformers, which need torchvision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_language import FAMILIES, question, size_of, tiny_vlm, tokenizer

from captum_staa.models import VideoLanguageModel

pytest.importorskip("torchvision")
pytestmark = pytest.mark.filterwarnings("ignore")  # their own deprecations

EXTRA = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "image_token": "<image>",
}


def processor(name: str) -> Any:
    """Return the processor of a family, for frames of the size of the tiny models."""
    words = tokenizer()
    if name in ("internvl", "llava_onevision", "smolvlm"):
        words = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words._tokenizer, pad_token="<|pad|>", extra_special_tokens=EXTRA
        )
    _, height, width = size_of(name)
    pixels = {"shortest_edge": height * width, "longest_edge": height * width * 5}
    rows = {"size": pixels, "patch_size": 4, "do_sample_frames": False}
    square = {"size": {"height": height, "width": width}, "do_sample_frames": False}
    if name == "qwen2_5_vl":
        rows = rows | {"size": {"shortest_edge": height * width, "longest_edge": height * width}}
        video = transformers.Qwen2VLVideoProcessor(**rows, cap_pixels_per_frame=False)
        image = transformers.Qwen2VLImageProcessor(patch_size=4)
        return transformers.Qwen2_5_VLProcessor(image, words, video)
    if name == "qwen3_vl":
        video = transformers.Qwen3VLVideoProcessor(**rows, cap_pixels_per_frame=False)
        return transformers.Qwen3VLProcessor(transformers.Qwen2VLImageProcessor(patch_size=4), words, video)
    if name == "video_llama_3":
        video = transformers.VideoLlama3VideoProcessor(**rows, use_token_compression=False)
        image = transformers.VideoLlama3ImageProcessor(patch_size=4)
        return transformers.VideoLlama3Processor(image, words, video)
    if name == "llava_onevision":
        image = transformers.LlavaOnevisionImageProcessor()
        video = transformers.LlavaOnevisionVideoProcessor(**square)
        return transformers.LlavaOnevisionProcessor(
            image, words, video, num_image_tokens=36, vision_feature_select_strategy="full"
        )
    if name == "internvl":
        image = transformers.GotOcr2ImageProcessor()
        return transformers.InternVLProcessor(
            image, words, transformers.InternVLVideoProcessor(**square), image_seq_length=9
        )
    edge = {"longest_edge": height}
    video = transformers.SmolVLMVideoProcessor(size=edge, max_image_size=edge, do_sample_frames=False)
    return transformers.SmolVLMProcessor(transformers.SmolVLMImageProcessor(), words, video, image_seq_len=9)


@pytest.mark.parametrize("name", FAMILIES)
def test_clip_and_prompt_are_those_of_the_processor(name):
    if name == "smolvlm":
        pytest.importorskip("num2words")
    vlm = VideoLanguageModel(tiny_vlm(name).model, processor(name))
    _, height, width = size_of(name)
    frames = torch.randint(256, (5, height, width, 3), generator=torch.Generator().manual_seed(0)).byte()
    metadata = transformers.video_utils.VideoMetadata(
        total_num_frames=5, fps=2.0, frames_indices=list(range(5)), duration=2.5
    )
    made = vlm.processor(
        text=[question(name)],
        videos=[frames.permute(0, 3, 1, 2)],
        video_metadata=[metadata],
        do_sample_frames=False,
        return_tensors="pt",
    )
    clip = vlm.preprocess(frames)
    prompt = vlm.prompt(question(name), size_of(name))
    inputs = vlm.inputs(clip, prompt)
    assert torch.equal(inputs["input_ids"], made["input_ids"])
    for key in ("pixel_values", "pixel_values_videos", "video_grid_thw", "video_compression_mask"):
        assert (key in inputs) == (key in made)
        if key in made:
            assert torch.equal(inputs[key], torch.as_tensor(made[key]))
    back, read = vlm.read(made)
    assert torch.equal(back[:, :5], clip) and torch.equal(read.at, prompt.at) and read.seconds == prompt.seconds
    with torch.no_grad():
        ours = vlm.run(inputs, 1)
        theirs = vlm.model(**made).logits[:, -1:]
    if vlm.family.mrope:
        vlm.model.model.rope_deltas = None
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_frames_that_a_processor_drops_are_noticed():
    vlm = VideoLanguageModel(tiny_vlm("internvl").model, processor("internvl"))
    sample = vlm.processor.video_processor
    vlm.processor.video_processor = lambda frames, **options: sample(frames[::2], **options)
    with pytest.raises(ValueError, match="must keep all frames, got 3 of 5"):
        vlm.preprocess(torch.zeros(5, 24, 24, 3).byte())
