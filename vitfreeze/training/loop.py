"""Training: everything that happens at a step, in the order in which it happens, whatever the task.

A run is a function of its step. Sample order, crops, masks, learning rates and the set of frozen layers are computed
from (config, step); only weights and optimizer state are loaded on resume.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from vitfreeze.checkpoint import RESUMED_FROM, RunFolder, SaveSchedule, choose_start, load_checkpoint
from vitfreeze.data import Batch
from vitfreeze.engine import join_processes
from vitfreeze.fault_tolerance import (
    EXIT_FAILED,
    EXIT_STOPPED,
    RunFailedError,
    RunGuard,
    load_local_state,
    local_state,
    report_start,
    schedule_state,
)
from vitfreeze.planner import fit_micro_batch
from vitfreeze.report import Meter, Reporter
from vitfreeze.schedule import build_schedule
from vitfreeze.text import format_bytes
from vitfreeze.training.build import build_engine, open_training
from vitfreeze.training.context import Run
from vitfreeze.training.task import Task

logger = logging.getLogger("vitfreeze")


def run_task(task: Task, *, fresh: bool) -> int:
    """Train from the newest checkpoint if there is one; return the exit status.

    Raises:
        ConfigError: a setting cannot be used, or the run folder holds another run.
    """
    config, processes = task.config, join_processes()
    directory = Path(config.run.dir or f"runs/{config.recipe}")
    loader = open_training(
        config, processes, transform=task.transform, num_classes=task.num_classes, check_data=task.check_data
    )  # fmt: skip
    with RunFolder(directory, processes=processes):
        start = choose_start(config, directory, fresh=fresh, processes=processes)
        checkpoint, start_step = start.checkpoint, start.step
        schedule = build_schedule(config, steps_per_epoch=loader.steps_per_epoch, events=start.events)
        frozen_layers = checkpoint.frozen_layers if checkpoint else schedule.frozen_layers(0)
        model = task.build_model(is_new=checkpoint is None)
        engine = build_engine(config, processes, frozen_layers=frozen_layers, model=model)
        meter = Meter()
        if checkpoint:
            load_local_state(load_checkpoint(checkpoint, engine), meter=meter, engine=engine, config=config)
        reporter = Reporter(
            directory, rank=processes.rank, start_step=start_step, total_steps=schedule.total_steps,
            description=task.description,
        )  # fmt: skip
        report_start(start, reporter)
        run = Run(
            task=task, config=config, directory=directory, loader=loader, schedule=schedule, engine=engine,
            reporter=reporter, meter=meter,
        )  # fmt: skip
        try:
            finished = train(run, start_step=start_step, resumed_from=start.resumed_from)
        except RunFailedError as error:
            logger.error("the run has ended: %s", error)
            return EXIT_FAILED
        finally:
            reporter.close()
        if not finished:
            return EXIT_STOPPED
        if processes.rank == 0:
            task.close(directory, engine)
    return 0


def train(run: Run, *, start_step: int, resumed_from: str) -> bool:
    """Take every step from `start_step` to the end of the run; return whether it got there, not asked to stop."""
    config, loader, schedule, engine = run.config, run.loader, run.schedule, run.engine
    total_steps = schedule.total_steps
    saves = SaveSchedule(
        config.checkpoint.every, start_step=start_step, steps_per_epoch=loader.steps_per_epoch, total_steps=total_steps
    )
    guard = RunGuard(
        run.directory, config=config, engine=engine, reporter=run.reporter, saves=saves, total_steps=total_steps,
        extra=lambda done: {
            "position": loader.position(done), "total_steps": total_steps, RESUMED_FROM: resumed_from,
            **schedule_state(schedule, done),
        },
        local=lambda: local_state(run.meter, engine),
    )  # fmt: skip
    with guard:
        batches: Iterator[Batch] | None = None
        for step in range(start_step, total_steps):
            measure_change(run, step)
            froze = freeze_layers(run, step)
            if batches is None or froze:
                batches = feed(run, step, batches)
            engine.set_learning_rates(schedule.learning_rates(step))
            take_step(run, step, batches, guard)
            run.reporter.advance()

            done = step + 1
            last = done == total_steps
            freezes_next = not last and schedule.frozen_layers(done) != schedule.frozen_layers(step)
            evaluates = run.is_due(config.eval.every, done)
            shows = bool(run.task.picture) and run.is_due(config.run.show_every, done)
            if done % config.run.log_every_steps == 0 or freezes_next or evaluates or shows or last:
                run.log_metrics(step, evaluate=evaluates)
            if shows:
                run.log_picture(step)
            run.log_epochs(step)
            if guard.end_step(done):  # saves when it is due
                return False
    return True


def measure_change(run: Run, step: int) -> None:
    """With freeze.mode adaptive: measure the layers when a check is due, and log what follows from it."""
    adaptive = run.schedule.adaptive
    if adaptive is not None and adaptive.is_check(step):
        changes = run.engine.layer_changes(run.config.freeze.adaptive_measure)
        run.reporter.log_event(**adaptive.record(step, changes=changes).to_event())


def freeze_layers(run: Run, step: int) -> bool:
    """Freeze what the schedule freezes at this step; its layers leave the engine. Return whether anything changed."""
    event = run.engine.freeze(run.schedule.frozen_layers(step), step=step)
    if event is None:
        return False
    frozen = ", ".join(f"layer {layer}" for layer in event.layers) + "".join(f" with head {h}" for h in event.heads)
    message = (
        f"step {step}: froze {frozen or 'nothing new'}; {event.trainable_parameters:,} parameters still train, "
        f"optimizer state {format_bytes(event.optimizer_state_bytes)} a rank ({event.seconds:.2f} s)"
    )
    run.reporter.log_event("freeze", message=message, **asdict(event))
    run.meter.restart()
    return True


def feed(run: Run, step: int, batches: Iterator[Batch] | None) -> Iterator[Batch]:
    """Return the batches to go on with: in larger micro-batches if freezing has made room for them."""
    engine = run.engine
    micro_batch, accumulation = fit_micro_batch(
        run.config,
        world_size=engine.world_size,
        frozen_layers=engine.frozen_layers,
        precision=engine.settings.precision,
    )
    if batches is not None and micro_batch == engine.micro_batch:
        return batches
    if micro_batch != engine.micro_batch:
        engine.set_micro_batch(micro_batch, accumulation=accumulation)
        message = f"step {step}: micro-batches of {micro_batch} images a rank from here on, {accumulation} to a step"
        run.reporter.log_event("micro_batch", step, message=message, micro_batch=micro_batch, accumulation=accumulation)
    return run.loader.batches(step, run.schedule.total_steps, micro_batch=micro_batch)


def take_step(run: Run, step: int, batches: Iterator[Batch], guard: RunGuard) -> None:
    """Take one optimizer step: forward and backward of every micro-batch, then the update."""
    engine, wait_seconds = run.engine, 0.0
    for _ in range(engine.accumulation):
        batch = next(batches)
        loss, parts = run.task.forward(engine, batch, schedule=run.schedule, step=step)
        engine.backward(loss)
        engine.step()
        losses = {"loss": loss, **parts}
        run.meter.add_losses(losses)
        guard.losses.add(step, keys=batch.keys, losses=losses)
        wait_seconds += batch.wait_seconds
    run.task.end_step(engine)
    run.meter.add_step(images=run.config.batch.global_size, wait_seconds=wait_seconds)
