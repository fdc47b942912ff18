"""Recurrent layers, unrolled step by step, so that the rules for gates and activations apply inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, State], State]  # from the parts of the input and of the state to the next state


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    opened, forgotten, content, shown = (x + h).chunk(4, -1)
    cell = forgotten.sigmoid() * state[1] + opened.sigmoid() * content.tanh()
    return shown.sigmoid() * cell.tanh(), cell


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (reset, update, content), (of_reset, of_update, of_content) = x.chunk(3, -1), h.chunk(3, -1)
    kept = (update + of_update).sigmoid()
    return ((1 - kept) * (content + (reset + of_reset).sigmoid() * of_content).tanh() + kept * state[0],)


_STEPS: dict[Any, Step] = {
    torch.lstm: _lstm,
    torch.gru: _gru,
    torch.rnn_tanh: lambda x, h, state: ((x + h).tanh(),),
    torch.rnn_relu: lambda x, h, state: ((x + h).relu(),),
}
RECURRENT = frozenset(_STEPS)


def unrolled(func: Any) -> Callable[..., Any]:
    """Return a recurrent layer of torch, such as ``torch.lstm``, as a loop over steps. Packed sequences are not."""

    def run(
        input: Tensor,
        states: Tensor | Sequence[Tensor],
        weights: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        *batch_first: bool,
    ) -> tuple[Tensor, ...]:
        if not batch_first:  # the last argument is missing for packed sequences
            return func(input, states, weights, has_biases, num_layers, dropout, train, bidirectional)
        starts = (states,) if isinstance(states, Tensor) else tuple(states)
        directions = 2 if bidirectional else 1
        per_run = len(weights) // (num_layers * directions)
        sequence = list(input.unbind(1 if batch_first[0] else 0))
        last: list[State] = []
        for layer in range(num_layers):
            results = []
            for reverse in range(directions):
                number = layer * directions + reverse
                own = weights[number * per_run : (number + 1) * per_run]
                start = tuple(state[number] for state in starts)
                outputs, state = _one_direction(func, sequence[::-1] if reverse else sequence, start, own, has_biases)
                results.append(outputs[::-1] if reverse else outputs)
                last.append(state)
            sequence = [torch.cat(parts, -1) for parts in zip(*results, strict=True)] if bidirectional else results[0]
            if layer < num_layers - 1:
                sequence = [F.dropout(step, dropout, train) for step in sequence]
        return torch.stack(sequence, 1 if batch_first[0] else 0), *map(torch.stack, zip(*last, strict=True))

    return run


def _one_direction(
    func: Any, sequence: Sequence[Tensor], state: State, weights: Sequence[Tensor], has_biases: bool
) -> tuple[list[Tensor], State]:
    """Return the outputs of all steps, in the order of the steps, and the last state."""
    of_input, of_state = weights[:2]
    biases: Sequence[Any] = weights[2:4] if has_biases else (None, None)
    projection = weights[4 if has_biases else 2 :]
    outputs = []
    for x in sequence:
        state = _STEPS[func](F.linear(x, of_input, biases[0]), F.linear(state[0], of_state, biases[1]), state)
        if projection:
            state = (F.linear(state[0], projection[0]), *state[1:])
        outputs.append(state[0])
    return outputs, state
