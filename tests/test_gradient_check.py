"""Gradients that are not finite never touch a weight; DeepSpeed's own check, parameter by parameter, is the oracle."""

from __future__ import annotations

from typing import Any

import engine_scenarios as scenarios
import pytest
import torch
from processes import run_ranks
from torch import Tensor

from vitfreeze.engine import FreezingEngine, session

pytestmark = pytest.mark.distributed
COMBINATIONS = ("1-fp32", "1-bf16", "1-fp16", "2-fp32", "2-bf16", "2-bf16-fp32-sums", "2-fp16-fp32-sums")
BAD_STEPS = {1: float("nan"), 3: float("inf"), 6: float("-inf")}  # step 3 is that of a drop


def train(name: str) -> dict[str, Any]:
    stage, precision, extras = scenarios.COMBINATIONS[name]
    extras = {key: value for key, value in extras.items() if key != "gradient_clipping"}
    engine = scenarios.build(FreezingEngine, scenarios.ds_config(stage, precision, extras))
    skipped, scales = [], []
    for step in range(scenarios.STEPS):
        engine.freeze(max(layers for start, layers in scenarios.FREEZES.items() if start <= step), step=step)
        bad = torch.zeros(())
        if step in BAD_STEPS and engine.rank == engine.world_size - 1:
            bad.fill_(BAD_STEPS[step])
        weight = engine.module.heads[3].pred.weight
        hook = weight.register_hook(lambda gradient, bad=bad: gradient + bad.to(gradient.dtype))
        losses = scenarios.take_step(engine, step)
        hook.remove()
        assert all(map(torch.isfinite, map(torch.tensor, losses)))
        skipped.append(engine.overflowed)
        scales.append(engine.loss_scale)
    state = engine.state()
    result = {
        "skipped": skipped, "scales": scales, "scalars": dict(state.scalars), "weights": scenarios.weights_of(engine),
        "groups": {name: scenarios.clone_tensors(vars(group)) for name, group in state.groups.items()},
    }  # fmt: skip
    engine.destroy()
    return result


def train_all(*, by_deepspeed: bool) -> dict[str, Any]:
    scenarios.allow_fp16()
    if by_deepspeed:
        session.is_tested_version = lambda: False
    return {name: train(name) for name in COMBINATIONS}


def train_by_deepspeed() -> dict[str, Any]:
    return train_all(by_deepspeed=True)


def train_by_groups() -> dict[str, Any]:
    return train_all(by_deepspeed=False)


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    return {"groups": run_ranks(train_by_groups), "deepspeed": run_ranks(train_by_deepspeed)}


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        assert one == other


@pytest.mark.parametrize("name", COMBINATIONS)
def test_weights_moments_skips_and_scale_are_those_of_deepspeed(runs: dict[str, Any], name: str) -> None:
    for ours, theirs in zip(runs["groups"], runs["deepspeed"], strict=True):
        assert_same(ours[name], theirs[name])
        assert [step for step, was_skipped in enumerate(ours[name]["skipped"]) if was_skipped] == [*BAD_STEPS]
        assert all(torch.isfinite(weight).all() for weight in ours[name]["weights"].values())


def train_without_zero() -> dict[str, Any]:
    return train("0-fp32")


def test_without_zero_a_bad_step_is_skipped_too() -> None:
    for run in run_ranks(train_without_zero):
        assert [step for step, was_skipped in enumerate(run["skipped"]) if was_skipped] == [*BAD_STEPS]
        assert run["scalars"]["skipped_steps"] == 3
        assert all(torch.isfinite(weight).all() for weight in run["weights"].values())


def count_all_reduces() -> list[int]:
    sizes: list[int] = []
    plain = torch.distributed.all_reduce

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return plain(tensor, *arguments, **options)

    torch.distributed.all_reduce = counted
    engine = scenarios.build(FreezingEngine, scenarios.ds_config(1, "bf16"), accumulation=1)
    sizes.clear()
    scenarios.take_step(engine, 0)
    return sizes


def test_a_step_reduces_its_buckets_and_one_flag() -> None:
    for sizes in run_ranks(count_all_reduces):
        assert len(sizes) == 2
        assert sizes[0] > 500, "all gradients in one bucket"
        assert sizes[1] == 1
