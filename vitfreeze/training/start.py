"""Where a run begins: the cases at start-up, and the folder that it may write to."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from vitfreeze.checkpoint import folder
from vitfreeze.checkpoint.folder import Checkpoint, CheckpointError, find_checkpoint
from vitfreeze.config import (
    Config,
    ConfigError,
    Duration,
    check_config,
    count_steps,
    differing_settings,
    dump_config,
    load_run_config,
)
from vitfreeze.data import ShardError, ShardIdentity, describe_difference, identify_shards
from vitfreeze.files import read_json_lines, replace_durably, suggest_path
from vitfreeze.ranks import Ranks
from vitfreeze.rendezvous import software_versions
from vitfreeze.report import Reporter
from vitfreeze.training.state import RunMemory

logger = logging.getLogger("vitfreeze")

_LOCK = ".lock"
_HARMLESS_SUFFIXES = (".log", ".out", ".err")  # what a scheduler may have put there before the run began


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The shards that a run is started with.

    Attributes:
        names: path or URL of each.
        lengths: samples of each.
        steps_per_epoch: steps that show all of them once.
    """

    names: Sequence[str]
    lengths: Sequence[int]
    steps_per_epoch: int


@dataclass(frozen=True, kw_only=True)
class Start:
    """The answer at start-up.

    Attributes:
        checkpoint: what to go on from; None for a new run.
        reason: one sentence for the log.
        memory: what the run's checkpoints are to remember of its start.
        other_data: how the shards differ from those of the checkpoint, if that was allowed.
    """

    checkpoint: Checkpoint | None
    reason: str
    memory: RunMemory
    other_data: str = ""

    @property
    def step(self) -> int:
        """The first step to take."""
        return self.checkpoint.step if self.checkpoint else 0

    def report(self, reporter: Reporter) -> None:
        """Say where the run begins, and which checkpoints were passed over, in the log and in the events."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            reporter.log_event("start", 0, message=self.reason, versions=software_versions())
            return
        for path, reason in checkpoint.rejected:
            reporter.log_event("checkpoint_rejected", self.step, path=path, reason=reason)
        reporter.log_event(
            "resume", self.step, message=self.reason, path=str(checkpoint.path), world_size=checkpoint.world_size,
            versions=checkpoint.manifest["versions"], frozen_layers=checkpoint.frozen_layers,
        )  # fmt: skip
        if self.other_data:
            message = (
                f"going on with other training shards ({self.other_data}), as resume.other_data says; length, rates "
                f"and freezing stay at their steps, {self.memory.steps_per_epoch} to an epoch"
            )
            reporter.log_event("other_data", self.step, message=message, difference=self.other_data)


class RunFolder:
    """The folder of a run, held by one job at a time; a context manager that every rank enters.

    Raises on entry:
        ConfigError: another job trains in it.
    """

    def __init__(self, directory: Path, *, ranks: Ranks) -> None:
        self.directory = directory
        self._ranks = ranks
        self._descriptor: int | None = None

    def __enter__(self) -> RunFolder:
        _on_rank_0(self._lock, ranks=self._ranks)
        return self

    def _lock(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        # A POSIX lock belongs to the process, not to the descriptor: data workers do not inherit it, and the system
        # takes it back however the process ends.
        self._descriptor = os.open(self.directory / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(f"another job trains in {self.directory}{self._describe_owner()}") from None
            logger.warning("%s cannot be locked against a second job (%s)", self.directory, error)
            return
        with suppress(OSError):  # a full disk
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()} {socket.gethostname()}".encode(), 0)

    def _describe_owner(self) -> str:
        """Say who holds the folder; its launcher may be gone, so that nobody knows of it any more."""
        assert self._descriptor is not None
        pid, _, host = os.pread(self._descriptor, 1000, 0).decode(errors="replace").partition(" ")
        if not pid.isdecimal():
            return "; wait for its end or give another run.dir"
        return (
            f": its rank 0 is process {pid} on {host}; wait for its end, let it save and stop (kill {pid} there), or "
            "give another run.dir"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def begin_cooldown(config: Config, source: str) -> Config:
    """Return the settings of a run in a new folder that cools down from a checkpoint, or from the newest of a run.

    In a folder that holds this cooldown already, it is the same again, however far the other run has gone.

    Raises:
        ConfigError: the learning rate is not wsd, there is no such checkpoint, or the folder holds another run.
    """
    known = Path(config.run.dir or f"runs/{config.recipe}") / folder.CONFIG
    checkpoint = Path(source).resolve()
    if not (checkpoint / folder.MANIFEST).is_file():
        checkpoint = next(iter(folder.list_checkpoints(checkpoint / folder.FOLDER_NAME)), checkpoint)
    if known.is_file() and Path(source).resolve() != checkpoint:
        begun = Path(load_run_config(known).resume.from_)
        checkpoint = begun if begun.parent == checkpoint.parent and begun.exists() else checkpoint
    try:
        step = folder.open_checkpoint(checkpoint, verify=False).step
    except CheckpointError as error:
        reason = f": {error}" if Path(source).exists() else suggest_path(Path(source))
        raise ConfigError(f"--cooldown {source} names neither a checkpoint nor a run that has one{reason}") from None
    changed = replace(
        config,
        optim=replace(config.optim, cooldown_from=Duration(step, "steps")),
        resume=replace(config.resume, from_=str(checkpoint)),
        origins={**config.origins, "optim.cooldown_from": f"--cooldown {source}", "resume.from": "--cooldown"},
    )
    check_config(changed)
    return changed


def choose_start(config: Config, directory: Path, *, fresh: bool, ranks: Ranks, data: TrainingData) -> Start:
    """Decide on rank 0 where the run begins, tell the other ranks, and write config.yaml. All ranks call it.

    The cases, in this order:

    1. The folder holds files, but no run: refused.
    2. It holds a run and `--fresh` was given: refused.
    3. It holds a run with other settings: refused, unless only settings differ that may change. With optim.schedule
       wsd, run.length and optim.cooldown may, if the run becomes longer and its cooldown has not begun.
    4. `resume.from` names a checkpoint that this run has not begun from yet: from there.
    5. The run has checkpoints: from the newest whole one; when all are damaged, refused.
    6. The folder holds the logs of a run that has saved, and no checkpoint any more: refused.
    7. The folder is empty, or holds a run that never saved: from step 0.

    In cases 4 and 5 the training shards must be those of the checkpoint, unless `resume.other_data` allows others. An
    epoch of the settings then stays as many steps as it was when the run began.

    Raises:
        ConfigError: cases 1 to 3 and 6, or `resume.from` names no checkpoint or another run's, or the data are others.
        CheckpointError: every checkpoint there is damaged.
        ShardError: a shard cannot be read.
    """
    answer = _on_rank_0(lambda: _decide(config, directory, fresh=fresh, data=data), ranks=ranks)
    checkpoint = None
    if answer["path"]:
        # Rank 0 has compared every byte with the manifest; the others read the manifest only.
        checkpoint = folder.open_checkpoint(Path(answer["path"]), verify=False)
        checkpoint = replace(checkpoint, rejected=tuple((where, why) for where, why in answer["rejected"]))
    memory = RunMemory(**answer["memory"])
    return Start(checkpoint=checkpoint, reason=answer["reason"], memory=memory, other_data=answer["other_data"])


def _decide(config: Config, directory: Path, *, fresh: bool, data: TrainingData) -> dict[str, Any]:
    _refuse_foreign_folder(directory, config)
    holds_run = _holds_run(directory)
    if holds_run and fresh:
        raise ConfigError(
            f"--fresh starts a new run, but {directory} holds one: give another run.dir, or move this one away "
            f"(mv {directory} {directory}.old)"
        )
    own = find_checkpoint(directory)
    step = own.step if own else 0
    for holder in (directory, own.path if own else directory):
        if (holder / folder.CONFIG).is_file():
            _refuse_other_settings(
                config, holder / folder.CONFIG, step=step, steps_per_epoch=_steps_per_epoch(own, data)
            )
    begun_from = RunMemory.read(own).resumed_from
    wanted = str(Path(config.resume.from_).resolve()) if config.resume.from_ else ""
    if wanted and wanted != begun_from:
        chosen = _open_wanted(config, wanted, data=data)
        reason = f"going on from {wanted}, as resume.from says"
        begun_from = wanted
    elif own:
        chosen, reason = own, f"going on from {own.path} at step {own.step}"
    else:
        _refuse_lost_checkpoints(directory)
        chosen, reason = None, f"a new run in {directory}"
    shards = identify_shards(data.names, data.lengths)
    other_data = _compare_data(config, chosen, shards)
    if own and own.path.parent == directory / folder.FOLDER_NAME:
        # The pointer may be gone, or name what is set aside now.
        folder.write_pointer(own.path.parent, own.path.name)
    for damaged, _ in own.rejected if own else ():
        folder.set_aside(Path(damaged))
    replace_durably(directory / folder.CONFIG, dump_config(config).encode())
    path, rejected = (str(chosen.path), chosen.rejected) if chosen else ("", ())
    memory = RunMemory(resumed_from=begun_from, steps_per_epoch=_steps_per_epoch(chosen, data), shards=shards)
    return {
        "path": path, "rejected": rejected, "reason": reason, "memory": asdict(memory), "other_data": other_data
    }  # fmt: skip


def _steps_per_epoch(checkpoint: Checkpoint | None, data: TrainingData) -> int:
    """Return how many steps the settings of the run mean by an epoch: what its first data made of it."""
    return RunMemory.read(checkpoint).steps_per_epoch or data.steps_per_epoch


def _compare_data(config: Config, checkpoint: Checkpoint | None, shards: Sequence[ShardIdentity]) -> str:
    """Return how the shards differ from the checkpoint's, if other ones are allowed; raises ConfigError if not."""
    before = RunMemory.read(checkpoint).shards
    if checkpoint is None:
        return ""
    if not before:
        logger.warning("%s does not say which shards it was trained on: those of now are taken", checkpoint.path)
        return ""
    difference = describe_difference(before, shards)
    if difference and config.resume.other_data == "refuse":
        steps = RunMemory.read(checkpoint).steps_per_epoch
        raise config.error(
            "data.train",
            f"the shards that {checkpoint.path} was trained on, and these are others ({difference}); "
            "resume.other_data=keep_steps goes on with them, while length, rates and freezing stay at the steps that "
            f"they had, {steps} to an epoch",
        )
    return difference


