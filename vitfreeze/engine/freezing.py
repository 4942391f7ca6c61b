"""Training on DeepSpeed with layers that leave: the engine whose parameter groups implement FreezeOut.

Setting requires_grad = False is not enough under ZeRO: frozen weights go on moving with Adam's momentum and weight
decay, and keep their optimizer state and their share of the all-gather. Here a layer leaves in two movements:

It freezes at once: its groups get learning rate 0 and weight decay 0, its parameters need no gradient. Its weights
    do not change by one bit from here on.
It is dropped at the same step boundary, or a little later together with others: its groups leave the optimizer, and
    with them its moments, its master weights, its gradient traffic and its share of the optimizer step. The state of
    the groups that stay is carried over exactly, so the run goes on as if nothing had happened.
"""

from __future__ import annotations

import gc
import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vitfreeze.architecture import count_layers
from vitfreeze.config import ConfigError, FreezeConfig, OptimConfig, check_argument
from vitfreeze.engine.change import ChangeMeter
from vitfreeze.engine.launch import check_version, join_ranks
from vitfreeze.engine.session import EngineSession, OptimizerStates
from vitfreeze.engine.settings import read_settings
from vitfreeze.engine.slices import GroupState, SliceReader
from vitfreeze.engine.units import GroupPlan, find_frozen_modules, plan_groups

log = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class FreezeEvent:
    """What one call of `freeze` did."""

    step: int
    layers: tuple[int, ...]  # layers that froze now
    units: tuple[str, ...]  # units that ended their training now, with those layers
    dropped: tuple[str, ...]  # units whose optimizer state left now; those not yet dropped follow later
    seconds: float
    trainable_parameters: int
    optimizer_state_bytes: int  # of this rank, without padding


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """All that a checkpoint needs beside the weights of the model; made of views, so copy before the next step."""

    groups: Mapping[str, GroupState]
    scalars: Mapping[str, Any]
    frozen_masters: Mapping[str, Tensor]  # on rank 0: fp32 weights of frozen parameters, as far as they are known


