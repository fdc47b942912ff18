"""A training that is gone on with ends as if it had never stopped; a file that does not belong to it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from st_abn_networks import clips_of, settled, slow_resnet
from test_st_abn_training import Batches, batches, network, same, weights

from captum_staa.models import STABN, FitConfig, FitHistory, STABNLoss, fit_st_abn
from captum_staa.models.st_abn.training import adam, paper_optimizer


def stopping(at: int, then: type[BaseException] = KeyboardInterrupt) -> Callable[[int], Batches]:
    """Data that break off in the middle of an epoch."""

    def data(epoch: int) -> Any:
        yield batches(1)[0]
        if epoch == at:
            raise then
        yield from batches(1, seed=epoch)

    return data


def normed() -> STABN:
    """With running statistics, which a checkpoint must hold as well."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return STABN(3, settled(slow_resnet(3)), body="light", num_frames=4)


@pytest.mark.parametrize(
    ("preset", "maker"), [("adapter", adam), ("paper", paper_optimizer), ("paper", adam)], ids=lambda v: str(v)[:16]
)
@pytest.mark.filterwarnings("ignore:training was interrupted in epoch")
def test_resumed_training_equals_uninterrupted_training(preset, maker, tmp_path):
    more: Any = {"epochs": 4, "validation": batches(1, seed=9)}
    resuming = FitConfig(maker, checkpoint=tmp_path / "training.safetensors", resume=True)
    whole, parts = network(), network()
    expected = fit_st_abn(whole, stopping(-1), STABNLoss(preset), FitConfig(maker), **more)
    for stop in (1, 3, -1):
        if stop == -1:
            parts = network(width=6)  # another process has a new network
        history = fit_st_abn(parts, stopping(stop), STABNLoss(preset), resuming, **more)
        assert history.interrupted == (stop != -1)
    assert history == expected
    assert same(weights(whole), weights(parts))


@pytest.mark.filterwarnings("ignore:training was interrupted in epoch")
def test_running_statistics_are_resumed(tmp_path):
    def data(stop: int) -> Callable[[int], Any]:
        def of_epoch(epoch: int) -> Any:
            yield clips_of(4, 32, seed=epoch), torch.tensor([0, 2])
            if epoch == stop:
                raise KeyboardInterrupt

        return of_epoch

    whole, parts, path = normed(), normed(), tmp_path / "training.safetensors"
    expected = fit_st_abn(whole, data(-1), epochs=3)
    fit_st_abn(parts, data(1), config=FitConfig(checkpoint=path), epochs=3)
    parts = normed()
    assert fit_st_abn(parts, data(-1), config=FitConfig(checkpoint=path, resume=True), epochs=3) == expected
    assert same(weights(whole), weights(parts))


def test_resuming_a_complete_training_returns_its_best_weights(tmp_path):
    path, still = tmp_path / "a.safetensors", network()
    history = fit_st_abn(still, batches(), STABNLoss("adapter"), FitConfig(checkpoint=path), epochs=2)
    other = network()
    with torch.no_grad():
        for parameter in other.branch.parameters():
            parameter.zero_()

    def untouched(epoch: int) -> Batches:
        raise AssertionError("there was nothing to do")

    found = fit_st_abn(other, untouched, STABNLoss("adapter"), FitConfig(checkpoint=path, resume=True), epochs=2)
    assert found == history and isinstance(found, FitHistory)
    assert same(weights(other), weights(still))


def test_resume_without_a_file_starts_a_training(tmp_path):
    path = tmp_path / "none.safetensors"
    fit_st_abn(network(), batches(1), config=FitConfig(checkpoint=str(path), resume=True), epochs=1)
    assert [file.name for file in tmp_path.iterdir()] == ["none.safetensors"]


@pytest.mark.filterwarnings("ignore:training was interrupted in epoch")
def test_best_weights_of_the_checkpoint_are_kept_over_worse_later_ones(tmp_path):
    """They are in the file beside the last ones."""
    path, st_abn = tmp_path / "a.safetensors", network()

    class Judged(STABNLoss):
        def terms(self, network: Any, clips: Any, targets: Any, *edited: Any) -> Any:
            if torch.is_grad_enabled():
                return super().terms(network, clips, targets, *edited)
            return {"given": torch.tensor([1.0, 2.0, 3.0, 4.0][int(targets[0])])}

    def judges(epoch: int) -> Any:
        return [(torch.zeros(1, 3, 4, 12, 10), torch.tensor([epoch]))]

    fit_st_abn(st_abn, stopping(2), Judged(), FitConfig(checkpoint=path), epochs=4, validation=judges)
    best = weights(st_abn)
    other = network()
    resuming = FitConfig(checkpoint=path, resume=True)
    history = fit_st_abn(other, stopping(-1), Judged(), resuming, epochs=4, validation=judges)
    assert history.best == 0 and len(history.train) == 4 and same(weights(other), best)
    stored = load_file(path)
    assert any(not torch.equal(stored[key], stored["best." + key[4:]]) for key in stored if key.startswith("now."))


