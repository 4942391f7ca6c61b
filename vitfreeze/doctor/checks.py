"""From what all ranks saw to findings. Nothing here measures, so every case can be tested on any machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vitfreeze.doctor.facts import RankFacts
from vitfreeze.doctor.findings import Finding
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


def check_ranks(facts: Sequence[RankFacts]) -> Finding:
    """Say how many ranks there are on which hosts."""
    hosts = group_ranks([rank.host for rank in facts])
    counts = ", ".join(f"{len(ranks)} on {host}" for host, ranks in list(hosts.items())[:16])
    more = f" and {len(hosts) - 16} more hosts" if len(hosts) > 16 else ""
    return Finding(
        check="ranks", fit=True, found=f"{len(facts)}, all there: {counts}{more}"
    )  # fmt: skip


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
        return Finding(check="versions", fit=False, found="; ".join(differences), cure=f"{INSTALL}, everywhere alike")
    if missing:
        return Finding(check="versions", fit=False, found=f"not installed: {', '.join(missing)}", cure=INSTALL)
    broken = {rank.engine_error: rank.rank for rank in facts if rank.engine_error}
    if broken:
        error, rank = next(iter(broken.items()))
        return Finding(
            check="versions", fit=False, cure=INSTALL,
            found=f"DeepSpeed does not load on {_where(facts, [rank])}: {error}",
        )  # fmt: skip
    shown = ", ".join(f"{name} {facts[0].versions[name]}" for name in ("python", "torch", "deepspeed", "timm"))
    return Finding(check="versions", fit=True, found=f"alike: {shown}")


def check_gpus(facts: Sequence[RankFacts]) -> Finding:
    """Hold the generation of every GPU against torch's build, and every rank against the number of GPUs."""
    for rank in facts:
        where = _where(facts, [rank.rank])
        if rank.driver_says and not rank.gpus_seen:
            return _unseen_gpu(rank, where)
        if rank.gpus_seen and rank.gpu is None:
            return Finding(
                check="GPUs", fit=False,
                found=f"{where} is number {rank.local_rank} of its host, where torch sees {rank.gpus_seen} GPUs",
                cure="give that host fewer slots in the hostfile, or see whether CUDA_VISIBLE_DEVICES hides some",
            )  # fmt: skip
    too_old = [rank for rank in facts if rank.gpu and not is_built_for(rank.gpu.capability, rank.gpu.built_for)]
    if too_old:
        return _unfit_build(facts, too_old)
    names = group_ranks([rank.gpu.name if rank.gpu else "CPU" for rank in facts])
    if "CPU" in names and len(names) > 1:
        return Finding(
            check="GPUs", fit=False, found=f"none on {_where(facts, names['CPU'])}, while other ranks have one",
            cure="see nvidia-smi there: is the driver loaded, is the container started with its GPUs?",
        )  # fmt: skip
    if "CPU" in names:
        return Finding(check="GPUs", fit=True, found="none; this is a run on CPUs")
    texts = [f"{len(ranks)} x {name}" for name, ranks in names.items()]
    gpu = next(rank.gpu for rank in facts if rank.gpu)
    found = f"{', '.join(texts)}; torch {facts[0].versions['torch']} has code for sm_{number_of(gpu.capability)}"
    return Finding(check="GPUs", fit=True, found=found)


def _unseen_gpu(rank: RankFacts, where: str) -> Finding:
    first = rank.driver_says.splitlines()[0]
    if not rank.torch_cuda:
        cure = (
            "this torch is a CPU build; install the CUDA build of the same version (TORCH_INDEX_URL, launch/README.md)"
        )
    else:
        cure = (
            f"the driver is too old for CUDA {rank.torch_cuda}, or CUDA_VISIBLE_DEVICES hides the GPUs: update the "
            "driver, or install torch's build for CUDA 12.6 (TORCH_INDEX_URL, launch/README.md)"
        )
    return Finding(
        check="GPUs", fit=False, cure=cure,
        found=f"the driver lists {first} on {where}, but torch {rank.versions['torch']} sees no GPU",
    )  # fmt: skip


