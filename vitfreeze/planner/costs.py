"""What one step costs when a prefix is frozen, in closed form: operations, parameters, bytes. No torch.

Operations are counted as torch's FlopCounterMode does: two for each multiply-add of a matrix product, nothing
for elementwise work. All figures are per image unless a name says otherwise. What is counted are this package's
LocalMIM, which embeds and encodes visible patches only and whose decoders compute in their last block only the tokens
that the loss reads; and its classifier for fine-tuning.

Letters in the formulas: V visible patches, L patches, D width of the encoder, W width of a decoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from vitfreeze.architecture import (
    HEAD_SCALES,
    FreezeUnit,
    ModelSize,
    active_heads,
    classifier_units,
    count_decoded,
    count_visible,
    localmim_units,
    tap_blocks,
)  # fmt: skip
from vitfreeze.config import Config
from vitfreeze.curriculum import ImageStage, plain_stage
from vitfreeze.extensions import count_outputs

# Fused attention keeps no scores: its backward pass computes them again, so five products stand against two.
ATTENTION_BACKWARD = 2.5
# Both directions of a 3 x 3 Sobel filter, magnitude, angle, bin and histogram: elementwise, per pixel and channel.
HOG_OPERATIONS_PER_PIXEL = 28
BYTES_OF_PRECISION = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, kw_only=True)
class Product:
    """Operations of matrix products in the forward pass: those with weights, and those of attention."""

    linear: float
    attention: float = 0.0

    def __add__(self, other: Product) -> Product:
        return Product(linear=self.linear + other.linear, attention=self.attention + other.attention)

    @property
    def forward(self) -> float:
        """Operations of the forward pass."""
        return self.linear + self.attention

    @property
    def backward(self) -> float:
        """Operations of the backward pass for the gradients of both weights and inputs."""
        return 2 * self.linear + ATTENTION_BACKWARD * self.attention

    @property
    def backward_to_input(self) -> float:
        """Operations of the backward pass through weights that need no gradient."""
        return self.linear + ATTENTION_BACKWARD * self.attention


def _linear(rows: int, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


def _block(tokens: int, width: int, mlp_ratio: float, *, queries: int | None = None) -> Product:
    """One transformer block on `tokens` tokens that computes the outputs of `queries` of them (default: all)."""
    queries = tokens if queries is None else queries
    hidden = int(width * mlp_ratio)
    linear = _linear(tokens, width, 2 * width) + 2 * _linear(queries, width, width)
    linear += 2 * _linear(queries, width, hidden)
    return Product(linear=linear, attention=4.0 * queries * tokens * width)


@dataclass(frozen=True, kw_only=True)
class UnitParameters:
    """Numbers of parameters of a freeze unit: those that weight decay acts on, and the others (norms and biases)."""

    decay: int
    no_decay: int

    def __add__(self, other: UnitParameters) -> UnitParameters:
        return UnitParameters(decay=self.decay + other.decay, no_decay=self.no_decay + other.no_decay)


def _block_parameters(width: int, mlp_ratio: float) -> UnitParameters:
    hidden = int(width * mlp_ratio)
    return UnitParameters(decay=4 * width * width + 2 * width * hidden, no_decay=9 * width + hidden)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Numbers that autograd keeps: those in the precision of the weights, and those in float32 (or as wide)."""

    numbers: float = 0.0
    float32: float = 0.0

    def __add__(self, other: Kept) -> Kept:
        return Kept(numbers=self.numbers + other.numbers, float32=self.float32 + other.float32)

    def __mul__(self, count: int) -> Kept:
        return Kept(numbers=self.numbers * count, float32=self.float32 * count)

    def bytes(self, precision: str) -> float:
        """Return the size in bytes."""
        return self.numbers * BYTES_OF_PRECISION[precision] + 4 * self.float32


def _block_kept(tokens: int, width: int, mlp_ratio: float, *, heads: int) -> Kept:
    """What a block keeps: two norms' inputs and outputs, q, k, v, attention's output, GELU's input and output."""
    return Kept(numbers=(8 + 2 * mlp_ratio) * tokens * width, float32=(4.0 + heads) * tokens)