# ---------------------------------------------------------------- files that do not belong to it


def refused(path: Path, message: str, st_abn: STABN | None = None, options: Any = None, **config: Any) -> None:
    st_abn = network() if st_abn is None else st_abn
    before, content = weights(st_abn), path.read_bytes()
    arguments = {"loss": STABNLoss("adapter"), "epochs": 2, **(options or {})}
    with pytest.raises(ValueError, match=message):
        fit_st_abn(st_abn, batches(), config=FitConfig(**{"checkpoint": path, "resume": True, **config}), **arguments)
    assert same(weights(st_abn), before) and path.read_bytes() == content


def test_existing_checkpoint_raises_without_resume(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"something of somebody's")
    refused(path, r"a\.safetensors', which already exists\. Pass resume=True", resume=False)


def test_missing_folder_raises_before_the_first_epoch(tmp_path):
    """Said before the first epoch, not after it."""
    st_abn = network()
    before = weights(st_abn)
    with pytest.raises(ValueError, match=r"existing folder, got .*Create the folder '.*none' first"):
        fit_st_abn(st_abn, batches(1), config=FitConfig(checkpoint=tmp_path / "none" / "a.safetensors"), epochs=1)
    assert same(weights(st_abn), before)


@pytest.mark.parametrize("kind", ["empty", "cut short", "other text", "weights of something"])
def test_file_that_is_not_a_checkpoint_raises(kind, tmp_path):
    path = tmp_path / "a.safetensors"
    if kind == "weights of something":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "cut short":
        fit_st_abn(network(), batches(1), STABNLoss("adapter"), FitConfig(checkpoint=path), epochs=2)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.write_bytes(b"" if kind == "empty" else b"these are no tensors, but a text of some length")
    refused(path, r"a\.safetensors' must be a checkpoint")


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"epochs": 3}, {}),
        ({"seed": 1}, {}),
        ({"loss": STABNLoss("paper")}, {}),
        ({}, {"optimizer": paper_optimizer}),
        ({}, {"max_grad_norm": None}),
    ],
    ids=lambda changed: next(iter(changed), ""),
)
def test_checkpoint_of_other_settings_raises(options, config, tmp_path):
    path = tmp_path / "a.safetensors"
    fit_st_abn(network(), batches(1), STABNLoss("adapter"), FitConfig(checkpoint=path), epochs=2)
    refused(path, r"\{'epochs': 2, .*\}, got \{.*Pass the same settings, or another path", None, options, **config)


def test_checkpoint_of_another_network_raises(tmp_path):
    path = tmp_path / "a.safetensors"
    fit_st_abn(network(), batches(1), STABNLoss("adapter"), FitConfig(checkpoint=path), epochs=2)
    for options in ({"width": 8}, {"mechanism": "observe"}, {"temporal": "fixed"}):
        refused(path, "got another network", network(**options))


def test_failed_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    from captum_staa.models.st_abn import training

    path, st_abn = tmp_path / "a.safetensors", network()
    written = []

    def full(tensors: Any, part: Path, **options: Any) -> None:
        written.append(part)
        if len(written) == 2:
            part.write_bytes(b"half of it")
            raise OSError("no space left")
        save_file(tensors, part, **options)

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        fit_st_abn(st_abn, batches(1), STABNLoss("adapter"), FitConfig(checkpoint=path), epochs=3)
    monkeypatch.undo()
    assert all(part != path for part in written)
    whole, other = network(), network()
    expected = fit_st_abn(whole, batches(1), STABNLoss("adapter"), epochs=3)
    resuming = FitConfig(checkpoint=path, resume=True)
    found = fit_st_abn(other, batches(1), STABNLoss("adapter"), resuming, epochs=3)
    assert found == expected and same(weights(whole), weights(other))
