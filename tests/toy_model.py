"""A model of a few hundred parameters with LocalMIM's names, layers, taps and heads, for tests of the engine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vitfreeze.architecture import FreezeUnit, active_heads, localmim_units, tap_blocks


class ToyOutput(NamedTuple):
    loss: Tensor
    losses: tuple[Tensor, ...]


class ToyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.fc(self.norm1(x)))


class ToyHead(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pred = nn.Linear(width, 5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (self.pred(self.norm(x)).float() - target).square().mean()


class ToyEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)


class ToyModel(nn.Module):
    """Widths that divide by nothing, so that ZeRO has to pad and to cut parameters in two."""

    def __init__(self, *, width: int = 7, depth: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.depth = depth
        self.units = localmim_units(depth)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embed = ToyEmbed(width)
        self.blocks = nn.ModuleList(ToyBlock(width) for _ in range(depth))
        self.heads = nn.ModuleList(ToyHead(width) for _ in range(4))

    def freeze_units(self) -> dict[FreezeUnit, list[str]]:
        owned: dict[FreezeUnit, list[str]] = {}
        for unit in self.units:
            name = f"heads.{unit.head}" if unit.head is not None else f"blocks.{unit.leaves_with - 1}"
            owned[unit] = [name] if unit.leaves_with else ["cls_token", "patch_embed"]
        return owned

    def forward(self, images: Tensor, *, frozen_layers: int = 0) -> ToyOutput:
        """Take images of shape (B, width); targets are their first five values in other units."""
        target = torch.sin(3 * images[:, :5].float())
        losses, taps = [], tap_blocks(self.depth)
        for number in range(self.depth + 1):
            with torch.set_grad_enabled(number >= frozen_layers):
                if number == 0:
                    x = self.patch_embed.proj(images.to(self.cls_token.dtype)) + self.cls_token[0]
                else:
                    block = self.blocks[number - 1]
                    x = block(x.to(block.fc.weight.dtype))
            for head in active_heads(self.units, frozen_layers):
                if taps[head] == number:
                    losses.append(self.heads[head](x.to(self.heads[head].pred.weight.dtype), target))
        return ToyOutput(torch.stack(losses).sum(), tuple(losses))
