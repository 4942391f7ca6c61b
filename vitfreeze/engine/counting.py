"""A CPU that counts as an accelerator, so that what a step would ask of a GPU can be counted without one."""

from __future__ import annotations

from collections.abc import Callable

from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator


class CountingAccelerator(CPU_Accelerator):
    """DeepSpeed's CPU that takes every precision, as torch does if slowly, and tells of each wait for the device."""

    def __init__(self, on_wait: Callable[[], None]) -> None:
        super().__init__()
        self._on_wait = on_wait

    def is_fp16_supported(self) -> bool:
        """Return True."""
        return True

    def is_bf16_supported(self) -> bool:
        """Return True."""
        return True

    def synchronize(self, device_index: int | None = None) -> None:
        """Tell of it; there is nothing to wait for."""
        self._on_wait()


def count_on_cpu(on_wait: Callable[[], None]) -> None:
    """Let all engines of this process run on the CPU, and call `on_wait` where a GPU would make the host wait.

    Call it before `join_ranks`.
    """
    set_accelerator(CountingAccelerator(on_wait))
