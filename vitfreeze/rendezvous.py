"""What the ranks of a run settle before they train: that all are there, and that all mean the same run.

They talk through the launcher's store (MASTER_ADDR, MASTER_PORT), in JSON, so this works before there is a process
group, and also where NCCL or gloo would not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.distributed import DistError, PrefixStore, Store, TCPStore

from vitfreeze.config import Config, settings
from vitfreeze.ranks import ClusterError, LaunchEnvironment, describe_ranks, group_ranks

logger = logging.getLogger(__name__)

# Packages whose version decides what a rank computes or how it reads its data.
PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "numpy", "pillow", "simplejpeg", "webdataset", "safetensors")
# A node may keep its shards and its cache elsewhere than the others; what the shards hold is compared instead.
NODE_LOCAL_SETTINGS = frozenset({"data.train", "data.val", "data.cache_dir"})
POLL_SECONDS = 0.2
READ_SECONDS = 10


def join_timeout() -> timedelta:
    """Return how long to wait for other ranks: DEEPSPEED_TIMEOUT in minutes, which DeepSpeed reads too; 10 if unset."""
    return timedelta(minutes=float(os.environ.get("DEEPSPEED_TIMEOUT", "10")))


class Rendezvous:
    """All ranks of a run, who meet through the launcher's store.

    Every method is collective: all ranks call the same ones in the same order.

    Args:
        purpose: separates the keys of one rendezvous from those of another of the same launch.
        launch: what the launcher said of this process.
        timeout: how long to wait for the others.

    Raises:
        ClusterError: rank 0 cannot listen, or cannot be reached.
    """

    def __init__(self, purpose: str, *, launch: LaunchEnvironment, timeout: timedelta) -> None:
        self.launch, self.rank, self.world_size = launch, launch.rank, launch.world_size
        self.timeout = timeout
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
        store = PrefixStore(f"vitfreeze/{purpose}/{attempt}", _open_store(launch, timeout))
        # The next rendezvous for the same purpose must not find the keys of this one.
        number = (store.add("entered", 1) - 1) // launch.world_size
        self.store: Store = PrefixStore(str(number), store)
        self._rounds = 0

    def wait_for_ranks(self) -> list[str]:
        """Wait until every rank is there and return the host of each.

        Raises:
            ClusterError: some did not come in time; the message names them and their nodes.
        """
        self.store.set(f"here/{self.rank}", socket.gethostname())
        if self.rank == 0:
            deadline = time.monotonic() + self.timeout.total_seconds()
            missing = self._missing(range(self.world_size))
            while missing and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
                missing = self._missing(missing)
            hosts = [None if r in missing else self.store.get(f"here/{r}").decode() for r in range(self.world_size)]
            self.store.set("hosts", json.dumps(hosts))
        hosts = json.loads(self._get("hosts", patience=2))
        self._wait_for_readers("hosts", [rank for rank, host in enumerate(hosts) if host is not None])
        absent = [rank for rank, host in enumerate(hosts) if host is None]
        if absent:
            present = sorted({host for host in hosts if host is not None})
            raise ClusterError(
                f"{describe_ranks(absent)} of {self.world_size} ({self._describe_nodes(absent)}) did not start within "
                f"{self.timeout.total_seconds() / 60:.3g} minutes, while {', '.join(present)} waited: see whether "
                f"those hosts are up and reach {self.launch.master_addr}:{self.launch.master_port}, or leave them out"
            )
        return hosts

    def gather(self, value: Any, *, patience: float = 1) -> list[Any]:
        """Return the JSON-able value that each rank gave, by rank; wait `patience` times as long as usual for them.

        Raises:
            ClusterError: a rank did not give its value in time.
        """
        self._rounds += 1
        key = f"gather/{self._rounds}"
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            values = [json.loads(self._get(f"{key}/{rank}", patience=patience)) for rank in range(self.world_size)]
            self.store.set(key, json.dumps(values))
        values = json.loads(self._get(key, patience=2 * patience))
        self._wait_for_readers(key, range(self.world_size))
        return values

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Run the body on every rank; if it fails on any with bad input, end on all with the same sentence.

        Raises:
            ClusterError: it failed elsewhere, or on some ranks only. Where it failed on all alike: that error.
        """
        error: Exception | None = None
        try:
            yield
        except (ValueError, OSError) as caught:
            error = caught
        answers = self.gather([socket.gethostname(), str(error) if error else ""])
        hosts = [host for host, _ in answers]
        problems = group_ranks([problem for _, problem in answers])
        if error is not None and len(problems) == 1:
            raise error
        failed = {problem: ranks for problem, ranks in problems.items() if problem}
        if failed:
            parts = [f"{describe_ranks(ranks, hosts=hosts)}: {p}" for p, ranks in failed.items()]
            raise ClusterError("; ".join(parts)) from error

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Compare what each rank holds for true, by name.

        Raises:
            ClusterError: two ranks differ; the message names what, how, and which ranks on which hosts.
        """
        answers = self.gather([socket.gethostname(), dict(facts)])
        hosts = [host for host, _ in answers]
        names = dict.fromkeys(name for _, theirs in answers for name in theirs)
        lines = []
        for name in names:
            values = group_ranks([theirs.get(name, "missing") for _, theirs in answers])
            if len(values) > 1:
                sides = [f"{value} on {describe_ranks(ranks, hosts=hosts)}" for value, ranks in values.items()]
                lines.append(f"{name} is {' but '.join(sides)}")
        if lines:
            more = f" (and {len(lines) - 4} more differences)" if len(lines) > 4 else ""
            raise ClusterError(f"the ranks do not mean the same run: {'; '.join(lines[:4])}{more}")

    def _get(self, key: str, *, patience: float = 1) -> str:
        try:
            self.store.wait([key], self.timeout * patience)
            return self.store.get(key).decode()
        except DistError as error:
            raise ClusterError(f"rank {self.rank} waited in vain for {key!r} of the other ranks: {error}") from error

    def _wait_for_readers(self, key: str, ranks: Sequence[int]) -> None:
        """Let rank 0, with whom the store ends, go on only when the others have read what they waited for."""
        self.store.set(f"{key}/read/{self.rank}", "")
        if self.rank == 0:
            with suppress(DistError):  # one that was lost on the way has no need of the store
                self.store.wait([f"{key}/read/{rank}" for rank in ranks], timedelta(seconds=READ_SECONDS))

    def _missing(self, ranks: Sequence[int]) -> list[int]:
        return [rank for rank in ranks if not self.store.check([f"here/{rank}"])]

    def _describe_nodes(self, ranks: Sequence[int]) -> str:
        nodes = sorted({rank // self.launch.local_size for rank in ranks})
        return f"node {', '.join(map(str, nodes))}, counted from 0 in the hostfile"


def _open_store(launch: LaunchEnvironment, timeout: timedelta) -> Store:
    # torchrun's agent holds the store itself; otherwise rank 0 does, and torch's process group shares it.
    is_master = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_master:
        _wait_for_master(launch, timeout)
    try:
        return TCPStore(
            launch.master_addr, launch.master_port, world_size=None, is_master=is_master,
            timeout=timeout, wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
    except (DistError, ValueError) as error:
        host, problem = socket.gethostname(), str(error).strip().splitlines()[0]
        if "in use" in problem:
            raise ClusterError(f"port {launch.master_port} of {host} is in use: give another --master_port") from None
        raise ClusterError(
            f"rank {launch.rank} on {host} could not meet the others at {launch.master_addr}:"
            f"{launch.master_port}: {problem}"
        ) from error


def _wait_for_master(launch: LaunchEnvironment, timeout: timedelta) -> None:
    """Wait until rank 0 listens; torch's own attempt would print a stack of C++ frames before it gives up."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((launch.master_addr, launch.master_port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                message = (
                    f"rank {launch.rank} on {socket.gethostname()} did not reach rank 0 at {launch.master_addr}:"
                    f"{launch.master_port} within {timeout.total_seconds() / 60:.3g} minutes ({error}): see whether "
                    "that host is up, runs the same command, and lets this port through"
                )
                logger.error(message)  # rank 0, which speaks for all, is the one that is missing
                raise ClusterError(message) from error
        time.sleep(POLL_SECONDS)


