"""All that a run must remember, written and read in one place. Everything else is a function of its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from vitfreeze.checkpoint import Checkpoint, CheckpointWriter, load_checkpoint
from vitfreeze.config import Config
from vitfreeze.engine import FreezingEngine
from vitfreeze.report import Meter
from vitfreeze.schedule import RunSchedule

_ADAPTIVE_CHECKS = "adaptive_checks"
_METER, _CHANGE = "meter/", "change/"


@dataclass(frozen=True, kw_only=True)
class RunMemory:
    """What a run remembers of its start.

    Attributes:
        resumed_from: `resume.from` of the run, so that a run that is started again by the same command goes on from
            its own newest checkpoint; empty if it began by itself.
        steps_per_epoch: what an epoch of the settings is, whatever data came later; 0 in checkpoints of older versions.
        shards: the training shards as `identify_shards` has them; none in checkpoints of older versions.
    """

    resumed_from: str = ""
    steps_per_epoch: int = 0
    shards: Sequence[Sequence[Any]] = ()

    @classmethod
    def read(cls, checkpoint: Checkpoint | None) -> RunMemory:
        """Return what a checkpoint remembers; nothing without one."""
        known = checkpoint.extra if checkpoint else {}
        return cls(**{name: known[name] for name in cls.__dataclass_fields__ if name in known})


class RunState:
    """What a run remembers from step to step, and across a restart.

    engine: weights, optimizer state, loss scale, counters, random states: on any number of ranks.
    meter: sums of losses that are not logged yet; each rank has its own, so they come back on as many ranks only.
    engine's last reading of how much the layers change, for adaptive freezing: as the meter.
    schedule: the checks of adaptive freezing; `read_adaptive_checks` returns them before there is a schedule.
    memory: of the start of the run; `RunMemory.read` returns it.
    """

    def __init__(
        self, *, config: Config, engine: FreezingEngine, schedule: RunSchedule, meter: Meter, memory: RunMemory
    ) -> None:
        self._config = config
        self._engine = engine
        self._schedule = schedule
        self._meter = meter
        self._memory = memory

    def save(self, writer: CheckpointWriter, done: int) -> None:
        """Begin to write everything, when `done` steps have been taken. All ranks call it."""
        checks = self._schedule.adaptive.log if self._schedule.adaptive is not None else ()
        parts = {_METER: self._meter.state(), _CHANGE: self._engine.change_state()}
        writer.start(
            done,
            engine=self._engine,
            config=self._config,
            extra={**asdict(self._memory), _ADAPTIVE_CHECKS: [check.to_event() for check in checks]},
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


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
