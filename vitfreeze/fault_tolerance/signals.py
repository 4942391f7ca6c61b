"""Requests to stop: SIGTERM, SIGUSR1 (SLURM's warning before the time is up) and Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended
# Terminal and launcher may both pass on one Ctrl-C; a second one by hand comes later than that.
_ECHO_SECONDS = 1.0


class StopSignals:
    """Notes requests to stop, so that the run can finish its step and save; a context manager.

    A second Ctrl-C ends the process at once, also while it waits inside a collective, where no Python code runs: the
    system writes every signal to a socket that a thread of its own reads. A SIGTERM that follows a Ctrl-C is the
    launcher's, which sends it to one rank after another; it counts as the same request.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self._first: int | None = None
        self._interrupted_at: float | None = None

    @property
    def received(self) -> str:
        """Name of the first signal that asked to stop; empty while none did."""
        return signal.Signals(self._first).name if self._first is not None else ""

    def __enter__(self) -> StopSignals:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._handlers_before: dict[int, Any] = {number: signal.signal(number, _note) for number in self.SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._writer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._writer.close()
        self._reader.close()

    def _listen(self) -> None:
        while numbers := self._reader.recv(64):
            for number in numbers:
                self._take(number)

    def _take(self, number: int) -> None:
        if number not in self.SIGNALS:
            return
        if self._first is None:
            self._first = number
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one line a node is enough
                sys.stderr.write(f"\n{self.received}: finishing the step and saving; Ctrl-C again stops at once\n")
        if number != signal.SIGINT:
            return
        if self._interrupted_at is None:
            self._interrupted_at = time.monotonic()
        elif time.monotonic() - self._interrupted_at > _ECHO_SECONDS:
            os._exit(EXIT_INTERRUPTED)


def _note(number: int, frame: FrameType | None) -> None:
    """Take the place of the default action; the thread reads the signal from the socket."""
