"""All that a run must remember, written and read in one place. Everything else is a function of its step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vitfreeze.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint
from vitfreeze.config import Config
from vitfreeze.engine import FreezingEngine
from vitfreeze.report import Meter
from vitfreeze.schedule import RunSchedule

_RESUMED_FROM, _ADAPTIVE_CHECKS = "resumed_from", "adaptive_checks"
_METER, _CHANGE = "meter/", "change/"


class RunState:
    """What a run remembers from step to step, and across a restart.

    engine: weights, optimizer state, loss scale, counters, random states: on any number of ranks.
    meter: sums of losses that are not logged yet; each rank has its own, so they come back on as many ranks only.
    engine's last reading of how much the layers change, for adaptive freezing: as the meter.
    schedule: the checks of adaptive freezing; `read_adaptive_checks` returns them before there is a schedule.
    resumed_from: `resume.from` of the run, so that a run that is started again by the same command goes on from its
        own newest checkpoint; `read_resumed_from` returns it.
    """

    def __init__(
        self, *, config: Config, engine: FreezingEngine, schedule: RunSchedule, meter: Meter, resumed_from: str
    ) -> None:
        self._config = config
        self._engine = engine
        self._schedule = schedule
        self._meter = meter
        self._resumed_from = resumed_from

    def save(self, writer: CheckpointWriter, done: int) -> None:
        """Begin to write everything, when `done` steps have been taken. All ranks call it."""
        checks = self._schedule.adaptive.log if self._schedule.adaptive is not None else ()
        parts = {_METER: self._meter.state(), _CHANGE: self._engine.change_state()}
        writer.start(
            done,
            engine=self._engine,
            config=self._config,
            extra={_RESUMED_FROM: self._resumed_from, _ADAPTIVE_CHECKS: [check.to_event() for check in checks]},
            local={prefix + name: value for prefix, state in parts.items() for name, value in state.items()},
        )

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore everything that `save` wrote and that the schedule was not built with. All ranks call it.

        Raises:
            CheckpointError, ValueError: as `load_checkpoint`.
        """
        local = load_checkpoint(checkpoint, self._engine)
        self._meter.load_state(_part(local, _METER))
        self._engine.load_change_state(self._config.freeze.adaptive_measure, _part(local, _CHANGE))


def read_adaptive_checks(checkpoint: Checkpoint | None) -> tuple[Mapping[str, Any], ...]:
    """Return the checks of adaptive freezing that the run had made; none for a new run."""
    return tuple(checkpoint.extra.get(_ADAPTIVE_CHECKS, ())) if checkpoint else ()


def read_resumed_from(checkpoint: Checkpoint | None) -> str:
    """Return the `resume.from` that the run began with; empty if it began by itself."""
    return str(checkpoint.extra.get(_RESUMED_FROM, "")) if checkpoint else ""


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
