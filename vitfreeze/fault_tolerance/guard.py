"""The part of the training loop that keeps the run alive: what happens at the end of each step beside the training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vitfreeze.checkpoint import ADAPTIVE_CHECKS, CheckpointWriter, SaveReport, SaveSchedule, Start
from vitfreeze.config import Config
from vitfreeze.engine import FreezingEngine
from vitfreeze.fault_tolerance.losses import LossGuard, RunFailedError
from vitfreeze.fault_tolerance.signals import StopSignals
from vitfreeze.fault_tolerance.watchdog import Watchdog
from vitfreeze.report import Meter, Reporter
from vitfreeze.schedule import RunSchedule
from vitfreeze.text import format_bytes

logger = logging.getLogger("vitfreeze")

_METER, _CHANGE = "meter/", "change/"
EXIT_FAILED = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL: saved on request, the same command goes on
EXIT_HUNG = 79  # no step ended; the same command goes on from the newest checkpoint


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What all ranks have agreed to do at the end of a step."""

    stop: bool
    save: bool
    failed_ranks: tuple[int, ...]


class RunGuard:
    """Saves in time, stops on request, finds hangs and spoiled losses; a context manager that every rank enters.

    Args:
        directory: the run folder.
        config, engine, reporter: of the run.
        saves: when to save.
        total_steps: of the run.
        extra: returns what a checkpoint needs beside the engine's state, ready for JSON, the same on all ranks.
        local: returns tensors of this rank that a run on as many ranks shall get back.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: Config,
        engine: FreezingEngine,
        reporter: Reporter,
        saves: SaveSchedule,
        total_steps: int,
        extra: Callable[[int], Mapping[str, Any]],
        local: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        self.config, self.engine, self.reporter = config, engine, reporter
        self.saves, self.total_steps = saves, total_steps
        self._extra, self._local = extra, local
        rank, world_size = engine.rank, engine.world_size
        self.writer = CheckpointWriter(directory, keep=config.checkpoint.keep, rank=rank, world_size=world_size)
        self.signals = StopSignals()
        self.losses = LossGuard(
            directory,
            rank=rank,
            max_skipped_steps=config.run.max_skipped_steps,
            forgives_skipped=engine.dtype == torch.float16,
        )
        self.watchdog = Watchdog(
            directory, rank=rank, minutes=config.run.watchdog_minutes, exit_status=EXIT_HUNG, on_hang=self._log_hang
        )
        # Small answers on the CPU, so that agreeing on them never waits for the device.
        self._group: Any = torch.distributed.new_group(backend="gloo") if world_size > 1 else None
        self._parts = ExitStack()

    def __enter__(self) -> RunGuard:
        self._parts.enter_context(self.signals)
        self._parts.enter_context(self.watchdog)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._parts.close()

    def end_step(self, done: int) -> bool:
        """Do what is due when `done` steps have been taken; return whether the run shall stop here.

        Raises:
            RunFailedError: a loss was not finite, too many steps in a row were skipped, or the last save failed.
        """
        self.losses.close_step(was_skipped=self.engine.overflowed)
        last = done == self.total_steps
        if self.engine.overflowed:
            self.reporter.log_event("skipped", done - 1, loss_scale=self.engine.loss_scale)
        # While steps are being skipped the weights may be spoiled already, and older checkpoints are worth more.
        saves_now = self.saves.is_due(done) and not self.writer.is_busy and not self.losses.skipped_in_a_row
        orders = self._agree(stop=bool(self.signals.received), save=saves_now)
        if orders.save or orders.stop or last:
            # What is saved must be sound, so here, and only here, the last step is judged, too.
            self._agree(include_last=True)
        self._log_save(self.writer.poll())
        if orders.save or orders.stop or last:
            self._save(done, wait=orders.stop or last)
        stops = orders.stop and not last
        if stops:
            name = self.signals.received or "another rank's signal"
            self.reporter.log_event("stop", done, message=f"step {done}: stopped by {name}", signal=name)
        self.watchdog.beat(done)
        return stops

    def _agree(self, *, stop: bool = False, save: bool = False, include_last: bool = False) -> Orders:
        """Tell all ranks what this one wants; rank 0's clock decides about saving, any rank may stop the run."""
        failure = self.losses.find_failure(include_last=include_last)
        rank, world_size = self.engine.rank, self.engine.world_size
        flags = torch.zeros(2 + world_size, dtype=torch.int64)
        flags[0], flags[1] = stop, save and rank == 0
        flags[2 + rank] = 0 if failure is None else failure + 1
        if self._group is not None:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX, group=self._group)
        wants_stop, wants_save, *failures = flags.tolist()
        failed_ranks = tuple(number for number, step in enumerate(failures) if step)
        if failed_ranks or self.losses.has_skipped_too_often:
            self._fail(failed_ranks, step=max(failures) - 1 if failed_ranks else None)
        return Orders(stop=bool(wants_stop), save=bool(wants_save), failed_ranks=failed_ranks)

    def _fail(self, failed_ranks: tuple[int, ...], *, step: int | None) -> None:
        """Write what this rank knows, and end the run with the checkpoints that it has."""
        if step is None or self.engine.rank in failed_ranks:
            self.losses.describe(step)
        self._log_save(self.writer.finish())
        where = self.losses.directory / "failures"
        if step is None:
            number = self.losses.skipped_in_a_row
            message = f"{number} steps in a row were skipped because a gradient was not finite (see {where})"
            self.reporter.log_event("failure", self.engine.global_steps - 1, reason="skipped_steps", skipped=number)
        else:
            ranks = ", ".join(map(str, failed_ranks))
            message = f"the loss of step {step} was not finite on rank {ranks} (scale losses and samples in {where})"
            self.reporter.log_event("failure", step, reason="loss_not_finite", ranks=list(failed_ranks))
        raise RunFailedError(f"{message}; the newest checkpoint is from before")

    def _save(self, done: int, *, wait: bool) -> None:
        self._log_save(self.writer.finish())
        if self.saves.last_saved == done:  # at the last step, or when a request to stop follows a save
            return
        self.writer.start(done, engine=self.engine, config=self.config, extra=self._extra(done), local=self._local())
        self.saves.note_start(done)
        if not wait:
            return
        report = self.writer.finish()
        self._log_save(report)
        if report is not None and report.error:
            raise RunFailedError(
                f"the state after step {done} could not be saved ({report.error}); make room and start again: the run "
                f"goes on from step {self.saves.last_saved}"
            )

    def _log_save(self, report: SaveReport | None) -> None:
        if report is None:
            return
        self.saves.note_end(report)
        figures: dict[str, Any] = {"seconds": report.seconds, "stall_seconds": report.stall_seconds}
        if report.path is None:
            logger.warning(
                "step %d could not be saved (%s); the run goes on and tries again", report.step, report.error
            )
            self.reporter.log_event("save_failed", report.step, error=report.error, **figures)
            return
        message = (
            f"step {report.step}: saved {report.path} ({format_bytes(report.bytes)} in {report.seconds:.2f} s, "
            f"of which training stood still {report.stall_seconds:.2f} s)"
        )
        self.reporter.log_event(
            "save", report.step, message=message, path=report.path.name, bytes=report.bytes, **figures
        )

    def _log_hang(self, step: int) -> None:
        self.reporter.log_event("hang", step, minutes=self.config.run.watchdog_minutes)


