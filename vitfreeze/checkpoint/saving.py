"""Writing checkpoints beside the training: a copy in CPU memory first, then a thread that puts it on disk."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vitfreeze import __version__
from vitfreeze.checkpoint import folder
from vitfreeze.config import Config, Duration, dump_config
from vitfreeze.engine import STATE_KEYS, FreezingEngine
from vitfreeze.files import sync_file, sync_folder, write_durably
from vitfreeze.ranks import Ranks

logger = logging.getLogger("vitfreeze")

RNG_PREFIX, LOCAL_PREFIX, BUFFER_PREFIX = "rng/", "local/", "buffer/"
# A rank may wait this long for another one that writes to a slow disk.
PATIENCE = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """How a save went.

    Attributes:
        step: optimizer steps taken when it was made.
        path: the checkpoint; None when it could not be written.
        seconds: from the copy to the pointer.
        stall_seconds: how long training stood still for it.
        bytes: size of all its files.
        error: why it could not be written, empty when it was.
    """

    step: int
    path: Path | None
    seconds: float
    stall_seconds: float
    bytes: int
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """This rank's part of a checkpoint, in CPU memory."""

    step: int
    files: Mapping[str, Mapping[str, Tensor]]  # by file name, then by tensor name
    starts: Mapping[str, tuple[int, int]]  # by group: first and last + 1 element that this rank holds
    content: dict[str, Any]  # the manifest's, as far as it is known before the files are written
    config_text: str  # empty without a configuration


class SaveSchedule:
    """Says when a run is to be saved. Rank 0's answer counts, because clocks differ.

    Args:
        every: steps, epochs, minutes or a share of the run.
        start_step: the step that the run begins with; it needs no saving.
        steps_per_epoch, total_steps: of the run.
        retry_seconds: pause before the next try when a checkpoint could not be written.

    Attributes:
        waits: whether a save that is due waits for the one before it. Steps are kept to; minutes may become more.
    """

    def __init__(
        self, every: Duration, *, start_step: int, steps_per_epoch: int, total_steps: int, retry_seconds: float = 60.0
    ) -> None:
        self.last_started = self.last_saved = start_step
        self._steps: int | None = None
        self._seconds = every.value * 60
        self.waits = every.unit != "minutes"
        if self.waits:
            self._steps = max(1, every.to_steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps))
        self._retry_seconds = retry_seconds
        self._started_at = time.monotonic()
        self._retry_at: float | None = None

    def is_due(self, done: int) -> bool:
        """Tell whether to save when `done` steps have been taken; stays true until a save has started."""
        if self._retry_at is not None and time.monotonic() >= self._retry_at:
            return True
        if self._steps is None:
            return time.monotonic() - self._started_at >= self._seconds
        return done // self._steps > self.last_started // self._steps

    def note_start(self, done: int) -> None:
        """Note that a save has started."""
        self.last_started, self._started_at, self._retry_at = done, time.monotonic(), None

    def note_end(self, report: SaveReport) -> None:
        """Note how it ended; one that failed is tried again."""
        if report.error:
            self._retry_at = time.monotonic() + self._retry_seconds
        else:
            self.last_saved = report.step


