"""What the ranks of the engine's tests do. Scenarios measure and return; tests/test_engine*.py expects.

Many scenarios share one start of the processes, because starting costs more than they do.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from deepspeed.accelerator import get_accelerator
from layers import head_of, layer_of
from torch import Tensor
from toy_model import ToyModel

from vitfreeze.architecture import MODEL_SIZES
from vitfreeze.engine import FreezeEvent, FreezingEngine, join_ranks
from vitfreeze.model import LocalMIM

GLOBAL_BATCH = 8
# (stage, precision, extras): every stage and precision, with clipping, overlap and fp32 sums spread over them.
COMBINATIONS: Mapping[str, tuple[int, str, Mapping[str, Any]]] = {
    "0-fp32": (0, "fp32", {}),
    "0-fp32-clipped": (0, "fp32", {"gradient_clipping": 0.05}),
    "0-bf16": (0, "bf16", {}),
    "1-fp32": (1, "fp32", {}),
    "1-fp32-clipped-overlapped": (1, "fp32", {"gradient_clipping": 0.05, "overlap_comm": True}),
    "1-bf16": (1, "bf16", {"overlap_comm": True}),
    "1-fp16": (1, "fp16", {}),
    "2-fp32": (2, "fp32", {"overlap_comm": True}),
    "2-fp32-small-buckets": (2, "fp32", {"reduce_bucket_size": 64}),
    "2-bf16": (2, "bf16", {}),
    "2-bf16-fp32-sums": (2, "bf16", {"grad_accum_dtype": "fp32", "gradient_clipping": 0.05}),
    "2-fp16": (2, "fp16", {"gradient_clipping": 0.05}),
    "2-fp16-fp32-sums": (2, "fp16", {"grad_accum_dtype": "fp32", "overlap_comm": True}),
}
RARE = (*("0-fp32-clipped", "1-fp32-clipped-overlapped", "2-fp32-small-buckets", "2-bf16", "2-fp16"),)
COMMON = tuple(name for name in COMBINATIONS if name not in RARE)
FREEZES = {0: 0, 2: 1, 3: 3, 5: 5}  # step: frozen layers; two layers and a head at step 3
STEPS = 8
OVERFLOW_STEPS = (3, 6)  # in fp16: the step of a drop, and one after all drops


class SoftEngine(FreezingEngine):
    """The oracle: frozen groups stay in the optimizer for ever."""

    def _drop_is_due(self, step: int) -> bool:
        return False


def ds_config(stage: int, precision: str, extras: Mapping[str, Any] = {}) -> dict[str, Any]:
    zero = {"stage": stage}
    zero |= {key: extras[key] for key in ("overlap_comm", "reduce_bucket_size") if key in extras}
    config: dict[str, Any] = {"zero_optimization": zero, "gradient_clipping": extras.get("gradient_clipping", 0)}
    if precision == "fp16":
        # A short window, so that the scale grows, and shrinks at once, within a few steps.
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    if "grad_accum_dtype" in extras:
        config["data_types"] = {"grad_accum_dtype": extras["grad_accum_dtype"]}
    return config


class Traffic:
    """Counts the elements that pass through torch.distributed, tensors of one element (norms, flags) apart."""

    def __init__(self) -> None:
        self.elements: Counter[str] = Counter()
        for name, position in {
            "all_reduce": 0,
            "reduce": 0,
            "all_gather_into_tensor": 0,
            "reduce_scatter_tensor": 1,
        }.items():
            setattr(torch.distributed, name, self._counting(getattr(torch.distributed, name), name, position))

    def _counting(self, function: Callable[..., Any], name: str, position: int) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [*args, *kwargs.values()]
            if tensors[position].numel() > 1:
                self.elements[name] += tensors[position].numel()
            return function(*args, **kwargs)

        return counted

    def take(self) -> dict[str, int]:
        elements, self.elements = dict(self.elements), Counter()
        return elements


def images_of(step: int, *, width: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(GLOBAL_BATCH, width, generator=generator)


def rate_of(unit: str, step: int) -> float:
    return 1e-2 * (1 + sum(map(ord, unit)) % 7) * (1 - step / 40)


def take_step(engine: FreezingEngine, step: int, *, images: Tensor | None = None, **settings: Any) -> list[float]:
    """Take one optimizer step on the global batch of this step, whatever the number of ranks; return the losses."""
    images = images_of(step) if images is None else images
    engine.set_learning_rates({unit: rate_of(unit, step) for unit in engine.unit_names})
    losses, micro = [], engine.micro_batch
    for index in range(engine.accumulation):
        start = (index * engine.world_size + engine.rank) * micro
        output = engine(images[start : start + micro], **settings)
        losses.append(float(output.loss.detach()))
        engine.backward(output.loss)
        assert engine.step() == (index == engine.accumulation - 1)
    return losses


def build(kind: type[FreezingEngine], config: Mapping[str, Any], **settings: Any) -> FreezingEngine:
    model = settings.pop("model", None) or ToyModel()
    world_size = join_ranks().world_size
    accumulation = settings.pop("accumulation", 2)
    return kind(
        model,
        ds_config=config,
        micro_batch=GLOBAL_BATCH // world_size // accumulation,
        accumulation=accumulation,
        weight_decay=0.1,
        **settings,
    )


def weights_of(engine: FreezingEngine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.module.named_parameters()}


def held_bytes(engine: FreezingEngine) -> int:
    """Bytes of all tensors that the optimizer itself holds, the model's own weights apart."""
    optimizer = engine._live.optimizer
    weights = {id(parameter) for parameter in engine.module.parameters()}
    held = [tensor for group in optimizer.param_groups for tensor in group["params"] if id(tensor) not in weights]
    held += [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    return sum(tensor.nbytes for tensor in held)


def follow(kind: type[FreezingEngine], combination: str, traffic: Traffic) -> dict[str, Any]:
    """Train through all freezes and return what was seen at every step."""
    stage, precision, extras = COMBINATIONS[combination]
    engine = build(kind, ds_config(stage, precision, extras))
    frozen_bits: dict[str, Tensor] = {}
    seen: list[dict[str, Any]] = []
    events: list[FreezeEvent] = []
    for step in range(STEPS):
        frozen = max(layers for start, layers in FREEZES.items() if start <= step)
        event = engine.freeze(frozen, step=step)
        events += [event] if event else []
        weights = weights_of(engine)
        trained = {name for name, value in engine.module.named_parameters() if value.requires_grad}
        frozen_bits |= {name: value for name, value in weights.items() if name not in trained | set(frozen_bits)}
        traffic.take()
        images = images_of(step)
        if precision == "fp16" and step in OVERFLOW_STEPS:
            images = images * 1e30
        losses = take_step(engine, step, images=images)
        seen.append(
            {
                "losses": losses,
                "trained": sorted(trained),
                "traffic": traffic.take(),
                "gradient_elements": engine.gradient_elements(),
                "bytes": (engine.optimizer_state_bytes(), engine.optimizer_state_padding_bytes(), held_bytes(engine)),
                "moved": [name for name, value in weights_of(engine).items() if not torch.equal(value, weights[name])],
                "scalars": engine.state().scalars,
                "loss_scale": engine.loss_scale,
                "overflowed": engine.overflowed,
            }
        )
    state = engine.state()
    result = {
        "events": [asdict(event) for event in events],
        "steps": seen,
        "weights": weights_of(engine),
        "frozen_bits": frozen_bits,
        "groups": {name: asdict(group) for name, group in state.groups.items()},
        "frozen_masters": dict(state.frozen_masters),
    }
    result = {**result, "groups": clone_tensors(result["groups"])}
    engine.destroy()
    return result


def clone_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: clone_tensors(item) for key, item in value.items()}
    return value


