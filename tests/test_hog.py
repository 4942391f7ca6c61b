"""HOG targets against a slow loop over pixels, the authors' figures, and properties that hold for any image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitfreeze.model.hog import histogram_by_comparison, histogram_by_scatter, hog_targets


def random_images(seed: int, *, batch: int = 2, height: int = 24, width: int = 24) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def hog_of_one_cell(plane: np.ndarray, rows: range, columns: range, nbins: int, bias: Sequence[float]) -> np.ndarray:
    """Visit every pixel of a cell; a coordinate beyond the border is reflected about the border's pixel."""

    def pixel(row: int, column: int) -> float:
        height, width = plane.shape
        row = -row if row < 0 else 2 * (height - 1) - row if row >= height else row
        column = -column if column < 0 else 2 * (width - 1) - column if column >= width else column
        return float(plane[row, column])

    histogram = np.zeros(nbins)
    for r in rows:
        for c in columns:
            horizontal = bias[0] + sum(
                weight * (pixel(r + dr, c - 1) - pixel(r + dr, c + 1)) for dr, weight in ((-1, 1), (0, 2), (1, 1))
            )
            vertical = bias[1] + sum(
                weight * (pixel(r - 1, c + dc) - pixel(r + 1, c + dc)) for dc, weight in ((-1, 1), (0, 2), (1, 1))
            )
            bin_number = math.floor(math.atan2(horizontal, vertical) / math.pi * nbins) % nbins
            histogram[bin_number] += math.hypot(horizontal, vertical)
    return histogram / np.linalg.norm(histogram)


