"""DeepSpeed's ZeRO 1 and 2 with few kernels: gradients are handled by whole groups, and checked without a wait.

DeepSpeed copies every gradient by itself into a bucket and out of it again, and asks of each whether it is finite, in
13 kernels. A freeze unit's parameters have their place in a group's flat tensor anyway. So here the gradients of whole
groups are laid end to end by one kernel, that tensor is reduced, and this rank's parts of it are what the optimizer
reads. Values, their order of summation on two ranks, and what is skipped are those of DeepSpeed, to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup
from torch import Tensor
from torch.optim import AdamW


def find_overflow(gradients: list[Tensor]) -> Tensor:
    """Return a float32 scalar on the device: 1 if a gradient holds a NaN or an infinity, else 0."""
    largest = torch.stack(torch._foreach_norm(gradients, math.inf)).amax()
    return (largest - largest != 0).float()


class OverflowCheck:
    """Keeps AdamW from changing anything in a step whose gradients are not finite, without the host knowing of it.

    Attributes:
        found_inf: float32 scalar on the device, 1 if the last step was skipped; None before the first.
        skipped: float32 scalar on the device, how many were skipped; None before the first.
    """

    def __init__(self, optimizer: AdamW) -> None:
        self._optimizer = optimizer
        self.found_inf: Tensor | None = None
        self.skipped: Tensor | None = None

    def note(self, found_inf: Tensor) -> None:
        """Let the coming step change nothing if `found_inf` is 1."""
        self.found_inf = found_inf
        self.skipped = found_inf.clone() if self.skipped is None else self.skipped.add_(found_inf)
        self._optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # where GradScaler puts it for fused kernels

    def check(self, *_: Any) -> None:
        """Find out by the optimizer's own gradients: a hook before its step."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        self.note(find_overflow([p.grad for p in parameters if p.grad is not None]))


def group_gradients(zero: DeepSpeedZeroOptimizer, check: OverflowCheck) -> None:
    """Let a new ZeRO optimizer handle gradients by groups from now on.

    Its class is exchanged, because DeepSpeed's engine builds it by name and takes no other.
    """
    zero.__class__ = GroupedZeroOptimizer
    zero.start(check)


class GroupedZeroOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's ZeRO optimizer, which an instance becomes by `group_gradients`."""

    def start(self, check: OverflowCheck) -> None:
        """Prepare what DeepSpeed's own constructor does not know of."""
        self._check = check
        self._rank = comm.get_rank(self.dp_process_group)
        self._world_size = comm.get_world_size(self.dp_process_group)
        self._found_inf: Tensor | None = None
        self._sums: dict[int, Tensor] = {}  # by group: this rank's part of the summed gradients
        self._in_flight: list[tuple[Any, Tensor, list[int]]] = []
        self._await_gradients()

    def _await_gradients(self) -> None:
        self._missing = [sum(p.requires_grad for p in group) for group in self.bit16_groups]
        self._unreduced = dict.fromkeys(range(len(self.bit16_groups)), False)  # by group: whether it is complete

    # -- called by DeepSpeed -------------------------------------------------------------------------------------

    def process_gradients(self, param: Tensor, i: int) -> None:
        """Note that a parameter's gradient is ready; reduce the groups that are complete if they fill a bucket."""
        if not self.partition_gradients and not (self.overlap_comm and self.is_gradient_accumulation_boundary()):
            return
        self._missing[i] -= 1
        if self._missing[i]:
            return
        self._unreduced[i] = True
        complete = [index for index, is_complete in self._unreduced.items() if is_complete]
        if sum(map(self._numel, complete)) >= self.reduce_bucket_size:
            self._reduce(complete)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """End the backward pass of the last micro-batch (ZeRO 1)."""
        self.overlapping_partition_gradients_reduce_epilogue()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """End a backward pass: reduce what is left, and add it to the sums."""
        bucket: list[int] = []
        for index in [*self._unreduced]:
            if bucket and sum(map(self._numel, bucket)) + self._numel(index) > self.reduce_bucket_size:
                self._reduce(bucket)
                bucket = []
            bucket.append(index)
        if bucket:
            self._reduce(bucket)
        for work, flat, groups in self._in_flight:
            if work is not None:
                work.wait()
            self._add_parts(flat, groups)
        self._in_flight.clear()
        self._await_gradients()
        if self.is_gradient_accumulation_boundary():
            for index, size in enumerate(self.partition_size):
                part = self._sums.pop(index, None)
                if part is None:  # the group is frozen, and waits to be dropped
                    part = self.bit16_groups_flat[index].new_zeros(size, dtype=self.gradient_accumulation_dtype)
                self.averaged_gradients[index] = GradPartitionBufferGroup([part], part)

    def has_overflow(self, partition_gradients: bool = True) -> bool:
        """Return whether a gradient of any rank is not finite: the one time that the host waits (fp16)."""
        assert self._found_inf is not None
        return bool(self._found_inf.item())

    def step(self, closure: Any = None) -> None:
        """Update the weights, unless a gradient is not finite."""
        self._found_inf = find_overflow([group.flat_partition for group in self.averaged_gradients.values()])
        if self._world_size > 1:
            comm.all_reduce(self._found_inf, op=comm.ReduceOp.MAX, group=self.dp_process_group)
        if not self.check_grad_overflow:  # fp32 and bf16, where the loss scale does not hang on the answer
            self._check.note(self._found_inf)
        super().step(closure)

    # -- groups --------------------------------------------------------------------------------------------------

    def _numel(self, index: int) -> int:
        return sum(parameter.numel() for parameter in self.bit16_groups[index])

    def _reduce(self, groups: list[int]) -> None:
        """Average the gradients of whole groups over the ranks, in one tensor."""
        for index in groups:
            del self._unreduced[index]
        groups = [index for index in groups if any(p.grad is not None for p in self.bit16_groups[index])]
        if not groups:
            return
        pieces = []
        for index in groups:
            pieces += [torch.zeros_like(p) if p.grad is None else p.grad for p in self.bit16_groups[index]]
        flat = torch.cat([piece.reshape(-1) for piece in pieces])
        del pieces
        for index in groups:
            for parameter in self.bit16_groups[index]:
                parameter.grad = None
        work = None
        if self._world_size > 1:
            flat.div_(self._world_size)
            flat = flat.to(self.communication_data_type)
            work = comm.all_reduce(flat, group=self.dp_process_group, async_op=self.overlap_comm)
        self._in_flight.append((work, flat, groups))

    def _add_parts(self, flat: Tensor, groups: list[int]) -> None:
        dtype, start = self.gradient_accumulation_dtype, 0
        keeps_copy = self.partition_gradients and self._world_size > 1  # the rest of the flat tensor is let go
        for index in groups:
            size, numel = self.partition_size[index], self._numel(index)
            first, last = (min(rank * size, numel) for rank in (self._rank, self._rank + 1))
            part = flat[start + first : start + last]
            if padding := size - len(part):
                part = torch.cat([part, part.new_zeros(padding)])
            if index in self._sums:
                self._sums[index].add_(part)
            else:
                self._sums[index] = part.to(dtype, copy=keeps_copy)
            start += numel