def allow_fp16() -> None:
    """DeepSpeed refuses fp16 on CPUs without fp16 units; torch computes it all the same, slowly."""
    get_accelerator().is_fp16_supported = lambda: True


def compare_all(combinations: Sequence[str]) -> dict[str, Any]:
    """Follow every combination twice: with layers that leave, and with layers that are only held still."""
    allow_fp16()
    traffic = Traffic()
    join_ranks()
    return {
        name: {"dropped": follow(FreezingEngine, name, traffic), "soft": follow(SoftEngine, name, traffic)}
        for name in combinations
    }


# -- plain torch as an oracle ------------------------------------------------------------------------------------------


def train_in_plain_torch() -> dict[str, Tensor]:
    """Train the toy model with nothing but torch: frozen layers are taken out of AdamW and out of autograd."""
    model = ToyModel()
    units = _units(model)
    groups = [
        {"params": [value], "name": name, "weight_decay": 0.1 if value.ndim > 1 and not name.endswith("bias") else 0.0}
        for name, value in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    taps = {"head_0": 2, "head_1": 4, "head_2": 6, "head_3": 8}
    for step in range(STEPS):
        frozen = max(layers for start, layers in FREEZES.items() if start <= step)
        for group in optimizer.param_groups:
            unit = units[group["name"]]
            leaves_with = taps[unit] if unit in taps else int(unit[-2:])
            group["params"][0].requires_grad_(leaves_with >= frozen)
            group["lr"] = rate_of(unit, step)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"][0].requires_grad]
        optimizer.zero_grad()
        model(images_of(step), frozen_layers=frozen).loss.backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def _units(model: ToyModel) -> dict[str, str]:
    return {
        name: f"layer_{layer_of(name):02d}" if head_of(name) is None else f"head_{head_of(name)}"
        for name, _ in model.named_parameters()
    }


# -- leaks -------------------------------------------------------------------------------------------------------------


def drop_many(stage: int, precision: str) -> dict[str, Any]:
    """Drop twelve layers of a model of some megabytes, and look for what the engines leave behind."""
    depth, width = 14, 800
    model = ToyModel(width=width, depth=depth)
    engine = build(FreezingEngine, ds_config(stage, precision), model=model)
    process = psutil.Process()
    dead: list[bool] = []
    hooks: list[int] = []
    memory: list[int] = []
    for step in range(13):
        live = engine._live
        watched = [weakref.ref(live.engine), weakref.ref(live.engine.optimizer), weakref.ref(live.optimizer)]
        if stage:
            watched += [weakref.ref(group["params"][0]) for group in live.optimizer.param_groups]
        del live
        engine.freeze(step, step=step)
        if step:
            dead.append(all(reference() is None for reference in watched))
        take_step(engine, step, images=images_of(step, width=width))
        gc.collect()
        # glibc keeps freed pages for later; what counts is what nobody has freed.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()))
        memory.append(process.memory_info().rss)
    objects = sum(isinstance(item, torch.optim.AdamW) for item in gc.get_objects())
    engine.destroy()
    return {"dead": dead, "hooks": hooks, "memory": memory, "optimizers": objects}


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save(engine: FreezingEngine, folder: Path) -> None:
    state = engine.state()
    content = clone_tensors({"groups": {name: asdict(group) for name, group in state.groups.items()}})
    content |= {"scalars": dict(state.scalars), "masters": clone_tensors(state.frozen_masters)}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / f"{engine.rank}.pt")
    torch.distributed.barrier()


