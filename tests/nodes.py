"""Several nodes on one machine: the launch scripts, started as they are on a cluster, without ssh."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from tiny_shards import write_shards

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
TINY = """
model: {size: vit_tiny_test, img_size: 32}
batch: {global_size: 24}
optim: {blr: 0.05, warmup: 2 steps}
freeze: {t_0: 0.3, how: linear}
run: {length: 24 steps, log_every_steps: 1, show_every: 0, ds_config: cpu}
checkpoint: {every: 4 steps}
"""


def require_environment() -> None:
    """Skip, loudly, where the scripts would begin to install packages."""
    stamp = Path(sys.prefix) / "installed"
    content = b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")) + b"\n"
    wanted = hashlib.sha256(content).hexdigest()
    if not stamp.is_file() or not stamp.read_text().startswith(wanted):
        pytest.skip(f"THE LAUNCH SCRIPTS ARE NOT TESTED: {sys.prefix} was not made by launch/test.sh")


def write_recipe(folder: Path) -> Path:
    """Write shards of 96 tiny images and a recipe of 24 steps for them, and return the recipe."""
    shards = write_shards(folder / "shards", [48, 48])
    recipe = folder / "tiny.yaml"
    recipe.write_text(f"{TINY}data: {{train: {shards}, workers: 0}}\n")
    return recipe


class Script:
    """A launch script in a process group of its own, which stands for a node."""

    def __init__(
        self,
        name: str,
        *arguments: str,
        log: Path,
        variables: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        environment = {
            **os.environ, "VITFREEZE_VENV": sys.prefix, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), **(variables or {}),
        }  # fmt: skip
        self.log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*before, "bash", str(LAUNCH / name), *arguments], env=environment, cwd=log.parent, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, *, seconds: float = 240) -> int:
        """Wait for its end and return the exit status."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.lose()
            raise TimeoutError(f"no end within {seconds} s:\n{self.text()[-4000:]}") from None

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.kill(self.process.pid, signal.SIGINT)

    def lose(self) -> None:
        """End every process of the node at once, as a power cut does."""
        for pid in [*descendants(self.process.pid), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    def text(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(errors="replace")


def descendants(pid: int) -> list[int]:
    """Return the processes below one, whatever their groups."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, stack = [], [pid]
    while stack:
        for child in children.get(stack.pop(), []):
            found.append(child)
            stack.append(child)
    return found


def wait_until(condition: Callable[[], bool], *, seconds: float = 240, what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds} s")
        time.sleep(0.1)
