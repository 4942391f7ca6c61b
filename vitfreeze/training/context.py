"""A run's parts, and what it writes down on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vitfreeze.config import Config, Duration
from vitfreeze.data import TrainLoader
from vitfreeze.data.epoch_report import merge_over_ranks
from vitfreeze.engine import FreezingEngine
from vitfreeze.gpu import peak_teraflops
from vitfreeze.planner import costs_of
from vitfreeze.report import Meter, Reporter, WaitWatch
from vitfreeze.schedule import RunSchedule, ScheduledStep
from vitfreeze.training.state import RunState
from vitfreeze.training.task import Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts that the loop works with; `steps_per_epoch` is what the settings mean by an epoch."""

    task: Task
    config: Config
    directory: Path
    loader: TrainLoader
    schedule: RunSchedule
    engine: FreezingEngine
    reporter: Reporter
    meter: Meter
    state: RunState
    steps_per_epoch: int
    wait_watch: WaitWatch = field(default_factory=WaitWatch)

    def is_due(self, every: Duration, done: int) -> bool:
        """Tell whether something is due that is done `every` so often, and at the end; 0 is never."""
        total_steps = self.schedule.total_steps
        steps = every.to_steps(steps_per_epoch=self.steps_per_epoch, total_steps=total_steps)
        return every.value > 0 and (done % max(steps, 1) == 0 or done == total_steps)

    def _measure_use(self, images_per_second: float, now: ScheduledStep) -> dict[str, float]:
        """Return the operations per second of a rank in 1e12, and, if the GPU is known, their share of its peak (MFU).

        Source: Chowdhery et al., "PaLM", 2022, appendix B; only operations that the frozen prefix leaves count.
        """
        engine = self.engine
        # Operations that recomputing adds are no use of the device.
        costs = replace(costs_of(self.config, now.images), activation_checkpointing=False)
        teraflops = images_per_second * costs.step_flops(now.frozen_layers) / engine.world_size / 1e12
        peak = peak_teraflops(engine.device, precision=engine.settings.precision)
        return {"teraflops": teraflops} | ({"mfu": teraflops / peak} if peak else {})

    def read_meter(self) -> dict[str, Any]:
        """Return what the steps since the last reading measured, and start again; every rank takes part."""
        return self.meter.read(self.engine.ranks)

    def evaluate(self) -> dict[str, float]:
        """Return what the model is worth; the time that it takes is not charged to the steps."""
        worth = self.task.evaluate(self.engine)
        self.meter.restart()
        return worth

    def log_metrics(self, now: ScheduledStep, figures: Mapping[str, Any], *, worth: Mapping[str, float]) -> None:
        """Write a line of metrics.jsonl: what the last steps measured, and what the model is worth, if known."""
        engine, done = self.engine, now.step + 1
        self._warn_of_waiting(figures, done)
        self.reporter.log_metrics(
            done,
            epoch=done / self.steps_per_epoch,
            **figures,
            **({"eval": worth} if worth else {}),
            **self._measure_use(figures["images_per_second"], now),
            lr=now.learning_rates,
            frozen_layers=now.frozen_layers,
            img_size=now.images.img_size,
            mask_ratio=now.images.mask_ratio,
            decoded_share=now.images.decoded_share,
            optimizer_state_bytes=engine.optimizer_state_bytes(),
            gradient_elements=engine.gradient_elements(),
            loss_scale=engine.loss_scale,
            skipped_steps=engine.skipped_steps,
            world_size=engine.world_size,
        )

    def _warn_of_waiting(self, figures: Mapping[str, Any], done: int) -> None:
        """Say once, when training keeps waiting for data, how many workers would cure it."""
        if not self.wait_watch.update(figures["data_wait_fraction"]):
            return
        busy_seconds = figures["step_seconds"] * (1 - figures["data_wait_fraction"])
        images = self.config.batch.global_size / self.engine.world_size
        workers = self.loader.workers_needed(max(busy_seconds, 1e-9) / images)
        message = (
            f"step {done}: {figures['data_wait_fraction']:.0%} of the time goes into waiting for data; "
            f"data.workers={workers} would keep up (now {self.config.data.workers})"
        )
        self.reporter.log_event("data_wait", done, message=message, workers_needed=workers)

    def log_epochs(self, done: int) -> None:
        """Add up what the ranks could not use of the epochs that have ended; raises ShardError when it was too much."""
        for mine in self.loader.take_reports():
            allowed = self.config.data.max_bad_fraction
            whole = merge_over_ranks(mine, ranks=self.engine.ranks, max_bad_fraction=allowed)
            skipped = [asdict(sample) for sample in whole.skipped]
            counts = dict(whole.skipped_per_shard)
            self.reporter.log_event(
                "epoch", done, epoch=whole.epoch, images=whole.images, fallbacks=whole.fallbacks,
                skipped_per_shard=counts, skipped=skipped,
            )  # fmt: skip

    def log_picture(self, done: int) -> None:
        """Write a picture of what the model does to TensorBoard."""
        picture = self.task.draw(self.engine)
        if picture is not None:
            self.reporter.log_image(self.task.picture, done, picture)
        self.meter.restart()