def _unfit_build(facts: Sequence[RankFacts], unfit: Sequence[RankFacts]) -> Finding:
    gpu, version = unfit[0].gpu, unfit[0].versions["torch"]
    assert gpu is not None
    where = _where(facts, [rank.rank for rank in unfit])
    found = describe_unfit_build(gpu.name, gpu.capability, gpu.built_for, version=version, where=where)
    return Finding(check="GPUs", fit=False, found=found, cure=cure_unfit_build(gpu.capability, version=version))


def check_precision(facts: Sequence[RankFacts], *, wanted: str | None) -> Finding:
    """Say which precisions work everywhere, and whether the recipe's is among them."""
    works = [name for name in facts[0].precisions if all(_trains_in(rank, name) for rank in facts)]
    found = f"{', '.join(works) or 'none'} on every rank"
    if wanted is None or wanted in works:
        return Finding(
            check="precision", fit=bool(works), found=found + (f"; the recipe wants {wanted}" if wanted else "")
        )
    unfit = next(rank for rank in facts if not _trains_in(rank, wanted))
    why = unfit.precisions.get(wanted) or (
        "CPUs train in fp32" if unfit.gpu is None else f"{unfit.gpu.name} has no fast {wanted}"
    )
    if unfit.gpu is None:
        cure = "run.ds_config=cpu"
    else:
        cure = "run.ds_config=zero1_fp16" if wanted == "bf16" else f"run.ds_config with one of {', '.join(works)}"
    found = f"the recipe wants {wanted}, but on {_where(facts, [unfit.rank])}: {why}"
    return Finding(check="precision", fit=False, found=found, cure=cure)


def _trains_in(rank: RankFacts, precision: str) -> bool:
    if rank.precisions.get(precision):
        return False
    if rank.gpu is None:
        return precision == "fp32"
    # torch emulates bfloat16 on GPUs before the A100, slower than float32.
    return precision != "bf16" or rank.gpu.capability >= (8, 0)


def check_memory(facts: Sequence[RankFacts], *, needed_bytes: float | None, micro_batch: int | None) -> Finding:
    """Hold the free memory of every GPU against the plan's peak."""
    gpus = [(rank.gpu.free_bytes, rank) for rank in facts if rank.gpu]
    if not gpus:
        return Finding(check="GPU memory", fit=None, found="no GPU")
    free, tightest = min(gpus, key=lambda pair: pair[0])
    where = _where(facts, [tightest.rank])
    if needed_bytes is None:
        return Finding(
            check="GPU memory", fit=True, found=f"{format_bytes(free)} free on {where}, and no less elsewhere"
        )
    needed = f"the plan needs {format_bytes(needed_bytes)} for a micro-batch of {micro_batch}"
    found = f"{needed}; {where} has {format_bytes(free)} free"
    if needed_bytes <= free:
        return Finding(check="GPU memory", fit=True, found=found)
    assert tightest.gpu is not None
    if needed_bytes <= tightest.gpu.total_bytes * 0.95:
        cure = "another process holds memory there: see nvidia-smi"
    else:
        cure = f"batch.micro_size={_half(micro_batch)} (accumulation follows), or model.activation_checkpointing=true"
    return Finding(check="GPU memory", fit=False, found=found, cure=cure)