def load(engine: FreezingEngine, folder: Path) -> None:
    """Read slices from the files of however many ranks wrote them."""
    files = [torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))]

    def read(group: str, key: str, start: int, stop: int) -> Tensor:
        whole = torch.full([files[0]["groups"][group]["numel"]], torch.nan)
        for file in files:
            part = file["groups"][group]
            whole[part["start"] : part["start"] + part[key].numel()] = part[key]
        assert not whole.isnan().any(), "the ranks' shares leave gaps"
        return whole[start:stop]

    engine.load_state(read, files[0]["scalars"], frozen_masters=files[0]["masters"])


def go_on(
    config: Mapping[str, Any], *, steps: range, source: Path | None, target: Path | None, fresh_seed: int = 99
) -> dict[str, Any]:
    """Train from `source`, into a model with other initial weights, over `steps`; save to `target`."""
    frozen = 3
    engine = build(
        FreezingEngine, config, model=ToyModel(seed=fresh_seed if source else 0), frozen_layers=frozen if source else 0
    )
    if source:
        load(engine, source)
    for step in steps:
        engine.freeze(frozen if step >= 2 else 0, step=step)
        take_step(engine, step)
    if target:
        save(engine, target)
    result = {"weights": weights_of(engine), "scalars": engine.state().scalars}
    result["masters"] = clone_tensors(engine.frozen_masters())
    engine.destroy()
    return result


TRAVELS = {"fp32": (1, "fp32", {}), "bf16": (2, "bf16", {"grad_accum_dtype": "fp32"})}


