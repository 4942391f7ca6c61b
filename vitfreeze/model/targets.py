"""Which way HOG targets are computed: by the Triton kernel where it serves and agrees, else by the plain version."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from vitfreeze.model.hog import hog_targets

logger = logging.getLogger(__name__)
_LEAST_CAPABILITY = (7, 0)
_CLOSE, _LEAST_SHARE_CLOSE, _MOST_MEAN_ERROR = 1e-4, 0.999, 1e-5  # those of the parity tests


class Pixels(NamedTuple):
    """The bytes that images were normalised from, a quarter of their size.

    Attributes:
        values: (B, 3, H, W) uint8.
        table: (3, 256) float32 on the same device, the normalised value of every byte of every channel.
    """

    values: Tensor
    table: Tensor


def agree(targets: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether targets are the expected ones, but for rounding; the host waits for the device."""
    for target, other in zip(targets, expected, strict=True):
        error = (target - other).abs()
        if not (error.mean() < _MOST_MEAN_ERROR and (error < _CLOSE).float().mean() >= _LEAST_SHARE_CLOSE):
            return False
    return True


def find_obstacle(cell_sizes: Sequence[int], *, device: torch.device | None = None) -> str | None:
    """Say why the kernel cannot serve, on any GPU or on the given one; None if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device is not None and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY
    ):
        return f"{torch.cuda.get_device_name(device)} is not an NVIDIA GPU of compute capability 7.0 or later"
    from vitfreeze.model.hog_kernel import MOST_CELL, serves

    if not serves(cell_sizes):
        return f"cells of {list(cell_sizes)} pixels are not all powers of two up to {MOST_CELL}"
    return None


class TargetMaker:
    """Makes the targets of one model.

    The first batch of every kind (cells, size, type) is computed both ways on the device. A kernel that says something
    else than the plain version, or fails, is not asked again, and an error is logged.
    """

    def __init__(self) -> None:
        self.is_off = False
        self._agreed: set[tuple[object, ...]] = set()

    def make(
        self,
        images: Tensor,
        *,
        cell_sizes: Sequence[int],
        nbins: int,
        bias: Tensor | None = None,
        pixels: Pixels | None = None,
    ) -> list[Tensor]:
        """Return what `hog.hog_targets` returns for the images; `pixels` are what they were made from.

        Raises:
            ValueError: as `hog.hog_targets`; or pixels of another shape than the images.
        """
        if pixels is not None and pixels.values.shape != images.shape:
            raise ValueError(f"pixels have shape {tuple(pixels.values.shape)}, the images {tuple(images.shape)}")
        kind = (tuple(cell_sizes), tuple(images.shape[1:]), images.dtype, nbins, bias is None, pixels is None)
        ask = partial(_ask_kernel, images, cell_sizes=cell_sizes, nbins=nbins, bias=bias, pixels=pixels)
        if kind in self._agreed and not self.is_off:
            return ask()
        expected = hog_targets(images, cell_sizes=cell_sizes, nbins=nbins, bias=bias)
        if images.device.type == "cuda" and cell_sizes and not self.is_off:
            obstacle = find_obstacle(cell_sizes, device=images.device)
            if obstacle is not None:
                self.is_off = True
                logger.info("HOG targets are made without a kernel of their own, which takes longer: %s", obstacle)
            elif self._makes(expected, ask):
                self._agreed.add(kind)
        return expected

    def _makes(self, expected: Sequence[Tensor], ask: Callable[[], list[Tensor]]) -> bool:
        """Return whether the kernel makes the expected targets; if it makes others, or none, switch it off."""
        try:
            problem = None if agree(ask(), expected) else "makes other targets than the plain version"
        except Exception as error:  # whatever a compiler or a driver says: training can go on without the kernel
            problem = f"fails with {type(error).__name__}: {error}"
        # Targets that are not finite prove nothing, and the loss tells of them.
        if problem is not None and all(target.isfinite().all() for target in expected):
            self.is_off = True
            logger.error("THE KERNEL FOR HOG TARGETS IS SWITCHED OFF: it %s; the plain version goes on", problem)
        return problem is None


def _ask_kernel(
    images: Tensor, *, cell_sizes: Sequence[int], nbins: int, bias: Tensor | None, pixels: Pixels | None
) -> list[Tensor]:
    from vitfreeze.model.hog_kernel import hog_by_kernel

    given, table = (images, None) if pixels is None else pixels
    return hog_by_kernel(given, cell_sizes=cell_sizes, nbins=nbins, bias=bias, table=table)
