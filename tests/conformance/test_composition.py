"""Tests of every method with Captum's tools: NoiseTunnel, the two metrics, visualization, and attacks on the model."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from captum.attr import NoiseTunnel
from captum.attr import visualization as captum_visualization
from captum.metrics import infidelity, infidelity_perturb_func_decorator, sensitivity_max
from captum.robust import FGSM, PGD, MinParamPerturbation
from torch import Tensor

from captum_staa import VideoAttribution

from .models import Case, Tensors, case
from .subjects import over
from .trials import Trial, as_tuple, assert_close

SAMPLES = 3


def interleaved(case: Case, times: int) -> dict[str, Any]:
    """Repeat every target as often as its clip."""
    return {"target": [target for target in case.target for _ in range(times)]}


def split(noises: list[Tensor]) -> Tensors | Tensor:
    return tuple(noises) if len(noises) > 1 else noises[0]


@over("conv", "two-stream", "vivit", nt_type=["smoothgrad", "smoothgrad_sq", "vargrad"], chunk=[None, 2], per="kind")
def test_noise_tunnel(trial: Trial, nt_type: str, chunk: int | None) -> None:
    """Compare with mean, mean square and variance over the same noise, which is drawn again."""
    deviation, clips = 0.1, trial.case.inputs
    chunks = [SAMPLES] if chunk is None else [2, 1]
    maps: list[list[Tensor]] = [[] for _ in clips]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = as_tuple(
            NoiseTunnel(trial.method).attribute(
                trial.case.clips,
                nt_type=nt_type,
                nt_samples=SAMPLES,
                nt_samples_batch_size=chunk,
                stdevs=deviation,
                **trial.keywords,
            )
        )
        torch.manual_seed(0)
        for count in chunks:
            repeated = [clip.repeat_interleave(count, 0) for clip in clips]
            noisy = [clip + torch.normal(0, torch.full_like(clip, deviation)) for clip in repeated]
            parts = as_tuple(trial.attribute(split(noisy), **interleaved(trial.case, count)))
            for list_, part in zip(maps, parts, strict=True):
                list_.append(part.unflatten(0, (len(trial.case.target), count)))
    for part, list_ in zip(found, maps, strict=True):
        values = torch.cat(list_, 1).double()  # (B, samples, ...)
        mean, square = values.mean(1), values.square().mean(1)
        expected = {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": square - mean**2}[nt_type]
        assert expected.std() > 0
        largest = mean.abs().max() if nt_type == "smoothgrad" else square.max()  # a variance is a difference of squares
        torch.testing.assert_close(part.double(), expected, rtol=0, atol=1e-5 * largest.item())


class Perturbation:
    """Noise for infidelity and sensitivity_max that records the perturbed inputs."""

    def __init__(self, seed: int = 0) -> None:
        self.generator, self.given = torch.Generator().manual_seed(seed), []

    def __call__(self, inputs: Tensor | Tensors, radius: float = 0.05) -> Tensor | Tensors:
        noisy = [x + radius * torch.randn(x.shape, generator=self.generator) for x in as_tuple(inputs)]
        self.given.append(tuple(noisy))
        return split(noisy)

    def all(self, batch: int) -> Tensors:
        """Return all perturbed inputs, ``(B, samples, ...)`` per input."""
        chunks = [[part.unflatten(0, (batch, -1)) for part in parts] for parts in self.given]
        return tuple(torch.cat(parts, 1) for parts in zip(*chunks, strict=True))


@over("conv", "two-stream", "vivit", multiplied=[False, True], normalize=[False, True], chunk=[None, 4], per="kind")
def test_infidelity(trial: Trial, multiplied: bool, normalize: bool, chunk: int | None) -> None:
    """Yeh et al. (NeurIPS 2019), equation 3: attribution times perturbation minus the fall of the output, squared."""
    attributions, batch, perturb = trial.attribute(), len(trial.case.target), Perturbation()
    found = infidelity(
        trial.case.model,
        infidelity_perturb_func_decorator(multiply_by_inputs=multiplied)(lambda inputs: perturb(inputs)),
        trial.case.clips,
        attributions,
        target=list(trial.case.target),
        n_perturb_samples=SAMPLES,
        max_examples_per_batch=chunk,
        normalize=normalize,
    )
    moved = perturb.all(batch)
    promised, fell = torch.zeros(batch, SAMPLES), torch.zeros(batch, SAMPLES)
    with torch.no_grad():
        for i, target in enumerate(trial.case.target):
            for j in range(SAMPLES):
                altered = [part[i : i + 1, j] for part in moved]
                whole = [clip[i : i + 1] for clip in trial.case.inputs]
                fell[i, j] = (trial.case.model(*whole) - trial.case.model(*altered))[0, target]
                for clip, part, attribution in zip(whole, altered, as_tuple(attributions), strict=True):
                    step = (clip - part) / (clip if multiplied else 1)
                    promised[i, j] += (attribution[i] * step[0]).sum()
    scale = (promised * fell).sum(1, keepdim=True) / promised.square().sum(1, keepdim=True) if normalize else 1
    expected = (scale * promised - fell).square().mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * fell.square().max().item())


@over("conv", "two-stream", "vivit", chunk=[None, 4], per="kind")
def test_sensitivity_max(trial: Trial, chunk: int | None) -> None:
    """Compare with the largest relative change of the map under small noise."""
    batch, perturb = len(trial.case.target), Perturbation()
    found = sensitivity_max(
        trial.method.attribute,
        trial.case.clips,
        perturb_func=perturb,
        n_perturb_samples=SAMPLES,
        max_examples_per_batch=chunk,
        **trial.keywords,
    )
    before = as_tuple(trial.attribute())
    expected = torch.zeros(batch)
    for noisy in perturb.given:
        count = len(noisy[0]) // batch
        after = as_tuple(trial.attribute(split(list(noisy)), **interleaved(trial.case, count)))
        for i in range(batch):
            size = sum(float(part[i].square().sum()) for part in before) ** 0.5
            for j in range(i * count, (i + 1) * count):
                change = sum(float((b[j] - a[i]).square().sum()) for a, b in zip(before, after, strict=True)) ** 0.5
                expected[i] = max(expected[i], change / size)
    assert (expected > 0).all()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@over("conv-btchw", "vivit", per="class", together=True)
def test_visualize_image_attr_of_a_frame(trial: Trial) -> None:
    """The drawn pixels are the map of the frame divided by its largest value."""
    attributions, layout, frame = trial.attribute(), trial.case.layout, 2
    drawn = VideoAttribution.from_attributions(attributions, layout).joint[0, frame]  # (H, W)
    pixels = layout.to_working(attributions)[0, frame].permute(1, 2, 0).numpy()  # (H, W, C)
    figure, axes = captum_visualization.visualize_image_attr(
        pixels, method="heat_map", sign="absolute_value", outlier_perc=0, use_pyplot=False
    )
    (image,) = axes.images
    shown = torch.as_tensor(image.get_array().data)
    assert_close(shown.double(), (drawn.abs() / drawn.abs().max()).double())
    plt.close(figure)


@pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients:UserWarning")
@pytest.mark.captum
@pytest.mark.parametrize("name", ["conv", "conv-btchw", "cnn-lstm", "two-stream", "videomae", "timesformer", "own"])
def test_captums_attacks_accept_the_model(name: str) -> None:
    subject = case(name)
    target, clips = torch.tensor(subject.target), subject.clips
    per_clip = torch.nn.CrossEntropyLoss(reduction="none")

    def loss(inputs: Tensors) -> Tensor:
        return per_clip(subject.model(*inputs), target).sum()

    leaves = tuple(clip.clone().requires_grad_() for clip in subject.inputs)
    slopes = torch.autograd.grad(loss(leaves), leaves)
    attacked = FGSM(subject.model, per_clip).perturb(clips, epsilon=0.1, target=target)
    for part, clip, slope in zip(as_tuple(attacked), subject.inputs, slopes, strict=True):
        sure = slope.abs() > 1e-4 * slope.abs().max()  # the sign of a rounding error is arbitrary
        assert sure.float().mean() > 0.5
        assert_close(part[sure], (clip + 0.1 * slope.sign())[sure], within=1e-6)
    stepped = PGD(subject.model, per_clip).perturb(clips, 0.1, 0.04, 4, target)
    for part, clip in zip(as_tuple(stepped), subject.inputs, strict=True):
        assert 0.05 < (part - clip).abs().max() <= 0.1 + 1e-6
    with torch.no_grad():
        assert loss(as_tuple(stepped)) > loss(subject.inputs)


@pytest.mark.captum
@pytest.mark.parametrize("name", ["conv", "cnn-lstm", "vivit"])
def test_min_param_perturbation_with_frozen_frames(name: str) -> None:
    """MinParamPerturbation, with an attack in time."""
    subject = case(name).part(0)
    (clip,), axis = subject.inputs, subject.layout.time

    def freeze(inputs: Tensor, frames: int) -> Tensor:
        """The last frames are replaced by the first one."""
        kept = inputs.shape[axis] - int(frames)
        first = inputs.narrow(axis, 0, 1)
        return torch.cat([inputs.narrow(axis, 0, kept), first.repeat_interleave(int(frames), axis)], axis)

    with torch.no_grad():
        answer = int(subject.model(clip).argmax())
        answers = [int(subject.model(freeze(clip, k)).argmax()) for k in range(clip.shape[axis])]
    expected = next((k for k, other in enumerate(answers) if other != answer), None)
    search = MinParamPerturbation(subject.model, freeze, "frames", 0, clip.shape[axis], 1)
    altered, fewest = search.evaluate(clip, target=answer)
    assert fewest == expected
    if expected is not None:
        assert torch.equal(altered, freeze(clip, expected))
