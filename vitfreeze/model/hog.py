"""Histograms of oriented gradients, the targets that LocalMIM's heads predict.

Shape suffixes: B batch, C channels, H and W pixels, P all B * C planes, R and S rows and columns of cells,
K orientation bins, N cells in row-major order.

Source: LocalMIM (Wang et al., CVPR 2023, section 3.2), which follows MaskFeat (Wei et al., CVPR 2022, section 3.3)
and Dalal and Triggs (CVPR 2005): unsigned orientation, no block normalisation, one unit vector per cell and channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12


def check_images(images: Tensor) -> None:
    """Refuse what cannot be a batch of normalised RGB images.

    Values are checked only where that costs no synchronisation, on the CPU. On an accelerator a NaN or infinity
    reaches the histogram of every cell it touches and from there the loss, which is then NaN.

    Raises:
        ValueError: not a floating (B, 3, H, W) tensor, or (on the CPU) a value that is NaN or infinite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images has shape {tuple(images.shape)}, expected (batch, 3, height, width)")
    if not images.is_floating_point():
        raise ValueError(f"images has dtype {images.dtype}, expected normalised images of a floating dtype")
    if images.device.type == "cpu" and not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).sum())
        raise ValueError(f"images of shape {tuple(images.shape)} holds {bad} values that are NaN or infinite")


