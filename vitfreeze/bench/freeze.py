"""What a drop costs: the seconds in which layers leave the engine, beside the seconds of a step."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vitfreeze.architecture import MODEL_SIZES
from vitfreeze.config import find_ds_config
from vitfreeze.engine import FreezingEngine, best_ds_config, join_ranks
from vitfreeze.model import LocalMIM


@dataclass(frozen=True, kw_only=True)
class DropCost:
    """One drop and the steps around it; bytes are those of rank 0."""

    frozen_layers: int
    drop_seconds: float
    step_seconds: float  # median, with this many layers frozen
    drop_in_steps: float  # drop_seconds over the median of steps with nothing frozen
    trainable_parameters: int
    optimizer_state_bytes: int


def measure_drops(
    size: str,
    *,
    ds_config: str | Path = "",
    img_size: int = 224,
    micro_batch: int = 8,
    steps: int = 3,
    seed: int = 0,
) -> Iterator[DropCost]:
    """Freeze a model layer by layer, with `steps` steps of random images after each drop; yield what each cost.

    Raises:
        ValueError: there is no such size, or `steps` is below 1.
    """
    if size not in MODEL_SIZES:
        raise ValueError(f"size {size!r}: allowed are {', '.join(MODEL_SIZES)}")
    if steps < 1:
        raise ValueError(f"steps {steps}: at least 1 is needed to time a step")
    ranks = join_ranks()
    torch.manual_seed(seed)
    model = LocalMIM(img_size=img_size, hog_nbins=9, **asdict(MODEL_SIZES[size]))
    engine = FreezingEngine(
        model,
        ds_config=find_ds_config(str(ds_config) or best_ds_config(ranks.device)),
        micro_batch=micro_batch,
    )
    engine.set_learning_rates(dict.fromkeys(engine.unit_names, 1e-4))
    images = torch.randn(micro_batch, 3, img_size, img_size, device=engine.device)
    time_step(engine, images)  # the first step fills caches and allocates moments
    full_step = statistics.median(time_step(engine, images) for _ in range(steps))
    for frozen_layers in range(1, model.depth + 1):
        event = engine.freeze(frozen_layers, step=frozen_layers)
        assert event is not None, "a drop is due at every call"
        yield DropCost(
            frozen_layers=frozen_layers,
            drop_seconds=event.seconds,
            step_seconds=statistics.median(time_step(engine, images) for _ in range(steps)),
            drop_in_steps=event.seconds / full_step,
            trainable_parameters=event.trainable_parameters,
            optimizer_state_bytes=event.optimizer_state_bytes,
        )
    engine.destroy()


def format_drops(costs: Iterable[DropCost], *, as_json: bool = False) -> Iterator[str]:
    """Yield a line for every drop as it is measured, under a line of titles; or one JSON object each."""
    if not as_json:
        yield "frozen  drop (s)  in steps  step (s)  parameters  state (MiB)"
    for cost in costs:
        if as_json:
            yield json.dumps(asdict(cost))
        else:
            yield (
                f"{cost.frozen_layers:>6}  {cost.drop_seconds:>8.2f}  {cost.drop_in_steps:>8.2f}  "
                f"{cost.step_seconds:>8.2f}  {cost.trainable_parameters:>10,}  "
                f"{cost.optimizer_state_bytes / 2**20:>11.1f}"
            )


def time_step(engine: FreezingEngine, images: torch.Tensor) -> float:
    """Return the seconds of one optimizer step, every micro-batch of which is `images`."""
    engine.synchronize()
    started = time.perf_counter()
    for _ in range(engine.accumulation):
        engine.backward(engine(images).loss)
        engine.step()
    engine.synchronize()
    return time.perf_counter() - started
