"""Training jobs of real processes for tests: started, killed at an exact instant, started again, compared.

The processes are forked from a server that has imported everything, so that a start takes a second and not ten. They
run the command line as a user's processes do.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml
from processes import fork_server, free_port
from tiny_shards import write_shards

KILLED = -signal.SIGKILL
# 16 steps of two micro-batches; the 8 blocks of the tiny model freeze at steps of their own.
RECIPE: Mapping[str, Mapping[str, Any]] = {
    "model": {"size": "vit_tiny_test", "img_size": 32},
    "data": {"workers": 0, "crop_scale": [0.5, 1.0]},
    "batch": {"global_size": 8, "micro_size": 4},
    "optim": {"blr": 0.05, "warmup": "1 steps"},
    "freeze": {"t_0": 0.3, "how": "linear"},
    "run": {"length": "16 steps", "log_every_steps": 1, "show_every": 0},
    "checkpoint": {"every": "3 steps"},
}


@dataclass(frozen=True, kw_only=True)
class Kill:
    """The instant at which a process ends itself by SIGKILL.

    `where` is `micro_batch` (of `step`, after the backward pass of its number `index`), `update` (right after the
    optimizer step of `step`), or a function of the save that begins when `step` steps have been taken, which is then
    called and not returned from: `write_files`, `write_manifest`, `write_pointer` or `delete_old`. With `clock`
    nothing dies, but the clock jumps by `index` seconds before `step`. With `refuse_files` nothing dies either, but
    files over 10 kB are refused from the save of `step` to that of step `index`.
    """

    where: str
    step: int
    index: int = 0


@dataclass(kw_only=True)
class Job:
    """One start of a run."""

    processes: list[BaseProcess]
    log: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, *, seconds: float = 120) -> list[int | None]:
        """Wait for every process and return the exit statuses, negative for signals."""
        for process in self.processes:
            process.join(max(0.1, self.started + seconds - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            self.kill()
            raise TimeoutError(f"the job did not end within {seconds} s:\n{self.log.read_text()[-4000:]}")
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """End every process by SIGKILL, as a machine that fails does."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def signal(self, number: int, *, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some ranks, by default to all."""
        for rank, process in enumerate(self.processes):
            if ranks is None or rank in ranks:
                assert process.pid is not None
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)


