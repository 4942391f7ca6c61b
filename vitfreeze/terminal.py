"""What reaches the terminal, and what a file in the run folder: one rank speaks, and other packages into the file."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

OURS = "vitfreeze"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what is sys.stderr at that moment, which the tests of a caller may have replaced."""

    def __init__(self, *, level: int = logging.NOTSET) -> None:
        logging.Handler.__init__(self, level)
        layout = "%(message)s" if sys.stderr.isatty() else "%(asctime)s %(message)s"
        self.setFormatter(logging.Formatter(layout, datefmt=TIME_FORMAT))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _LogFile(logging.StreamHandler[TextIO]):
    """Loses a line that a full disk refuses: a log is not worth the run, nor a traceback for every line of it."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def set_up_logging(verbosity: int) -> None:
    """Send what this package says to stderr, as much as -q (-1), nothing (0) or -v (1) ask for.

    Other packages are heard from their warnings on, or with -v from INFO on. Ranks other than 0 tell errors alone.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    ours, root = logging.getLogger(OURS), logging.getLogger()
    if not any(isinstance(handler, _StderrHandler) for handler in ours.handlers):
        ours.addHandler(_StderrHandler())
        others = _StderrHandler(level=logging.INFO if verbosity > 0 else logging.WARNING)
        others.addFilter(lambda record: not record.name.startswith(OURS))
        root.addHandler(others)
    level = {-1: logging.WARNING, 0: logging.INFO}.get(verbosity, logging.DEBUG)
    ours.setLevel(level if is_first else logging.ERROR)
    root.setLevel(logging.INFO if is_first else logging.ERROR)
    if not is_first:
        warnings.simplefilter("ignore")
    if verbosity <= 0:  # torch's C++ writes its warnings past Python
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Users can do nothing about collectives that torch is about to rename, nor about CUDA's compiler without a GPU.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    builder = logging.getLogger("torch.utils.cpp_extension")
    builder.addFilter(lambda record: not str(record.msg).startswith("No CUDA runtime is found"))


def is_verbose() -> bool:
    """Say whether -v asked to hear everything."""
    return logging.getLogger(OURS).isEnabledFor(logging.DEBUG)


@contextmanager
def log_into(path: Path, *, rank: int) -> Iterator[None]:
    """Send everything that is said on rank 0 into a file too, and what other packages say there alone, errors aside.

    What is written to stdout meanwhile goes into the file on rank 0 and nowhere on the others; with -v it stays where
    it was, and other packages are heard on the terminal as well. A file that cannot be opened is told and done without.
    """
    try:
        target = str(path) if rank == 0 else os.devnull
        file = os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), "a", buffering=1)
    except OSError as error:
        logging.getLogger(OURS).warning("%s cannot be written (%s); this run has no log file", path, error.strerror)
        yield
        return
    with _loggers_into(file):
        try:
            if is_verbose():
                yield
            else:
                with divert_stdout(file.fileno()):
                    yield
        finally:
            with suppress(OSError):
                file.close()


@contextmanager
def _loggers_into(file: TextIO) -> Iterator[None]:
    """Let a file have all loggers and Python's warnings; others reach the terminal with errors, or with -v."""
    root, deepspeed = logging.getLogger(), logging.getLogger("DeepSpeed")  # which has a handler of its own, for stdout
    terminal = [each for each in root.handlers if isinstance(each, _StderrHandler)]
    levels, own = [each.level for each in terminal], list(deepspeed.handlers)
    handler, for_deepspeed = _LogFile(file), _LogFile(file)  # whose level DeepSpeed sets to its own
    for each in (handler, for_deepspeed):
        layout = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        each.setFormatter(logging.Formatter(layout, datefmt=TIME_FORMAT))
    root.addHandler(handler)
    deepspeed.addHandler(for_deepspeed)
    logging.captureWarnings(True)
    if not is_verbose():
        for shown in terminal:
            shown.setLevel(logging.ERROR)
        for stranger in own:
            deepspeed.removeHandler(stranger)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        deepspeed.removeHandler(for_deepspeed)
        for shown, level in zip(terminal, levels, strict=True):
            shown.setLevel(level)
        for stranger in own:
            deepspeed.addHandler(stranger)


@contextmanager
def divert_stdout(descriptor: int) -> Iterator[None]:
    """Send what this process writes to stdout to another file, also what C++ writes there, as gloo does."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def wants_colour() -> bool:
    """Say whether stdout is a terminal whose user has not set NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
