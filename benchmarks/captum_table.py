"""Run Captum's methods on each kind of video model, and write the table in docs/captum_methods.md.

    python benchmarks/captum_table.py                   # writes the page
    python benchmarks/captum_table.py --check           # compares the results with the existing page
    python benchmarks/captum_table.py --only Saliency   # prints the rows whose names start with this prefix

The parts are in captum_methods/: subjects.py has the models, checks.py and ours.py call each method and compare its
result with formulas.py.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from captum_methods import checks, ours
from captum_methods.formulas import Wrong
from captum_methods.subjects import MAKERS, Subject, subject
from tqdm import tqdm

PAGE = Path(__file__).parents[1] / "docs" / "captum_methods.md"
Check = Callable[[Subject, Callable[..., torch.Tensor]], str | None]


@dataclass(frozen=True)
class Row:
    """A method, the check of its result, and the alternative if the check fails.

    Attributes:
        method: name of the method.
        check: function of checks.py or ours.py.
        instead: label and check of the alternative, used if neither the raw nor the wrapped model passes.
        dtype: dtype of model and clips.
    """

    method: str
    check: Check
    instead: tuple[str, Check] | None = None
    dtype: torch.dtype = torch.float64


CAPTUM = [
    Row("Saliency", checks.saliency),
    Row("InputXGradient", checks.input_x_gradient),
    Row("IntegratedGradients", checks.integrated_gradients),
    Row("GradientShap", checks.gradient_shap),
    Row("DeepLift", checks.deep_lift),
    Row("DeepLiftShap", checks.deep_lift_shap),
    Row("GuidedBackprop", checks.guided_backprop),
    Row("Deconvolution", checks.deconvolution),
    Row("LRP", checks.lrp, ("with rules set by hand", checks.lrp_with_rules)),
    Row("FeatureAblation", checks.feature_ablation),
    Row("FeaturePermutation", checks.feature_permutation),
    Row("Occlusion", checks.occlusion),
    Row("ShapleyValueSampling", checks.shapley_sampling),
    Row("Lime", checks.lime),
    Row("KernelShap", checks.kernel_shap),
    Row("LayerGradCam, interpolated", checks.layer_grad_cam, ("use GradCAM", ours.grad_cam)),
    Row("GuidedGradCam", checks.guided_grad_cam, ("use GradCAM", ours.grad_cam)),
    Row("NoiseTunnel(Saliency), float32", checks.noise_tunnel, dtype=torch.float32),
    Row("NoiseTunnel(Saliency), bfloat16", checks.noise_tunnel, dtype=torch.bfloat16),
    Row("infidelity", checks.infidelity),
    Row("sensitivity_max(Saliency)", checks.sensitivity_max),
    Row("visualize_image_attr, per frame", checks.image_attr, ("use show_frames", ours.frames_on_one_scale)),
    Row("robust.FGSM", checks.fgsm),
    Row("robust.PGD", checks.pgd),
]
OURS = [
    Row("STAA", ours.staa),
    Row("GradCAM", ours.grad_cam),
    Row("VideoOcclusion", ours.video_occlusion),
    Row("VideoFeatureAblation", ours.video_feature_ablation),
    Row("RISE", ours.rise),
]

# Anchor in gotchas.md, by a pattern of the note.
GOTCHAS = {
    r"must be 2D|target size": "hugging-face-models-return-no-tensor",
    r"strided|view size": "a-strided-gradient-breaks-sensitivity_max",
    r"keeps the graph": "inputxgradient-and-deeplift-keep-the-graph",
    r"c10::": "noisetunnel-breaks-half-precision",
    r"nn\.ReLU": "guidedbackprop-of-a-transformer-is-its-gradient",
    r"step from the baseline": "deeplift-of-a-transformer-is-inputxgradient",
    r"should sum": "deeplift-loses-its-sum-where-relu-meets-max-pooling",
    r"no rule|relevance_input": "lrp-has-no-rule-for-conv3d",
    r"spatial dimensions|not a torch\.Tensor": "layergradcam-takes-tokens-for-channels",
    r"empty tensor": "guidedgradcam-lays-time-over-color",
    r"separate scale": "visualize_image_attr-scales-every-frame-by-itself",
}

INTRO = """# Captum's methods on video models

This page shows which Captum methods work on which kind of video model. Every cell is a call on two clips. The result
was compared with an independent formula: gradients with autograd, ablations with ablation by hand, Shapley values
with all subsets, Integrated Gradients and DeepLift with the change of the output, and a metric with its definition.

