"""What DeepSpeed does when requires_grad = False alone is to freeze: the table of docs/freeze_any_model.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from engine_scenarios import Traffic, allow_fp16, ds_config
from torch import Tensor, nn

from vitfreeze.engine import join_ranks

# (stage, precision, extras)
CASES: Mapping[str, tuple[int, str, Mapping[str, Any]]] = {
    "0-fp32": (0, "fp32", {}),
    "0-bf16": (0, "bf16", {}),
    "0-fp16": (0, "fp16", {}),
    "1-fp32": (1, "fp32", {}),
    "1-bf16": (1, "bf16", {}),
    "1-fp16": (1, "fp16", {}),
    "2-fp32": (2, "fp32", {}),
    "2-bf16": (2, "bf16", {}),
    "2-fp16": (2, "fp16", {}),
    "1-bf16-fp32-sums": (1, "bf16", {"grad_accum_dtype": "fp32"}),
    "2-fp32-offload": (2, "fp32", {"offload": True}),
    "3-fp32": (3, "fp32", {}),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).float().square().mean()


def start(stage: int, precision: str, extras: Mapping[str, Any], *, accumulation: int = 1) -> tuple[Any, Net]:
    config = ds_config(stage, precision, extras)
    config |= {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulation}
    config |= {"steps_per_print": 10**9, "log_level": "warning"}
    if extras.get("offload"):
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False
    model = Net()
    groups = [{"params": [*layer.parameters()]} for layer in model.layers if isinstance(layer, nn.Linear)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine, model


def take_micro_step(engine: Any, number: int) -> None:
    images = torch.randn(2, 8, generator=torch.Generator().manual_seed(10 * number + engine.global_rank))
    engine.backward(engine(images.to(next(engine.module.parameters()).dtype)))
    engine.step()


@contextmanager
def gathered(model: Net) -> Iterator[Tensor]:
    weight = model.layers[0].weight
    with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
        yield weight.detach()


def freeze_by_requires_grad(case: str, traffic: Traffic) -> dict[str, Any]:
    """Train three steps, freeze the first of three equal layers, train three more; say what moved and travelled."""
    stage, precision, extras = CASES[case]
    engine, model = start(stage, precision, extras)
    travelled, states = [], []
    for step in range(6):
        if step == 3:
            model.layers[0].requires_grad_(False)
            with gathered(model) as weight:
                before = weight.clone()
        traffic.take()
        take_micro_step(engine, step)
        elements = traffic.take()
        reduced = sum(elements.get(kind, 0) for kind in ("all_reduce", "reduce", "reduce_scatter_tensor"))
        travelled.append({"reduced": reduced, "gathered": elements.get("all_gather_into_tensor", 0)})
        optimizer = engine.optimizer if stage == 0 and precision == "fp32" else engine.optimizer.optimizer
        states.append(sum(v.nbytes for state in optimizer.state.values() for k, v in state.items() if k != "step"))
    with gathered(model) as weight:
        moved = float((weight.float() - before.float()).abs().max())
    engine.destroy()
    return {"before": travelled[2], "after": travelled[-1], "moved": moved, "state": (states[2], states[-1])}


def freeze_in_mid_step() -> float:
    """Freeze between the two micro-batches of a step; return how far the layer moved at the step's end."""
    engine, model = start(1, "fp32", {}, accumulation=2)
    take_micro_step(engine, 0)
    model.layers[0].requires_grad_(False)
    before = model.layers[0].weight.detach().clone()
    take_micro_step(engine, 1)
    moved = float((model.layers[0].weight.detach() - before).abs().max())
    engine.destroy()
    return moved


def pop_a_group() -> str:
    """Take the frozen layer's group out of the optimizer; return what the next step says."""
    engine, _ = start(1, "fp32", {})
    take_micro_step(engine, 0)
    engine.optimizer.param_groups.pop(0)
    try:
        take_micro_step(engine, 1)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def everything() -> dict[str, Any]:
    allow_fp16()
    traffic = Traffic()
    join_ranks()
    results: dict[str, Any] = {case: freeze_by_requires_grad(case, traffic) for case in CASES}
    return {**results, "mid-step": freeze_in_mid_step(), "pop": pop_a_group()}


def freeze_on_one_rank() -> None:
    """Freeze on rank 0 only, and train on: never returns on every rank."""
    join_ranks()
    engine, model = start(1, "fp32", {})
    take_micro_step(engine, 0)
    print("a step was taken together", flush=True)
    if engine.global_rank == 0:
        model.layers[0].requires_grad_(False)
    for step in range(1, 4):
        take_micro_step(engine, step)
