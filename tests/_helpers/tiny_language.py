"""Random tiny video language models of every family, built from configs, with a tokenizer that knows their marks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from captum_staa.models import VideoLanguageModel

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "video_llama_3", "llava_onevision", "internvl", "smolvlm")
MARKS = (
    *("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"),
    *("<|image_pad|>", "<video>", "<image>", "<img>", "</img>", "<IMG_CONTEXT>", "<fake_token_around_image>"),
    "<global-img>",
)
WORDS = ("it", "is", "right", "left", "bottom")
VIDEO_TOKEN = {
    "qwen2_5_vl": "<|video_pad|>",
    "qwen3_vl": "<|video_pad|>",
    "video_llama_3": "<|video_pad|>",
    "llava_onevision": "<video>",
    "internvl": "<IMG_CONTEXT>",
    "smolvlm": "<image>",
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}


@cache
def tokenizer() -> Any:
    """Return a byte-level tokenizer: a token for each mark, each known word with and without a space, and letter."""
    merges = [(word[:i], word[i]) for word in ("\u0120" + word for word in WORDS) for i in range(1, len(word))]
    merges += [(word[:i], word[i]) for word in WORDS for i in range(1, len(word))]
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)])
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(dict.fromkeys(merges))))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|pad|>", eos_token="<|end|>", clean_up_tokenization_spaces=False
    )
    fast.chat_template = (
        "<|user|>{% for part in messages[0]['content'] %}{% if part['type'] == 'video' %}@{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}<|assistant|>"
    )
    return fast


def token(mark: str) -> int:
    return int(tokenizer().convert_tokens_to_ids(mark))


def build(name: str) -> nn.Module:
    """Return a random model with patches of 4 pixels and tokens of 8, for frames of 24 x 24 (rows: 16 x 24) pixels."""
    text = TEXT | {
        "vocab_size": len(tokenizer()),
        "pad_token_id": token("<|pad|>"),
        "eos_token_id": token("<|end|>"),
        "bos_token_id": token("<|user|>"),
    }
    size = {"hidden_size": 32, "intermediate_size": 48}
    video, image = token("<|video_pad|>"), token("<|image_pad|>")
    marks = {"vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>")}
    marks |= {"image_token_id": image, "video_token_id": video}
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
    rows = size | {"patch_size": 4, "initializer_range": 0.2}
    qwen = rows | {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32}
    squares = rows | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24}
    if name == "qwen2_5_vl":
        # windows of 8 pixels: the tower reorders its patches, and has to restore their order
        tower = qwen | {"tokens_per_second": 2, "window_size": 16, "fullatt_block_indexes": [1]}
        config = transformers.Qwen2_5_VLConfig(
            vision_config=tower, text_config=text | {"rope_parameters": rope}, **marks
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    if name == "qwen3_vl":
        tower = qwen | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0]}
        text = text | {"head_dim": 8, "rope_parameters": rope | {"mrope_interleaved": True}}
        config = transformers.Qwen3VLConfig(vision_config=tower, text_config=text, **marks)
        return transformers.Qwen3VLForConditionalGeneration(config)
    if name == "video_llama_3":
        tower = rows | {"num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.VideoLlama3Config(
            vision_config=tower,
            text_config=text | {"model_type": "qwen2"},
            image_token_id=image,
            video_token_id=video,
        )
        return transformers.VideoLlama3ForConditionalGeneration(config)
    if name == "llava_onevision":
        # 27 pixels are 6 patches and 3 pixels that no token represents
        tower = squares | {"model_type": "siglip_vision_model", "vision_use_head": False, "image_size": 27}
        config = transformers.LlavaOnevisionConfig(
            vision_config=tower,
            text_config=text | {"model_type": "qwen2"},
            image_token_index=token("<image>"),
            video_token_index=token("<video>"),
        )
        return transformers.LlavaOnevisionForConditionalGeneration(config)
    if name == "internvl":
        config = transformers.InternVLConfig(
            vision_config=squares | {"image_size": [24, 24], "patch_size": [4, 4]},
            text_config=text | {"model_type": "qwen2"},
            image_token_id=token("<IMG_CONTEXT>"),
            image_seq_length=9,
            downsample_ratio=0.5,
        )
        return transformers.InternVLForConditionalGeneration(config)
    config = transformers.SmolVLMConfig(
        vision_config=squares,
        text_config=text | {"model_type": "llama"},
        image_token_id=token("<image>"),
        scale_factor=2,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


@cache
def tiny_vlm(name: str) -> VideoLanguageModel:
    """Return a random model of a family in eval mode."""
    torch.manual_seed(0)
    return VideoLanguageModel(build(name).eval(), tokenizer())


def size_of(name: str) -> tuple[int, int, int]:
    """``(T, H, W)`` of clips. Five frames are not a multiple of the steps of Qwen models."""
    if name in ("qwen2_5_vl", "qwen3_vl", "video_llama_3"):
        return 5, 16, 24
    return (5, 27, 27) if name == "llava_onevision" else (5, 24, 24)


def clips_of(name: str, count: int = 1, seed: int = 0) -> Tensor:
    """Return random clips for a family."""
    frames, height, width = size_of(name)
    return torch.randn(count, frames, 3, height, width, generator=torch.Generator().manual_seed(seed))


def question(name: str) -> str:
    """Return a whole prompt with the placeholder of the video."""
    placeholder = "<video>" if name in ("internvl", "smolvlm", "llava_onevision") else "<|video_pad|>"
    return f"<|user|>{placeholder} which?<|assistant|>"
