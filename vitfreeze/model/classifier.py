"""The encoder as a classifier, for fine-tuning: timm's Vision Transformer, whose first layers may be frozen.

Its parameter names are timm's, so what it learns loads into `timm.create_model(..., global_pool="avg")`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vitfreeze.architecture import FreezeUnit, ModelSize, classifier_units
from vitfreeze.model.compiled import compile_each
from vitfreeze.model.local_mim import LAYER_NORM_EPS, check_state, sincos_positions

# MAE's and LocalMIM's fine-tuning begin with a classifier that says next to nothing.
_HEAD_STD = 2e-5
_AVERAGE = "average."
_EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed")
_BEHIND_BLOCKS = ("norm", "fc_norm", "head")


class ClassifierOutput(NamedTuple):
    """What a forward pass returns.

    Attributes:
        loss: scalar, float32; cross entropy with the targets.
        logits: (B, num_classes) float32.
    """

    loss: Tensor
    logits: Tensor


class Classifier(VisionTransformer):
    """timm's Vision Transformer with the freezing of `LocalMIM`.

    Args:
        size: dimensions of the encoder.
        img_size: side of the square images in pixels. Others, of whole patches, are taken too: the positions are then
            resampled to the same places of the image, as timm does, and learn through that.
        num_classes: classes.
        global_pool: avg: the mean of the patches, then a fresh norm `fc_norm`; token: `norm`, then the class token.
        drop_path: probability of skipping a branch in the last block; it rises linearly from 0 in the first.
        activation_checkpointing: recompute the active blocks in the backward pass.
        average_decay: keep an average of the weights that forgets at this rate per step; 0: none.
    """

    def __init__(
        self,
        *,
        size: ModelSize,
        img_size: int,
        num_classes: int,
        global_pool: str = "avg",
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        average_decay: float = 0.0,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=size.patch_size,
            embed_dim=size.embed_dim,
            depth=size.depth,
            num_heads=size.num_heads,
            mlp_ratio=size.mlp_ratio,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=LAYER_NORM_EPS),
            dynamic_img_size=True,
        )
        self.depth = size.depth
        self.units = classifier_units(size.depth)
        self._layer_units = {unit.layer: unit for unit in self.units if unit.layer is not None}
        self.activation_checkpointing = activation_checkpointing
        with torch.no_grad():
            self.pos_embed.copy_(sincos_positions(img_size // size.patch_size, size.embed_dim))
        nn.init.trunc_normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.average_decay = average_decay
        self.average = WeightAverage(self) if average_decay else None

    def forward(self, images: Tensor, *, targets: Tensor | None = None, frozen_layers: int = 0) -> ClassifierOutput:
        """Classify images.

        Args:
            images: (B, 3, S, S), normalised; S is img_size or another whole number of patches.
            targets: (B, num_classes) probabilities, or (B,) class indices; without them the loss is 0.
            frozen_layers: length of the frozen prefix, 0 to depth; it runs without a graph.

        Raises:
            ValueError: `frozen_layers` out of range.
        """
        if not 0 <= frozen_layers <= self.depth:
            raise ValueError(f"frozen_layers is {frozen_layers}, expected 0 to depth {self.depth}")
        graph = torch.is_grad_enabled()
        with torch.set_grad_enabled(graph and self._layer_units[0].trains(frozen_layers)):
            tokens_BND = self._pos_embed(self.patch_embed(images.to(self.cls_token.dtype)))
        for number, block in enumerate(self.blocks, start=1):
            tokens_BND = tokens_BND.to(cast(Block, block).norm1.weight.dtype)
            with torch.set_grad_enabled(graph and self._layer_units[number].trains(frozen_layers)):
                if self.activation_checkpointing and torch.is_grad_enabled():
                    tokens_BND = checkpoint(block, tokens_BND, use_reentrant=False)
                else:
                    tokens_BND = block(tokens_BND)
        logits_BC = self.forward_head(self.norm(tokens_BND)).float()
        loss = logits_BC.new_zeros(()) if targets is None else F.cross_entropy(logits_BC, targets)
        return ClassifierOutput(loss, logits_BC)

    def freeze_units(self) -> dict[FreezeUnit, tuple[str, ...]]:
        """Return the freeze units, first to freeze first, with the prefixes of the parameters that each owns.

        The class token, the positions and the patch embedding freeze as layer 0; what is behind the blocks trains to
        the end.
        """
        behind = tuple(
            name for name, module in self.named_children() if name in _BEHIND_BLOCKS and [*module.parameters()]
        )
        return {
            unit: behind if unit.layer is None else (f"blocks.{unit.layer - 1}",) if unit.layer else _EMBEDDINGS
            for unit in self.units
        }

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that have no weight decay beside biases and 1-d ones (MAE, LocalMIM)."""
        return {"cls_token", "pos_embed"}

    def load_encoder(self, weights: Mapping[str, Tensor]) -> None:
        """Load an encoder by timm's names; its final norm, trained for tokens, only where tokens are normed.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape.
        """
        fresh = ("head.", "fc_norm.", "norm.", _AVERAGE)
        expected = {name: tuple(x.shape) for name, x in self.state_dict().items() if not name.startswith(fresh)}
        norm = {name: x for name, x in weights.items() if name.startswith("norm.")}
        encoder = {name: x for name, x in weights.items() if name not in norm}
        check_state(encoder, expected)
        usable = encoder | (norm if isinstance(self.norm, nn.LayerNorm) else {})
        super().load_state_dict(usable, strict=False)
        if self.average is not None:
            self.average.restart(self)

    def update_average(self) -> None:
        """Move the average of the weights towards them; nothing without one."""
        if self.average is not None:
            self.average.update(self, decay=self.average_decay)

    def predict_with_average(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) that the averaged weights give.

        Raises:
            ValueError: there is no average.
        """
        if self.average is None:
            raise ValueError("there is no average of the weights: average_decay is 0")
        output = functional_call(self, self.average.weights(self), (images,))
        return cast(ClassifierOutput, output).logits

    def compile_parts(self, **options: Any) -> None:
        """Compile every block by itself, see `compile_each`; options are those of `torch.compile`."""
        compile_each(self.blocks, **options)


class WeightAverage(nn.Module):
    """Exponential moving average of a model's parameters, in float32.

    The values are buffers, so they lie in every checkpoint, come back on any number of ranks, and keep their precision
    when the engine converts the parameters to half. Source: Polyak averaging as in timm's ModelEmaV3, whose state
    would live outside the model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, parameter in model.named_parameters():
            self.register_buffer(self._key(name), parameter.detach().float().clone())

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")  # a buffer's name may hold no dot

    def _values(self, names: Collection[str]) -> list[Tensor]:
        buffers = dict(self.named_buffers())
        return [buffers[self._key(name)] for name in names]

    @torch.no_grad()
    def update(self, model: nn.Module, *, decay: float) -> None:
        """Let every value be decay times itself plus the rest of the parameter."""
        parameters = _own_parameters(model)
        current = [parameter.detach().float() for parameter in parameters.values()]
        torch._foreach_lerp_(self._values(parameters), current, 1 - decay)

    @torch.no_grad()
    def restart(self, model: nn.Module) -> None:
        """Forget everything but the parameters as they are."""
        parameters = _own_parameters(model)
        torch._foreach_copy_(self._values(parameters), [parameter.detach() for parameter in parameters.values()])

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the averages by the names, and in the precision, of the parameters."""
        parameters = _own_parameters(model)
        values = self._values(parameters)
        return {name: x.to(parameters[name].dtype) for name, x in zip(parameters, values, strict=True)}


def _own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def averaged_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a classifier's state dict with the averages, where it has them, in place of the weights."""
    averages = {
        name.removeprefix(_AVERAGE).replace("/", "."): tensor
        for name, tensor in weights.items()
        if name.startswith(_AVERAGE)
    }
    return {name: x for name, x in weights.items() if not name.startswith(_AVERAGE)} | averages
