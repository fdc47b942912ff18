"""Random small models of architectures that no family declares: contributions and constants sum to the score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from frozen_models import contrast
from tiny_models import randomize
from torch import Tensor, nn

from captum_staa.attention.decomposition import decompose

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {**SMALL, "image_size": 16, "patch_size": 8}


class Case(NamedTuple):
    """A model, the function from inputs to outputs, the name of the module whose output is the tokens, and inputs."""

    model: nn.Module
    run: Callable[[Any, Tensor], Tensor]
    tokens: str | None
    inputs: tuple[int, ...]


def clip() -> Case:
    model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**IMAGES, projection_dim=4))
    return Case(
        model,
        lambda m, x: m(pixel_values=x).image_embeds,
        "vision_model.embeddings.patch_embedding",
        (2, 3, 16, 16),
    )


def siglip() -> Case:
    """Its head is nn.MultiheadAttention with one learned query."""
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGES))
    name = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    return Case(model, lambda m, x: m(pixel_values=x).pooler_output, name, (2, 3, 16, 16))


def dinov2() -> Case:
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, num_labels=4,
        use_swiglu_ffn=True, layerscale_value=0.7,
    )  # fmt: skip
    return Case(
        transformers.Dinov2ForImageClassification(config),
        lambda m, x: m(pixel_values=x).logits,
        "dinov2.embeddings.patch_embeddings.projection",
        (2, 3, 16, 16),
    )


def x_clip() -> Case:
    """Frames exchange messages, and the prompts depend on the video: similarity is a product of two paths."""
    mit = {f"mit_{key}": value for key, value in SMALL.items()}
    config = transformers.XCLIPConfig(
        text_config={**SMALL, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19, "bos_token_id": 0},
        vision_config={**IMAGES, **mit, "num_frames": 4},
        projection_dim=16,
        prompt_num_attention_heads=2,
    )
    ids = torch.tensor([[0, 5, 7, 19], [0, 9, 12, 19], [0, 3, 2, 19]])

    def run(model: Any, x: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=x).logits_per_video

    return Case(transformers.XCLIPModel(config), run, "vision_model.embeddings.patch_embedding", (2, 4, 3, 16, 16))


def qwen() -> Case:
    """Video tokens of windows of a vision transformer, merged, between the text tokens of a language model."""
    text = {**SMALL, "num_key_value_heads": 1, "vocab_size": 120, "max_position_embeddings": 64}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "bos_token_id": 0, "eos_token_id": 1},
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
        },
        image_token_id=100, video_token_id=101, vision_start_token_id=102, vision_end_token_id=103,
    )  # fmt: skip
    grid = torch.tensor([[2, 8, 8]])
    ids = torch.tensor([[1, 2, 102, *[101] * 32, 103, 5, 6]])

    def run(model: Any, x: Tensor) -> Tensor:
        options = {"video_grid_thw": grid, "mm_token_type_ids": (ids == 101).int() * 2}
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=x[0], **options).logits[
            :, -1
        ]

    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return Case(model, run, "model.visual.patch_embed", (1, 128, 3 * 2 * 4 * 4))


@pytest.mark.parametrize("pattern_weight", [0.0, 0.125])
@pytest.mark.parametrize("make", [clip, siglip, dinov2, x_clip, qwen], ids=lambda make: make.__name__)
def test_contributions_and_constants_sum_to_the_score(make, pattern_weight):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = make()
        randomize(case.model, 0, spread=0.2).double()
    inputs = torch.randn(case.inputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tokens = case.model.get_submodule(case.tokens)
    result = decompose(
        lambda x: case.run(case.model, x), inputs, contrast, tokens=tokens, pattern_weight=pattern_weight
    )
    single = make is qwen  # its RMSNorm computes in float32 for every dtype
    assert result.nonlinear == ()
    assert abs(float(result.remainder)) < (1e-6 if single else 1e-12)
    assert float(result.contributions.abs().sum()) > 1e-3  # a check of nothing otherwise
