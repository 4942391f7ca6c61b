"""Finding losses that are not finite without making the device wait, and telling whose they were."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger("vitfreeze")


class RunFailedError(RuntimeError):
    """The run cannot go on; the message says at which step, why, and where the details are."""


@dataclass(kw_only=True)
class _Step:
    """What one rank saw in one optimizer step."""

    number: int
    keys: list[Sequence[str]] = field(default_factory=list)
    losses: list[Mapping[str, Tensor]] = field(default_factory=list)
    totals: Tensor | None = None  # and whether the step was skipped; on the CPU, when `ready` has happened
    ready: torch.cuda.Event | None = None
    is_counted: bool = False

    def close(self, *, was_skipped: Tensor | bool) -> None:
        """Send the losses on their way to the CPU; nothing waits for their arrival yet."""
        losses = [losses["loss"].float() for losses in self.losses]
        skipped = torch.full_like(losses[0], was_skipped) if isinstance(was_skipped, bool) else was_skipped
        device_totals = torch.stack([*losses, skipped])
        self.totals = device_totals.to("cpu", non_blocking=True)
        if device_totals.device.type == "cuda":
            self.ready = torch.cuda.Event()
            self.ready.record()

    def _wait(self) -> Tensor:
        """Wait for this step's figures, not for those of later steps."""
        if self.ready is not None:
            self.ready.synchronize()
        assert self.totals is not None
        return self.totals

    def is_finite(self) -> bool:
        """Judge the losses."""
        return bool(torch.isfinite(self._wait()[:-1]).all())

    def was_skipped(self) -> bool:
        """Return whether the engine skipped the update."""
        return bool(self._wait()[-1])


class LossGuard:
    """Judges each step's losses one step later, when the device has them anyway.

    A step that the engine skipped, because a gradient was not finite, changed no weight: it is counted, and only too
    many of them in a row end the run. With fp16's loss scaling that is the ordinary course of things, also when the
    loss itself overflows. Otherwise a loss that is not finite ends the run.

    Args:
        directory: the run folder; details go to its folder `failures`.
        rank: of this process.
        max_skipped_steps: in a row, after which the run ends.
        forgives_skipped: whether a loss that is not finite counts for nothing in a step that was skipped.
    """

    def __init__(self, directory: Path, *, rank: int, max_skipped_steps: int, forgives_skipped: bool) -> None:
        self.directory, self.rank, self.max_skipped_steps = directory, rank, max_skipped_steps
        self.forgives_skipped = forgives_skipped
        self.skipped_in_a_row = 0
        self._skipped: list[int] = []
        self._open: _Step | None = None
        self._closed: list[_Step] = []

    def add(self, step: int, *, keys: Sequence[str], losses: Mapping[str, Tensor]) -> None:
        """Note one micro-batch of a step, counted from 1: its samples, its total `loss` and its parts, as scalars."""
        if self._open is None:
            self._open = _Step(number=step)
        self._open.keys.append(keys)
        self._open.losses.append({name: loss.detach() for name, loss in losses.items()})

    def close_step(self, *, was_skipped: Tensor | bool) -> None:
        """Note that the step is over, and whether the engine skipped its update: a scalar if only the device knows."""
        assert self._open is not None
        self._open.close(was_skipped=was_skipped)
        self._closed.append(self._open)
        if isinstance(was_skipped, bool):
            self._count(self._open, was_skipped=was_skipped)
        self._open = None

    def _count(self, step: _Step, *, was_skipped: bool) -> None:
        step.is_counted = True
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if was_skipped else 0
        if was_skipped:
            self._skipped.append(step.number)

    def take_skipped(self) -> list[int]:
        """Return the steps that are known to be skipped since the last call."""
        skipped, self._skipped = self._skipped, []
        return skipped

    @property
    def has_skipped_too_often(self) -> bool:
        """Whether more steps in a row were skipped than are allowed; the same on all ranks."""
        return self.skipped_in_a_row > self.max_skipped_steps

    def find_failure(self, *, include_last: bool) -> int | None:
        """Return the first step whose loss was not finite on this rank; None while all is well.

        The last step is judged only on demand, because that waits for the device.
        """
        until = len(self._closed) if include_last else max(len(self._closed) - 1, 0)
        for step in self._closed[:until]:
            if not step.is_counted:
                self._count(step, was_skipped=step.was_skipped())
            if not (self.forgives_skipped and step.was_skipped()) and not step.is_finite():
                return step.number
        del self._closed[: until if not include_last else max(until - 1, 0)]
        return None

    def describe(self, step_number: int | None = None) -> Path:
        """Write what this rank saw in a step, by default the last one, to the run folder, and return the file."""
        step = next((step for step in self._closed if step.number == step_number), self._closed[-1])
        micro_batches = [
            {"keys": list(keys), "losses": {name: repr(float(loss)) for name, loss in losses.items()}}
            for keys, losses in zip(step.keys, step.losses, strict=True)
        ]
        path = self.directory / "failures" / f"step-{step.number:08d}-rank-{self.rank:05d}.json"
        facts = {
            "step": step.number,
            "rank": self.rank,
            "was_skipped": step.was_skipped(),
            "micro_batches": micro_batches,
        }
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(facts, indent=1))
        except OSError as error:
            logger.error("%s cannot be written (%s); it would say: %s", path, error.strerror, json.dumps(facts))
        return path
