"""The plan of a run: what freezing saves, predicted from counted operations or from measured steps. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vitfreeze.config import Config, ConfigError, check_task_is_clear, derive_accumulation, find_ds_config
from vitfreeze.curriculum import ImageStage, plain_stage
from vitfreeze.files import read_json
from vitfreeze.planner.authors import describe_authors
from vitfreeze.planner.costs import BYTES_OF_PRECISION, EncoderCosts, ModelCosts, costs_of
from vitfreeze.planner.growth import fit_micro_batch
from vitfreeze.planner.input import core_seconds_per_crop, find_stored_size
from vitfreeze.planner.measured import StepTimes, relative_cost
from vitfreeze.schedule import RunSchedule, build_schedule

IMAGENET_TRAIN_IMAGES = 1_281_167
# The authors' 48 hours on one V100 for 100 epochs of LocalMIM ViT-B, at 31.2 GFLOP an image in their code.
AUTHORS_TERAFLOPS = 23.2
DEFAULT_DS_CONFIG = "zero2_bf16"  # what a run takes on a GPU with bfloat16 when run.ds_config is empty


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the plan needs to know of the ranks and of DeepSpeed's settings."""

    world_size: int
    zero_stage: int
    precision: str  # of weights and activations: fp32, bf16 or fp16
    fp32_gradients: bool  # summed over micro-batches in float32
    clips: bool  # gradients by their norm
    source: str

    @property
    def state_bytes_per_parameter(self) -> int:
        """Two float32 moments, and a float32 master weight unless the weights themselves are that (stage 0, fp32)."""
        return 8 if self.zero_stage == 0 and self.precision == "fp32" else 12

    def partition(self, count: int) -> int:
        """Return how many parameters of a group the rank has that has most: ZeRO cuts it into even numbers of them."""
        if not self.zero_stage:
            return count
        return min(-(-count // (2 * self.world_size)) * 2, count)

    @property
    def gradient_bytes_per_parameter(self) -> int:
        """Bytes of one gradient element as it is summed over the ranks."""
        in_float32 = self.fp32_gradients and self.zero_stage == 1
        return 4 if in_float32 else BYTES_OF_PRECISION[self.precision]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of the run between two freezes or changes of the images. Bytes are those of the rank that holds most.

    `images_per_second` are those that one GPU trains, without communication; `input_cores` the cores of its host that
    make as many, None for fine-tuning, whose augmentation nobody has timed.
    """

    first_step: int
    end_step: int
    epoch: float
    share_of_run: float
    frozen_layers: int
    images: ImageStage
    layers_frozen_now: tuple[int, ...]
    heads_left: tuple[int, ...]
    trainable_parameters: int
    optimizer_state_bytes: int
    gradient_bytes_per_step: int
    communication_bytes_per_step: float
    micro_batch: int
    accumulation: int
    activation_bytes: float
    memory_bytes: float
    flops_per_image: float
    relative_cost: float
    step_ms: float
    images_per_second: float
    input_cores: float | None
    communication_ms: float | None

    @property
    def steps(self) -> int:
        """Number of optimizer steps of this stage."""
        return self.end_step - self.first_step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will cost and what freezing saves of it, against the same run without freezing.

    `saving` is the share of the compute time; `flops_saving` the share of the counted operations. They differ when
    the plan was given measured steps.
    """

    recipe: str
    model: str
    mode: str
    t_0: float
    how: str
    rates: str
    machine: Machine
    images_per_epoch: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    global_batch: int
    micro_batch: int
    accumulation: int
    stages: tuple[Stage, ...]
    timing: str
    gpu_hours: float
    gpu_hours_saved: float
    saving: float
    flops_saving: float
    peak_memory_bytes: float
    communication_saving: float | None
    bandwidth_gigabytes: float | None
    authors: str
    notes: tuple[str, ...]

    @property
    def plain_epochs(self) -> float:
        """Epochs without freezing and curriculum that the same GPU-hours buy: what a saving has to be held against."""
        return self.gpu_hours / (self.gpu_hours + self.gpu_hours_saved) * self.total_steps / self.steps_per_epoch

    @property
    def freezing(self) -> str:
        """How layers freeze, in words."""
        if self.mode != "schedule":
            return self.mode
        return f"t_0 {self.t_0:g}, {self.how}, {self.rates} rates"


def count_steps_per_epoch(config: Config, *, images_per_epoch: int) -> int:
    """Return the whole optimizer steps of one epoch; raises ConfigError if there is not one."""
    crops = images_per_epoch * config.data.crops_per_image
    if crops < config.batch.global_size:
        raise config.error("batch.global_size", f"at most one epoch, which has {crops} crops")
    return crops // config.batch.global_size


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps that all cost the same: as many layers are frozen, and images are treated alike."""

    first_step: int
    end_step: int
    frozen_before: int
    frozen_layers: int
    images: ImageStage


def cut_run(schedule: RunSchedule) -> tuple[Stretch, ...]:
    """Return the stretches of a run, in order."""
    frozen_from = {0: 0, **dict(schedule.prefix_changes())}
    borders = {stage.first_step for stage in schedule.curriculum.stages}
    firsts = sorted(step for step in {*frozen_from, *borders} if step < schedule.total_steps)
    stretches: list[Stretch] = []
    for first, end in zip(firsts, [*firsts[1:], schedule.total_steps], strict=True):
        before = stretches[-1].frozen_layers if stretches else 0
        stretches.append(
            Stretch(
                first_step=first, end_step=end, frozen_before=before, frozen_layers=frozen_from.get(first, before),
                images=schedule.curriculum.at(first),
            )
        )  # fmt: skip
    return tuple(stretches)


def step_time(
    config: Config, images: ImageStage, *, frozen_layers: int, times: StepTimes | None, teraflops: float
) -> tuple[float, float]:
    """Return the cost of an optimizer step relative to a plain one, and its milliseconds on a single GPU.

    Measured steps are those of plain images: a stage of the curriculum takes its counted share of them.
    """
    plain, flops = costs_of(config), costs_of(config, images).step_flops(frozen_layers)
    cost = relative_cost(frozen_layers, costs=plain, times=times) * (flops / plain.step_flops(frozen_layers))
    if times is None:
        return cost, 1e3 * flops * config.batch.global_size / (teraflops * 1e12)
    return cost, cost * times.ms_per_image * config.batch.global_size


def describe_timing(times: StepTimes | None, teraflops: float) -> str:
    """Say what the hours of a plan rest on."""
    if times is not None:
        return f"measured steps of {times.source}"
    origin = ", what the authors' V100 sustained" if teraflops == AUTHORS_TERAFLOPS else ""
    return f"counted operations at {teraflops:g} TFLOP/s per GPU{origin}"


def read_machine(config: Config, *, world_size: int) -> Machine:
    """Read ZeRO stage and precision from the DeepSpeed JSON of the run.

    Raises:
        ConfigError: there is no such file, it is not JSON, or its stage is not 0, 1 or 2.
    """
    if world_size < 1:
        raise ConfigError(f"the number of ranks is {world_size}, but it must be at least 1")
    path = find_ds_config(config.run.ds_config or DEFAULT_DS_CONFIG)
    try:
        content = read_json(path)
        parts = {key: content.get(key, {}) for key in ("zero_optimization", "fp16", "bf16", "data_types")}
        if not all(isinstance(part, dict) for part in parts.values()):
            raise ValueError(f"in {path}, {', '.join(parts)} must be objects")
    except (ValueError, AttributeError) as error:
        raise config.error("run.ds_config", f"a readable JSON file; {path} is not: {error}") from None
    stage = content.get("zero_optimization", {}).get("stage")
    if stage not in (0, 1, 2):
        raise config.error("run.ds_config", f"a file with ZeRO stage 0, 1 or 2, and this one has {stage!r}")
    precision = next((half for half in ("fp16", "bf16") if content.get(half, {}).get("enabled")), "fp32")
    accumulated = content.get("data_types", {}).get("grad_accum_dtype", precision)
    clip_grad = config.finetune.clip_grad
    return Machine(
        world_size=world_size, zero_stage=stage, precision=precision, source=path.name,
        fp32_gradients=precision != "fp32" and accumulated == "fp32",
        clips=bool(content.get("gradient_clipping") if clip_grad is None else clip_grad),
    )  # fmt: skip


def plan(
    config: Config,
    *,
    images_per_epoch: int = IMAGENET_TRAIN_IMAGES,
    steps_per_epoch: int | None = None,
    world_size: int = 1,
    times: StepTimes | None = None,
    teraflops: float = AUTHORS_TERAFLOPS,
    bandwidth_gigabytes: float | None = None,
    events: Sequence[dict[str, Any]] = (),
) -> Plan:
    """Predict a run from its settings alone.

    Args:
        config: the run.
        images_per_epoch: training images; steps_per_epoch overrides what follows from it.
        world_size: ranks.
        times: measured steps; without them a step takes its counted operations at `teraflops` per rank.
        teraflops: operations that one rank sustains, in units of 1e12 per second.
        bandwidth_gigabytes: GB/s through which a ring all-reduce enters and leaves a node, to predict communication.
        events: lines of events.jsonl, for what an adaptive run has frozen so far.

    Raises:
        ConfigError: settings that cannot be used, fewer images than one global batch, or settings of fine-tuning
            without run.task.
    """
    for name, value in (("the sustained TFLOP/s", teraflops), ("the bandwidth in GB/s", bandwidth_gigabytes)):
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} is {value}, but it must be a number above 0")
    check_task_is_clear(config)
    if times is not None and config.run.task == "finetune":
        raise ConfigError("measured steps are those of pre-training, and this recipe is for fine-tuning")
    if steps_per_epoch is None:
        steps_per_epoch = count_steps_per_epoch(config, images_per_epoch=images_per_epoch)
    schedule = build_schedule(config, steps_per_epoch=steps_per_epoch, events=events)
    return _Planner(
        config=config, schedule=schedule, costs=costs_of(config), times=times, teraflops=teraflops,
        machine=read_machine(config, world_size=world_size), bandwidth_gigabytes=bandwidth_gigabytes,
    ).build(images_per_epoch=images_per_epoch, steps_per_epoch=steps_per_epoch)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Planner:
    """The parts that a plan is computed from."""

    config: Config
    schedule: RunSchedule
    costs: EncoderCosts
    machine: Machine
    times: StepTimes | None
    teraflops: float
    bandwidth_gigabytes: float | None

    def build(self, *, images_per_epoch: int, steps_per_epoch: int) -> Plan:
        stages = tuple(self.stage(stretch, steps_per_epoch=steps_per_epoch) for stretch in cut_run(self.schedule))
        total = self.schedule.total_steps
        rank_hours = sum(stage.steps * stage.step_ms for stage in stages) / 3.6e6 * self.machine.world_size
        plain = self.costs.step_flops(0)
        plain_ms = self.step_time(plain_stage(self.config), 0)[1]
        spread = self.machine.world_size > 1
        micro, accumulation = derive_accumulation(self.config, world_size=self.machine.world_size)
        freeze = self.config.freeze
        return Plan(
            recipe=self.config.recipe, model=self.config.model.size, mode=freeze.mode, t_0=freeze.t_0, how=freeze.how,
            rates=self.config.rates, machine=self.machine, images_per_epoch=images_per_epoch,
            steps_per_epoch=steps_per_epoch, total_steps=total, warmup_steps=self.schedule.shared.warmup_steps,
            global_batch=self.config.batch.global_size, micro_batch=micro, accumulation=accumulation, stages=stages,
            timing=describe_timing(self.times, self.teraflops), gpu_hours=rank_hours,
            gpu_hours_saved=plain_ms * total / 3.6e6 * self.machine.world_size - rank_hours,
            saving=_saved_share(stages, lambda stage: stage.relative_cost, plain=1.0),
            flops_saving=_saved_share(stages, lambda stage: stage.flops_per_image, plain=plain),
            peak_memory_bytes=max(stage.memory_bytes for stage in stages),
            communication_saving=_saved_share(
                stages, lambda s: s.communication_bytes_per_step,
                plain=self.bytes_sent(self.reduced_bytes(self.costs.parameters, accumulation), self.costs.parameters),
            ) if spread else None,
            bandwidth_gigabytes=self.bandwidth_gigabytes, notes=self.notes(),
            authors=describe_authors(self.config) if images_per_epoch == IMAGENET_TRAIN_IMAGES else "",
        )  # fmt: skip

    def stage(self, stretch: Stretch, *, steps_per_epoch: int) -> Stage:
        machine, images, frozen, first = self.machine, stretch.images, stretch.frozen_layers, stretch.first_step
        costs = costs_of(self.config, images)
        micro, accumulation = fit_micro_batch(
            self.config, world_size=machine.world_size, frozen_layers=frozen, precision=machine.precision, images=images
        )  # fmt: skip
        groups = costs.trained_groups(frozen)
        trained = sum(groups)
        parts = machine.world_size if machine.zero_stage else 1
        state = sum(machine.partition(count) for count in groups) * machine.state_bytes_per_parameter
        gradients = self.reduced_bytes(trained, accumulation)
        sent = self.bytes_sent(gradients, trained)
        activations = micro * costs.activation_bytes(frozen, precision=machine.precision)
        kept = trained * machine.gradient_bytes_per_parameter // (parts if machine.zero_stage == 2 else 1)
        weights = costs.weight_bytes(machine.precision)
        cost, step_ms = self.step_time(images, frozen)
        speed = 1e3 * self.config.batch.global_size / machine.world_size / step_ms
        return Stage(
            first_step=first, end_step=stretch.end_step, epoch=first / steps_per_epoch,
            share_of_run=first / self.schedule.total_steps, frozen_layers=frozen, images=images,
            layers_frozen_now=tuple(range(stretch.frozen_before, frozen)), heads_left=costs.heads_left(frozen),
            trainable_parameters=trained, optimizer_state_bytes=state, gradient_bytes_per_step=gradients,
            communication_bytes_per_step=sent, micro_batch=micro, accumulation=accumulation,
            activation_bytes=activations,
            memory_bytes=weights + kept + state + activations, flops_per_image=costs.step_flops(frozen),
            relative_cost=cost, step_ms=step_ms, images_per_second=speed, input_cores=self.input_cores(speed, images),
            communication_ms=None if self.bandwidth_gigabytes is None else sent / self.bandwidth_gigabytes / 1e6,
        )  # fmt: skip

    def reduced_bytes(self, trained: int, accumulation: int) -> int:
        """Bytes of gradients that are summed over the ranks in a step; ZeRO stage 2 sums those of every micro-batch."""
        reductions = accumulation if self.machine.zero_stage == 2 else 1
        return trained * reductions * self.machine.gradient_bytes_per_parameter

    def bytes_sent(self, gradients: int, trained: int) -> float:
        """Bytes that a rank sends in a step: a ring all-reduce of gradients; under ZeRO an all-gather of weights."""
        world_size = self.machine.world_size
        gathered = trained * BYTES_OF_PRECISION[self.machine.precision] if self.machine.zero_stage else 0
        return (2 * gradients + gathered) * (world_size - 1) / world_size

    def step_time(self, images: ImageStage, frozen: int) -> tuple[float, float]:
        """Return the cost of an optimizer step relative to a plain one, and its milliseconds."""
        cost, milliseconds = step_time(
            self.config, images, frozen_layers=frozen, times=self.times, teraflops=self.teraflops
        )  # fmt: skip
        return cost, milliseconds / self.machine.world_size

    def input_cores(self, images_per_second: float, images: ImageStage) -> float | None:
        """Cores that make the images of one GPU, as far as their cost was measured."""
        if self.config.run.task == "finetune":
            return None
        data = self.config.data
        _, shards = data.train_stages[images.shards]
        return images_per_second * core_seconds_per_crop(
            img_size=images.img_size, crops_per_image=data.crops_per_image, stored_size=find_stored_size(shards)
        )

    def notes(self) -> tuple[str, ...]:
        notes = []
        freeze, costs = self.config.freeze, self.costs
        if self.schedule.adaptive is not None:
            every, floor = self.schedule.adaptive.check_every_steps, self.schedule.adaptive.floor_step
            share = 1 - -(-floor // every) * every / self.schedule.total_steps
            most = share * (1 - self.step_time(plain_stage(self.config), costs.size.depth)[0])
            notes.append(
                f"freeze.mode is adaptive: what freezes is measured in the run; at most {most:.1%} can be saved, "
                "if all layers but the last freeze at the floor"
            )
        if freeze.mode == "schedule" and not (freeze.cls_token and freeze.patch_embed):
            kept = [name for name in ("cls_token", "patch_embed") if not getattr(freeze, name)]
            notes.append(f"{' and '.join(kept)} never frozen, so the backward pass runs through the frozen blocks")
        if self.machine.clips and self.machine.zero_stage and self.machine.world_size > 1:
            notes.append(
                "gradients are clipped, so DeepSpeed handles them, parameter by parameter; with reduce_scatter false, "
                f"because a slice for each of {self.machine.world_size:,} ranks costs the host more"
            )
        if self.times is None and isinstance(costs, ModelCosts):
            notes.append(
                f"not counted: HOG targets ({costs.hog_operations / 1e6:.1f} M elementwise operations an image), "
                "norms, the optimizer, data; measure them with `vitfreeze bench step --json`"
            )
        elif self.times is None:
            notes.append("not counted: norms, the optimizer, augmentation and the cores it needs, validation")
        return tuple(notes)


def _saved_share(stages: Sequence[Stage], cost: Callable[[Stage], float], *, plain: float) -> float:
    """Return what is saved of a run all of whose steps cost what a plain one does."""
    spent = sum(stage.steps * cost(stage) for stage in stages)
    return 1 - spent / (sum(stage.steps for stage in stages) * plain)
