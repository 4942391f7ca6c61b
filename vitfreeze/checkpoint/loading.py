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
from vitfreeze.checkpoint.saving import BUFFER_PREFIX, LOCAL_PREFIX, RNG_PREFIX, _rank_file, weights_of
from vitfreeze.engine import FreezingEngine, SliceReader
from vitfreeze.model import check_state


def load_checkpoint(checkpoint: Checkpoint, engine: FreezingEngine) -> dict[str, Tensor]:
    """Restore weights, master weights, moments, loss scale, counters and RNG; all ranks call it.

    The engine freezes as many layers as the checkpoint has; one that is built with `checkpoint.frozen_layers` never
    allocates their optimizer state. Frozen layers come from the saved weights of the model, so they are restored on
    every number of ranks. Slices are read lazily, each rank what it holds.

    Returns:
        The tensors that this rank gave as `local`; nothing when another number of ranks wrote the checkpoint.

    Raises:
        CheckpointError: a file cannot be read, elements that this rank needs were not saved, or the units are others
            than the engine's.
        ValueError: weights are missing, unknown, or of another shape than the model's, or fewer units were frozen.
    """
    weights = _read_tensors(checkpoint.path / folder.WEIGHTS)
    check_state(weights, {name: tuple(value.shape) for name, value in weights_of(engine.module).items()})
    _check_units(checkpoint, engine)
    engine.module.load_state_dict(weights, strict=False)  # checked above; tied weights are saved once
    masters = _read_tensors(checkpoint.path / folder.MASTERS)
    with open_slices(checkpoint) as read:
        engine.load_state(read, checkpoint.manifest["scalars"], frozen_masters=masters)
    if checkpoint.world_size != engine.world_size:
        return {}
    mine = _read_tensors(checkpoint.path / _rank_file(engine.rank), only=(LOCAL_PREFIX, RNG_PREFIX, BUFFER_PREFIX))
    engine.module.load_state_dict(_part(mine, BUFFER_PREFIX), strict=False)
    torch.set_rng_state(mine[f"{RNG_PREFIX}cpu"])
    if engine.device.type == "cuda" and f"{RNG_PREFIX}cuda" in mine:
        torch.cuda.set_rng_state(mine[f"{RNG_PREFIX}cuda"], engine.device)
    return _part(mine, LOCAL_PREFIX)


def load_engine(directory: str | Path, engine: FreezingEngine) -> Checkpoint | None:
    """Bring the newest whole checkpoint of a folder into an engine; all ranks call it.

    Another number of ranks and another ZeRO stage may have written it. The engine freezes as many units as were frozen
    then, so build it with none (or with `find_checkpoint(directory).frozen_layers`, which saves their optimizer state).

    Args:
        directory: as for `save_engine`, or one checkpoint's own folder.
        engine: with a model and units like those that were saved, and no more of them frozen.

    Returns:
        The checkpoint, with `step` and `extra`; None when nothing was saved yet.

    Raises:
        CheckpointError: it is damaged, or of other units.
        OSError: the folder cannot be read.
        ValueError: it is of another model, or more units are frozen in the engine than were saved.
    """

    def find() -> str:  # reads every byte once and compares it with the manifest
        found = folder.find_checkpoint(directory)
        return str(found.path) if found else ""

    path = engine.ranks.from_rank_0(find, errors=(CheckpointError, OSError))
    if not path:
        return None
    checkpoint = folder.open_checkpoint(Path(path), verify=False)
    load_checkpoint(checkpoint, engine)
    return checkpoint


def _check_units(checkpoint: Checkpoint, engine: FreezingEngine) -> None:
    saved = {
        name: tuple((parameter, tuple(shape)) for parameter, shape in group["parameters"])
        for name, group in checkpoint.manifest["groups"].items()
    }
    here = engine.expect_state(checkpoint.frozen_layers)
    differing = sorted(name for name in saved.keys() | here.keys() if saved.get(name) != here.get(name))
    if differing:
        raise CheckpointError(
            f"{checkpoint.path} has other units than this engine: with {checkpoint.frozen_layers} frozen, these groups "
            f"of parameters are not the same: {', '.join(differing[:4])}"
        )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


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
