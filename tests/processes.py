"""Real ranks for tests: a function run by N processes that form a process group.

The processes are forked from a server that has imported torch and DeepSpeed, so a start takes a second, not ten.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

BUILD = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"


def run_ranks(function: Callable[..., Any], *arguments: Any, world_size: int = 2, timeout: float = 280) -> list[Any]:
    """Call a module-level function with the same arguments in every rank and return what each returned.

    Raises:
        AssertionError: a rank failed or took longer than `timeout` seconds; the message has its traceback and output.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vitfreeze.engine", "deepspeed"])
    environment = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCH_EXTENSIONS_DIR": str(built_extensions()),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_run_rank, args=(rank, function, arguments, environment, folder))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode for process in ranks):
                time.sleep(1)  # let the others say why they failed, too
                break
            time.sleep(0.02)
        succeeded = all(process.exitcode == 0 for process in ranks)
        for process in ranks:
            process.kill()
            process.join()
        outputs = [Path(folder, f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
        assert succeeded, "\n".join(f"--- rank {rank} ---\n{output[-6000:]}" for rank, output in enumerate(outputs))
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _run_rank(
    rank: int, function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], folder: str
) -> None:
    output = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, so collections need not walk it
    try:
        result = function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def free_port() -> int:
    """Return a port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def built_extensions() -> Path:
    """Return a TORCH_EXTENSIONS_DIR in which DeepSpeed's communication kernel is built.

    It is the one that is set, as launch/ does, or one in the user's cache. The kernel is built once, under a lock that
    dies with its holder. Torch's own lock is a file that outlives a killed build, and then everyone waits for ever:
    whoever holds our lock may delete it.
    """
    identity = "-".join([sys.prefix, sys.version, version("torch"), version("deepspeed")])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vitfreeze-tests"
    own = cache / hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or own)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "built"
    if not done.exists():
        with _locked(folder / "builders"):
            if not done.exists():
                _remove_locks(folder, older_than_seconds=0)
                environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(folder), "MAX_JOBS": "2"}
                subprocess.run([sys.executable, "-c", BUILD], env=environment, check=True, timeout=600)
                done.touch()
    _remove_locks(folder, older_than_seconds=60)  # loading takes a second
    return folder


def _remove_locks(folder: Path, *, older_than_seconds: float) -> None:
    for lock in folder.glob("*/lock"):
        if time.time() - lock.stat().st_mtime > older_than_seconds:
            lock.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
