"""``python -m captum_staa explain``: from a video file and a model's name to numbers and pictures in a folder."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from captum_staa import io
from captum_staa.cli.explanation import Explanation, Options, report
from captum_staa.cli.methods import METHODS
from captum_staa.cli.output import refuse_to_overwrite, write
from captum_staa.cli.prepare import about, check, load, times_at
from captum_staa.cli.windows import explain_windows
from captum_staa.models.classifier import DEFAULT_FRAMES

SAMPLING = {
    "uniform": "spread evenly over the video",
    "dense": "in a row from its middle",
    "stride": "every {stride} frames from its start",
}
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C has ended


def run(options: Options) -> int:
    """Explain, write and print; returns the exit code."""
    started = time.perf_counter()
    explanation = explain(options)
    print(report(explanation, options.top, sys.stdout.encoding), flush=True)
    if explanation.interrupted:
        print(f"interrupted: {explanation.interrupted}", file=sys.stderr)
    files = write(explanation, options.out, overwrite=options.overwrite)
    print(f"written to {options.out}: {', '.join(path.name for path in files)} ({time.perf_counter() - started:.1f} s)")
    return INTERRUPTED if explanation.interrupted else 0


def explain(options: Options) -> Explanation:
    """Explain one video file; nothing is written, and nothing printed but a progress bar.

    Args:
        options: what was asked.

    Returns:
        The explanation. It may be a partial one: where Ctrl-C came after the first of several windows was done, or
        while masks were learned.

    Raises:
        ValueError, OSError: the file, the model, the target or an option is not as it should be; among them
            FileExistsError: the folder holds an earlier explanation, and ``overwrite`` is False.
        KeyboardInterrupt: Ctrl-C came before there was anything to keep.
    """
    check(options)
    info = io.probe(options.video)
    refuse_to_overwrite(options.out, options.overwrite)
    form = "{desc} (step {n_fmt} of {total_fmt}, {elapsed})"
    with tqdm(total=3, initial=1, delay=1, leave=False, bar_format=form, desc="loading the model") as steps:
        classifier = load(options.model, options.device)
        method = METHODS[options.method](classifier, options)
        target = None if options.target is None else classifier.class_index(options.target)
        if options.windows:
            steps.close()
            return explain_windows(method, options, info, target)
        steps.set_description_str("reading the video", refresh=False)
        steps.update()
        sampling = options.sampling or "uniform"
        step = options.stride or 1
        video = io.read_video(
            options.video,
            classifier.num_frames or DEFAULT_FRAMES,
            sampling,  # type: ignore[arg-type]  # read_video checks it
            stride=step if sampling == "stride" else 1,
        )
        times = io.frame_times(options.video)
        clip = classifier.preprocess(video.frames)
        steps.set_description_str("explaining", refresh=False)
        steps.update()
        if method.shows_progress:
            steps.close()
        found = method.explain(clip, target)
    return Explanation(
        **about(method, options, info),
        labels=classifier.label_names(len(found.probabilities)),
        probabilities=found.probabilities.tolist(),
        target=found.target,
        indices=video.indices.tolist(),
        times=times_at(times, info, video.indices.tolist()),
        parts=found.parts,
        apart=method.frames_per_cell,
        sampling=f"{len(video.indices)} frames seen, {SAMPLING[sampling].format(stride=step)}",
        frames=video.frames,
        masks=found.masks,
        interrupted=found.interrupted,
    )