class CheckpointWriter:
    """Saves checkpoints of one run, one at a time. All ranks create one, and call `start` at the same steps.

    Args:
        run_dir: the run's folder, which all ranks see.
        keep: number of newest checkpoints that stay.
        keep_until: the newest one of at most so many steps stays beside them; None: no such one.
        ranks: of the run.
    """

    def __init__(self, run_dir: str | Path, *, keep: int, ranks: Ranks, keep_until: int | None = None) -> None:
        self.parent = Path(run_dir) / folder.FOLDER_NAME
        self.keep, self.keep_until = keep, keep_until
        # The writing threads meet on a group of their own, so that they never mix with the training's collectives.
        self._ranks = ranks.on_cpu(timeout=PATIENCE)
        self._thread: threading.Thread | None = None
        self._report: SaveReport | None = None
        self._failure: BaseException | None = None
        self._ranks.from_rank_0(self._prepare_folder)

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self,
        step: int,
        *,
        engine: FreezingEngine,
        config: Config | None = None,
        extra: Mapping[str, Any],
        local: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Copy the run's state and begin to write it; a save that is under way is waited for.

        Args:
            step: optimizer steps taken.
            engine: whose weights and optimizer state are saved.
            config: of the run, if it has one.
            extra: whatever else is needed to go on, ready for JSON, the same on all ranks.
            local: tensors of this rank alone, which a run on the same number of ranks gets back.
        """
        started = time.perf_counter()
        if self._thread is not None:
            raise RuntimeError("the report of the last save was not taken: call `poll` or `finish` first")
        snapshot = _take_snapshot(step, engine=engine, config=config, extra=extra, local=local or {})
        stalled = time.perf_counter() - started
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, started, stalled), name=f"save-{step}", daemon=True
        )
        self._thread.start()

    def poll(self) -> SaveReport | None:
        """Return the report of a save that has ended since the last call, without waiting."""
        return None if self.is_busy else self.finish()

    def finish(self) -> SaveReport | None:
        """Wait for the save that is under way, if any, and return its report.

        Raises:
            Exception: whatever stopped the writing, other than a disk that is full or fails.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        report, failure = self._report, self._failure
        self._report = self._failure = None
        if failure is not None:
            raise failure
        return report

    def close(self) -> None:
        """Give back what it needed to meet the other ranks; it saves no more."""
        if self._ranks.group is not None:
            torch.distributed.destroy_process_group(self._ranks.group)

    def _run(self, snapshot: _Snapshot, started: float, stalled: float) -> None:
        try:
            report = self._write(snapshot)
            self._report = replace(report, seconds=time.perf_counter() - started, stall_seconds=stalled)
        except BaseException as error:  # handed to the training thread by `finish`
            self._failure = error

    def _write(self, snapshot: _Snapshot) -> SaveReport:
        """Write this rank's files; when every rank has, let rank 0 give the folder its name."""
        parts = self.parent / f"{folder.SAVING_PREFIX}step-{snapshot.step:08d}"
        outcome = SaveReport(step=snapshot.step, path=None, seconds=0.0, stall_seconds=0.0, bytes=0)
        error = ""
        try:
            self._write_files(parts, snapshot)
        except (OSError, SafetensorError) as problem:
            error = f"rank {self._ranks.rank}: {problem}"
        error = next((text for text in self._ranks.gather(error) if text), "")
        if not error:
            try:
                name, size = self._ranks.from_rank_0(lambda: self._complete(parts, snapshot), errors=(OSError,))
            except OSError as problem:
                error = f"rank 0: {problem}"
        if error:
            if self._ranks.rank == 0:
                shutil.rmtree(parts, ignore_errors=True)
            return replace(outcome, error=error)
        if self._ranks.rank == 0:
            self._delete_old()
        return replace(outcome, path=self.parent / name, bytes=size)

    def _prepare_folder(self) -> None:
        self.parent.parent.mkdir(parents=True, exist_ok=True)
        _clear_remains(self.parent)

    def _write_files(self, parts: Path, snapshot: _Snapshot) -> None:
        try:  # not with parents: made anew in silence, the run folder would hide that all else of the run is lost
            self.parent.mkdir(exist_ok=True)
            parts.mkdir(exist_ok=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the run folder {self.parent.parent} is gone, deleted or moved while the run goes on; put it back or "
                "make an empty one, and the run saves there"
            ) from None
        facts = {}
        for name, tensors in snapshot.files.items():
            save_file(dict(tensors), parts / name)
            sync_file(parts / name)
            facts[name] = _facts_of(parts / name)
        note = {"files": facts, "starts": snapshot.starts}
        write_durably(parts / _note_name(self._ranks.rank), json.dumps(note).encode())

    def _complete(self, parts: Path, snapshot: _Snapshot) -> tuple[str, int]:
        """On rank 0: write the manifest over all ranks' files, name the folder; return its name and size."""
        files: dict[str, dict[str, Any]] = {}
        if snapshot.config_text:
            write_durably(parts / folder.CONFIG, snapshot.config_text.encode())
            files[folder.CONFIG] = _facts_of(parts / folder.CONFIG)
        slices: dict[str, list[list[Any]]] = {name: [] for name in snapshot.content["groups"]}
        for rank in range(self._ranks.world_size):
            note = json.loads((parts / _note_name(rank)).read_bytes())
            files |= note["files"]
            for group, (start, stop) in note["starts"].items():
                if start < stop:
                    slices[group].append([_rank_file(rank), start, stop])
            (parts / _note_name(rank)).unlink()
        before = folder.list_checkpoints(self.parent)
        serial = folder.read_manifest(before[0])["serial"] + 1 if before else 1
        groups = {name: {**group, "slices": slices[name]} for name, group in snapshot.content["groups"].items()}
        content = {**snapshot.content, "groups": groups, "files": files, "serial": serial}
        folder.write_manifest(parts, content)
        sync_folder(parts)
        path = self.parent / folder.checkpoint_name(snapshot.step, parent=self.parent)
        parts.rename(path)
        sync_folder(self.parent)
        folder.write_pointer(self.parent, path.name)
        return path.name, sum(facts["bytes"] for facts in files.values())

    def _delete_old(self) -> None:
        """Remove all but those to keep. One that is half removed never has the name of a whole one."""
        for path in (
            *self._list_old(),
            *self.parent.glob(f"{folder.DAMAGED_PREFIX}*"),
        ):
            try:
                shutil.rmtree(path.rename(self.parent / f"{folder.DELETING_PREFIX}{path.name}"))
            except OSError as error:
                logger.warning("an old checkpoint cannot be removed: %s", error)

    def _list_old(self) -> list[Path]:
        """Return the checkpoints that may go: neither among the newest nor the newest of at most `keep_until` steps."""
        there, until = folder.list_checkpoints(self.parent), self.keep_until
        early = (path for path in there if until is not None and folder.read_manifest(path)["step"] <= until)
        kept = {*there[: self.keep], next(early, None)}
        return [path for path in there if path not in kept]


