"""Joining the other ranks of a run, through DeepSpeed."""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
from contextlib import nullcontext, redirect_stdout

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from vitfreeze.gpu import check_build
from vitfreeze.ranks import LaunchEnvironment, Ranks
from vitfreeze.rendezvous import Rendezvous, join_timeout
from vitfreeze.terminal import divert_stdout

log = logging.getLogger(__name__)
TESTED_SERIES = "0.19."


def is_tested_version() -> bool:
    """Return whether this DeepSpeed is of the series with which the engine is tested."""
    return bool(deepspeed.__version__.startswith(TESTED_SERIES))


def check_version() -> None:
    """Warn if this DeepSpeed is not of the series with which freezing is tested."""
    if not is_tested_version():
        log.warning(
            "DeepSpeed %s is installed; that frozen layers leave exactly is tested with %s* only: run "
            "`pytest tests/test_engine.py` before you rely on it",
            deepspeed.__version__,
            TESTED_SERIES,
        )


def join_ranks() -> Ranks:
    """Join the process group that the launcher's environment describes; without a launcher, be alone.

    Call it before anything else uses the accelerator. Joining twice is harmless.

    Raises:
        ClusterError: some, but not all, of the launcher's variables are set, or not every rank came in time.
        ValueError: this torch has no code for a GPU.
    """
    launch = LaunchEnvironment.read()
    if "RANK" not in os.environ:
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": launch.master_addr,
            "MASTER_PORT": str(launch.master_port),
        }
        os.environ.update(alone)
    rendezvous = None  # kept until torch's own store shares the port
    if launch.world_size > 1 and not torch.distributed.is_initialized():
        rendezvous = Rendezvous("join", launch=launch, timeout=join_timeout())
        rendezvous.wait_for_ranks()  # torch would wait for a dead node without a word, and not name it in the end
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"] if os.environ["WORLD_SIZE"] == "1" else "0")
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator.set_device(local_rank)
    device = torch.device(accelerator.current_device_name())
    with rendezvous.raise_on_all_ranks() if rendezvous is not None else nullcontext():
        check_build(device)
    # stdout is for a command's findings; DeepSpeed names a kernel there, and gloo its peers.
    with tempfile.TemporaryFile("w+") as said:
        with divert_stdout(said.fileno()), redirect_stdout(said):
            _join_process_group(accelerator.communication_backend_name())
        said.seek(0)
        log.debug("DeepSpeed said: %s", said.read())
    del rendezvous
    return Ranks(
        rank=torch.distributed.get_rank(),
        world_size=torch.distributed.get_world_size(),
        local_rank=local_rank,
        device=device,
    )


def _join_process_group(backend: str) -> None:
    if not torch.distributed.is_initialized():
        atexit.register(_leave_ranks)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _leave_ranks() -> None:
    """Take the process groups down in order, so that NCCL does not warn of leaks nor wait for them at the end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
