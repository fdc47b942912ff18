"""``python -m captum_staa explain``: explain the prediction of a model for a video file; write numbers and pictures."""

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
    "dense": "consecutive frames from its middle",
    "stride": "every {stride} frames from its start",
}
INTERRUPTED = 130  # exit code that a shell reports for a program that was ended by Ctrl-C


def run(options: Options) -> int:
    """Explain a video, print a report and write the files. Return the exit code."""
    started = time.perf_counter()
    explanation = explain(options)
    print(report(explanation, options.top, sys.stdout.encoding), flush=True)
    if explanation.interrupted:
        print(f"interrupted: {explanation.interrupted}", file=sys.stderr)
    files = write(explanation, options.out, overwrite=options.overwrite)
    print(f"written to {options.out}: {', '.join(path.name for path in files)} ({time.perf_counter() - started:.1f} s)")
    return INTERRUPTED if explanation.interrupted else 0


def explain(options: Options) -> Explanation:
    """Return the explanation of one video file. Only a progress bar is printed, and no files are written.

    Args:
        options: the options of the command.

    Returns:
        The explanation. It is partial after Ctrl-C during the optimization of masks, or after Ctrl-C once the first
        of several windows is finished.

    Raises:
        ValueError, OSError: the file, the model, the target or an option is invalid. FileExistsError if the folder
            contains an earlier explanation and ``overwrite`` is False.
        KeyboardInterrupt: Ctrl-C before there is a result to keep.
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
        result = method.explain(clip, target)
    return Explanation(
        **about(method, options, info),
        labels=classifier.label_names(len(result.probabilities)),
        probabilities=result.probabilities.tolist(),
        target=result.target,
        indices=video.indices.tolist(),
        times=times_at(times, info, video.indices.tolist()),
        parts=result.parts,
        apart=method.frames_per_cell,
        sampling=f"{len(video.indices)} frames seen, {SAMPLING[sampling].format(stride=step)}",
        frames=video.frames,
        masks=result.masks,
        interrupted=result.interrupted,
    )