def travel_on_two(folder: Path) -> dict[str, Any]:
    """Train to the end without a break, save on the way, and go on in other ZeRO stages."""
    results: dict[str, Any] = {}
    for name, (stage, precision, extras) in TRAVELS.items():
        config = ds_config(stage, precision, extras)
        results[name] = go_on(config, steps=range(8), source=None, target=None)
        go_on(config, steps=range(4), source=None, target=folder / name / "two")
        for other in (0, 1, 2):
            changed = ds_config(other, precision, extras if other == 2 else {})
            source = folder / name / "two"
            results[f"{name}-to-{other}"] = go_on(changed, steps=range(4, 8), source=source, target=None)
    # Stage 0 as the origin: its replicated state is shared out over the ranks.
    go_on(ds_config(0, "fp32"), steps=range(4), source=None, target=folder / "zero")
    results["fp32-from-0"] = go_on(ds_config(2, "fp32"), steps=range(4, 8), source=folder / "zero", target=None)
    return results


def travel_on_one(folder: Path) -> None:
    """Take over from two ranks, train two steps alone, save."""
    for name, (stage, precision, extras) in TRAVELS.items():
        config = ds_config(stage, precision, extras)
        go_on(config, steps=range(4, 6), source=folder / name / "two", target=folder / name / "one")


def travel_back_to_two(folder: Path) -> dict[str, Any]:
    """Take over from one rank and train to the end."""
    return {
        name: go_on(ds_config(stage, precision, extras), steps=range(6, 8), source=folder / name / "one", target=None)
        for name, (stage, precision, extras) in TRAVELS.items()
    }


# -- LocalMIM itself ---------------------------------------------------------------------------------------------------


def local_mim(**settings: Any) -> LocalMIM:
    torch.manual_seed(0)
    return LocalMIM(img_size=32, hog_nbins=9, **asdict(MODEL_SIZES["vit_tiny_test"]), **settings)


def pictures_of(step: int) -> Tensor:
    return torch.randn(GLOBAL_BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step))


def train_local_mim(
    kind: type[FreezingEngine], *, prefix_precision: str = "auto", grow_at: int | None = None, **settings: Any
) -> dict[str, Any]:
    """Train a tiny LocalMIM through three freezes; return weights before and after, and what the prefix looks like."""
    engine = build(kind, ds_config(1, "fp32"), model=local_mim(**settings), prefix_precision=prefix_precision)
    frozen, start, before = 0, weights_of(engine), {}
    for step in range(6):
        frozen = {2: 1, 3: 3, 4: 5}.get(step, frozen)
        engine.freeze(frozen, step=step)
        if step == grow_at:
            engine.set_micro_batch(engine.micro_batch * 2, accumulation=1)
        before = before or (weights_of(engine) if frozen else {})
        noise = torch.rand(GLOBAL_BATCH, 16, generator=torch.Generator().manual_seed(100 + step))
        engine.set_learning_rates({unit: rate_of(unit, step) / 10 for unit in engine.unit_names})
        for index in range(engine.accumulation):
            first = (index * engine.world_size + engine.rank) * engine.micro_batch
            chosen = slice(first, first + engine.micro_batch)
            output = engine(pictures_of(step)[chosen], noise=noise[chosen])
            engine.backward(output.loss)
            engine.step()
    result = {
        "start": start,
        "at_freeze": before,
        "weights": weights_of(engine),
        "masters": clone_tensors(engine.frozen_masters()),
        "loss": float(output.loss.detach()),
        "units": engine.unit_names,
        "accumulation": engine.accumulation,
        "global_samples": engine.state().scalars["global_samples"],
    }
    engine.destroy()
    return result


def measure_changes() -> dict[str, Any]:
    """Read the layers' changes around known steps, by both measures and in two ZeRO stages."""
    results: dict[str, Any] = {}
    for stage in (0, 1):
        for measure in ("weight", "gradient"):
            engine = build(FreezingEngine, ds_config(stage, "fp32"))
            take_step(engine, 0)
            first = engine.layer_changes(measure)
            before, moments = weights_of(engine), moments_of(engine)
            take_step(engine, 1)
            second = engine.layer_changes(measure)
            after, later = weights_of(engine), moments_of(engine)
            engine.freeze(2, step=2)
            take_step(engine, 2)
            third = engine.layer_changes(measure)
            results[f"{stage}-{measure}"] = {
                "readings": (first, second, third),
                "weights": (before, after),
                "moments": (moments, later),
            }
            engine.destroy()
    return results


