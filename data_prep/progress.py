"""How far a command is: a bar on a terminal, elsewhere a dated line now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

LINE_SECONDS = 30.0  # between lines where there is no terminal

log = logging.getLogger(__name__)


@contextmanager
def show_progress(title: str, *, total: int, unit: str = "img") -> Iterator[Callable[[int, int], None]]:
    """Show images/s, MB/s and the time left on standard error.

    The function that it gives is told how many more are finished, and of the bytes read or written for them.
    """
    has_terminal = sys.stderr.isatty()
    start = told = time.monotonic()
    done = total_bytes = 0

    def advance(count: int, num_bytes: int) -> None:
        nonlocal done, total_bytes, told
        done += count
        total_bytes += num_bytes
        rate = f"{total_bytes / 1e6 / max(time.monotonic() - start, 1e-9):.1f} MB/s" if total_bytes else ""
        if has_terminal:
            bar.set_postfix_str(rate, refresh=False)
            bar.update(count)
        elif time.monotonic() - told > LINE_SECONDS or done == total:
            told = time.monotonic()
            log.info(_describe(title, done, total=total, unit=unit, rate=rate, seconds=told - start))

    with tqdm(total=total, unit=unit, desc=title, dynamic_ncols=True, disable=not has_terminal) as bar:
        yield advance


def _describe(title: str, done: int, *, total: int, unit: str, rate: str, seconds: float) -> str:
    speed = done / max(seconds, 1e-9)
    left = f"{tqdm.format_interval(round((total - done) / speed))} left" if 0 < done < total else ""
    return ", ".join(filter(None, [f"{title}: {done} of {total} {unit}", f"{speed:.1f} {unit}/s", rate, left]))
