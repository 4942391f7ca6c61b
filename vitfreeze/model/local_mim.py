"""LocalMIM: a Vision Transformer pre-trained with local multi-scale reconstruction, whose first layers may be frozen.

Shape suffixes: B batch, C channels, H and W pixels, L patches, V visible patches, M masked patches, N tokens (the
class token and patches), D width, K cells inside a patch, T cells of the whole image, F numbers per HOG target.

Source: LocalMIM (Wang et al., CVPR 2023); masking and positions as in MAE (He et al., CVPR 2022); blocks and
parameter names of the encoder as in timm.

Tokens stay in the order of the masking noise, class token first, then visible patches, then masked ones, from the
encoder to the loss: attention does not care, and what is wanted of each group is a slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitfreeze.architecture import (
    HEAD_SCALES,
    FreezeUnit,
    active_heads,
    cell_sizes,
    count_decoded,
    count_visible,
    localmim_units,
    tap_blocks,
)
from vitfreeze.model.compiled import compile_each
from vitfreeze.model.frozen_block import run_frozen
from vitfreeze.model.hog import check_images
from vitfreeze.model.targets import Pixels, TargetMaker

LAYER_NORM_EPS = 1e-6
# A convolution with one input channel and a 3 x 3 kernel draws its bias from +-1/3 by default. Steps of 1/256 survive
# a conversion to bfloat16 or float16, so that a model in half precision keeps the very same targets.
_HOG_BIAS_STEPS = 85
_HOG_BIAS_UNIT = 1 / 256


class Target(Protocol):
    """What the heads predict, made of images. The class of it is registered, and called without arguments.

    Attributes:
        num_outputs: numbers of a cell, F.
    """

    num_outputs: int

    def __call__(self, images: Tensor, *, cell_sizes: Sequence[int]) -> Sequence[Tensor]:
        """Return what is to be predicted of square cells: for each size a float32 (B, T, F) tensor, rows first.

        Args:
            images: (B, 3, S, S), normalised.
            cell_sizes: sides of the cells in pixels, each of which divides S.
        """


class LocalMIMOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        loss: scalar, float32; the sum of `losses`, each times its scale's weight.
        losses: masked mean squared error of every active scale, finest first, unweighted.
        heads: indices of the active heads, parallel to `losses`.
    """

    loss: Tensor
    losses: tuple[Tensor, ...]
    heads: tuple[int, ...]


class HeadPrediction(NamedTuple):
    """Everything one head sees and says, on the whole grid of its cells in row-major order.

    Attributes:
        latents: (B, 1 + V, D) normalised tap of the encoder, class token first, patches in the order of the noise.
        predictions: (B, T, F).
        targets: (B, T, F) float32.
        weights: (B, T) share of each cell that is masked; only these count in the loss.
    """

    latents: Tensor
    predictions: Tensor
    targets: Tensor
    weights: Tensor


def sincos_positions(grid_size: int, width: int, *, full_grid_size: int | None = None) -> Tensor:
    """Return MAE's fixed positions as (1, 1 + grid_size**2, width) float32, all zeros for the class token.

    The first half of the width encodes the column, the second the row; each half is sines, then cosines. Coordinates
    are those of a grid of `full_grid_size`, by default this one, laid over the same image: the centre of every patch
    has the position that this place of the image has there.

    Raises:
        ValueError: width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width {width} must be a multiple of 4: sines and cosines of two coordinates")
    coordinate = torch.arange(grid_size, dtype=torch.float64)
    if full_grid_size is not None:
        coordinate = (coordinate + 0.5) * full_grid_size / grid_size - 0.5
    frequency = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = coordinate[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns = axis[None, :, :].expand(grid_size, -1, -1)
    rows = axis[:, None, :].expand(-1, grid_size, -1)
    patches = torch.cat([columns, rows], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches])[None].float()


def _take(x_BND: Tensor, index_BM: Tensor) -> Tensor:
    """Pick other rows for every sample: (B, N, D) and (B, M) -> (B, M, D)."""
    return x_BND.gather(1, index_BM[..., None].expand(-1, -1, x_BND.shape[-1]))


class EncoderBlock(Block):
    """timm's block, with a cheaper way to run it when it is frozen."""

    def forward(self, tokens_BND: Tensor, frozen: bool = False) -> Tensor:
        """Map (B, N, D) to (B, N, D); a frozen block keeps nothing for its own weights."""
        return run_frozen(self, tokens_BND) if frozen else super().forward(tokens_BND)


