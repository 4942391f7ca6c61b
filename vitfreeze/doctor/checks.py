"""From what all ranks saw to findings. Nothing here measures, so every case can be tested on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitfreeze.doctor.facts import RankFacts
from vitfreeze.doctor.findings import Finding, ok, red, unseen
from vitfreeze.gpu import cure_unfit_build, describe_unfit_build, is_built_for, number_of
from vitfreeze.ranks import describe_ranks, group_ranks
from vitfreeze.text import format_bytes

MAX_CLOCK_SKEW_SECONDS = 1.0
# A rank below this share of the fastest one holds the others up at every step.
MIN_SHARE_OF_FASTEST = 0.8
# Summing gradients may take this share of the time that computing them takes; what overlaps is not counted.
MAX_COMMUNICATION_SHARE = 0.25
INSTALL = "install the versions of constraints.txt there (bash launch/local.sh doctor does) or share one .venv"


@dataclass(frozen=True, kw_only=True)
class Links:
    """Bus bandwidth of all-reduces in 1e9 bytes per second; None where there is no such link.

    Attributes:
        all_ranks: over all ranks, as gradients are summed.
        within_nodes: the slowest node, over its ranks alone.
        between_nodes: over one rank of each node.
    """

    backend: str
    all_ranks: float | None
    within_nodes: float | None
    between_nodes: float | None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class ShardReading:
    """What a rank found where the recipe says that its shards are.

    Attributes:
        fingerprint: of names, lengths and sizes; '' when they could not be opened, and then `error` says why.
        images_per_second: read, decoded and cropped, while all ranks did the same; workers: processes that did it.
    """

    fingerprint: str
    images_per_second: float
    workers: int
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class FolderProbe:
    """What a rank found at the run folder: why it cannot write there, whether it sees rank 0's file, room left."""

    error: str
    sees_rank_0: bool
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class Need:
    """What the recipe asks of the cluster; nothing is held against what is None.

    Attributes:
        precision: of weights and activations.
        micro_batch: images of a forward pass; memory_bytes: the plan's peak for it.
        gradient_bytes: that a rank sums in a step, for which it computes compute_seconds.
        images_per_second: that a rank of this speed trains at most; basis: how it was found, for the table.
        shared_memory_bytes: that the data workers of a host keep ready.
        saved_bytes: of the checkpoints that are kept, and of the one that is being written.
    """

    precision: str | None = None
    micro_batch: int | None = None
    memory_bytes: float | None = None
    gradient_bytes: float | None = None
    compute_seconds: float | None = None
    images_per_second: float | None = None
    basis: str = ""
    shared_memory_bytes: float | None = None
    saved_bytes: float | None = None


def check_ranks(facts: Sequence[RankFacts]) -> Finding:
    """Say how many ranks there are on which hosts."""
    hosts = group_ranks([rank.host for rank in facts])
    counts = ", ".join(f"{len(ranks)} on {host}" for host, ranks in list(hosts.items())[:16])
    more = f" and {len(hosts) - 16} more hosts" if len(hosts) > 16 else ""
    return ok(f"{len(facts)}, all there: {counts}{more}")


def check_versions(facts: Sequence[RankFacts]) -> Finding:
    """Compare the software of all ranks."""
    differences = []
    for name in facts[0].versions:
        sides = group_ranks([rank.versions.get(name, "not installed") for rank in facts])
        if len(sides) > 1:
            texts = [f"{version} on {_where(facts, ranks)}" for version, ranks in sides.items()]
            label = "vitfreeze's code" if name == "vitfreeze" else name
            differences.append(f"{label}: {', '.join(texts)}")
    missing = [name for name, version in facts[0].versions.items() if version == "not installed"]
    if differences:
        return red("; ".join(differences), cure=f"{INSTALL}, everywhere alike")
    if missing:
        return red(f"not installed: {', '.join(missing)}", cure=INSTALL)
    broken = next((rank for rank in facts if rank.engine_error), None)
    if broken:
        return red(f"DeepSpeed does not load on {_where(facts, [broken.rank])}: {broken.engine_error}", cure=INSTALL)
    shown = ", ".join(f"{name} {facts[0].versions[name]}" for name in ("python", "torch", "deepspeed", "timm"))
    return ok(f"alike: {shown}")


