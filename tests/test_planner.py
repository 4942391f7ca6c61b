"""The plan against the real model, the authors' figures, and its own arithmetic."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import head_of, layer_of
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vitfreeze.architecture import HEAD_SCALES, MODEL_SIZES, ModelSize
from vitfreeze.config import Config, ConfigError, build_config, count_steps, load_config
from vitfreeze.model import LocalMIM
from vitfreeze.planner import (
    ModelCosts,
    StepTimes,
    compare_with_measurement,
    format_comparison,
    format_plan,
    format_plans_side_by_side,
    format_targets,
    plan,
    read_step_times,
    scaling_efficiency,
    solve_targets,
)
from vitfreeze.planner.costs import Product, _block, _linear
from vitfreeze.planner.targets import Target
from vitfreeze.schedule import FreezeSchedule
from vitfreeze.text import format_bytes

SMALL = ModelSize(patch_size=16, embed_dim=192, depth=12, num_heads=3, decoder_embed_dim=128, decoder_num_heads=4)


def configure(**values: Any) -> Config:
    given = {"batch__micro_size": 256, **values}
    return build_config({key.replace("__", "."): (value, "a test") for key, value in given.items()}, recipe="test")


def small_costs(**changes: Any) -> ModelCosts:
    return ModelCosts(**{"size": SMALL, "img_size": 160, "mask_ratio": 0.75, "hog_nbins": 9, **changes})


def build_model(costs: ModelCosts) -> LocalMIM:
    torch.manual_seed(0)
    return LocalMIM(
        **dataclasses.asdict(costs.size),
        img_size=costs.img_size,
        mask_ratio=costs.mask_ratio,
        hog_nbins=costs.hog_nbins,
        freeze_cls_token=costs.freeze_cls_token,
        freeze_patch_embed=costs.freeze_patch_embed,
        activation_checkpointing=costs.activation_checkpointing,
    )


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 * 2**30, "3.00 GiB"), (2**41, "2.00 TiB")]
)
def test_sizes(count: float, text: str) -> None:
    assert format_bytes(count) == text


# Against the real model ----------------------------------------------------------------------------------------------


def _count_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _count_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _count_linear(inputs: Any, weight: Any, *_: Any, **__: Any) -> int:
    return int(2 * math.prod(inputs) * weight[0])


# FlopCounterMode does not know the fused attention of CPUs, nor their linear layers of frozen blocks.
CPU_PRODUCTS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
    torch.ops.mkldnn._linear_pointwise: _count_linear,
}


def count_flops(model: LocalMIM, *, frozen_layers: int, batch: int) -> tuple[float, float]:
    """Operations per image of the forward and of the backward pass, as torch counts them."""
    images = torch.randn(batch, 3, model.img_size, model.img_size)
    with FlopCounterMode(display=False, custom_mapping=CPU_PRODUCTS) as forward:
        output = model(images, frozen_layers=frozen_layers)
    with FlopCounterMode(display=False, custom_mapping=CPU_PRODUCTS) as backward:
        output.loss.backward()
    return forward.get_total_flops() / batch, backward.get_total_flops() / batch


CASES = {
    "ViT-S": ({"size": MODEL_SIZES["vit_small_patch16"], "img_size": 224}, (3,)),
    "all freezes": ({}, (0, 1, 3, 5, 12)),
    "class token trains": ({"freeze_cls_token": False}, (0, 1, 5, 12)),
    "patch embedding trains": ({"freeze_patch_embed": False}, (1, 12)),
    "checkpointing": ({"activation_checkpointing": True}, (0, 5)),
    "other shapes": (
        {
            "size": ModelSize(
                patch_size=8, embed_dim=96, depth=6, num_heads=3, mlp_ratio=3.0, decoder_embed_dim=64,
                decoder_depth=2, decoder_num_heads=4,
            ),
            "img_size": 96, "mask_ratio": 0.6, "hog_nbins": 18,
        },
        (0, 1, 3, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_counted_operations_are_those_of_the_model(name: str) -> None:
    changes, prefixes = CASES[name]
    costs = small_costs(**changes)
    model = build_model(costs)
    for frozen_layers in prefixes:
        forward, backward = count_flops(model, frozen_layers=frozen_layers, batch=2)
        assert costs.forward_flops(frozen_layers) == pytest.approx(forward, rel=0.01), frozen_layers
        assert costs.backward_flops(frozen_layers) == pytest.approx(backward, rel=0.01), frozen_layers


def kept_bytes(model: LocalMIM, *, frozen_layers: int, batch: int) -> int:
    """Bytes of the distinct tensors that autograd keeps, without parameters."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    images = torch.randn(batch, 3, model.img_size, model.img_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images, frozen_layers=frozen_layers)
    assert output.loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("name", [name for name in CASES if name != "checkpointing"])
