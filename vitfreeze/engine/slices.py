"""The optimizer's state as flat slices with stable names, whatever ZeRO stage and number of ranks holds it.

ZeRO 1 and 2 lay the parameters of a group end to end, pad the end, and give every rank an equal part; stage 0 keeps
whole tensors on every rank. Both are seen here as segments [start, stop) of the group's unpadded flat tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from vitfreeze.engine.units import GroupPlan
from vitfreeze.ranks import Ranks

STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")
SliceReader = Callable[[str, str, int, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class GroupState:
    """This rank's share of one parameter group: elements [start, start + master.numel()) of `numel`."""

    parameters: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes, in flat order
    start: int
    numel: int
    master: Tensor  # 1-D float32, like the two moments
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int  # optimizer steps that the moments have seen


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a group's flat tensor and the optimizer's parameter whose first elements they are."""

    start: int
    stop: int
    parameter: Tensor

    def values(self, optimizer: AdamW, key: str) -> Tensor:
        """Return a 1-D view without padding of the master weights or of a moment."""
        tensor = self.parameter.data if key == "master" else optimizer.state[self.parameter][key]
        return tensor.reshape(-1)[: self.stop - self.start]


def segments(plan: GroupPlan, group: dict[str, Any], *, partitioned: bool, rank: int) -> Iterator[Segment]:
    """Yield the segments of one parameter group that this rank's optimizer holds."""
    if partitioned:
        (flat,) = group["params"]
        start = min(rank * flat.numel(), plan.numel)
        yield Segment(start, min(start + flat.numel(), plan.numel), flat)
        return
    start = 0
    for parameter in group["params"]:
        yield Segment(start, start + parameter.numel(), parameter)
        start += parameter.numel()


def create_moments(optimizer: AdamW) -> None:
    """Give every parameter zero moments now, as AdamW does at its first step, so that state can always be read."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def read_group(optimizer: AdamW, plan: GroupPlan, parts: list[Segment], *, share: Ranks | None) -> GroupState:
    """Return a rank's share of a group.

    `share` is given when every rank holds the whole group: each then returns an equal part, so that no element is
    returned twice.
    """
    start, stop = parts[0].start, parts[-1].stop
    if share is not None:
        part = -(-plan.numel // share.world_size)
        start, stop = min(share.rank * part, plan.numel), min((share.rank + 1) * part, plan.numel)
    tensors = {key: _cut(optimizer, parts, key, start, stop) for key in STATE_KEYS}
    step = int(optimizer.state[parts[0].parameter]["step"].item())
    return GroupState(parameters=plan.parameters, start=start, numel=plan.numel, step=step, **tensors)


def _cut(optimizer: AdamW, parts: list[Segment], key: str, start: int, stop: int) -> Tensor:
    pieces = []
    for part in parts:
        low, high = max(start, part.start), min(stop, part.stop)
        if low < high:
            pieces.append(part.values(optimizer, key)[low - part.start : high - part.start])
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if pieces else parts[0].values(optimizer, key)[:0]


def write_group(optimizer: AdamW, plan: GroupPlan, parts: list[Segment], read: SliceReader, *, step: int) -> None:
    """Fill a rank's master weights and moments of a group from `read(group, key, start, stop)`.

    Raises:
        ValueError: `read` returns another number of elements than it was asked for.
    """
    for part in parts:
        for key in STATE_KEYS:
            if part.start < part.stop:
                values = read(plan.name, key, part.start, part.stop)
                if values.numel() != part.stop - part.start:
                    raise ValueError(
                        f"{plan.name}.{key}: asked for elements {part.start} to {part.stop}, got {values.numel()}"
                    )
                part.values(optimizer, key).copy_(values.reshape(-1))
        optimizer.state[part.parameter]["step"].fill_(step)
