"""Training: everything that happens at a step, in the order in which it happens, whatever the task.

A run is a function of its step. Sample order, crops, masks, learning rates and the set of frozen layers are computed
from (config, step); only weights and optimizer state are loaded on resume.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from vitfreeze.boards import Board, check_boards, open_boards
from vitfreeze.checkpoint import SaveSchedule
from vitfreeze.config import ConfigError
from vitfreeze.curriculum import KEYS, ImageStage
from vitfreeze.data import Batch, BatchShape, TrainLoader, describe_lost_worker
from vitfreeze.engine import join_ranks
from vitfreeze.fault_tolerance import EXIT_FAILED, EXIT_STOPPED, RunFailedError, RunGuard
from vitfreeze.planner import fit_micro_batch
from vitfreeze.ranks import Ranks
from vitfreeze.report import Meter, Reporter
from vitfreeze.schedule import ScheduledStep, build_schedule
from vitfreeze.terminal import log_into
from vitfreeze.text import format_bytes
from vitfreeze.training.build import build_engine, open_training
from vitfreeze.training.context import Run
from vitfreeze.training.start import RunFolder, Start, TrainingData, choose_start
from vitfreeze.training.state import RunState, read_adaptive_checks
from vitfreeze.training.task import Task

logger = logging.getLogger("vitfreeze")


def run_task(task: Task, *, fresh: bool) -> int:
    """Train from the newest checkpoint if there is one; return the exit status.

    Raises:
        ConfigError: a setting cannot be used, or the run folder holds another run.
    """
    config, ranks = task.config, join_ranks()
    directory = Path(config.run.dir or f"runs/{config.recipe}")
    loader = open_training(
        config, ranks, transform=task.transform, num_classes=task.num_classes, check_data=task.check_data
    )  # fmt: skip
    build_schedule(config, steps_per_epoch=loader.steps_per_epoch)  # refuses what cannot be, before anything is made
    names, lengths = loader.all_shards()
    data = TrainingData(names=names, lengths=lengths, steps_per_epoch=loader.steps_per_epoch)
    ranks.from_rank_0(lambda: check_boards(config), errors=(ConfigError,))
    with RunFolder(directory, ranks=ranks), log_into(directory / "run.log", rank=ranks.rank):
        start = choose_start(config, directory, fresh=fresh, ranks=ranks, data=data)
        boards: list[Board] = []
        ranks.from_rank_0(lambda: boards.extend(open_boards(config, directory)), errors=(ConfigError,))
        run = prepare(task, loader, ranks, directory=directory, start=start, boards=boards)
        status = EXIT_FAILED
        try:
            status = 0 if train(run, start_step=start.step) else EXIT_STOPPED
        except RuntimeError as error:
            reason = describe_lost_worker(error) or (str(error) if isinstance(error, RunFailedError) else "")
            if not reason:
                raise
            logger.error("the run has ended: %s", reason)
        finally:
            run.reporter.close(status)
        if status == 0 and ranks.rank == 0:
            task.close(directory, run.engine)
    return status


def prepare(
    task: Task, loader: TrainLoader, ranks: Ranks, *, directory: Path, start: Start, boards: Sequence[Board] = ()
) -> Run:
    """Build the parts of a run and bring them to where it starts."""
    config, checkpoint, meter = task.config, start.checkpoint, Meter()
    checks = read_adaptive_checks(checkpoint)
    frozen_layers = checkpoint.frozen_layers if checkpoint else 0  # no schedule freezes before its first step
    schedule = build_schedule(
        config, steps_per_epoch=start.memory.steps_per_epoch, events=checks, least_frozen=frozen_layers
    )  # fmt: skip
    model = task.build_model(is_new=checkpoint is None)
    engine = build_engine(config, ranks, frozen_layers=frozen_layers, model=model)
    state = RunState(config=config, engine=engine, schedule=schedule, meter=meter, memory=start.memory)
    if checkpoint:
        state.load(checkpoint)
    reporter = Reporter(
        directory, rank=ranks.rank, start_step=start.step, total_steps=schedule.total_steps,
        description=task.description, boards=boards,
    )  # fmt: skip
    start.report(reporter)
    return Run(
        task=task, config=config, directory=directory, loader=loader, schedule=schedule, engine=engine,
        reporter=reporter, meter=meter, state=state, steps_per_epoch=start.memory.steps_per_epoch,
    )  # fmt: skip


def train(run: Run, *, start_step: int) -> bool:
    """Take every step from `start_step` to the end of the run; return whether it got there, not asked to stop."""
    config, schedule, engine, total_steps = run.config, run.schedule, run.engine, run.schedule.total_steps
    saves = SaveSchedule(
        config.checkpoint.every, start_step=start_step, steps_per_epoch=run.steps_per_epoch,
        total_steps=total_steps,
    )  # fmt: skip
    guard = RunGuard(
        run.directory, config=config, engine=engine, reporter=run.reporter, saves=saves, total_steps=total_steps,
        save_state=run.state.save, keep_until=schedule.cooldown_start,
    )  # fmt: skip
    with guard:
        batches: Iterator[Batch] | None = None
        for step in range(start_step, total_steps):
            measure_change(run, step)
            now = schedule.at(step)
            froze, began = freeze_layers(run, now), begin_stage(run, now)
            if batches is None or froze or began:
                batches = feed(run, now, batches, froze=froze)
            engine.set_learning_rates(now.learning_rates)
            take_step(run, now, batches, guard)
            run.reporter.advance()

            done = step + 1
            evaluates = run.is_due(config.eval.every, done)
            shows = bool(run.task.picture) and run.is_due(config.run.show_every, done)
            logs = done % config.run.log_every_steps == 0 or done == total_steps
            if logs or evaluates or shows or now.ends_stage:
                figures = run.read_meter()
                run.log_metrics(now, figures, worth=run.evaluate() if evaluates else {})
            if shows:
                run.log_picture(done)
            run.log_epochs(done)
            if guard.end_step(done):  # saves when it is due
                return False
    return True


def measure_change(run: Run, step: int) -> None:
    """With freeze.mode adaptive: measure the layers when a check is due, and log what follows from it."""
    adaptive = run.schedule.adaptive
    if adaptive is not None and adaptive.is_check(step):
        changes = run.engine.layer_changes(run.config.freeze.adaptive_measure)
        run.reporter.log_event(**adaptive.record(step, changes=changes).to_event())


def freeze_layers(run: Run, now: ScheduledStep) -> bool:
    """Freeze what is due; its layers leave the engine. Return whether anything changed."""
    event = run.engine.freeze(now.frozen_layers, step=now.step)
    if event is None:
        return False
    heads = [unit.head for unit in run.schedule.units if unit.head is not None and unit.name in event.units]
    frozen = ", ".join(f"layer {layer}" for layer in event.layers) + "".join(f" with head {head}" for head in heads)
    message = (
        f"step {now.step}: froze {frozen or 'nothing new'}; {event.trainable_parameters:,} parameters still train, "
        f"optimizer state {format_bytes(event.optimizer_state_bytes)} a rank ({event.seconds:.2f} s)"
    )
    run.reporter.log_event("freeze", message=message, heads=heads, **asdict(event))
    run.meter.restart()
    return True


def begin_stage(run: Run, now: ScheduledStep) -> bool:
    """Log that images are treated otherwise from this step on; return whether they are."""
    images = now.images
    if now.step == 0 or now.step != images.first_step:
        return False
    before = asdict(run.schedule.curriculum.at(now.step - 1))
    changes = [f"{key} {value:g}" for key, value in asdict(images).items() if key in KEYS and value != before[key]]
    if images.shards != before["shards"]:
        changes.append(f"shards {', '.join(run.config.data.train_stages[images.shards][1])}")
    message = f"step {now.step}: {', '.join(changes) or 'nothing new'} from here on"
    run.reporter.log_event("stage", now.step, message=message, **asdict(images))
    run.meter.restart()
    return True


def feed(run: Run, now: ScheduledStep, batches: Iterator[Batch] | None, *, froze: bool) -> Iterator[Batch]:
    """Return the batches to go on with: in larger micro-batches if freezing or smaller images make room for them."""
    engine, schedule = run.engine, run.schedule

    @cache
    def fit(frozen_layers: int, images: ImageStage) -> tuple[int, int]:
        return fit_micro_batch(
            run.config, world_size=engine.world_size, frozen_layers=frozen_layers, images=images,
            precision=engine.settings.precision,
        )  # fmt: skip

    def shape_at(step: int) -> BatchShape:
        images = schedule.curriculum.at(step)
        micro_batch, _ = fit(schedule.frozen_layers(step), images)
        return BatchShape(images.img_size, micro_batch, images.shards)

    micro_batch, accumulation = fit(now.frozen_layers, now.images)
    if micro_batch != engine.micro_batch:
        engine.set_micro_batch(micro_batch, accumulation=accumulation)
        message = (
            f"step {now.step}: micro-batches of {micro_batch} images a rank from here on, {accumulation} to a step"
        )
        run.reporter.log_event(
            "micro_batch", now.step, message=message, micro_batch=micro_batch, accumulation=accumulation
        )
    # What adaptive freezing will free is not known when batches are ordered.
    surprised = froze and schedule.adaptive is not None and run.config.batch.grow_micro_batch
    if batches is not None and not surprised:
        return batches
    return run.loader.batches(now.step, schedule.total_steps, shape_at=shape_at, device=engine.device)


def take_step(run: Run, now: ScheduledStep, batches: Iterator[Batch], guard: RunGuard) -> None:
    """Take one optimizer step: forward and backward of every micro-batch, then the update."""
    engine, wait_seconds = run.engine, 0.0
    for number in range(engine.accumulation):
        batch = next(batches)
        loss, parts = run.task.forward(engine, batch, now=now, micro_batch=number)
        engine.backward(loss)
        engine.step()
        losses = {"loss": loss, **parts}
        run.meter.add_losses(losses)
        guard.losses.add(now.step + 1, keys=batch.keys, losses=losses)
        wait_seconds += batch.wait_seconds
    run.task.end_step(engine)
    run.meter.add_step(images=run.config.batch.global_size, wait_seconds=wait_seconds)
