"""What the encoder makes of whole images: one vector per image, after the last block or after any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitfreeze.config import Colours, FinetuneConfig, check_argument
from vitfreeze.data import Batch, normalize
from vitfreeze.data.normalization import IMAGENET
from vitfreeze.model import LocalMIM
from vitfreeze.ranks import Ranks


class Features(NamedTuple):
    """Features of some images, on the CPU.

    Attributes:
        features: (N, D) float32.
        labels: (N,) int64.
    """

    features: Tensor
    labels: Tensor


def extract_features(
    model: LocalMIM,
    batches: Iterable[Batch],
    *,
    block: int | None = None,
    global_pool: str = FinetuneConfig.global_pool,
    limit: int | None = None,
    colours: Colours = IMAGENET,
) -> Features:
    """Return the features of every image after one block, the last by default.

    Arguments and errors are those of `extract_block_features`.
    """
    chosen = model.depth if block is None else block
    return extract_block_features(
        model, batches, blocks=(chosen,), global_pool=global_pool, limit=limit, colours=colours
    )[chosen]  # fmt: skip


@torch.no_grad()
def extract_block_features(
    model: LocalMIM,
    batches: Iterable[Batch],
    *,
    blocks: Sequence[int],
    global_pool: str = FinetuneConfig.global_pool,
    limit: int | None = None,
    colours: Colours = IMAGENET,
) -> dict[int, Features]:
    """Return the features of every image after each of the given blocks, in one pass over the images.

    A feature is the encoder's final norm of a block's tokens, averaged over the patches. The patches are what LocalMIM
    trains and what fine-tuning averages; its class token serves them as one more key and is asked for nothing, so it
    is worth less ("token" shows how much).

    Args:
        model: the encoder, on the device where it shall run; its weights are not touched.
        batches: uint8 images with labels, as `EvalLoader` yields them; they are normalised on the device.
        blocks: 1-based numbers of blocks, in rising order.
        global_pool: "avg", the mean of the patches, or "token", the class token (timm's words).
        limit: stop after this many images.
        colours: what images are normalised by.

    Returns:
        By block, the features of the images in their order. Under several ranks, those of this rank's images.

    Raises:
        ValueError: another pooling, a block that does not exist, images without labels, or no images.
    """
    check_argument("finetune.global_pool", global_pool)
    encoder = _Encoder(model, blocks=blocks, global_pool=global_pool)
    weights = encoder.converted_weights()
    device = model.cls_token.device
    rows: dict[int, list[Tensor]] = {block: [] for block in blocks}
    labels: list[Tensor] = []
    seen = 0
    for batch in batches:
        wanted = len(batch.images) if limit is None else min(len(batch.images), limit - seen)
        images = normalize(batch.images[:wanted].to(device, non_blocking=True), colours=colours)
        for block, pooled in zip(blocks, functional_call(encoder, weights, (images,)), strict=True):
            rows[block].append(pooled.float().cpu())
        labels.append(_check_labels(batch, wanted))
        seen += wanted
        if seen == limit:
            break
    if not seen:
        raise ValueError("there is no image to take features of: the shards, or this rank's share of them, are empty")
    return {block: Features(torch.cat(rows[block]), torch.cat(labels)) for block in blocks}


def gather_features(features: Features, ranks: Ranks) -> Features:
    """Return the features of all ranks in the order of the ranks, on every rank."""
    return Features(*(torch.cat(ranks.gather_rows(tensor)) for tensor in features))


def _check_labels(batch: Batch, count: int) -> Tensor:
    labels = batch.labels[:count]
    if bool((labels < 0).any()):
        key = batch.keys[int((labels < 0).nonzero()[0])]
        raise ValueError(f"sample {key} has no label; evaluation needs shards whose samples have a .cls member each")
    return labels


class _Encoder(nn.Module):
    """Pooled features of chosen blocks as one module, so that it can be called with weights in another precision."""

    def __init__(self, model: LocalMIM, *, blocks: Sequence[int], global_pool: str) -> None:
        super().__init__()
        self.model = model
        self.chosen = tuple(blocks)
        self.global_pool = global_pool

    def converted_weights(self) -> dict[str, Tensor]:
        """Return, on a CPU, weights in half precision as float32, because half is slow there; the model keeps its own.

        On a GPU each layer computes in the precision of its weights.
        """
        if self.model.cls_token.device.type != "cpu":
            return {}
        return {name: x.detach().float() for name, x in self.named_parameters() if x.dtype != torch.float32}

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (B, 3, H, W) to one (B, D) tensor per chosen block."""
        tokens = self.model.encode(images, blocks=self.chosen, norm=True)
        if self.global_pool == "token":
            return [tokens_BND[:, 0] for tokens_BND in tokens]
        return [tokens_BND[:, 1:].mean(dim=1) for tokens_BND in tokens]
