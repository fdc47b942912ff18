"""The processes of one comparison: torch.distributed as it is, or a single one."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

POLL = 0.05  # seconds
Found = TypeVar("Found")
PATIENCE = timedelta(days=30)  # a process that has done its share waits for the slowest; a dead one is noticed at once


class Processes:
    """Which process this is, of how many.

    Example:
        >>> alone = Processes()
        >>> alone.rank, alone.world, alone.first(lambda: "done by the first, known to all")
        (0, 1, 'done by the first, known to all')
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def first(self, act: Callable[[], Found]) -> Found:
        """What the first process finds, in all of them; an error of it is raised by all of them, and none waits."""
        outcome: list[tuple[bool, object]] = [(False, None)]
        if self.rank == 0:
            try:
                outcome = [(True, act())]
            except (ValueError, OSError) as error:
                outcome = [(False, error)]
        if self.world > 1:
            dist.broadcast_object_list(outcome)
        good, found = outcome[0]
        if not good:
            assert isinstance(found, Exception)
            raise found
        return found  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that torchrun has started, or those of a group that is there already, or this one alone.

    Only a few words go from one to the other, so gloo carries them, whatever the model runs on; a group of the caller's
    own is used as it is.
    """
    if not dist.is_available() or not (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        yield Processes()
        return
    own = not dist.is_initialized()
    if own:
        store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
        fresh = dist.PrefixStore(_word_of_this_round(store, rank, world), store)
        dist.init_process_group("gloo", store=fresh, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        if own:
            dist.destroy_process_group()


def _word_of_this_round(store: dist.Store, rank: int, world: int) -> str:
    """A word that all processes of this start share, and that no earlier start has used.

    torchrun's store outlives a restart, and with it the addresses of processes that are dead; whoever read one of
    these would find nobody. So nothing in the store is believed but what answers a question that was asked
    just now: each process asks with a word of its own, and the first answers with the word of the round, until all have
    said that they got it.
    """
    own = uuid.uuid4().hex
    others = range(1, world)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    if rank == 0:
        while any(read(f"captum_staa/got/{other}") != own for other in others):
            for other in others:
                store.set(f"captum_staa/answer/{other}", f"{read(f'captum_staa/question/{other}')} {own}")
            time.sleep(POLL)
        return own
    store.set(f"captum_staa/question/{rank}", own)
    while not (answer := read(f"captum_staa/answer/{rank}")).startswith(f"{own} "):
        time.sleep(POLL)
    word = answer.split()[1]
    store.set(f"captum_staa/got/{rank}", word)
    return word


def restarted() -> bool:
    """Whether torchrun has started the processes anew after one of them died (``--max-restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def local_device(device: str | None) -> str | None:
    """``"cuda"`` as the GPU that is this process's own among those of its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device
