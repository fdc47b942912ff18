"""Memory of `AnswerAttribution` for real sizes of Qwen2.5-VL, from what each layer keeps for the backward pass.

    python benchmarks/video_language_memory.py

The tensors that autograd keeps are counted in models of one and of two layers of the real width, in bfloat16, for about
a hundred tokens. What one layer keeps per token, times the layers and the tokens of a real model, plus the weights, is
the estimate. Attention is fused, so that all of it is linear in the number of tokens.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch
import transformers

from captum_staa import VideoLanguageModel
from captum_staa._utils.model_state import frozen_parameters
from captum_staa.attention.frozen import FrozenPatterns

# Widths of the checkpoints, from their configs.
SIZES = {
    "3B": {"hidden": 2048, "inner": 11008, "layers": 36, "heads": 16, "kv": 2, "billions": 3.75},
    "7B": {"hidden": 3584, "inner": 18944, "layers": 28, "heads": 28, "kv": 4, "billions": 8.29},
}
TOWER = {"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2}
DEPTH = 32
FRAMES, PER_STEP = (16, 32, 64, 128), 12 * 15  # of 336 x 420 pixels, at two frames per step
STEPS, SIDES = 2, (168, 224)  # of the clip in which tensors are counted; what is kept grows with the number of tokens
COUNTED = STEPS * SIDES[0] * SIDES[1] // 28**2


def build(size: dict[str, Any], layers: int, depth: int) -> VideoLanguageModel:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {"vocab_size": 64, "hidden_size": size["hidden"], "intermediate_size": size["inner"]}
    text |= {"num_hidden_layers": layers, "num_attention_heads": size["heads"], "num_key_value_heads": size["kv"]}
    tower = TOWER | {"depth": depth, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": []}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=tower | {"out_hidden_size": size["hidden"]},
        text_config=text | {"rope_parameters": rope},
        image_token_id=9,
        video_token_id=1,
        vision_start_token_id=2,
        vision_end_token_id=3,
    )
    with torch.device("meta"):  # values do not matter, and random ones would take long
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).bfloat16().eval()
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for values in (*model.parameters(), *model.buffers()):
            values.fill_(0.01)
    return VideoLanguageModel(model)


def kept(vlm: VideoLanguageModel, mode: Callable[[], Any]) -> int:
    """Return the bytes of all tensors that autograd keeps in a forward, each storage once."""
    clip = torch.rand(1, 2 * STEPS, 3, *SIDES, requires_grad=True)
    prompt = vlm.prompt([2, *[1] * COUNTED, 3, 10, 11], (2 * STEPS, *SIDES))
    weights = {parameter.untyped_storage().data_ptr() for parameter in vlm.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), frozen_parameters(vlm), mode():
        vlm.answer_logits(clip, prompt, torch.tensor([20, 21]))
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    modes = {"plain": contextlib.nullcontext, "relevance": lambda: FrozenPatterns(0.125)}
    tokens = COUNTED + 5
    print("| model | frames | video tokens | weights, GB | gradient, GB | relevance, GB | attention, GB |")
    print("|---|---|---|---|---|---|---|")
    for name in options.sizes:
        size = SIZES[name]
        per_layer, per_block, rest = {}, {}, {}
        for mode, context in modes.items():
            one = kept(build(size, 1, 1), context)
            per_layer[mode] = (kept(build(size, 2, 1), context) - one) / tokens
            per_block[mode] = (kept(build(size, 1, 2), context) - one) / tokens
            rest[mode] = one / tokens - per_layer[mode] - per_block[mode]
        for frames in FRAMES:
            count = frames // 2 * PER_STEP
            weights = 2 * size["billions"]
            need = {
                mode: weights + (per_layer[mode] * size["layers"] + per_block[mode] * DEPTH + rest[mode]) * count / 1e9
                for mode in modes
            }
            # the key-value pairs are not kept; one layer's activations, a few times its widths, are alive at a time
            attention = weights + 2 * 6 * (size["inner"] + 2 * size["hidden"]) * count / 1e9
            print(
                f"| {name} | {frames} | {count} | {weights:.1f} | {need['plain']:.1f} | {need['relevance']:.1f} | "
                f"{attention:.1f} |"
            )
        print(
            f"kept per token and layer, KB: { ({m: round(v / 1e3, 1) for m, v in per_layer.items()}) }; per token and "
            f"tower block: { ({m: round(v / 1e3, 1) for m, v in per_block.items()}) }; rest: "
            f"{ ({m: round(v / 1e3, 1) for m, v in rest.items()}) }"
        )


if __name__ == "__main__":
    main()