def save_engine(
    directory: str | Path,
    engine: FreezingEngine,
    *,
    step: int,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    config: Config | None = None,
    local: Mapping[str, Tensor] | None = None,
) -> SaveReport:
    """Save an engine and wait for it; `load_engine` goes on from it on any number of ranks. All ranks call it.

    A whole checkpoint exists at every instant: a job that is killed in between leaves the one before.

    Args:
        directory: of the run, which all ranks see; the checkpoint is a folder in `checkpoints` there.
        engine: between two optimizer steps.
        step: optimizer steps taken, and so the first to take after a resume.
        extra, config, local: see `CheckpointWriter.start`.
        keep: number of newest checkpoints that stay.

    Raises:
        CheckpointError: it could not be written; those before stand.
        TypeError: `extra` is not ready for JSON.
    """
    json.dumps(extra)  # here on all ranks, not later on one that the others wait for
    writer = CheckpointWriter(directory, keep=keep, ranks=engine.ranks)
    try:
        writer.start(step, engine=engine, config=config, extra=extra or {}, local=local)
        report = writer.finish()
    finally:
        writer.close()
    assert report is not None
    if report.error:
        raise folder.CheckpointError(f"step {step} could not be saved in {directory}: {report.error}")
    return report


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name; a tied weight once, by its first name."""
    names: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: value.detach() for name, value in state.items() if names.setdefault(id(value), name) == name}


def _take_snapshot(
    step: int, *, engine: FreezingEngine, config: Config | None, extra: Mapping[str, Any], local: Mapping[str, Tensor]
) -> _Snapshot:
    """Copy this rank's part of the state to CPU memory, where training cannot change it."""
    state = engine.state()
    mine = {f"{name}/{key}": getattr(group, key) for name, group in state.groups.items() for key in STATE_KEYS}
    mine |= {f"{LOCAL_PREFIX}{name}": tensor for name, tensor in local.items()}
    mine[f"{RNG_PREFIX}cpu"] = torch.get_rng_state()
    if engine.device.type == "cuda":
        mine[f"{RNG_PREFIX}cuda"] = torch.cuda.get_rng_state(engine.device)
    weights = weights_of(engine.module)
    if engine.rank:  # running statistics are of the images that a rank has seen; rank 0's are among the weights
        parameters = {name for name, _ in engine.module.named_parameters()}
        mine |= {f"{BUFFER_PREFIX}{name}": value for name, value in weights.items() if name not in parameters}
    files = {_rank_file(engine.rank): {name: _copy(tensor) for name, tensor in mine.items()}}
    if engine.rank == 0:
        files[folder.WEIGHTS] = {name: _copy(tensor) for name, tensor in weights.items()}
        # Weights that compute in fp32 are their own masters. The others are frozen, so they need no copy.
        files[folder.MASTERS] = {
            name: tensor for name, tensor in state.frozen_masters.items() if weights[name].dtype != torch.float32
        }
    content = {
        "format_version": folder.FORMAT_VERSION,
        "step": step,
        "world_size": engine.world_size,
        "groups": {
            name: {
                "numel": group.numel,
                "parameters": [[parameter, list(shape)] for parameter, shape in group.parameters],
            }
            for name, group in state.groups.items()
        },
        "scalars": dict(state.scalars),
        "extra": dict(extra),
        "versions": {
            "vitfreeze": __version__,
            "torch": torch.__version__,
            "deepspeed": importlib.metadata.version("deepspeed"),
            "python": platform.python_version(),
        },
        "saved_at": time.time(),
    }
    starts = {name: (group.start, group.start + group.master.numel()) for name, group in state.groups.items()}
    config_text = dump_config(config) if config else ""
    return _Snapshot(step=step, files=files, starts=starts, content=content, config_text=config_text)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _facts_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": folder.hash_file(path)}


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _note_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _clear_remains(parent: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    if not parent.is_dir():
        return
    for path in parent.iterdir():
        if path.name.startswith((folder.SAVING_PREFIX, folder.DELETING_PREFIX)):
            shutil.rmtree(path, ignore_errors=True)
