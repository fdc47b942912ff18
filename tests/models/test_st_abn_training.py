"""fit_st_abn: seeded, gone on with from a checkpoint bit for bit, ended early or by hand, and nothing left behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from branched_models import injected
from tiny_models import snapshot
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from captum_staa.models import STABN, FitConfig, STABNLoss, fit_st_abn
from captum_staa.models.st_abn.training import adam, cosine, paper_optimizer

Batches = list[tuple[Tensor, Tensor]]


def batches(count: int = 2, seed: int = 0, clips: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(clips, 3, 4, 12, 10, generator=generator) for _ in range(count))
    return [(clip, torch.randint(0, 3, (clips,), generator=generator)) for clip in drawn]


def network(**options: Any) -> STABN:
    """With dropout, so that a seed matters."""
    return injected("tensor", **{"dropout": 0.5, "width": 6, **options})[0]


def weights(st_abn: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in st_abn.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("preset", ["paper", "adapter"])
def test_same_seed_gives_the_same_weights(preset):
    """Whatever the global random state was, which is left as it was."""
    found = []
    for seed, of_world in ((0, 1), (0, 2), (1, 2)):
        st_abn = network()
        with torch.random.fork_rng():
            torch.manual_seed(of_world)
            before = torch.get_rng_state()
            history = fit_st_abn(st_abn, batches(), STABNLoss(preset), epochs=2, seed=seed)
            assert torch.equal(torch.get_rng_state(), before)
        found.append((weights(st_abn), history.train))
    assert same(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not same(found[0][0], found[2][0])


def test_every_epoch_has_new_random_numbers():
    """The same dropout in each would train the same half of the head."""
    still: Any = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    first, second = fit_st_abn(network(), batches(1), config=FitConfig(still), epochs=2).train
    assert first["perception"] == second["perception"] and first["attention"] != second["attention"]


@pytest.mark.parametrize("limit", [{}, {"max_grad_norm": 0.5}, {"max_grad_norm": None}], ids=str)
def test_training_step_equals_the_paper(limit):
    """SGD with Nesterov momentum on the sum of both cross entropies, its gradient clipped to norm 1 or as asked."""
    most = limit.get("max_grad_norm", 1.0) or math.inf
    st_abn, other, (batch,) = network(dropout=0.0), network(dropout=0.0), batches(1)
    fit_st_abn(st_abn, [batch], config=FitConfig(schedule=lambda progress: 1 - progress / 2, **limit), epochs=3)
    speeds = [torch.zeros_like(parameter) for parameter in other.parameters()]
    losses = []
    for epoch in range(3):
        logits, gates = other.forward_with_gates(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1]) + nn.functional.cross_entropy(gates.logits, batch[1])
        losses.append(loss.item())
        slopes = torch.autograd.grad(loss, list(other.parameters()))
        norm = sum(float(slope.square().sum()) for slope in slopes) ** 0.5
        assert norm > 1, "so that a limit matters"
        with torch.no_grad():
            for parameter, speed, slope in zip(other.parameters(), speeds, slopes, strict=True):
                step = slope * min(1, most / (norm + 1e-6)) + 5e-4 * parameter
                speed.mul_(0.9).add_(step)
                parameter.sub_(0.01 * (1 - epoch / 6) * (step + 0.9 * speed))
    assert losses == sorted(losses, reverse=True), "so the last epoch is the best one"
    for parameter, expected in zip(st_abn.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6)


def test_default_optimizer_depends_on_the_preset():
    kinds: list[str] = []

    def noting(make: Any) -> Any:
        def made(parameters: Any) -> Any:
            kinds.append(f"{make.__name__} of {len(parameters)}")
            return make(parameters)

        return made

    st_abn = network()
    added = len([*st_abn.branch.parameters(), *st_abn.mechanism.parameters()])
    fit_st_abn(st_abn, batches(1), STABNLoss("adapter"), FitConfig(noting(adam)), epochs=1)
    fit_st_abn(st_abn, batches(1), config=FitConfig(noting(paper_optimizer)), epochs=1)
    assert kinds == [f"adam of {added}", f"paper_optimizer of {len(list(st_abn.parameters()))}"]
    (group,) = paper_optimizer(list(st_abn.parameters())).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.01, 0.9, 5e-4, True)
    assert [round(cosine(x), 3) for x in (0.0, 0.5, 1.0)] == [1.0, 0.51, 0.02]


def test_history_holds_means_over_batches():
    st_abn, data = network(dropout=0.0), batches(3)
    still: Any = lambda parameters: torch.optim.SGD(parameters, lr=0.0)  # noqa: E731
    history = fit_st_abn(st_abn, data, config=FitConfig(still), epochs=2, validation=batches(1, seed=3))
    with torch.no_grad():
        rows = [STABNLoss().terms(st_abn, *batch) for batch in data]
        other = STABNLoss().terms(st_abn, *batches(1, seed=3)[0])
    for name in ("perception", "attention"):
        assert history.train[0][name] == pytest.approx(sum(float(row[name]) for row in rows) / 3)
        assert history.validation[1][name] == pytest.approx(float(other[name]))
    assert history.train[0]["loss"] == pytest.approx(history.train[0]["perception"] + history.train[0]["attention"])
    assert history.judged == [row["loss"] for row in history.validation] and not history.interrupted


# ---------------------------------------------------------------- the best epoch, and an early end


def judged(values: list[float], st_abn: STABN, seen: list[dict[str, Tensor]]) -> Any:
    """A validation whose losses are these: clips that are passed only note the weights of their epoch."""
    rest = iter(values)

    class Given(STABNLoss):
        def terms(self, network: Any, clips: Tensor, targets: Tensor, *edited: Any) -> dict[str, Tensor]:
            if len(clips) == 1:
                seen.append(weights(st_abn))
                assert not torch.is_grad_enabled() and not any(module.training for module in network.modules())
                return {"given": torch.tensor(next(rest))}
            assert network.branch.dropout.training
            return super().terms(network, clips, targets, *edited)

    return Given()


@pytest.mark.parametrize(
    ("patience", "epochs", "best"), [(None, 6, 1), (1, 3, 1), (3, 5, 1), (4, 6, 5)], ids=lambda value: str(value)
)
def test_best_epoch_is_kept_and_patience_stops_the_training(patience, epochs, best):
    values = [3.0, 2.0, 2.5, 2.4, 2.3, 2.1 if patience is None else 1.0]
    st_abn, seen = network(), []
    loss, config = judged(values, st_abn, seen), FitConfig(patience=patience)
    history = fit_st_abn(st_abn, batches(), loss, config, epochs=6, validation=batches(1, clips=1))
    assert [row["loss"] for row in history.validation] == pytest.approx(values[:epochs]) and history.best == best
    assert same(weights(st_abn), seen[best]) and not same(seen[best], seen[best - 1])


def test_epochs_with_equal_loss_count_as_best():
    st_abn, seen = network(), []
    loss = judged([2.0, 2.0], st_abn, seen)
    assert fit_st_abn(st_abn, batches(), loss, epochs=2, validation=batches(1, clips=1)).best == 1


@pytest.mark.parametrize("when", [0, 5])
def test_ctrl_c_keeps_the_best_weights(when):
    """In the first epoch those that were there; later those of the last whole epoch here."""
    st_abn, plain = network(), network()
    before, world = snapshot_of_state(st_abn), torch.get_rng_state()

    def stopped(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i, batch in enumerate(batches()):
            if 2 * epoch + i == when:
                raise KeyboardInterrupt
            yield batch

    with pytest.warns(UserWarning, match=f"interrupted in epoch {when // 2} .*best weights so far are kept"):
        history = fit_st_abn(st_abn, stopped, two_are_better(6), epochs=6, validation=batches(1))
    assert history.interrupted and len(history.train) == when // 2 and history.best == when // 2 - 1
    if when:  # of two whole epochs of six
        fit_two(plain, epochs=6)
    assert same(weights(st_abn), weights(plain))
    assert torch.equal(torch.get_rng_state(), world) and snapshot_of_state(st_abn) == before


def snapshot_of_state(st_abn: STABN) -> dict[str, Any]:
    """All that training leaves alone: modes, hooks, what asks for gradients."""
    found = {name: value for name, value in snapshot(st_abn).items() if not name.startswith("value of ")}
    return {name: value[:3] if name.startswith("parameter ") else value for name, value in found.items()}


def fit_two(st_abn: STABN, epochs: int) -> None:
    """The first two epochs of so many, without the protection of fit_st_abn: all others change nothing."""

    def learns_twice(epoch: int) -> Batches:
        return batches() if epoch < 2 else [(torch.zeros(1, 3, 4, 12, 10), torch.tensor([0]))]

    fit_st_abn(st_abn, learns_twice, two_are_better(epochs), epochs=epochs, validation=batches(1))


def two_are_better(epochs: int) -> STABNLoss:
    """A loss whose validation praises the first epoch, the second one more, and none after."""
    values = iter([1.0, 0.5, *[2.0] * epochs])

    class Judged(STABNLoss):
        def terms(self, network: Any, clips: Tensor, targets: Tensor, *edited: Any) -> dict[str, Tensor]:
            if torch.is_grad_enabled():
                return super().terms(network, clips, targets, *edited)
            return {"given": torch.tensor(next(values))}

    return Judged("adapter")


@pytest.mark.parametrize("where", ["data", "validation"])
def test_infinite_loss_raises_and_keeps_the_best_weights(where):
    st_abn, plain = network(), network()
    st_abn.train()
    before = snapshot_of_state(st_abn)
    spoilt = [(clip / 0, target) for clip, target in batches(1)]

    def data(epoch: int) -> Batches:
        return batches() if epoch < 2 or where == "validation" else [*batches(), *spoilt]

    def validation(epoch: int) -> Batches:
        return batches(1) if epoch < 2 or where == "data" else spoilt

    with pytest.raises(ValueError, match=r"loss must be finite, got .*nan.* at batch [13] of an epoch.*learning rate"):
        fit_st_abn(st_abn, data, STABNLoss("adapter"), epochs=5, validation=validation)
    fit_two(plain, epochs=5)
    assert same(weights(st_abn), weights(plain)) and snapshot_of_state(st_abn) == before


# ---------------------------------------------------------------- what is left as it was, and what data may be


def test_grad_mode_gradients_and_module_modes_are_restored():
    st_abn = network()
    st_abn.model.train()
    parameters = list(st_abn.parameters())
    parameters[0].requires_grad_(False)
    grads = [torch.ones_like(parameter) if i % 2 else None for i, parameter in enumerate(parameters)]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    before = snapshot_of_state(st_abn)
    with torch.no_grad():
        fit_st_abn(st_abn, batches(1), STABNLoss("adapter"), epochs=1)
        assert not torch.is_grad_enabled()
    assert snapshot_of_state(st_abn) == before | {"grad mode": True}
    for parameter, grad in zip(parameters, grads, strict=True):
        assert parameter.grad is grad and (grad is None or (grad == 1).all())


def test_data_can_be_a_loader_or_a_function_of_the_epoch():
    """A shuffling loader is seeded, too."""
    data = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(3), strict=True)))
    found = []
    for world in (1, 2):
        st_abn = network()
        with torch.random.fork_rng():
            torch.manual_seed(world)
            fit_st_abn(st_abn, DataLoader(data, 5, shuffle=True), STABNLoss("adapter"), epochs=2)
        found.append(weights(st_abn))
    assert same(*found)
    listed, asked, epochs = network(), network(), []

    def of_epoch(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        epochs.append(epoch)
        yield from batches()

    fit_st_abn(listed, batches(), STABNLoss("adapter"), epochs=2)
    fit_st_abn(asked, of_epoch, STABNLoss("adapter"), epochs=2)
    assert epochs == [0, 1] and same(weights(listed), weights(asked))


def test_generator_as_data_raises_in_the_second_epoch():
    once, listed = network(), network()
    fit_st_abn(once, iter(batches()), epochs=1)
    fit_st_abn(listed, batches(), epochs=1)
    assert same(weights(once), weights(listed))
    with pytest.raises(ValueError, match="at least one batch in every epoch, got none"):
        fit_st_abn(network(), iter(batches()), epochs=2)
    with pytest.raises(ValueError, match="at least one batch"):
        fit_st_abn(network(), [], epochs=1)


def test_progress_bar_is_shown_if_enabled(capsys):
    fit_st_abn(network(), batches(1), epochs=2)
    assert capsys.readouterr() == ("", "")
    fit_st_abn(network(), batches(1), epochs=2, show_progress=True)
    shown = capsys.readouterr().err
    assert "ST-ABN" in shown and "2/2" in shown and "loss=" in shown


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"patience": 0}, ValueError, "patience .*at least 1, got 0"),
        ({"max_grad_norm": "a"}, TypeError, "max_grad_norm must be a number above 0 or None, got 'a'"),
        ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm must be above 0, got 0\.0\. Pass None"),
    ],
)
def test_invalid_options_raise(options, error, message):
    with pytest.raises(error, match=message):
        FitConfig(**options)


@pytest.mark.parametrize(("epochs", "error"), [(0, ValueError), (1.5, TypeError)])
def test_invalid_number_of_epochs_raises(epochs, error):
    st_abn = network()
    before = weights(st_abn)
    with pytest.raises(error, match=f"epochs .*at least 1, got {epochs}"):
        fit_st_abn(st_abn, batches(1), epochs=epochs)
    assert same(weights(st_abn), before)