def test_activation_bytes_are_those_that_autograd_keeps(name: str) -> None:
    changes, prefixes = CASES[name]
    costs = small_costs(**changes)
    model = build_model(costs)
    for frozen_layers in prefixes:
        # Heads also keep a few products of weights alone, whatever the batch: the difference leaves them out.
        three, two = (kept_bytes(model, frozen_layers=frozen_layers, batch=batch) for batch in (3, 2))
        assert costs.activation_bytes(frozen_layers, precision="fp32") == three - two, frozen_layers


def test_checkpointing_keeps_little() -> None:
    costs, plain = small_costs(activation_checkpointing=True), small_costs()
    assert costs.activation_bytes(0, precision="fp32") < 0.6 * plain.activation_bytes(0, precision="fp32")
    assert plain.activation_bytes(0, precision="bf16") < 0.53 * plain.activation_bytes(0, precision="fp32")


@pytest.mark.parametrize(("freeze_cls_token", "freeze_patch_embed"), [(True, True), (False, True), (False, False)])
def test_group_sizes_are_those_of_the_model(freeze_cls_token: bool, freeze_patch_embed: bool) -> None:
    costs = small_costs(freeze_cls_token=freeze_cls_token, freeze_patch_embed=freeze_patch_embed, hog_nbins=18)
    model = build_model(costs)
    counted: dict[tuple[str, str], int] = {}
    for name, parameter in model.named_parameters():
        layer, head = layer_of(name), head_of(name)
        unit = f"head_{head}" if head is not None else f"layer_{layer:02d}"
        if (name == "cls_token" and not freeze_cls_token) or (layer == 0 and "." in name and not freeze_patch_embed):
            unit = name.split(".")[0]
        kind = "decay" if parameter.ndim > 1 and not name.endswith(".bias") else "no_decay"
        counted[unit, kind] = counted.get((unit, kind), 0) + parameter.numel()
    for name, parameters in costs.unit_parameters.items():
        assert parameters.decay == counted.pop((name, "decay"))
        assert parameters.no_decay == counted.pop((name, "no_decay"), 0)
    assert not counted
    assert set(costs.unit_parameters) == {unit.name for unit in costs.units}


def test_parameters_are_the_published_ones(shared_dir: Path) -> None:
    for name, counts in json.loads((shared_dir / "reference" / "parameter_counts.json").read_text()).items():
        size = MODEL_SIZES[name.removeprefix("MIM_")]
        costs = small_costs(size=size, img_size=224, hog_nbins=counts["hog_nbins"])
        assert costs.parameters == costs.trainable_parameters(0) == counts["trainable"]
        sizes = {name: parameters.decay + parameters.no_decay for name, parameters in costs.unit_parameters.items()}
        heads = [sizes[f"head_{head}"] for head in range(4)]
        assert sum(sizes.values()) - sum(heads) == counts["encoder_with_cls"]
        assert heads == [decoder + 2 * size.embed_dim for decoder in counts["decoders"]]
        assert counts["norms"] == 4 * 2 * size.embed_dim


# Against published figures -------------------------------------------------------------------------------------------


