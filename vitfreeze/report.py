"""What a run tells: one progress bar, metrics.jsonl, events.jsonl, boards, images per second.

Only rank 0 writes. The run folder belongs to us, not to DeepSpeed, whose monitor is rebuilt with each engine.

The `step` of every line is the number of optimizer steps taken when it was written: layers that freeze before the step
with index s are logged at step s, and what that step then measured at step s + 1. A save is logged at the step whose
state it holds.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from vitfreeze.boards import Board, TensorBoard
from vitfreeze.files import LineFile, Refusals, trim_json_lines
from vitfreeze.ranks import Ranks

logger = logging.getLogger("vitfreeze")

LINE_SECONDS = 30  # between lines of progress where there is no terminal to draw a bar on


class Meter:
    """Mean loss, images per second and share of time spent waiting for data since the last reading.

    Losses stay on the device as running sums until they are read, so a step never waits for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._images = 0
        self._steps = 0
        self._wait_seconds = 0.0
        self._started = time.perf_counter()

    def add_losses(self, losses: Mapping[str, Tensor]) -> None:
        """Add the scalar losses of one micro-batch by name: `loss` is the whole, the others are its parts."""
        for name, loss in losses.items():
            value = loss.detach().float()
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
        self._micro_batches += 1

    def add_step(self, *, images: int, wait_seconds: float) -> None:
        """Count one optimizer step of `images` images over all ranks."""
        self._images += images
        self._steps += 1
        self._wait_seconds += wait_seconds

    def read(self, ranks: Ranks) -> dict[str, Any]:
        """Return the figures since the last reading and start again; waits for the device once.

        Every rank must call this at the same step: losses are the mean over the ranks.
        """
        names = list(self._sums)
        means = ranks.mean([float(self._sums[name]) / self._micro_batches for name in names])
        parts = dict(zip(names, means, strict=True))
        seconds = time.perf_counter() - self._started
        figures = {
            "loss": parts.pop("loss"),
            "losses": parts,
            "images_per_second": self._images / seconds,
            "step_seconds": seconds / max(self._steps, 1),
            "data_wait_fraction": min(self._wait_seconds / seconds, 1.0),
        }
        self.restart()
        return figures

    def state(self) -> dict[str, Tensor]:
        """Return the sums since the last reading, so that a resumed run reports the mean that it would have."""
        return {**self._sums, "micro_batches": torch.tensor(self._micro_batches)} if self._micro_batches else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the sums of a run that was stopped; an empty state changes nothing."""
        sums = dict(state)
        self._micro_batches = int(sums.pop("micro_batches", 0))
        self._sums = sums

    @property
    def steps(self) -> int:
        """Steps counted since the last reading."""
        return self._steps

    def restart(self) -> None:
        """Forget what was counted, so that the time of a freeze, save or probe is not charged to the steps."""
        self._sums.clear()
        self._micro_batches = self._images = self._steps = 0
        self._wait_seconds = 0.0
        self._started = time.perf_counter()


class WaitWatch:
    """Notices, once, that training keeps waiting for data."""

    def __init__(self, *, threshold: float = 0.05, patience: int = 3) -> None:
        self.threshold, self.patience = threshold, patience
        self._in_a_row = 0

    def update(self, data_wait_fraction: float) -> bool:
        """Take the next reading; return True at the reading that makes `patience` in a row above the threshold."""
        if self._in_a_row >= self.patience:
            return False
        self._in_a_row = self._in_a_row + 1 if data_wait_fraction > self.threshold else 0
        return self._in_a_row == self.patience


class Reporter:
    """Writes a run's figures into its folder and shows one progress bar; does nothing on ranks other than 0.

    On resume at `start_step`, lines of later steps are cut from metrics.jsonl, and freezes after it from events.jsonl,
    because those steps will be taken again. Numbers and pictures also go to `boards` beside TensorBoard.

    Attributes:
        refusals: what of the run a full disk refuses.
    """

    def __init__(
        self, run_dir: Path, *, rank: int, start_step: int, total_steps: int, description: str = "pre-training",
        boards: Sequence[Board] = (),
    ) -> None:  # fmt: skip
        self.refusals = Refusals()
        self._active = rank == 0
        if not self._active:
            return
        trim_json_lines(run_dir / "metrics.jsonl", keep=lambda line: line["step"] <= start_step)
        trim_json_lines(
            run_dir / "events.jsonl",
            keep=lambda line: line.get("event") not in ("freeze", "adaptive_check") or line["step"] < start_step,
        )
        self._metrics = LineFile(run_dir / "metrics.jsonl", refusals=self.refusals)
        self._events = LineFile(run_dir / "events.jsonl", refusals=self.refusals)
        board = TensorBoard(run_dir / "tensorboard", start_step=start_step, refusals=self.refusals)
        self._boards = [board, *boards]
        self._total_steps, self._told = total_steps, 0.0
        self._has_terminal = sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)
        speaks = logger if logger.handlers else logging.getLogger()
        self._redirect = logging_redirect_tqdm([speaks]) if self._has_terminal else nullcontext()
        self._redirect.__enter__()
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", desc=description, dynamic_ncols=True,
            mininterval=0.5, disable=not self._has_terminal,
        )  # fmt: skip

    def advance(self) -> None:
        """Move the bar by one step."""
        if self._active:
            self._bar.update()

    def log_metrics(self, step: int, **figures: Any) -> None:
        """Write one object to metrics.jsonl, its numbers to the boards, and the main ones beside the bar."""
        if not self._active:
            return
        self._metrics.append_line({"step": step, **figures})
        for board in self._boards:
            board.add_scalars(dict(flatten_numbers(figures)), step)
        shown = {"loss": f"{figures['loss']:.4f}", "img/s": f"{figures['images_per_second']:.1f}"}
        shown["frozen"] = str(figures["frozen_layers"])
        self._bar.set_postfix(shown, refresh=False)
        if not self._has_terminal and (time.monotonic() - self._told > LINE_SECONDS or step == self._total_steps):
            self._told = time.monotonic()
            logger.info("step %d of %d: %s", step, self._total_steps, ", ".join(f"{k} {v}" for k, v in shown.items()))

    def log_event(self, event: str, step: int, *, message: str = "", **details: Any) -> None:
        """Write one object to events.jsonl and, given a message, one line above the bar."""
        if not self._active:
            return
        self._events.append_line({"event": event, "step": step, "time": time.time(), **details})
        if message:
            logger.info(message)

    def log_image(self, name: str, step: int, image_CHW: Tensor) -> None:
        """Write a picture to the boards; values in [0, 1]."""
        for board in self._boards if self._active else ():
            board.add_image(name, image_CHW, step)

    def close(self, status: int = 0) -> None:
        """End the bar and the boards, given the exit status of the run, and give the terminal back.

        All is written already but what was refused until now.
        """
        if self._active:
            for file in (self._metrics, self._events):
                file.flush()
            self._bar.close()
            for board in self._boards:
                board.close(status)
            self._redirect.__exit__(None, None, None)
            self._active = False


def flatten_numbers(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield ('losses/0', 0.12)-like pairs for every finite number in nested objects."""
    for name, value in figures.items():
        if isinstance(value, Mapping):
            yield from flatten_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)
