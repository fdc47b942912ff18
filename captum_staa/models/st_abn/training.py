"""Training of an ST-ABN with progress bar, early stopping and checkpoints. A custom training loop works as well."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from captum_staa._utils import notebook
from captum_staa._utils.checks import check_count, is_number
from captum_staa._utils.files import atomic, save_tensors
from captum_staa._utils.model_state import eval_mode
from captum_staa.models.st_abn.loss import Preset, STABNLoss, trained_modules
from captum_staa.models.st_abn.network import STABN

Batch = tuple[Tensor, ...]  # clips, targets and, for "edit", temporal gates and spatial gates
Data = Iterable[Batch] | Callable[[int], Iterable[Batch]]
OptimizerMaker = Callable[[list[nn.Parameter]], Optimizer]


def paper_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """Return the optimizer of the paper: SGD with Nesterov momentum 0.9, learning rate 0.01 and weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adam(parameters: list[nn.Parameter]) -> Optimizer:
    """Return AdamW, for modules that are trained beside a frozen model."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)


def faithful_optimizer(st_abn: STABN) -> Optimizer:
    """Return AdamW with a lower rate for the model than for the branch, for a trained model behind a bottleneck."""
    added = [*st_abn.branch.parameters(), *st_abn.mechanism.parameters()]
    groups = [{"params": added, "lr": 3e-3}, {"params": list(st_abn.model.parameters()), "lr": 5e-4}]
    return torch.optim.AdamW(groups, weight_decay=0.01)


def cosine(progress: float) -> float:
    """Return half a cosine from 1 to 0.02, the factor of the learning rate at ``progress`` from 0 to 1."""
    return 0.02 + 0.49 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class FitConfig:
    """Options of :func:`fit_st_abn`: how it takes its steps, when it stops early, and where it keeps its state.

    Example:
        >>> config = FitConfig(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), patience=3)
        >>> config.max_grad_norm
        1.0

    Args:
        optimizer: function from parameters to an optimizer; None uses the paper's SGD if all parameters are trained,
            otherwise AdamW; for a bottleneck, AdamW with a rate of 3e-3 for the branch and 5e-4 for the model.
        schedule: function from the fraction of completed epochs, 0 to 1, to a factor of the learning rate.
        max_grad_norm: limit of the gradient norm over all trained parameters in every step, above 0; None sets no
            limit. This limit is an addition of this library; it is not described in the paper.
        patience: number of epochs without a new best loss after which the training stops; None never stops early.
        checkpoint: path of a safetensors file that is written after every epoch; None writes no file.
        resume: whether to continue from ``checkpoint`` if it exists. Without it, an existing checkpoint is an error.

    Raises:
        TypeError: ``patience`` is not an integer, or ``max_grad_norm`` is not a number.
        ValueError: one of them is out of range.
    """

    optimizer: OptimizerMaker | None = None
    schedule: Callable[[float], float] = cosine
    max_grad_norm: float | None = 1.0
    patience: int | None = None
    checkpoint: str | Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.patience is not None:
            check_count("patience", self.patience)
        limit = self.max_grad_norm
        if limit is None:
            return
        if not is_number(limit):
            raise TypeError(f"max_grad_norm must be a number above 0 or None, got {limit!r}. Pass, e.g., 1.0.")
        if limit <= 0:
            raise ValueError(f"max_grad_norm must be above 0, got {limit}. Pass None to not limit the gradient.")
        object.__setattr__(self, "max_grad_norm", float(limit))  # NumPy numbers cannot be written to a checkpoint


@dataclass
class FitHistory:
    """The losses of a training by epoch, the result of :func:`fit_st_abn`.

    Attributes:
        train: for each epoch, the mean of each term of the loss and of their sum, ``"loss"``.
        validation: the same for the validation data; empty if there are none.
        best: index of the epoch whose weights the network has after the training.
        interrupted: whether Ctrl-C ended the training.
    """

    train: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)
    best: int = -1
    interrupted: bool = False

    @property
    def judged(self) -> list[float]:
        """The loss by which epochs are compared: the validation loss if there is one, otherwise the training loss."""
        return [terms["loss"] for terms in self.validation or self.train]

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the losses by epoch, and every term at the first, the best and the last epoch."""
        sides = {name: side for name, side in (("train", self.train), ("validation", self.validation)) if side}
        losses = {name: [(float(at), of["loss"]) for at, of in enumerate(side)] for name, side in sides.items()}
        epochs = sorted({0, self.best, len(self.train) - 1} & set(range(len(self.train))))
        terms = list(self.train[0]) if self.train else []
        rows: list[list[notebook.Cell]] = [
            [at, name, *map(side[at].__getitem__, terms)] for at in epochs for name, side in sides.items()
        ]
        title = f"{len(self.train)} epochs, the weights are of epoch {self.best}" + ", interrupted" * self.interrupted
        return notebook.block(
            title, notebook.curves(losses, "epoch", "loss"), notebook.table(["epoch", "data", *terms], rows)
        )


