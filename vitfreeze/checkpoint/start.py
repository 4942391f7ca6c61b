"""Where a run begins: the cases at start-up, and the folder that it may write to."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from vitfreeze.checkpoint import folder
from vitfreeze.checkpoint.folder import Checkpoint, CheckpointError, find_checkpoint
from vitfreeze.config import Config, ConfigError, differing_settings, dump_config, load_run_config
from vitfreeze.engine import Processes

logger = logging.getLogger("vitfreeze")

RESUMED_FROM, ADAPTIVE_CHECKS = "resumed_from", "adaptive_checks"
_LOCK = ".lock"
_HARMLESS_SUFFIXES = (".log", ".out", ".err")  # what a scheduler may have put there before the run began


@dataclass(frozen=True, kw_only=True)
class Start:
    """The answer at start-up.

    Attributes:
        checkpoint: what to go on from; None for a new run.
        reason: one sentence for the log.
        resumed_from: `resume.from` of the run, to be kept in the `extra` of its checkpoints, so that a run that is
            started again by the same command goes on from its own newest one.
    """

    checkpoint: Checkpoint | None
    reason: str
    resumed_from: str = ""

    @property
    def step(self) -> int:
        """The first step to take."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def events(self) -> tuple[Mapping[str, Any], ...]:
        """The adaptive checks that the run had made by then."""
        return tuple(self.checkpoint.extra.get(ADAPTIVE_CHECKS, ())) if self.checkpoint else ()


class RunFolder:
    """The folder of a run, held by one job at a time; a context manager that every rank enters.

    Raises on entry:
        ConfigError: another job trains in it.
    """

    def __init__(self, directory: Path, *, processes: Processes) -> None:
        self.directory = directory
        self._processes = processes
        self._descriptor: int | None = None

    def __enter__(self) -> RunFolder:
        _on_rank_0(self._lock, processes=self._processes)
        return self

    def _lock(self) -> str:
        self.directory.mkdir(parents=True, exist_ok=True)
        # A POSIX lock belongs to the process, not to the descriptor: data workers do not inherit it, and the system
        # takes it back however the process ends.
        self._descriptor = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(
                    f"another job trains in {self.directory}; wait for its end or give another run.dir"
                ) from None
            logger.warning("%s cannot be locked against a second job (%s)", self.directory, error)
        return ""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def choose_start(config: Config, directory: Path, *, fresh: bool, processes: Processes) -> Start:
    """Decide on rank 0 where the run begins, tell the other ranks, and write config.yaml. All ranks call it.

    The cases, in this order:

    1. The folder holds files, but no run: refused.
    2. It holds a run and `--fresh` was given: refused.
    3. It holds a run with other settings: refused, unless only settings differ that may change.
    4. `resume.from` names a checkpoint that this run has not begun from yet: from there.
    5. The run has checkpoints: from the newest whole one; when all are damaged, refused.
    6. The folder is empty, or holds a run that never saved: from step 0.

    Raises:
        ConfigError: cases 1 to 3, or `resume.from` names no checkpoint, or that of another run.
        CheckpointError: every checkpoint there is damaged.
    """
    answer = json.loads(_on_rank_0(lambda: _decide(config, directory, fresh=fresh), processes=processes))
    checkpoint = None
    if answer["path"]:
        # Rank 0 has compared every byte with the manifest; the others read the manifest only.
        checkpoint = folder.open_checkpoint(Path(answer["path"]), verify=False)
        checkpoint = replace(checkpoint, rejected=tuple((where, why) for where, why in answer["rejected"]))
    return Start(checkpoint=checkpoint, reason=answer["reason"], resumed_from=answer["resumed_from"])