@dataclass(frozen=True, kw_only=True)
class EncoderCosts(ABC):
    """Operations, parameters and bytes of an encoder and its heads as functions of the length of the frozen prefix."""

    size: ModelSize
    img_size: int
    activation_checkpointing: bool = False

    @property
    @abstractmethod
    def units(self) -> tuple[FreezeUnit, ...]:
        """The freeze units of the model, first to freeze first."""

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.img_size // self.size.patch_size) ** 2

    @property
    @abstractmethod
    def num_encoded(self) -> int:
        """Patches that the encoder sees."""

    @abstractmethod
    def head_products(self, frozen_layers: int) -> Sequence[Product]:
        """Return the products of everything behind the encoder that still trains."""

    @abstractmethod
    def heads_kept(self, frozen_layers: int) -> Kept:
        """Return what autograd keeps of everything behind the encoder."""

    @property
    @abstractmethod
    def unit_parameters(self) -> dict[str, UnitParameters]:
        """Number of parameters of every freeze unit, by its name."""

    # Operations ------------------------------------------------------------------------------------------------------

    def embedding(self) -> Product:
        """Products of the patch embedding, of encoded patches only."""
        return Product(linear=_linear(self.num_encoded, 3 * self.size.patch_size**2, self.size.embed_dim))

    def block(self) -> Product:
        """Products of one block of the encoder."""
        return _block(self.num_encoded + 1, self.size.embed_dim, self.size.mlp_ratio)

    def goes_through_prefix(self, frozen_layers: int) -> bool:
        """Say whether the backward pass runs through the frozen blocks, to what does not freeze below them."""
        return frozen_layers > 0 and any(unit.feeds_layers for unit in self.units)

    def heads_left(self, frozen_layers: int) -> tuple[int, ...]:
        """Return the indices of LocalMIM's heads that still train."""
        return active_heads(self.units, frozen_layers)

    def trains_embedding(self, frozen_layers: int) -> bool:
        """Say whether the patch embedding still trains."""
        name = "patch_embed" if "patch_embed" in self.unit_parameters else "layer_00"
        return next(unit for unit in self.units if unit.name == name).trains(frozen_layers)

    def frozen_blocks(self, frozen_layers: int) -> int:
        """Return the number of frozen blocks of the encoder."""
        return sum(unit.layer is not None and unit.layer > 0 and not unit.trains(frozen_layers) for unit in self.units)

    def forward_flops(self, frozen_layers: int) -> float:
        """Return the operations of the forward pass: the whole encoder, and the heads that are left."""
        heads = sum(head.forward for head in self.head_products(frozen_layers))
        return self.embedding().forward + self.size.depth * self.block().forward + heads

    def backward_flops(self, frozen_layers: int) -> float:
        """Return the operations of the backward pass, with those of recomputed activations."""
        frozen_blocks = self.frozen_blocks(frozen_layers)
        active_blocks = self.size.depth - frozen_blocks
        total = sum(head.backward for head in self.head_products(frozen_layers))
        total += active_blocks * self.block().backward
        if self.trains_embedding(frozen_layers):
            total += self.embedding().linear  # gradients of the weights; pixels need none
        if self.goes_through_prefix(frozen_layers):
            total += frozen_blocks * self.block().backward_to_input
        if self.activation_checkpointing:
            total += active_blocks * (self.block().forward - self._last_product_of_block())
        return total

    def _last_product_of_block(self) -> float:
        """Operations of a block's last product, whose output nothing in the block keeps: recomputing stops before."""
        width = self.size.embed_dim
        return _linear(self.num_encoded + 1, int(width * self.size.mlp_ratio), width)

    def step_flops(self, frozen_layers: int) -> float:
        """Return the operations of forward and backward pass together."""
        return self.forward_flops(frozen_layers) + self.backward_flops(frozen_layers)

    # Activations kept for the backward pass ---------------------------------------------------------------------------

    def activation_bytes(self, frozen_layers: int, *, precision: str) -> float:
        """Return the bytes that autograd keeps per image: inputs of products, norms, nonlinearities and losses.

        With activation checkpointing it is the inputs of the active blocks and all of one block. Temporary
        buffers, such as those of the HOG targets, are not counted.
        """
        kept = self._embedding_kept(frozen_layers) + self._encoder_kept(frozen_layers) + self.heads_kept(frozen_layers)
        return kept.bytes(precision)

    def _embedding_kept(self, frozen_layers: int) -> Kept:
        return Kept(numbers=self.trains_embedding(frozen_layers) * self.num_encoded * 3.0 * self.size.patch_size**2)

    def _encoder_kept(self, frozen_layers: int) -> Kept:
        size, tokens = self.size, self.num_encoded + 1
        block = _block_kept(tokens, size.embed_dim, size.mlp_ratio, heads=size.num_heads)
        frozen_blocks = self.frozen_blocks(frozen_layers)
        active_blocks = size.depth - frozen_blocks
        if self.activation_checkpointing:
            kept = Kept(numbers=active_blocks * tokens * size.embed_dim) + block
        else:
            kept = block * active_blocks
        if self.goes_through_prefix(frozen_layers):
            # No gradients of weights, so no inputs of products: qkv, proj (held by attention), fc1, fc2.
            inputs = (2 + size.mlp_ratio) * tokens * size.embed_dim
            kept += (block + Kept(numbers=-inputs)) * frozen_blocks
        return kept

    # Parameters ------------------------------------------------------------------------------------------------------

    def block_parameters(self) -> dict[str, UnitParameters]:
        """Return the parameters of the blocks, by their units' names."""
        block = _block_parameters(self.size.embed_dim, self.size.mlp_ratio)
        return {unit.name: block for unit in self.units if unit.layer}

    def trained_groups(self, frozen_layers: int) -> list[int]:
        """Return the number of parameters of every optimizer group that still trains."""
        trained = [self.unit_parameters[unit.name] for unit in self.units if unit.trains(frozen_layers)]
        return [count for parameters in trained for count in (parameters.decay, parameters.no_decay) if count]

    def trainable_parameters(self, frozen_layers: int) -> int:
        """Return the number of parameters that still train."""
        return sum(self.trained_groups(frozen_layers))

    @property
    def parameters(self) -> int:
        """Number of all parameters, heads included."""
        return self.trainable_parameters(0)

    def weight_bytes(self, precision: str) -> int:
        """Return the bytes of the weights as the model computes with them, and of what it keeps beside them."""
        return self.parameters * BYTES_OF_PRECISION[precision]