def check_gpus(facts: Sequence[RankFacts]) -> Finding:
    """Hold the generation of every GPU against torch's build, and every rank against the number of GPUs."""
    for rank in facts:
        where = _where(facts, [rank.rank])
        if rank.driver_says and not rank.gpus_seen:
            return _unseen_gpu(rank, where)
        if rank.gpus_seen and rank.gpu is None:
            return red(
                f"{where} is number {rank.local_rank} of its host, where torch sees {rank.gpus_seen} GPUs",
                cure="give that host fewer slots in the hostfile, or see whether CUDA_VISIBLE_DEVICES hides some",
            )
    too_old = [rank for rank in facts if rank.gpu and not is_built_for(rank.gpu.capability, rank.gpu.built_for)]
    if too_old:
        return _unfit_build(facts, too_old)
    names = group_ranks([rank.gpu.name if rank.gpu else "CPU" for rank in facts])
    if "CPU" in names and len(names) > 1:
        return red(
            f"none on {_where(facts, names['CPU'])}, while other ranks have one",
            cure="see nvidia-smi there: is the driver loaded, is the container started with its GPUs?",
        )
    if "CPU" in names:
        return ok("none; this is a run on CPUs")
    texts = [f"{len(ranks)} x {name}" for name, ranks in names.items()]
    gpu = next(rank.gpu for rank in facts if rank.gpu)
    return ok(f"{', '.join(texts)}; torch {facts[0].versions['torch']} has code for sm_{number_of(gpu.capability)}")


def _unseen_gpu(rank: RankFacts, where: str) -> Finding:
    first = rank.driver_says.splitlines()[0]
    cure = "this torch is a CPU build; install the CUDA build of the same version (TORCH_INDEX_URL, launch/README.md)"
    if rank.torch_cuda:
        cure = (
            f"the driver is too old for CUDA {rank.torch_cuda}, or CUDA_VISIBLE_DEVICES hides the GPUs: update the "
            "driver, or install torch's build for CUDA 12.6 (TORCH_INDEX_URL, launch/README.md)"
        )
    return red(f"the driver lists {first} on {where}, but torch {rank.versions['torch']} sees no GPU", cure=cure)


def _unfit_build(facts: Sequence[RankFacts], unfit: Sequence[RankFacts]) -> Finding:
    gpu, version = unfit[0].gpu, unfit[0].versions["torch"]
    assert gpu is not None
    where = _where(facts, [rank.rank for rank in unfit])
    found = describe_unfit_build(gpu.name, gpu.capability, gpu.built_for, version=version, where=where)
    return red(found, cure=cure_unfit_build(gpu.capability, version=version))


def check_precision(facts: Sequence[RankFacts], *, wanted: str | None) -> Finding:
    """Say which precisions work everywhere, and whether the recipe's is among them."""
    works = [name for name in facts[0].precisions if all(_trains_in(rank, name) for rank in facts)]
    found = f"{', '.join(works) or 'none'} on every rank"
    if wanted is None or wanted in works:
        return Finding(bool(works), found=found + (f"; the recipe wants {wanted}" if wanted else ""))
    unfit = next(rank for rank in facts if not _trains_in(rank, wanted))
    why = unfit.precisions.get(wanted) or (
        "CPUs train in fp32" if unfit.gpu is None else f"{unfit.gpu.name} has no fast {wanted}"
    )
    cure = "run.ds_config=zero1_fp16" if wanted == "bf16" else f"run.ds_config with one of {', '.join(works)}"
    return red(
        f"the recipe wants {wanted}, but on {_where(facts, [unfit.rank])}: {why}",
        cure=cure if unfit.gpu else "run.ds_config=cpu",
    )


def _trains_in(rank: RankFacts, precision: str) -> bool:
    if rank.precisions.get(precision):
        return False
    if rank.gpu is None:
        return precision == "fp32"
    # torch emulates bfloat16 on GPUs before the A100, slower than float32.
    return precision != "bf16" or rank.gpu.capability >= (8, 0)


