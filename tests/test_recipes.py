"""Every recipe that comes with the package: it loads, its header tells the truth, it is planned, and it trains."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from tiny_shards import write_shards
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitfreeze.config import RECIPE_FOLDER, load_config
from vitfreeze.data import BatchShape, build_train_loader, normalize
from vitfreeze.engine import join_ranks
from vitfreeze.planner import plan
from vitfreeze.schedule import build_schedule
from vitfreeze.training.build import build_engine

RECIPES = sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml") if not path.stem.startswith("finetune"))
# Ranks, and the sustained TFLOP/s a rank at which the header counts its hours.
HARDWARE = {"1x8_v100": (8, 23.2), "4x8_v100": (32, 23.2), "1x8_a100": (8, 100.0)}
HARDWARE_RECIPES = [name for name in RECIPES if name.startswith("vit_")]
COUNTED_RECIPES = ["recommended", "half", "short"]
# Narrow, but as deep and with the same taps, heads and settings.
NARROW = (
    *("model.embed_dim=16", "model.num_heads=2", "model.decoder_embed_dim=16", "model.decoder_num_heads=2"),
    *("batch.global_size=4", "batch.micro_size=2", "data.workers=0"),
)


def hardware_of(recipe: str) -> tuple[int, float]:
    return next(figures for name, figures in HARDWARE.items() if recipe.endswith(name))


def narrow_sizes_of(recipe: str) -> list[str]:
    """The image sizes of a recipe, its curriculum's too, for images of 64 pixels: even grids of its patches."""
    config = load_config(recipe)
    least, full = 2 * config.model.resolve().patch_size, config.model.img_size
    stages = [[str(begin), least * round(64 * size / full / least)] for begin, size in config.curriculum.img_size]
    return ["model.img_size=64", f"curriculum.img_size={json.dumps(stages)}"]


def header_of(recipe: str) -> str:
    """The comment that a recipe opens with, as running text."""
    lines = (RECIPE_FOLDER / f"{recipe}.yaml").read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[:end])


