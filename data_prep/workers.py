"""Independent tasks over several processes, with an end that is clean whatever ends it.

Workers come from a fork server that has imported the given modules once, so they start at once and share that memory.
They die with this process, even when it is killed, and Ctrl-C in a terminal is left to this process alone.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from typing import TypeVar

from data_prep.errors import OutputError

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_DEFAULT_WORKERS = 32
TASKS_AHEAD = 2  # submitted per worker: enough to keep it busy, few enough to keep memory flat


def available_cores() -> int:
    """Cores this process may use (a container or a scheduler may allow fewer than the machine has)."""
    if hasattr(os, "sched_getaffinity"):  # absent on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_workers() -> int:
    """One per core; more than MAX_DEFAULT_WORKERS would wait for the disk and cost memory."""
    return min(available_cores(), MAX_DEFAULT_WORKERS)


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], *, workers: int, preload: Sequence[str] = ()
) -> Iterator[Result]:
    """Yield `function(task)` for every task, in the order of completion; in this process when one worker is enough.

    Tasks are taken from the iterable as they are needed. When the caller stops, by an exception or by closing the
    iterator, workers are ended at once. The fork server imports the modules in `preload` when it starts, which is at
    the first call in this process.

    Raises:
        OutputError: a worker was killed from outside, most often for want of memory.
        Exception: the first exception that a task raises.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
    try:
        yield from _run_window(executor, function, iter(tasks), workers * TASKS_AHEAD)
    except BrokenProcessPool as error:
        raise OutputError(
            "a worker process was killed from outside, perhaps for want of memory: give fewer --workers."
        ) from error
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _holding_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait, for what is started here too.

    The fork server would meet it with a traceback while it imports, and a worker that is half started nobody ends.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # somebody else's, or none
        yield
        return
    pressed: list[int] = []
    resource_tracker.ensure_running()  # its start would take the mask away again
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))  # for this process's other threads
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # for the processes that are started
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _run_window(
    executor: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterator[Task], width: int
) -> Iterator[Result]:
    with _holding_interrupts():  # for the seconds in which the workers start
        pending: set[Future[Result]] = {executor.submit(function, task) for task in itertools.islice(tasks, width)}
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            pending.update(executor.submit(function, task) for task in itertools.islice(tasks, 1))
            yield future.result()


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
