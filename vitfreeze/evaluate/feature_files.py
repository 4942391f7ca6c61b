"""Features of images as a file, for whatever comes next: class token, mean of the patches, grid of the patches."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vitfreeze.config import Colours, Config
from vitfreeze.data import normalize, open_split
from vitfreeze.engine import join_ranks
from vitfreeze.evaluate.image_files import find_image_files, name_first, read_readable
from vitfreeze.files import replacing
from vitfreeze.model import LocalMIM
from vitfreeze.pretrained import build_encoder, read_pretrained
from vitfreeze.ranks import Ranks

logger = logging.getLogger("vitfreeze")
KINDS = ("token", "mean", "grid")
FILE_BATCH = 32


class Part(NamedTuple):
    """Some images, and those beside them that cannot be read.

    Attributes:
        keys: of the images.
        images: (B, 3, H, W) uint8.
        labels: (B,) int64, -1 where there is none.
        left_out: the names of the others, each with the reason.
    """

    keys: list[str]
    images: Tensor
    labels: Tensor
    left_out: list[str]


def write_features(
    location: str,
    sources: Sequence[str],
    *,
    out: Path,
    kinds: Sequence[str] = ("token", "mean"),
    blocks: Sequence[int] = (),
    workers: int = 0,
    allow_pipe: bool = False,
) -> Path:
    """Write the features of every image that can be read, in the order of the images; return `out`.

    The file holds for each block n and each kind `n.token` (N, D), `n.mean` (N, D) and `n.grid` (N, rows, columns, D),
    float32 after the encoder's final norm; `labels` (N,), -1 where there is none; and `keys`, which a .safetensors
    file has as JSON in its metadata. An image that cannot be read is told, and has no row. All of it is held in memory
    once, so ask for grids of what fits.

    Args:
        location: what `read_pretrained` takes.
        sources: image files, a folder of images (nested or flat), or shards.
        out: a .npz or .safetensors file.
        kinds: some of token, mean, grid.
        blocks: 1-based blocks; the last by default.
        workers: decoding processes, for shards.
        allow_pipe: whether shards may be shell commands.

    Raises:
        ValueError: weights, shards or a name that cannot be used, or no image that can be read.
    """
    if out.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"--out is {str(out)!r}, expected a name that ends in .npz or .safetensors")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {str(out)!r}, but there is no folder {out.absolute().parent}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"--what is {', '.join(kinds)!r}, expected some of {', '.join(KINDS)}")
    files, ranks = find_image_files(sources), join_ranks()
    pretrained = read_pretrained(location)
    model = build_encoder(pretrained).to(ranks.device)
    chosen = tuple(sorted(set(blocks))) or (model.depth,)
    if files:
        parts = _read_files(files, img_size=model.img_size, ranks=ranks)
    else:
        config = Config()
        data = replace(config.data, train=tuple(sources), workers=workers, allow_pipe=allow_pipe, max_bad_fraction=1.0)
        size = replace(config.model, img_size=model.img_size)
        parts = _read_shards(replace(config, data=data, model=size), ranks=ranks)
    mine, keys, left_out = _compute_parts(model, parts, colours=pretrained.colours, blocks=chosen, kinds=kinds)
    all_keys = [key for names in ranks.gather(keys) for key in names]
    _tell_left_out(left_out, num_read=len(all_keys), ranks=ranks)
    whole = {name: torch.cat(ranks.gather_rows(tensor)) for name, tensor in mine.items()}
    if ranks.rank == 0:
        _save(whole, out, keys=all_keys, origin=pretrained.origin)
        logger.info("%d images; %s", len(all_keys), ", ".join(f"{name} {tuple(x.shape)}" for name, x in whole.items()))
    return out


def _compute_parts(
    model: LocalMIM, parts: Iterable[Part], *, colours: Colours, blocks: Sequence[int], kinds: Sequence[str]
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Return features and labels by name, the images' keys, and what was left out; the names are there without images.

    A rank may have no readable image, and has to know the shapes of the others' features.
    """
    keys, left_out, labels, rows = (
        list[str](),
        list[str](),
        [torch.empty(0, dtype=torch.int64)],
        dict[str, list[Tensor]](),
    )

    def compute(images: Tensor) -> Mapping[str, Tensor]:
        inputs = normalize(images.to(model.cls_token.device), colours=colours)
        return compute_features(model, inputs, blocks=blocks, kinds=kinds)

    for part in parts:
        keys += part.keys
        left_out += part.left_out
        labels.append(part.labels)
        if part.keys:
            for name, tensor in compute(part.images).items():
                rows.setdefault(name, []).append(tensor)
    if not rows:
        black = torch.zeros(1, 3, model.img_size, model.img_size, dtype=torch.uint8)
        rows = {name: [tensor[:0]] for name, tensor in compute(black).items()}
    features = {name: torch.cat(tensors) for name, tensors in rows.items()}
    return {**features, "labels": torch.cat(labels)}, keys, left_out


@torch.no_grad()
def compute_features(
    model: LocalMIM, inputs: Tensor, *, blocks: Sequence[int], kinds: Sequence[str]
) -> dict[str, Tensor]:
    """Return the features of (B, 3, H, W) normalised images by name, as `write_features` names them, on the CPU."""
    found = dict[str, Tensor]()
    for block, tokens_BND in zip(blocks, model.encode(inputs, blocks=blocks, norm=True), strict=True):
        patches_BLD = tokens_BND[:, 1:]
        side = round(patches_BLD.shape[1] ** 0.5)
        views = {
            "token": tokens_BND[:, 0],
            "mean": patches_BLD.mean(dim=1),
            "grid": patches_BLD.unflatten(1, (side, side)),
        }
        found |= {f"{block}.{kind}": views[kind].float().cpu() for kind in kinds}
    return found


def _read_files(files: Sequence[Path], *, img_size: int, ranks: Ranks) -> Iterator[Part]:
    first, last = (len(files) * number // ranks.world_size for number in (ranks.rank, ranks.rank + 1))
    for start in range(first, last, FILE_BATCH):
        images, names, left_out = read_readable(files[start : min(start + FILE_BATCH, last)], img_size=img_size)
        pixels = torch.cat(images) if images else torch.empty(0, 3, img_size, img_size, dtype=torch.uint8)
        yield Part(names, pixels, torch.full((len(names),), -1), left_out)


def _read_shards(config: Config, *, ranks: Ranks) -> Iterator[Part]:
    loader = open_split(config, "train", rank=ranks.rank, world_size=ranks.world_size)
    for batch in loader:
        yield Part(list(batch.keys), batch.images, batch.labels, [])
    loader.tell_unusable(ranks)


def _tell_left_out(mine: Sequence[str], *, num_read: int, ranks: Ranks) -> None:
    """Say which files of all ranks cannot be read; raises ValueError if no image can."""
    left_out = [reason for reasons in ranks.gather(mine) for reason in reasons]
    if not num_read:
        reasons = f": none of the {len(left_out)} can be read ({name_first(left_out)})" if left_out else ""
        raise ValueError(f"there is no image to take features of{reasons}")
    if left_out and ranks.rank == 0:
        count = len(left_out)
        logger.warning("%d of %d images cannot be read: %s", count, count + num_read, name_first(left_out))


def _save(tensors: Mapping[str, Tensor], out: Path, *, keys: Sequence[str], origin: str) -> None:
    with replacing(out) as partial:
        if out.suffix == ".safetensors":
            save_file(dict(tensors), partial, metadata={"keys": json.dumps(keys), "origin": origin})
            return
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        with partial.open("wb") as file:
            np.savez(file, keys=np.array(keys), origin=np.array(origin), **arrays)