class FreezingEngine(Generic[ModelT]):
    """A DeepSpeed engine whose frozen layers are gone: ZeRO stage 0, 1 or 2 in fp32, bf16 or (1 and 2) fp16.

    Use it like DeepSpeed's own: call it, `backward`, `step`, once per micro-batch; `set_learning_rates` before the
    first micro-batch of every optimizer step, and `freeze` between optimizer steps, on all ranks alike.

    Args:
        model: its forward pass may take `frozen_layers`, which the engine then gives it.
        ds_config: DeepSpeed's JSON as a path or its content: precision, ZeRO stage, communication.
        micro_batch: images per rank and micro-batch.
        accumulation: micro-batches per optimizer step.
        units: a name and the prefixes of its parameters for each unit, first to freeze first; unit i freezes as layer
            i. What no prefix matches is the unit `rest`, which trains to the end. By default the model's own. Tied
            weights train as long as the last unit that names them.
        frozen_layers: layers that are frozen from the start; they never get optimizer state.
        betas, eps, weight_decay: of AdamW; no decay on biases and other 1-d parameters.
        min_steps_between_drops: layers that freeze within so many steps of a drop wait for the next one.
        prefix_precision: precision of frozen layers when the others train in fp32, for models that take
            `frozen_layers`: auto is half on a GPU and fp32 on a CPU. Runs that train in half precision, and models
            that cannot know where the prefix ends, keep their own.
        eval_frozen_units: put modules to eval() when all their parameters are frozen: dropout ends there, and running
            statistics of batch norms stand still.

    Raises:
        ConfigError: the DeepSpeed configuration or a precision cannot be used.
        ValueError: nothing is left to train, or units that do not fit the model: see `assign_units`.
    """

    def __init__(
        self,
        model: ModelT,
        *,
        ds_config: Mapping[str, Any] | str | Path,
        micro_batch: int,
        accumulation: int = 1,
        units: Mapping[str, Sequence[str]] | None = None,
        frozen_layers: int = 0,
        betas: tuple[float, ...] = OptimConfig.betas,
        eps: float = OptimConfig.eps,
        weight_decay: float = OptimConfig.weight_decay,
        min_steps_between_drops: int = FreezeConfig.min_steps_between_drops,
        prefix_precision: str = FreezeConfig.prefix_precision,
        eval_frozen_units: bool = False,
    ) -> None:
        check_version()
        self.settings = read_settings(ds_config)
        if accumulation > 1 and self.settings.precision == "bf16" and not self.settings.sums_in_fp32:
            log.warning(
                "%s: gradients of %d micro-batches are summed in bf16, which keeps 8 bits; stage 2 with "
                "data_types.grad_accum_dtype fp32 sums them in fp32",
                self.settings.source,
                accumulation,
            )
        self.ranks = join_ranks()
        self.module: ModelT = model.to(self.device)
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self._adam = {"betas": tuple(betas), "eps": eps}
        self._weight_decay = weight_decay
        self._min_steps_between_drops = min_steps_between_drops
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._plans = plan_groups(model, units)
        self._num_layers = count_layers(plan.unit for plan in self._plans)
        self._takes_prefix = "frozen_layers" in inspect.signature(model.forward).parameters
        self._prefix_dtype = self._choose_prefix_dtype(prefix_precision)
        self.frozen_layers = 0
        self._frozen_masters: dict[str, Tensor] = {}
        self._rates_are_set = False
        self._micro_step = 0
        self._last_drop_step: int | None = None
        self._loss: Tensor | None = None
        self._change_meter: ChangeMeter | None = None
        self._eval_frozen_units = eval_frozen_units
        self._frozen_modules: tuple[nn.Module, ...] = ()
        if frozen_layers:
            self._check_prefix(frozen_layers)
            self._keep_masters_of_weights(self._mark_frozen(frozen_layers))
            self._convert_prefix()
        self._live = self._initialize()

    # -- what a training loop needs every step -------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.ranks.device

    @property
    def rank(self) -> int:
        """Number of this process."""
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.ranks.world_size

    @property
    def dtype(self) -> torch.dtype:
        """Precision in which the layers that train compute."""
        return DTYPES[self.settings.precision]

    @property
    def is_boundary(self) -> bool:
        """Whether the current micro-batch is the last of its optimizer step."""
        return self._micro_step == self.accumulation - 1

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of the units that train, the last to freeze first."""
        return tuple(dict.fromkeys(plan.unit.name for plan in self._trained_plans()))

    def set_learning_rates(self, rates: Mapping[str, float]) -> None:
        """Set the learning rate of every unit that trains, by unit name; rates of frozen units stay 0.

        Raises:
            ValueError: a unit that trains has no rate, or there is no unit of that name.
        """
        strange = rates.keys() - {plan.unit.name for plan in self._plans}
        if strange:
            raise ValueError(
                f"a learning rate for {min(strange)}, which is no unit; units that train: {', '.join(self.unit_names)}"
            )
        for plan, group in self._live.groups():
            if plan.unit.trains(self.frozen_layers):
                if plan.unit.name not in rates:
                    raise ValueError(f"no learning rate for {plan.unit.name}, which trains; rates: {', '.join(rates)}")
                group["lr"] = rates[plan.unit.name]
        self._rates_are_set = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on one micro-batch and return its output; a model that takes `frozen_layers` is given it."""
        if self._takes_prefix:
            kwargs["frozen_layers"] = self.frozen_layers
        for module in self._frozen_modules:
            if module.training:  # again, when the caller has put the whole model to train()
                module.eval()
        self._live.engine.set_gradient_accumulation_boundary(self.is_boundary)
        self._loss, output = self._live.engine(*args, **kwargs)
        return output

    __call__ = forward

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of the last output's loss, averaged over the micro-batches of the step.

        Raises:
            ValueError: it is another tensor; DeepSpeed's bookkeeping hangs on the model's own loss.
        """
        if loss is not self._loss:
            raise ValueError("backward takes the `loss` of the last output, as it is")
        self._loss = None
        self._live.engine.backward(loss)

    def step(self) -> bool:
        """End the micro-batch; at the last one of a step, update the weights. Return whether it was the last.

        Raises:
            RuntimeError: learning rates were never set.
        """
        if not self._rates_are_set:
            raise RuntimeError("set_learning_rates must be called before the first step")
        boundary = self.is_boundary
        self._live.engine.step()
        self._micro_step = 0 if boundary else self._micro_step + 1
        return boundary

    def set_micro_batch(self, micro_batch: int, *, accumulation: int) -> None:
        """Cut the same global batch into other micro-batches from the next optimizer step on.

        Raises:
            ValueError: the global batch would change, or a step is under way.
        """
        self._check_boundary("the micro-batch changes")
        if micro_batch * accumulation != self.micro_batch * self.accumulation:
            raise ValueError(
                f"micro-batch {micro_batch} x accumulation {accumulation} = {micro_batch * accumulation} images per "
                f"rank, but the global batch needs {self.micro_batch} x {self.accumulation}"
            )
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self._live.engine.set_train_micro_batch_size(micro_batch)
        self._live.engine.set_train_batch_size(micro_batch * accumulation * self.world_size)

    # -- freezing ------------------------------------------------------------------------------------------------

    def freeze(self, frozen_layers: int, *, step: int) -> FreezeEvent | None:
        """Freeze the first `frozen_layers` layers from optimizer step `step` on; drop them now or when it is due.

        Call it at the start of every optimizer step: it does nothing, and returns None, when nothing changes.

        Raises:
            ValueError: the prefix would shrink or hold every layer, a step is under way, or ranks disagree.
        """
        newly_frozen = range(self.frozen_layers, frozen_layers)
        if frozen_layers != self.frozen_layers:
            self._check_prefix(frozen_layers)
            self._check_boundary("layers freeze")
        started = time.perf_counter()
        units_before = self.unit_names
        if newly_frozen:
            self._agree(frozen_layers)
            self._soft_freeze(frozen_layers)
        waiting = [plan for plan in self._live.plans if not plan.unit.trains(frozen_layers)]
        dropped: list[str] = []
        if waiting and self._drop_is_due(step):
            self._check_boundary("layers are dropped")
            self._reinitialize()
            self._last_drop_step = step
            dropped = [plan.unit.name for plan in waiting]
        if not newly_frozen and not dropped:
            return None
        self.synchronize()
        return FreezeEvent(
            step=step,
            layers=tuple(newly_frozen),
            units=tuple(name for name in units_before if name not in self.unit_names),
            dropped=tuple(dict.fromkeys(dropped)),
            seconds=time.perf_counter() - started,
            trainable_parameters=self.trainable_parameters,
            optimizer_state_bytes=self.optimizer_state_bytes(),
        )

    def _check_prefix(self, frozen_layers: int) -> None:
        if frozen_layers < self.frozen_layers:
            raise ValueError(f"{frozen_layers} frozen layers, but {self.frozen_layers} are frozen for good")
        if frozen_layers > self._num_layers:
            raise ValueError(f"{frozen_layers} frozen layers, but there are {self._num_layers} that can freeze")
        if not any(plan.unit.trains(frozen_layers) and not plan.unit.feeds_layers for plan in self._plans):
            raise ValueError(
                f"{frozen_layers} frozen layers are all {self._num_layers}: at least the last must train, "
                "because nothing would be left to learn"
            )

    def _check_boundary(self, what: str) -> None:
        if self._micro_step:
            raise ValueError(
                f"{what} only between optimizer steps, not after micro-batch {self._micro_step} of {self.accumulation}"
            )

    def _agree(self, frozen_layers: int) -> None:
        everyone = self.ranks.gather(frozen_layers)
        if len(set(everyone)) > 1:
            raise ValueError(
                f"ranks disagree: between {min(everyone)} and {max(everyone)} frozen layers, here {frozen_layers}"
            )

    def _drop_is_due(self, step: int) -> bool:
        return self._last_drop_step is None or step - self._last_drop_step >= self._min_steps_between_drops

    def _trained_plans(self) -> tuple[GroupPlan, ...]:
        return tuple(plan for plan in self._plans if plan.unit.trains(self.frozen_layers))

    def _mark_frozen(self, frozen_layers: int) -> list[GroupPlan]:
        """Set the prefix, stop its gradients, and return the groups that are newly frozen."""
        before = self._trained_plans()
        self.frozen_layers = frozen_layers
        newly = [plan for plan in before if not plan.unit.trains(frozen_layers)]
        for plan in newly:
            for name in plan.parameter_names:
                self._parameters[name].requires_grad_(False)
                self._parameters[name].grad = None
        if self._eval_frozen_units:
            self._frozen_modules = tuple(find_frozen_modules(self.module))
        return newly

    def _soft_freeze(self, frozen_layers: int) -> None:
        newly = self._mark_frozen(frozen_layers)
        for plan, group in self._live.groups():
            if plan in newly:
                group["lr"] = group["weight_decay"] = 0.0
        if self.dtype == torch.float32:
            self._keep_masters_of_weights(newly)
        else:
            for plan, group in self._live.groups():
                if plan in newly:
                    self._gather_masters(plan, group)

    def _reinitialize(self) -> None:
        """Drop frozen groups: end this DeepSpeed engine, begin one without them, hand over the state of the rest."""
        rates = {plan.name: group["lr"] for plan, group in self._live.groups()}
        optimizer_states, scalars = self._live.export_optimizer_state(), self._live.read_scalars()
        self._live.destroy()
        del self._live
        self._convert_prefix()
        # The old engine is a web of cycles; it must be gone before the new one hangs its hooks on the parameters.
        gc.collect()
        self._live = self._initialize(optimizer_states)
        self._live.write_scalars(scalars)
        for plan, group in self._live.groups():
            group["lr"] = rates[plan.name]

    def _initialize(self, optimizer_states: OptimizerStates | None = None) -> EngineSession:
        plans = self._trained_plans()
        trained = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        planned = [name for plan in plans for name in plan.parameter_names]
        if len(planned) != len(trained) or set(planned) != trained:
            raise RuntimeError(
                f"in groups but not trainable, or the reverse: {sorted(trained.symmetric_difference(planned))}"
            )
        return EngineSession(
            self.module,
            plans=plans,
            settings=self.settings,
            ranks=self.ranks,
            adam=self._adam,
            weight_decay=self._weight_decay,
            micro_batch=self.micro_batch,
            accumulation=self.accumulation,
            optimizer_states=optimizer_states,
        )

    # -- the frozen prefix ---------------------------------------------------------------------------------------

    def _choose_prefix_dtype(self, precision: str) -> torch.dtype:
        trained = self.settings.precision
        runs_backward = any(plan.unit.feeds_layers for plan in self._plans)
        check_argument("freeze.prefix_precision", precision, name="prefix_precision")
        if trained != "fp32":
            if precision not in ("auto", trained):
                raise ConfigError(
                    f"freeze.prefix_precision = {precision!r}: allowed are auto and {trained}, in which the run trains "
                    f"({self.settings.source})"
                )
            return DTYPES[trained]
        if not self._takes_prefix:
            if precision not in ("auto", trained):
                raise ConfigError(
                    f"prefix_precision = {precision!r}: allowed are auto and {trained}, because the forward pass of "
                    f"{type(self.module).__name__} takes no `frozen_layers`, and so cannot change precision behind them"
                )
            return DTYPES[trained]
        if runs_backward and precision in ("bf16", "fp16"):
            raise ConfigError(
                f"freeze.prefix_precision = {precision!r}: allowed are auto and fp32, because with freeze.cls_token "
                "or freeze.patch_embed false the backward pass runs through the prefix"
            )
        if precision != "auto":
            return DTYPES[precision]
        if runs_backward or self.device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    def _convert_prefix(self) -> None:
        if self.dtype != torch.float32 or self._prefix_dtype == torch.float32:
            return
        for parameter in self._parameters.values():
            if not parameter.requires_grad and parameter.dtype != self._prefix_dtype:
                parameter.data = parameter.data.to(self._prefix_dtype)

    def _keep_masters_of_weights(self, plans: list[GroupPlan]) -> None:
        """Keep the fp32 weights of the model on rank 0 where they are about to be rounded."""
        if self.rank == 0 and self._prefix_dtype != torch.float32:
            for plan in plans:
                for name in plan.parameter_names:
                    if self._parameters[name].dtype == torch.float32:
                        self._frozen_masters[name] = self._parameters[name].detach().to("cpu", copy=True)

    def _gather_masters(self, plan: GroupPlan, group: dict[str, Any]) -> None:
        """Bring the master weights of a group to rank 0's CPU memory."""
        if self._live.is_partitioned:
            (part,) = group["params"]
            parts = [torch.empty_like(part) for _ in range(self.world_size)] if self.rank == 0 else None
            torch.distributed.gather(part.detach(), parts, dst=0)
            flat = torch.cat(parts) if parts is not None else None
        else:
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group["params"]]) if self.rank == 0 else None
        if flat is not None:
            sizes = [torch.Size(shape).numel() for _, shape in plan.parameters]
            for (name, shape), values in zip(plan.parameters, flat[: plan.numel].cpu().split(sizes), strict=True):
                self._frozen_masters[name] = values.reshape(shape).clone()

    # -- figures -------------------------------------------------------------------------------------------------

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters that train."""
        return sum(parameter.numel() for parameter in self._parameters.values() if parameter.requires_grad)

    @property
    def loss_scale(self) -> float:
        """The factor on the loss; 1 without fp16."""
        return self._live.loss_scale

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped because a gradient was not finite; waits for the device."""
        return self._live.skipped_steps

    @property
    def global_steps(self) -> int:
        """Optimizer steps, skipped ones included."""
        return int(self._live.engine.global_steps)

    @property
    def overflowed(self) -> bool:
        """Whether the last optimizer step was skipped; waits for the device."""
        return bool(self.overflow)

    @property
    def overflow(self) -> Tensor | bool:
        """Whether the last optimizer step was skipped: a scalar on the device, where the host need not know it."""
        return self._live.overflow

    def gradient_elements(self) -> int:
        """Return how many gradient elements are reduced over the ranks in one optimizer step."""
        return self._live.gradient_elements(accumulation=self.accumulation)

    def optimizer_state_bytes(self) -> int:
        """Return the bytes of moments and separate fp32 master weights on this rank, without ZeRO's padding."""
        return self._live.state_bytes()[0]

    def optimizer_state_padding_bytes(self) -> int:
        """Return the bytes that ZeRO's padding adds on this rank."""
        return self._live.state_bytes()[1]

    def layer_changes(self, measure: str) -> tuple[float | None, ...] | None:
        """Return the relative change of every layer since the last call, the same on all ranks.

        None in all at the first call, and None for frozen layers. See `ChangeMeter` for what is measured; every rank
        must call this at the same step, and always with the same measure.

        Raises:
            ValueError: the measure is neither weight nor gradient.
        """
        if self._change_meter is None or self._change_meter.measure != measure:
            self._change_meter = ChangeMeter(measure, num_layers=self._num_layers)
        return self._change_meter.read(self._read_layers(), ranks=self.ranks)

    def change_state(self) -> dict[str, Tensor]:
        """Return what this rank needs to go on measuring changes after a resume; nothing if it measures none."""
        return self._change_meter.state() if self._change_meter is not None else {}

    def load_change_state(self, measure: str, state: Mapping[str, Tensor]) -> None:
        """Restore what `change_state` returned on this rank, of as many ranks; an empty state changes nothing."""
        if state:
            self._change_meter = ChangeMeter(measure, num_layers=self._num_layers)
            self._change_meter.load_state(state, device=self.device)

    def synchronize(self) -> None:
        """Wait for the device, so that time can be measured."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state(self) -> EngineState:
        """Return this rank's share of all state beside the model's weights. Groups that are frozen have none."""
        self._check_boundary("state is taken")
        trained = self._read_groups()
        scalars = {
            "frozen_layers": self.frozen_layers,
            "adam_steps": {name: group.step for name, group in trained.items()},
            **self._live.read_scalars(),
        }
        return EngineState(groups=trained, scalars=scalars, frozen_masters=self.frozen_masters())

    def _read_layers(self) -> dict[str, tuple[int, GroupState]]:
        layers = {plan.name: plan.unit.layer for plan in self._plans}
        groups = self._read_groups().items()
        return {name: (layer, group) for name, group in groups if (layer := layers[name]) is not None}

    def _read_groups(self) -> dict[str, GroupState]:
        return {
            plan.name: self._live.read(plan, group)
            for plan, group in self._live.groups()
            if plan.unit.trains(self.frozen_layers)
        }

    def frozen_masters(self) -> dict[str, Tensor]:
        """Return, on rank 0, the fp32 weights of frozen parameters by name; nothing on other ranks.

        A parameter is missing when only its rounded weights are known: after a resume without its master weights.
        """
        if self.rank:
            return {}
        exact = {
            name: parameter.detach()
            for name, parameter in self._parameters.items()
            if not parameter.requires_grad and parameter.dtype == torch.float32
        }
        return {**exact, **self._frozen_masters}

    def expect_state(self, frozen_layers: int) -> dict[str, tuple[tuple[str, tuple[int, ...]], ...]]:
        """Return, by group, names and shapes of the parameters whose state `load_state` needs for such a prefix.

        Raises:
            ValueError: more layers are frozen here, or a step is under way.
        """
        self._check_boundary("state is loaded")
        if frozen_layers < self.frozen_layers:
            raise ValueError(
                f"the saved state has {frozen_layers} frozen layers, this engine {self.frozen_layers}, and those are "
                "frozen for good: build it with no more than were saved"
            )
        return {plan.name: plan.parameters for plan in self._plans if plan.unit.trains(frozen_layers)}

    @torch.no_grad()
    def load_state(
        self, read: SliceReader, scalars: Mapping[str, Any], *, frozen_masters: Mapping[str, Tensor] | None = None
    ) -> None:
        """Restore the state of a run on any number of ranks and any ZeRO stage; freeze as many layers as it had.

        Args:
            read: `read(group, key, start, stop)` returns these elements of a group's unpadded flat tensor; key is
                master, exp_avg or exp_avg_sq. Every rank asks for what it holds.
            scalars: `EngineState.scalars`.
            frozen_masters: fp32 weights of frozen parameters by name, given on every rank; the model's frozen
                weights are set from them. Without them, the model's own stay.

        Raises:
            ValueError: fewer layers were frozen, a step is under way, or a name is not a frozen parameter.
        """
        expected = self.expect_state(scalars["frozen_layers"])
        if expected.keys() != {plan.name for plan in self._live.plans}:
            self._begin_at(scalars["frozen_layers"])
        for name, master in (frozen_masters or {}).items():
            if name not in self._parameters or self._parameters[name].requires_grad:
                raise ValueError(f"master weights are given for {name}, which is not a frozen parameter")
            self._parameters[name].copy_(master)
            if self.rank == 0 and self._parameters[name].dtype != torch.float32:
                self._frozen_masters[name] = master.detach().to("cpu", torch.float32, copy=True)
        self._live.write(read, scalars["adam_steps"])
        self._live.write_scalars(scalars)

    def _begin_at(self, frozen_layers: int) -> None:
        """Begin again with a longer prefix, for a state that is loaded next."""
        self._check_prefix(frozen_layers)
        self._live.destroy()
        del self._live
        self._mark_frozen(frozen_layers)
        self._frozen_masters.clear()
        self._convert_prefix()
        gc.collect()
        self._live = self._initialize()

    def destroy(self) -> None:
        """End the engine and free its memory; the model stays."""
        self._live.destroy()
        del self._live
        gc.collect()