@torch.no_grad()
def hog_targets(
    images: Tensor, *, cell_sizes: Sequence[int], nbins: int, bias: Tensor | Sequence[float] | None = None
) -> list[Tensor]:
    """Compute HOG features of a batch of images on grids of square cells.

    Gradients and the histogram are computed once, on the coarsest cells that divide all `cell_sizes` (the finest of
    them, when the others are its multiples), and pooled from there: a histogram is a sum, so pooling is exact.

    Args:
        images: (B, 3, H, W), normalised, any floating dtype; everything is computed in float32.
        cell_sizes: sides of the square cells in pixels; each divides H and W.
        nbins: orientation bins over half a turn.
        bias: two numbers added to the horizontal and to the vertical gradient response.

    Returns:
        For each cell size a float32 (B, N, 3 * nbins) tensor: cells in row-major order, channels before bins, each
        channel's histogram of unit length (all zeros where the gradient vanishes).

    Raises:
        ValueError: images of a wrong shape, dtype or value (see `check_images`), a cell size that does not divide
            the image, fewer than one bin, or a bias that is not two numbers.
    """
    check_images(images)
    if nbins < 1:
        raise ValueError(f"nbins is {nbins}, expected at least 1")
    height, width = images.shape[-2:]
    for cell in cell_sizes:
        if cell < 1 or height % cell or width % cell:
            raise ValueError(f"cell size {cell} does not divide images of shape {tuple(images.shape)} into whole cells")
    if min(height, width) < 2:
        raise ValueError(f"images has shape {tuple(images.shape)}, but reflecting its border needs 2 x 2 pixels")
    if not cell_sizes:
        return []

    horizontal_PHW, vertical_PHW = _gradients(images.float().flatten(0, 1), bias=bias)
    magnitude_PHW = torch.sqrt(horizontal_PHW * horizontal_PHW + vertical_PHW * vertical_PHW)
    # The order of these operations decides the bin of angles that lie exactly on an edge, as 0, 45 and 90 degrees do.
    bins_PHW = (torch.atan2(horizontal_PHW, vertical_PHW) / math.pi * nbins).floor_().remainder_(nbins)

    finest = math.gcd(*cell_sizes)
    build = histogram_by_scatter if images.device.type == "cpu" else histogram_by_comparison
    histograms = {finest: build(magnitude_PHW, bins_PHW, cell_size=finest, nbins=nbins)}
    for cell in sorted(set(cell_sizes)):
        # The largest histogram already made whose cells tile this one costs the least to pool from.
        source = max(size for size in histograms if cell % size == 0)
        histograms[cell] = _pool(histograms[source], cell // source)
    unit = {cell: _normalize(histograms[cell], cell_size=cell) for cell in set(cell_sizes)}
    return [
        unit[cell].unflatten(0, images.shape[:2]).permute(0, 3, 4, 1, 2).flatten(3).flatten(1, 2) for cell in cell_sizes
    ]


def _gradients(planes_PHW: Tensor, *, bias: Tensor | Sequence[float] | None) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical Sobel responses of each plane, its border reflected.

    Adding the six terms one by one in the order of the filter's taps rounds exactly as a convolution does; pairing
    differences first is as fast but moves a few per cent of the pixels whose true response is zero to another bin.
    The price is that a flat patch of an image may respond with the last bit of its value, as it does in LocalMIM. A
    plane without any contrast is spared that: its responses are exactly zero.
    """
    height, width = planes_PHW.shape[-2:]
    padded = F.pad(planes_PHW, (1, 1, 1, 1), mode="reflect")

    def tap(row: int, column: int) -> Tensor:
        return padded[:, row : row + height, column : column + width]

    horizontal = tap(0, 0) - tap(0, 2)
    horizontal.add_(tap(1, 0), alpha=2).sub_(tap(1, 2), alpha=2).add_(tap(2, 0)).sub_(tap(2, 2))
    vertical = torch.add(tap(0, 0), tap(0, 1), alpha=2)
    vertical.add_(tap(0, 2)).sub_(tap(2, 0)).sub_(tap(2, 1), alpha=2).sub_(tap(2, 2))
    contrast_P11 = planes_PHW.amax(dim=(1, 2), keepdim=True) != planes_PHW.amin(dim=(1, 2), keepdim=True)
    horizontal *= contrast_P11
    vertical *= contrast_P11
    if bias is not None:
        offsets = torch.as_tensor(bias, dtype=torch.float32, device=planes_PHW.device)
        if offsets.shape != (2,):
            raise ValueError(f"bias has shape {tuple(offsets.shape)}, expected (2,): horizontal and vertical")
        horizontal += offsets[0]
        vertical += offsets[1]
    return horizontal, vertical


def histogram_by_scatter(magnitude_PHW: Tensor, bins_PHW: Tensor, *, cell_size: int, nbins: int) -> Tensor:
    """Add each pixel's magnitude to its bin in one pass, the fastest way on a CPU. Returns (P, K, R, S)."""
    planes, height, width = magnitude_PHW.shape
    rows, columns = height // cell_size, width // cell_size
    device = magnitude_PHW.device
    cell_of_row = torch.arange(height, device=device) // cell_size * columns
    cell_of_column = torch.arange(width, device=device) // cell_size
    cell_HW = cell_of_row[:, None] + cell_of_column[None, :]
    plane_P11 = torch.arange(planes, device=device)[:, None, None] * (nbins * rows * columns)
    slot_PHW = bins_PHW.long().mul_(rows * columns).add_(cell_HW).add_(plane_P11)
    histogram = torch.zeros(planes * nbins * rows * columns, device=device)
    histogram.scatter_add_(0, slot_PHW.flatten(), magnitude_PHW.flatten())
    return histogram.view(planes, nbins, rows, columns)


def histogram_by_comparison(magnitude_PHW: Tensor, bins_PHW: Tensor, *, cell_size: int, nbins: int) -> Tensor:
    """Sum, bin by bin, the magnitudes in each cell. Returns (P, K, R, S).

    Unlike a scatter, whose atomic additions on an accelerator arrive in any order, this gives the same bits every
    time. Multiplying by the comparison, not selecting with it, lets a NaN through to the loss.
    """
    cells = [F.avg_pool2d((magnitude_PHW * (bins_PHW == k))[:, None], cell_size).squeeze(1) for k in range(nbins)]
    return torch.stack(cells, dim=1) * (cell_size * cell_size)


def _pool(histogram_PKRS: Tensor, factor: int) -> Tensor:
    """Add up squares of factor x factor cells."""
    if factor == 1:
        return histogram_PKRS
    rows = reduce(torch.add, [histogram_PKRS[:, :, i::factor] for i in range(factor)])
    return reduce(torch.add, [rows[..., i::factor] for i in range(factor)])


def _normalize(histogram_PKRS: Tensor, *, cell_size: int) -> Tensor:
    """Scale every cell's mean histogram to unit length, with LocalMIM's guard against an empty one."""
    mean = histogram_PKRS / (cell_size * cell_size)
    length = (mean * mean).sum(dim=1, keepdim=True).sqrt_()
    return mean / length.clamp_min_(NORM_EPS)
