"""One session of a DeepSpeed engine: from `deepspeed.initialize` to an end that leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from vitfreeze.engine.launch import is_tested_version
from vitfreeze.engine.settings import DeepSpeedSettings, complete_settings
from vitfreeze.engine.slices import GroupState, Segment, SliceReader, create_moments, read_group, segments, write_group
from vitfreeze.engine.units import GroupPlan
from vitfreeze.engine.zero import OverflowCheck, group_gradients
from vitfreeze.ranks import Ranks

COUNTERS = ("global_steps", "skipped_steps", "micro_steps", "global_samples")
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
# What outlives a session: per group name, the optimizer's tensors and their state.
OptimizerStates = dict[str, list[tuple[Tensor, dict[str, Tensor]]]]


def find_loss(output: Any) -> Tensor:
    """Return the loss in a model's output: the attribute or the item `loss`, or the output itself.

    Raises:
        TypeError: there is none, or it is not a scalar tensor.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(
            f"the model returned {type(output).__name__} without a scalar loss: expected a scalar tensor, an object "
            "with an attribute `loss`, or a dict with a key 'loss'"
        )
    return loss


class _Shell(nn.Module):
    """What DeepSpeed is given as the model.

    DeepSpeed hangs hooks that close over the engine on the module it is given, and looks for the loss in tensors,
    tuples and dicts only. This shell takes the hooks with it when its engine goes, and shows the loss.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        output = self.model(*args, **kwargs)
        return find_loss(output), output


class EngineSession:
    """A DeepSpeed engine with the parameter groups of `plans`, and AdamW as its optimizer.

    The optimizer is ours, so the tensors that ZeRO puts into its groups, and their moments, are found through torch's
    public interface whatever class DeepSpeed wraps around it. With `optimizer_states` it takes over the state of an
    earlier session; without them its moments are zero.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plans: tuple[GroupPlan, ...],
        settings: DeepSpeedSettings,
        ranks: Ranks,
        adam: Mapping[str, Any],
        weight_decay: float,
        micro_batch: int,
        accumulation: int,
        optimizer_states: OptimizerStates | None = None,
    ) -> None:
        self.plans = plans
        self.settings = settings
        self.ranks = ranks
        parameters = dict(model.named_parameters())
        groups = [
            {
                "params": [parameters[name] for name in plan.parameter_names],
                "lr": 0.0,
                "weight_decay": weight_decay if plan.decays else 0.0,
            }
            for plan in plans
        ]
        self.optimizer = AdamW(groups, fused=True, **adam)
        self._check = OverflowCheck(self.optimizer)
        if not self.is_partitioned:
            self.optimizer.register_step_pre_hook(self._check.check)
        groups_gradients = self.is_partitioned and not settings.clips and is_tested_version()
        config = complete_settings(
            settings,
            micro_batch=micro_batch,
            accumulation=accumulation,
            world_size=ranks.world_size,
            active_elements=sum(plan.numel for plan in plans),
            checks_gradients=not groups_gradients,
        )
        self._shell = _Shell(model)
        self.engine, *_ = deepspeed.initialize(
            model=self._shell, optimizer=self.optimizer, config=config, dist_init_required=False
        )
        if len(self.optimizer.param_groups) != len(plans):
            raise RuntimeError(f"DeepSpeed kept {len(self.optimizer.param_groups)} of {len(plans)} parameter groups")
        if groups_gradients:
            group_gradients(self.engine.optimizer, self._check)
        if optimizer_states is None:
            create_moments(self.optimizer)
        else:
            self._import_optimizer_state(optimizer_states)

    @property
    def is_partitioned(self) -> bool:
        """Whether every rank holds a part of each group, not all of it."""
        return self.settings.stage > 0

    @property
    def has_own_masters(self) -> bool:
        """Whether the fp32 master weights are separate from the weights of the model."""
        return self.is_partitioned or self.settings.precision != "fp32"

    def groups(self) -> Iterator[tuple[GroupPlan, dict[str, Any]]]:
        """Yield every group's plan with the optimizer's group."""
        yield from zip(self.plans, self.optimizer.param_groups, strict=True)

    def segments(self, plan: GroupPlan, group: dict[str, Any]) -> list[Segment]:
        """Return the pieces of a group's flat tensor that this rank holds."""
        return list(segments(plan, group, partitioned=self.is_partitioned, rank=self.ranks.rank))

    def read(self, plan: GroupPlan, group: dict[str, Any]) -> GroupState:
        """Return this rank's share of a group's state."""
        return read_group(
            self.optimizer, plan, self.segments(plan, group), share=None if self.is_partitioned else self.ranks
        )

    def write(self, read: SliceReader, steps: Mapping[str, int]) -> None:
        """Fill master weights and moments from slices, then the model's weights from the master weights."""
        for plan, group in self.groups():
            write_group(self.optimizer, plan, self.segments(plan, group), read, step=steps[plan.name])
        self._refresh_weights()

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        if self.is_partitioned:
            self.engine.optimizer.update_lp_params()
            return
        weights = dict(self._shell.model.named_parameters())
        for plan, group in self.groups():
            for name, master in zip(plan.parameter_names, group["params"], strict=True):
                if master is not weights[name]:
                    weights[name].copy_(master)

    def _loss_scaler(self) -> Any:
        return self.engine.optimizer.loss_scaler if self.settings.precision == "fp16" else None

    @property
    def loss_scale(self) -> float:
        """The factor on the loss; 1 without fp16."""
        scaler = self._loss_scaler()
        return float(scaler.cur_scale) if scaler is not None else 1.0

    @property
    def overflow(self) -> Tensor | bool:
        """Whether the last step was skipped, because a gradient was not finite: on the device, if only it knows."""
        known = self.engine.global_steps > 0 and not self.engine.was_step_applied()
        return known if self._check.found_inf is None else self._check.found_inf

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were skipped; waits for the device."""
        skipped = self._check.skipped
        return int(self.engine.skipped_steps) + (0 if skipped is None else int(skipped))

    def read_scalars(self) -> dict[str, Any]:
        """Return the engine's counters and the state of its loss scaler, ready for JSON."""
        scaler = self._loss_scaler()
        fields = {name: vars(scaler)[name] for name in SCALER_FIELDS if name in vars(scaler)} if scaler else None
        counters = {name: int(vars(self.engine)[name]) for name in COUNTERS}
        return {**counters, "skipped_steps": self.skipped_steps, "loss_scaler": fields}

    def write_scalars(self, scalars: Mapping[str, Any]) -> None:
        """Set counters and loss scaler, the way DeepSpeed itself does when it loads a checkpoint."""
        for name in COUNTERS:
            setattr(self.engine, name, scalars[name])
        self._check.skipped = None
        scaler = self._loss_scaler()
        if scaler is not None and scalars["loss_scaler"] is not None:
            for name, value in scalars["loss_scaler"].items():
                setattr(scaler, name, value)

    def export_optimizer_state(self) -> OptimizerStates:
        """Return every group's tensors and state, by group name."""
        return {
            plan.name: [(tensor, dict(self.optimizer.state[tensor])) for tensor in group["params"]]
            for plan, group in self.groups()
        }

    @torch.no_grad()
    def _import_optimizer_state(self, optimizer_states: OptimizerStates) -> None:
        """Take over master weights and moments; ZeRO cuts a group alike in every session: local to a rank."""
        for plan, group in self.groups():
            for tensor, (earlier, state) in zip(group["params"], optimizer_states[plan.name], strict=True):
                if tensor.shape != earlier.shape:
                    raise RuntimeError(
                        f"{plan.name}: ZeRO now gives this rank {tensor.numel()} elements, before {earlier.numel()}"
                    )
                tensor.copy_(earlier)
                self.optimizer.state[tensor] = state

    def destroy(self) -> None:
        """Cut every tie by which DeepSpeed keeps an engine alive; garbage collection does the rest."""
        self.engine.destroy()
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        for parameter in self._shell.model.parameters():
            parameter.grad = None

    def gradient_elements(self, *, accumulation: int) -> int:
        """Return how many gradient elements are reduced over the ranks in one optimizer step."""
        weights = dict(self._shell.model.named_parameters())
        trained = sum(weight.numel() for weight in weights.values() if weight.requires_grad)
        return trained * (accumulation if self.settings.stage == 2 else 1)

    def state_bytes(self) -> tuple[int, int]:
        """Return the bytes of optimizer state on this rank that belong to parameters, and those of padding."""
        copies = 3 if self.has_own_masters else 2
        held = used = 0
        for plan, group in self.groups():
            held += sum(tensor.nbytes for tensor in group["params"])
            used += sum(4 * (part.stop - part.start) for part in self.segments(plan, group))
        return copies * used, copies * (held - used)