def check_memory(facts: Sequence[RankFacts], need: Need) -> Finding:
    """Hold the free memory of every GPU against the plan's peak."""
    gpus = [(rank.gpu, rank.rank) for rank in facts if rank.gpu]
    if not gpus:
        return unseen("no GPU")
    gpu, tightest = min(gpus, key=lambda pair: pair[0].free_bytes)
    free, where = format_bytes(gpu.free_bytes), _where(facts, [tightest])
    if need.memory_bytes is None:
        return ok(f"{free} free on {where}, and no less elsewhere")
    needed = f"the plan needs {format_bytes(need.memory_bytes)} for a micro-batch of {need.micro_batch}"
    if need.memory_bytes <= gpu.total_bytes * 0.95:
        cure = "another process holds memory there: see nvidia-smi"
    else:
        half = max((need.micro_batch or 2) // 2, 1)
        cure = f"batch.micro_size={half} (accumulation follows), or model.activation_checkpointing=true"
    return Finding(need.memory_bytes <= gpu.free_bytes, found=f"{needed}; {where} has {free} free", cure=cure)


def check_speed(facts: Sequence[RankFacts], *, precision: str) -> Finding:
    """Compare the ranks' speed in matrix products: one slow GPU slows all."""
    speeds = {rank.rank: rank.teraflops[precision] for rank in facts if rank.gpu and precision in rank.teraflops}
    if not speeds:
        return unseen("no GPU; processes on CPUs share cores, so nothing follows from it")
    slow, fast = min(speeds, key=lambda rank: speeds[rank]), max(speeds, key=lambda rank: speeds[rank])
    found = (
        f"matrix products in {precision}: {speeds[slow]:.1f} TFLOP/s on {_where(facts, [slow])}, "
        f"{speeds[fast]:.1f} on {_where(facts, [fast])}"
    )
    cure = "see nvidia-smi -q -d PERFORMANCE,TEMPERATURE there: heat or a power limit; or leave that host out"
    return Finding(speeds[slow] >= MIN_SHARE_OF_FASTEST * speeds[fast], found=found, cure=cure)


def check_clocks(offsets: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Compare the clocks, given each rank's offset from rank 0 in seconds."""
    if len(offsets) == 1:
        return unseen("one rank has one clock")
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    found = f"at most {abs(offsets[worst]) * 1e3:.0f} ms apart from rank 0 (rank {worst} on {hosts[worst]})"
    cure = f"start time synchronisation on {hosts[worst]} (chronyd or systemd-timesyncd; timedatectl shows it)"
    return Finding(abs(offsets[worst]) <= MAX_CLOCK_SKEW_SECONDS, found=found, cure=cure)


def check_links(links: Links, need: Need, *, world_size: int) -> Finding:
    """Hold the measured all-reduce against the time that a step computes."""
    if links.error:
        interface = "GLOO_SOCKET_IFNAME" if links.backend == "gloo" else "NCCL_SOCKET_IFNAME"
        cure = (
            f"set {interface} to the network card between the nodes (ip -brief address), open the ports between them, "
            "see launch/README.md; NCCL_DEBUG=INFO says what NCCL tried"
        )
        return red(f"{links.backend}: {links.error}", cure=cure)
    if links.all_ranks is None:
        return unseen("one rank sums nothing")
    parts = [f"{links.all_ranks:.2f} GB/s over all ranks"]
    parts += [f"{links.within_nodes:.2f} within nodes"] if links.within_nodes is not None else []
    parts += [f"{links.between_nodes:.2f} between nodes"] if links.between_nodes is not None else []
    found = f"{links.backend}: {', '.join(parts)}"
    if need.gradient_bytes is None or need.compute_seconds is None:
        return ok(found)
    seconds = 2 * (world_size - 1) / world_size * need.gradient_bytes / (links.all_ranks * 1e9)
    found += (
        f"; a step sums {need.gradient_bytes / 1e6:.0f} MB of gradients in {seconds * 1e3:.0f} ms and computes for "
        f"about {need.compute_seconds * 1e3:.0f} ms"
    )
    cure = (
        "name the fast cards in NCCL_SOCKET_IFNAME and NCCL_IB_HCA; or a larger batch.global_size, whose gradients are "
        "summed as often but computed for longer"
    )
    return Finding(seconds <= MAX_COMMUNICATION_SHARE * need.compute_seconds, found=found, cure=cure)


def check_shards(readings: Sequence[ShardReading], hosts: Sequence[str], need: Need) -> Finding:
    """Say whether every rank reads the same shards fast enough."""
    failed = group_ranks([reading.error for reading in readings])
    failed.pop("", None)
    if failed:
        error, ranks = next(iter(failed.items()))
        return red(
            f"{error}, on {_name(ranks, hosts)}",
            cure="mount the folder there, copy the shards to that node, or set data.train to where they are",
        )
    prints = group_ranks([reading.fingerprint for reading in readings])
    if len(prints) > 1:
        sides = [f"{fingerprint} on {_name(ranks, hosts)}" for fingerprint, ranks in prints.items()]
        return red(
            f"not the same everywhere: {'; '.join(sides)}",
            cure="copy them again; python -m data_prep verify DIR on each node finds what differs",
        )
    slow = min(range(len(readings)), key=lambda rank: readings[rank].images_per_second)
    rate, workers = readings[slow].images_per_second, readings[slow].workers
    needed = need.images_per_second or 0.0
    found = (
        f"{readings[0].fingerprint} everywhere; the slowest, {_name([slow], hosts)}, reads {rate:.0f} images/s with "
        f"{workers} workers, of {needed:.0f} that {need.basis}"
    )
    wanted = round(max(workers, 1) * needed / max(rate, 1e-9)) + 1
    cure = (
        f"data.workers={wanted} if the host has the cores; else shards of smaller images (data_prep --resize-shorter "
        "288 --quality 90), data.crops_per_image=2, or shards on the node's own disk"
    )
    return Finding(rate >= needed, found=found, cure=cure)


def check_shared_memory(facts: Sequence[RankFacts], need: Need) -> Finding:
    """Hold the size of /dev/shm, through which workers hand over images, against what the ranks of a host need."""
    sizes = [(rank.shared_memory_bytes, rank.rank) for rank in facts if rank.shared_memory_bytes is not None]
    if not sizes:
        return unseen("there is no /dev/shm here")
    size, smallest = min(sizes)
    where = _where(facts, [smallest])
    if need.shared_memory_bytes is None:
        return ok(f"{format_bytes(size)} on {where}, and no less elsewhere")
    needed = f"the workers of a host need {format_bytes(need.shared_memory_bytes)} of /dev/shm"
    cure = "start the container with --shm-size or --ipc=host; or lower data.workers and data.prefetch"
    return Finding(size >= need.shared_memory_bytes, found=f"{needed}; {where} has {format_bytes(size)}", cure=cure)


def check_run_folder(probes: Sequence[FolderProbe], hosts: Sequence[str], *, folder: str) -> Finding:
    """Say whether every rank can write the run folder, and whether it is one folder."""
    failed = [rank for rank, probe in enumerate(probes) if probe.error]
    if failed:
        cure = "set run.dir to a folder that this user may write on every node"
        return red(f"{probes[failed[0]].error}, on {_name(failed, hosts)}", cure=cure)
    blind = [rank for rank, probe in enumerate(probes) if not probe.sees_rank_0]
    if blind:
        cure = "set run.dir to a file system that all nodes share: every rank writes its part of a checkpoint"
        return red(f"{folder} on {_name(blind, hosts)} is not the folder that rank 0 sees", cure=cure)
    return ok(f"{folder}: writable and shared by all ranks")


def check_disk(probes: Sequence[FolderProbe], need: Need) -> Finding:
    """Hold the room on the run folder's disk against the checkpoints that are kept."""
    free = min(probe.free_bytes for probe in probes)
    if need.saved_bytes is None:
        return ok(f"{format_bytes(free)} free at the run folder")
    found = f"checkpoints take up to {format_bytes(need.saved_bytes)}; {format_bytes(free)} are free at the run folder"
    cure = "free some, set run.dir to a larger disk, or lower checkpoint.keep"
    return Finding(free >= need.saved_bytes, found=found, cure=cure)


def _where(facts: Sequence[RankFacts], ranks: Sequence[int]) -> str:
    return _name(ranks, [rank.host for rank in facts])


def _name(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return describe_ranks(ranks, hosts=hosts, max_hosts=4)
