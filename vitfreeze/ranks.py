"""Who the ranks of a run are, and the small facts that they pass to each other.

What the launcher's environment says is known before there is a process group, and `vitfreeze.rendezvous` works with
it; `Ranks` needs the process group, unless this process is alone.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp, distributed_c10d


class ClusterError(ValueError):
    """The ranks cannot run together; one sentence says which of them, on which host, and why."""


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """What the launcher's variables say of this process and of the others that it started."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> LaunchEnvironment:
        """Read the launcher's variables; none of them: alone, on a free port.

        Raises:
            ClusterError: some, but not all, of them are set.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in environment]
        if len(missing) == len(names):
            return cls(
                rank=0, world_size=1, local_rank=0, local_size=1, master_addr="127.0.0.1", master_port=find_free_port()
            )
        if missing:
            raise ClusterError(f"the launcher set only some of {', '.join(names)}: {', '.join(missing)} missing")
        world_size = int(environment["WORLD_SIZE"])
        # DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        local_size = int(environment.get("LOCAL_SIZE", environment.get("LOCAL_WORLD_SIZE", world_size)))
        rank = int(environment["RANK"])
        return cls(
            rank=rank, world_size=world_size, local_rank=int(environment.get("LOCAL_RANK", rank % local_size)),
            local_size=local_size, master_addr=environment["MASTER_ADDR"], master_port=int(environment["MASTER_PORT"]),
        )  # fmt: skip


def find_free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run, and the collectives that pass small facts between them.

    Every method is collective: all ranks call the same ones in the same order. Alone, they need no process group.

    Attributes:
        device: of this rank; where values travel. Results come back to where they were.
        group: torch's process group; None: the default one.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    group: Any = field(default=None, repr=False)

    @classmethod
    def alone(cls, device: torch.device) -> Ranks:
        """Return a world of one rank."""
        return cls(rank=0, world_size=1, local_rank=0, device=device)

    def on_cpu(self, *, timeout: timedelta | None = None) -> Ranks:
        """Return the same ranks on a gloo group of their own.

        What they settle there neither waits for the device nor mixes with the collectives of another thread.
        """
        backend = "fake" if self.world_size > 1 and torch.distributed.get_backend() == "fake" else "gloo"
        group = torch.distributed.new_group(backend=backend, timeout=timeout) if self.world_size > 1 else None
        return replace(self, device=torch.device("cpu"), group=group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the ranks' tensors, which are of one shape."""
        return self._reduce(tensor, ReduceOp.SUM)

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each value."""
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        return (self.sum(torch.tensor(values, dtype=dtype, device=self.device)) / self.world_size).tolist()

    def begin_max(self, values: Sequence[int]) -> Callable[[], list[int]]:
        """Begin to find the largest of each value, and return the function that waits for the answer."""
        largest = torch.tensor(values, device=self.device)
        if self.world_size == 1:
            return largest.tolist
        work = torch.distributed.all_reduce(largest, op=ReduceOp.MAX, group=self.group, async_op=True)

        def wait() -> list[int]:
            work.wait()
            return largest.tolist()

        return wait

    def gather(self, value: Any) -> list[Any]:
        """Return the JSON-able value of each rank, by rank."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self.gather_rows(data)]

    def gather_rows(self, rows: Tensor) -> list[Tensor]:
        """Return the tensor of each rank, by rank: (N_r, ...), where only the lengths N_r may differ."""
        if self.world_size == 1:
            return [rows]
        mine = torch.tensor([len(rows)], device=self.device)
        lengths = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(lengths, mine, group=self.group)
        counts = [int(length) for length in lengths]
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded, group=self.group)
        return [part[:count].to(rows.device) for part, count in zip(parts, counts, strict=True)]

    def from_rank_0(self, function: Callable[[], Any], *, errors: tuple[type[Exception], ...] = ()) -> Any:
        """Call a function on rank 0 alone and return its JSON-able value on all ranks.

        Raises:
            Exception: rank 0 met one of `errors`; raised with its message on all ranks.
        """
        answer: dict[str, Any] = {}
        if self.rank == 0:
            try:
                answer = {"value": function()}
            except errors as error:
                kinds = [isinstance(error, kind) for kind in errors]
                answer = {"error": kinds.index(True), "message": str(error)}
        answer = self.gather(answer)[0]
        if "error" in answer:
            raise errors[answer["error"]](answer["message"])
        return answer["value"]

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        torch.distributed.all_reduce(total, op=operation, group=self.group)
        return total.to(tensor.device)


def set_group_timeouts(timeout: timedelta) -> None:
    """Let the collectives of every process group there is wait so long for other ranks before they abort.

    Groups that somebody else creates, as ZeRO does, have torch's default otherwise: 10 minutes on NCCL.
    """
    for group in [*distributed_c10d._world.pg_map]:
        distributed_c10d._set_pg_timeout(timeout, group)


def group_ranks(values: Sequence[str]) -> dict[str, list[int]]:
    """Return the ranks that gave each value, values in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        groups.setdefault(value, []).append(rank)
    return groups


def describe_ranks(ranks: Sequence[int], *, hosts: Sequence[str] | None = None, max_hosts: int | None = None) -> str:
    """Return 'rank 3' or 'ranks 0-7, 9'; given the host of every rank of the run, 'rank 3 (node-a)'.

    Of the hosts, the first `max_hosts` are named; None: all.
    """
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    text = f"rank{'s' if len(ranks) > 1 else ''} {text}"
    if hosts is None:
        return text
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    more = f" and {len(names) - max_hosts} more hosts" if max_hosts is not None and len(names) > max_hosts else ""
    return f"{text} ({', '.join(names[:max_hosts])}{more})"
