"""Checkpoint of a training: weights, the state of the optimizer and the history in one safetensors file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from captum_staa._utils.files import atomic, save_tensors
from captum_staa.models.st_abn.history import FitHistory


@dataclass(frozen=True)
class Checkpoint:
    """Class that reads and writes the checkpoint file of one training, which is identified by its settings."""

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

    def save(
        self, learner: nn.Module, stepper: torch.optim.Optimizer, history: FitHistory, best: dict[str, Tensor]
    ) -> None:
        """Write the checkpoint atomically."""
        state = stepper.state_dict()
        tensors = {f"now.{name}": value for name, value in learner.state_dict().items()}
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

    def load(self, learner: nn.Module, stepper: torch.optim.Optimizer, history: FitHistory) -> dict[str, Tensor]:
        """Restore the learner, the optimizer and the history, and return the best weights.

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
        now, current = _under("now.", tensors), learner.state_dict()
        if _shapes(now) != _shapes(current):
            raise ValueError(
                f"st_abn must be the network of the checkpoint {str(self.path)!r}, got another network: names or "
                f"shapes of its weights differ. Pass the same network, or another path."
            )
        learner.load_state_dict(now)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        stepper.load_state_dict({"state": state, "param_groups": described["groups"]})
        for name, value in described["history"].items():
            setattr(history, name, value)
        return _under("best.", tensors)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
