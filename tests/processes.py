"""Real processes for tests: a function run by N ranks that form a process group, and commands of vitfreeze.

The processes are forked from a server that has imported everything, so a start takes a second, not ten.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import itertools
import multiprocessing
import multiprocessing.context
import multiprocessing.process
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

# What a process of vitfreeze imports sooner or later.
PRELOADED = (
    "vitfreeze.training.loop",
    "vitfreeze.cli",
    "vitfreeze.doctor",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",
    "torch.utils.cpp_extension",
    "setuptools",
)
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BUILD = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Return the context whose processes begin with everything imported; this process has one server for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    return context


def run_ranks(function: Callable[..., Any], *arguments: Any, world_size: int = 2, timeout: float = 280) -> list[Any]:
    """Call a module-level function with the same arguments in every rank and return what each returned.

    Raises:
        AssertionError: a rank failed or took longer than `timeout` seconds; the message has its traceback and output.
    """
    context = fork_server()
    all_done = context.Barrier(world_size)
    environment = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "TORCH_EXTENSIONS_DIR": str(built_extensions()),
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_run_rank, args=(rank, function, arguments, environment, folder, all_done))
            for rank in range(world_size)
        ]
        with _started(*ranks):
            deadline = time.monotonic() + timeout
            while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
                if any(process.exitcode for process in ranks):
                    time.sleep(1)  # let the others say why they failed, too
                    break
                time.sleep(0.02)
            succeeded = all(process.exitcode == 0 for process in ranks)
        outputs = [Path(folder, f"{rank}.log").read_text(errors="replace") for rank in range(world_size)]
        assert succeeded, "\n".join(f"--- rank {rank} ---\n{output[-6000:]}" for rank, output in enumerate(outputs))
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


@contextmanager
def _started(*processes: multiprocessing.process.BaseProcess) -> Iterator[None]:
    """Start processes and kill what is left of them in the end: of an interrupted test too, or Python waits for it."""
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run_rank(
    rank: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    folder: str,
    all_done: threading.Barrier,
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
    all_done.wait()  # rank 0 keeps the store, of which another may still be asking how a group's ranks are reached
    os._exit(0)


def without_launcher() -> dict[str, str]:
    """Return the environment of a process that no launcher started."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER}


def run_forked(
    function: Callable[..., object],
    *arguments: Any,
    path: Sequence[Path] = (),
    cwd: Path | None = None,
    timeout: float = 280,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Call a module-level function in a forked process that no launcher started, and return its status and output.

    Args:
        path: folders of more packages.
        cwd: where it begins; by default here.
        timeout: seconds.
        variables: of the environment, beside those that are set.
    """
    environment = without_launcher() | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
    where = (str(cwd or Path.cwd()), [str(place) for place in path])
    with tempfile.TemporaryDirectory() as folder:
        process = fork_server().Process(target=_run_forked, args=(function, arguments, environment, where, folder))
        with _started(process):
            process.join(timeout)
        texts = [Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr")]
    assert process.exitcode != -signal.SIGKILL, f"{arguments} did not end within {timeout} s:\n{texts[1][-4000:]}"
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def _run_forked(
    function: Callable[..., object],
    arguments: Sequence[Any],
    environment: dict[str, str],
    where: tuple[str, list[str]],
    folder: str,
) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(where[0])
    sys.path[:0] = where[1]
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays, so collections need not walk it
    function(*arguments)


def run_command(*arguments: str, path: Sequence[Path] = (), **variables: str) -> subprocess.CompletedProcess[str]:
    """Do what `python -m vitfreeze` does with these arguments; see `run_forked`."""
    return run_forked(_call_command, list(arguments), path=path, **variables)


def _call_command(arguments: list[str]) -> None:
    from vitfreeze.cli import main

    main(arguments)


_numbers = itertools.count(1009 * os.getpid())  # test processes side by side begin far from each other


def free_port() -> int:
    """Return a port that is free, and stays so: it lies below those that systems give to whoever asks for any."""
    for number in _numbers:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + number % 12_000))
            return int(probe.getsockname()[1])
    raise AssertionError("not reached")


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
