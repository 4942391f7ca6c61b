"""What more ranks cost: steps of the engine on all ranks of the launch, held against the plan's arithmetic.

Beside each other in one run, for several lengths of the frozen prefix: the step of a rank that talks to nobody (all
ranks take theirs at once, as they do in training), the step of the engine, which reduces gradients and gathers weights
over all ranks, and the bandwidth of an all-reduce. The plan adds the bytes it counts, at that bandwidth, to the step
of the lone rank; the engine shows whether that is so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vitfreeze.bench.freeze import time_step
from vitfreeze.bench.step import StepTimer, list_versions, name_device
from vitfreeze.config import Config
from vitfreeze.doctor.network import bus_bandwidth
from vitfreeze.engine import FreezingEngine, join_processes
from vitfreeze.planner import Plan, Stage, StepTimes, plan
from vitfreeze.text import format_table
from vitfreeze.training.build import build_engine, build_model

DEFAULT_STAGES = 5


@dataclass(frozen=True, kw_only=True)
class ScalingRow:
    """One length of the frozen prefix; times are medians in milliseconds, means over the ranks.

    Efficiency is the time of the lone rank's step over that of a step on all ranks, for as many images a rank.
    """

    frozen_layers: int
    alone_ms: float
    sent_bytes: float  # by each rank in a step, as the plan counts them
    planned_ms: tuple[float, float]  # if communication overlaps with everything, with nothing
    measured_ms: float
    planned_efficiency: tuple[float, float]  # with nothing, with everything
    measured_efficiency: float


@dataclass(frozen=True, kw_only=True)
class ScalingBenchmark:
    """A benchmark with all that one must know to repeat it."""

    device: str
    versions: dict[str, str]
    recipe: str
    model: str
    world_size: int
    zero_stage: int
    precision: str
    micro_batch: int  # images a rank
    accumulation: int
    threads: int
    rounds: int
    bandwidth_gigabytes: float
    rows: tuple[ScalingRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)


def run_scaling_benchmark(
    config: Config, *, frozen_layers: Sequence[int] | None = None, rounds: int = 5, warmup_rounds: int = 2
) -> ScalingBenchmark:
    """Measure the stages of a recipe on the ranks of this launch; all of them call it.

    Args:
        config: the run; its data is not read, images are random.
        frozen_layers: lengths of the prefix that its schedule goes through; five of them by default. Nothing frozen
            is always measured.
        rounds, warmup_rounds: steps of either kind, taken in turn.

    Raises:
        ConfigError: a setting cannot be used.
        ValueError: one rank alone, a length that the schedule does not go through, or no rounds.
    """
    processes = join_processes()
    if processes.world_size == 1:
        raise ValueError("bench scaling compares one rank with many: start it with a launcher on two ranks or more")
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1")
    paper = plan(config, world_size=processes.world_size)
    prefixes = _choose_prefixes([stage.frozen_layers for stage in paper.stages], frozen_layers)
    at_once = replace(config, freeze=replace(config.freeze, min_steps_between_drops=0))
    engine = build_engine(at_once, processes, frozen_layers=0)
    timer = StepTimer(
        build_model(config), micro_batch=engine.micro_batch, dtype=engine.dtype, device=engine.device,
        clock=time.perf_counter,
    )  # fmt: skip
    engine.set_learning_rates(dict.fromkeys(engine.unit_names, 1e-4))
    alone_ms, measured_ms, bandwidths = {}, {}, []
    for prefix in prefixes:
        engine.freeze(prefix, step=prefix)
        alone_ms[prefix], measured_ms[prefix] = _measure(timer, engine, rounds=rounds, warmup_rounds=warmup_rounds)
        bandwidths.append(bus_bandwidth(None, engine.world_size, engine.device))
    bandwidth = engine.mean_over_ranks([statistics.median(bandwidths)])[0]
    times = StepTimes(source="lone ranks", images=engine.micro_batch, step_ms=alone_ms)
    held = plan(config, world_size=engine.world_size, times=times, bandwidth_gigabytes=bandwidth)
    stages = {stage.frozen_layers: stage for stage in held.stages}
    rows = tuple(_compare(stages[prefix], measured_ms[prefix]) for prefix in prefixes)
    return _describe(held, engine, rows, rounds=rounds)


def _choose_prefixes(possible: Sequence[int], wanted: Sequence[int] | None) -> list[int]:
    if wanted is None:
        last = len(possible) - 1
        return sorted({possible[round(last * part / (DEFAULT_STAGES - 1))] for part in range(DEFAULT_STAGES)})
    strange = [str(prefix) for prefix in wanted if prefix not in possible]
    if strange:
        raise ValueError(
            f"the recipe never has {', '.join(strange)} layers frozen, but {', '.join(map(str, possible))}"
        )
    return sorted({0, *wanted})


def _measure(timer: StepTimer, engine: FreezingEngine, *, rounds: int, warmup_rounds: int) -> tuple[float, float]:
    """Return the milliseconds of a lone rank's micro-batch, and those of the engine's optimizer step."""
    alone, together = [], []
    for number in range(-warmup_rounds, rounds):
        torch.distributed.barrier()
        lone_seconds = timer.time_step(engine.frozen_layers).step
        torch.distributed.barrier()
        seconds = time_step(engine, timer.images)
        if number >= 0:
            alone.append(lone_seconds)
            together.append(seconds)
    means = engine.mean_over_ranks([statistics.median(alone), statistics.median(together)])
    return 1e3 * means[0], 1e3 * means[1]


def _compare(stage: Stage, measured_ms: float) -> ScalingRow:
    communication_ms = stage.communication_ms or 0.0
    hidden, apart = max(stage.step_ms, communication_ms), stage.step_ms + communication_ms
    return ScalingRow(
        frozen_layers=stage.frozen_layers,
        alone_ms=stage.step_ms,
        sent_bytes=stage.communication_bytes_per_step,
        planned_ms=(hidden, apart),
        measured_ms=measured_ms,
        planned_efficiency=(stage.step_ms / apart, stage.step_ms / hidden),
        measured_efficiency=stage.step_ms / measured_ms,
    )


def _describe(held: Plan, engine: FreezingEngine, rows: tuple[ScalingRow, ...], *, rounds: int) -> ScalingBenchmark:
    return ScalingBenchmark(
        device=name_device(engine.device), versions=list_versions(engine.device), recipe=held.recipe, model=held.model,
        world_size=engine.world_size, zero_stage=held.machine.zero_stage, precision=held.machine.precision,
        micro_batch=engine.micro_batch, accumulation=engine.accumulation, threads=torch.get_num_threads(),
        rounds=rounds, bandwidth_gigabytes=held.bandwidth_gigabytes or 0.0, rows=rows,
    )  # fmt: skip


def format_scaling_benchmark(result: ScalingBenchmark) -> str:
    """Return the result as a table under the settings it was measured with."""
    head = [
        f"{result.recipe}: {result.model} on {result.world_size} ranks, ZeRO stage {result.zero_stage}, "
        f"{result.precision}, micro-batch {result.micro_batch} x {result.accumulation}",
        f"{result.device}, {result.threads} threads a rank; "
        + ", ".join(f"{name} {version}" for name, version in result.versions.items()),
        f"medians of {result.rounds} rounds, means over the ranks; all-reduce {result.bandwidth_gigabytes:.2f} GB/s",
    ]
    rows = [["frozen", "alone ms", "sent MiB", "planned ms", "measured ms", "planned efficiency", "measured"]]
    for row in result.rows:
        low, high = row.planned_ms
        least, most = row.planned_efficiency
        rows.append(
            [
                str(row.frozen_layers), f"{row.alone_ms:.1f}", f"{row.sent_bytes / 2**20:.1f}",
                f"{low:.1f} to {high:.1f}", f"{row.measured_ms:.1f}", f"{least:.1%} to {most:.1%}",
                f"{row.measured_efficiency:.1%}",
            ]
        )  # fmt: skip
    return "\n".join([*head, "", format_table(rows)])
