"""Frozen layers leave DeepSpeed exactly: measured on two real processes, in every ZeRO stage and precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import engine_scenarios as scenarios
import pytest
import torch
from layers import head_of, layer_of
from processes import run_ranks
from toy_model import ToyModel

from vitfreeze.architecture import tap_blocks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

WORLD_SIZE = 2
RANKS = range(WORLD_SIZE)
FP16 = [name for name in scenarios.COMBINATIONS if "fp16" in name]
STAGE_1_FP16 = "1-fp16"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What every rank of one start of two processes saw."""
    return run_ranks(scenarios.everything_on_two, folder, timeout=560)


@pytest.fixture(scope="module")
def rare_ranks() -> list[dict[str, Any]]:
    return run_ranks(scenarios.rare_on_two, timeout=560)


@pytest.fixture(params=[*scenarios.COMMON, *(pytest.param(name, marks=pytest.mark.slow) for name in scenarios.RARE)])
def combination(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def runs(combination: str, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """The dropping run and its soft-frozen oracle, per rank."""
    fixture = "ranks" if combination in scenarios.COMMON else "rare_ranks"
    return [result["compared"][combination] for result in request.getfixturevalue(fixture)]


def frozen_at(step: int) -> int:
    return max(layers for start, layers in scenarios.FREEZES.items() if start <= step)


def groups_at(frozen_layers: int) -> dict[str, int]:
    """Numbers of elements of the groups that train, found without the engine."""
    model, sizes = ToyModel(), {}
    for name, parameter in model.named_parameters():
        layer, head = layer_of(name), head_of(name)
        leaves_with = layer if head is None else tap_blocks(model.depth)[head]
        if leaves_with >= frozen_layers:
            unit = f"layer_{layer:02d}" if head is None else f"head_{head}"
            kind = "decay" if parameter.ndim > 1 else "no_decay"
            sizes[f"{unit}.{kind}"] = sizes.get(f"{unit}.{kind}", 0) + parameter.numel()
    return sizes


def padded(numel: int) -> int:
    """ZeRO 1 and 2 pad a group to a multiple of twice the number of ranks."""
    return math.ceil(numel / (2 * WORLD_SIZE)) * 2 * WORLD_SIZE


def kinds(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for run in runs:
        yield from (run["dropped"], run["soft"])


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        difference = (value.float() - expected[name].float()).abs().max().item()
        assert difference <= tolerance, f"{name} differs by {difference:.2e}"


# (a)
def test_frozen_weights_do_not_move_by_one_bit(runs: list[dict[str, Any]]) -> None:
    for run in kinds(runs):
        assert len(run["frozen_bits"]) == 3 + 4 * 4 + 2 * 4  # layers 0 to 4, heads 0 and 1
        for name, bits in run["frozen_bits"].items():
            assert torch.equal(run["weights"][name], bits), name


def test_all_others_move_at_every_step(runs: list[dict[str, Any]], combination: str) -> None:
    for run in kinds(runs):
        for step in run["steps"]:
            assert step["moved"] == ([] if step["overflowed"] else step["moved"])
            expected = set() if step["overflowed"] else set(step["trained"])
            missing = expected - set(step["moved"])
            # A half-precision weight of magnitude 1 may round back to where it was.
            assert not missing or "fp32" not in combination.split("-")[1], missing
            assert len(missing) <= 0.2 * len(expected)


# (b)
def test_trajectory_is_that_of_layers_held_still(runs: list[dict[str, Any]], combination: str) -> None:
    for run in runs:
        dropped, soft = run["dropped"], run["soft"]
        assert_close(dropped["weights"], soft["weights"], tolerance=1e-6)
        assert dropped["groups"].keys() == soft["groups"].keys() == groups_at(5).keys()
        for name, group in dropped["groups"].items():
            for key in ("master", "exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(group[key], soft["groups"][name][key], rtol=1e-6, atol=1e-6)
        for ours, theirs in zip(dropped["steps"], soft["steps"], strict=True):
            assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-6, nan_ok=True)


def test_ranks_hold_the_same_weights(runs: list[dict[str, Any]]) -> None:
    first, second = (run["dropped"]["weights"] for run in runs)
    assert_close(first, second, tolerance=0)


@pytest.mark.parametrize("name", ["0-fp32", "1-fp32", "2-fp32"])
def test_trajectory_is_that_of_plain_torch(ranks: list[dict[str, Any]], name: str) -> None:
    """An oracle without DeepSpeed: one process, the whole batch, layers really taken out."""
    assert_close(ranks[0]["compared"][name]["dropped"]["weights"], ranks[0]["plain"], tolerance=2e-6)


# (c)
def test_traffic_is_exactly_the_active_share(runs: list[dict[str, Any]], combination: str) -> None:
    stage = scenarios.COMBINATIONS[combination][0]
    for run in runs:
        for step, seen in enumerate(run["dropped"]["steps"]):
            sizes = groups_at(frozen_at(step))
            reduced = sum(sizes.values()) * (2 if stage == 2 else 1)  # stage 2 reduces both micro-batches
            assert seen["gradient_elements"] == reduced
            gathered = sum(map(padded, sizes.values())) if stage and not seen["overflowed"] else 0
            expected = {"all_reduce": reduced, "all_gather_into_tensor": gathered}
            assert seen["traffic"] == {kind: count for kind, count in expected.items() if count}, step


def test_oracle_shows_what_requires_grad_alone_would_leave(runs: list[dict[str, Any]], combination: str) -> None:
    """The counting counts: soft-frozen groups are still gathered and still hold state."""
    stage = scenarios.COMBINATIONS[combination][0]
    for run in runs:
        dropped, soft = run["dropped"]["steps"][-1], run["soft"]["steps"][-1]
        assert soft["bytes"][0] > dropped["bytes"][0]
        if stage:
            assert soft["traffic"]["all_gather_into_tensor"] > dropped["traffic"]["all_gather_into_tensor"]


# (d)
def test_optimizer_state_is_exactly_the_active_share(runs: list[dict[str, Any]], combination: str) -> None:
    stage, precision, _ = scenarios.COMBINATIONS[combination]
    bytes_each = 8 if (stage, precision) == (0, "fp32") else 12  # there the weights are the master weights
    for step in range(scenarios.STEPS):
        sizes = groups_at(frozen_at(step)).values()
        of_ranks = [run["dropped"]["steps"][step]["bytes"] for run in runs]
        for used, padding, held in of_ranks:
            assert used + padding == held
        if stage:
            assert sum(used for used, _, _ in of_ranks) == bytes_each * sum(sizes)
            assert sum(padding for _, padding, _ in of_ranks) == bytes_each * sum(padded(n) - n for n in sizes)
        else:
            assert of_ranks == [(bytes_each * sum(sizes), 0, bytes_each * sum(sizes))] * WORLD_SIZE


def test_events_tell_what_left(runs: list[dict[str, Any]]) -> None:
    for run in runs:
        events = run["dropped"]["events"]
        assert [(event["step"], event["layers"], set(event["units"])) for event in events] == [
            (2, (0,), {"layer_00"}),
            (3, (1, 2), {"layer_01", "layer_02", "head_0"}),
            (5, (3, 4), {"layer_03", "layer_04", "head_1"}),
        ]
        assert all(sorted(event["dropped"]) == sorted(event["units"]) for event in events)
        for event in events:
            assert event["seconds"] > 0
            assert event["trainable_parameters"] == sum(groups_at(frozen_at(event["step"])).values())


# (e)
@pytest.mark.parametrize("name", ["1-fp32", pytest.param("0-fp32", marks=pytest.mark.slow),
                                  pytest.param("2-bf16", marks=pytest.mark.slow)])  # fmt: skip
def test_dead_engines_leave_nothing(name: str, request: pytest.FixtureRequest) -> None:
    for rank in request.getfixturevalue("ranks" if name == "1-fp32" else "rare_ranks"):
        seen = rank["leaks"][name]
        assert seen["dead"] == [True] * 12, "engine, ZeRO optimizer, AdamW and master weights of a drop"
        assert set(seen["hooks"]) == {0}
        assert seen["optimizers"] == 1
        start, end = seen["memory"][0], seen["memory"][-1]
        assert end <= start, f"process memory rose from {start / 2**20:.1f} to {end / 2**20:.1f} MiB in 12 drops"


# (f)
def test_counters_survive(runs: list[dict[str, Any]]) -> None:
    for run in kinds(runs):
        for step, seen in enumerate(run["steps"], start=1):
            scalars = seen["scalars"]
            assert (scalars["global_steps"], scalars["micro_steps"]) == (step, 2 * step)
            assert scalars["global_samples"] == step * scenarios.GLOBAL_BATCH
            skipped = sum(earlier["overflowed"] for earlier in run["steps"][:step])
            assert scalars["skipped_steps"] == skipped
            assert set(scalars["adam_steps"].values()) == {step - skipped}


def test_loss_scale_and_its_window_survive(runs: list[dict[str, Any]], combination: str) -> None:
    for run in runs:
        for ours, theirs in zip(run["dropped"]["steps"], run["soft"]["steps"], strict=True):
            assert ours["loss_scale"] == theirs["loss_scale"]
            assert ours["scalars"]["loss_scaler"] == theirs["scalars"]["loss_scaler"]
        scales = [step["loss_scale"] for step in run["dropped"]["steps"]]
        if combination in FP16:
            assert len(set(scales)) > 2, "the scale must grow and shrink in this test, or it shows nothing"
        else:
            assert set(scales) == {1.0}


# (g)
@pytest.mark.parametrize("name", [STAGE_1_FP16, "2-fp16-fp32-sums"])
def test_overflow_on_the_step_of_a_drop(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        run = rank["compared"][name]["dropped"]
        overflowed = [step for step, seen in enumerate(run["steps"]) if seen["overflowed"]]
        assert overflowed == list(scenarios.OVERFLOW_STEPS)
        assert run["events"][1]["step"] in overflowed
        for step in overflowed:
            assert run["steps"][step]["moved"] == []
            assert run["steps"][step]["loss_scale"] == run["steps"][step - 1]["loss_scale"] / 2


def test_frozen_masters_keep_full_precision(runs: list[dict[str, Any]], combination: str) -> None:
    precision = scenarios.COMBINATIONS[combination][1]
    assert runs[1]["dropped"]["frozen_masters"] == {}
    run = runs[0]["dropped"]
    assert run["frozen_masters"].keys() == run["frozen_bits"].keys()
    finer = 0
    for name, master in run["frozen_masters"].items():
        assert master.dtype == torch.float32
        assert torch.equal(master.to(run["weights"][name].dtype), run["frozen_bits"][name])
        finer += int(not torch.equal(master, run["frozen_bits"][name].float()))
    assert (finer > 0) == (precision != "fp32")


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_state_travels_between_zero_stages(ranks: list[dict[str, Any]], name: str, stage: int) -> None:
    travels = ranks[0]["travels"]
    # bf16 sums of another order, or without fp32, differ by a rounding of the gradient.
    assert_close(
        travels[f"{name}-to-{stage}"]["weights"], travels[name]["weights"], tolerance=1e-6 if name == "fp32" else 2e-2
    )
    assert travels[f"{name}-to-{stage}"]["scalars"] == travels[name]["scalars"]


def test_same_stage_resumes_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_close(rank["travels"]["fp32-to-1"]["weights"], rank["travels"]["fp32"]["weights"], tolerance=0)
        assert_close(rank["travels"]["bf16-to-2"]["weights"], rank["travels"]["bf16"]["weights"], tolerance=0)
    for name in ("fp32", "bf16"):
        ours, theirs = (
            ranks[0]["travels"][key]["masters"] for key in (f"{name}-to-{1 if name == 'fp32' else 2}", name)
        )
        assert_close(ours, theirs, tolerance=0)


def test_state_of_stage_0_is_shared_out(ranks: list[dict[str, Any]]) -> None:
    travels = ranks[0]["travels"]
    assert_close(travels["fp32-from-0"]["weights"], travels["fp32"]["weights"], tolerance=1e-6)


def test_state_travels_to_one_rank_and_back(ranks: list[dict[str, Any]], folder: Path) -> None:
    run_ranks(scenarios.travel_on_one, folder, world_size=1)
    for returned, stayed in zip(run_ranks(scenarios.travel_back_to_two, folder), ranks, strict=True):
        assert_close(returned["fp32"]["weights"], stayed["travels"]["fp32"]["weights"], tolerance=1e-6)
        # One rank rounds the gradient of the whole batch to bf16 once, two ranks round halves.
        assert_close(returned["bf16"]["weights"], stayed["travels"]["bf16"]["weights"], tolerance=2e-2)
        assert returned["bf16"]["scalars"] == stayed["travels"]["bf16"]["scalars"]


# -- LocalMIM ----------------------------------------------------------------------------------------------------------


def is_prefix(name: str, *, frozen_layers: int) -> bool:
    parts = name.split(".")
    return parts[0] == "patch_embed" or (parts[0] == "blocks" and int(parts[1]) + 1 < frozen_layers)


def test_class_token_may_keep_training(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        run = rank["cls_token"]
        assert run["units"][0] == "cls_token"
        assert not torch.equal(run["weights"]["cls_token"], run["at_freeze"]["cls_token"])
        assert torch.equal(run["weights"]["patch_embed.proj.weight"], run["at_freeze"]["patch_embed.proj.weight"])
        prefix = [name for name in run["weights"] if is_prefix(name, frozen_layers=1)]
        assert all(torch.equal(run["weights"][name], run["at_freeze"][name]) for name in prefix)
        assert_close(run["weights"], rank["cls_token_soft"]["weights"], tolerance=1e-6)


def test_prefix_may_be_in_half_precision(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        run = rank["half_prefix"]
        assert math.isfinite(run["loss"])
        for name, weight in run["weights"].items():
            prefix = is_prefix(name, frozen_layers=5) or name == "cls_token" or name.startswith(("heads.0", "heads.1"))
            assert weight.dtype == (torch.bfloat16 if prefix else torch.float32), name
        assert bool(run["masters"]) == (number == 0)
        for name, master in run["masters"].items():
            assert master.dtype == torch.float32
            assert torch.equal(master.bfloat16(), run["weights"][name])
        if number == 0:  # up to the first freeze both runs are the same
            for name in ("cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"):
                assert torch.equal(run["masters"][name], rank["mim"]["at_freeze"][name])


def test_larger_micro_batches_change_nothing_but_rounding(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        grown, steady = rank["grown"], rank["mim"]
        assert (grown["accumulation"], steady["accumulation"]) == (1, 2)
        assert grown["global_samples"] == steady["global_samples"]
        # Attention does not depend on the bias of its keys: their gradient is rounding alone, which Adam scales up.
        for weights in (grown["weights"], steady["weights"]):
            for name in (name for name in weights if name.endswith("qkv.bias")):
                weights[name] = torch.stack(weights[name].chunk(3))[[0, 2]]
        assert_close(grown["weights"], steady["weights"], tolerance=1e-5)


# -- adaptive freezing, waiting, misuse --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1])
def test_change_of_layers_is_the_same_on_all_ranks(ranks: list[dict[str, Any]], stage: int) -> None:
    for measure in ("weight", "gradient"):
        readings = [rank["changes"][f"{stage}-{measure}"]["readings"] for rank in ranks]
        assert readings[0] == readings[1]
        first, second, third = readings[0]
        assert first is None
        assert third[:2] == (None, None)
        assert None not in second + third[2:]
    seen = ranks[0]["changes"][f"{stage}-weight"]
    before, after = seen["weights"]
    for layer, change in enumerate(seen["readings"][1]):
        names = [name for name in before if layer_of(name) == layer]
        moved = sum(float((after[name] - before[name]).double().square().sum()) for name in names)
        size = sum(float(before[name].double().square().sum()) for name in names)
        assert change == pytest.approx(math.sqrt(moved / size), rel=1e-4)
    moments = [rank["changes"][f"{stage}-gradient"]["moments"] for rank in ranks]
    for layer, change in enumerate(ranks[0]["changes"][f"{stage}-gradient"]["readings"][1]):
        before, after = (math.sqrt(sum(rank[index][layer] for rank in moments)) for index in (0, 1))
        assert change == pytest.approx(abs(after - before) / before, rel=1e-3)


def test_drops_wait_for_each_other(ranks: list[dict[str, Any]]) -> None:
    events = [
        (event["step"], event["layers"], set(event["units"]), set(event["dropped"]))
        for event in ranks[0]["waiting"]["events"]
    ]
    assert events == [
        (1, (0,), {"layer_00"}, {"layer_00"}),
        (2, (1,), {"layer_01"}, set()),
        (3, (2,), {"layer_02", "head_0"}, set()),
        (6, (), set(), {"layer_01", "layer_02", "head_0"}),
        (7, (3,), {"layer_03"}, set()),
    ]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("no rates", "RuntimeError: set_learning_rates must be called"),
        ("rate missing", "no learning rate for head_3, which trains"),
        ("other loss", "backward takes the `loss` of the last output"),
        ("freeze in mid-step", "layers freeze only between optimizer steps, not after micro-batch 1 of 2"),
        ("state in mid-step", "state is taken only between optimizer steps"),
        ("all frozen", "9 frozen layers are all 9: at least the last must train"),
        ("all frozen at the start", "9 frozen layers are all 9"),
        ("ranks disagree", "ranks disagree: between 1 and 2 frozen layers"),
        ("thaw", "2 frozen layers, but 3 are frozen for good"),
        ("other batch", "micro-batch 4 x accumulation 2 = 8 images per rank"),
        ("other prefix", "the saved state has 2 frozen layers, this engine 3"),
        ("short slice", "asked for elements"),
        ("half prefix", "freeze.prefix_precision = 'fp32': allowed are auto and bf16"),
        ("backward through half", "the backward pass runs through the prefix"),
        ("strange parameter", "parameter extra.weight trains but belongs to no freeze unit of ToyModel"),
    ],
)
def test_misuse_is_refused(ranks: list[dict[str, Any]], what: str, sentence: str) -> None:
    for rank in ranks:
        assert sentence in rank["misuse"].get(what, "was not refused")