def _refuse_lost_checkpoints(directory: Path) -> None:
    """Refuse to begin anew, and so to cut the logs of a run that has saved something; raises ConfigError."""
    metrics, events = (directory / name for name in ("metrics.jsonl", "events.jsonl"))
    saved = [event["step"] for event in read_json_lines(events) if event.get("event") == "save"]
    if not saved and (events.is_file() or not read_json_lines(metrics)):
        return
    told = f"saved step {saved[-1]}" if saved else "took steps, and its events.jsonl is gone"
    raise ConfigError(
        f"{directory} holds the logs of a run that {told}, and no checkpoint any more: put its checkpoints back, or "
        f"move the folder away (mv {directory} {directory}.old), or give another run.dir"
    )


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


def _refuse_other_settings(
    config: Config, path: Path, *, step: int, steps_per_epoch: int, may_cool: bool = False
) -> None:
    there, lengths = load_run_config(path), ("run.length", "optim.cooldown")
    hint, free = "", {"optim.cooldown_from"} if may_cool else set()
    if config.optim.schedule == there.optim.schedule == "wsd" and config.freeze.mode != "adaptive":
        mine, theirs = (count_steps(of, steps_per_epoch=steps_per_epoch) for of in (config, there))
        if step <= min(mine.cooldown_start, theirs.cooldown_start) and theirs.total_steps <= mine.total_steps:
            free.update(lengths)
        hint = (
            f"; run.length may grow until the run cools down from step {theirs.cooldown_start} on, and {step} are taken"
            "; the checkpoint from before, which is kept, goes on in another run.dir: resume.from=CHECKPOINT"
        )
    lines = differing_settings(config, there, free=free)
    if lines:
        raise ConfigError(
            f"{path.parent} holds a run with other settings ({'; '.join(lines)}); go on with those, or give another "
            f"run.dir{hint if any(line.startswith(lengths) for line in lines) else ''}"
        )


def _open_wanted(config: Config, wanted: str, *, data: TrainingData) -> Checkpoint:
    try:
        found = find_checkpoint(wanted)
    except CheckpointError as error:
        raise config.error("resume.from", f"a whole checkpoint or run folder, and {error}") from None
    if found is None:
        meant = "" if Path(wanted).exists() else suggest_path(Path(wanted))
        raise config.error("resume.from", f"a checkpoint, or a run folder that holds one{meant}")
    steps = _steps_per_epoch(found, data)
    _refuse_other_settings(
        config, found.path / folder.CONFIG, step=found.step, steps_per_epoch=steps, may_cool=True
    )  # fmt: skip
    return found


def _on_rank_0(function: Callable[[], Any], *, ranks: Ranks) -> Any:
    """Call a function on rank 0 and return its value on all ranks; what it raises for bad input is raised on all."""

    def call() -> Any:
        try:
            return function()
        except OSError as error:
            raise ConfigError(f"run.dir cannot be used: {error}") from error

    return ranks.from_rank_0(call, errors=(ConfigError, CheckpointError, ShardError))
