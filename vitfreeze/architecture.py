"""Geometry of a LocalMIM Vision Transformer: sizes, taps, heads, cell sizes, and the units that freeze. No torch.

The model, the planner and the configuration all read these facts from here, so that a plan can be
printed without loading torch and still describe exactly the model that will be built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


@dataclass(frozen=True, kw_only=True)
class FreezeUnit:
    """Parameters that share a learning rate and leave training together. Frozen layers are always a prefix.

    Attributes:
        name: of the unit; its parameter groups are `<name>.decay` and `<name>.no_decay`.
        leaves_with: the layer whose freezing takes it out of training; None: it trains to the end.
        layer: the freezable layer that it is: 0 embeds patches, i is block i. None: it is none.
        head: the head of LocalMIM that it is; None: it is none.
        feeds_layers: it trains to the end below layers that freeze, so the backward pass runs through all of them.
    """

    name: str
    leaves_with: int | None = None
    layer: int | None = None
    head: int | None = None
    feeds_layers: bool = False

    def trains(self, frozen_layers: int) -> bool:
        """Say whether the unit still trains when the first `frozen_layers` layers are frozen."""
        return self.leaves_with is None or frozen_layers <= self.leaves_with


def localmim_units(depth: int, *, cls_token: bool = True, patch_embed: bool = True) -> tuple[FreezeUnit, ...]:
    """Return the freeze units of an encoder with `depth` blocks and of its four heads, first to freeze first.

    layer_00 is the patch embedding with the class token, layer_i block i, head_k the norm and decoder of head
    k. If `cls_token` or `patch_embed` is false, that parameter does not freeze with layer 0: it becomes a unit
    of its own that trains to the end, as the class token does in the authors' code.
    """
    taps = tap_blocks(depth)
    units = []
    for layer in _layer_units(depth):
        if layer.layer != 0 or cls_token or patch_embed:
            units.append(layer)
        # Two heads tap the same block of an encoder with 4 or 6 blocks.
        heads = (head for head in reversed(range(len(taps))) if taps[head] == layer.layer)
        units += [FreezeUnit(name=f"head_{head}", leaves_with=layer.layer, head=head) for head in heads]
    units += [FreezeUnit(name="cls_token", feeds_layers=True)] if not cls_token else []
    units += [FreezeUnit(name="patch_embed", feeds_layers=True)] if not patch_embed else []
    return tuple(units)


def classifier_units(depth: int) -> tuple[FreezeUnit, ...]:
    """Return the freeze units of an encoder that is fine-tuned; its classifier trains to the end."""
    return (*_layer_units(depth), FreezeUnit(name="classifier"))


def _layer_units(depth: int) -> list[FreezeUnit]:
    return [FreezeUnit(name=f"layer_{layer:02d}", leaves_with=layer, layer=layer) for layer in range(depth + 1)]


def count_layers(units: Iterable[FreezeUnit]) -> int:
    """Return how many layers can freeze: one more than the highest."""
    return 1 + max((unit.layer for unit in units if unit.layer is not None), default=-1)


def active_heads(units: Iterable[FreezeUnit], frozen_layers: int) -> tuple[int, ...]:
    """Return the heads of LocalMIM that still train when the first `frozen_layers` layers are frozen, finest first."""
    return tuple(sorted(unit.head for unit in units if unit.head is not None and unit.trains(frozen_layers)))


def count_visible(num_patches: int, mask_ratio: float) -> int:
    """Return how many patches the encoder sees, as in MAE."""
    return int(num_patches * (1 - mask_ratio))


def count_decoded(num_masked: int, decoded_share: float) -> int:
    """Return how many of the masked patches the heads reconstruct."""
    return num_masked if decoded_share == 1 else int(num_masked * decoded_share)


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
