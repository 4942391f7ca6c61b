"""Every check in turn, which all ranks take and answer alike."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch

from vitfreeze.config import Config, derive_accumulation
from vitfreeze.data import TrainLoader, build_train_loader
from vitfreeze.doctor import checks
from vitfreeze.doctor.checks import FolderProbe, Need, ShardReading
from vitfreeze.doctor.facts import RankFacts, collect_facts
from vitfreeze.doctor.findings import Finding, ok, red, unseen
from vitfreeze.doctor.network import compare_clocks, measure_links
from vitfreeze.gpu import is_built_for
from vitfreeze.planner import costs_of, plan
from vitfreeze.ranks import LaunchEnvironment, group_ranks
from vitfreeze.rendezvous import Rendezvous, fingerprint_shards

# Of the rate of large matrix products, what a whole training step of a ViT reaches when it is well tuned.
STEP_SHARE_OF_PRODUCTS = 0.4
BYTES_SAVED_PER_PARAMETER = 12  # an fp32 master weight and two fp32 moments


def run_checks(
    config: Config | None,
    *,
    seconds: float = 5.0,
    images_per_second: float | None = None,
    timeout: timedelta = timedelta(minutes=2),
) -> dict[str, Finding]:
    """Check the cluster that the launcher started this process in; collective, and the same answer on all ranks.

    Args:
        config: the run that it shall carry; None: only what every run needs.
        seconds: how long the ranks read shards.
        images_per_second: that each rank trains, where it is known; else estimated from the device's speed.
        timeout: how long to wait for ranks that do not answer.

    Raises:
        ClusterError: the ranks do not all come together.
    """
    launch = LaunchEnvironment.read()
    rendezvous = Rendezvous("doctor", launch=launch, timeout=timeout)
    hosts = label_hosts(rendezvous.wait_for_ranks(), local_size=launch.local_size)
    everyone = [RankFacts.from_json(facts) for facts in rendezvous.gather(asdict(collect_facts(launch)))]
    facts = [replace(rank, host=host) for rank, host in zip(everyone, hosts, strict=True)]
    need, batch = find_need(config, facts, launch=launch, images_per_second=images_per_second)
    findings = {
        "ranks": checks.check_ranks(facts),
        "versions": checks.check_versions(facts),
        "GPUs": checks.check_gpus(facts),
        "precision": checks.check_precision(facts, wanted=need.precision),
        **({"batch": batch} if batch else {}),
        "GPU memory": checks.check_memory(facts, need),
        "speed": checks.check_speed(facts, precision=need.precision or "fp32"),
        "clocks": checks.check_clocks(compare_clocks(rendezvous), hosts),
    }
    links = measure_links(rendezvous, hosts, device=choose_device(facts, launch))
    findings["all-reduce"] = checks.check_links(links, need, world_size=launch.world_size)
    findings["shared memory"] = checks.check_shared_memory(facts, need)
    return findings | check_files(config, need, rendezvous, hosts, seconds=seconds)


def label_hosts(hostnames: Sequence[str], *, local_size: int) -> list[str]:
    """Return a name for the host of each rank that tells nodes apart also where they share a host name."""
    nodes = [rank // local_size for rank in range(len(hostnames))]
    shared = {name for name, ranks in group_ranks(hostnames).items() if len({nodes[rank] for rank in ranks}) > 1}
    return [f"{name}/node {node}" if name in shared else name for name, node in zip(hostnames, nodes, strict=True)]


def choose_device(facts: Sequence[RankFacts], launch: LaunchEnvironment) -> torch.device:
    """Return where the ranks sum: on their GPUs if all have one that torch has code for."""
    usable = all(rank.gpu is not None and is_built_for(rank.gpu.capability, rank.gpu.built_for) for rank in facts)
    if not usable:
        return torch.device("cpu")
    torch.cuda.set_device(launch.local_rank)
    return torch.device("cuda", launch.local_rank)


def find_need(
    config: Config | None, facts: Sequence[RankFacts], *, launch: LaunchEnvironment, images_per_second: float | None
) -> tuple[Need, Finding | None]:
    """Return what the recipe needs, and the finding on its batch; one that does not divide needs nothing.

    Raises:
        ConfigError: the recipe cannot be planned for another reason.
    """
    if config is None:
        return Need(), None
    if not config.run.ds_config and all(rank.gpu is None for rank in facts):
        config = replace(config, run=replace(config.run, ds_config="cpu"))
    try:
        micro_batch, accumulation = derive_accumulation(config, world_size=launch.world_size)
    except ValueError as error:
        return Need(), red(str(error), cure="choose another number of ranks, batch.micro_size or batch.global_size")
    predicted = plan(config, world_size=launch.world_size)
    precision = predicted.machine.precision
    rate, basis = images_per_second, "were asked for"
    if rate is None:
        speed = min(rank.teraflops.get(precision, rank.teraflops.get("fp32", 0.0)) for rank in facts)
        rate = STEP_SHARE_OF_PRODUCTS * speed * 1e12 / predicted.stages[-1].flops_per_image
        basis = f"it could train at most, at {STEP_SHARE_OF_PRODUCTS:.0%} of its rate of matrix products"
    data, model = config.data, config.model
    image_bytes = 3 * model.img_size**2 + 4 * (model.img_size // model.resolve().patch_size) ** 2
    batches_ahead = data.workers * data.prefetch + 1 if data.workers else 0
    need = Need(
        precision=precision, micro_batch=micro_batch, memory_bytes=predicted.peak_memory_bytes,
        gradient_bytes=predicted.stages[0].gradient_bytes_per_step, compute_seconds=micro_batch * accumulation / rate,
        images_per_second=rate, basis=basis,
        shared_memory_bytes=batches_ahead * micro_batch * image_bytes * launch.local_size,
        saved_bytes=(config.checkpoint.keep + 1) * costs_of(config).parameters * BYTES_SAVED_PER_PARAMETER,
    )  # fmt: skip
    return need, ok(f"micro-batch {micro_batch}, {accumulation} of them a step on each rank")


def check_files(
    config: Config | None, need: Need, rendezvous: Rendezvous, hosts: Sequence[str], *, seconds: float
) -> dict[str, Finding]:
    """Check shards, run folder and disk."""
    if config is None:
        return dict.fromkeys(("shards", "run folder", "disk"), unseen("name a recipe to have it examined"))
    if need.images_per_second is None:
        shards = unseen("not read, because the batch does not divide")
    elif not config.data.train_shards:
        shards = red("the recipe names none", cure="data.train=FOLDER")
    else:
        answers = rendezvous.gather(asdict(read_shards(config, rendezvous.launch, seconds=seconds)))
        shards = checks.check_shards([ShardReading(**answer) for answer in answers], hosts, need)
    folder = Path(config.run.dir or f"runs/{config.recipe}")
    probes = probe_folder(folder, rendezvous)
    run_folder = checks.check_run_folder(probes, hosts, folder=str(folder))
    return {"shards": shards, "run folder": run_folder, "disk": checks.check_disk(probes, need)}


def read_shards(config: Config, launch: LaunchEnvironment, *, seconds: float) -> ShardReading:
    """Open the training shards as a run would and read batches for some seconds."""
    workers = config.data.workers
    try:
        loader = build_train_loader(config, rank=launch.rank, world_size=launch.world_size)
        fingerprint = fingerprint_shards(*loader.all_shards())
        rate = time_reading(loader, seconds=seconds)
    except (ValueError, OSError) as error:
        return ShardReading(fingerprint="", images_per_second=0.0, workers=workers, error=str(error))
    return ShardReading(fingerprint=fingerprint, images_per_second=rate, workers=workers)


def time_reading(loader: TrainLoader, *, seconds: float) -> float:
    """Return the images per second of this rank, once its workers have started and their first batches are used up."""
    batches = loader.batches(0, 10**9)
    ready = max(loader.options.workers * loader.options.prefetch, 1)
    for _ in itertools.islice(batches, ready):
        pass
    begin, images = time.perf_counter(), 0
    while not images or time.perf_counter() - begin < seconds:
        images += len(next(batches).images)
    rate = images / (time.perf_counter() - begin)
    batches.close()  # type: ignore[attr-defined]
    return rate


def probe_folder(folder: Path, rendezvous: Rendezvous) -> list[FolderProbe]:
    """Write a file in the run folder on every rank, and look for that of rank 0; what was made is removed again."""
    existed = folder.is_dir()
    name = rendezvous.gather(f".doctor-{os.getpid()}-{time.time_ns()}")[0]  # rank 0's word
    mine = folder / f"{name}-{rendezvous.rank}"
    error, free = "", 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_text("written by vitfreeze doctor; may be removed\n")
        free = shutil.disk_usage(folder).free
    except OSError as caught:
        error = f"{folder}: {caught.strerror}"
    rendezvous.gather("written")
    sees = (folder / f"{name}-0").is_file()
    answers = rendezvous.gather([error, sees, free])
    mine.unlink(missing_ok=True)
    rendezvous.gather("removed")
    if not existed:
        with suppress(OSError):  # not empty, or another rank was quicker
            folder.rmdir()
    return [FolderProbe(error=text, sees_rank_0=seen, free_bytes=room) for text, seen, room in answers]
