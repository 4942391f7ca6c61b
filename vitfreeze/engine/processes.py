"""Joining the other processes of a run."""

from __future__ import annotations

import io
import logging
import os
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from vitfreeze.gpu import check_build
from vitfreeze.rendezvous import Place, Rendezvous, join_timeout

log = logging.getLogger(__name__)
TESTED_SERIES = "0.19."


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def check_version() -> None:
    """Warn if this DeepSpeed is not of the series with which freezing is tested."""
    if not deepspeed.__version__.startswith(TESTED_SERIES):
        log.warning(
            "DeepSpeed %s is installed; that frozen layers leave exactly is tested with %s* only: run "
            "`pytest tests/test_engine.py` before you rely on it",
            deepspeed.__version__,
            TESTED_SERIES,
        )


def join_processes() -> Processes:
    """Join the process group that the launcher's environment describes; without a launcher, be alone.

    Call it before anything else uses the accelerator. Joining twice is harmless.

    Raises:
        ClusterError: some, but not all, of the launcher's variables are set, or not every rank came in time.
        ValueError: this torch has no code for a GPU.
    """
    place = Place.from_environment()
    if "RANK" not in os.environ:
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": place.master_addr,
            "MASTER_PORT": str(place.master_port),
        }
        os.environ.update(alone)
    rendezvous = None  # kept until torch's own store shares the port
    if place.world_size > 1 and not torch.distributed.is_initialized():
        rendezvous = Rendezvous("join", place=place, timeout=join_timeout())
        rendezvous.wait_for_ranks()  # torch would wait for a dead node without a word, and not name it in the end
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"] if os.environ["WORLD_SIZE"] == "1" else "0")
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator.set_device(local_rank)
    device = torch.device(accelerator.current_device_name())
    with rendezvous.raise_on_all_ranks() if rendezvous is not None else nullcontext():
        check_build(device)
    with redirect_stdout(io.StringIO()) as said:  # stdout is for a command's findings; DeepSpeed names a kernel there
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    log.debug("DeepSpeed said: %s", said.getvalue())
    del rendezvous
    return Processes(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=local_rank,
        device=device,
    )