def report_start(start: Start, reporter: Reporter) -> None:
    """Say where the run begins, and which checkpoints were passed over, in the log and in the events."""
    checkpoint = start.checkpoint
    if checkpoint is None:
        reporter.log_event("start", 0, message=start.reason)
        return
    for path, reason in checkpoint.rejected:
        reporter.log_event("checkpoint_rejected", start.step, path=path, reason=reason)
    reporter.log_event(
        "resume", start.step, message=start.reason, path=str(checkpoint.path), world_size=checkpoint.world_size,
        versions=checkpoint.manifest["versions"], frozen_layers=checkpoint.frozen_layers,
    )  # fmt: skip


def local_state(meter: Meter, engine: FreezingEngine) -> dict[str, Tensor]:
    """Return what this rank alone needs to go on exactly: sums that are not logged yet, the last adaptive reading."""
    parts = {_METER: meter.state(), _CHANGE: engine.change_state()}
    return {prefix + name: value for prefix, state in parts.items() for name, value in state.items()}


def load_local_state(state: Mapping[str, Tensor], *, meter: Meter, engine: FreezingEngine, config: Config) -> None:
    """Restore what `local_state` returned; a run on another number of ranks has none and begins these anew."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    meter.load_state(part(_METER))
    engine.load_change_state(config.freeze.adaptive_measure, part(_CHANGE))


def schedule_state(schedule: RunSchedule, done: int) -> dict[str, Any]:
    """Return what a checkpoint keeps of the schedule: its length, the freezes so far, and the adaptive checks."""
    checks = schedule.adaptive.log if schedule.adaptive is not None else ()
    return {
        "total_steps": schedule.total_steps,
        "freezes": [list(change) for change in schedule.prefix_changes() if change[0] < done],
        ADAPTIVE_CHECKS: [check.to_event() for check in checks],
    }
