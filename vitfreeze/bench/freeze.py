"""What a drop costs: the seconds in which layers leave the engine, beside the seconds of a step."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from vitfreeze.bench.timing import Conditions, describe_conditions, start_engine, time_step
from vitfreeze.config import Config
from vitfreeze.text import format_bytes, format_table


@dataclass(frozen=True, kw_only=True)
class DropCost:
    """One drop and the steps around it; bytes are those of rank 0."""

    frozen_layers: int
    drop_seconds: float
    step_seconds: float  # median, with this many layers frozen
    drop_in_steps: float  # drop_seconds over the median of steps with nothing frozen
    trainable_parameters: int
    optimizer_state_bytes: int


@dataclass(frozen=True, kw_only=True)
class FreezeBenchmark(Conditions):
    """The drops of a model, layer by layer."""

    rows: tuple[DropCost, ...]


def run_freeze_benchmark(config: Config, *, rounds: int = 3) -> FreezeBenchmark:
    """Freeze the model of a recipe layer by layer, with `rounds` steps of random images after each drop.

    Raises:
        ConfigError: a setting cannot be used.
        ValueError: `rounds` is below 1.
    """
    engine, images = start_engine(config, rounds=rounds)

    def median_step() -> float:
        return statistics.median(time_step(engine, images).step for _ in range(rounds))

    time_step(engine, images)  # the first step fills caches
    full_step, rows = median_step(), []
    for frozen_layers in range(1, engine.module.depth + 1):
        event = engine.freeze(frozen_layers, step=frozen_layers)
        assert event is not None, "a drop is due at every call"
        rows.append(
            DropCost(
                frozen_layers=frozen_layers,
                drop_seconds=event.seconds,
                step_seconds=median_step(),
                drop_in_steps=event.seconds / full_step,
                trainable_parameters=event.trainable_parameters,
                optimizer_state_bytes=event.optimizer_state_bytes,
            )
        )
    engine.destroy()
    return FreezeBenchmark(**describe_conditions(config, engine, rounds=rounds), rows=tuple(rows))


def format_freeze_benchmark(result: FreezeBenchmark) -> str:
    """Return the result as a table under the settings it was measured with."""
    rows = [["frozen", "drop (s)", "in steps", "step (s)", "parameters", "optimizer state"]]
    for row in result.rows:
        cells = [str(row.frozen_layers), f"{row.drop_seconds:.2f}", f"{row.drop_in_steps:.2f}"]
        cells += [f"{row.step_seconds:.2f}", f"{row.trainable_parameters:,}", format_bytes(row.optimizer_state_bytes)]
        rows.append(cells)
    return "\n".join([*result.lines(), "", format_table(rows)])
