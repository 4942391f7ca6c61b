"""Pictures of what a LocalMIM sees: masked input, HOG targets and predictions per scale, attention.

Matplotlib is imported when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfreeze.architecture import HEAD_SCALES
from vitfreeze.config import Colours
from vitfreeze.data import CenterCrop, normalize
from vitfreeze.data.decoding import decode_image
from vitfreeze.data.normalization import IMAGENET
from vitfreeze.data.order import SampleRandom
from vitfreeze.model.local_mim import HeadPrediction, LocalMIM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN_INCHES = 1.6
TITLE_INCHES = 0.3
GAP = 0.02  # around a picture, in columns
_GLYPH_PIXELS = 8  # of the finest cell


class Panel(NamedTuple):
    """One column of the grid: its title, and a picture per image with values from 0 to 1, (B, H, W) or (B, H, W, 3)."""

    title: str
    pictures: Tensor


@torch.no_grad()
def make_panels(
    model: LocalMIM, images: Tensor, *, frozen_layers: int = 0, blocks: Sequence[int] = (), seed: int = 0,
    colours: Colours = IMAGENET,
) -> list[Panel]:  # fmt: skip
    """Return the columns: input, masked input, target and prediction at each living scale, attention per block.

    Args:
        model: in float32, or on a device that computes in its precision.
        images: (B, 3, img_size, img_size) uint8, on the model's device.
        frozen_layers: length of the frozen prefix; heads on it are gone.
        blocks: 1-based blocks whose class token's attention is shown; the last by default.
        seed: of the masks.
        colours: what images are normalised by.

    Raises:
        ValueError: images of another size, or a block that does not exist.
    """
    inputs = normalize(images, colours=colours)
    noise = torch.rand(len(images), model.num_patches, generator=torch.Generator().manual_seed(seed)).to(images.device)
    heads = model.predict(inputs, noise=noise, frozen_layers=frozen_layers)
    pixels = images.permute(0, 2, 3, 1).float().cpu() / 255
    masked_BL = noise.argsort(dim=1, stable=True).argsort(dim=1) >= model.num_visible
    mask_BHW = _to_grid(masked_BL.float(), side=model.img_size).cpu()
    panels = [Panel("input", pixels), Panel("masked", torch.where(mask_BHW[..., None] > 0, 0.5, pixels))]
    for head, seen in heads.items():
        nbins = model.hog_nbins if model.target is None else None
        panels += _panels_of_head(seen, scale=HEAD_SCALES[head], nbins=nbins)
    for block in tuple(blocks) or (model.depth,):
        attention_BL = class_attention(model, inputs, block=block)
        attention_BL = attention_BL / attention_BL.amax(dim=1, keepdim=True)
        panels.append(Panel(f"attention\nof block {block}", _to_grid(attention_BL, side=model.img_size).cpu()))
    return panels


@torch.no_grad()
def class_attention(model: LocalMIM, images: Tensor, *, block: int) -> Tensor:
    """Return how much the class token attends to each patch in a block, mean over its heads: (B, L) float32.

    Args:
        images: (B, 3, img_size, img_size), normalised; nothing is masked.
        block: 1-based.

    Raises:
        ValueError: no such block.
    """
    if not 1 <= block <= model.depth:
        raise ValueError(f"block is {block}, expected 1 to depth {model.depth}")
    attention: Any = model.blocks[block - 1].attn
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        model.encode(images, blocks=[block])
    finally:
        handle.remove()
    query, key, _ = attention.qkv(seen[0]).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    scores = query[:, :, :1].float() @ key.float().transpose(-1, -2) * attention.scale
    return scores.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def draw_hog(histograms_BTF: Tensor, *, nbins: int, cell_pixels: int) -> Tensor:
    """Draw HOG as strokes: one along the edge of each orientation, as bright as its bin; (B, H, W) from 0 to 1.

    Args:
        histograms_BTF: (B, T, 3 * nbins), cells of a square grid in row-major order, channels before bins.
        nbins: orientation bins over half a turn.
        cell_pixels: side of a drawn cell.
    """
    side = math.isqrt(histograms_BTF.shape[1])
    bins_BTK = histograms_BTF.float().unflatten(-1, (3, nbins)).mean(dim=2).clamp_min(0)
    strokes_KPP = _strokes(nbins, cell_pixels).to(bins_BTK.device)
    glyphs = torch.einsum("btk,kpq->btpq", bins_BTK, strokes_KPP)
    picture = glyphs.unflatten(1, (side, side)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
    return (picture / 0.6).clamp(0, 1)


def _strokes(nbins: int, pixels: int) -> Tensor:
    """Return a line through the middle of a square for each bin: (nbins, pixels, pixels) from 0 to 1.

    A bin holds the angle between the gradient and the vertical, and an edge is at right angles to its gradient.
    """
    offset = torch.arange(pixels) - (pixels - 1) / 2
    down, right = torch.meshgrid(offset, offset, indexing="ij")
    angle = (torch.arange(nbins) + 0.5) * math.pi / nbins
    # The gradient points to (right, down) = (sin, cos): that is the distance from the edge through the middle.
    distance = right * angle.sin()[:, None, None] + down * angle.cos()[:, None, None]
    inside = (right.square() + down.square()).sqrt() <= pixels / 2
    return (1 - distance.abs()).clamp_min(0) * inside


def draw_first(targets_BTF: Tensor, *, least: Tensor, most: Tensor, cell_pixels: int) -> Tensor:
    """Draw the first of the numbers of every cell, from black at `least` to white at `most`: (B, H, W) from 0 to 1."""
    values_BT = (targets_BTF[..., 0].float() - least) / (most - least).clamp_min(1e-12)
    return _to_grid(values_BT.clamp(0, 1), side=math.isqrt(values_BT.shape[1]) * cell_pixels)


def _panels_of_head(seen: HeadPrediction, *, scale: float, nbins: int | None) -> list[Panel]:
    """Return target and prediction of one scale; what the loss does not read of the prediction is dimmed.

    With `nbins` they are HOG; of other targets the first number is drawn.
    """
    cell_pixels = round(_GLYPH_PIXELS * HEAD_SCALES[0] / scale)
    if nbins is None:
        first = seen.targets[..., 0].float()
        draw = partial(draw_first, least=first.min(), most=first.max(), cell_pixels=cell_pixels)
    else:
        draw = partial(draw_hog, nbins=nbins, cell_pixels=cell_pixels)
    target, prediction = draw(seen.targets).cpu(), draw(seen.predictions).cpu()
    masked = _to_grid(seen.weights.float(), side=prediction.shape[-1]).cpu()
    prediction = prediction * (0.35 + 0.65 * masked)
    return [Panel(f"target\n{scale:g}x", target), Panel(f"prediction\n{scale:g}x", prediction)]


def _to_grid(values_BT: Tensor, *, side: int) -> Tensor:
    """Spread one number per cell of a square grid over (B, side, side) pixels."""
    cells = math.isqrt(values_BT.shape[1])
    return F.interpolate(values_BT.view(-1, 1, cells, cells), size=(side, side), mode="nearest")[:, 0]


def draw_figure(panels: Sequence[Panel], *, title: str = "") -> Figure:
    """Lay the panels out side by side, one row per image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(panels[0].pictures), len(panels)
    height = rows * COLUMN_INCHES + TITLE_INCHES * (2 if title else 1)
    figure = Figure(figsize=(columns * COLUMN_INCHES, height), dpi=100)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0, 0, 1, rows * COLUMN_INCHES / height))  # one for all: each costs as much as its pictures
    for column, panel in enumerate(panels):
        axis.text(column + 0.5, 0, panel.title, ha="center", va="bottom", fontsize=9, linespacing=1.1)
        for row in range(rows):
            picture, edges = panel.pictures[row].numpy(), (column + GAP, column + 1 - GAP, row + 1 - GAP, row + GAP)
            axis.imshow(picture, cmap=None if picture.ndim == 3 else "inferno", vmin=0, vmax=1, extent=edges)
    axis.set(xlim=(0, columns), ylim=(rows, 0))
    axis.set_axis_off()
    if title:
        figure.text(0.5, 1 - 0.05 / height, title, ha="center", va="top", fontsize=10)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG and return where."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def to_pixels(figure: Figure) -> Tensor:
    """Return a figure as (3, H, W) from 0 to 1, as TensorBoard takes it."""
    canvas: Any = figure.canvas
    canvas.draw()
    rgba = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return rgba.view(height, width, 4)[..., :3].permute(2, 0, 1).float() / 255


def read_images(paths: Sequence[Path], *, img_size: int) -> Tensor:
    """Read image files as evaluation does: shorter side resized, central crop; (B, 3, img_size, img_size) uint8.

    Raises:
        ValueError: no files, or one that is no image.
    """
    if not paths:
        raise ValueError("no images are given, expected at least one file")
    crop, images = CenterCrop(img_size=img_size), torch.empty(len(paths), 3, img_size, img_size, dtype=torch.uint8)
    for path, image in zip(paths, images, strict=True):
        try:
            crop.apply(decode_image(path.read_bytes()).pixels, SampleRandom(0), image)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return images