def run_facts(
    config: Config, *, shards: Sequence[str], lengths: Sequence[int], ds_config: Mapping[str, Any]
) -> dict[str, str]:
    """Return what all ranks of a run must agree on: software, settings, DeepSpeed's settings, training shards.

    Args:
        config: the run.
        shards: names of the training shards, in order.
        lengths: samples of each.
        ds_config: what DeepSpeed is given.
    """
    facts = {f"the version of {name}": version for name, version in software_versions().items()}
    for key, value, _ in settings(config):
        if key not in NODE_LOCAL_SETTINGS:
            facts[key] = str(value)
    facts["the DeepSpeed configuration"] = digest(json.dumps(ds_config, sort_keys=True))
    facts["the set of training shards"] = fingerprint_shards(shards, lengths)
    return facts


def software_versions() -> dict[str, str]:
    """Return the versions of Python, of this package's code and of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    versions["torch"] = torch.__version__  # with the build: +cu126 and +cu130 differ
    # The version of a checkout stays the same while its code changes, so the code itself is compared.
    folder = Path(__file__).parent
    files = sorted(folder.rglob("*.py"))
    versions["vitfreeze"] = digest(*(f"{file.relative_to(folder)}\n{file.read_text()}" for file in files))
    return versions


def fingerprint_shards(shards: Sequence[str], lengths: Sequence[int]) -> str:
    """Return a short text that differs when names, lengths or bytes of the shards do; the folder does not count."""
    parts = []
    for name, length in zip(shards, lengths, strict=True):
        local = Path(name)
        size = local.stat().st_size if local.is_file() else -1
        parts.append(f"{local.name} {length} {size}")
    return f"{len(shards)} shards of {sum(lengths)} samples ({digest(*parts)})"


def digest(*texts: str) -> str:
    """Return 12 hexadecimal digits that stand for the texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]
