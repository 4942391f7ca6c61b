"""A recipe for many nodes tried on one CPU: its steps and drops as one rank of N, through torch's fake process group.

The engine, the drops, the schedule and the order of the samples are the run's own. What has to be smaller or otherwise
is said, in `Pretence.changes`. Losses mean nothing: nobody else adds to the sums.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfreeze.config import Config, choose_task, derive_accumulation, find_ds_config
from vitfreeze.curriculum import ImageStage
from vitfreeze.data import (
    BatchShape,
    EpochOrder,
    ShardError,
    TrainLoader,
    build_train_loader,
    count_training_images,
    find_places,
    normalize,
)
from vitfreeze.engine import CollectiveClock, FreezingEngine, join_fake_ranks
from vitfreeze.files import read_json
from vitfreeze.model import Classifier, LocalMIM
from vitfreeze.planner import Plan, Stage, costs_of, plan
from vitfreeze.planner.prediction import DEFAULT_DS_CONFIG, IMAGENET_TRAIN_IMAGES
from vitfreeze.ranks import Ranks
from vitfreeze.schedule import RunSchedule, build_schedule
from vitfreeze.training.build import build_classifier, build_engine, build_model

SHARD_SAMPLES = 10_000  # of the shards that are pretended where there are none
HOST_STEPS = 5  # of which the quickest counts


@dataclass(frozen=True, kw_only=True)
class HostTime:
    """Milliseconds of the host in one optimizer step, of a model whose kernels cost next to nothing.

    `stand_in` are those of the fake collectives, which are no part of the others: real ones leave the host to itself.
    """

    frozen_layers: int
    forward: float
    backward: float
    optimizer: float
    collectives: int
    stand_in: float

    @property
    def step(self) -> float:
        """All of them, without the fake collectives."""
        return self.forward + self.backward + self.optimizer


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """What a stage of the run was, and what the plan of the same precision says of it; bytes are this rank's.

    Attributes:
        state_bytes: of the optimizer, without padding; activation_bytes: of one image.
        samples: indices of the first images of this rank's first step in this stage.
        is_ordered: whether all ranks together get every sample of each tried step once, and this one what it should.
    """

    first_step: int
    frozen_layers: int
    micro_batch: int
    accumulation: int
    trainable: int
    held: int
    padding_bytes: int
    state_bytes: int
    planned_held: int
    planned_state_bytes: int
    gradient_elements: int
    planned_gradient_elements: int
    activation_bytes: float
    planned_activation_bytes: float
    drop_seconds: float
    step_seconds: float
    samples: tuple[int, ...]
    is_ordered: bool


@dataclass(frozen=True, kw_only=True)
class Pretence:
    """All that was found; `plan` is that of the recipe as it is."""

    recipe: str
    rank: int
    world_size: int
    changes: tuple[str, ...]
    plan: Plan
    stages: tuple[StageFacts, ...]
    host: tuple[HostTime, ...]


@dataclass(kw_only=True)
class _Samples:
    """Images of this rank, real or random, and the order of all."""

    config: Config
    ranks: Ranks
    loader: TrainLoader | None
    order: EpochOrder
    steps_per_epoch: int
    most: int  # images of a micro-batch that are computed
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def places(self, step: int, *, micro_batch: int, rank: int) -> list[tuple[int, range]]:
        return [
            *find_places(
                step, steps_per_epoch=self.steps_per_epoch, global_batch=self.config.batch.global_size,
                micro_batch=micro_batch, rank=rank, world_size=self.ranks.world_size,
            )
        ]  # fmt: skip

    def indices(self, step: int, *, micro_batch: int) -> list[int]:
        """Return the samples of this rank in a step."""
        crops, found = self.config.data.crops_per_image, list[int]()
        for epoch, places in self.places(step, micro_batch=micro_batch, rank=self.ranks.rank):
            first, last = places.start // crops, places.stop // crops
            found += [int(i) for i in self.order.indices(epoch, first, last) for _ in range(crops)]
        return found

    def covers_batch(self, step: int, *, micro_batch: int) -> bool:
        """Tell whether all ranks together have every place of the global batch once."""
        size = self.config.batch.global_size
        first = step % self.steps_per_epoch * size
        pieces = sorted(
            (places.start, places.stop)
            for rank in range(self.ranks.world_size)
            for _, places in self.places(step, micro_batch=micro_batch, rank=rank)
        )
        edges = [first, *(stop for _, stop in pieces)]
        return [start for start, _ in pieces] == edges[:-1] and edges[-1] == first + size

    def images(self, step: int, images: ImageStage, *, micro_batch: int, expected: Sequence[int]) -> Iterator[Tensor]:
        """Yield the pixels of every micro-batch of a step, as many images as are computed.

        Raises:
            ValueError: the loader gives other samples than the order says.
        """
        count = min(self.most, micro_batch)
        if self.loader is None:
            for _ in range(self.config.batch.global_size // (micro_batch * self.ranks.world_size)):
                yield torch.randn(count, 3, images.img_size, images.img_size, generator=self.generator)
            return
        given: list[int] = []
        shape = BatchShape(images.img_size, micro_batch, images.shards)
        for batch in self.loader.batches(step, step + 1, shape_at=lambda _: shape):
            given += batch.indices.tolist()
            yield normalize(batch.images[:count], colours=self.config.data.colours)
        if given != list(expected):
            raise ValueError(f"the loader gave samples {given[:4]}... in step {step}, expected {expected[:4]}...")


def pretend(config: Config, *, world_size: int, rank: int = 0, images: int = 2, steps: int = 2) -> Pretence:
    """Take the first steps of every stage of a recipe, of either task, as one rank of `world_size`.

    Args:
        config: the run.
        world_size, rank: of how many this process is which.
        images: of a micro-batch that are computed; the rest only count.
        steps: in each stage.

    Raises:
        ConfigError: a setting cannot be used, or the global batch does not divide by the ranks.
        ClusterError: there is no such rank, or a launcher started this process.
        ValueError: no rank, image or step.
    """
    for name, value in (("the number of ranks", world_size), ("images", images), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    config = choose_task(config, config.run.task)
    derive_accumulation(config, world_size=world_size)
    ranks = join_fake_ranks(rank=rank, world_size=world_size)
    found = count_training_images(config) or IMAGENET_TRAIN_IMAGES
    as_it_is = plan(config, world_size=world_size, images_per_epoch=found)
    with tempfile.TemporaryDirectory() as folder:
        here, changes = suit_cpu(config, Path(folder))
        samples, words = open_samples(here, ranks, images_per_epoch=found, most=images)
        planned = plan(here, world_size=world_size, images_per_epoch=samples.order.num_samples)
        schedule = build_schedule(here, steps_per_epoch=samples.steps_per_epoch)
        engine = _open_engine(here, ranks)
        stages = tuple(_try_stage(engine, schedule, samples, stage, steps=steps) for stage in planned.stages)
        engine.destroy()
        narrow = narrow_model(here)
        host = tuple(measure_host(narrow, ranks, [0, planned.stages[-1].frozen_layers]))
    changes += [
        words,
        *([f"{images} of the {planned.micro_batch} images of a micro-batch"] if images < planned.micro_batch else []),
        f"{steps} steps at the beginning of each of {len(stages)} stages, of {planned.total_steps:,} in all",
        f"the host's time on a model as deep, {narrow.model.embed_dim} wide, whose kernels cost next to nothing",
    ]
    return Pretence(
        recipe=config.recipe, rank=rank, world_size=world_size, changes=tuple(changes), plan=as_it_is, stages=stages,
        host=host,
    )  # fmt: skip


def suit_cpu(config: Config, folder: Path) -> tuple[Config, list[str]]:
    """Return the settings with which a CPU can compute the same run, and what is other about them."""
    path = find_ds_config(config.run.ds_config or DEFAULT_DS_CONFIG)
    content, changes = read_json(path), []
    precision = next((half for half in ("fp16", "bf16") if content.get(half, {}).get("enabled")), "")
    for key in ("fp16", "bf16", "data_types"):
        content.pop(key, None)
    if precision:
        changes.append(f"fp32 in place of {precision} ({path.name}), in which products crawl on a CPU")
    if config.model.compile:
        changes.append("not compiled")
    if config.run.task == "finetune":
        changes.append("images as for pre-training, neither augmented nor mixed, and one label for all")
    single = folder / path.name
    single.write_text(json.dumps(content))
    return replace(
        config,
        run=replace(config.run, ds_config=str(single)),
        model=replace(config.model, compile=False),
        freeze=replace(config.freeze, prefix_precision="auto"),
        data=replace(config.data, workers=0),
    ), changes


def _open_engine(config: Config, ranks: Ranks) -> FreezingEngine:
    """Return the engine of the task, with weights that were not trained."""
    model = build_classifier(config) if config.run.task == "finetune" else build_model(config)
    return build_engine(config, ranks, frozen_layers=0, model=model)


def _ask_model(model: LocalMIM | Classifier, images: ImageStage, *, count: int) -> dict[str, Any]:
    """Return what the model is given beside its images."""
    if isinstance(model, Classifier):
        return {"targets": torch.zeros(count, dtype=torch.long)}
    return {"mask_ratio": images.mask_ratio, "decoded_share": images.decoded_share}


def open_samples(config: Config, ranks: Ranks, *, images_per_epoch: int, most: int) -> tuple[_Samples, str]:
    """Return the images of a rank, of the shards if they are here or else random, and in words which they are."""
    why = "data.train names no shards"
    if config.data.train:
        try:
            loader = build_train_loader(config, rank=ranks.rank, world_size=ranks.world_size)
        except ShardError as error:
            why = f"data.train cannot be read here ({error})"
        else:
            order = EpochOrder(loader.lengths, seed=config.run.seed)
            samples = _Samples(
                config=config, ranks=ranks, loader=loader, order=order, steps_per_epoch=loader.steps_per_epoch,
                most=most,
            )  # fmt: skip
            return samples, f"images of data.train, {loader.num_samples:,} in {len(loader.lengths)} shards"
    full, rest = divmod(images_per_epoch, SHARD_SAMPLES)
    lengths = [SHARD_SAMPLES] * full + [rest] * (rest > 0)
    steps_per_epoch = images_per_epoch * config.data.crops_per_image // config.batch.global_size
    order = EpochOrder(lengths, seed=config.run.seed)
    samples = _Samples(
        config=config, ranks=ranks, loader=None, order=order, steps_per_epoch=steps_per_epoch, most=most
    )  # fmt: skip
    return samples, f"random pixels, because {why}; the order is that of {images_per_epoch:,} in {len(lengths)} shards"


def _try_stage(
    engine: FreezingEngine, schedule: RunSchedule, samples: _Samples, stage: Stage, *, steps: int
) -> StageFacts:
    """Freeze what is due, take steps, and hold what this rank then has against the plan."""
    first, drop_seconds, ordered, begun = stage.first_step, 0.0, True, list[int]()
    if stage.micro_batch != engine.micro_batch:
        engine.set_micro_batch(stage.micro_batch, accumulation=stage.accumulation)
    seconds: list[float] = []
    for step in range(first, min(first + steps, stage.end_step)):
        now = schedule.at(step)
        event = engine.freeze(now.frozen_layers, step=step)
        drop_seconds += event.seconds if event is not None else 0.0
        engine.set_learning_rates(now.learning_rates)
        expected = samples.indices(step, micro_batch=stage.micro_batch)
        ordered = ordered and samples.covers_batch(step, micro_batch=stage.micro_batch)
        begun = begun or expected
        pixels = [*samples.images(step, now.images, micro_batch=stage.micro_batch, expected=expected)]
        seconds.append(sum(_take_step(engine, pixels, now.images)))
    return _hold_against_plan(
        engine, samples.config, stage, drop_seconds=drop_seconds, step_seconds=min(seconds), samples=tuple(begun[:4]),
        is_ordered=ordered,
    )  # fmt: skip


def _hold_against_plan(engine: FreezingEngine, config: Config, stage: Stage, **facts: Any) -> StageFacts:
    """Return what this rank has in a stage, what the plan says of it, and the facts that are known already."""
    state_bytes = engine.optimizer_state_bytes()
    per_parameter = 12 if engine.settings.stage else 8  # fp32: stage 0 has no other master weights than the model's
    activations = costs_of(config, stage.images).activation_bytes(stage.frozen_layers, precision="fp32")
    return StageFacts(
        first_step=stage.first_step,
        frozen_layers=stage.frozen_layers,
        micro_batch=engine.micro_batch,
        accumulation=engine.accumulation,
        trainable=engine.trainable_parameters,
        held=state_bytes // per_parameter,
        planned_held=stage.optimizer_state_bytes // per_parameter,
        padding_bytes=engine.optimizer_state_padding_bytes(),
        state_bytes=state_bytes,
        planned_state_bytes=stage.optimizer_state_bytes,
        gradient_elements=engine.gradient_elements(),
        planned_gradient_elements=stage.gradient_bytes_per_step // 4,
        activation_bytes=measure_activations(engine, stage.images),
        planned_activation_bytes=activations,
        **facts,
    )


def _take_step(engine: FreezingEngine, pixels: Sequence[Tensor], images: ImageStage) -> tuple[float, float, float]:
    """Take one optimizer step; return the seconds of forward passes, backward passes and the optimizer."""
    marks = [time.perf_counter()]
    for batch in pixels:
        loss = engine(batch, **_ask_model(engine.module, images, count=len(batch))).loss
        marks.append(time.perf_counter())
        engine.backward(loss)
        marks.append(time.perf_counter())
        engine.step()
        marks.append(time.perf_counter())
    seconds = [end - begin for begin, end in itertools.pairwise(marks)]
    return sum(seconds[::3]), sum(seconds[1::3]), sum(seconds[2::3])


def measure_activations(engine: FreezingEngine, images: ImageStage) -> float:
    """Return the bytes that autograd keeps of one more image, without parameters."""
    model: LocalMIM | Classifier = engine.module
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def kept_bytes(count: int) -> int:
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        pixels = torch.zeros(count, 3, images.img_size, images.img_size)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            asked = _ask_model(model, images, count=count)
            output = model(pixels, frozen_layers=engine.frozen_layers, **asked)
        assert output.loss.requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    return kept_bytes(3) - kept_bytes(2)  # a batch of one shares what larger ones copy


def narrow_model(config: Config) -> Config:
    """Return the settings of a model as deep and with as many parameters to its name, each of them small."""
    size = config.model.resolve()
    narrow = replace(config.model, embed_dim=4 * size.num_heads, decoder_embed_dim=4 * size.decoder_num_heads)
    return replace(config, model=narrow, freeze=replace(config.freeze, min_steps_between_drops=0))


def measure_host(config: Config, ranks: Ranks, frozen_layers: Sequence[int]) -> Iterator[HostTime]:
    """Yield the host's time in a step with so many frozen layers, as they freeze."""
    engine = _open_engine(config, ranks)
    engine.set_learning_rates(dict.fromkeys(engine.unit_names, 1e-4))
    side = config.model.img_size
    images = ImageStage(first_step=0, img_size=side, mask_ratio=config.model.mask_ratio, decoded_share=1.0)
    pixels = [torch.randn(1, 3, side, side)] * engine.accumulation
    for number, frozen in enumerate(dict.fromkeys(frozen_layers)):
        engine.freeze(frozen, step=number)
        forward, backward, optimizer = min((_take_step(engine, pixels, images) for _ in range(HOST_STEPS)), key=sum)
        with CollectiveClock() as clock:
            _take_step(engine, pixels, images)
        yield HostTime(
            frozen_layers=frozen, forward=1e3 * forward, backward=1e3 * backward,
            optimizer=max(1e3 * (optimizer - clock.seconds), 0.0), collectives=clock.count,
            stand_in=1e3 * clock.seconds,
        )  # fmt: skip
    engine.destroy()