def test_the_hardware_recipes_are_there() -> None:
    wanted = {f"vit_{size}_{machines}" for size in ("base", "large") for machines in HARDWARE}
    assert wanted == set(HARDWARE_RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_header_gives_a_command_that_names_the_recipe(recipe: str) -> None:
    command = (RECIPE_FOLDER / f"{recipe}.yaml").read_text().splitlines()[0]
    assert re.match(r"# (bash launch/\w+\.sh|vitfreeze)\b", command)
    assert recipe in command or f"{recipe}.sh" in command


@pytest.mark.parametrize("recipe", HARDWARE_RECIPES)
def test_the_header_says_what_the_plan_says(recipe: str) -> None:
    ranks, teraflops = hardware_of(recipe)
    header, config = header_of(recipe), load_config(recipe)
    predicted = plan(config, world_size=ranks, teraflops=teraflops)
    memory, hours = (
        re.search(r"Memory by the plan: ([\d.]+) GiB", header),
        re.search(r"by the plan: ([\d.]+) hours", header),
    )
    assert memory is not None
    assert float(memory.group(1)) == pytest.approx(predicted.peak_memory_bytes / 2**30, rel=0.02)
    assert hours is not None
    assert float(hours.group(1)) == pytest.approx(predicted.gpu_hours / ranks, rel=0.03)
    assert "top-1" in header
    assert predicted.peak_memory_bytes < 0.8 * 32 * 2**30, "it leaves room on a V100-32G"


@pytest.mark.parametrize("recipe", COUNTED_RECIPES)
def test_the_header_of_a_counted_recipe_says_what_the_plan_says(recipe: str) -> None:
    header, predicted = header_of(recipe), plan(load_config(recipe), teraflops=100.0)
    plain = plan(load_config("off"), teraflops=100.0)
    said = re.search(r"Cost by the plan: ([\d.]+) of the plain run's \(`off`\), ([\d.]+) A100-hours", header)
    epochs = re.search(r"The same hours buy ([\d.]+) epochs of plain LocalMIM", header)
    assert said is not None
    assert epochs is not None
    assert float(said.group(1)) == pytest.approx(predicted.gpu_hours / plain.gpu_hours, abs=0.005)
    assert float(said.group(2)) == pytest.approx(predicted.gpu_hours, abs=0.05)
    assert float(epochs.group(1)) == pytest.approx(predicted.plain_epochs, abs=0.05)
    assert "goal" in header
    assert "counted, not measured" in header
    assert not predicted.authors, "nobody has run it"


def test_recommended_costs_what_the_plain_run_costs_and_no_more() -> None:
    recommended, plain = (plan(load_config(name), teraflops=100.0) for name in ("recommended", "off"))
    assert 0.995 * plain.gpu_hours < recommended.gpu_hours <= plain.gpu_hours


def test_half_costs_half_and_short_takes_three_hours() -> None:
    half, short = (plan(load_config(name), teraflops=100.0) for name in ("half", "short"))
    assert half.saving == pytest.approx(0.5, abs=0.03)
    assert half.total_steps / half.steps_per_epoch == 100
    assert short.gpu_hours <= 3


@pytest.mark.parametrize("recipe", HARDWARE_RECIPES)
def test_a_recipe_for_gpus_compiles(recipe: str) -> None:
    assert load_config(recipe).model.compile


@pytest.mark.parametrize("recipe", HARDWARE_RECIPES)
def test_rates_are_in_proportion_to_the_batch_and_precision_to_the_card(recipe: str) -> None:
    ranks, _ = hardware_of(recipe)
    config = load_config(recipe)
    blr = 1.5e-4 if "large" in recipe else 2e-4
    assert config.base_lr == pytest.approx(blr * config.batch.global_size / 256)
    assert plan(config, world_size=ranks).machine.precision == ("fp16" if "v100" in recipe else "bf16")


def test_vit_large_follows_localmim() -> None:
    config = load_config("vit_large_1x8_v100")
    assert (config.optim.blr, config.model.hog_nbins, config.model.hog_bias) == (1.5e-4, 18, True)
    assert str(config.run.length) == "800 epochs"
    assert str(config.optim.warmup) == "40 epochs"
    assert config.batch.global_size == 8 * 128 * 4


def test_checkpointing_saves_the_memory_that_the_header_says() -> None:
    options = ["model.activation_checkpointing=true"]
    usual, saving = (plan(load_config("vit_large_1x8_v100", extra), world_size=8) for extra in ([], options))
    said = re.search(r"([\d.]+) GiB with model.activation_checkpointing=true", header_of("vit_large_1x8_v100"))
    assert said is not None
    assert float(said.group(1)) == pytest.approx(saving.peak_memory_bytes / 2**30, rel=0.02)
    assert saving.gpu_hours == pytest.approx(1.2 * usual.gpu_hours, rel=0.03), "a fifth longer"


def test_vit_huge_plans_too() -> None:
    config = load_config("vit_large_1x8_v100", ["model.size=vit_huge_patch16"])
    predicted = plan(config, world_size=8)
    assert len(predicted.stages) == 33
    assert predicted.peak_memory_bytes < 0.8 * 32 * 2**30


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What two steps of a recipe gave."""

    losses: list[float]
    dtype: torch.dtype
    accumulation: int
    skipped_steps: int
    loss_scale: float
    moved: bool


def take_two_steps(recipe: str, folder: Path) -> Trained:
    """Train everything of the recipe but its width on one process: in its first stage, and in its last if any."""
    shards = write_shards(folder / "shards", [8])
    config = load_config(recipe, [*NARROW, *narrow_sizes_of(recipe), f"data.train={shards}"])
    ranks = join_ranks()
    loader = build_train_loader(config, rank=ranks.rank, world_size=ranks.world_size)
    schedule = build_schedule(config, steps_per_epoch=loader.steps_per_epoch)
    engine = build_engine(config, ranks, frozen_layers=0)
    before = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    losses = []
    for step in (1, max(2, schedule.curriculum.stages[-1].first_step)):
        now = schedule.at(step)
        assert now.frozen_layers == 0
        engine.set_learning_rates(now.learning_rates)
        shape = BatchShape(now.images.img_size, engine.micro_batch)
        for batch in loader.batches(step, step + 1, shape_at=lambda _, shape=shape: shape):
            assert batch.images.shape[-1] == now.images.img_size
            output = engine(
                normalize(batch.images), noise=batch.noise, mask_ratio=now.images.mask_ratio,
                decoded_share=now.images.decoded_share,
            )  # fmt: skip
            assert output.loss.dtype == torch.float32
            engine.backward(output.loss)
            engine.step()
            losses.append(float(output.loss.detach()))
    assert len(losses) == 2 * engine.accumulation
    after = dict(engine.module.named_parameters())
    trained = Trained(
        losses=losses, dtype=next(engine.module.parameters()).dtype, accumulation=engine.accumulation,
        skipped_steps=engine.skipped_steps, loss_scale=engine.loss_scale,
        moved=any(not torch.equal(before[name], after[name]) for name in before),
    )  # fmt: skip
    engine.destroy()
    return trained


@pytest.fixture
def any_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the CPU train in fp16, which DeepSpeed refuses on those without units for it."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with torch._dynamo.config.patch(disable=True):  # tests/test_compile.py compiles
        yield


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_steps_of_it_train(recipe: str, tmp_path: Path) -> None:
    trained = take_two_steps(recipe, tmp_path)
    wanted = {"v100": torch.float16, "a100": torch.bfloat16}.get(recipe[-4:], torch.float32)
    assert trained.dtype == wanted
    assert trained.accumulation == 2
    assert all(0 < loss < 10 for loss in trained.losses), trained.losses
    assert trained.moved or trained.skipped_steps == 2, "fp16 begins with a scale that may overflow"


class NoNewCards(TorchDispatchMode):
    """Fails on what a V100 does not have: bfloat16 and flash attention. Notes which attention ran, and in what."""

    def __init__(self) -> None:
        super().__init__()
        self.attention: set[str] = set()
        self.softmax_inputs: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name()
        for value in tree_leaves((args, kwargs, result)):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16), f"{name} with bfloat16"
        assert "flash" not in name, f"{name} on a V100"
        if "attention" in name:
            self.attention.add(name)
        if name == "aten::_softmax" or name == "aten::_safe_softmax":
            self.softmax_inputs.add(args[0].dtype)
        return result


@pytest.mark.usefixtures("any_precision")
@pytest.mark.parametrize("recipe", ["vit_base_1x8_v100", "vit_large_1x8_v100"])
def test_the_v100_path_needs_no_bf16_and_no_flash_attention(recipe: str, tmp_path: Path) -> None:
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]), NoNewCards() as seen:
        trained = take_two_steps(recipe, tmp_path)
    assert trained.dtype == torch.float16
    assert trained.loss_scale > 1, "the loss is scaled"
    assert all(0 < loss < 10 for loss in trained.losses)
    assert any("math" in name for name in seen.attention) or seen.softmax_inputs, "attention ran, by one of the two"
