"""Pre-training: everything that happens at a step, in the order in which it happens.

A run is a function of its step. Sample order, crops, masks, learning rates and the set of frozen layers are computed
from (config, step); only weights and optimizer state are loaded on resume.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vitfreeze.architecture import HEAD_SCALES
from vitfreeze.checkpoint import RunFolder, choose_start, load_checkpoint, save_checkpoint
from vitfreeze.closing import close_run
from vitfreeze.config import Config, derive_accumulation
from vitfreeze.data import Batch, TrainLoader, normalize
from vitfreeze.engine import FreezingEngine, Processes, join_processes
from vitfreeze.model import LocalMIM
from vitfreeze.report import Meter, Reporter, format_bytes, read_json_lines
from vitfreeze.schedule import RunSchedule, build_schedule

logger = logging.getLogger("vitfreeze")
DS_CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parts that the loop works with."""

    config: Config
    directory: Path
    loader: TrainLoader
    schedule: RunSchedule
    engine: FreezingEngine
    reporter: Reporter


def pretrain(config: Config, *, fresh: bool = False) -> int:
    """Pre-train as `config` says, from the newest checkpoint if there is one; return the exit status.

    Raises:
        ConfigError: a setting cannot be used, or the run folder holds another run.
    """
    processes = join_processes()
    directory = Path(config.run.dir or f"runs/{config.recipe}")
    loader = build_loader(config, processes)
    with RunFolder(directory, processes=processes):
        start = choose_start(config, directory, fresh=fresh, processes=processes)
        logger.info(start.reason)
        start_step = start.checkpoint.step if start.checkpoint else 0
        events = read_json_lines(directory / "events.jsonl")
        schedule = build_schedule(config, steps_per_epoch=loader.steps_per_epoch, events=events)
        engine = build_engine(config, processes, frozen_layers=schedule.frozen_layers(start_step))
        if start.checkpoint:
            load_checkpoint(start.checkpoint, engine)
        reporter = Reporter(directory, rank=processes.rank, start_step=start_step, total_steps=schedule.total_steps)
        train(
            Run(config=config, directory=directory, loader=loader, schedule=schedule, engine=engine, reporter=reporter),
            start_step=start_step,
        )
        reporter.close()
        if processes.rank == 0:
            close_run(config, directory, model=engine.module, fresh_model=build_model(config))
    return 0


def train(run: Run, *, start_step: int) -> None:
    """Take every step from `start_step` to the end of the run."""
    config, schedule, engine, reporter = run.config, run.schedule, run.engine, run.reporter
    meter = Meter()
    batches = run.loader.batches(start_step, schedule.total_steps)
    save_every = config.checkpoint.every.to_steps(
        steps_per_epoch=run.loader.steps_per_epoch, total_steps=schedule.total_steps
    )
    for step in range(start_step, schedule.total_steps):
        freeze_layers(run, step, meter)
        engine.set_learning_rates(schedule.learning_rates(step))
        take_step(run, step, batches, meter)
        reporter.advance()

        done = step + 1
        last = done == schedule.total_steps
        freezes_next = not last and schedule.frozen_layers(done) != schedule.frozen_layers(step)
        if done % config.run.log_every_steps == 0 or freezes_next or last:
            log_metrics(run, step, meter)
        if done % save_every == 0 or last:
            save_checkpoint(
                run.directory,
                step=done,
                engine=engine,
                config=config,
                keep=config.checkpoint.keep,
                extra={"total_steps": schedule.total_steps},
            )
            meter.restart()


def freeze_layers(run: Run, step: int, meter: Meter) -> None:
    """Freeze what the schedule freezes at this step; its layers leave the engine."""
    event = run.engine.freeze(run.schedule.frozen_layers(step), step=step)
    if event is None:
        return
    frozen = ", ".join(f"layer {layer}" for layer in event.layers) + "".join(f" with head {h}" for h in event.heads)
    message = (
        f"step {step}: froze {frozen or 'nothing new'}; {event.trainable_parameters:,} parameters still train, "
        f"optimizer state {format_bytes(event.optimizer_state_bytes)} a rank ({event.seconds:.2f} s)"
    )
    run.reporter.log_event("freeze", message=message, **asdict(event))
    meter.restart()