| cell | meaning |
|---|---|
| works | correct numbers, in a tensor that Captum's own tools accept, with the unchanged model |
| with VideoClassifier | correct numbers with `VideoClassifier(model)` only |
| use ... | the class or function of this library gives correct numbers |
| with rules set by hand | correct numbers after a rule was set on every layer for which Captum has no rule |
| runs, ... | no error, but wrong numbers, with and without VideoClassifier |
| error | raises an error, with and without VideoClassifier |

Hugging Face models were passed to Captum as `lambda clip: model(clip).logits`.
"""
MADE = """The models are small: the bundled trained transformers, a random VideoPrism, a random 3D CNN (convolution,
batch norm, ReLU, max pool), a CNN for each frame with an LSTM, and two 3D CNNs whose logits are added. The
[gotchas](gotchas.md) describe what to do instead. Made with captum {captum}, torch {torch} and
transformers {transformers} by

```console
python benchmarks/captum_table.py
```
"""
Cell = tuple[str, str | None]


def cell(row: Row, column: str) -> Cell:
    """Return the label of a cell and its note: the reason why a simpler way fails, or a remark."""
    s = subject(column, row.dtype)
    ways = [("works", row.check, s.wrapped)]
    if row in CAPTUM:
        ways = [("works", row.check, s.raw), ("with VideoClassifier", row.check, s.wrapped)]
        ways += [(*row.instead, s.wrapped)] if row.instead else []
    failures: list[Exception] = []
    for label, check, model in ways:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Captum warns on most calls, and some of the failures are expected
                remark = check(s, model)
        except Exception as error:
            failures.append(error)
        else:
            return label, _reason(failures[-1], s) if failures else remark
    error = failures[:2][-1]  # of the method itself, not of the alternative
    return f"runs, {error.short}" if isinstance(error, Wrong) else "error", _reason(error, s)


def _reason(error: Exception, s: Subject) -> str:
    """Return the first clause of an error message, with short class names, "the model" for the network."""
    if isinstance(error, Wrong):
        return str(error)
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", " ".join(str(error).split()))
    message = message.replace(type(s.net).__name__, "the model")
    clause = re.split(r"[,;.:] (?=[A-Za-z])| and no| \(at least", message)[0].rstrip(".")
    return f"`{type(error).__name__}: {clause}`"


def cells(rows: Sequence[Row], columns: Sequence[str]) -> dict[tuple[str, str], Cell]:
    """Return the cells of some rows and columns."""
    pairs = [(row, column) for row in rows for column in columns]
    return {(row.method, column): cell(row, column) for row, column in tqdm(pairs, disable=None)}


def page(found: dict[tuple[str, str], Cell]) -> str:
    """Return the whole page."""
    numbers: dict[str, int] = {}

    def written(label: str, note: str | None) -> str:
        return label if note is None else f"{label} [^{numbers.setdefault(note, len(numbers) + 1)}]"

    def table(title: str, rows: Sequence[Row]) -> list[str]:
        lines = [f"| {title} | " + " | ".join(MAKERS) + " |", "|---" * (len(MAKERS) + 1) + "|"]
        for row in rows:
            line = [written(*found[row.method, column]) for column in MAKERS]
            lines.append(f"| {row.method} | " + " | ".join(line) + " |")
        return [*lines, ""]

    versions = {name: version(name).split("+")[0] for name in ("captum", "torch", "transformers")}
    lines = [INTRO, *table("Captum", CAPTUM), *table("captum_staa", OURS), MADE.format(**versions)]
    for note, number in numbers.items():
        anchors = [anchor for pattern, anchor in GOTCHAS.items() if re.search(pattern, note)]
        more = f" ([more](gotchas.md#{anchors[0]}))" if anchors else ""
        lines.append(f"[^{number}]: {note[0].upper()}{note[1:]}{more}.\n")
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if the existing page differs")
    parser.add_argument("--only", action="append", metavar="PREFIX", help="print these rows only; may be repeated")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.only:
        rows = [row for row in (*CAPTUM, *OURS) if row.method.startswith(tuple(options.only))]
        for (method, column), (label, note) in cells(rows, list(MAKERS)).items():
            print(f"{method} | {column} | {label}" + (f" | {note}" if note else ""))
        return
    text = page(cells([*CAPTUM, *OURS], list(MAKERS)))
    if options.check:
        before = PAGE.read_text(encoding="utf-8").splitlines()
        sys.exit("\n".join(difflib.unified_diff(before, text.splitlines(), "page", "now", lineterm="", n=0)) or None)
    PAGE.with_suffix(".part").write_text(text, encoding="utf-8")
    PAGE.with_suffix(".part").replace(PAGE)


if __name__ == "__main__":
    main()