def moments_of(engine: FreezingEngine) -> dict[int, float]:
    """Squared norm of this rank's share of Adam's first moments, by layer."""
    sums: Counter[int] = Counter()
    for name, group in engine.state().groups.items():
        if name.startswith("layer_"):
            sums[int(name[6:8])] += float(group.exp_avg.double().square().sum())
    return dict(sums)


def wait_between_drops() -> dict[str, Any]:
    """Freeze at steps 1, 2, 3 and 7 with at least five steps between drops."""
    engine = build(FreezingEngine, ds_config(1, "fp32"), min_steps_between_drops=5)
    events = []
    for step in range(9):
        event = engine.freeze({1: 1, 2: 2, 3: 3}.get(step, 3 if step < 7 else 4) if step else 0, step=step)
        events += [asdict(event)] if event else []
        take_step(engine, step)
    engine.destroy()
    return {"events": events}


def misuse() -> dict[str, str]:
    """Do what must be refused, and return the sentences."""
    messages = {}
    engine = build(FreezingEngine, ds_config(1, "fp32"))

    def attempt(name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except (ValueError, RuntimeError) as error:
            messages[name] = f"{type(error).__name__}: {error}"

    images = images_of(0)[: engine.micro_batch]
    attempt("no rates", engine.step)
    engine.set_learning_rates(dict.fromkeys(engine.unit_names, 0.1))
    attempt("rate missing", lambda: engine.set_learning_rates({"layer_00": 0.1}))
    output = engine(images)
    attempt("other loss", lambda: engine.backward(output.losses[0]))
    engine.backward(output.loss)
    engine.step()
    attempt("freeze in mid-step", lambda: engine.freeze(1, step=0))
    attempt("state in mid-step", engine.state)
    output = engine(images)
    engine.backward(output.loss)
    engine.step()
    attempt("all frozen", lambda: engine.freeze(9, step=1))
    attempt("ranks disagree", lambda: engine.freeze(1 + engine.rank, step=1))
    engine.freeze(3, step=1)
    attempt("thaw", lambda: engine.freeze(2, step=2))
    attempt("other batch", lambda: engine.set_micro_batch(4, accumulation=2))
    state = engine.state()
    attempt("other prefix", lambda: engine.load_state(lambda *_: images, {**state.scalars, "frozen_layers": 2}))
    attempt("short slice", lambda: engine.load_state(lambda *_: images[0, :0], state.scalars))
    engine.destroy()
    attempt("all frozen at the start", lambda: build(FreezingEngine, ds_config(1, "fp32"), frozen_layers=9))
    attempt("half prefix", lambda: build(FreezingEngine, ds_config(1, "bf16"), prefix_precision="fp32"))
    attempt("backward through half", lambda: train_local_mim(
        FreezingEngine, freeze_cls_token=False, prefix_precision="bf16"))  # fmt: skip
    strange = ToyModel()
    strange.extra = torch.nn.Linear(2, 2)
    attempt("strange parameter", lambda: build(FreezingEngine, ds_config(1, "fp32"), model=strange))
    return messages


def everything_on_two(folder: Path) -> dict[str, Any]:
    """Run all common scenarios that need two ranks."""
    results = {"compared": compare_all(COMMON), "plain": train_in_plain_torch()}
    results["leaks"] = {"1-fp32": drop_many(1, "fp32")}
    results["travels"] = travel_on_two(folder)
    results["cls_token"] = train_local_mim(FreezingEngine, freeze_cls_token=False)
    results["cls_token_soft"] = train_local_mim(SoftEngine, freeze_cls_token=False)
    results["half_prefix"] = train_local_mim(FreezingEngine, prefix_precision="bf16", activation_checkpointing=True)
    results["mim"] = train_local_mim(FreezingEngine)
    results["grown"] = train_local_mim(FreezingEngine, grow_at=3, activation_checkpointing=True)
    results["changes"] = measure_changes()
    results["waiting"] = wait_between_drops()
    results["misuse"] = misuse()
    return results


def rare_on_two() -> dict[str, Any]:
    """Run the rarer combinations."""
    return {
        "compared": compare_all(RARE),
        "leaks": {"0-fp32": drop_many(0, "fp32"), "2-bf16": drop_many(2, "bf16")},
    }