class DecoderBlock(Block):
    """timm's block, able to compute only the outputs that somebody reads."""

    def forward(self, tokens_BND: Tensor, first_query: int = 0) -> Tensor:
        """Return the outputs of the tokens from `first_query` on; every token still serves as key and value."""
        attention = self.attn
        normed_BND = self.norm1(tokens_BND)
        width = normed_BND.shape[-1]
        # Splitting, unlike slicing, puts the two gradients of a weight together in one operation.
        weights, biases = (x.split([width, 2 * width]) for x in (attention.qkv.weight, attention.qkv.bias))
        query = F.linear(normed_BND[:, first_query:], weights[0], biases[0])
        key, value = F.linear(normed_BND, weights[1], biases[1]).chunk(2, dim=-1)
        split = partial(torch.unflatten, dim=-1, sizes=(attention.num_heads, -1))
        query, key, value = (split(x).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        tokens_BND = tokens_BND[:, first_query:] + attention.proj(mixed.transpose(1, 2).flatten(2))
        return tokens_BND + self.mlp(self.norm2(tokens_BND))


class CellPredictor(nn.Sequential):
    """The layers that turn a decoded patch into the targets of its cells, run token by token.

    A transposed convolution whose stride equals its kernel, and a 1 x 1 convolution, act on every patch by itself:
    they are matrix products on its token. Two with no nonlinearity between them are one product.
    """

    def __init__(self, *, width: int, scale: float, num_outputs: int) -> None:
        layers: list[nn.Module]
        if scale == 4:
            middle, last = width // 2, width // 4
            layers = [
                nn.ConvTranspose2d(width, middle, 2, stride=2),
                nn.LayerNorm(middle, eps=LAYER_NORM_EPS),
                nn.GELU(),
                nn.ConvTranspose2d(middle, last, 2, stride=2),
                nn.Conv2d(last, num_outputs, 1),
            ]
        elif scale == 2:
            layers = [nn.ConvTranspose2d(width, width // 2, 2, stride=2), nn.Conv2d(width // 2, num_outputs, 1)]
        elif scale == 1:
            layers = [nn.Conv2d(width, num_outputs, 1)]
        elif scale == 0.5:
            layers = [nn.AvgPool2d(2), nn.Conv2d(width, num_outputs, 1)]
        else:
            raise ValueError(f"scale {scale:g} has no predictor, expected one of {HEAD_SCALES}")
        super().__init__(*layers)
        self.scale = scale

    def forward(self, tokens_BMD: Tensor) -> Tensor:
        """Map (B, M, D) to (B, M, K, F); cells as in `cell_order`. At scale 1/2 the tokens are pooled already."""
        if self.scale == 4:
            hidden = _upsample(tokens_BMD, self[0])
            hidden = F.gelu(cast(nn.LayerNorm, self[1])(hidden))
            return _upsample(hidden, self[3], self[4]).flatten(2, 3)
        if self.scale == 2:
            return _upsample(tokens_BMD, self[0], self[1])
        last = cast(nn.Conv2d, self[-1])
        return F.linear(tokens_BMD, last.weight.flatten(1), last.bias)[:, :, None]


def _upsample(tokens: Tensor, layer: nn.Module, projection: nn.Module | None = None) -> Tensor:
    """Apply a 2 x 2 transposed convolution of stride 2, and a 1 x 1 convolution after it: (..., D) -> (..., 4, F)."""
    weight = cast(Tensor, layer.weight).permute(0, 2, 3, 1).flatten(1, 2)
    bias = cast(Tensor, layer.bias)
    if projection is not None:
        matrix = cast(Tensor, projection.weight).flatten(1)
        weight = F.linear(weight, matrix)
        bias = F.linear(bias, matrix, cast(Tensor, projection.bias))
    return (tokens @ weight.flatten(1)).unflatten(-1, (4, -1)) + bias


def cell_order(grid_size: int, scale: float) -> Tensor:
    """Return, for each patch and each of its cells as `CellPredictor` orders them, the cell's index in the image.

    Shape (L, K) for scales 4 (K = 16: quarters of quarters), 2 (K = 4) and 1 (K = 1). At scale 1/2 the roles are
    turned round: (L / 4, 4), the patches inside each cell.
    """
    if scale == 0.5:
        return cell_order(grid_size // 2, 2)
    if scale == 1:
        return torch.arange(grid_size**2)[:, None]
    side = int(grid_size * scale)
    index = torch.arange(side * side)
    if scale == 2:
        return index.view(grid_size, 2, grid_size, 2).permute(0, 2, 1, 3).reshape(-1, 4)
    return index.view(grid_size, 2, 2, grid_size, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 16)


class Grid(NamedTuple):
    """What belongs to a grid of patches other than the model's own.

    Attributes:
        positions: (1, 1 + L, D) of the encoder.
        decoder_positions: the same of the decoders.
        cell_orders: `cell_order` of every scale.
    """

    positions: Tensor
    decoder_positions: Tensor
    cell_orders: dict[float, Tensor]


class Decoder(nn.Module):
    """LocalMIM's small decoder: mask tokens join the visible ones, a block or more, and predictions per cell."""

    cell_order: Tensor
    pos_embed: Tensor

    def __init__(
        self,
        *,
        encoder_width: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        grid_size: int,
        scale: float,
        num_outputs: int,
    ) -> None:
        super().__init__()
        self.scale, self.grid_size, self.width = scale, grid_size, width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("pos_embed", sincos_positions(grid_size, width))
        self.embed = nn.Linear(encoder_width, width)
        norm_layer = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        self.blocks = nn.ModuleList(
            DecoderBlock(width, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pred = CellPredictor(width=width, scale=scale, num_outputs=num_outputs)
        self.register_buffer("cell_order", cell_order(grid_size, scale), persistent=False)

    def forward(
        self, latents_BND: Tensor, ids_BL: Tensor, grid: Grid | None = None, *, everywhere: bool = False
    ) -> Tensor:
        """Predict HOG.

        Args:
            latents_BND: (B, 1 + V, D) class token and visible patches.
            ids_BL: patches in the order of the noise: the V visible ones, then the masked ones; of these perhaps only
                the first, the others being left out.
            grid: that of the images; None: the model's own.
            everywhere: predict the cells of visible patches too, which the loss never reads.

        Returns:
            (B, M, K, F) for the masked patches in their order, (B, L, K, F) for all patches with `everywhere`; at
            scale 1/2, where hardly a cell is wholly visible, always (B, T, 1, F), cells in row-major order.
        """
        num_visible = latents_BND.shape[1] - 1
        # DeepSpeed converts parameters, not buffers: positions must not raise half-precision tokens to float32.
        pos_embed = (self.pos_embed if grid is None else grid.decoder_positions).to(self.mask_token.dtype)
        visible_BND = self.embed(latents_BND)
        pos_BLD = pos_embed[0, 1:][ids_BL]
        pos_BVD = torch.cat([pos_embed[:, :1].expand(len(ids_BL), -1, -1), pos_BLD[:, :num_visible]], dim=1)
        masked_BMD = self.mask_token + pos_BLD[:, num_visible:]
        tokens_BND = torch.cat([visible_BND + pos_BVD, masked_BMD.to(visible_BND.dtype)], dim=1)
        for block in self.blocks[:-1]:
            tokens_BND = block(tokens_BND)
        all_patches = everywhere or self.scale < 1
        tokens_BND = self.blocks[-1](tokens_BND, 1 if all_patches else 1 + num_visible)
        tokens_BND = self.norm(tokens_BND)
        if self.scale < 1:
            tokens_BND = self._pool(tokens_BND, ids_BL, self.order_of_cells(grid).flatten())
        return self.pred(tokens_BND)

    def order_of_cells(self, grid: Grid | None) -> Tensor:
        """Return `cell_order` of a grid, by default the model's own."""
        return self.cell_order if grid is None else grid.cell_orders[self.scale]

    def _pool(self, tokens_BLD: Tensor, ids_BL: Tensor, order: Tensor) -> Tensor:
        """Return the mean of the tokens in each cell of 2 x 2 patches, of those that are there: (B, T, D)."""
        if ids_BL.shape[1] == len(order):
            return _take(tokens_BLD, ids_BL.argsort(dim=1)[:, order]).unflatten(1, (-1, 4)).mean(dim=2)
        cell_of_patch = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device) // 4)
        cells_BL = cell_of_patch[ids_BL]
        sums_BTD = tokens_BLD.new_zeros(len(tokens_BLD), len(order) // 4, tokens_BLD.shape[2])
        sums_BTD = sums_BTD.scatter_add(1, cells_BL[..., None].expand_as(tokens_BLD), tokens_BLD)
        counts_BT = _count_cells(cells_BL, len(order) // 4)
        return sums_BTD / counts_BT.clamp(min=1)[..., None].to(sums_BTD.dtype)


def _count_cells(cells_BL: Tensor, num_cells: int) -> Tensor:
    """Return how often each cell occurs, (B, T) float32."""
    counts_BT = torch.zeros(len(cells_BL), num_cells, device=cells_BL.device)
    return counts_BT.scatter_add_(1, cells_BL, torch.ones_like(cells_BL, dtype=torch.float32))


class Head(nn.Module):
    """A norm on one tap of the encoder and the decoder behind it."""

    def __init__(self, *, width: int, decoder: Decoder) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.decoder = decoder

    def forward(self, tap_BND: Tensor, ids_BL: Tensor, targets_BTF: Tensor, grid: Grid | None = None) -> Tensor:
        """Return the masked mean squared error of this scale, a float32 scalar."""
        latents_BND = self.norm(tap_BND)
        predictions_BMKF = self.decoder(latents_BND, ids_BL, grid).float()
        order = self.decoder.order_of_cells(grid)
        num_visible = tap_BND.shape[1] - 1
        if self.decoder.scale >= 1:
            # Every masked cell weighs 1 and every other 0, so that the masked mean is the mean of the masked ones.
            cells_BMK = order[ids_BL[:, num_visible:]]
            return F.mse_loss(predictions_BMKF.flatten(1, 2), _take(targets_BTF, cells_BMK.flatten(1)))
        weights_BT = self.cell_weights(ids_BL, order, num_visible=num_visible)
        errors_BT = (predictions_BMKF.squeeze(2) - targets_BTF).square().mean(dim=-1)
        total_weight = ids_BL.shape[0] * (ids_BL.shape[1] - num_visible) / 4
        return (errors_BT * weights_BT).sum() / total_weight

    def cell_weights(self, ids_BL: Tensor, order_LK: Tensor, *, num_visible: int) -> Tensor:
        """Return the (B, T) float32 share of each cell that is masked, and not left out."""
        num_patches = order_LK.numel() if self.decoder.scale < 1 else len(order_LK)
        mask_BL = torch.zeros(len(ids_BL), num_patches, device=ids_BL.device).scatter_(1, ids_BL[:, num_visible:], 1.0)
        if self.decoder.scale < 1:
            return mask_BL[:, order_LK].mean(dim=2)
        mask_BLK = mask_BL[..., None].expand(-1, -1, order_LK.shape[1])
        cells_BLK = order_LK.expand(len(ids_BL), -1, -1)
        return torch.empty_like(mask_BLK).flatten(1).scatter_(1, cells_BLK.flatten(1), mask_BLK.flatten(1))

    def predict(self, tap_BND: Tensor, ids_BL: Tensor, targets_BTF: Tensor) -> HeadPrediction:
        """Predict every cell, also those that the loss does not read."""
        latents_BND = self.norm(tap_BND)
        predictions_BLKF = self.decoder(latents_BND, ids_BL, everywhere=True)
        predictions_BTF = predictions_BLKF.flatten(1, 2)
        if self.decoder.scale >= 1:
            cells_BT = self.decoder.cell_order[ids_BL].flatten(1)
            predictions_BTF = _take(predictions_BTF, cells_BT.argsort(dim=1))
        weights_BT = self.cell_weights(ids_BL, self.decoder.cell_order, num_visible=tap_BND.shape[1] - 1)
        return HeadPrediction(latents_BND, predictions_BTF, targets_BTF, weights_BT)


class LocalMIM(nn.Module):
    """Encoder with timm's parameter names at the top level and four heads under `heads.K`.

    Args:
        img_size: side of the square images in pixels.
        patch_size: side of a patch in pixels.
        embed_dim, depth, num_heads, mlp_ratio: the encoder.
        decoder_embed_dim, decoder_depth, decoder_num_heads: every head's decoder (its MLP ratio is the encoder's).
        hog_nbins: orientation bins of the targets.
        hog_bias: add a random pair of numbers to the gradients' responses, as LocalMIM's recipe for ViT-L does; one
            pair, drawn from `hog_bias_seed`, serves all scales.
        mask_ratio: share of the patches that is hidden; int(L * (1 - mask_ratio)) stay visible, as in MAE.
        freeze_cls_token: the class token is frozen together with layer 0. Otherwise it always trains, and the backward
            pass keeps running through every frozen block.
        freeze_patch_embed: the same of the patch embedding.
        scale_weights: one factor per head in the loss; all 1 by default.
        activation_checkpointing: recompute the active blocks of the encoder in the backward pass.
        hog_bias_seed: seed of the pair of hog_bias.
        target: what the heads predict instead of HOG.

    Raises:
        ValueError: sizes that do not fit together, with the arithmetic.
    """

    pos_embed: Tensor
    hog_bias: Tensor | None

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        decoder_embed_dim: int = 256,
        decoder_depth: int = 1,
        decoder_num_heads: int = 8,
        hog_nbins: int = 9,
        hog_bias: bool = False,
        mask_ratio: float = 0.75,
        freeze_cls_token: bool = True,
        freeze_patch_embed: bool = True,
        scale_weights: Sequence[float] | None = None,
        activation_checkpointing: bool = False,
        hog_bias_seed: int = 0,
        target: Target | None = None,
    ) -> None:
        super().__init__()
        self.target, self.num_outputs = target, 3 * hog_nbins if target is None else target.num_outputs
        self.cell_sizes = cell_sizes(img_size=img_size, patch_size=patch_size)
        self.taps = tap_blocks(depth)
        _check_widths(embed_dim, num_heads, decoder_embed_dim, decoder_num_heads)
        self.img_size, self.patch_size, self.depth, self.hog_nbins = img_size, patch_size, depth, hog_nbins
        self.grid_size = img_size // patch_size
        self.num_patches = self.grid_size**2
        self.mask_ratio, self.num_visible = mask_ratio, self._count_visible(mask_ratio, self.num_patches)
        if hog_nbins < 1 or decoder_depth < 1:
            raise ValueError(f"hog_nbins {hog_nbins} and decoder_depth {decoder_depth} must be at least 1")
        self.units = localmim_units(depth, cls_token=freeze_cls_token, patch_embed=freeze_patch_embed)
        self._layer_units = {unit.layer: unit for unit in self.units if unit.layer is not None}
        own_units = {unit.name: unit for unit in self.units if unit.feeds_layers}
        self._embedding_units = {
            name: own_units[name] if name in own_units else self._layer_units[0]
            for name in ("cls_token", "patch_embed")
        }
        self.activation_checkpointing = activation_checkpointing
        self._grids: dict[tuple[int, torch.device], Grid] = {}
        self._target_maker = TargetMaker()
        self._is_compiled = False
        self.scale_weights = _check_scale_weights((1.0,) * len(self.taps) if scale_weights is None else scale_weights)

        norm_layer = partial(nn.LayerNorm, eps=LAYER_NORM_EPS)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_positions(self.grid_size, embed_dim))
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, embed_dim)
        self.blocks = nn.ModuleList(
            EncoderBlock(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm_layer) for _ in range(depth)
        )
        self.heads = nn.ModuleList(
            Head(
                width=embed_dim,
                decoder=Decoder(
                    encoder_width=embed_dim,
                    width=decoder_embed_dim,
                    depth=decoder_depth,
                    num_heads=decoder_num_heads,
                    mlp_ratio=mlp_ratio,
                    grid_size=self.grid_size,
                    scale=scale,
                    num_outputs=self.num_outputs,
                ),
            )
            for scale in HEAD_SCALES
        )
        self.register_buffer("hog_bias", _draw_hog_bias(hog_bias_seed) if hog_bias else None)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Draw weights as MAE and LocalMIM do: Xavier for linear maps, 0.02 for tokens; convolutions keep torch's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(len(self.patch_embed.proj.weight), -1))
        nn.init.normal_(self.cls_token, std=0.02)
        for head in self.heads:
            nn.init.normal_(cast(Head, head).decoder.mask_token, std=0.02)

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        images: Tensor,
        *,
        noise: Tensor | None = None,
        pixels: Pixels | None = None,
        frozen_layers: int = 0,
        scale_weights: Sequence[float] | None = None,
        mask_ratio: float | None = None,
        decoded_share: float = 1.0,
    ) -> LocalMIMOutput:
        """Reconstruct the masked patches and return the loss.

        Args:
            images: (B, 3, S, S), normalised; targets are computed from them in float32. S is img_size or any other
                side that the patches and the coarsest cells divide; the weights are the same.
            noise: (B, L) in [0, 1): the patches with the smallest values stay visible. Drawn here when None.
            pixels: what the images were normalised from, where that is at hand: targets are made of it in less time.
            frozen_layers: length of the frozen prefix, 0 to depth. Its parameters get no gradient whether or not
                they require one, and heads on its blocks take no part.
            scale_weights: one factor per head for this step, instead of the model's.
            mask_ratio: for this step, instead of the model's.
            decoded_share: share of the masked patches that the heads see and reconstruct, those of the smallest
                noise; the others take no part.

        Raises:
            ValueError: a wrong shape of images or noise, a value that is NaN (on the CPU), `frozen_layers` out of
                range, not one scale weight per head, or no patch to see or to reconstruct.
        """
        self._check_size(images, is_any=True)
        num_patches = (images.shape[-1] // self.patch_size) ** 2
        num_visible = self._count_visible(self.mask_ratio if mask_ratio is None else mask_ratio, num_patches)
        decoded = count_decoded(num_patches - num_visible, decoded_share)
        if not 0 < decoded_share <= 1 or not decoded:
            masked = num_patches - num_visible
            raise ValueError(f"decoded_share is {decoded_share:g}, expected above 0 to 1, and a patch of {masked}")
        taps, ids_BL, targets = self._encode_visible(
            images, noise=noise, pixels=pixels, frozen_layers=frozen_layers, num_visible=num_visible
        )  # fmt: skip
        ids_BL = ids_BL[:, : num_visible + decoded]
        weights = self.scale_weights if scale_weights is None else _check_scale_weights(scale_weights)
        grid = self._grid_of(images)
        losses = {k: self._head(k)(tap, ids_BL, targets[k], grid) for k, tap in taps.items()}
        loss = torch.stack([weights[k] * losses[k] for k in losses]).sum()
        return LocalMIMOutput(loss, tuple(losses.values()), tuple(losses))

    def predict(
        self, images: Tensor, *, noise: Tensor | None = None, frozen_layers: int = 0
    ) -> dict[int, HeadPrediction]:
        """Return latents, predictions on the whole grid, targets and weights of every active head.

        Arguments and errors are those of `forward`, which computes only what the loss reads of this.
        """
        self._check_size(images)
        with self._uncompiled():
            taps, ids_BL, targets = self._encode_visible(
                images, noise=noise, frozen_layers=frozen_layers, num_visible=self.num_visible
            )
        return {k: self._head(k).predict(tap, ids_BL, targets[k]) for k, tap in taps.items()}

    def encode(self, images: Tensor, *, blocks: Sequence[int] | None = None, norm: bool = False) -> list[Tensor]:
        """Return the features of whole, unmasked images after each of the given blocks.

        Args:
            images: (B, 3, img_size, img_size), normalised.
            blocks: 1-based numbers of the wanted blocks in rising order; all of them by default.
            norm: apply the encoder's final norm, that of the last head, to each.

        Returns:
            One (B, 1 + L, D) tensor per block: class token, then patches in row-major order.

        Raises:
            ValueError: images of a wrong shape, or a block that does not exist.
        """
        self._check_size(images)
        wanted = tuple(range(1, self.depth + 1)) if blocks is None else tuple(blocks)
        if not wanted or not set(wanted) <= set(range(1, self.depth + 1)):
            raise ValueError(f"blocks is {wanted}, expected numbers from 1 to depth {self.depth}")
        patches_BLD = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))
        tokens_BND = self._prepend_cls_token(patches_BLD, self.pos_embed[:, 1:], frozen_layers=0)
        with self._uncompiled():
            features = self._run_blocks(tokens_BND, frozen_layers=0, wanted=wanted)
        final = self._head(-1).norm
        return [final(features[block].to(final.weight.dtype)) if norm else features[block] for block in wanted]

    def _encode_visible(
        self,
        images: Tensor,
        *,
        noise: Tensor | None,
        frozen_layers: int,
        num_visible: int,
        pixels: Pixels | None = None,
    ) -> tuple[dict[int, Tensor], Tensor, dict[int, Tensor]]:
        """Return taps and targets of every active head, and the patches in the order of the noise (B, L)."""
        if not 0 <= frozen_layers <= self.depth:
            raise ValueError(f"frozen_layers is {frozen_layers}, expected 0 to depth {self.depth}")
        if noise is None:
            noise = torch.rand(len(images), (images.shape[-1] // self.patch_size) ** 2, device=images.device)
        expected = (len(images), (images.shape[-1] // self.patch_size) ** 2)
        if noise.shape != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {expected}")
        heads = active_heads(self.units, frozen_layers)
        targets = self.make_targets(images, heads=heads, pixels=pixels)
        ids_BL = noise.argsort(dim=1, stable=True)
        tokens_BND = self._embed(images, ids_BL[:, :num_visible], frozen_layers=frozen_layers)
        outputs = self._run_blocks(tokens_BND, frozen_layers=frozen_layers, wanted=[self.taps[k] for k in heads])
        # A head computes in the precision of its own weights, whatever that of the block below.
        dtype = self._head(heads[0]).norm.weight.dtype
        taps = {k: outputs[self.taps[k]].to(dtype) for k in heads}
        return taps, ids_BL, dict(zip(heads, targets, strict=True))

    def make_targets(self, images: Tensor, *, heads: Sequence[int], pixels: Pixels | None = None) -> Sequence[Tensor]:
        """Return what the given heads predict, each (B, T, F) float32; raises ValueError for other shapes."""
        cells = [self.cell_sizes[k] for k in heads]
        if self.target is None:
            return self._target_maker.make(
                images, cell_sizes=cells, nbins=self.hog_nbins, bias=self.hog_bias, pixels=pixels
            )
        with torch.no_grad():
            targets = self.target(images, cell_sizes=cells)
        expected = [(len(images), (images.shape[-1] // cell) ** 2, self.num_outputs) for cell in cells]
        found = [tuple(target.shape) for target in targets]
        if found != expected:
            raise ValueError(f"{type(self.target).__name__} makes targets of the shapes {found}, expected {expected}")
        return targets

    def _embed(self, images: Tensor, ids_BV: Tensor, *, frozen_layers: int) -> Tensor:
        """Embed only the given patches, and put the class token before them: (B, 1 + V, D).

        Detached parameters are those under no_grad: nothing of the product is kept for a backward pass.
        """
        side, grid = self.patch_size, images.shape[-1] // self.patch_size
        other = self._grid_of(images)
        positions = self.pos_embed if other is None else other.positions
        weight, bias = self.patch_embed.proj.weight, self.patch_embed.proj.bias
        if not self._embedding_units["patch_embed"].trains(frozen_layers):
            weight, bias = weight.detach(), bias.detach()
        pixels = images.view(-1, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
        sample_B1 = torch.arange(len(images), device=images.device)[:, None]
        chosen_BVD = pixels[sample_B1, ids_BV // grid, ids_BV % grid].flatten(2)
        patches_BVD = F.linear(chosen_BVD.to(weight.dtype), weight.flatten(1), bias)
        return self._prepend_cls_token(patches_BVD, positions[0, 1:][ids_BV], frozen_layers=frozen_layers)

    def _prepend_cls_token(self, patches_BVD: Tensor, pos_BVD: Tensor, *, frozen_layers: int) -> Tensor:
        """Put the class token before embedded patches and add their positions."""
        dtype = patches_BVD.dtype
        trains = self._embedding_units["cls_token"].trains(frozen_layers)
        cls_token = self.cls_token if trains else self.cls_token.detach()
        cls_B1D = (cls_token.to(dtype) + self.pos_embed[:, :1].to(dtype)).expand(len(patches_BVD), -1, -1)
        return torch.cat([cls_B1D, patches_BVD + pos_BVD.to(dtype)], dim=1)

    def _run_blocks(self, tokens_BND: Tensor, *, frozen_layers: int, wanted: Sequence[int]) -> dict[int, Tensor]:
        """Run the encoder and return the outputs of the wanted blocks (1-based)."""
        outputs = {}
        for number, block in enumerate(self.blocks[: max(wanted)], start=1):
            tokens_BND = tokens_BND.to(cast(Block, block).norm1.weight.dtype)
            if not self._layer_units[number].trains(frozen_layers):
                tokens_BND = block(tokens_BND, frozen=True)
            elif self.activation_checkpointing and torch.is_grad_enabled():
                tokens_BND = checkpoint(block, tokens_BND, use_reentrant=False)
            else:
                tokens_BND = block(tokens_BND)
            if number in wanted:
                outputs[number] = tokens_BND
        return outputs

    def _grid_of(self, images: Tensor) -> Grid | None:
        """Return what belongs to the images' grid, computed at its first use; None for the model's own."""
        grid, device = images.shape[-1] // self.patch_size, images.device
        if grid == self.grid_size:
            return None
        if (grid, device) not in self._grids:
            widths = (self.pos_embed.shape[-1], self._head(0).decoder.width)
            positions = [sincos_positions(grid, width, full_grid_size=self.grid_size).to(device) for width in widths]
            orders = {scale: cell_order(grid, scale).to(device) for scale in HEAD_SCALES}
            self._grids[grid, device] = Grid(positions[0], positions[1], orders)
        return self._grids[grid, device]

    def _count_visible(self, mask_ratio: float, num_patches: int) -> int:
        visible = count_visible(num_patches, mask_ratio)
        if not 0 < visible < num_patches:
            raise ValueError(
                f"mask_ratio {mask_ratio:g} leaves int({num_patches} * (1 - {mask_ratio:g})) = {visible} "
                f"of {num_patches} patches visible, expected at least one visible and one masked"
            )
        return visible

    def _check_size(self, images: Tensor, *, is_any: bool = False) -> None:
        check_images(images)
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images has shape {tuple(images.shape)}, whose sides are not multiples of patch_size {self.patch_size}"
            )
        if is_any and height == width:
            cell_sizes(img_size=height, patch_size=self.patch_size)
        elif (height, width) != (self.img_size, self.img_size):
            expected = (len(images), 3, self.img_size, self.img_size)
            raise ValueError(f"images has shape {tuple(images.shape)}, expected {expected}")

    def _head(self, index: int) -> Head:
        return cast(Head, self.heads[index])

    # ------------------------------------------------------------------ names

    def freeze_units(self) -> dict[FreezeUnit, list[str]]:
        """Return the freeze units, first to freeze first, with the prefixes of the parameters that each owns."""
        owned: dict[FreezeUnit, list[str]] = {unit: [] for unit in self.units}
        for name, unit in self._embedding_units.items():
            owned[unit].append(name)
        for unit in self.units:
            if unit.head is not None:
                owned[unit].append(f"heads.{unit.head}")
            elif unit.layer:
                owned[unit].append(f"blocks.{unit.layer - 1}")
        return owned

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that have no weight decay beside biases and 1-d ones: none (LocalMIM)."""
        return set()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does, but refuse what does not fit with a ValueError.

        Raises:
            ValueError: a tensor is missing or unknown (when strict) or has another shape, with both shapes.
        """
        check_state(state_dict, {name: tuple(x.shape) for name, x in self.state_dict().items()}, strict=strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def compile_parts(self, **options: Any) -> None:
        """Compile every block and every head by itself, see `compile_each`; options are those of `torch.compile`.

        All blocks share their graphs (one with gradients, one for the first block above the frozen prefix, one for
        frozen blocks), and heads that leave take theirs along: a longer prefix runs what is already compiled. Nothing
        else changes: names, weights and results stay. `encode` and `predict` (probes and pictures, of other shapes and
        now and then) run what was not compiled. Targets are not compiled: a compiler that fuses a multiplication with
        an addition moves pixels to other bins, and on a GPU they have a kernel of their own.
        """
        compile_each((*self.blocks, *self.heads), **options)
        self._is_compiled = True

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Return a context in which blocks run as if they were not compiled."""
        return torch.compiler.set_stance("force_eager") if self._is_compiled else nullcontext()


def check_state(state: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], *, strict: bool = True) -> None:
    """Compare the tensors of a state dict with the expected shapes.

    Raises:
        ValueError: the first tensor that is missing or unknown (when strict) or has another shape than expected.
    """
    for name, shape in expected.items():
        if name not in state:
            if strict:
                raise ValueError(f"tensor {name} of shape {shape} is missing from the checkpoint")
        elif tuple(state[name].shape) != shape:
            raise ValueError(f"tensor {name} has shape {tuple(state[name].shape)}, expected {shape}")
    extra = [name for name in state if name not in expected]
    if strict and extra:
        shape = tuple(state[extra[0]].shape)
        raise ValueError(
            f"tensor {extra[0]} of shape {shape} is in the checkpoint, but the model has none of that name"
        )


def _check_widths(embed_dim: int, num_heads: int, decoder_embed_dim: int, decoder_num_heads: int) -> None:
    for what, width, heads in (
        ("embed_dim", embed_dim, num_heads),
        ("decoder_embed_dim", decoder_embed_dim, decoder_num_heads),
    ):
        if width % heads:
            raise ValueError(f"{what} {width} is not a multiple of its {heads} attention heads")


def _check_scale_weights(weights: Sequence[float]) -> tuple[float, ...]:
    if len(weights) != len(HEAD_SCALES):
        raise ValueError(f"scale_weights has {len(weights)} numbers, expected {len(HEAD_SCALES)}, one per head")
    return tuple(float(weight) for weight in weights)


def _draw_hog_bias(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-_HOG_BIAS_STEPS, _HOG_BIAS_STEPS + 1, (2,), generator=generator)
    return steps * _HOG_BIAS_UNIT
