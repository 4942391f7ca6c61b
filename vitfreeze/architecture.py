"""Geometry of a LocalMIM Vision Transformer: sizes, taps, heads and cell sizes. No torch.

The model, the planner and the configuration all read these facts from here, so that a plan can be
printed without loading torch and still describe exactly the model that will be built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Encoder and decoder dimensions of one ViT; LocalMIM gives every size the same small decoders."""

    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    decoder_embed_dim: int = 256
    decoder_depth: int = 1
    decoder_num_heads: int = 8

    @property
    def num_layers(self) -> int:
        """Number of freezable layers: the patch embedding and every block."""
        return self.depth + 1


MODEL_SIZES: Mapping[str, ModelSize] = MappingProxyType(
    {
        "vit_tiny_test": ModelSize(
            patch_size=8, embed_dim=48, depth=8, num_heads=3, decoder_embed_dim=32, decoder_num_heads=2
        ),
        "vit_small_patch16": ModelSize(patch_size=16, embed_dim=384, depth=12, num_heads=6),
        "vit_base_patch16": ModelSize(patch_size=16, embed_dim=768, depth=12, num_heads=12),
        "vit_large_patch16": ModelSize(patch_size=16, embed_dim=1024, depth=24, num_heads=16),
        "vit_huge_patch16": ModelSize(patch_size=16, embed_dim=1280, depth=32, num_heads=16),
    }
)

# Cells per patch side that head k predicts, finest first (LocalMIM, section 3.2).
HEAD_SCALES: tuple[float, ...] = (4, 2, 1, 0.5)


def tap_blocks(depth: int) -> tuple[int, ...]:
    """Return the 1-based blocks whose outputs feed the four heads: 2, 4, depth - 2 and depth.

    Raises:
        ValueError: the encoder has fewer than four blocks.
    """
    if depth < 4:
        raise ValueError(f"depth {depth} is too small: LocalMIM taps blocks 2, 4, depth-2 and depth, so depth >= 4")
    return (2, 4, depth - 2, depth)


def active_heads(frozen_layers: int, *, depth: int) -> tuple[int, ...]:
    """Return the indices of the heads that still train when the first `frozen_layers` layers are frozen.

    Layer b is block b (1-based) and layer 0 the patch embedding, so the block under a tap b is frozen, and
    its head gone, as soon as `frozen_layers` exceeds b.
    """
    return tuple(head for head, tap in enumerate(tap_blocks(depth)) if frozen_layers <= tap)


def cell_sizes(*, img_size: int, patch_size: int) -> tuple[int, ...]:
    """Return the side in pixels of the HOG cells of each head: patch_size / scale, finest first.

    Raises:
        ValueError: the image is not a whole number of patches, or a cell or a coarse grid is not whole.
    """
    if img_size <= 0 or patch_size <= 0 or img_size % patch_size:
        raise ValueError(f"img_size {img_size} is not a multiple of patch_size {patch_size}")
    sizes = []
    for scale in HEAD_SCALES:
        cell = patch_size / scale
        if cell != int(cell):
            raise ValueError(
                f"patch_size {patch_size} at scale {scale:g} needs HOG cells of {patch_size} / {scale:g} = {cell:g} "
                "pixels; patch_size must be a multiple of 4"
            )
        if img_size % int(cell):
            grid = img_size // patch_size
            raise ValueError(
                f"img_size {img_size} with patch_size {patch_size} gives a {grid} x {grid} patch grid, which scale "
                f"{scale:g} cannot divide into cells of {cell:g} pixels; the grid must be even"
            )
        sizes.append(int(cell))
    return tuple(sizes)
