"""The plan of a fine-tuning against the real classifier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_planner import SMALL, count_flops, kept_bytes

from vitfreeze.config import ConfigError, load_config
from vitfreeze.engine.units import plan_groups
from vitfreeze.model import Classifier
from vitfreeze.planner import ClassifierCosts, StepTimes, format_plan, plan

CASES: dict[str, dict[str, Any]] = {
    "mean of the patches": {},
    "class token": {"global_pool": "token"},
    "checkpointing": {"activation_checkpointing": True},
}


def build(changes: dict[str, Any]) -> tuple[ClassifierCosts, Classifier]:
    torch.manual_seed(0)
    costs = ClassifierCosts(size=SMALL, img_size=160, num_classes=37, **changes)
    model = Classifier(
        size=SMALL, img_size=160, num_classes=37, global_pool=costs.global_pool,
        activation_checkpointing=costs.activation_checkpointing,
    )  # fmt: skip
    return costs, model


class WithTargets(torch.nn.Module):
    """A classifier that makes its own soft targets, so that it is called as LocalMIM is."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model, self.img_size = model, 160

    def forward(self, images: torch.Tensor, *, frozen_layers: int) -> Any:
        targets = torch.full((len(images), 37), 1 / 37)
        return self.model(images, targets=targets, frozen_layers=frozen_layers)


@pytest.mark.parametrize("name", CASES)
def test_counted_operations_are_those_of_the_model(name: str) -> None:
    costs, model = build(CASES[name])
    for frozen_layers in (0, 1, 5, 12):
        forward, backward = count_flops(WithTargets(model), frozen_layers=frozen_layers, batch=2)  # type: ignore[arg-type]
        assert costs.forward_flops(frozen_layers) == pytest.approx(forward, rel=0.01), frozen_layers
        assert costs.backward_flops(frozen_layers) == pytest.approx(backward, rel=0.01), frozen_layers


def test_smaller_images_are_counted_with_the_positions_of_all() -> None:
    _, model = build({})
    small = ClassifierCosts(size=SMALL, img_size=96, num_positions=100, num_classes=37)
    wrapped: Any = WithTargets(model)
    wrapped.img_size = 96
    forward, backward = count_flops(wrapped, frozen_layers=3, batch=2)
    assert small.forward_flops(3) == pytest.approx(forward, rel=0.01)
    assert small.backward_flops(3) == pytest.approx(backward, rel=0.01)
    assert small.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_small_images_first_are_planned() -> None:
    sizes = "curriculum.img_size=[[0, 128], [0.5, 224]]"
    planned = plan(load_config("finetune_b_100ep", [sizes, "batch.grow_micro_batch=true"]))
    small, large = planned.stages
    assert small.trainable_parameters == large.trainable_parameters
    assert small.relative_cost == pytest.approx((65 / 197), rel=0.05)
    assert (small.micro_batch, large.micro_batch) == (256, 128)
    assert planned.saving == pytest.approx((1 - small.relative_cost) / 2)


@pytest.mark.parametrize("name", ["mean of the patches", "class token"])
def test_activation_bytes_are_those_that_autograd_keeps(name: str) -> None:
    costs, model = build(CASES[name])
    wrapped: Any = WithTargets(model)
    for frozen_layers in (0, 1, 5, 12):
        three, two = (kept_bytes(wrapped, frozen_layers=frozen_layers, batch=batch) for batch in (3, 2))
        assert costs.activation_bytes(frozen_layers, precision="fp32") == three - two, frozen_layers


def test_group_sizes_are_those_of_the_model() -> None:
    costs, model = build({})
    plans = plan_groups(model)
    sizes = {(name, "decay"): parameters.decay for name, parameters in costs.unit_parameters.items()}
    sizes |= {(name, "no_decay"): parameters.no_decay for name, parameters in costs.unit_parameters.items()}
    assert sizes == {(group.unit.name, group.name.rpartition(".")[2]): group.numel for group in plans}
    assert costs.parameters == sum(parameter.numel() for parameter in model.parameters())
    last = [group.numel for group in plans if group.unit.name in ("classifier", "layer_12")]
    assert sorted(costs.trained_groups(SMALL.depth)) == sorted(last)


def test_a_recipe_that_does_not_say_what_it_is_for_is_not_guessed_at() -> None:
    settings = ["finetune.num_classes=10", "batch.micro_size=256"]
    with pytest.raises(ConfigError, match=r"finetune.num_classes is .* \(set in the command line\).*run.task=finetune"):
        plan(load_config("paper", settings))
    assert plan(load_config("paper", [*settings, "run.task=finetune"])).stages[0].heads_left == ()


def test_an_average_of_the_weights_takes_memory() -> None:
    plain, averaged = (
        plan(load_config("finetune_b_100ep", [f"finetune.model_ema_decay={decay}"])) for decay in (0, 0.9999)
    )
    costs, _ = build({})
    assert averaged.peak_memory_bytes - plain.peak_memory_bytes > 4 * costs.parameters


def test_a_recipe_for_fine_tuning_is_planned_as_such() -> None:
    prediction = plan(load_config("finetune_b_100ep", ["freeze.mode=schedule", "freeze.t_0=0.5"]))
    start, last = prediction.stages[0], prediction.stages[-1]
    assert start.trainable_parameters == 86_567_656  # timm's vit_base_patch16_224 with fc_norm instead of norm
    assert start.flops_per_image == pytest.approx(3 * 35.1e9, rel=0.02)  # 17.6 G multiply-adds, there and back
    assert start.heads_left == last.heads_left == ()
    assert last.relative_cost < 0.45
    text = format_plan(prediction)
    assert "HOG" not in text
    assert "Authors" not in text
    times = StepTimes(source="a test", images=8, step_ms={0: 2.0, 12: 1.0})
    with pytest.raises(ConfigError, match="measured steps are those of pre-training"):
        plan(load_config("finetune_b_100ep"), times=times)
