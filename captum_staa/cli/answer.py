"""``python -m captum_staa explain --prompt``: explain the answer of a video language model, word by word."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from captum_staa import io
from captum_staa._utils.files import atomic_files, save_tensors
from captum_staa.attr import AnswerAttribution, AnswerMaps
from captum_staa.benchmark.records import versions
from captum_staa.cli.loading import check_device, quiet_transformers
from captum_staa.cli.output import STYLE, refuse_to_overwrite
from captum_staa.models import VideoLanguageModel
from captum_staa.models.classifier import DEFAULT_FRAMES
from captum_staa.visualization import Frames, to_html
from captum_staa.visualization.saliency import key_frames

FILES = ("attributions.safetensors", "result.json", "player.html")
SHOWN = 3  # number of frames that the report names for each word


@dataclass(frozen=True)
class AnswerOptions:
    """Options of ``explain --prompt``, as described by ``--help``."""

    video: Path
    model: str
    prompt: str
    out: Path
    answer: str | None = None
    versus: str | None = None
    frames: int = DEFAULT_FRAMES
    device: str | None = None
    overwrite: bool = False


def run(options: AnswerOptions) -> int:
    """Explain an answer, print a line for each of its words, and write the files. Return the exit code."""
    started = time.perf_counter()
    info = io.probe(options.video)
    refuse_to_overwrite(options.out, options.overwrite, FILES)
    if options.device is not None:
        check_device(options.device)
    with quiet_transformers():
        vlm = VideoLanguageModel.from_pretrained(options.model, device=options.device)
    video = io.read_video(options.video, options.frames)
    indices = video.indices.tolist()
    if info.fps and len(indices) > 1 and indices[-1] > indices[0]:
        vlm.fps = (len(indices) - 1) * info.fps / (indices[-1] - indices[0])  # for the times in the prompt
    clip = vlm.preprocess(video.frames)
    method = AnswerAttribution(vlm)
    maps = method.attribute_answer(clip, options.prompt, options.answer, options.versus, show_progress=True)
    print(_report(options, maps, indices, info, vlm.notice), flush=True)
    _write(options, maps, indices, info, video, vlm)
    print(f"written to {options.out}: {', '.join(FILES)} ({time.perf_counter() - started:.1f} s)")
    return 0


def _report(options: AnswerOptions, maps: AnswerMaps, indices: list[int], info: io.VideoInfo, notice: str) -> str:
    assert maps.reliance is not None
    table = str(maps).splitlines()
    lines = [
        f"{options.video.name}: {info.num_frames} frames, {len(indices)} of them seen",
        f"{options.model} on {options.prompt!r}" + ("" if options.answer is None else " (the answer was given)"),
        *([f"  {notice}"] if notice else []),
        f"  {table[0]}  strongest frames",
    ]
    for row, temporal in zip(table[1:], maps.temporal, strict=True):
        strongest = [indices[at] for at in key_frames(temporal.numpy(), SHOWN)]
        lines.append(f"  {row}  {', '.join(map(str, strongest))}")
    lines += [
        "reliance: how far the log-probability falls at most (nats) if the video is blurred, stands still or runs",
        "backwards; near 0, the word does not need the video, so its map means nothing",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _write(
    options: AnswerOptions, maps: AnswerMaps, indices: list[int], info: io.VideoInfo, video: Any, vlm: Any
) -> None:
    assert maps.ids is not None and maps.log_probabilities is not None and maps.reliance is not None
    words = [
        {"token": token, "id": id_, "log_probability": log, "reliance": reliance, "temporal": temporal}
        for token, id_, log, reliance, temporal in zip(
            maps.tokens,
            maps.ids.tolist(),
            maps.log_probabilities.tolist(),
            maps.reliance.tolist(),
            maps.temporal.tolist(),
            strict=True,
        )
    ]
    result = {
        "versions": versions(),
        "model": {"name": options.model, "family": vlm.family.name, "fps": vlm.fps, "notice": vlm.notice or None},
        "prompt": options.prompt,
        "answer_given": options.answer is not None,
        "versus": options.versus,
        "video": {"path": str(options.video), "num_frames": info.num_frames},
        "frame_indices": indices,
        "words": words,
    }
    crop = None if vlm.preprocessing is None else vlm.preprocessing.crop_box(info.height, info.width)
    frames = Frames(video.frames, crop, indices, info.fps or None)
    title = options.prompt + (vlm.notice and f"\n{vlm.notice}")
    with atomic_files(options.out, FILES, options.overwrite) as partial:
        save_tensors(save_file, {"attributions": maps.joint.float().contiguous()}, partial / FILES[0])
        text = json.dumps(result, ensure_ascii=False, allow_nan=False, indent=1)
        (partial / FILES[1]).write_text(text + "\n", encoding="utf-8")
        (partial / FILES[2]).write_text(to_html(maps, frames, style=STYLE, title=title), encoding="utf-8")