def take_step(run: Run, step: int, batches: Iterator[Batch], meter: Meter) -> None:
    """Take one optimizer step: forward and backward of every micro-batch, then the update."""
    engine, schedule = run.engine, run.schedule
    heads = schedule.active_heads(step)
    wait_seconds = 0.0
    for _ in range(engine.accumulation):
        batch = next(batches)
        images = normalize(batch.images.to(engine.device, non_blocking=True))
        output = engine(
            images,
            noise=batch.noise.to(engine.device, non_blocking=True),
            frozen_layers=schedule.frozen_layers(step),
            scale_weights=schedule.scale_weights(step),
        )
        engine.backward(output.loss)
        engine.step()
        parts = {f"{HEAD_SCALES[head]:g}": loss for head, loss in zip(heads, output.losses, strict=True)}
        meter.add_losses({"loss": output.loss, **parts})
        wait_seconds += batch.wait_seconds
    meter.add_step(images=run.config.batch.global_size, wait_seconds=wait_seconds)


def log_metrics(run: Run, step: int, meter: Meter) -> None:
    """Write what the last steps measured; every rank takes part, rank 0 writes."""
    engine = run.engine
    run.reporter.log_metrics(
        step + 1,
        epoch=(step + 1) / run.loader.steps_per_epoch,
        **meter.read(engine.mean_over_ranks),
        lr=run.schedule.learning_rates(step),
        frozen_layers=run.schedule.frozen_layers(step),
        optimizer_state_bytes=engine.optimizer_state_bytes(),
        gradient_elements=engine.gradient_elements(),
        loss_scale=engine.loss_scale,
        skipped_steps=engine.skipped_steps,
    )


def build_loader(config: Config, processes: Processes) -> TrainLoader:
    """Open the training shards."""
    if not config.data.train:
        raise config.error("data.train", "a folder of shards, a brace pattern or URLs; make shards with data_prep")
    micro_batch, _ = derive_accumulation(config, world_size=processes.world_size)
    data = config.data
    return TrainLoader(
        data.train,
        img_size=config.model.img_size,
        num_patches=(config.model.img_size // config.model.resolve().patch_size) ** 2,
        global_batch=config.batch.global_size,
        micro_batch=micro_batch,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.run.seed,
        workers=data.workers,
        prefetch=data.prefetch,
        crops_per_image=data.crops_per_image,
        crop_scale=(data.crop_scale[0], data.crop_scale[1]),
        max_bad_fraction=data.max_bad_fraction,
        allow_pipe=data.allow_pipe,
        cache_dir=data.cache_dir or None,
        cache_gigabytes=data.cache_gigabytes,
    )


def build_model(config: Config) -> LocalMIM:
    """Build the model with the weights that the seed gives."""
    torch.manual_seed(config.run.seed)
    model = LocalMIM(
        **asdict(config.model.resolve()),
        img_size=config.model.img_size,
        hog_nbins=config.model.hog_nbins,
        hog_bias=config.model.hog_bias,
        hog_bias_seed=config.run.seed,
        mask_ratio=config.model.mask_ratio,
        freeze_cls_token=config.freeze.cls_token,
        freeze_patch_embed=config.freeze.patch_embed,
        activation_checkpointing=config.model.activation_checkpointing,
    )
    if config.model.compile:
        model.compile_parts()
    return model


def build_engine(config: Config, processes: Processes, *, frozen_layers: int) -> FreezingEngine:
    """Wrap a new model in the DeepSpeed engine, with the first `frozen_layers` layers frozen already."""
    micro_batch, accumulation = derive_accumulation(config, world_size=processes.world_size)
    return FreezingEngine(
        build_model(config),
        ds_config=find_ds_config(config, processes.device),
        micro_batch=micro_batch,
        accumulation=accumulation,
        frozen_layers=frozen_layers,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        min_steps_between_drops=config.freeze.min_steps_between_drops,
        prefix_precision=config.freeze.prefix_precision,
    )


def find_ds_config(config: Config, device: torch.device) -> Path:
    """Return the DeepSpeed JSON: a path, a name in ds_configs/, or ZeRO-1 in the best precision of the device."""
    name = config.run.ds_config
    if not name:
        name = "cpu" if device.type == "cpu" else "zero1_bf16" if torch.cuda.is_bf16_supported(False) else "zero1_fp16"
    path = Path(name) if name.endswith(".json") else DS_CONFIG_FOLDER / f"{name}.json"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in DS_CONFIG_FOLDER.glob("*.json")))
        raise config.error("run.ds_config", f"a .json file that exists, or one of {names}")
    return path