def _half(micro_batch: int | None) -> int:
    return max((micro_batch or 2) // 2, 1)


def check_speed(facts: Sequence[RankFacts], *, precision: str) -> Finding:
    """Compare the ranks' speed in matrix products: one slow GPU slows all."""
    speeds = {rank.rank: rank.teraflops[precision] for rank in facts if rank.gpu and precision in rank.teraflops}
    if not speeds:
        return Finding(
            check="speed", fit=None, found="no GPU; processes on CPUs share cores, so nothing follows from it"
        )
    slow, fast = min(speeds, key=lambda rank: speeds[rank]), max(speeds, key=lambda rank: speeds[rank])
    found = (
        f"matrix products in {precision}: {speeds[slow]:.1f} TFLOP/s on {_where(facts, [slow])}, "
        f"{speeds[fast]:.1f} on {_where(facts, [fast])}"
    )
    cure = "see nvidia-smi -q -d PERFORMANCE,TEMPERATURE there: heat or a power limit; or leave that host out"
    return Finding(check="speed", fit=speeds[slow] >= MIN_SHARE_OF_FASTEST * speeds[fast], found=found, cure=cure)


def check_clocks(offsets: Sequence[float], hosts: Sequence[str]) -> Finding:
    """Compare the clocks, given each rank's offset from rank 0 in seconds."""
    if len(offsets) == 1:
        return Finding(check="clocks", fit=None, found="one rank has one clock")
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    found = f"at most {abs(offsets[worst]) * 1e3:.0f} ms apart from rank 0 (rank {worst} on {hosts[worst]})"
    cure = f"start time synchronisation on {hosts[worst]} (chronyd or systemd-timesyncd; timedatectl shows it)"
    return Finding(check="clocks", fit=abs(offsets[worst]) <= MAX_CLOCK_SKEW_SECONDS, found=found, cure=cure)


def check_links(
    links: Links, *, gradient_bytes: float | None, compute_seconds: float | None, world_size: int
) -> Finding:
    """Hold the measured all-reduce against the time that a step computes."""
    if links.error:
        interface = "GLOO_SOCKET_IFNAME" if links.backend == "gloo" else "NCCL_SOCKET_IFNAME"
        cure = (
            f"set {interface} to the network card between the nodes (ip -brief address), open the ports between them, "
            "see launch/README.md; NCCL_DEBUG=INFO says what NCCL tried"
        )
        return Finding(check="all-reduce", fit=False, found=f"{links.backend}: {links.error}", cure=cure)
    if links.all_ranks is None:
        return Finding(check="all-reduce", fit=None, found="one rank sums nothing")
    parts = [f"{links.all_ranks:.2f} GB/s over all ranks"]
    parts += [f"{links.within_nodes:.2f} within nodes"] if links.within_nodes is not None else []
    parts += [f"{links.between_nodes:.2f} between nodes"] if links.between_nodes is not None else []
    found = f"{links.backend}: {', '.join(parts)}"
    if gradient_bytes is None or compute_seconds is None:
        return Finding(check="all-reduce", fit=True, found=found)
    seconds = 2 * (world_size - 1) / world_size * gradient_bytes / (links.all_ranks * 1e9)
    found += (
        f"; a step sums {gradient_bytes / 1e6:.0f} MB of gradients in {seconds * 1e3:.0f} ms and computes for about "
        f"{compute_seconds * 1e3:.0f} ms"
    )
    cure = (
        "name the fast cards in NCCL_SOCKET_IFNAME and NCCL_IB_HCA; or a larger batch.global_size, whose gradients are "
        "summed as often but computed for longer"
    )
    return Finding(
        check="all-reduce", fit=seconds <= MAX_COMMUNICATION_SHARE * compute_seconds, found=found, cure=cure
    )  # fmt: skip


def check_batch(error: str, *, micro_batch: int | None, accumulation: int | None) -> Finding:
    """Say how the global batch divides over the ranks."""
    if error:
        return Finding(
            check="batch", fit=False, found=error,
            cure="choose another number of ranks, batch.micro_size or batch.global_size",
        )  # fmt: skip
    return Finding(
        check="batch", fit=True, found=f"micro-batch {micro_batch}, {accumulation} of them a step on each rank"
    )


def check_shards(
    readings: Sequence[ShardReading], hosts: Sequence[str], *, needed_images_per_second: float, basis: str
) -> Finding:
    """Say whether every rank reads the same shards fast enough."""
    failed = group_ranks([reading.error for reading in readings])
    failed.pop("", None)
    if failed:
        error, ranks = next(iter(failed.items()))
        return Finding(
            check="shards", fit=False, found=f"{error}, on {_name(ranks, hosts)}",
            cure="mount the folder there, copy the shards to that node, or set data.train to where they are",
        )  # fmt: skip
    prints = group_ranks([reading.fingerprint for reading in readings])
    if len(prints) > 1:
        sides = [f"{fingerprint} on {_name(ranks, hosts)}" for fingerprint, ranks in prints.items()]
        return Finding(
            check="shards", fit=False, found=f"not the same everywhere: {'; '.join(sides)}",
            cure="copy them again; python -m data_prep verify DIR on each node finds what differs",
        )  # fmt: skip
    slow = min(range(len(readings)), key=lambda rank: readings[rank].images_per_second)
    rate, workers = readings[slow].images_per_second, readings[slow].workers
    found = (
        f"{readings[0].fingerprint} everywhere; the slowest, {_name([slow], hosts)}, reads {rate:.0f} images/s with "
        f"{workers} workers, of {needed_images_per_second:.0f} that {basis}"
    )
    wanted = round(max(workers, 1) * needed_images_per_second / max(rate, 1e-9)) + 1
    cure = (
        f"data.workers={wanted} if the host has the cores; else shards of smaller images (data_prep --resize-shorter "
        "288 --quality 90), data.crops_per_image=2, or shards on the node's own disk"
    )
    return Finding(check="shards", fit=rate >= needed_images_per_second, found=found, cure=cure)


def check_shared_memory(facts: Sequence[RankFacts], *, needed_bytes: float | None) -> Finding:
    """Hold the size of /dev/shm, through which workers hand over images, against what the ranks of a host need."""
    sizes = [(rank.shared_memory_bytes, rank) for rank in facts if rank.shared_memory_bytes is not None]
    if not sizes:
        return Finding(check="shared memory", fit=None, found="there is no /dev/shm here")
    size, smallest = min(sizes, key=lambda pair: pair[0])
    where = _where(facts, [smallest.rank])
    if needed_bytes is None:
        return Finding(check="shared memory", fit=True, found=f"{format_bytes(size)} on {where}, and no less elsewhere")
    return Finding(
        check="shared memory", fit=size >= needed_bytes,
        found=f"the workers of a host need {format_bytes(needed_bytes)} of /dev/shm; {where} has {format_bytes(size)}",
        cure="start the container with --shm-size or --ipc=host; or lower data.workers and data.prefetch",
    )  # fmt: skip


def check_run_folder(probes: Sequence[FolderProbe], hosts: Sequence[str], *, folder: str) -> Finding:
    """Say whether every rank can write the run folder, and whether it is one folder."""
    failed = [rank for rank, probe in enumerate(probes) if probe.error]
    if failed:
        return Finding(
            check="run folder", fit=False, found=f"{probes[failed[0]].error}, on {_name(failed, hosts)}",
            cure="set run.dir to a folder that this user may write on every node",
        )  # fmt: skip
    blind = [rank for rank, probe in enumerate(probes) if not probe.sees_rank_0]
    if blind:
        return Finding(
            check="run folder", fit=False,
            found=f"{folder} on {_name(blind, hosts)} is not the folder that rank 0 sees",
            cure="set run.dir to a file system that all nodes share: every rank writes its part of a checkpoint",
        )  # fmt: skip
    return Finding(check="run folder", fit=True, found=f"{folder}: writable and shared by all ranks")


def check_disk(probes: Sequence[FolderProbe], *, needed_bytes: float | None) -> Finding:
    """Hold the room on the run folder's disk against the checkpoints that are kept."""
    free = min(probe.free_bytes for probe in probes)
    if needed_bytes is None:
        return Finding(check="disk", fit=True, found=f"{format_bytes(free)} free at the run folder")
    return Finding(
        check="disk", fit=free >= needed_bytes,
        found=f"checkpoints take up to {format_bytes(needed_bytes)}; {format_bytes(free)} are free at the run folder",
        cure="free some, set run.dir to a larger disk, or lower checkpoint.keep",
    )  # fmt: skip


def _where(facts: Sequence[RankFacts], ranks: Sequence[int]) -> str:
    return _name(ranks, [rank.host for rank in facts])


def _name(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return describe_ranks(ranks, hosts=hosts, max_hosts=4)