def _decide(config: Config, directory: Path, *, fresh: bool) -> str:
    _refuse_foreign_folder(directory, config)
    holds_run = _holds_run(directory)
    if holds_run and fresh:
        raise ConfigError(
            f"--fresh starts a new run, but {directory} holds one: give another run.dir, or move this one away "
            f"(mv {directory} {directory}.old)"
        )
    if (directory / folder.CONFIG).is_file():
        _refuse_other_settings(config, directory / folder.CONFIG)
    own = find_checkpoint(directory)
    if own:
        _refuse_other_settings(config, own.path / folder.CONFIG)
    begun_from = str(own.extra.get(RESUMED_FROM, "")) if own else ""
    wanted = str(Path(config.resume.from_).resolve()) if config.resume.from_ else ""
    if wanted and wanted != begun_from:
        chosen, reason = _open_wanted(config, wanted), f"going on from {wanted}, as resume.from says"
        begun_from = wanted
    elif own:
        chosen, reason = own, f"going on from {own.path} at step {own.step}"
    else:
        chosen, reason = None, f"a new run in {directory}"
    if own and own.path.parent == directory / folder.FOLDER_NAME:
        # The pointer may be gone, or name what is set aside now.
        folder.write_pointer(own.path.parent, own.path.name)
    for damaged, _ in own.rejected if own else ():
        folder.set_aside(Path(damaged))
    folder.replace_durably(directory / folder.CONFIG, dump_config(config).encode())
    path, rejected = (str(chosen.path), chosen.rejected) if chosen else ("", ())
    return json.dumps({"path": path, "rejected": rejected, "reason": reason, RESUMED_FROM: begun_from})


def _holds_run(directory: Path) -> bool:
    return (directory / folder.CONFIG).is_file() or any(folder.sort_checkpoints(directory / folder.FOLDER_NAME))


def _refuse_foreign_folder(directory: Path, config: Config) -> None:
    if _holds_run(directory):
        return
    strangers = [p.name for p in sorted(directory.iterdir()) if p.name != _LOCK and p.suffix not in _HARMLESS_SUFFIXES]
    if strangers:
        raise config.error(
            "run.dir", f"an empty folder or one that holds a run; {directory} holds {', '.join(strangers[:3])}"
        )


def _refuse_other_settings(config: Config, path: Path) -> None:
    lines = differing_settings(config, load_run_config(path))
    if lines:
        raise ConfigError(
            f"{path.parent} holds a run with other settings ({'; '.join(lines)}); go on with those, or give another "
            "run.dir"
        )


def _open_wanted(config: Config, wanted: str) -> Checkpoint:
    try:
        found = find_checkpoint(wanted)
    except CheckpointError as error:
        raise config.error("resume.from", f"a whole checkpoint or run folder, and {error}") from None
    if found is None:
        raise config.error("resume.from", "a checkpoint, or a run folder that holds one")
    _refuse_other_settings(config, found.path / folder.CONFIG)
    return found


def _on_rank_0(function: Callable[[], str], *, processes: Processes) -> str:
    """Call a function on rank 0 and return its text on all ranks; what it raises for bad input is raised on all."""
    answer: dict[str, str] = {}
    if processes.rank == 0:
        try:
            answer = {"text": function()}
        except ConfigError as error:
            answer = {"bad_setting": str(error)}
        except CheckpointError as error:
            answer = {"bad_checkpoint": str(error)}
        except OSError as error:
            answer = {"bad_setting": f"run.dir cannot be used: {error}"}
    answer = json.loads(_broadcast(json.dumps(answer), processes=processes))
    if "bad_setting" in answer:
        raise ConfigError(answer["bad_setting"])
    if "bad_checkpoint" in answer:
        raise CheckpointError(answer["bad_checkpoint"])
    return answer["text"]


def _broadcast(text: str, *, processes: Processes) -> str:
    if processes.world_size == 1:
        return text
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).to(processes.device)
    length = torch.tensor([len(data)], device=processes.device)
    torch.distributed.broadcast(length, src=0)
    if processes.rank:
        data = torch.empty(int(length), dtype=torch.uint8, device=processes.device)
    torch.distributed.broadcast(data, src=0)
    return bytes(data.tolist()).decode()
