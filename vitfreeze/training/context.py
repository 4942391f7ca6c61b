"""A run's parts, and what it writes down on the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vitfreeze.config import Config, Duration
from vitfreeze.data import EpochReport, TrainLoader, merge_reports
from vitfreeze.engine import FreezingEngine
from vitfreeze.gpu import peak_teraflops
from vitfreeze.planner import EncoderCosts, costs_of
from vitfreeze.report import Meter, Reporter, WaitWatch
from vitfreeze.schedule import RunSchedule
from vitfreeze.training.task import Task


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts that the loop works with."""

    task: Task
    config: Config
    directory: Path
    loader: TrainLoader
    schedule: RunSchedule
    engine: FreezingEngine
    reporter: Reporter
    meter: Meter
    wait_watch: WaitWatch = field(default_factory=WaitWatch)

    def is_due(self, every: Duration, done: int) -> bool:
        """Tell whether something is due that is done `every` so often, and at the end; 0 is never."""
        total_steps = self.schedule.total_steps
        steps = every.to_steps(steps_per_epoch=self.loader.steps_per_epoch, total_steps=total_steps)
        return every.value > 0 and (done % max(steps, 1) == 0 or done == total_steps)

    @cached_property
    def _costs(self) -> EncoderCosts:
        """What the model asks for; operations that recomputing adds are no use of the device."""
        return replace(costs_of(self.config), activation_checkpointing=False)

    def _measure_use(self, images_per_second: float, *, frozen_layers: int) -> dict[str, float]:
        """Return the operations per second of a rank in 1e12, and, if the GPU is known, their share of its peak (MFU).

        Source: Chowdhery et al., "PaLM", 2022, appendix B; only operations that the frozen prefix leaves count.
        """
        engine = self.engine
        teraflops = images_per_second * self._costs.step_flops(frozen_layers) / engine.world_size / 1e12
        peak = peak_teraflops(engine.device, precision=engine.settings.precision)
        return {"teraflops": teraflops} | ({"mfu": teraflops / peak} if peak else {})

    def log_metrics(self, step: int, *, evaluate: bool) -> None:
        """Write what the last steps measured, and what the model is worth; every rank takes part, rank 0 writes."""
        engine = self.engine
        figures = self.meter.read(engine.ranks)
        if evaluate:
            if worth := self.task.evaluate(engine):
                figures["eval"] = worth
            self.meter.restart()  # so that its time is not charged to the steps
        self._warn_of_waiting(figures, step)
        frozen_layers = self.schedule.frozen_layers(step)
        self.reporter.log_metrics(
            step + 1,
            epoch=(step + 1) / self.loader.steps_per_epoch,
            **figures,
            **self._measure_use(figures["images_per_second"], frozen_layers=frozen_layers),
            lr=self.schedule.learning_rates(step),
            frozen_layers=frozen_layers,
            optimizer_state_bytes=engine.optimizer_state_bytes(),
            gradient_elements=engine.gradient_elements(),
            loss_scale=engine.loss_scale,
            skipped_steps=engine.skipped_steps,
            world_size=engine.world_size,
        )

    def _warn_of_waiting(self, figures: dict[str, Any], step: int) -> None:
        """Say once, when training keeps waiting for data, how many workers would cure it."""
        if not self.wait_watch.update(figures["data_wait_fraction"]):
            return
        busy_seconds = figures["step_seconds"] * (1 - figures["data_wait_fraction"])
        images = self.config.batch.global_size / self.engine.world_size
        workers = self.loader.workers_needed(max(busy_seconds, 1e-9) / images)
        message = (
            f"step {step + 1}: {figures['data_wait_fraction']:.0%} of the time goes into waiting for data; "
            f"data.workers={workers} would keep up (now {self.config.data.workers})"
        )
        self.reporter.log_event("data_wait", step + 1, message=message, workers_needed=workers)

    def log_epochs(self, step: int) -> None:
        """Add up what the ranks could not use of the epochs that have ended; raises ShardError when it was too much."""
        for mine in self.loader.take_reports():
            reports = [EpochReport.from_json(facts) for facts in self.engine.ranks.gather(asdict(mine))]
            whole = merge_reports(reports, max_bad_fraction=self.config.data.max_bad_fraction)
            skipped = [asdict(sample) for sample in whole.skipped]
            counts = dict(whole.skipped_per_shard)
            self.reporter.log_event(
                "epoch", step + 1, epoch=whole.epoch, images=whole.images, fallbacks=whole.fallbacks,
                skipped_per_shard=counts, skipped=skipped,
            )  # fmt: skip

    def log_picture(self, step: int) -> None:
        """Write a picture of what the model does to TensorBoard."""
        picture = self.task.draw(self.engine)
        if picture is not None:
            self.reporter.log_image(self.task.picture, step + 1, picture)
        self.meter.restart()
