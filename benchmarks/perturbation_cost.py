"""Measure the cost of a spatio-temporal perturbation, and the part of the model: CPU seconds, one thread.

    python benchmarks/perturbation_cost.py --preset nested               # both networks, ten minutes of one core
    python benchmarks/perturbation_cost.py --only tiny                   # all presets, about five

One clip of 16 x 112 x 112, four areas, random weights. CPU seconds are those of the process. The time of the model is
measured around its forward, and between the gradients of its output and of its input. The rest (blending and its
gradient, masks, areas, regularizer and checks) is "outside", given per step. The default runs all its steps. The
presets of the papers run a few steps, and the total is extrapolated. Memory is the peak increase of resident memory in
a separate process, compared with one forward and backward of the model on its largest batch. It is read from Linux.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from captum_staa import SpatioTemporalPerturbation
from captum_staa.perturbation import PRESETS

AREAS = (0.05, 0.1, 0.15, 0.5)
COPIES = {"tiny": 8, "r2plus1d": 2}  # perturbations per call of the model
STEPS = {"tiny": 20, "r2plus1d": 2}  # of the presets of the papers


class Tiny(nn.Sequential):
    """Three 3D convolutions: a network so small that the cost outside the model is visible."""

    def __init__(self) -> None:
        widths = (3, 8, 16, 32)
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(widths):
            layers += [nn.Conv3d(c_in, c_out, 3, stride=2, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class _Residual(nn.Module):
    """Two factorized convolutions and a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_factorised(c_in, c_out, stride), nn.ReLU(), *_factorised(c_out, c_out, 1))
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv3d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


class R2Plus1D18(nn.Sequential):
    """R(2+1)D of 18 layers: each 3D convolution as one in space and one in time; 31 M parameters."""

    def __init__(self, classes: int = 101) -> None:
        stem = [nn.Conv3d(3, 45, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False), nn.BatchNorm3d(45), nn.ReLU()]
        stem += [nn.Conv3d(45, 64, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(64), nn.ReLU()]
        blocks, c_in = [], 64
        for c_out in (64, 128, 256, 512):
            blocks += [_Residual(c_in, c_out, 1 if c_out == 64 else 2), _Residual(c_out, c_out, 1)]
            c_in = c_out
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(512, classes))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"tiny": Tiny, "r2plus1d": R2Plus1D18}


def _factorised(c_in: int, c_out: int, stride: int) -> list[nn.Module]:
    between = c_in * c_out * 27 // (c_in * 9 + 3 * c_out)  # as many parameters as the 3D convolution has
    return [
        nn.Conv3d(c_in, between, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False),
        nn.BatchNorm3d(between),
        nn.ReLU(),
        nn.Conv3d(between, c_out, (3, 1, 1), (stride, 1, 1), (1, 0, 0), bias=False),
        nn.BatchNorm3d(c_out),
    ]


class Clocked(nn.Module):
    """A model that measures the time of its forward and its backward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.inside, self._start = model, 0.0, 0.0

    def forward(self, clip: Tensor) -> Tensor:
        start = time.process_time()
        answer = self.model(clip)
        self.inside += time.process_time() - start
        if clip.requires_grad:
            answer.register_hook(self._begin)
            clip.register_hook(self._end)
        return answer

    def _begin(self, grad: Tensor) -> None:
        self._start = time.process_time()

    def _end(self, grad: Tensor) -> None:
        self.inside += time.process_time() - self._start


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETWORKS[name]().eval(), torch.randn(1, 3, 16, 112, 112)


def seconds(name: str, preset: str, perturbations_per_eval: int, steps: int | None) -> tuple[float, float, int]:
    """Return the CPU seconds of a call, the seconds inside the model, and the number of steps."""
    model, clip = network(name)
    clocked = Clocked(model)
    method = SpatioTemporalPerturbation(clocked, "BCTHW", preset=preset)
    start = time.process_time()
    parts = method.attribute_maps(
        clip, target=0, areas=AREAS, iterations=steps, perturbations_per_eval=perturbations_per_eval
    )
    return time.process_time() - start, clocked.inside, int(parts.history.steps[-1])


def alone(model: nn.Module, clip: Tensor, copies: int) -> None:
    """Run one forward and backward on ``copies`` clips."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    batch = clip.repeat(copies, 1, 1, 1, 1).requires_grad_()
    torch.autograd.grad(model(batch).log_softmax(1)[:, 0].sum(), batch)


def peak(name: str, preset: str, perturbations_per_eval: int) -> float:
    """Return the increase of resident memory in MiB."""
    model, clip = network(name)
    alone(model, clip, 1)  # one-time allocations of the first call
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
    before = _resident("VmRSS")
    if preset == "model":
        for _ in range(3):
            alone(model, clip, perturbations_per_eval)
    else:
        method = SpatioTemporalPerturbation(model, "BCTHW", preset=preset)
        options = {"areas": AREAS, "iterations": 3, "perturbations_per_eval": perturbations_per_eval}
        method.attribute(clip, target=0, init=clip, **options)  # the gradients of an initial map need less than a step
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def apart(*arguments: str) -> float:
    """Return the peak of a separate process."""
    command = [sys.executable, "-W", "ignore", __file__, "--peak", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETWORKS, action="append")
    parser.add_argument("--preset", choices=PRESETS, action="append")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak(arguments.peak[0], arguments.peak[1], int(arguments.peak[2])))
        return
    print(
        "| network | preset | copies per call | steps | CPU s per clip | ms outside per step | share outside "
        "| memory, MiB | model alone, MiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.only or NETWORKS:
        for preset in arguments.preset or PRESETS:
            copies = COPIES[name]
            few = None if preset == "nested" else STEPS[name]
            took, inside, steps = seconds(name, preset, copies, few)
            outside = 1e3 * (took - inside) / steps
            about = f"{took:.1f}"
            if few is not None:
                start = seconds(name, preset, copies, 0)[0]  # baselines and the first check
                steps = PRESETS[preset].iterations
                about = f"about {start + (took - start) / few * steps:.0f}"
            memory = apart(name, preset, str(copies)), apart(name, "model", str(copies))
            print(
                f"| {name} | {preset} | {copies} | {steps} | {about} | {outside:.1f} | {1 - inside / took:.0%} "
                f"| {memory[0]:.0f} | {memory[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