class Bench:
    """A folder in which jobs run: shards, a recipe, logs."""

    def __init__(self, folder: Path, **settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        shards = write_shards(folder / "shards", [40, 40])
        sections = {name: {**RECIPE.get(name, {}), **settings.get(name, {})} for name in {*RECIPE, *settings}}
        sections["data"]["train"] = str(shards)
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text(yaml.safe_dump(sections))
        for stage in (0, 1, 2):
            content = {"zero_optimization": {"stage": stage}, "gradient_clipping": 0}
            (folder / f"stage{stage}.json").write_text(json.dumps(content))
        # The processes are to run on the CPU alike everywhere.
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
        self._context = fork_server()

    def arguments(self, run: str | Path, *overrides: str, stage: int | None = 1) -> list[str]:
        """Return what follows `vitfreeze` on the command line."""
        settings = [f"run.ds_config={self.folder / f'stage{stage}.json'}"] if stage is not None else []
        return ["pretrain", str(self.recipe), f"run.dir={self.folder / run}", *overrides, *settings]

    def start(
        self, run: str | Path, *overrides: str, ranks: int = 1, stage: int | None = 1, fresh: bool = False,
        kill: Kill | None = None, kill_rank: int = 0,
    ) -> Job:  # fmt: skip
        """Start `vitfreeze pretrain` in the run folder of this name."""
        log = self.folder / f"{Path(run).name}.log"
        arguments = [*self.arguments(run, *overrides, stage=stage), *(["--fresh"] if fresh else [])]
        environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes: list[BaseProcess] = []
        for rank in range(ranks):
            variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            own_kill = kill if rank == kill_rank else None
            process = self._context.Process(target=_train, args=(arguments, variables, str(log), own_kill))
            process.start()
            processes.append(process)
        return Job(processes=processes, log=log)

    def run(self, run: str | Path, *overrides: str, seconds: float = 120, **options: Any) -> list[int | None]:
        """Start a job and wait for it."""
        return self.start(run, *overrides, **options).wait(seconds=seconds)

    def log(self, run: str) -> str:
        """Return what the jobs of a run wrote to their terminal."""
        return (self.folder / f"{run}.log").read_text()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a .jsonl file."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def read_losses(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return, for every step, all that the run computed there: losses by scale, rates, frozen layers."""
    names = ("loss", "losses", "lr", "frozen_layers", "epoch", "gradient_elements")
    return {line["step"]: {name: line[name] for name in names} for line in read_lines(run_dir / "metrics.jsonl")}


def read_events(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    """Return the events of these kinds."""
    return [event for event in read_lines(run_dir / "events.jsonl") if event["event"] in kinds]


def newest_checkpoint(run_dir: Path) -> Path:
    """Return the checkpoint that the pointer names."""
    return run_dir / "checkpoints" / (run_dir / "checkpoints" / "newest").read_text().strip()


def _train(arguments: list[str], variables: dict[str, str], log: str, kill: Kill | None) -> None:
    """What each forked process does."""
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    gc.freeze()  # what the server imported is nobody's garbage; looking through it at every drop takes half a second
    if kill is not None:
        _arm(kill)
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed refuses fp16 on processors without fp16 units; torch computes with it all the same.
    get_accelerator().is_fp16_supported = lambda: True
    from vitfreeze.cli import main
    from vitfreeze.training.pretrain import Pretraining

    Pretraining.close = _close_nothing  # type: ignore[method-assign]
    main(arguments)


def _close_nothing(task: Any, directory: Path, engine: Any) -> None:
    """Stand in for exporting and plotting, which take longer than these runs and have tests of their own."""


def _arm(kill: Kill) -> None:
    """Let this process end itself at the instant that `kill` says."""
    from vitfreeze.checkpoint import folder
    from vitfreeze.checkpoint.saving import CheckpointWriter
    from vitfreeze.engine import FreezingEngine

    class Clock:
        step = micro_batch = saving = -1

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    freeze, backward, take = FreezingEngine.freeze, FreezingEngine.backward, FreezingEngine.step
    start = CheckpointWriter.start

    def noting_freeze(self: Any, frozen_layers: int, *, step: int) -> Any:
        Clock.step, Clock.micro_batch = step, -1
        if kill.where == "clock" and step == kill.step:
            clock = time.time
            time.time = lambda: clock() + kill.index
        return freeze(self, frozen_layers, step=step)

    def dying_backward(self: Any, loss: Any) -> None:
        backward(self, loss)
        Clock.micro_batch += 1
        if kill.where == "micro_batch" and (Clock.step, Clock.micro_batch) == (kill.step, kill.index):
            die()

    def dying_step(self: Any) -> bool:
        boundary = take(self)
        if boundary and kill.where == "update" and Clock.step == kill.step:
            die()
        return boundary

    def noting_start(self: Any, step: int, **options: Any) -> None:
        Clock.saving = step
        if kill.where == "refuse_files":
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            refuses = kill.step <= step <= kill.index
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if refuses else hard, hard))
        start(self, step, **options)

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if Clock.saving == kill.step:
                die()
            return result

        return call

    FreezingEngine.freeze, FreezingEngine.backward, FreezingEngine.step = noting_freeze, dying_backward, dying_step  # type: ignore[method-assign]
    CheckpointWriter.start = noting_start  # type: ignore[method-assign]
    if kill.where in ("write_files", "delete_old"):
        name = f"_{kill.where}"
        setattr(CheckpointWriter, name, dying(getattr(CheckpointWriter, name)))
    elif kill.where in ("write_manifest", "write_pointer"):
        setattr(folder, kill.where, dying(getattr(folder, kill.where)))
    elif kill.where not in ("micro_batch", "update", "refuse_files", "clock"):
        raise ValueError(f"no such instant: {kill.where}")
