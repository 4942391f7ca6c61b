"""Larger micro-batches in the memory that freezing releases."""

from __future__ import annotations

from vitfreeze.config import Config, derive_accumulation
from vitfreeze.curriculum import ImageStage
from vitfreeze.planner.costs import costs_of


def fit_micro_batch(
    config: Config, *, world_size: int, frozen_layers: int, precision: str, images: ImageStage | None = None
) -> tuple[int, int]:
    """Return (micro-batch, accumulation) for the same global batch with the first `frozen_layers` layers frozen.

    With `batch.grow_micro_batch` the micro-batch is the largest whose activations take no more memory than those of
    the configured one with nothing frozen; what the optimizer releases stays free. Without it nothing changes. A
    function of the settings and the frozen layers alone, so a resumed run cuts its batches the same way.

    Args:
        images: the stage of the curriculum.
        precision: of the activations: fp32, bf16 or fp16.
    """
    micro, accumulation = derive_accumulation(config, world_size=world_size)
    if not config.batch.grow_micro_batch:
        return micro, accumulation
    needed = costs_of(config, images).activation_bytes(frozen_layers, precision=precision)
    room = costs_of(config).activation_bytes(0, precision=precision) / needed
    factor = max(factor for factor in range(1, accumulation + 1) if accumulation % factor == 0 and factor <= room)
    return micro * factor, accumulation // factor
