"""Where a run's figures are looked at: TensorBoard, and Weights & Biases beside it, behind one interface."""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary

from vitfreeze.config import Config, settings
from vitfreeze.files import RecordFile, Refusals

logger = logging.getLogger("vitfreeze")


class Board(Protocol):
    """What takes the numbers and pictures of a run."""

    def add_scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Add numbers by name."""

    def add_image(self, name: str, image_CHW: Tensor, step: int) -> None:
        """Add a picture with values in [0, 1]."""

    def close(self, status: int) -> None:
        """End it; `status` is the exit status of the run."""


class TensorBoard:
    """A TensorBoard file, of the records that torch's SummaryWriter writes, but by the calling thread.

    That writer keeps two minutes of records in a queue, which a killed run loses, and its thread dies of a full disk.

    Args:
        folder: of the run's files, one for each start.
        start_step: steps taken before; what files of earlier starts say of later ones is not shown.
        refusals: as for `RecordFile`.
    """

    def __init__(self, folder: Path, *, start_step: int, refusals: Refusals | None = None) -> None:
        name = f"{_next_board(folder)}.{socket.gethostname()}.{os.getpid()}"
        self._file = RecordFile(folder / name, refusals=refusals)
        with suppress(OSError):  # `append` tells it
            folder.parent.mkdir(parents=True, exist_ok=True)
        self._add(Event(file_version="brain.Event:2", step=start_step))
        self._add(Event(session_log=SessionLog(status=SessionLog.START), step=start_step + 1))

    def add_scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Add numbers by name."""
        self._add(*(Event(summary=summary.scalar(name, value), step=step) for name, value in figures.items()))

    def add_image(self, name: str, image_CHW: Tensor, step: int) -> None:
        """Add a picture with values in [0, 1]."""
        self._add(Event(summary=summary.image(name, image_CHW, dataformats="CHW"), step=step))

    def close(self, status: int) -> None:
        """Try again to write what was refused, if anything; the rest is written already."""
        self._make_folder()
        self._file.flush()

    def _add(self, *events: Event) -> None:
        records = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            RecordWriter(records).write(event.SerializeToString())
        self._make_folder()
        self._file.append(records.getvalue())

    def _make_folder(self) -> None:
        """Make the folder, also when the run folder was deleted and is there again."""
        with suppress(OSError):  # `append` tells it
            self._file.path.parent.mkdir(exist_ok=True)


class WandbBoard:
    """A run of Weights & Biases, the same one for every start in a run folder.

    Its x-axis is our step: steps that are taken again after a restart would lie behind its own. Where it cannot be
    written any more, it is left out with a warning; training does not depend on it. WANDB_MODE, WANDB_API_KEY and its
    other variables hold.

    Raises:
        ConfigError: it cannot begin.
    """

    def __init__(self, config: Config, directory: Path) -> None:
        import wandb

        id_file = directory / "wandb" / "run_id.txt"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        entity, _, project = config.run.wandb.rpartition("/")
        told = {
            key: value if isinstance(value, (int, float, str)) else str(value) for key, value, _ in settings(config)
        }
        try:
            self._run = wandb.init(
                project=project, entity=entity or None, name=directory.resolve().name, id=id_file.read_text().strip(),
                resume="allow", dir=str(directory), config=told,
                settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except Exception as error:
            words = " ".join(str(error).split())
            raise config.error("run.wandb", f"a project that Weights & Biases opens; wandb says: {words}") from None
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._works = True
        logger.info("Weights & Biases: %s", self._run.url or f"offline, in {directory / 'wandb'}")

    def add_scalars(self, figures: Mapping[str, float], step: int) -> None:
        """Add numbers by name."""
        self._log({**figures, "step": step})

    def add_image(self, name: str, image_CHW: Tensor, step: int) -> None:
        """Add a picture with values in [0, 1]."""
        import wandb

        pixels_HWC = (image_CHW.clamp(0, 1) * 255).byte().permute(1, 2, 0).cpu().numpy()
        self._log({name: wandb.Image(pixels_HWC), "step": step})

    def close(self, status: int) -> None:
        """Send what is left, and say how the run ended."""
        with suppress(Exception):
            self._run.finish(exit_code=status)

    def _log(self, content: Mapping[str, Any]) -> None:
        if not self._works:
            return
        try:
            self._run.log(dict(content))
        except Exception as error:  # whatever it is, it is no reason to lose the run
            self._works = False
            logger.warning("Weights & Biases gets nothing more (%s)", error)


def open_boards(config: Config, directory: Path) -> list[Board]:
    """Begin what is looked at beside TensorBoard; raises ConfigError where that cannot be."""
    return [WandbBoard(config, directory)] if config.run.wandb else []


def check_boards(config: Config) -> None:
    """Make sure that what the settings ask for is installed; raises ConfigError."""
    spec = importlib.util.find_spec("wandb") if config.run.wandb else None
    if config.run.wandb and (spec is None or spec.origin is None):  # without origin it is a folder named wandb
        raise config.error("run.wandb", "empty, or wandb installed: pip install 'vitfreeze[wandb]'")


def _next_board(folder: Path) -> str:
    """Return the start of a file name behind all others: files are read in the order of names, and clocks jump back."""
    names = (re.match(r"events\.out\.tfevents\.(\d+(\.\d{6})?)\.", path.name) for path in folder.glob("events.*"))
    return f"events.out.tfevents.{max([time.time(), *(float(name[1]) + 1 for name in names if name)]):017.6f}"
