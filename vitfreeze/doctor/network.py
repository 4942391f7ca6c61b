"""What lies between the ranks: clocks and all-reduce bandwidth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, ProcessGroup

from vitfreeze.doctor.checks import Links
from vitfreeze.ranks import group_ranks
from vitfreeze.rendezvous import Rendezvous

CLOCK_READINGS = 5
# gloo tries each of its addresses for this long; the others then wait for the rank that tries most.
CONNECT_SECONDS = {"gloo": 20.0, "nccl": 60.0}
PATIENCE = 5.0
# Large enough that latency does not count, small enough for 1 Gbit/s.
GPU_BYTES, CPU_BYTES = 64 * 2**20, 8 * 2**20


def compare_clocks(rendezvous: Rendezvous) -> list[float]:
    """Return each rank's clock minus that of rank 0 in seconds, from the quickest of some questions (Cristian 1989)."""
    rank, store, offset = rendezvous.rank, rendezvous.store, 0.0
    for other in range(1, rendezvous.world_size):
        if rank == 0:
            for reading in range(CLOCK_READINGS):
                store.get(f"clock/{other}/{reading}/ask")
                store.set(f"clock/{other}/{reading}/answer", repr(time.time()))
            store.get(f"clock/{other}/done")
        elif rank == other:
            offset = _ask_for_time(rendezvous)
            store.set(f"clock/{other}/done", "")
    return rendezvous.gather(offset)


def _ask_for_time(rendezvous: Rendezvous) -> float:
    quickest, offset = float("inf"), 0.0
    for reading in range(CLOCK_READINGS):
        before, started = time.time(), time.perf_counter()
        rendezvous.store.set(f"clock/{rendezvous.rank}/{reading}/ask", "")
        answer = float(rendezvous.store.get(f"clock/{rendezvous.rank}/{reading}/answer"))
        seconds = time.perf_counter() - started
        if reading and seconds < quickest:  # the first also waits for rank 0 to turn to this rank
            quickest, offset = seconds, before + seconds / 2 - answer
    return offset


def measure_links(rendezvous: Rendezvous, hosts: Sequence[str], *, device: torch.device) -> Links:
    """Measure all-reduces over all ranks, within nodes and between them; all ranks on CPUs, or each on its GPU."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if rendezvous.world_size == 1:
        return Links(backend=backend, all_ranks=None, within_nodes=None, between_nodes=None)
    figures: tuple[float | None, ...] = (None, None, None)
    error = ""
    try:
        dist.init_process_group(
            backend, store=PrefixStore("group", rendezvous.store), rank=rendezvous.rank,
            world_size=rendezvous.world_size, timeout=timedelta(seconds=CONNECT_SECONDS[backend]),
        )  # fmt: skip
        figures = _measure_groups(hosts, device)
        dist.destroy_process_group()
    except RuntimeError as caught:
        error = str(caught).strip().splitlines()[0]
    answers = rendezvous.gather([error, figures], patience=PATIENCE)
    errors = [f"rank {rank} ({hosts[rank]}): {text}" for rank, (text, _) in enumerate(answers) if text]
    if errors:
        return Links(backend=backend, all_ranks=None, within_nodes=None, between_nodes=None, error=errors[0])
    every, within, between = (
        min((figures[link] for _, figures in answers if figures[link] is not None), default=None) for link in range(3)
    )
    return Links(backend=backend, all_ranks=every, within_nodes=within, between_nodes=between)


def _measure_groups(hosts: Sequence[str], device: torch.device) -> tuple[float | None, ...]:
    every = bus_bandwidth(None, len(hosts), device)
    nodes = group_ranks(hosts)
    within, between = None, None
    for ranks in nodes.values():
        if len(nodes) > 1 and len(ranks) > 1:
            group = dist.new_group(ranks)  # every rank takes part in making every group
            if isinstance(group, ProcessGroup):  # this rank is in it
                within = bus_bandwidth(group, len(ranks), device)
    if len(nodes) > 1:
        leaders = [ranks[0] for ranks in nodes.values()]
        group = dist.new_group(leaders)
        if isinstance(group, ProcessGroup):
            between = bus_bandwidth(group, len(leaders), device)
    return every, within, between


def bus_bandwidth(group: ProcessGroup | None, size: int, device: torch.device) -> float:
    """Return 1e9 bytes per second that each link of a ring carries: 2 (n - 1) / n of the data over the time.

    Raises:
        RuntimeError: the sum is wrong.
    """
    data = torch.ones((GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4, device=device)
    repeats = 20 if device.type == "cuda" else 5
    dist.all_reduce(data, group=group)
    if not torch.equal(data, torch.full_like(data, size)):
        raise RuntimeError("an all-reduce of ones did not give the number of ranks")
    data.zero_()
    dist.barrier(group=group)
    begin = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(data, group=group)
    data[:1].item()  # waits for the GPU
    seconds = (time.perf_counter() - begin) / repeats
    return 2 * (size - 1) / size * data.numel() * 4 / seconds / 1e9
