"""One rank of a thousand on one CPU: torch's fake process group, in which every collective returns at once."""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from vitfreeze.engine.launch import join_ranks
from vitfreeze.ranks import ClusterError, Ranks, find_free_port


def join_fake_ranks(*, rank: int, world_size: int) -> Ranks:
    """Be one rank of so many, none of which is there, for the rest of this process; what ranks sum means nothing.

    Engines of this process then run on the CPU, also where there is a GPU.

    Raises:
        ClusterError: there is no such rank, or this process has joined ranks already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # of torch's tests: no run has a use for it

    if not 0 <= rank < world_size:
        raise ClusterError(f"there is no rank {rank} of {world_size}: they count from 0 to {world_size - 1}")
    if torch.distributed.is_initialized() or os.environ.get("WORLD_SIZE", "1") != "1":
        raise ClusterError("this process was started as one of several: start it by itself, without a launcher")
    set_accelerator(CPU_Accelerator())
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(find_free_port()),
    )  # fmt: skip
    if world_size > 1:
        torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    return join_ranks()


class CollectiveClock(TorchDispatchMode):
    """Counts the collectives and their seconds: of those of a fake process group, the copies that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.seconds = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name.partition("::")[0] not in ("c10d", "_c10d_functional"):
            return func(*args, **(kwargs or {}))
        begin = time.perf_counter()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.count, self.seconds = self.count + 1, self.seconds + time.perf_counter() - begin
