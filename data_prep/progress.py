"""A progress bar with images/s, MB/s and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

TERMINAL_SECONDS = 0.1
LOG_FILE_SECONDS = 30.0  # a bar that is redrawn ten times a second would flood a log file


@contextmanager
def show_progress(title: str, *, total: int, unit: str = "img") -> Iterator[Callable[[int, int], None]]:
    """Draw a bar on standard error; it is told how many are finished, and of the bytes read or written for them."""
    interval = TERMINAL_SECONDS if sys.stderr.isatty() else LOG_FILE_SECONDS
    start, total_bytes = time.monotonic(), 0

    def advance(count: int, num_bytes: int) -> None:
        nonlocal total_bytes
        total_bytes += num_bytes
        if total_bytes:
            rate = total_bytes / 1e6 / max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(f"{rate:.1f} MB/s", refresh=False)
        bar.update(count)

    with tqdm(total=total, unit=unit, desc=title, mininterval=interval, dynamic_ncols=True) as bar:
        yield advance
