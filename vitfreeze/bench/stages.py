"""Whether a curriculum and freezing save what the plan counts: every kind of step that a recipe takes, measured.

Four runs are priced: the recipe, the recipe without freezing, without its curriculum, and without both. Each kind of
step that one of them takes is timed in turn with a plain step of another engine, so that what disturbs the machine
disturbs both; the price of a run is the sum over its steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from vitfreeze.bench.timing import (
    Clock,
    Conditions,
    check_clock,
    choose_clock,
    describe_conditions,
    start_engine,
    time_step,
)
from vitfreeze.config import Config, CurriculumConfig
from vitfreeze.engine import FreezingEngine
from vitfreeze.planner import Plan, plan
from vitfreeze.text import format_table


class StepKind(NamedTuple):
    """What the cost of a step hangs on."""

    frozen_layers: int
    img_size: int
    mask_ratio: float
    decoded_share: float


@dataclass(frozen=True, kw_only=True)
class KindCost:
    """A kind of step: the median over the rounds of its time over a plain step's, and the plan's figure for it."""

    kind: StepKind
    step_ms: float
    measured: float
    planned: float


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """A whole run's cost over the plain one's."""

    run: str
    measured: float
    planned: float


@dataclass(frozen=True, kw_only=True)
class StageBenchmark(Conditions):
    """The kinds of step, and the runs that are made of them."""

    clock: str
    kinds: tuple[KindCost, ...]
    runs: tuple[RunCost, ...]


def run_stage_benchmark(config: Config, *, rounds: int = 3, clock: str = "wall") -> StageBenchmark:
    """Measure every kind of step of a pre-training recipe; its data is not read, images are random.

    Args:
        config: the run.
        rounds: steps of each kind, each beside a plain step.
        clock: wall, or processor: the seconds that all threads of this process worked. On a GPU always wall.

    Raises:
        ConfigError: a setting cannot be used.
        ValueError: `rounds` is below 1, or there is no such clock.
    """
    check_clock(clock)
    plans = {name: plan(variant) for name, variant in vary(config).items()}
    planned = {kind: cost for of in plans.values() for kind, cost, _ in _list_kinds(of)}
    plain, _ = start_engine(config, rounds=rounds)
    engine, _ = start_engine(config, rounds=rounds)
    clock, read_clock = choose_clock(clock, device=engine.device)
    reference = next(iter(_list_kinds(plans["plain"])))[0]
    kinds = []
    for kind in sorted(planned):
        engine.freeze(kind.frozen_layers, step=kind.frozen_layers)
        for warmed, of in ((engine, kind), (plain, reference)):
            take_step(warmed, of, read_clock)
        pairs = [(take_step(engine, kind, read_clock), take_step(plain, reference, read_clock)) for _ in range(rounds)]
        kinds.append(
            KindCost(
                kind=kind, step_ms=1e3 * statistics.median(mine for mine, _ in pairs),
                measured=statistics.median(mine / theirs for mine, theirs in pairs), planned=planned[kind],
            )
        )  # fmt: skip
    measured = {row.kind: row.measured for row in kinds}
    runs = tuple(price_run(name, of, measured=measured) for name, of in plans.items())
    conditions = describe_conditions(config, engine, rounds=rounds)
    engine.destroy()
    plain.destroy()
    return StageBenchmark(**conditions, clock=clock, kinds=tuple(kinds), runs=runs)


def vary(config: Config) -> dict[str, Config]:
    """Return the recipe with and without freezing and curriculum, by name; the plain run comes first."""
    data = replace(config.data, train=config.data.train_shards)
    still = replace(config, curriculum=CurriculumConfig(), data=data)

    def unfrozen(of: Config) -> Config:
        return replace(of, freeze=replace(of.freeze, mode="off"))

    return {"plain": unfrozen(still), "frozen": still, "curriculum": unfrozen(config), "both": config}


def _list_kinds(of: Plan) -> Sequence[tuple[StepKind, float, int]]:
    """Return kind, planned cost and steps of each stage of a plan."""
    return [
        (
            StepKind(
                stage.frozen_layers, stage.images.img_size, stage.images.mask_ratio, stage.images.decoded_share
            ),
            stage.relative_cost,
            stage.steps,
        )
        for stage in of.stages
    ]  # fmt: skip


def take_step(engine: FreezingEngine, kind: StepKind, clock: Clock) -> float:
    """Return the seconds of a step of its kind."""
    images = torch.randn(engine.micro_batch, 3, kind.img_size, kind.img_size, device=engine.device)
    treatment = {"mask_ratio": kind.mask_ratio, "decoded_share": kind.decoded_share}
    return time_step(engine, images, clock=clock, treatment=treatment).step


def price_run(name: str, of: Plan, *, measured: Mapping[StepKind, float]) -> RunCost:
    """Return what a run costs by its measured steps, and by the plan."""
    stages = _list_kinds(of)
    return RunCost(
        run=name,
        measured=sum(steps * measured[kind] for kind, _, steps in stages) / of.total_steps,
        planned=sum(steps * cost for _, cost, steps in stages) / of.total_steps,
    )


def format_stage_benchmark(result: StageBenchmark) -> str:
    """Return the result as two tables under the settings it was measured with."""
    kinds = [["frozen", "pixels", "masked", "decoded", "step ms", "measured", "planned", "measured/planned"]]
    for row in result.kinds:
        cells = [f"{value:g}" for value in row.kind] + [f"{row.step_ms:,.0f}", f"{row.measured:.3f}"]
        kinds.append([*cells, f"{row.planned:.3f}", f"{row.measured / row.planned:.3f}"])
    runs = [["run", "measured", "planned", "measured/planned"]]
    for cost in result.runs:
        ratio = f"{cost.measured / cost.planned:.3f}"
        runs.append([cost.run, f"{cost.measured:.3f}", f"{cost.planned:.3f}", ratio])
    head = f"cost of a step and of a run over plain ones; medians of {result.rounds} rounds by the {result.clock} clock"
    return "\n".join([*result.lines(), head, "", format_table(kinds), "", format_table(runs)])