def slow_hog(images: Tensor, *, cell: int, nbins: int, bias: Sequence[float] = (0.0, 0.0)) -> np.ndarray:
    batch, _, height, width = images.shape
    result = np.zeros((batch, (height // cell) * (width // cell), 3 * nbins))
    for b in range(batch):
        for channel in range(3):
            plane = images[b, channel].numpy()
            for row in range(height // cell):
                for column in range(width // cell):
                    unit = hog_of_one_cell(
                        plane,
                        range(row * cell, (row + 1) * cell),
                        range(column * cell, (column + 1) * cell),
                        nbins,
                        bias,
                    )
                    slots = slice(channel * nbins, (channel + 1) * nbins)
                    result[b, row * (width // cell) + column, slots] = unit
    return result


@pytest.mark.parametrize(
    ("nbins", "cell_sizes", "bias"),
    [(9, (2, 4, 8), None), (18, (6, 12), (0.0625, -0.125)), (7, (4, 6, 24), None), (1, (3,), None), (9, (8, 2), None)],
)
def test_equals_a_loop_over_pixels(nbins: int, cell_sizes: tuple[int, ...], bias: tuple[float, float] | None) -> None:
    images = random_images(nbins)
    targets = hog_targets(images, cell_sizes=cell_sizes, nbins=nbins, bias=bias)
    for cell, target in zip(cell_sizes, targets, strict=True):
        expected = slow_hog(images, cell=cell, nbins=nbins, bias=bias or (0.0, 0.0))
        np.testing.assert_allclose(target.numpy(), expected, atol=2e-6)


def test_equals_a_loop_over_pixels_on_an_oblong_image() -> None:
    images = random_images(5, batch=1, height=12, width=20)
    (target,) = hog_targets(images, cell_sizes=[4], nbins=9)
    np.testing.assert_allclose(target.numpy(), slow_hog(images, cell=4, nbins=9), atol=2e-6)


@pytest.mark.parametrize(("file", "nbins"), [("hog_9bins", 9), ("hog_18bins_bias", 18)])
def test_equals_the_authors_figures(shared_dir: Path, file: str, nbins: int) -> None:
    with np.load(shared_dir / "reference" / f"{file}.npz") as figures:
        images = torch.from_numpy(figures["images"])
        bias = torch.from_numpy(figures["bias"]) if "bias" in figures.files else None
        expected = [figures[f"target_pool{cell}"] for cell in (4, 8, 16, 32)]
    targets = hog_targets(images, cell_sizes=(4, 8, 16, 32), nbins=nbins, bias=bias)
    for target, figure in zip(targets, expected, strict=True):
        error = np.abs(target.numpy() - figure)
        assert error.mean() < 1e-5
        assert (error < 1e-4).mean() >= 0.999


def test_both_histograms_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.rand(6, 24, 36, generator=generator)
    bins = torch.randint(0, 9, (6, 24, 36), generator=generator).float()
    by_scatter = histogram_by_scatter(magnitude, bins, cell_size=4, nbins=9)
    assert by_scatter.shape == (6, 9, 6, 9)
    torch.testing.assert_close(histogram_by_comparison(magnitude, bins, cell_size=4, nbins=9), by_scatter)


def test_the_histogram_for_accelerators_lets_a_nan_through() -> None:
    magnitude, bins = torch.ones(1, 8, 8), torch.zeros(1, 8, 8)
    magnitude[0, 0, 0] = bins[0, 0, 0] = math.nan
    histogram = histogram_by_comparison(magnitude, bins, cell_size=4, nbins=9)
    assert histogram[0, :, 0, 0].isnan().all()
    assert histogram[0, :, 1:, 1:].isfinite().all()


@given(seed=st.integers(0, 2**31), nbins=st.integers(1, 20), axis=st.sampled_from([2, 3]))
@settings(max_examples=30, deadline=None)
def test_a_mirrored_image_has_mirrored_targets_and_bins(seed: int, nbins: int, axis: int) -> None:
    # A reflected border has no gradient across it: its angles are 0 or 180 degrees, both edges of bin 0 and their own
    # mirror images. So the outermost cells are left out.
    images = random_images(seed)
    (target,) = hog_targets(images, cell_sizes=[4], nbins=nbins)
    (mirrored,) = hog_targets(images.flip(axis), cell_sizes=[4], nbins=nbins)
    expected = target.view(2, 6, 6, 3, nbins).flip(axis - 1, 4)
    inner = (slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(mirrored.view(2, 6, 6, 3, nbins)[inner], expected[inner], rtol=0, atol=1e-5)


@given(seed=st.integers(0, 2**31), power=st.integers(-20, 20), factor=st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_contrast_does_not_matter(seed: int, power: int, factor: float) -> None:
    images = random_images(seed)
    targets = hog_targets(images, cell_sizes=[4, 8], nbins=9)
    for target, scaled in zip(targets, hog_targets(images * 2.0**power, cell_sizes=[4, 8], nbins=9), strict=True):
        torch.testing.assert_close(scaled, target, rtol=0, atol=1e-6)
    for target, scaled in zip(targets, hog_targets(images * factor, cell_sizes=[4, 8], nbins=9), strict=True):
        # A factor that is no power of two rounds: a pixel on the edge of a bin may change sides.
        assert ((target - scaled).abs() < 1e-4).float().mean() > 0.99


@given(seed=st.integers(0, 2**31), shift=st.floats(-4, 4))
@settings(max_examples=20, deadline=None)
def test_every_histogram_is_a_unit_vector(seed: int, shift: float) -> None:
    for target in hog_targets(random_images(seed) + shift, cell_sizes=[2, 4, 12], nbins=9):
        assert target.dtype == torch.float32
        assert (target >= 0).all()
        torch.testing.assert_close(target.unflatten(2, (3, 9)).norm(dim=3), torch.ones(*target.shape[:2], 3))


@given(value=st.floats(-1e4, 1e4, width=32))
@settings(max_examples=20, deadline=None)
def test_a_constant_image_has_zero_targets(value: float) -> None:
    for target in hog_targets(torch.full((1, 3, 16, 16), value), cell_sizes=[4, 8], nbins=9):
        assert (target == 0).all()


def test_a_channel_without_contrast_does_not_silence_the_others() -> None:
    images = random_images(2)
    images[0, 1] = 0.1
    for target in hog_targets(images, cell_sizes=[4], nbins=9):
        norms = target.unflatten(2, (3, 9)).norm(dim=3)
        assert (norms[0, :, 1] == 0).all()
        torch.testing.assert_close(norms[0, :, [0, 2]], torch.ones(36, 2))
        torch.testing.assert_close(norms[1], torch.ones(36, 3))


def test_a_constant_image_has_the_direction_of_the_bias() -> None:
    (target,) = hog_targets(torch.full((1, 3, 8, 8), 0.1), cell_sizes=[4], nbins=9, bias=(0.25, -0.125))
    expected = torch.zeros(9)
    expected[int(math.atan2(0.25, -0.125) / math.pi * 9)] = 1
    torch.testing.assert_close(target, expected.repeat(1, 4, 3))


def test_pooling_changes_nothing() -> None:
    images = random_images(1, height=48, width=48)
    together = hog_targets(images, cell_sizes=(4, 6, 12, 24), nbins=9)
    for cell, target in zip((4, 6, 12, 24), together, strict=True):
        (alone,) = hog_targets(images, cell_sizes=[cell], nbins=9)
        torch.testing.assert_close(target, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images_are_computed_in_float32(dtype: torch.dtype) -> None:
    black_and_white = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5) * 65000.0
    images = black_and_white.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = hog_targets(images, cell_sizes=[4, 16], nbins=9)
    for target, exact in zip(targets, hog_targets(images.float(), cell_sizes=[4, 16], nbins=9), strict=True):
        assert target.dtype == torch.float32
        assert torch.equal(target, exact)
        assert target.isfinite().all()


def test_no_graph_is_kept() -> None:
    (target,) = hog_targets(random_images(0).requires_grad_(), cell_sizes=[4], nbins=9)
    assert not target.requires_grad


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(2, 4, 8, 8), {}, r"images has shape \(2, 4, 8, 8\), expected \(batch, 3, height, width\)"),
        (torch.zeros(3, 8, 8), {}, r"images has shape \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), {}, "dtype torch.uint8, expected normalised images"),
        (torch.full((2, 3, 8, 8), math.nan), {}, "384 values that are NaN or infinite"),
        (torch.full((2, 3, 8, 8), -math.inf), {}, "NaN or infinite"),
        (torch.zeros(2, 3, 8, 10), {}, r"cell size 4 does not divide images of shape \(2, 3, 8, 10\)"),
        (torch.zeros(2, 3, 8, 8), {"cell_sizes": [0]}, "cell size 0 does not divide"),
        (torch.zeros(2, 3, 8, 8), {"nbins": 0}, "nbins is 0, expected at least 1"),
        (torch.zeros(2, 3, 8, 8), {"bias": [1.0, 2.0, 3.0]}, r"bias has shape \(3,\), expected \(2,\)"),
        (torch.zeros(2, 3, 1, 1), {"cell_sizes": [1]}, "reflecting its border"),
    ],
)
def test_bad_input_is_refused(images: Tensor, options: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"cell_sizes": [4], "nbins": 9, **options}
    with pytest.raises(ValueError, match=message):
        hog_targets(images, **arguments)  # type: ignore[arg-type]


def test_nothing_asked_nothing_computed() -> None:
    assert hog_targets(random_images(0), cell_sizes=[], nbins=9) == []
