"""HOG targets on an NVIDIA GPU by two Triton kernels, which read the images twice and write the targets once.

The plain version in `hog` says what they compute. Rounding decides the bin of an angle that lies on an edge, as 0, 45
and 90 degrees do, so every operation up to the bin is the plain version's, in its order: no multiplication is fused
with an addition, square root and division are IEEE's, and the arctangent is CUDA's own, which torch calls too.

Importing this module imports Triton. Its interpreter (TRITON_INTERPRET=1) runs the kernels on the CPU, given an
arctangent: it has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from vitfreeze.model.hog import NORM_EPS

MOST_CELL = 64  # pixels; a program holds the square of the coarsest cell in registers
_BLOCK = 4096  # pixels that are looked at together for a plane's contrast
_PI: tl.constexpr = tl.constexpr(3.1415927410125732)  # in float32
_INVERSE_PI: tl.constexpr = tl.constexpr(0.31830987334251404)


class Launch(NamedTuple):
    """A kernel with all that it reads and writes, its arguments in this order."""

    kernel: Any
    grid: tuple[int, ...]
    reads: tuple[Tensor | None, ...]
    writes: Tensor
    constants: dict[str, Any]
    num_warps: int

    @property
    def num_bytes(self) -> int:
        """Bytes moved, every tensor counted once."""
        return self.writes.nbytes + sum(tensor.nbytes for tensor in self.reads if tensor is not None)

    def start(self) -> None:
        """Give it to the device."""
        options = {"num_warps": self.num_warps, "enable_fp_fusion": False}
        self.kernel[self.grid](*self.reads, self.writes, **self.constants, **options)


def serves(cell_sizes: Sequence[int]) -> bool:
    """Return whether the kernels can make targets on these cells: their sides are powers of two up to `MOST_CELL`."""
    return all(0 < cell <= MOST_CELL and not cell & (cell - 1) for cell in cell_sizes)


def hog_by_kernel(
    images: Tensor,
    *,
    cell_sizes: Sequence[int],
    nbins: int,
    bias: Tensor | None = None,
    table: Tensor | None = None,
) -> list[Tensor]:
    """Compute what `hog.hog_targets` computes.

    Args:
        images: (B, 3, H, W) of a floating dtype and normalised; or uint8, with `table`.
        cell_sizes: at least one, see `serves`; each divides H and W.
        nbins: orientation bins over half a turn.
        bias: (2,) on the device, added to the horizontal and the vertical response.
        table: (3, 256) float32, the normalised value of every byte of every channel.

    Returns:
        For each cell size a float32 (B, N, 3 * nbins) tensor; together they are one piece of memory.
    """
    launches, targets = plan_launches(images, cell_sizes=cell_sizes, nbins=nbins, bias=bias, table=table)
    with torch.cuda.device_of(images):
        for launch in launches:
            launch.start()
    return targets


def plan_launches(
    images: Tensor,
    *,
    cell_sizes: Sequence[int],
    nbins: int,
    bias: Tensor | None = None,
    table: Tensor | None = None,
) -> tuple[list[Launch], list[Tensor]]:
    """Return the launches that fill the targets, and the targets; arguments are those of `hog_by_kernel`.

    Nothing is computed, so that images on the meta device tell how many bytes are moved.
    """
    images = images.contiguous()
    batch, channels, height, width = images.shape
    cells = tuple(sorted(set(cell_sizes)))
    lengths = [batch * (height // cell) * (width // cell) * channels * nbins for cell in cells]
    memory = torch.empty(sum(lengths), dtype=torch.float32, device=images.device)
    pieces = dict(zip(cells, memory.split(lengths), strict=True))
    contrast_P = torch.empty(batch * channels, dtype=torch.float32, device=images.device)
    block = min(_BLOCK, triton.next_power_of_2(height * width))
    look = {"size": height * width, "block": block}
    fill = {"height": height, "width": width, "channels": channels, "nbins": nbins, "cells": cells, "eps": NORM_EPS}
    # torch divides by a number on a CPU, and multiplies by its inverse on a GPU
    fill |= {"divides": images.device.type == "cpu"}
    tile = cells[-1]
    grid = (batch * channels, (height // tile) * (width // tile))
    warps = max(1, min(8, tile * tile // 256))
    launches = [
        Launch(find_contrast, grid[:1], (images,), contrast_P, look, 4),
        Launch(fill_targets, grid, (images, table, bias, contrast_P), memory, {"batch": batch, **fill}, warps),
    ]
    return launches, [pieces[cell].view(batch, -1, channels * nbins) for cell in cell_sizes]


@triton.jit
def find_contrast(images, contrast, size: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write 0 for a plane whose pixels are all equal, else 1."""
    plane = tl.program_id(0)
    images += plane.to(tl.int64) * size
    first = tl.load(images)
    differs = tl.zeros((block,), tl.int32)
    for start in range(0, size, block):
        offsets = start + tl.arange(0, block)
        pixels = tl.load(images + offsets, mask=offsets < size, other=0)
        differs |= ((offsets < size) & (pixels != first)).to(tl.int32)
    tl.store(contrast + plane, tl.max(differs, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=["batch"])
def fill_targets(  # type: ignore[no-untyped-def]
    images, table, bias, contrast, targets, batch,
    height: tl.constexpr, width: tl.constexpr, channels: tl.constexpr, nbins: tl.constexpr,
    cells: tl.constexpr, eps: tl.constexpr, divides: tl.constexpr,
):  # fmt: skip
    """Write the histograms of one square of a plane, which the coarsest cell fills.

    They are made twice, first for the lengths of all cells, then to be written: bins are cheap and traffic is not.
    """
    plane, square = tl.program_id(0), tl.program_id(1)
    tile: tl.constexpr = cells[len(cells) - 1]
    top, left = square // (width // tile) * tile, square % (width // tile) * tile
    magnitude, bins = _find_bins(
        images + plane.to(tl.int64) * (height * width), table, bias, contrast, plane, top, left,
        height, width, channels, nbins, tile, divides,
    )  # fmt: skip
    squares = ()
    for i in tl.static_range(len(cells)):
        squares = squares + (tl.zeros((tile // cells[i], tile // cells[i]), tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for k in range(nbins):
        finest = _pool(magnitude * (bins == k).to(tl.float32), cells[0])
        sums = ()
        for i in tl.static_range(len(cells)):
            mean = tl.div_rn(_pool(finest, cells[i] // cells[0]), float(cells[i] * cells[i]))
            sums = sums + (squares[i] + mean * mean,)  # type: ignore[assignment]  # noqa: RUF005
        squares = sums
    lengths = ()
    for i in tl.static_range(len(cells)):
        lengths = lengths + (tl.maximum(tl.sqrt_rn(squares[i]), eps, propagate_nan=tl.PropagateNan.ALL),)  # type: ignore[assignment]  # noqa: RUF005
    for k in range(nbins):
        finest = _pool(magnitude * (bins == k).to(tl.float32), cells[0])
        start = targets
        for i in tl.static_range(len(cells)):
            mean = tl.div_rn(_pool(finest, cells[i] // cells[0]), float(cells[i] * cells[i]))
            rows = top // cells[i] + tl.arange(0, tile // cells[i])[:, None]
            columns = left // cells[i] + tl.arange(0, tile // cells[i])[None, :]
            first = (plane // channels).to(tl.int64) * (height // cells[i] * (width // cells[i]))
            cell = first + rows * (width // cells[i]) + columns
            tl.store(start + (cell * channels + plane % channels) * nbins + k, tl.div_rn(mean, lengths[i]))
            start += batch.to(tl.int64) * (height // cells[i] * (width // cells[i]) * channels * nbins)


@triton.jit
def _find_bins(  # type: ignore[no-untyped-def]
    image, table, bias, contrast, plane, top, left,
    height: tl.constexpr, width: tl.constexpr, channels: tl.constexpr, nbins: tl.constexpr,
    tile: tl.constexpr, divides: tl.constexpr,
):  # fmt: skip
    """Return magnitude and bin of every pixel of a square; terms are added in the order of `hog._gradients`."""
    rows, columns = top + tl.arange(0, tile)[:, None], left + tl.arange(0, tile)[None, :]
    above = tl.where(rows == 0, 1, rows - 1) * width
    below = tl.where(rows == height - 1, height - 2, rows + 1) * width
    before = tl.where(columns == 0, 1, columns - 1)
    after = tl.where(columns == width - 1, width - 2, columns + 1)
    here, channel = rows * width, plane % channels
    t00, t01 = _load(image, table, channel, above + before), _load(image, table, channel, above + columns)
    t02, t10 = _load(image, table, channel, above + after), _load(image, table, channel, here + before)
    t12, t20 = _load(image, table, channel, here + after), _load(image, table, channel, below + before)
    t21, t22 = _load(image, table, channel, below + columns), _load(image, table, channel, below + after)
    varies = tl.load(contrast + plane)
    horizontal = (t00 - t02 + 2.0 * t10 - 2.0 * t12 + t20 - t22) * varies
    vertical = (t00 + 2.0 * t01 + t02 - t20 - 2.0 * t21 - t22) * varies
    if bias is not None:
        horizontal += tl.load(bias).to(tl.float32)
        vertical += tl.load(bias + 1).to(tl.float32)
    magnitude = tl.sqrt_rn(horizontal * horizontal + vertical * vertical)
    angle = libdevice.atan2(horizontal, vertical)
    half_turns = tl.div_rn(angle, _PI) if divides else angle * _INVERSE_PI
    bins = tl.floor(half_turns * nbins).to(tl.int32)  # of a NaN any: its magnitude tells
    bins = tl.where(bins < 0, bins + nbins, bins)
    return magnitude, tl.where(bins >= nbins, bins - nbins, bins)


@triton.jit
def _load(image, table, channel, offsets):  # type: ignore[no-untyped-def]
    """Return pixels as float32."""
    pixels = tl.load(image + offsets)
    if table is None:
        return pixels.to(tl.float32)
    else:  # noqa: RET505  the compiler leaves out one of the two
        return tl.load(table + channel * 256 + pixels.to(tl.int32))


@triton.jit
def _pool(x, factor: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up squares of factor x factor of a square."""
    side: tl.constexpr = x.shape[0] // factor
    return tl.sum(tl.sum(tl.reshape(x, (side, factor, side, factor)), axis=3), axis=1)
