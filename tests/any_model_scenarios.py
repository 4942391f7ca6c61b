"""What the ranks of tests/test_any_model.py do: other people's models, with units of the caller's choice."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from engine_scenarios import clone_tensors, ds_config, held_bytes, weights_of
from torch import Tensor, nn

from vitfreeze.checkpoint import load_engine, save_engine
from vitfreeze.engine import FreezingEngine, join_ranks

GLOBAL_BATCH = 4
ADAM: Mapping[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}
WEIGHT_DECAY = 0.1
FREEZES = {0: 0, 1: 1, 3: 2, 5: 3}  # step: frozen units
STEPS = 7
SAVES = (2, 4, 6)  # after the step of each freeze
# model, ZeRO stage, precision
COMMON = (("gpt2", 1, "fp32"), ("gpt2", 2, "bf16"), ("convnext", 2, "fp32"), ("convnext", 0, "bf16"))
MATRIX = tuple(
    (model, stage, precision) for model in ("gpt2", "convnext") for stage in (0, 1, 2) for precision in ("fp32", "bf16")
)
RARE = tuple(key for key in MATRIX if key not in COMMON)


def name_of(key: tuple[str, int, str]) -> str:
    return "-".join(map(str, key))


def frozen_at(step: int) -> int:
    return max(units for start, units in FREEZES.items() if start <= step)


# -- models ------------------------------------------------------------------------------------------------------------


def gpt2(*, dropout: float = 0.0) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=31, n_positions=8, n_embd=12, n_layer=3, n_head=2, resid_pdrop=dropout, embd_pdrop=dropout,
        attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class ImageClassifier(nn.Module):
    """A timm model with its loss: what a user of timm writes; the output is the loss itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(images).float(), labels)


def convnext(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    net = timm.models.ConvNeXt(
        depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), num_classes=5, patch_size=2, drop_rate=dropout, drop_path_rate=dropout
    )
    return ImageClassifier(net)


UNITS: Mapping[str, Mapping[str, list[str]]] = {
    # lm_head is another name of wte: the tied weight freezes, because both of its names do.
    "gpt2": {
        "embed": ["transformer.wte", "transformer.wpe", "lm_head"],
        "block_0": ["transformer.h.0"],
        "block_1": ["transformer.h.1"],
        "block_2": ["transformer.h.2"],
    },
    "convnext": {
        "stem": ["net.stem"],
        "stage_0": ["net.stages.0"],
        "stage_1": ["net.stages.1"],
        "stage_2": ["net.stages.2"],
    },
}
MODELS: Mapping[str, Callable[..., nn.Module]] = {"gpt2": gpt2, "convnext": convnext}


def batch_of(name: str, step: int, *, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    if name == "gpt2":
        tokens = torch.randint(31, (GLOBAL_BATCH, 8), generator=generator)
        return {"input_ids": tokens, "labels": tokens}
    images = torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=generator)
    return {"images": images.to(dtype), "labels": torch.randint(5, (GLOBAL_BATCH,), generator=generator)}


def rate_of(unit: str, step: int) -> float:
    return 1e-3 * (1 + sum(map(ord, unit)) % 3) * (1 - step / 40)


def unit_of(parameter: str, units: Mapping[str, list[str]]) -> str:
    """Found without the engine; prefixes of the models here are whole names up to a dot."""
    owners = [name for name, prefixes in units.items() if any(f"{parameter}.".startswith(f"{p}.") for p in prefixes)]
    return owners[0] if owners else "rest"


# -- the engine, and plain torch ---------------------------------------------------------------------------------------


def build(name: str, stage: int, precision: str, *, model: nn.Module) -> FreezingEngine:
    return FreezingEngine(
        model,
        units=UNITS[name],
        ds_config=ds_config(stage, precision),
        micro_batch=GLOBAL_BATCH // join_ranks().world_size,
        weight_decay=WEIGHT_DECAY,
        **ADAM,
    )


def take_step(engine: FreezingEngine, name: str, step: int) -> float:
    """Take a step on this rank's part of the batch; return the mean loss over the ranks."""
    engine.set_learning_rates({unit: rate_of(unit, step) for unit in engine.unit_names})
    first = engine.rank * engine.micro_batch
    batch = batch_of(name, step, dtype=engine.dtype)
    output = engine(**{key: value[first : first + engine.micro_batch] for key, value in batch.items()})
    loss = output if isinstance(output, Tensor) else output.loss
    mean = loss.detach().float().clone()
    engine.backward(loss)
    engine.step()
    torch.distributed.all_reduce(mean)
    return float(mean) / engine.world_size


def train(engine: FreezingEngine, name: str, steps: range) -> list[float]:
    losses = []
    for step in steps:
        engine.freeze(frozen_at(step), step=step)
        losses.append(take_step(engine, name, step))
    return losses


