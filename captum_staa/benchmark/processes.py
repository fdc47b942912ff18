"""The processes of one comparison: those of torch.distributed, or a single process."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.rendezvous import rendezvous

POLL = 0.05  # seconds
Result = TypeVar("Result")
TIMEOUT = timedelta(days=30)  # finished processes wait for the slowest one; a dead process is noticed at once


class Processes:
    """The rank of this process, and the number of processes.

    Example:
        >>> single = Processes()
        >>> single.rank, single.world, single.first(lambda: "computed by rank 0, returned by all")
        (0, 1, 'computed by rank 0, returned by all')
    """

    def __init__(self, rank: int = 0, world: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world, self._group = rank, world, group

    def first(self, function: Callable[[], Result]) -> Result:
        """Run a function in the first process and return its result in all processes.

        If it raises ValueError or OSError, all processes raise that error.
        """
        outcome: list[tuple[bool, object]] = [(False, None)]
        if self.rank == 0:
            try:
                outcome = [(True, function())]
            except (ValueError, OSError) as error:
                outcome = [(False, error)]
        if self.world > 1:
            outcome = [self._broadcast(outcome[0])]
        succeeded, result = outcome[0]
        if not succeeded:
            assert isinstance(result, Exception)
            raise result
        return result  # type: ignore[return-value]

    def every(self, function: Callable[[], object]) -> None:
        """Run a function in every process. If it raises OSError in one of them, all processes raise OSError."""
        error: OSError | None = None
        try:
            function()
        except OSError as caught:
            error = caught
        errors: list[OSError | None] = [error]
        if self.world > 1:
            errors = [None] * self.world
            dist.all_gather_object(errors, error, group=self._group)
        for error in errors:
            if error is not None:
                raise error

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.barrier(group=self._group)

    def array(self, array: NDArray[Any] | None) -> NDArray[Any]:
        """Return the array of the first process in all processes; the others pass None. It is sent without copies."""
        if self.world == 1:
            assert array is not None
            return array
        kind = self._broadcast(None if array is None else (array.shape, array.dtype.str))
        if array is None:
            array = np.empty(*kind)
        dist.broadcast(torch.from_numpy(np.ravel(array).view(np.uint8)), 0, group=self._group)
        return array

    def _broadcast(self, value: Any) -> Any:
        """Return the object of the first process in all processes."""
        message = [value]
        dist.broadcast_object_list(message, group=self._group)
        return message[0]


@contextmanager
def processes() -> Iterator[Processes]:
    """Yield the processes of torchrun, of an existing process group, or this single process.

    Processes exchange a few short strings and, at the end, one table. So the backend is gloo on every device. An
    existing process group of the caller stays as it is: another group of the same processes is made, because finished
    processes wait here for hours, and its timeout is in minutes.
    """
    if not dist.is_available() or not (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield Processes()
        return
    initialize, group = not dist.is_initialized(), None
    if initialize:
        store, rank, world = next(rendezvous("env://", timeout=TIMEOUT))
        fresh = dist.PrefixStore(_start_id(store, rank, world), store)
        dist.init_process_group("gloo", store=fresh, rank=rank, world_size=world, timeout=TIMEOUT)
    else:
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)


def _start_id(store: dist.Store, rank: int, world: int) -> str:
    """Return an identifier that all processes of this start share, and that no earlier start has used.

    The store of torchrun survives a restart, together with the addresses of dead processes, so its old content must not
    be used. Each process writes a new random identifier. The first process answers each of them with its own
    identifier, which becomes the shared one, until all have confirmed it.
    """
    identifier = uuid.uuid4().hex
    others = range(1, world)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank == 0:
        while any(read(f"captum_staa/got/{other}") != identifier for other in others):
            for other in others:
                store.set(f"captum_staa/answer/{other}", f"{read(f'captum_staa/question/{other}')} {identifier}")
            time.sleep(POLL)
        return identifier
    store.set(f"captum_staa/question/{rank}", identifier)
    while not (answer := read(f"captum_staa/answer/{rank}")).startswith(f"{identifier} "):
        time.sleep(POLL)
    shared = answer.split()[1]
    store.set(f"captum_staa/got/{rank}", shared)
    return shared


def restarted() -> bool:
    """Return whether torchrun has restarted the processes after one of them died (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_device(device: str | None) -> str | None:
    """Return the device of this process: ``"cuda"`` becomes the GPU with its local rank; others stay unchanged."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