def fit_st_abn(
    st_abn: STABN,
    data: Data,
    loss: STABNLoss | None = None,
    config: FitConfig | None = None,
    *,
    preset: Preset | None = None,
    epochs: int = 10,
    validation: Data | None = None,
    seed: int = 0,
    show_progress: bool = False,
) -> FitHistory:
    """Train an ST-ABN, or a branch that was added to a model. The network keeps the weights of its best epoch.

    Example:
        >>> from captum_staa.models import VideoClassifier
        >>> st_abn = STABN.inject(VideoClassifier.from_pretrained("tiny-resnet3d-pattern"), "stages.1")
        >>> batches = [(torch.rand(2, 3, 16, 48, 48), torch.tensor([0, 1]))]
        >>> history = fit_st_abn(st_abn, batches, STABNLoss("adapter"), epochs=2)
        >>> len(history.train), sorted(history.train[0])
        (2, ['attention', 'loss', 'perception'])

    Args:
        st_abn: the network. It is changed in place.
        data: batches ``(clips, targets)``, followed by ``temporal`` and ``spatial`` gates for ``"edit"``. A list, a
            DataLoader or another object that can be iterated once per epoch; or a function from the index of the epoch
            to such an object.
        loss: the loss; None uses ``STABNLoss(preset)``.
        preset: a preset of :class:`STABNLoss`, in place of a ``loss``; None uses ``"faithful"`` for a bottleneck, and
            the paper's for other mechanisms.
        config: optimizer, schedule, early stopping and checkpoint; None uses ``FitConfig()``.
        epochs: number of epochs, at least 1.
        validation: batches whose loss selects the best epoch; None uses the training loss.
        seed: seed of dropout and shuffling. They depend only on the seed and the index of the epoch, so a resumed
            training gives the same weights. The global random state does not change.
        show_progress: whether to show a progress bar over epochs with the loss.

    Returns:
        :class:`FitHistory`. Ctrl-C returns it as well, with a warning and the best weights so far.

    Raises:
        ValueError: the loss is not finite (the best weights so far are kept), there is no batch, the checkpoint is of
            another training or exists without ``resume=True``, ``epochs`` is out of range, or both ``loss`` and
            ``preset`` are given.
        TypeError: ``epochs`` is not an integer.
    """
    if loss is not None and preset is not None:
        raise ValueError(f"preset must be None if loss is given, got {preset!r} and {loss}. Pass one of them.")
    if loss is None:
        loss = STABNLoss(preset or ("faithful" if st_abn.config.mechanism == "bottleneck" else "paper"))
    config = config or FitConfig()
    check_count("epochs", epochs)
    trained = nn.ModuleList(trained_modules(st_abn, loss.preset))
    if config.optimizer is None and st_abn.config.mechanism == "bottleneck":
        optimizer = faithful_optimizer(st_abn)
    else:
        make = config.optimizer or (paper_optimizer if st_abn in trained else adam)
        optimizer = make(list(trained.parameters()))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    history, best = FitHistory(), _copied(trained)
    checkpoint = None
    if config.checkpoint is not None:
        settings = _settings(loss, config, optimizer, int(epochs), seed)
        checkpoint = _Checkpoint(Path(config.checkpoint), settings)
        if checkpoint.exists(config.resume):
            best = checkpoint.load(trained, optimizer, history)

    bar = tqdm(total=epochs, initial=len(history.train), desc="ST-ABN", disable=not show_progress)
    with bar, _only(st_abn, trained), torch.random.fork_rng(), torch.enable_grad():
        try:
            for epoch in range(len(history.train), epochs):
                if config.patience is not None and epoch - history.best > config.patience:
                    break
                torch.manual_seed(seed * 1_000_003 + epoch)
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * config.schedule(epoch / epochs)
                means = _epoch(st_abn, loss, _batches(data, epoch), optimizer, config.max_grad_norm, epoch / epochs)
                if validation is not None:
                    with torch.no_grad(), eval_mode(st_abn):
                        history.validation.append(_epoch(st_abn, loss, _batches(validation, epoch)))
                history.train.append(means)
                if history.judged[-1] == min(history.judged):
                    history.best, best = epoch, _copied(trained)
                if checkpoint is not None:
                    checkpoint.save(trained, optimizer, history, best)
                bar.set_postfix(loss=f"{history.judged[-1]:.3f}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            history.interrupted = True
            warnings.warn(
                f"training was interrupted in epoch {len(history.train)} of {epochs}. The best weights so "
                f"far are kept.",
                stacklevel=2,
            )
        finally:
            trained.load_state_dict(best)
    return history


def _batches(data: Data, epoch: int) -> Iterable[Batch]:
    return data(epoch) if callable(data) else data


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def _epoch(
    st_abn: STABN,
    loss: STABNLoss,
    batches: Iterable[Batch],
    optimizer: Optimizer | None = None,
    max_grad_norm: float | None = None,
    progress: float = 1.0,
) -> dict[str, float]:
    """Return means of the loss's terms over the batches. With an optimizer, each batch is a training step.

    In the training step, terms may weigh less at the begin of a training. The returned terms and their sum have full
    weight, so that epochs can be compared.
    """
    factors = loss.weights_at(progress)
    rows: list[dict[str, float]] = []
    for batch in batches:
        terms = loss.terms(st_abn, *batch)
        total = torch.stack(list(terms.values())).sum()
        rows.append({name: value.item() for name, value in {**terms, "loss": total}.items()})
        if not math.isfinite(rows[-1]["loss"]):
            raise ValueError(
                f"the loss must be finite, got {rows[-1]} at batch {len(rows)} of an epoch. The best weights so far "
                f"are kept. Lower the learning rate, e.g. FitConfig(optimizer=lambda parameters: "
                f"torch.optim.AdamW(parameters, lr=1e-4))."
            )
        if optimizer is not None:
            optimizer.zero_grad()
            torch.stack([factors.get(name, 1) * value for name, value in terms.items()]).sum().backward()
            if max_grad_norm is not None:
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                nn.utils.clip_grad_norm_(parameters, max_grad_norm)
            optimizer.step()
    if not rows:
        raise ValueError(
            "data must contain at least one batch in every epoch, got none. Pass a list, a DataLoader, or a function "
            "of the epoch: a generator can be used only once."
        )
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


@contextmanager
def _only(st_abn: STABN, trained: nn.Module) -> Iterator[None]:
    """Train only some modules; others are in eval mode without gradients. Restore this at the end."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in st_abn.parameters()]
    with eval_mode(st_abn, restore_buffers=False):
        st_abn.requires_grad_(False)
        trained.requires_grad_(True).train()
        try:
            yield
        finally:
            for parameter, requires, grad in before:
                parameter.requires_grad_(requires)
                parameter.grad = grad


def _settings(loss: STABNLoss, config: FitConfig, optimizer: Optimizer, epochs: int, seed: int) -> dict[str, Any]:
    """Return the settings by which a checkpoint is recognized as one of the same training."""
    return {
        "epochs": epochs,
        "seed": seed,
        "preset": loss.preset,
        "area": loss.area,
        "smoothness": loss.smoothness,
        "edit": loss.edit,
        "removed": loss.removed,
        "optimizer": type(optimizer).__name__,
        "rates": [group["lr"] for group in optimizer.param_groups],
        "max_grad_norm": config.max_grad_norm,
    }


@dataclass(frozen=True)
class _Checkpoint:
    """The file of a training: weights, state of the optimizer, history, and the settings that identify the training."""

    path: Path
    settings: dict[str, Any]

    def exists(self, resume: bool) -> bool:
        """Return whether the checkpoint exists.

        Raises:
            ValueError: it exists but ``resume`` is False, or its folder does not exist.
        """
        if not self.path.parent.is_dir():
            raise ValueError(
                f"checkpoint must be in an existing folder, got {str(self.path)!r}. Create the folder "
                f"{str(self.path.parent)!r} first."
            )
        if not self.path.exists():
            return False
        if not resume:
            raise ValueError(
                f"checkpoint must be a new file, got {str(self.path)!r}, which already exists. Pass resume=True to "
                f"continue from it, or another path."
            )
        return True

    def save(self, trained: nn.Module, optimizer: Optimizer, history: FitHistory, best: dict[str, Tensor]) -> None:
        """Write the checkpoint atomically."""
        state = optimizer.state_dict()
        tensors = {f"now.{name}": value for name, value in trained.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in best.items()}
        tensors |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value)
            for index, values in state["state"].items()
            for name, value in values.items()
            if value is not None
        }
        described = {"settings": self.settings, "groups": state["param_groups"], "history": asdict(history)}
        contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with atomic(self.path, overwrite=True) as part:
            save_tensors(save_file, contiguous, part, {"training": json.dumps(described)})

    def load(self, trained: nn.Module, optimizer: Optimizer, history: FitHistory) -> dict[str, Tensor]:
        """Restore the trained modules, the optimizer and the history, and return the best weights.

        Raises:
            ValueError: the file is not a checkpoint, or is one of another network or of other settings.
        """
        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
                described = json.loads((file.metadata() or {})["training"])
        except Exception as error:  # safetensors raises its own class, and a missing history is a KeyError
            raise ValueError(
                f"{str(self.path)!r} must be a checkpoint of fit_st_abn, got a file that cannot be read: {error}. Pass "
                f"another path."
            ) from error
        if described["settings"] != self.settings:
            raise ValueError(
                f"settings must equal those of the checkpoint {str(self.path)!r}, {described['settings']}, got "
                f"{self.settings}. Pass the same settings, or another path."
            )
        now, current = _under("now.", tensors), trained.state_dict()
        if _shapes(now) != _shapes(current):
            raise ValueError(
                f"st_abn must be the network of the checkpoint {str(self.path)!r}, got another network: names or "
                f"shapes of its weights differ. Pass the same network, or another path."
            )
        trained.load_state_dict(now)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": described["groups"]})
        for name, value in described["history"].items():
            setattr(history, name, value)
        return _under("best.", tensors)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
