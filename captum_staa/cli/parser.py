"""Argument parsing of ``python -m captum_staa``: the commands explain, stream, compare, inspect and demo."""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captum_staa import __version__, benchmark
from captum_staa.benchmark.scenes import LABELS
from captum_staa.benchmark.scoring import BASELINES
from captum_staa.cli import INTERRUPTED, answer, compare, demo, explain, inspect, stream
from captum_staa.cli.explanation import Options, Sampling
from captum_staa.cli.methods import DEFAULTS
from captum_staa.models.classifier import DEFAULT_FRAMES
from captum_staa.models.loading import bundled_folder, bundled_names, notice_in
from captum_staa.perturbation.config import OBJECTIVES, REGULARIZERS

METHOD_OPTIONS = ("layers", "focus", "areas", "objective", "regularizer", "iterations")  # of some methods of explain


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: command-line arguments without the program name; None takes ``sys.argv[1:]``.

    Returns:
        The exit code: 0 on success; 1 if the demo does not find the planted evidence, if a clip or a method of a
        comparison failed, or if STAA cannot explain an inspected model; 2 after an error; 130 after Ctrl-C.
    """
    for stream_out in (sys.stdout, sys.stderr):
        if isinstance(stream_out, io.TextIOWrapper):
            # A label that the terminal cannot encode must not end the command.
            stream_out.reconfigure(errors="replace")
    options = build_parser().parse_args(_join_layers(sys.argv[1:] if arguments is None else arguments))
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            print("captum_staa: interrupted; no partial files are left", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            if options.debug:
                raise
            print(f"captum_staa: {message_of(error)}", file=sys.stderr)
            return 2


def message_of(error: Exception) -> str:
    """Return one line about an error. Only errors of an unexpected kind are called so, because they may be bugs."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return (
            f"the memory is not enough ({text[:200]}). Use a method with fewer copies of the clip, a smaller --areas, "
            f"or --device cpu."
        )
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text
    return f"unexpected {type(error).__name__}: {text}. Pass --debug to see where it happened."


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; ``options.run`` is the function that runs the chosen command."""
    parser = argparse.ArgumentParser(
        prog="python -m captum_staa", description="Explain where and when a video model finds evidence for a class."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="explain | stream | compare | inspect | demo")
    _add_explain(commands.add_parser("explain", help="explain a prediction for a video file", allow_abbrev=False))
    _add_stream(commands.add_parser("stream", help="explain a video file or a camera live", allow_abbrev=False))
    _add_compare(commands.add_parser("compare", help="compare explanation methods and their cost", allow_abbrev=False))
    _add_inspect(
        commands.add_parser("inspect", help="show the attention and the tokens of a model", allow_abbrev=False)
    )
    _add_demo(commands.add_parser("demo", help="explain a synthetic clip whose evidence is known"))
    return parser


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Explain the prediction of a model for a video file. Write numbers and pictures to a folder."
    parser.epilog = f"{_methods()}\n\n{_bundled_models()}"
    add = parser.add_argument
    add("video", metavar="VIDEO", type=Path, help="video file in any format that FFmpeg reads")
    _add_model(parser)
    add("--out", metavar="DIR", type=Path, help="output folder (default: VIDEO_explained)")
    add("--overwrite", action="store_true", help="replace earlier results in DIR")
    add("--target", metavar="CLASS", help="label or index of the class to explain (default: the predicted class)")
    add("--versus", metavar="CLASS", help="also explain why not this class: a label, an index or 'rest'")
    add("--top", metavar="K", type=_positive, default=5, help="number of classes to print (default: 5)")
    add("--device", help="device of the model, for example cuda (default: cpu)")
    _add_debug(parser)
    add(
        "--method",
        metavar="NAME",
        help=f"explanation method, one of those below; case and punctuation do not matter (default: the first of "
        f"{', '.join(DEFAULTS)} that applies to the model)",
    )
    add = parser.add_argument_group("video language models").add_argument
    add("--prompt", metavar="TEXT", help="explain the model's answer to this question, word by word")
    add("--answer", metavar="TEXT", help="the answer to explain (default: the model's own); --versus is another word")
    add("--frames", metavar="N", type=_positive, help="number of frames that the model sees (default: 16)")
    add = parser.add_argument_group("options of some methods").add_argument
    add(
        "--layers",
        metavar="all|mean|-1,..",
        type=_layers,
        help="STAA and STAA (Chefer): transformer blocks to use (default: all)",
    )
    add(
        "--focus",
        action="store_const",
        const=True,
        help="STAA and STAA (Chefer): sharpen the map by suppressing noise",
    )
    add(
        "--areas",
        metavar="A,B,..",
        type=_areas,
        help="STEP: mask areas, as fractions of the clip volume (default: .05,.1,.15,.5)",
    )
    add("--objective", choices=list(OBJECTIVES), help="STEP: optimization objective (default: set by the method)")
    add("--regularizer", choices=list(REGULARIZERS), help="STEP: mask regularizer (default: set by the method)")
    add(
        "--iterations",
        metavar="N",
        type=_positive,
        help="STEP: maximum number of optimization steps (default: set by the method)",
    )
    add = parser.add_argument_group("frames").add_argument
    add(
        "--sampling",
        choices=["uniform", "dense", "stride"],
        help="how to sample the frames of the clip (default: uniform)",
    )
    add(
        "--windows",
        action="store_true",
        help="explain the whole video window by window; Ctrl-C keeps the finished windows",
    )
    add(
        "--stride",
        metavar="N",
        type=_positive,
        help="number of frames between window starts (default: no overlap), or between the frames of --sampling stride",
    )
    add(
        "--frame-stride",
        metavar="N",
        type=_positive,
        default=1,
        help="use every Nth frame within a window (default: 1)",
    )
    parser.set_defaults(run=_explain)


def _add_stream(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Explain a video file or a camera live. Write a video with the maps on top of the frames."
    parser.epilog = _bundled_models()
    add = parser.add_argument
    add("source", metavar="VIDEO_OR_CAMERA", help="video file, or camera on Linux: /dev/video0, or 0 for short")
    _add_model(parser)
    add("--out", metavar="FILE", type=Path, help="output file, .mp4 or .mkv (default: SOURCE_stream.mp4)")
    add("--overwrite", action="store_true", help="replace FILE")
    add(
        "--window",
        metavar="N",
        type=_positive,
        help="number of frames per window (default: the input length of the model)",
    )
    add(
        "--stride",
        metavar="N",
        type=_positive,
        help="number of frames between window starts (default: half a window)",
    )
    add(
        "--mode",
        choices=["attention", "relevance"],
        help="relevance: what adds to the class; attention: faster, of no class (default: relevance, or attention with "
        "--layers)",
    )
    add(
        "--layers",
        metavar="all|mean|-1,..",
        type=_layers,
        help="transformer blocks whose attention to use; -1 is the fastest (default: all)",
    )
    add(
        "--target",
        metavar="CLASS",
        help="label or index of the class to explain, not with --mode attention "
        "(default: the predicted class of each window)",
    )
    add(
        "--policy",
        choices=["wait", "drop"],
        help="what to do if frames arrive faster than they are explained: wait pauses the source (default for a file), "
        "drop skips frames (default for a camera; a file is then read at its own frame rate)",
    )
    add("--loop", action="store_true", help="repeat a file until Ctrl-C; the finished frames are kept")
    add("--limit", metavar="N", type=_positive, help="maximum number of frames to read")
    add("--device", help="device of the model, for example cuda (default: cpu)")
    _add_debug(parser)
    parser.set_defaults(run=_stream)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Compare explanation methods on clips: accuracy, cost, and scores of control maps."
    parser.epilog = _methods()
    add = parser.add_argument
    add(
        "--model",
        metavar="NAME",
        required=True,
        help="bundled model, folder, or owner/name on the Hugging Face Hub",
    )
    add("--out", metavar="DIR", type=Path, required=True, help="output folder; results are saved clip by clip")
    add("--resume", action="store_true", help="continue a comparison in DIR that was started with the same options")
    add("--methods", metavar="A,B,..", type=compare.names, help="methods to compare (default: all below)")
    add(
        "--metrics",
        metavar="A,B,..",
        type=compare.names,
        help=f"metrics to compute, from {', '.join(benchmark.METRICS)} (default: most)",
    )
    add(
        "--no-model-controls",
        dest="model_controls",
        action="store_false",
        help="skip the controls that run the first method again, with random weights and for another class",
    )
    add("--device", help="device of the model, for example cuda; each process uses a separate GPU (default: cpu)")
    add("--dtype", choices=list(compare.DTYPES), default="float32", help="dtype of the model (default: float32)")
    _add_debug(parser)
    add = parser.add_argument_group("clips").add_argument
    add("--planted", metavar="N", type=_positive, help="use N synthetic clips whose evidence is known")
    add("--task", choices=list(LABELS), help="task of the planted clips (default: the last part of the model name)")
    add("--videos", metavar="DIR", type=Path, help="folder of video files")
    add("--labels", metavar="CSV", type=Path, help="classes of the videos, with columns name and label")
    add(
        "--boxes",
        metavar="CSV",
        type=Path,
        help="evidence boxes of the videos, with columns name, frame, x0, y0, x1, y1",
    )
    add(
        "--joined",
        action="store_true",
        help="join each clip with a clip of another class, so that the time of the evidence is known",
    )
    add = parser.add_argument_group("metrics that perturb the clip").add_argument
    add("--baseline", choices=list(BASELINES), default="zero", help="values of hidden cells (default: zero)")
    add("--steps", metavar="N", type=_positive, default=32, help="steps of insertion and deletion (default: 32)")
    add(
        "--perturbations-per-eval",
        metavar="N",
        type=_positive,
        default=8,
        help="number of perturbed clips per forward pass (default: 8)",
    )
    add("--seed", metavar="N", type=int, default=0, help="random seed (default: 0)")
    parser.set_defaults(run=_compare)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Run a model, and show its attention layers, which token stands for which pixels, and what STAA can do with it."
    )
    parser.epilog = _bundled_models()
    add = parser.add_argument
    add("model", metavar="MODEL", help="bundled model (listed below), folder, or owner/name on the Hugging Face Hub")
    add("--frames", metavar="N", type=_positive, help="number of frames of a clip (default: that of the model)")
    add(
        "--size", metavar="N", type=_positive, help="height and width of a clip in pixels (default: those of the model)"
    )
    add("--device", help="device of the model, for example cuda (default: cpu)")
    _add_debug(parser)
    parser.set_defaults(
        run=lambda options: inspect.run(options.model, options.frames, options.size, options.device),
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Explain a synthetic clip whose evidence is known, and score methods on such clips."
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, default=Path("demo"), help="output folder (default: demo)")
    add("--overwrite", action="store_true", help="replace earlier results in DIR")
    add(
        "--clips",
        metavar="N",
        type=_positive,
        default=demo.CLIPS,
        help=f"number of clips to score (default: {demo.CLIPS})",
    )
    _add_debug(parser)
    parser.set_defaults(run=lambda options: demo.run(options.out, clips=options.clips, overwrite=options.overwrite))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        required=True,
        help="bundled model (listed below), folder, or owner/name on the Hugging Face Hub",
    )


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _methods() -> str:
    """Return the names of all methods, with a line about each."""
    wide = max(map(len, benchmark.METHODS))
    return "\n  ".join(
        ["methods:", *(f"{name:<{wide}}  {spec.description}" for name, spec in benchmark.METHODS.items())]
    )


def _bundled_models() -> str:
    """Return the names of the bundled models, below what the training record of each says."""
    groups: dict[str, list[str]] = {}
    for name in bundled_names():
        groups.setdefault(notice_in(bundled_folder(name)), []).append(name)
    lines = ["bundled models:"]
    for notice, names in groups.items():
        lines += [f"  {notice}:"] * bool(notice)
        lines += textwrap.wrap(
            ", ".join(names), 100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
    return "\n".join(lines)


def _explain(options: argparse.Namespace) -> int:
    given = _values(options, *METHOD_OPTIONS)
    if options.prompt is not None:
        return _explain_answer(options)
    if passed := [f"--{name}" for name in ("answer", "frames") if getattr(options, name) is not None]:
        raise ValueError(
            f"{', '.join(passed)} can only be used with --prompt, which is for video language models. Pass --prompt, "
            f"or drop {'it' if len(passed) == 1 else 'them'}."
        )
    return explain.run(
        Options(
            video=options.video,
            model=options.model,
            out=options.out or Path(f"{options.video.stem}_explained"),
            method=options.method,
            method_options={name: value for name, value in given.items() if value is not None},
            target=options.target,
            versus=options.versus,
            sampling=Sampling(options.sampling, options.windows, options.stride, options.frame_stride),
            device=options.device,
            overwrite=options.overwrite,
        ),
        options.top,
    )


def _explain_answer(options: argparse.Namespace) -> int:
    others = ("target", "sampling", "windows", "stride", *METHOD_OPTIONS)
    passed = [f"--{name}" for name in others if getattr(options, name)]
    passed += ["--method"] * (options.method is not None)
    if passed:
        raise ValueError(
            f"{', '.join(passed)} cannot be combined with --prompt, which explains each word of the answer. Drop "
            f"{'it' if len(passed) == 1 else 'them'}; --versus names another word."
        )
    return answer.run(
        answer.AnswerOptions(
            out=options.out or Path(f"{options.video.stem}_explained"),
            frames=options.frames or DEFAULT_FRAMES,
            **_values(options, "video", "model", "prompt", "answer", "versus", "device", "overwrite"),
        )
    )


def _stream(options: argparse.Namespace) -> int:
    name = f"camera{options.source}" if options.source.isdecimal() else Path(options.source).stem
    mode = options.mode or ("relevance" if options.layers is None else "attention")
    return stream.run(
        stream.StreamOptions(
            source=stream.SourceOptions(options.source, options.loop, options.limit),
            maps=stream.MapOptions(mode, options.layers, options.target),
            out=options.out or Path(f"{name}_stream.mp4"),
            **_values(options, "model", "overwrite", "window", "stride", "policy", "device"),
        )
    )


def _compare(options: argparse.Namespace) -> int:
    passed = ("methods", "metrics", "resume", "perturbations_per_eval", "model_controls", "seed")
    return compare.run(
        compare.CompareOptions(
            clips=compare.ClipOptions(**_values(options, "planted", "task", "videos", "labels", "boxes", "joined")),
            arguments={
                **_values(options, *passed),
                "metric_options": benchmark.MetricOptions(options.baseline, options.steps),
            },
            **_values(options, "model", "out", "device", "dtype"),
        )
    )


def _values(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}


def _join_layers(arguments: Sequence[str]) -> list[str]:
    """Rewrite ``--layers -1,-2`` as ``--layers=-1,-2``: argparse reads a value that begins with a dash as an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--layers":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _layers(text: str) -> str | list[int]:
    if text in ("all", "mean"):
        return text
    try:
        return [int(index) for index in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"must be all, mean, or block indices such as -1 or 0,5,-1, got {text!r}"
        ) from error


def _areas(text: str) -> list[float]:
    try:
        areas = [float(area) for area in text.split(",")]
    except ValueError:
        areas = []
    if not areas or not all(0 < area < 1 for area in areas):
        raise argparse.ArgumentTypeError(
            f"must be fractions of the clip volume in (0, 1), such as .1 or .05,.5, got {text!r}"
        )
    return areas


def _show_warning(message: Warning | str, *rest: object, **others: object) -> None:
    print(f"captum_staa: warning: {' '.join(str(message).split())}", file=sys.stderr)