class PublishedCosts(ModelCosts):
    """The authors' way to compute the same: all patches embedded, all tokens decoded, no fused layers."""

    def embedding(self) -> Product:
        return Product(linear=_linear(self.num_patches, 3 * self.size.patch_size**2, self.size.embed_dim))

    def head(self, head: int) -> Product:
        size, patches, width, outputs = self.size, self.num_patches, self.size.decoder_embed_dim, 3 * self.hog_nbins
        total = Product(linear=_linear(self.num_encoded + 1, size.embed_dim, width)) + _block(patches + 1, width, 4)
        up_once = _linear(patches, width, 4 * width // 2)
        predictions = {
            4: up_once + _linear(4 * patches, width // 2, 4 * width // 4) + _linear(16 * patches, width // 4, outputs),
            2: up_once + _linear(4 * patches, width // 2, outputs),
            1: _linear(patches, width, outputs),
            0.5: _linear(patches // 4, width, outputs),
        }
        return total + Product(linear=predictions[HEAD_SCALES[head]])


def saving_of(costs: ModelCosts) -> float:
    schedule = FreezeSchedule(
        num_layers=costs.size.num_layers, t_0=0.8, how="cubic", scale_lr=True, total_steps=62_500, warmup_steps=6_250,
        base_lr=1.0,
    )  # fmt: skip
    ends = [schedule.freeze_step(layer) for layer in range(schedule.num_layers)]
    spent = sum(
        (end - start) * costs.step_flops(k) for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    )
    return 1 - spent / 62_500 / costs.step_flops(0)


@pytest.mark.parametrize(
    ("model", "nbins", "freeze_cls_token", "published"),
    [
        ("vit_base_patch16", 9, True, 0.157),
        ("vit_large_patch16", 18, True, 0.157),
        ("vit_base_patch16", 9, False, 0.097),
        ("vit_large_patch16", 18, False, 0.084),
    ],
)
def test_saving_of_the_default_schedule(model: str, nbins: int, freeze_cls_token: bool, published: float) -> None:
    plain = small_costs(size=MODEL_SIZES[model], img_size=224, hog_nbins=nbins, freeze_cls_token=freeze_cls_token)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    assert saving_of(PublishedCosts(**fields)) == pytest.approx(published, abs=0.002)
    # This package's decoders compute less, so the same frozen blocks are another share of the whole.
    assert saving_of(plain) == pytest.approx(published, abs=0.01)


# The plan ------------------------------------------------------------------------------------------------------------


def test_plan_of_the_paper() -> None:
    whole = plan(load_config("paper", ["run.ds_config=zero1_bf16"]))
    assert (whole.total_steps, whole.warmup_steps, whole.steps_per_epoch) == (62_500, 6_250, 625)
    assert [stage.frozen_layers for stage in whole.stages] == list(range(13))
    assert sum(stage.steps for stage in whole.stages) == whole.total_steps
    assert whole.saving == pytest.approx(whole.flops_saving) == pytest.approx(0.1516, abs=1e-3)
    assert whole.gpu_hours_saved / (whole.gpu_hours + whole.gpu_hours_saved) == pytest.approx(whole.saving)
    start, last = whole.stages[0], whole.stages[-1]
    assert start.trainable_parameters == 89_916_140
    assert start.optimizer_state_bytes == 12 * 89_916_140
    assert start.gradient_bytes_per_step == 2 * 89_916_140  # bfloat16, reduced once a step
    each_micro_batch = plan(load_config("paper", ["run.ds_config=zero2_bf16"])).stages[0]
    assert each_micro_batch.gradient_bytes_per_step == 2048 // 256 * start.gradient_bytes_per_step
    assert last.heads_left == (3,)
    assert whole.peak_memory_bytes == start.memory_bytes > last.memory_bytes
    # Head 0 leaves with layer 2, head 1 with layer 4, head 2 with layer 10.
    assert [stage.frozen_layers for stage in whole.stages if stage.heads_left == (2, 3)] == list(range(5, 11))
    costs = [stage.relative_cost for stage in whole.stages]
    assert costs == sorted(costs, reverse=True)


def test_what_the_authors_measured_is_of_their_length() -> None:
    assert plan(load_config("paper")).authors.startswith("82.5 %")
    assert plan(load_config("paper", ["run.length=50 epochs"])).authors == ""


def test_without_freezing_nothing_is_saved() -> None:
    for config in (load_config("off"), configure(freeze__t_0=1)):
        whole = plan(config)
        assert len(whole.stages) == 1
        assert whole.saving == whole.gpu_hours_saved == 0
        assert whole.authors.startswith("83.2 %")


def test_training_the_class_token_costs_over_a_third_of_the_saving() -> None:
    whole = plan(configure(freeze__cls_token=False))
    assert whole.saving < 2 / 3 * plan(configure()).saving
    assert any("cls_token never frozen" in note for note in whole.notes)


@pytest.mark.parametrize(
    ("content", "state_bytes", "gradient_bytes"),
    [
        ({"zero_optimization": {"stage": 0}}, 8, 4),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, 12, 2),
        ({"zero_optimization": {"stage": 1}}, 12 / 8, 4),
        (
            {
                "zero_optimization": {"stage": 1},
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            12 / 8,
            4,
        ),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, 12 / 8, 4 * 2),  # sums all 4 micro-batches
    ],
)
def test_bytes_follow_the_deepspeed_settings(
    tmp_path: Path, content: dict[str, Any], state_bytes: float, gradient_bytes: float
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    start = plan(configure(run__ds_config=str(path), batch__micro_size=64), world_size=8).stages[0]
    assert start.optimizer_state_bytes == pytest.approx(state_bytes * start.trainable_parameters, rel=1e-4)
    assert start.gradient_bytes_per_step == gradient_bytes * start.trainable_parameters


def test_communication_and_scaling() -> None:
    whole = plan(configure(), world_size=8, bandwidth_gigabytes=10)
    start = whole.stages[0]
    sent = (2 * 2 + 2) * start.trainable_parameters * 7 / 8  # ring all-reduce and all-gather in bfloat16
    assert start.communication_bytes_per_step == pytest.approx(sent)
    assert start.communication_ms == pytest.approx(sent / 1e10 * 1e3)
    assert whole.communication_saving is not None
    assert 0.1 < whole.communication_saving < 0.3
    lowest, highest = scaling_efficiency(whole)
    assert 0 < lowest < highest <= 1
    assert plan(configure()).communication_saving is None
    with pytest.raises(ValueError, match="needs a plan with a bandwidth"):
        scaling_efficiency(plan(configure()))


def test_measured_steps_replace_counted_operations(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    rows = [{"frozen_layers": k, "step_ms": ms} for k, ms in ((0, 200.0), (5, 160.0), (12, 100.0))]
    path.write_text(json.dumps({"micro_batch": 8, "rows": rows}))
    times, costs = read_step_times(path), ModelCosts.from_config(configure())
    assert [times.relative_cost(k, costs=costs) for k in (0, 5, 12)] == pytest.approx([1, 0.8, 0.5])
    between = [times.relative_cost(k, costs=costs) for k in range(13)]
    assert between == sorted(between, reverse=True)
    whole = plan(configure(), times=times)
    assert whole.saving < whole.flops_saving
    assert whole.stages[0].step_ms == pytest.approx(200.0 * 2048 / 8)
    assert "measured steps of bench.json" in format_plan(whole)


ROWS = '{"micro_batch": 8, "rows": [{"frozen_layers": 0, "step_ms": %s}%s]}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "does not hold what `vitfreeze bench step --json` prints: a number micro_batch, and rows"),
        ("[]", "does not hold what"),
        ("x", r"bench.json is not valid JSON \(Expecting value.*\); expected what `vitfreeze bench step --json`"),
        ('{"rows": [', "is not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        (ROWS % (1, ""), "must hold the time of a step with 0 frozen layers and with at least one other number"),
        (ROWS % ("NaN", ', {"frozen_layers": 3, "step_ms": 1}'), "must hold the time of a step"),
        (ROWS % ('"fast"', ""), "does not hold what"),
    ],
)
def test_a_file_that_is_no_bench_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_step_times(path)
    assert "bench.json" in str(refused.value)
    assert "Error" not in str(refused.value)


def ways_of(recipe: str = "paper", *overrides: str, **target: float) -> dict[str, Target]:
    return {way.way: way for way in solve_targets(load_config(recipe, overrides), **target).ways}


def t_0_of(way: Target) -> float:
    return next(float(text.partition("=")[2]) for text in way.overrides or () if text.startswith("freeze.t_0"))


@pytest.mark.parametrize("wanted", [0.05, 0.152, 0.2, 0.28])
def test_targets_are_reached_and_not_by_more_than_needed(wanted: float) -> None:
    ways = ways_of(target_saving=wanted)
    plain = plan(load_config("off"))
    for way in ways.values():
        assert way.overrides is not None
        pasted = plan(load_config("paper", way.overrides))
        assert pasted.gpu_hours == pytest.approx(way.gpu_hours)
        assert way.saving == pytest.approx(1 - pasted.gpu_hours / plain.gpu_hours)
        assert round(way.saving, 12) >= wanted, "80 of 100 plain epochs save a fifth, but for the last bit"
    for how in ("linear", "squared", "cubic"):
        t_0 = t_0_of(ways[f"freezing, {how}"])
        assert plan(configure(freeze__how=how, freeze__t_0=t_0)).saving == pytest.approx(
            ways[f"freezing, {how}"].saving
        )
        assert plan(configure(freeze__how=how, freeze__t_0=t_0 + 1e-4)).saving < wanted
    if wanted == 0.152:
        assert t_0_of(ways["freezing, cubic"]) == pytest.approx(0.8, abs=2e-3)
    assert ways["plain, other length"].gpu_hours == pytest.approx((1 - wanted) * plain.gpu_hours, rel=2e-3)


def test_small_images_come_before_freezing_and_freezing_before_fewer_epochs() -> None:
    plain = plan(load_config("off"))
    chosen = {share: ways_of(target_saving=share)["together"] for share in (0.2, 0.4, 0.6)}
    for share, way in chosen.items():
        assert way.overrides is not None
        config = load_config("paper", way.overrides)
        assert config.curriculum.img_size
        assert (config.freeze.mode, config.run.length.value < 100) == {
            0.2: ("off", False), 0.4: ("schedule", False), 0.6: ("schedule", True),
        }[share]  # fmt: skip
        assert plan(config).gpu_hours <= (1 - share) * plain.gpu_hours
    assert "run.length=76 epochs" in (chosen[0.6].overrides or ()), "0.4 of the plain cost at 0.526 of it an epoch"


def test_hours_are_a_target_too_and_count_the_recipes_own_curriculum() -> None:
    three = ways_of("half", target_gpu_hours=3)["other length"]
    assert three.overrides is not None
    pasted = load_config("half", three.overrides)
    assert plan(pasted).gpu_hours == pytest.approx(three.gpu_hours)
    assert 2.97 < three.gpu_hours <= 3
    assert count_steps(pasted, steps_per_epoch=625).warmup_steps == pytest.approx(
        count_steps(pasted, steps_per_epoch=625).total_steps / 10, abs=1
    )  # the warm-up keeps its share
    solved = solve_targets(load_config("half"), target_gpu_hours=30)
    assert solved.plain_gpu_hours == pytest.approx(plan(load_config("off")).gpu_hours)
    sized = ways_of("off", "curriculum.decoded_share=[[0, 0.5]]", target_saving=0.1)["freezing, cubic"]
    without = ways_of("off", target_saving=0.1)["freezing, cubic"]
    assert t_0_of(sized) > t_0_of(without), "the curriculum has saved a part of it already"


def test_more_hours_than_it_takes_are_more_epochs() -> None:
    plain = plan(load_config("off")).gpu_hours
    assert ways_of(target_gpu_hours=2.5 * plain)["together"].overrides == (
        "optim.warmup=0.1", "freeze.mode=off", "run.length=250 epochs",
    )  # fmt: skip


def test_targets_show_what_the_authors_measured_nearby() -> None:
    text = format_targets(solve_targets(load_config("paper"), target_saving=0.2))
    assert "80.7 % at t_0 0.7; 81.5 % at t_0 0.75" in text
    assert "82.5 % at t_0 0.5" in text
    assert "    freeze.mode=off 'curriculum.img_size=[[0, 128], [" in text, "ready to be pasted into a shell"
    small = solve_targets(configure(model__size="vit_small_patch16"), target_saving=0.2)
    assert all(way.authors == "" for way in small.ways)


def test_a_way_that_does_not_lead_there_says_how_far_it_leads() -> None:
    ways = ways_of(target_saving=0.6)
    for how, most in (("linear", 0.286), ("squared", 0.387), ("cubic", 0.436)):
        way = ways[f"freezing, {how}"]
        assert way.overrides is None
        assert way.saving == pytest.approx(most, abs=1e-3)
    assert ways["small images first"].overrides is not None
    with pytest.raises(ConfigError, match=r"100\.0% cannot be reached.*at least 0\.0\d+ of 45\.9 GPU-hours"):
        solve_targets(configure(), target_saving=0.9999)
    for wanted in (0, 1, -0.1):
        with pytest.raises(ConfigError, match="strictly between 0 and 1"):
            solve_targets(configure(), target_saving=wanted)
    for hours in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match="a number above 0"):
            solve_targets(configure(), target_gpu_hours=hours)


def test_a_run_by_warm_up_stable_decay_freezes_by_its_rates() -> None:
    way = ways_of("off", "optim.schedule=wsd", target_saving=0.2)["freezing, cubic"]
    assert way.overrides is not None
    assert {"freeze.mode=schedule", "freeze.rates=global"} <= set(way.overrides)


@pytest.mark.parametrize(
    ("values", "arguments", "words"),
    [
        ({}, {"images_per_epoch": 100}, "batch.global_size is 2048.*100 crops"),
        ({}, {"world_size": 0}, "number of ranks is 0"),
        ({}, {"world_size": 7}, "batch.global_size is 2048.*256 x 7"),
        ({}, {"teraflops": 0}, "TFLOP/s is 0"),
        ({}, {"bandwidth_gigabytes": -1}, "bandwidth in GB/s is -1"),
        ({"optim__warmup": "100 epochs"}, {}, "optim.warmup"),
        ({"run__ds_config": "missing.json"}, {}, "run.ds_config is 'missing.json'"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(configure(**values), **arguments)


def test_adaptive_plan_gives_a_bound_and_follows_the_log() -> None:
    config = configure(freeze__mode="adaptive")
    whole = plan(config)
    assert whole.saving == 0
    assert "at most 31" in whole.notes[0]
    events = [
        {"event": "save", "step": 10},
        {"event": "adaptive_check", "step": 31_512, "changes": None, "frozen_layers": 2},
        {"event": "adaptive_check", "step": 40_000, "changes": None, "frozen_layers": 5},
    ]
    stages = plan(config, events=events).stages
    assert [(stage.first_step, stage.frozen_layers) for stage in stages] == [(0, 0), (31_512, 2), (40_000, 5)]


def test_text_and_json_hold_the_plan() -> None:
    whole, other = plan(load_config("paper")), plan(load_config("t09"))
    text = format_plan(whole)
    assert "layer 11" in text
    assert "15.2% of the step time" in text
    assert "82.5 % at t_0 0.8 in 42 V100-hours" in text
    assert plan(configure(data__crops_per_image=4)).steps_per_epoch == 2502
    table = format_plans_side_by_side(whole, other)
    assert "8.1%" in table
    assert "82.8 % at t_0 0.9" in table


def test_plan_needs_no_torch_and_answers_in_two_seconds() -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from vitfreeze.config import load_config\n"
        "from vitfreeze.planner import format_plan, plan, solve_targets\n"
        "config = load_config('paper'); print(format_plan(plan(config))); solve_targets(config, target_saving=0.2)\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "assert time.perf_counter() - start < 2, time.perf_counter() - start"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)


# Against a measured run ----------------------------------------------------------------------------------------------


def metric(step: int, frozen_layers: int, speed: float) -> dict[str, Any]:
    return {
        "step": step, "frozen_layers": frozen_layers, "images_per_second": speed, "data_wait_fraction": 0.1,
        "optimizer_state_bytes": 1000,
    }  # fmt: skip


def test_comparison_weighs_stages_by_their_steps() -> None:
    whole = plan(configure(run__length="100 steps", optim__warmup=0), steps_per_epoch=10)
    speeds = {stage.frozen_layers: 100 / stage.relative_cost for stage in whole.stages}
    metrics = [metric(1, 0, 1.0)]  # the first line holds the warm-up of caches
    for stage in whole.stages:
        ends = {*range(stage.first_step + 10, stage.end_step, 10), stage.end_step}
        metrics += [metric(step, stage.frozen_layers, speeds[stage.frozen_layers]) for step in sorted(ends)]
    comparison = compare_with_measurement(whole, metrics, events=[{"event": "freeze", "seconds": 1.5}])
    assert sum(stage.steps for stage in comparison.stages) == 100
    assert comparison.measured_saving == pytest.approx(whole.saving)
    assert comparison.predicted_saving == pytest.approx(whole.saving)
    assert comparison.freezing_seconds == 1.5
    slower = [{**line, "images_per_second": min(line["images_per_second"], 120)} for line in metrics]
    measured = compare_with_measurement(whole, slower)
    assert 0 < measured.measured_saving < measured.predicted_saving
    text = format_comparison(measured)
    assert f"Freezing saved {measured.measured_saving:.1%} of the step time" in text


def test_comparison_of_a_curriculum_is_with_plain_steps() -> None:
    stages = [[0, 128], [0.3, 160], [0.5, 224]]
    config = configure(run__length="100 steps", optim__warmup=0, curriculum__img_size=stages)
    whole = plan(config, steps_per_epoch=10)
    kinds = [(stage.frozen_layers, stage.images.img_size) for stage in whole.stages]
    assert kinds[:3] == [(0, 128), (0, 160), (0, 224)]
    metrics = []
    for stage in whole.stages:  # small images cost a quarter more than planned, and everything else what was planned
        speed = 100 / stage.relative_cost / (1.25 if stage.images.img_size == 128 else 1)
        metrics += [
            {**metric(step, stage.frozen_layers, speed), "img_size": stage.images.img_size}
            for step in range(stage.first_step + 1, stage.end_step + 1)
        ]
    comparison = compare_with_measurement(whole, metrics)
    first = comparison.stages[0]
    assert comparison.reference.images.img_size == 224
    assert first.measured_cost == pytest.approx(1.25 * first.predicted_cost)
    for stage in comparison.stages[1:]:
        assert stage.measured_cost == pytest.approx(stage.predicted_cost)
    text = format_comparison(comparison)
    assert "pixels" in text
    assert "masked" not in text
    assert "Freezing and the curriculum saved" in text
    early = compare_with_measurement(whole, [line for line in metrics if line["img_size"] == 128])
    assert early.measured_saving == pytest.approx(early.predicted_saving) == pytest.approx(1 - first.predicted_cost)
    assert "the plan's ratio to the steps at 128 pixels" in format_comparison(early)


def test_comparison_covers_only_what_was_logged() -> None:
    whole = plan(configure(run__length="100 steps", optim__warmup=0), steps_per_epoch=10)
    early = compare_with_measurement(whole, [metric(10, 0, 50.0), metric(20, 0, 100.0)])
    assert early.predicted_saving == early.measured_saving == 0
    assert [stage.steps for stage in early.stages] == [20]
    with pytest.raises(ValueError, match="no step before the first freeze"):
        compare_with_measurement(whole, [metric(90, 5, 50.0)])


def test_step_times_beyond_the_last_measured_prefix_keep_its_ratio() -> None:
    costs = ModelCosts.from_config(configure())
    times = StepTimes(source="x", images=8, step_ms={0: 100.0, 5: 90.0})
    ratio = 0.9 / (costs.step_flops(5) / costs.step_flops(0))
    assert times.relative_cost(12, costs=costs) == pytest.approx(ratio * costs.step_flops(12) / costs.step_flops(0))


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vitfreeze", "plan", *arguments], capture_output=True, text=True,
        cwd=Path(__file__).parents[1], check=False,
    )  # fmt: skip


def test_command_prints_a_plan_a_target_and_a_comparison() -> None:
    whole = run_cli("paper", "freeze.t_0=0.9", "--nodes", "2", "--gpus", "4", "--bandwidth", "25", "--json")
    assert json.loads(whole.stdout)["machine"]["world_size"] == 8
    assert "0.7218" in run_cli("paper", "--target-saving", "0.20").stdout
    hours = json.loads(run_cli("paper", "--target-hours", "3", "--tflops", "100", "--json").stdout)
    assert hours["chosen"]["gpu_hours"] <= 3
    assert hours["timing"] == "counted operations at 100 TFLOP/s per GPU"
    side_by_side = run_cli("--compare", "paper", "off", "freeze.how=linear", "freeze.t_0=0.5").stdout
    assert "t_0 0.5 linear" in side_by_side
    assert "one cosine" in side_by_side


def test_command_refuses_in_one_line() -> None:
    refused = run_cli("paper", "--target-saving", "0.9999")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cannot be reached" in refused.stderr
    both = run_cli("paper", "--target-saving", "0.2", "--target-hours", "3")
    assert both.returncode == 2
    assert "exclude each other" in both.stderr
