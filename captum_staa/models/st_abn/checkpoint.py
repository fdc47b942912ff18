"""A training that can be gone on with: weights, the optimizer's state and the history in one safetensors file."""

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
    """One file for one training, told by its settings."""

    path: Path
    settings: dict[str, Any]

    def there(self, resume: bool) -> bool:
        """Whether there is something to go on from.

        Raises:
            ValueError: there is, but going on was not asked for; or there is no folder to write to.
        """
        if not self.path.parent.is_dir():
            raise ValueError(f"there is no folder {str(self.path.parent)!r} for a checkpoint; make it first")
        if not self.path.exists():
            return False
        if not resume:
            raise ValueError(f"{str(self.path)!r} is there already: pass resume=True to go on from it, or another path")
        return True

    def save(
        self, learner: nn.Module, stepper: torch.optim.Optimizer, history: FitHistory, best: dict[str, Tensor]
    ) -> None:
        """Write all of it, at once or not at all."""
        state = stepper.state_dict()
        tensors = {f"now.{name}": value for name, value in learner.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in best.items()}
        tensors |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value)
            for index, own in state["state"].items()
            for name, value in own.items()
            if value is not None
        }
        described = {"settings": self.settings, "groups": state["param_groups"], "history": asdict(history)}
        contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        with atomic(self.path, overwrite=True) as part:
            save_tensors(save_file, contiguous, part, {"training": json.dumps(described)})

    def load(self, learner: nn.Module, stepper: torch.optim.Optimizer, history: FitHistory) -> dict[str, Tensor]:
        """Put the learner, the optimizer and the history where the training left them; gives the best weights.

        Raises:
            ValueError: the file is of a training with other settings, or of none.
        """
        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
                described = json.loads((file.metadata() or {})["training"])
        except Exception as error:  # safetensors raises its own class, and KeyError comes where there is no history
            raise ValueError(f"{str(self.path)!r} is no checkpoint of a training: {error}") from error
        if described["settings"] != self.settings:
            raise ValueError(
                f"{str(self.path)!r} is of a training with {described['settings']}, but this one has {self.settings}; "
                f"pass the same, or another path"
            )
        now, own = _under("now.", tensors), learner.state_dict()
        if {name: value.shape for name, value in now.items()} != {name: value.shape for name, value in own.items()}:
            raise ValueError(f"{str(self.path)!r} is of a training of another network; pass the same, or another path")
        learner.load_state_dict(now)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        stepper.load_state_dict({"state": state, "param_groups": described["groups"]})
        for name, value in described["history"].items():
            setattr(history, name, value)
        return _under("best.", tensors)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
