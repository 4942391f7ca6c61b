"""Joining the other processes of a run."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join_processes() -> Processes:
    """Join the process group that the launcher's environment describes; without a launcher, be alone.

    Call it before anything else uses the accelerator. Joining twice is harmless.

    Raises:
        ValueError: some, but not all, of the launcher's variables are set.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if len(missing) == len(names):
        alone = ("0", "1", "127.0.0.1", str(_free_port()))
        os.environ.update(dict(zip(names, alone, strict=True)))
    elif missing:
        raise ValueError(f"the launcher set only some of {', '.join(names)}: {', '.join(missing)} missing")
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"] if os.environ["WORLD_SIZE"] == "1" else "0")
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator.set_device(local_rank)
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    return Processes(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=local_rank,
        device=torch.device(accelerator.current_device_name()),
    )
