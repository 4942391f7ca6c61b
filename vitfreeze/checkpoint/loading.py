"""Bringing a checkpoint back into an engine, on any number of ranks and any ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from vitfreeze.checkpoint import folder
from vitfreeze.checkpoint.folder import Checkpoint, CheckpointError
from vitfreeze.checkpoint.saving import LOCAL_PREFIX, RNG_PREFIX, _rank_file
from vitfreeze.engine import FreezingEngine, SliceReader
from vitfreeze.model import check_state


def load_checkpoint(checkpoint: Checkpoint, engine: FreezingEngine) -> dict[str, Tensor]:
    """Restore weights, master weights, moments, loss scale, counters and RNG; all ranks call it.

    The engine must have been built with `checkpoint.frozen_layers`. Frozen layers come from the saved weights of the
    model, so they are restored on every number of ranks. Slices are read lazily, each rank what it holds.

    Returns:
        The tensors that this rank gave as `local`; nothing when another number of ranks wrote the checkpoint.

    Raises:
        CheckpointError: a file cannot be read, or elements that this rank needs were not saved.
        ValueError: weights are missing, unknown, or of another shape than the model's.
    """
    weights = _read_tensors(checkpoint.path / folder.WEIGHTS)
    check_state(weights, {name: tuple(value.shape) for name, value in engine.module.state_dict().items()})
    engine.module.load_state_dict(weights)
    masters = _read_tensors(checkpoint.path / folder.MASTERS)
    with open_slices(checkpoint) as read:
        engine.load_state(read, checkpoint.manifest["scalars"], frozen_masters=masters)
    if checkpoint.world_size != engine.world_size:
        return {}
    mine = _read_tensors(checkpoint.path / _rank_file(engine.rank), only=(LOCAL_PREFIX, RNG_PREFIX))
    torch.set_rng_state(mine[f"{RNG_PREFIX}cpu"])
    if engine.device.type == "cuda" and f"{RNG_PREFIX}cuda" in mine:
        torch.cuda.set_rng_state(mine[f"{RNG_PREFIX}cuda"], engine.device)
    return {name.removeprefix(LOCAL_PREFIX): value for name, value in mine.items() if name.startswith(LOCAL_PREFIX)}


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights of the model in fp32, as exact as the run had them: master weights where there are any."""
    weights = {
        name: value.float() if value.is_floating_point() else value
        for name, value in _read_tensors(checkpoint.path / folder.WEIGHTS).items()
    }
    weights |= _read_tensors(checkpoint.path / folder.MASTERS)
    with open_slices(checkpoint) as read:
        for name, group in checkpoint.manifest["groups"].items():
            flat = read(name, "master", 0, group["numel"])
            sizes = [prod(shape) for _, shape in group["parameters"]]
            for (parameter, shape), values in zip(group["parameters"], flat.split(sizes), strict=True):
                weights[parameter] = values.reshape(shape).clone()
    return weights


@contextmanager
def open_slices(checkpoint: Checkpoint) -> Iterator[SliceReader]:
    """Give a function `read(group, key, start, stop)` that returns these elements of a group's flat tensor."""
    groups: Mapping[str, Any] = checkpoint.manifest["groups"]
    with ExitStack() as stack:
        files: dict[str, Any] = {}

        def read(group: str, key: str, start: int, stop: int) -> Tensor:
            if group not in groups:
                raise CheckpointError(f"{checkpoint.path} has no optimizer state of {group}")
            pieces, reached = [], start
            for name, low, high in sorted(groups[group]["slices"], key=lambda item: int(item[1])):
                first, last = max(reached, low), min(stop, high)
                if first >= last or first != reached:
                    continue
                try:
                    if name not in files:
                        files[name] = stack.enter_context(safe_open(checkpoint.path / name, framework="pt"))
                    pieces.append(files[name].get_slice(f"{group}/{key}")[first - low : last - low])
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"{checkpoint.path / name} cannot be read: {error}") from error
                reached = last
            if reached != stop:
                raise CheckpointError(f"{checkpoint.path} lacks elements {reached} to {stop} of {group}/{key}")
            return torch.cat(pieces) if pieces else torch.empty(0)

        yield read


def _read_tensors(path: Path, *, only: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
    try:
        if only == ("",):
            return load_file(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(only)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