def follow(engine: FreezingEngine, name: str, folder: Path) -> dict[str, Any]:
    """Train through three freezes, saving after each, and return what was seen at every step."""
    result: dict[str, Any] = {"losses": [], "bytes": [], "moved": [], "events": []}
    for step in range(STEPS):
        event = engine.freeze(frozen_at(step), step=step)
        result["events"] += [(event.units, event.dropped)] if event else []
        before = weights_of(engine)
        result["losses"].append(take_step(engine, name, step))
        after = weights_of(engine)
        result["moved"].append({key for key, value in after.items() if not torch.equal(value, before[key])})
        result["bytes"].append((engine.optimizer_state_bytes(), held_bytes(engine)))
        if step + 1 in SAVES:
            save_engine(folder / str(step + 1), engine, step=step + 1, extra={"seen": [step]})
    return {**result, **end(engine)}


def end(engine: FreezingEngine) -> dict[str, Any]:
    """Return all that an engine ended with."""
    groups = {name: vars(group) for name, group in engine.state().groups.items()}
    result = {"weights": weights_of(engine), "groups": clone_tensors(groups), "scalars": engine.state().scalars}
    result["masters"] = clone_tensors(engine.frozen_masters())
    engine.destroy()
    return result


def go_on(engine: FreezingEngine, name: str, folder: Path) -> dict[str, Any]:
    """Go on from a checkpoint to the end."""
    torch.manual_seed(12345 + engine.rank)  # dropout must come from the checkpoint
    saved = load_engine(folder, engine)
    assert saved is not None
    result = {"frozen": engine.frozen_layers, "extra": saved.extra, "step": saved.step}
    return {**result, "losses": train(engine, name, range(saved.step, STEPS)), **end(engine)}


def other(name: str, **settings: Any) -> nn.Module:
    """Return a model with other weights: all must come from the checkpoint."""
    model = MODELS[name](**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    return model


def train_and_resume(key: tuple[str, int, str], folder: Path, *, dropout: float = 0.0) -> dict[Any, Any]:
    """Follow a model, and resume after every freeze with an engine that knows of no freeze yet."""
    results: dict[Any, Any] = {"whole": follow(build(*key, model=MODELS[key[0]](dropout=dropout)), key[0], folder)}
    for step in SAVES:
        engine = build(*key, model=other(key[0], dropout=dropout))
        results[step] = go_on(engine, key[0], folder / str(step))
    return results


def follow_plainly(name: str, precision: str) -> list[float]:
    """Train with nothing but torch on whole batches: frozen parameters leave AdamW and autograd. Return the losses."""
    model, units = MODELS[name](), UNITS[name]
    masters = {key: value.detach().clone() for key, value in model.named_parameters()}
    if precision == "bf16":
        model.bfloat16()
    weights = dict(model.named_parameters())
    groups = [
        {
            "params": [master],
            "name": key,
            "weight_decay": WEIGHT_DECAY if master.ndim > 1 and not key.endswith(".bias") else 0.0,
        }
        for key, master in masters.items()
    ]
    optimizer, order, losses = torch.optim.AdamW(groups, foreach=False, **ADAM), [*units, "rest"], []
    for step in range(STEPS):
        trained = order[frozen_at(step) :]
        optimizer.param_groups[:] = [g for g in optimizer.param_groups if unit_of(g["name"], units) in trained]
        for key, weight in weights.items():
            weight.requires_grad_(unit_of(key, units) in trained)
        output = model(**batch_of(name, step, dtype=weights[next(iter(weights))].dtype))
        loss = output if isinstance(output, Tensor) else output.loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate_of(unit_of(group["name"], units), step)
            masters[group["name"]].grad = weights[group["name"]].grad.float()
        optimizer.step()
        for key, weight in weights.items():
            weight.data.copy_(masters[key])
            weight.grad = None
        losses.append(float(loss.detach()))
    return losses


def follow_all(matrix: Sequence[tuple[str, int, str]], folder: Path) -> dict[str, Any]:
    """Follow models through ZeRO stages and precisions, and in plain torch."""
    join_ranks()
    for name, _, _ in matrix:
        MODELS[name]()
    gc.freeze()  # what transformers brings need not be walked whenever an engine goes
    results: dict[str, Any] = {name_of(key): train_and_resume(key, folder / name_of(key)) for key in matrix}
    for name, precision in {(name, precision) for name, _, precision in matrix}:
        results[f"{name}-{precision}"] = follow_plainly(name, precision)
    return results


def follow_common(matrix: Sequence[tuple[str, int, str]], folder: Path) -> dict[str, Any]:
    """Run the common combinations, one with dropout, and one that goes on in every ZeRO stage."""
    results = follow_all(matrix, folder)
    results["dropout"] = train_and_resume(("convnext", 1, "fp32"), folder / "dropout", dropout=0.2)
    results["stages"] = travel(folder / "convnext-2-fp32")
    return results


def travel(folder: Path) -> dict[int, Any]:
    """Go on from the middle in every ZeRO stage, on however many ranks there are."""
    return {
        stage: go_on(build("convnext", stage, "fp32", model=other("convnext")), "convnext", folder / "4")
        for stage in (0, 1, 2)
    }
