"""What an explanation of one word costs, with about 2000 video tokens: CPU time and peak memory of each way.

    python benchmarks/video_language_cost.py

Each row runs in a separate process: a random Qwen2.5-VL of 4 + 6 layers (24 frames, 12 x 14 tokens per step), one
thread. The reference is one prefill and one plain backward to the pixels.

Peak memory is that of the process. The allocator of glibc keeps what is freed below a threshold, which grows while a
program runs, so that the peak would contain much that no tensor uses. Each process therefore runs with a fixed one.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import torch
import transformers

ROWS = ("prefill", "prefill and backward", "relevance", "relevance, pattern_weight=0", "attention", "eager weights")
FRAMES, HEIGHT, WIDTH = 24, 12 * 28, 14 * 28
VIDEO, START, END = 1, 2, 3
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # bytes


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    vision = {"depth": 4, "hidden_size": 320, "intermediate_size": 800, "num_heads": 8, "patch_size": 14}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "fullatt_block_indexes": [1, 3]}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    text = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision | {"out_hidden_size": 512},
        text_config=text | {"rope_parameters": rope},
        image_token_id=9,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)


def run(row: str, repeats: int) -> None:
    from captum_staa import AnswerAttribution, VideoLanguageModel

    torch.set_num_threads(1)
    vlm = VideoLanguageModel(model())
    clip = torch.rand(1, FRAMES, 3, HEIGHT, WIDTH)
    count = FRAMES // 2 * 12 * 14
    prompt = torch.tensor([START, *[VIDEO] * count, END, *range(10, 40)])
    clf = vlm.as_classifier(prompt, [50, 51, 52, 53])
    with torch.no_grad():
        clf(clip[:, :, :, :HEIGHT])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def once() -> None:
        if row == "prefill":
            with torch.no_grad():
                clf(clip)
        elif row == "prefill and backward":
            leaf = clip.clone().requires_grad_()
            torch.autograd.grad(clf(leaf)[0, 2], leaf)
        elif row == "eager weights":
            vlm.model.set_attn_implementation("eager")
            with torch.no_grad():
                vlm.model(**vlm.inputs(clip, clf.prompt_for(clip), clf.answer), output_attentions=True)
        elif row == "attention":
            AnswerAttribution(clf, mode="attention").attribute(clip, target=2)
        else:
            weight = {} if row == "relevance" else {"pattern_weight": 0}
            AnswerAttribution(clf, **weight).attribute(clip, target=2)

    times = []
    for _ in range(repeats):
        start = time.process_time()
        once()
        times.append(time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{min(times):.3f} {(peak - before) / 1024:.1f} {before / 1024:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=ROWS)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.row:
        run(options.row, options.repeats)
        return
    found = {}
    for row in ROWS:
        command = [sys.executable, __file__, "--row", row, "--repeats", str(options.repeats)]
        text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | ALLOCATOR).stdout
        found[row] = [float(value) for value in text.split()]
        print(f"done: {row}", file=sys.stderr)
    whole = {row: values[1] + values[2] for row, values in found.items()}
    time_of, peak_of = found["prefill and backward"][0], whole["prefill and backward"]
    print(f"| {FRAMES // 2 * 168} video tokens | CPU s | times prefill and backward | peak MiB | times |")
    print("|---|---|---|---|---|")
    for row, (seconds, *_rest) in found.items():
        print(f"| {row} | {seconds:.2f} | {seconds / time_of:.2f} | {whole[row]:.0f} | {whole[row] / peak_of:.2f} |")


if __name__ == "__main__":
    main()
