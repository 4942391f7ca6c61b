"""The part of the training loop that keeps the run alive: what happens at the end of each step beside the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from vitfreeze.checkpoint import CheckpointWriter, SaveReport, SaveSchedule
from vitfreeze.config import Config
from vitfreeze.engine import FreezingEngine
from vitfreeze.fault_tolerance.losses import LossGuard, RunFailedError
from vitfreeze.fault_tolerance.signals import StopSignals
from vitfreeze.fault_tolerance.watchdog import Watchdog
from vitfreeze.ranks import set_group_timeouts
from vitfreeze.report import Reporter
from vitfreeze.text import format_bytes

logger = logging.getLogger("vitfreeze")

EXIT_FAILED = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL: saved on request, the same command goes on
EXIT_HUNG = 79  # no step ended; the same command goes on from the newest checkpoint


class RunGuard:
    """Saves in time, stops on request, finds hangs and spoiled losses; a context manager that every rank enters.

    Args:
        directory: the run folder.
        config, engine, reporter: of the run.
        saves: when to save.
        total_steps: of the run.
        save_state: begins to write the run's state with a writer, when so many steps have been taken.
        keep_until: as for `CheckpointWriter`.
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
        save_state: Callable[[CheckpointWriter, int], None],
        keep_until: int | None = None,
    ) -> None:
        self.config, self.engine, self.reporter = config, engine, reporter
        self.directory, self.saves, self.total_steps = directory, saves, total_steps
        self._has_waited = False
        self._save_state = save_state
        self.writer = CheckpointWriter(
            directory, keep=config.checkpoint.keep, keep_until=keep_until, ranks=engine.ranks
        )  # fmt: skip
        self.signals = StopSignals()
        self.losses = LossGuard(
            directory,
            rank=engine.rank,
            max_skipped_steps=config.run.max_skipped_steps,
            forgives_skipped=engine.dtype == torch.float16,
        )
        self.watchdog = Watchdog(
            directory, rank=engine.rank, minutes=config.run.watchdog_minutes, exit_status=EXIT_HUNG,
            on_hang=self._log_hang,
        )  # fmt: skip
        # Small answers on the CPU, so that agreeing on them never waits for the device.
        self._ranks = engine.ranks.on_cpu()
        if config.run.watchdog_minutes and engine.world_size > 1:  # a hang is reported before a collective gives up
            set_group_timeouts(timedelta(minutes=config.run.watchdog_minutes, hours=1))
        self._parts = ExitStack()

    def __enter__(self) -> RunGuard:
        self._parts.enter_context(self.signals)
        self._parts.enter_context(self.watchdog)
        self._ask_for(self.saves.last_started + 1)
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
        self.losses.close_step(was_skipped=self.engine.overflow)
        last = done == self.total_steps
        stop, save = self._hear()
        if save or stop or last:
            # What is saved must be sound, so here, and only here, the last step is judged, too, and waited for.
            self._ask(include_last=True)
            self._hear()
        # While steps are being skipped the weights may be spoiled already, and older checkpoints are worth more.
        save = save and not self.losses.skipped_in_a_row
        self._log_save(self.writer.poll())
        if save or stop or last:
            self._save(done, wait=stop or last)
        stops = stop and not last
        if stops:
            name = self.signals.received or "another rank's signal"
            self.reporter.log_event("stop", done, message=f"step {done}: stopped by {name}", signal=name)
        elif not last:
            self._ask_for(done + 1)
        self.watchdog.beat(done)
        return stops

    def _ask_for(self, done: int) -> None:
        """Begin to ask all ranks what to do when `done` steps have been taken; the answer travels beside the next."""
        self._ask(
            stop=bool(self.signals.received),
            save=self.saves.is_due(done) and (self.saves.waits or not self.writer.is_busy),
        )

    def _ask(self, *, stop: bool = False, save: bool = False, include_last: bool = False) -> None:
        """Begin to tell all ranks what this one wants and found."""
        self._failed = self.losses.find_failure(include_last=include_last) or 0  # the step, counted from 1
        self._answer = self._ranks.begin_max([stop, save and self._ranks.rank == 0, self._failed])

    def _hear(self) -> tuple[bool, bool]:
        """Return whether to stop and whether to save; rank 0's clock decides about saving, any rank may stop the run.

        Raises:
            RunFailedError: a rank found a loss that is not finite, or too many steps in a row were skipped.
        """
        wants_stop, wants_save, failed = self._answer()
        for step in self.losses.take_skipped():
            self.reporter.log_event("skipped", step, loss_scale=self.engine.loss_scale)
        if failed:  # whose it was is asked only now: a question to all ranks is to stay as small as it is
            failures = self._ranks.gather(self._failed)
            self._fail([number for number, step in enumerate(failures) if step], step=failed)
        if self.losses.has_skipped_too_often:
            self._fail((), step=None)
        return bool(wants_stop), bool(wants_save)

    def _fail(self, failed_ranks: Sequence[int], *, step: int | None) -> None:
        """Write what this rank knows, and end the run with the checkpoints that it has."""
        if step is None or self.engine.rank in failed_ranks:
            self.losses.describe(step)
        self._log_save(self.writer.finish())
        where = self.losses.directory / "failures"
        if step is None:
            number = self.losses.skipped_in_a_row
            message = f"{number} steps in a row were skipped because a gradient was not finite (see {where})"
            self.reporter.log_event("failure", self.engine.global_steps, reason="skipped_steps", skipped=number)
        else:
            ranks = ", ".join(map(str, failed_ranks))
            message = f"the loss of step {step} was not finite on rank {ranks} (scale losses and samples in {where})"
            self.reporter.log_event("failure", step, reason="loss_not_finite", ranks=list(failed_ranks))
        raise RunFailedError(f"{message}; the newest checkpoint is from before")

    def _save(self, done: int, *, wait: bool) -> None:
        began, was_busy = time.monotonic(), self.writer.is_busy
        self._log_save(self.writer.finish())
        if was_busy:
            self._warn_of_slow_saves(done, seconds=time.monotonic() - began)
        if self.saves.last_saved == done:  # at the last step, or when a request to stop follows a save
            return
        if wait:
            self._ranks.from_rank_0(self._restore_folder)  # before any rank writes there
        self._save_state(self.writer, done)
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

    def _restore_folder(self) -> None:
        """Make a run folder anew that was deleted in mid-run, rather than lose the last state with it."""
        if not self.directory.is_dir():
            logger.warning("the run folder %s is gone; it is made anew for the last state of this job", self.directory)
            with suppress(OSError):  # the save tells it
                self.directory.mkdir(parents=True, exist_ok=True)

    def _warn_of_slow_saves(self, done: int, *, seconds: float) -> None:
        """Say, once, that training waits for the disk."""
        if seconds > 1 and not self._has_waited:
            self._has_waited = True
            logger.warning(
                "step %d waited %.1f s for the save before it: checkpoint.every=%s is shorter than a save takes",
                done, seconds, self.config.checkpoint.every,
            )  # fmt: skip

    def _log_save(self, report: SaveReport | None) -> None:
        if report is None:
            return
        self.saves.note_end(report)
        figures: dict[str, Any] = {"seconds": report.seconds, "stall_seconds": report.stall_seconds}
        if report.path is None:
            self.reporter.refusals.note("checkpoints", reason=report.error)
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
