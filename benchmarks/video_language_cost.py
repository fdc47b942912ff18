"""What an explanation of one word costs, with about 2000 video tokens: CPU time and peak memory of each way.

    python benchmarks/video_language_cost.py

A random Qwen2.5-VL of 4 + 6 layers (24 frames, 12 x 14 tokens per step), one thread. The reference is one prefill and
one plain backward to the pixels.

Times are taken in one process, a call of each row in turn, because other programs of a machine slow down seconds that
are next to each other alike. A row's factor is the median over rounds of its time divided by the reference's time in
the same round.

Peak memory is that of a process of its own for each row. The allocator of glibc keeps what is freed below a threshold,
which grows while a program runs, so that the peak would contain much that no tensor uses. These processes therefore run
with a fixed one.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from tqdm import tqdm

from captum_staa import AnswerAttribution, VideoLanguageModel

REFERENCE = "prefill and backward"
ROWS = ("prefill", REFERENCE, "relevance", "relevance, pattern_weight=0", "attention", "eager weights")
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


def calls() -> dict[str, Callable[[], Any]]:
    """Return what each row runs, after one forward of the model."""
    torch.set_num_threads(1)
    vlm = VideoLanguageModel(model())
    clip = torch.rand(1, FRAMES, 3, HEIGHT, WIDTH)
    count = FRAMES // 2 * 12 * 14
    prompt = torch.tensor([START, *[VIDEO] * count, END, *range(10, 40)])
    clf = vlm.as_classifier(prompt, [50, 51, 52, 53])
    with torch.no_grad():
        clf(clip)

    def prefill() -> None:
        with torch.no_grad():
            clf(clip)

    def backward() -> None:
        leaf = clip.clone().requires_grad_()
        torch.autograd.grad(clf(leaf)[0, 2], leaf)

    def eager() -> None:
        vlm.model.set_attn_implementation("eager")
        with torch.no_grad():
            vlm.model(**vlm.inputs(clip, clf.prompt_for(clip), clf.answer), output_attentions=True)

    def ours(**options: Any) -> None:
        AnswerAttribution(clf, **options).attribute(clip, target=2)

    return {
        "prefill": prefill,
        REFERENCE: backward,
        "relevance": ours,
        "relevance, pattern_weight=0": partial(ours, pattern_weight=0),
        "attention": partial(ours, mode="attention"),
        "eager weights": eager,
    }


def peak(row: str) -> float:
    """Return the peak of this process in MiB when it runs one row."""
    calls()[row]()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def times(rows: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Return CPU seconds of each row in each round."""
    functions, found = calls(), {row: [] for row in rows}
    for _ in tqdm(range(rounds), desc="rounds", disable=None):
        for row in rows:
            start = time.process_time()
            functions[row]()
            found[row].append(time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS[:-1]), help="rows besides the reference")
    parser.add_argument("--peak", choices=ROWS, help="print the peak memory of one row, in MiB")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.peak:
        print(peak(options.peak))
        return
    rows = [REFERENCE, *(row for row in options.rows if row != REFERENCE)]
    peaks = {}
    for row in rows:
        command = [sys.executable, __file__, "--peak", row]
        text = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | ALLOCATOR).stdout
        peaks[row] = float(text)
        print(f"peak of {row}: {peaks[row]:.0f} MiB", file=sys.stderr, flush=True)
    found = times(rows, options.rounds)
    print(f"| {FRAMES // 2 * 168} video tokens | CPU s | times prefill and backward | peak MiB | times |")
    print("|---|---|---|---|---|")
    for row, seconds in found.items():
        factors = [own / other for own, other in zip(seconds, found[REFERENCE], strict=True)]
        print(
            f"| {row} | {median(seconds):.2f} | {median(factors):.2f} ({min(factors):.2f} to {max(factors):.2f}) | "
            f"{peaks[row]:.0f} | {peaks[row] / peaks[REFERENCE]:.2f} |"
        )


if __name__ == "__main__":
    main()
