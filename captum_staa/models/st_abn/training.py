"""Training of an ST-ABN with progress bar, early stopping and checkpoints. A custom training loop works as well."""

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
    """Return the optimizer of the paper: SGD with Nesterov momentum 0.9, learning rate 0.01 and weight decay 5e-4."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW, for modules that are trained beside a frozen model."""
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)


def cosine(progress: float) -> float:
    """Return half a cosine from 1 to 0.02, the factor of the learning rate at ``progress`` from 0 to 1."""
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
        loss: the loss; None uses the paper's.
        epochs: number of epochs, at least 1.
        optimizer: function from parameters to an optimizer; None uses the paper's SGD if all parameters are trained,
            otherwise AdamW.
        schedule: function from the fraction of completed epochs, 0 to 1, to a factor of the learning rate.
        validation: batches whose loss selects the best epoch; None uses the training loss.
        patience: number of epochs without a new best loss after which the training stops; None never stops early.
        max_grad_norm: limit of the gradient norm over all trained parameters in every step, above 0; None sets no
            limit. This limit is an addition of this library; it is not described in the paper.
        checkpoint: path of a safetensors file that is written after every epoch.
        resume: whether to continue from ``checkpoint`` if it exists. Without it, an existing checkpoint is an error.
        seed: seed of dropout and shuffling. They depend only on the seed and the index of the epoch, so a resumed
            training gives the same weights. The global random state does not change.
        show_progress: whether to show a progress bar over epochs with the loss.

    Returns:
        :class:`FitHistory`. Ctrl-C returns it as well, with a warning and the best weights so far.

    Raises:
        ValueError: the loss is not finite (the best weights so far are kept), there is no batch, the checkpoint is of
            another training or exists without ``resume=True``, or an option is out of range.
        TypeError: ``epochs`` or ``patience`` is not an integer, or ``max_grad_norm`` is not a number.
    """
    loss = loss or STABNLoss()
    check_count("epochs", epochs)
    if patience is not None:
        check_count("patience", patience)
    if max_grad_norm is not None:
        if not is_number(max_grad_norm):
            raise TypeError(f"max_grad_norm must be a number above 0 or None, got {max_grad_norm!r}. Pass, e.g., 1.0.")
        if max_grad_norm <= 0:
            raise ValueError(
                f"max_grad_norm must be above 0, got {max_grad_norm}. Pass None to not limit the gradient."
            )
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
    if store is not None and store.exists(resume):
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
            warnings.warn(
                f"training was interrupted in epoch {len(history.train)} of {epochs}. The best weights so "
                f"far are kept.",
                stacklevel=2,
            )
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
    """Return means of the loss's terms over the batches. With an optimizer, each batch is a training step."""
    rows: list[dict[str, float]] = []
    for batch in batches:
        terms = loss.terms(st_abn, *batch)
        total = torch.stack(list(terms.values())).sum()
        rows.append({name: value.item() for name, value in {**terms, "loss": total}.items()})
        if not math.isfinite(rows[-1]["loss"]):
            raise ValueError(
                f"the loss must be finite, got {rows[-1]} at batch {len(rows)} of an epoch. The best weights so far "
                f"are kept. Lower the learning rate, e.g. optimizer=lambda params: torch.optim.AdamW(params, lr=1e-4)."
            )
        if stepper is not None:
            stepper.zero_grad()
            total.backward()
            if max_grad_norm is not None:
                learning = [parameter for group in stepper.param_groups for parameter in group["params"]]
                nn.utils.clip_grad_norm_(learning, max_grad_norm)
            stepper.step()
    if not rows:
        raise ValueError(
            "data must contain at least one batch in every epoch, got none. Pass a list, a DataLoader, or a function "
            "of the epoch: a generator can be used only once."
        )
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


@contextmanager
def _only(st_abn: STABN, learner: nn.Module) -> Iterator[None]:
    """Train only the learner; other modules are in eval mode without gradients. Restore this at the end."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in st_abn.parameters()]
    with eval_mode(st_abn):
        st_abn.requires_grad_(False)
        learner.requires_grad_(True).train()
        try:
            yield
        finally:
            for parameter, requires, grad in before:
                parameter.requires_grad_(requires)
                parameter.grad = grad