@dataclass(frozen=True, kw_only=True)
class ModelCosts(EncoderCosts):
    """The costs of LocalMIM.

    A target that is not HOG has `target_outputs` numbers of a cell. `freeze_cls_token` and `freeze_patch_embed` say
    whether these freeze with layer 0; if one does not, the backward pass runs through the whole prefix to reach it.
    """

    mask_ratio: float
    hog_nbins: int
    target_outputs: int | None = None
    decoded_share: float = 1.0
    freeze_cls_token: bool = True
    freeze_patch_embed: bool = True

    @classmethod
    def from_config(cls, config: Config, images: ImageStage | None = None) -> ModelCosts:
        """Build the costs of the model of a run, in a stage of its curriculum or, by default, without one."""
        model, images = config.model, images or plain_stage(config)
        return cls(
            size=model.resolve(), img_size=images.img_size, mask_ratio=images.mask_ratio, hog_nbins=model.hog_nbins,
            decoded_share=images.decoded_share, target_outputs=count_outputs(model.target),
            freeze_cls_token=config.freeze.cls_token, freeze_patch_embed=config.freeze.patch_embed,
            activation_checkpointing=model.activation_checkpointing,
        )  # fmt: skip

    @cached_property
    def units(self) -> tuple[FreezeUnit, ...]:
        """The freeze units of LocalMIM."""
        return localmim_units(self.size.depth, cls_token=self.freeze_cls_token, patch_embed=self.freeze_patch_embed)

    @property
    def num_outputs(self) -> int:
        """Numbers that a head predicts of a cell."""
        return 3 * self.hog_nbins if self.target_outputs is None else self.target_outputs

    @property
    def num_encoded(self) -> int:
        """Patches that stay visible."""
        return count_visible(self.num_patches, self.mask_ratio)

    @property
    def num_decoded(self) -> int:
        """Masked patches that the heads reconstruct."""
        return count_decoded(self.num_patches - self.num_encoded, self.decoded_share)

    @property
    def hog_operations(self) -> float:
        """Elementwise operations of the HOG targets, which are no part of the counted ones."""
        return HOG_OPERATIONS_PER_PIXEL * 3.0 * self.img_size**2

    def head(self, head: int) -> Product:
        """Products of one head: embedding, decoder blocks, prediction."""
        size, scale, outputs, masked = self.size, HEAD_SCALES[head], self.num_outputs, self.num_decoded
        width, tokens = size.decoder_embed_dim, 1 + self.num_encoded + masked
        total = Product(linear=_linear(self.num_encoded + 1, size.embed_dim, width))
        for _ in range(size.decoder_depth - 1):
            total += _block(tokens, width, size.mlp_ratio)
        read = masked if scale >= 1 else tokens - 1
        total += _block(tokens, width, size.mlp_ratio, queries=read)
        return total + Product(linear=self._prediction(scale, masked=masked, width=width, outputs=outputs))

    def _prediction(self, scale: float, *, masked: int, width: int, outputs: int) -> float:
        if scale == 4:
            return _linear(masked, width, 4 * (width // 2)) + _linear(4 * masked, width // 2, 4 * outputs)
        if scale == 2:
            return _linear(masked, width, 4 * outputs)
        return _linear(masked if scale == 1 else self.num_patches // 4, width, outputs)

    def head_products(self, frozen_layers: int) -> Sequence[Product]:
        """Return the products of the heads that still train."""
        return [self.head(head) for head in self.heads_left(frozen_layers)]

    def heads_kept(self, frozen_layers: int) -> Kept:
        """Return what autograd keeps of the heads that still train."""
        return sum((self._head_kept(head) for head in self.heads_left(frozen_layers)), Kept())

    def _head_kept(self, head: int) -> Kept:
        size, scale, outputs = self.size, HEAD_SCALES[head], self.num_outputs
        visible, width = self.num_encoded + 1, size.decoder_embed_dim
        tokens = visible + self.num_decoded
        read = self.num_decoded if scale >= 1 else tokens - 1
        # The tap itself is the input of the next block, which keeps it already; the last block has no next.
        taps = 2 if tap_blocks(size.depth)[head] == size.depth else 1
        kept = Kept(numbers=taps * visible * size.embed_dim, float32=2.0 * visible)
        full = _block_kept(tokens, width, size.mlp_ratio, heads=size.decoder_num_heads)
        kept += full * (size.decoder_depth - 1)
        kept += Kept(
            numbers=(4 * tokens + (5 + 2 * size.mlp_ratio) * read) * width,
            float32=2 * tokens + (2 + size.decoder_num_heads) * read,
        )
        kept += Kept(numbers=read * width, float32=2.0 * read)  # the decoder's norm
        return kept + self._prediction_kept(scale, read=read, width=width, outputs=outputs)

    def _prediction_kept(self, scale: float, *, read: int, width: int, outputs: int) -> Kept:
        if scale < 1:  # the gathered tokens with their index, the pooled ones, errors and weights
            cells = read // 4
            return Kept(numbers=(read + cells) * width, float32=2.0 * read + cells * (outputs + 1))
        cells = read * int(scale) ** 2
        kept = Kept(numbers=read * width, float32=2.0 * cells * outputs)
        if scale == 4:  # norm, GELU and the second product, each on 4 x read tokens of half the width
            kept += Kept(numbers=3 * 4 * read * (width // 2), float32=2 * 4 * read)
        return kept

    @cached_property
    def unit_parameters(self) -> dict[str, UnitParameters]:
        """Number of parameters of every freeze unit, by its name."""
        patches, width = 3 * self.size.patch_size**2, self.size.embed_dim
        embedding = {
            "patch_embed": UnitParameters(decay=patches * width, no_decay=width),
            "cls_token": UnitParameters(decay=width, no_decay=0),
        }
        units = self.block_parameters() | {
            f"head_{head}": self._head_parameters(scale) for head, scale in enumerate(HEAD_SCALES)
        }
        names = {unit.name for unit in self.units}
        for name, parameters in embedding.items():
            owner = name if name in names else "layer_00"
            units[owner] = units[owner] + parameters if owner in units else parameters
        return units

    def _head_parameters(self, scale: float) -> UnitParameters:
        size, outputs = self.size, self.num_outputs
        width, half, quarter = size.decoder_embed_dim, size.decoder_embed_dim // 2, size.decoder_embed_dim // 4
        block = _block_parameters(width, size.mlp_ratio)
        decay = size.embed_dim * width + width + size.decoder_depth * block.decay  # with the mask token
        no_decay = 2 * size.embed_dim + width + size.decoder_depth * block.no_decay + 2 * width
        if scale == 4:
            decay += 4 * width * half + 4 * half * quarter + quarter * outputs
            no_decay += half + 2 * half + quarter + outputs
        elif scale == 2:
            decay += 4 * width * half + half * outputs
            no_decay += half + outputs
        else:
            decay += width * outputs
            no_decay += outputs
        return UnitParameters(decay=decay, no_decay=no_decay)


@dataclass(frozen=True, kw_only=True)
class ClassifierCosts(EncoderCosts):
    """The costs of fine-tuning: no patch is hidden, the positions train, and behind the encoder is one linear layer."""

    num_classes: int
    num_positions: int | None = None  # of patches; None: as many as there are patches, as without a curriculum
    global_pool: str = "avg"
    keeps_average: bool = False  # of the weights, in float32

    @classmethod
    def from_config(cls, config: Config, images: ImageStage | None = None) -> ClassifierCosts:
        """Build the costs of the model of a run, in a stage of its curriculum or, by default, without one."""
        size, images = config.model.resolve(), images or plain_stage(config)
        return cls(
            size=size, img_size=images.img_size, num_classes=config.finetune.num_classes,
            num_positions=(config.model.img_size // size.patch_size) ** 2,
            global_pool=config.finetune.global_pool, keeps_average=config.finetune.model_ema_decay > 0,
            activation_checkpointing=config.model.activation_checkpointing,
        )  # fmt: skip

    @cached_property
    def units(self) -> tuple[FreezeUnit, ...]:
        """The freeze units of a classifier."""
        return classifier_units(self.size.depth)

    @property
    def num_encoded(self) -> int:
        """All patches."""
        return self.num_patches

    def head_products(self, frozen_layers: int) -> Sequence[Product]:
        """Return the product of the classifier."""
        return (Product(linear=_linear(1, self.size.embed_dim, self.num_classes)),)

    def heads_kept(self, frozen_layers: int) -> Kept:
        """Return what autograd keeps of norm, classifier and loss; the norm is that of one token or of all."""
        tokens = 1 if self.global_pool == "avg" else self.num_patches + 1
        return Kept(numbers=2.0 * tokens * self.size.embed_dim, float32=2.0 * tokens + 2.0 * self.num_classes)

    @cached_property
    def unit_parameters(self) -> dict[str, UnitParameters]:
        """Number of parameters of every freeze unit; class token and positions are not decayed (MAE)."""
        size, width = self.size, self.size.embed_dim
        positions = 1 + (self.num_patches if self.num_positions is None else self.num_positions)
        return self.block_parameters() | {
            "classifier": UnitParameters(decay=self.num_classes * width, no_decay=self.num_classes + 2 * width),
            "layer_00": UnitParameters(decay=3 * size.patch_size**2 * width, no_decay=(2 + positions) * width),
        }

    def weight_bytes(self, precision: str) -> int:
        """Return the bytes of the weights, and of their average if there is one."""
        return super().weight_bytes(precision) + (4 * self.parameters if self.keeps_average else 0)


def costs_of(config: Config, images: ImageStage | None = None) -> EncoderCosts:
    """Return the costs of the model that a run trains, LocalMIM or a classifier, in a stage of its curriculum."""
    if config.run.task == "finetune":
        return ClassifierCosts.from_config(config, images)
    return ModelCosts.from_config(config, images)
