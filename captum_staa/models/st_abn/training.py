"""Training an ST-ABN: epochs with progress, early stop, checkpoints to go on from; a user may write another loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_staa._utils.checks import check_count, is_number
from captum_staa._utils.model_state import eval_mode
from captum_staa.models.st_abn.checkpoint import Checkpoint
from captum_staa.models.st_abn.history import FitHistory
from captum_staa.models.st_abn.loss import STABNLoss, trained
from captum_staa.models.st_abn.network import STABN

Batch = tuple[Tensor, ...]  # clips, targets and, for "edit", temporal gates and spatial gates
Data = Iterable[Batch] | Callable[[int], Iterable[Batch]]
OptimizerMaker = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def paper_optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The paper's: SGD with Nesterov momentum .9, learning rate .01, weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """For what learns beside a frozen model."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)


def cosine(progress: float) -> float:
    """Half a cosine from 1 nearly to 0."""
    return 0.02 + 0.49 * (1 + math.cos(math.pi * progress))


def fit_st_abn(
    st_abn: STABN,
    data: Data,
    loss: STABNLoss | None = None,
    *,
    epochs: int = 10,
    optimizer: OptimizerMaker | None = None,
    schedule: Callable[[float], float] = cosine,
    validation: Data | None = None,
    patience: int | None = None,
    max_grad_norm: float | None = 1.0,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    seed: int = 0,
    show_progress: bool = False,
) -> FitHistory:
    """Train an ST-ABN, or what was added to a model; the network keeps the weights of its best epoch.

    Example:
        >>> from captum_staa.models import VideoClassifier
        >>> st_abn = STABN.inject(VideoClassifier.from_pretrained("tiny-resnet3d-pattern"), "stages.1")
        >>> batches = [(torch.rand(2, 3, 16, 48, 48), torch.tensor([0, 1]))]
        >>> history = fit_st_abn(st_abn, batches, STABNLoss("adapter"), epochs=2)
        >>> len(history.train), sorted(history.train[0])
        (2, ['attention', 'loss', 'perception'])

    Args:
        st_abn: is changed in place.
        data: batches ``(clips, targets)``, with ``temporal`` and ``spatial`` gates behind them for ``"edit"``: a list,
            a DataLoader, anything that can be iterated once per epoch; or a function from the epoch's number to one.
        loss: what to train for; None takes the paper's.
        epochs: how many times to go through the data.
        optimizer: makes an optimizer for parameters; None takes the paper's SGD where all is trained, else AdamW.
        schedule: factor of the learning rate in an epoch, by the part of all epochs before it, from 0 to 1.
        validation: batches by which epochs are compared; None compares them by their training loss.
        patience: stop after so many epochs without a new best; None goes through all.
        max_grad_norm: a longer gradient, of all that learns together, is shortened to this norm in every step; None
            leaves it as it is. The limit is ours, not one that is known of the paper.
        checkpoint: a safetensors file written after every epoch, from which a later call goes on.
        resume: go on from ``checkpoint`` where it is there; one that is there is refused without it.
        seed: dropout and shuffling, given by the seed and the epoch's number alone, so that a resumed training gives
            the same weights; the global random state is left as it was.
        show_progress: a bar over epochs with the loss.

    Returns:
        :class:`FitHistory`. Ctrl-C returns it as well, with a warning and the best weights so far.

    Raises:
        ValueError: a loss that is not finite (the best weights so far are kept), no batch, a checkpoint of another
            training or one in the way, or an option out of range.
        TypeError: ``epochs`` or ``patience`` is no whole number, ``max_grad_norm`` no number.
    """
    loss = loss or STABNLoss()
    check_count("epochs", epochs)
    if patience is not None:
        check_count("patience", patience)
    if max_grad_norm is not None:
        if not is_number(max_grad_norm):
            raise TypeError(f"max_grad_norm is a number above 0 or None, got {max_grad_norm!r}")
        if max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm is above 0, got {max_grad_norm}; None does not limit the gradient")
        max_grad_norm = float(max_grad_norm)
    learner = nn.ModuleList(trained(st_abn, loss.preset))
    make = optimizer or (paper_optimizer if st_abn in learner else adam)
    stepper = make(list(learner.parameters()))
    for group in stepper.param_groups:
        group["initial_lr"] = group["lr"]
    history, best = FitHistory(), _copied(learner)
    weights = {"area": loss.area, "smoothness": loss.smoothness, "edit": loss.edit}
    rates = {"optimizer": type(stepper).__name__, "rates": [group["lr"] for group in stepper.param_groups]}
    steps = {**rates, "max_grad_norm": max_grad_norm}
    settings = {"epochs": int(epochs), "seed": seed, "preset": loss.preset, **weights, **steps}
    store = None if checkpoint is None else Checkpoint(Path(checkpoint), settings)
    if store is not None and store.there(resume):
        best = store.load(learner, stepper, history)

    bar = tqdm(total=epochs, initial=len(history.train), desc="ST-ABN", disable=not show_progress)
    with bar, _only(st_abn, learner), torch.random.fork_rng(), torch.enable_grad():
        try:
            for epoch in range(len(history.train), epochs):
                if patience is not None and epoch - history.best > patience:
                    break
                torch.manual_seed(seed * 1_000_003 + epoch)
                for group in stepper.param_groups:
                    group["lr"] = group["initial_lr"] * schedule(epoch / epochs)
                means = _epoch(st_abn, loss, _batches(data, epoch), stepper, max_grad_norm)
                if validation is not None:
                    with torch.no_grad(), eval_mode(st_abn):
                        history.validation.append(_epoch(st_abn, loss, _batches(validation, epoch), None))
                history.train.append(means)
                if history.judged[-1] == min(history.judged):
                    history.best, best = epoch, _copied(learner)
                if store is not None:
                    store.save(learner, stepper, history, best)
                bar.set_postfix(loss=f"{history.judged[-1]:.3f}", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            history.interrupted = True
            warnings.warn(f"interrupted in epoch {len(history.train)}; the best weights so far stay", stacklevel=2)
        finally:
            learner.load_state_dict(best)
    return history


def _batches(data: Data, epoch: int) -> Iterable[Batch]:
    return data(epoch) if callable(data) else data


def _copied(learner: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in learner.state_dict().items()}


def _epoch(
    st_abn: STABN,
    loss: STABNLoss,
    batches: Iterable[Batch],
    stepper: torch.optim.Optimizer | None,
    max_grad_norm: float | None = None,
) -> dict[str, float]:
    """Means of the loss's terms over the batches, each of which is a step where there is an optimizer."""
    rows: list[dict[str, float]] = []
    for batch in batches:
        terms = loss.terms(st_abn, *batch)
        total = torch.stack(list(terms.values())).sum()
        rows.append({name: value.item() for name, value in {**terms, "loss": total}.items()})
        if not math.isfinite(rows[-1]["loss"]):
            raise ValueError(
                f"the loss became {rows[-1]} at batch {len(rows)} of an epoch; the best weights so far are kept. Lower "
                f"the learning rate: optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4)"
            )
        if stepper is not None:
            stepper.zero_grad()
            total.backward()
            if max_grad_norm is not None:
                learning = [parameter for group in stepper.param_groups for parameter in group["params"]]
                nn.utils.clip_grad_norm_(learning, max_grad_norm)
            stepper.step()
    if not rows:
        raise ValueError("there was no batch to go through; data must give batches anew in every epoch, as a list does")
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


@contextmanager
def _only(st_abn: STABN, learner: nn.Module) -> Iterator[None]:
    """The learner in training mode with gradients, all else in eval mode without; afterwards as it was before."""
    wanted = [(parameter, parameter.requires_grad, parameter.grad) for parameter in st_abn.parameters()]
    with eval_mode(st_abn):
        st_abn.requires_grad_(False)
        learner.requires_grad_(True).train()
        try:
            yield
        finally:
            for parameter, requires, grad in wanted:
                parameter.requires_grad_(requires)
                parameter.grad = grad
