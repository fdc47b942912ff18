"""``python -m captum_staa``: explain a video file or a stream, compare methods, or see a demonstration."""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from captum_staa import __version__, benchmark
from captum_staa.attr.st_abn import WEIGHTINGS
from captum_staa.benchmark.scenes import LABELS
from captum_staa.benchmark.scoring import BASELINES
from captum_staa.cli import compare, demo, explain, stream
from captum_staa.cli.explanation import Options
from captum_staa.cli.methods import METHODS
from captum_staa.models.loading import bundled_names
from captum_staa.perturbation.objective import AIMS
from captum_staa.perturbation.presets import PRESETS
from captum_staa.perturbation.regularizers import REGULARIZERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: as on a command line, without the program's name; None takes the process's own.

    Returns:
        The exit code: 0; 1 if the demo did not come out as planted, or if a clip or a method of a comparison failed; 2
        after an error; 130 after Ctrl-C.
    """
    for told in (sys.stdout, sys.stderr):
        if isinstance(told, io.TextIOWrapper):
            told.reconfigure(errors="replace")  # a label or an arrow that a terminal cannot show ends nothing
    options = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            print("captum_staa: interrupted; nothing is left half-written", file=sys.stderr)
            return explain.INTERRUPTED
        except (ValueError, OSError, ImportError) as error:
            if options.debug:
                raise
            print(f"captum_staa: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
            return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m captum_staa", description="Where and when did a video model look, and why this class?"
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="explain | stream | compare | demo")
    _add_explain(commands.add_parser("explain", help="explain what a model says of a video file", allow_abbrev=False))
    _add_stream(commands.add_parser("stream", help="explain a file or a camera as it plays", allow_abbrev=False))
    _add_compare(commands.add_parser("compare", help="which explanation to trust, and its cost", allow_abbrev=False))
    _add_demo(commands.add_parser("demo", help="explain a made-up clip whose right explanation is known"))
    return parser


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Explain what a model says of a video file, in numbers and pictures."
    parser.epilog = "models shipped with this package:\n  " + "\n  ".join(bundled_names())
    add = parser.add_argument
    add("video", metavar="VIDEO", type=Path, help="any file that FFmpeg reads")
    add("--model", metavar="NAME", required=True, help="a shipped name (below), a folder, or owner/name on the hub")
    add("--out", metavar="DIR", type=Path, help="folder of the results (default: VIDEO's name, with _explained)")
    add("--overwrite", action="store_true", help="replace earlier results in DIR")
    add("--target", metavar="CLASS", help="label or index of the class to explain (default: the likeliest)")
    add("--top", metavar="K", type=_positive, default=5, help="classes to print (default: 5)")
    add("--device", help="such as cuda (default: cpu)")
    add("--debug", action="store_true", help="show where in the code an error came from")
    add("--method", choices=list(METHODS), default="staa", help="(default: staa)")
    add = parser.add_argument_group("of --method staa, what a transformer attends to").add_argument
    add("--mode", choices=["relevance", "attention", "released"], help="(default: relevance)")
    add("--rule", choices=["decomposition", "chefer"], help="of --mode relevance (default: decomposition)")
    blocks = "blocks that count, of --mode attention and --rule chefer (default: all)"
    add("--layers", metavar="all|mean|-1,..", type=_layers, help=blocks)
    add("--focus", action="store_true", help="raise evidence out of noise, of --mode attention and --rule chefer")
    add = parser.add_argument_group("of --method perturbation, masks learned for any model").add_argument
    add("--preset", choices=list(PRESETS), help="way of learning; step is the paper's (default: nested)")
    add("--areas", metavar="A,B,..", type=_areas, help="parts of the volume that masks leave (default: .05,.1,.15,.5)")
    add("--objective", choices=list(AIMS), help="of what masks show, or hide (default: the preset's)")
    add("--regularizer", choices=list(REGULARIZERS), help="of masks (default: the preset's)")
    add("--iterations", metavar="N", type=_positive, help="steps of learning, at most (default: the preset's)")
    add = parser.add_argument_group("of --method attention-branch, the gates of an ST-ABN").add_argument
    add("--weighting", choices=list(WEIGHTINGS), help="(default: grad_gate, or gate of a branch that only observes)")
    frames = parser.add_argument_group("frames")
    add = frames.add_argument
    add("--sampling", choices=["uniform", "dense", "stride"], help="frames of the one clip seen (default: uniform)")
    add("--windows", action="store_true", help="see all of a long video, window by window; Ctrl-C keeps what is done")
    add(
        "--stride",
        metavar="N",
        type=_positive,
        help="frames from one window to the next (default: no overlap), or between the frames of --sampling stride",
    )
    add("--frame-stride", metavar="N", type=_positive, default=1, help="within a window, see every Nth frame")
    parser.set_defaults(run=_explain)


def _add_stream(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Explain a video file or a camera as it plays, and write it with the maps on top."
    parser.epilog = "models shipped with this package:\n  " + "\n  ".join(bundled_names())
    add = parser.add_argument
    add("source", metavar="VIDEO_OR_CAMERA", help="a file; or /dev/video0, or 0 for short (Linux)")
    add("--model", metavar="NAME", required=True, help="a shipped name (below), a folder, or owner/name on the hub")
    add("--out", metavar="FILE", type=Path, help="an .mp4 or .mkv (default: the source's name, with _stream.mp4)")
    add("--overwrite", action="store_true", help="replace FILE")
    add("--window", metavar="N", type=_positive, help="frames per window (default: the model's own number)")
    add("--stride", metavar="N", type=_positive, help="frames from one window to the next (default: half a window)")
    add("--mode", choices=["attention", "relevance", "released"], default="attention", help="(default: attention)")
    add("--layers", metavar="all|mean|-1,..", type=_layers, help="blocks that count; -1 is quickest (default: all)")
    add("--target", metavar="CLASS", help="of --mode relevance: label or index (default: each window's likeliest)")
    add(
        "--policy",
        choices=["wait", "drop"],
        help="when frames come faster than they are explained: let the source wait (default for a file), or drop "
        "frames (default for a camera; a file then plays at its own rate)",
    )
    add("--loop", action="store_true", help="play a file again and again; Ctrl-C keeps what is done")
    add("--limit", metavar="N", type=_positive, help="frames to see, at most")
    add("--device", help="such as cuda (default: cpu)")
    add("--debug", action="store_true", help="show where in the code an error came from")
    parser.set_defaults(run=_stream)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = "Compare methods on clips: what they find, what they cost, and whether controls do as well."
    parser.epilog = "\n  ".join(["methods, case and punctuation do not matter:", *benchmark.METHODS])
    add = parser.add_argument
    add("--model", metavar="NAME", required=True, help="a shipped name, a folder, or owner/name on the hub")
    add("--out", metavar="DIR", type=Path, required=True, help="folder of the results, kept clip by clip")
    add("--resume", action="store_true", help="go on with what DIR holds, if it was asked for in the same way")
    add("--methods", metavar="A,B,..", type=compare.names, help="(default: all below)")
    add("--metrics", metavar="A,B,..", type=compare.names, help=f"of {', '.join(benchmark.METRICS)} (default: most)")
    add(
        "--no-model-controls",
        dest="model_controls",
        action="store_false",
        help="leave out the controls that run the first method again, on random weights and for another class",
    )
    add("--device", help="such as cuda, where each process takes a GPU of its own (default: cpu)")
    add("--dtype", choices=list(compare.DTYPES), default="float32", help="of the model (default: float32)")
    add("--debug", action="store_true", help="show where in the code an error came from")
    add = parser.add_argument_group("clips").add_argument
    add("--planted", metavar="N", type=_positive, help="N made-up clips whose evidence is known")
    add("--task", choices=list(LABELS), help="of planted clips (default: as the model's name ends)")
    add("--videos", metavar="DIR", type=Path, help="folder of videos")
    add("--labels", metavar="CSV", type=Path, help="their columns name and label")
    add("--boxes", metavar="CSV", type=Path, help="columns name, frame, x0, y0, x1, y1: where the evidence is")
    add("--joined", action="store_true", help="join each clip with one of another class: a truth in time for any set")
    add = parser.add_argument_group("metrics that alter the clip").add_argument
    add("--baseline", choices=list(BASELINES), default="zero", help="what hides cells (default: zero)")
    add("--steps", metavar="N", type=_positive, default=32, help="points of insertion and deletion (default: 32)")
    add(
        "--perturbations_per_eval",
        metavar="N",
        type=_positive,
        default=8,
        help="altered clips per call of the model (default: 8)",
    )
    add("--seed", metavar="N", type=int, default=0, help="of what is drawn at random (default: 0)")
    parser.set_defaults(run=_compare)


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Explain a made-up clip whose right explanation is known, and score methods on such clips."
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, default=Path("demo"), help="folder of the results (default: demo)")
    add("--overwrite", action="store_true", help="replace earlier results in DIR")
    add("--clips", metavar="N", type=_positive, default=demo.CLIPS, help=f"clips to score (default: {demo.CLIPS})")
    add("--debug", action="store_true", help="show where in the code an error came from")
    parser.set_defaults(run=lambda options: demo.run(options.out, clips=options.clips, overwrite=options.overwrite))


def _explain(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name not in ("run", "debug")}
    given["out"] = options.out or Path(f"{options.video.stem}_explained")
    return explain.run(Options(**given))


def _stream(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name not in ("run", "debug")}
    name = f"camera{options.source}" if options.source.isdecimal() else Path(options.source).stem
    given["out"] = options.out or Path(f"{name}_stream.mp4")
    return stream.run(stream.Asked(**given))


def _compare(options: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(options).items() if name not in ("run", "debug")}
    return compare.run(compare.Asked(**given))


def _joined(arguments: Sequence[str]) -> list[str]:
    """``--layers -1,-2`` as ``--layers=-1,-2``: argparse takes what begins with a dash for an option."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == "--layers":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number of at least 1, got {text!r}")
    return int(text)


def _layers(text: str) -> str | list[int]:
    if text in ("all", "mean"):
        return text
    try:
        return [int(index) for index in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"takes all, mean, or block numbers such as -1 or 0,5,-1, got {text!r}"
        ) from error


def _areas(text: str) -> list[float]:
    try:
        areas = [float(area) for area in text.split(",")]
    except ValueError:
        areas = []
    if not areas or not all(0 < area < 1 for area in areas):
        raise argparse.ArgumentTypeError(f"takes parts of the volume in (0, 1), such as .1 or .05,.5, got {text!r}")
    return areas


def _show_warning(message: Warning | str, *rest: object, **others: object) -> None:
    print(f"captum_staa: warning: {' '.join(str(message).split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
