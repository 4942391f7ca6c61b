"""Cells of whole processes: a run that is killed and goes on, and two ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from vitfreeze.bench.gpu.cells import Cell, Trial, Unmeasured, tell
from vitfreeze.config import dump_config
from vitfreeze.engine import join_ranks
from vitfreeze.files import read_json_lines

STEPS, STEPS_BETWEEN_SAVES = 12, 4
PATIENCE = 180.0  # seconds
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def measure_restart(trial: Trial) -> Iterator[Cell]:
    """Yield a cell for a run that is killed by SIGKILL after its first checkpoint, and started again."""
    if not trial.config.data.train:
        yield tell("restart", "save, kill, resume", ends=Unmeasured("data.train is not set"))
        return
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder, "run"), Path(folder, "log")
        settings = [
            *(f"run.dir={run}", f"run.length={STEPS} steps", "run.log_every_steps=1", "run.show_every=0"),
            *(f"checkpoint.every={STEPS_BETWEEN_SAVES} steps", "optim.warmup=1 steps", "eval.every=0"),
        ]
        command = _command(trial, folder, ("pretrain",), settings)
        start = time.monotonic()
        first = _start(command, log)
        try:
            while not list(run.glob("checkpoints/step-*")) and first.poll() is None:
                if time.monotonic() - start > PATIENCE:
                    raise TimeoutError(f"no checkpoint within {PATIENCE:.0f} s")
                time.sleep(0.05)
        finally:
            first.send_signal(signal.SIGKILL)
            first.wait()
        saved = time.monotonic()
        status = _start(command, log).wait(timeout=PATIENCE)
        if status:
            raise RuntimeError(f"the run ended with status {status}:\n{log.read_text()[-2000:]}")
        steps = [line["step"] for line in read_json_lines(run / "metrics.jsonl")]
        yield tell(
            "restart",
            "save, kill, resume",
            seconds_to_checkpoint=saved - start,
            seconds_from_kill_to_end=time.monotonic() - saved,
            killed=first.returncode == -signal.SIGKILL,
            ends=steps == list(range(1, STEPS + 1)),
        )


def measure_two_ranks(trial: Trial) -> Iterator[Cell]:
    """Yield a cell for two ranks, if there are two GPUs; on a CPU, two processes rehearse it."""
    if join_ranks().device.type == "cuda" and torch.cuda.device_count() < 2:
        yield tell("two ranks", "bench scaling", efficiency=Unmeasured("there is one GPU"))
        return
    with tempfile.TemporaryDirectory() as folder:
        log, settings = Path(folder, "log"), [f"batch.global_size={2 * trial.images}"]
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        options = ("--json", "--frozen", "0", "--rounds", str(trial.rounds))
        command = _command(trial, folder, ("bench", "scaling"), [*settings, *options], launcher=launcher)
        with log.open("w") as errors:
            done = subprocess.run(
                command, env=_environment(), stdout=subprocess.PIPE, stderr=errors, timeout=PATIENCE, check=False
            )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"bench scaling ended with status {done.returncode}:\n{log.read_text()[-2000:]}")
        found = json.loads(done.stdout)
    row = found["rows"][0]
    yield tell(
        "two ranks",
        "bench scaling",
        alone_ms=row["alone_ms"],
        step_ms=row["measured_ms"],
        efficiency=row["measured_efficiency"],
        all_reduce_gigabytes=found["bandwidth_gigabytes"],
    )


def _command(
    trial: Trial, folder: str, words: tuple[str, ...], arguments: list[str], *, launcher: tuple[str, ...] = ()
) -> list[str]:
    recipe = Path(folder, "recipe.yaml")
    recipe.write_text(dump_config(trial.configure()))
    return [sys.executable, *launcher, "-m", "vitfreeze", *words, str(recipe), *arguments]


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("a") as file:
        return subprocess.Popen(command, env=_environment(), stdout=file, stderr=file)


def _environment() -> dict[str, str]:
    """Return this process's environment without what joining its own ranks left there."""
    return {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
