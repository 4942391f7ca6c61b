"""A progress bar with images/s, MB/s and the time left."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

TERMINAL_SECONDS = 0.1
LOG_FILE_SECONDS = 30.0  # a bar that is redrawn ten times a second would flood a log file


class Progress:
    """tqdm's bar, with the data rate beside it."""

    def __init__(self, bar: tqdm) -> None:
        self._bar, self._num_bytes, self._start = bar, 0, time.monotonic()

    def add(self, count: int, *, num_bytes: int = 0) -> None:
        """Count what is finished, and the bytes read or written for it."""
        self._num_bytes += num_bytes
        if self._num_bytes:
            seconds = max(time.monotonic() - self._start, 1e-9)
            self._bar.set_postfix_str(f"{self._num_bytes / 1e6 / seconds:.1f} MB/s", refresh=False)
        self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def show_progress(title: str, *, total: int, unit: str = "img") -> Progress:
    """Start a bar on standard error."""
    interval = TERMINAL_SECONDS if sys.stderr.isatty() else LOG_FILE_SECONDS
    return Progress(tqdm(total=total, unit=unit, desc=title, mininterval=interval, dynamic_ncols=True))
