"""What more ranks cost: steps of the engine on all ranks of the launch, held against the plan's arithmetic.

Beside each other in one run, for several lengths of the frozen prefix: the step of a rank that talks to nobody (all
ranks take theirs at once, as they do in training), the step of the engine, which reduces gradients and gathers weights
over all ranks, and the bandwidth of an all-reduce. The plan adds the bytes it counts, at that bandwidth, to the step
of the lone rank; the engine shows whether that is so.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from vitfreeze.bench.timing import LEARNING_RATE, Conditions, describe_conditions, start_engine, time_call, time_step
from vitfreeze.config import Config
from vitfreeze.doctor.network import bus_bandwidth
from vitfreeze.engine import FreezingEngine, join_ranks
from vitfreeze.model import LocalMIM
from vitfreeze.planner import Stage, StepTimes, plan
from vitfreeze.text import format_table
from vitfreeze.training.build import build_model

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
class ScalingBenchmark(Conditions):
    """A benchmark with all that one must know to repeat it."""

    bandwidth_gigabytes: float
    rows: tuple[ScalingRow, ...]


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
    ranks = join_ranks()
    if ranks.world_size == 1:
        raise ValueError("bench scaling compares one rank with many: start it with a launcher on two ranks or more")
    paper = plan(config, world_size=ranks.world_size)
    prefixes = _choose_prefixes([stage.frozen_layers for stage in paper.stages], frozen_layers)
    engine, images = start_engine(config, rounds=rounds)
    lone = _LoneRank(build_model(config), device=engine.device, dtype=engine.dtype)
    alone_ms, measured_ms, bandwidths = {}, {}, []
    for prefix in prefixes:
        engine.freeze(prefix, step=prefix)
        alone, together = _measure(lone, engine, images, rounds=rounds, warmup_rounds=warmup_rounds)
        alone_ms[prefix], measured_ms[prefix] = alone, together
        bandwidths.append(bus_bandwidth(None, engine.world_size, engine.device))
    bandwidth = engine.ranks.mean([statistics.median(bandwidths)])[0]
    times = StepTimes(source="lone ranks", images=engine.micro_batch, step_ms=alone_ms)
    held = plan(config, world_size=engine.world_size, times=times, bandwidth_gigabytes=bandwidth)
    stages = {stage.frozen_layers: stage for stage in held.stages}
    rows = tuple(_compare(stages[prefix], measured_ms[prefix]) for prefix in prefixes)
    return ScalingBenchmark(
        **describe_conditions(config, engine, rounds=rounds), bandwidth_gigabytes=bandwidth, rows=rows
    )


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


class _LoneRank:
    """A rank that trains alone. The engine's ranks form one group, so it has torch's AdamW, which the engine has too.

    Where the weights are in half precision it works on fp32 copies of them, as ZeRO does.
    """

    def __init__(self, model: LocalMIM, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.model = device, model.to(device=device, dtype=dtype)
        self.weights = list(self.model.parameters())
        self.masters = [w if dtype == torch.float32 else w.detach().float() for w in self.weights]
        self.adamw = torch.optim.AdamW(self.masters, lr=LEARNING_RATE, fused=True)

    def take_step(self, images: Tensor, *, frozen_layers: int) -> None:
        """Run one micro-batch and update what has a gradient, which the frozen prefix does not."""
        self.model(images, frozen_layers=frozen_layers).loss.backward()
        pairs = [(w, m) for w, m in zip(self.weights, self.masters, strict=True) if w is not m and w.grad is not None]
        for weight, master in pairs:
            master.grad, weight.grad = cast(Tensor, weight.grad).float(), None
        self.adamw.step()
        with torch.no_grad():
            for weight, master in pairs:
                weight.copy_(master)
        self.adamw.zero_grad()


def _measure(
    lone: _LoneRank, engine: FreezingEngine, images: Tensor, *, rounds: int, warmup_rounds: int
) -> tuple[float, float]:
    """Return the milliseconds of a lone rank's micro-batch, and those of the engine's optimizer step."""
    alone, together = [], []
    for number in range(-warmup_rounds, rounds):
        torch.distributed.barrier()
        step = partial(lone.take_step, images, frozen_layers=engine.frozen_layers)
        lone_seconds = time_call(step, device=engine.device)
        torch.distributed.barrier()
        seconds = time_step(engine, images).step
        if number >= 0:
            alone.append(lone_seconds)
            together.append(seconds)
    means = engine.ranks.mean([statistics.median(alone), statistics.median(together)])
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


def format_scaling_benchmark(result: ScalingBenchmark) -> str:
    """Return the result as a table under the settings it was measured with."""
    head = [
        *result.lines(),
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
