"""Finding a hang: when no step ends for too long, every process says where it stands, and the job ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType


class Watchdog:
    """Ends the process when `beat` is not called for `minutes`; a context manager. 0 minutes: never.

    Before that, rank, step and the stack of every thread go to stderr and to `hang-rank-<rank>.txt` in the run folder.
    As ranks wait for each other, all their watchdogs bite within seconds; each then waits `grace_seconds`, so that
    the launcher, which ends the other ranks when the first one is gone, does not silence them. Time for which the whole
    process was stopped (SIGSTOP, `scontrol suspend`) does not count.

    Args:
        directory: the run folder.
        rank: of this process.
        minutes: without a beat, after which the job ends.
        exit_status: of the process then.
        on_hang: called with the last step before the end, to log it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rank: int,
        minutes: float,
        exit_status: int,
        grace_seconds: float = 10.0,
        on_hang: Callable[[int], None] | None = None,
    ) -> None:
        self.directory, self.rank, self.minutes = directory, rank, minutes
        self.exit_status, self.grace_seconds = exit_status, grace_seconds
        self._on_hang = on_hang
        self._step = 0
        self._last_beat = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, step: int) -> None:
        """Say that `step` steps have been taken."""
        self._step = step
        self._last_beat = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.minutes:
            self._last_beat = time.monotonic()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        limit = self.minutes * 60
        pause, looked_at = min(limit / 10, 5.0), time.monotonic()
        while not self._over.wait(pause):
            now = time.monotonic()
            late, looked_at = now - looked_at - pause, now
            if late > pause:
                self._last_beat += late
            if now - self._last_beat > limit:
                self._bite()

    def _bite(self) -> None:
        headline = f"rank {self.rank}: no step ended for {self.minutes:g} minutes; {self._step} steps were taken\n"
        try:
            with (self.directory / f"hang-rank-{self.rank:05d}.txt").open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {headline}")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            if self._on_hang is not None:
                self._on_hang(self._step)
        finally:
            os.write(2, headline.encode())
            faulthandler.dump_traceback(2, all_threads=True)
            sys.stderr.flush()
            time.sleep(self.grace_seconds)
            os._exit(self.exit_status)
