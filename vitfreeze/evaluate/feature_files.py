"""Features of images as a file, for whatever comes next: class token, mean of the patches, grid of the patches."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from vitfreeze.config import Config
from vitfreeze.data import normalize, open_split
from vitfreeze.data.addresses import is_remote
from vitfreeze.data.decoding import IMAGE_SUFFIXES
from vitfreeze.engine import join_ranks
from vitfreeze.evaluate.visual import read_images
from vitfreeze.files import replacing, suggest_path
from vitfreeze.model import LocalMIM
from vitfreeze.pretrained import build_encoder, read_pretrained
from vitfreeze.ranks import Ranks

logger = logging.getLogger("vitfreeze")
KINDS = ("token", "mean", "grid")
FILE_BATCH = 32
Part = tuple[list[str], Tensor, Tensor]  # keys, (B, 3, H, W) uint8 images, (B,) int64 labels, -1 where there is none


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
    """Write the features of every image, in the order of the images; return `out`.

    The file holds for each block n and each kind `n.token` (N, D), `n.mean` (N, D) and `n.grid` (N, rows, columns, D),
    float32 after the encoder's final norm; `labels` (N,), -1 where there is none; and `keys`, which a .safetensors
    file has as JSON in its metadata. All of it is held in memory once, so ask for grids of what fits.

    Args:
        location: what `read_pretrained` takes.
        sources: image files, a folder of images (nested or flat), or shards.
        out: a .npz or .safetensors file.
        kinds: some of token, mean, grid.
        blocks: 1-based blocks; the last by default.
        workers: decoding processes, for shards.
        allow_pipe: whether shards may be shell commands.

    Raises:
        ValueError: weights, images or a name that cannot be used.
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
        data = replace(config.data, train=tuple(sources), workers=workers, allow_pipe=allow_pipe)
        size = replace(config.model, img_size=model.img_size)
        parts = _read_shards(replace(config, data=data, model=size), ranks=ranks)
    keys, labels, rows = [], [torch.empty(0, dtype=torch.int64)], dict[str, list[Tensor]]()
    for names, images, numbers in parts:
        found = compute_features(
            model, normalize(images.to(ranks.device), colours=pretrained.colours), blocks=chosen, kinds=kinds
        )
        for name, tensor in found.items():
            rows.setdefault(name, []).append(tensor)
        keys += names
        labels.append(numbers)
    mine = {name: torch.cat(tensors) for name, tensors in rows.items()} | {"labels": torch.cat(labels)}
    whole = _gather(mine, ranks=ranks)
    all_keys = [key for names in ranks.gather(keys) for key in names]
    if ranks.rank == 0:
        _save(whole, out, keys=all_keys, origin=pretrained.origin)
        logger.info("%d images; %s", len(all_keys), ", ".join(f"{name} {tuple(x.shape)}" for name, x in whole.items()))
    return out


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


def find_image_files(sources: Sequence[str]) -> list[Path]:
    """Return the image files that are named, and those in folders without shards, sorted; [] if these are shards.

    Raises:
        ValueError: an image is not there, files and shards are mixed, or a folder holds neither.
    """
    files: list[Path] = []
    are_files = []
    for source in sources:
        path = Path(source).expanduser()
        if path.suffix.lower() in IMAGE_SUFFIXES:
            found = [path]
            if not path.is_file():
                raise ValueError(f"there is no image {source!r}{suggest_path(path)}")
        elif path.is_dir() and not (any(path.glob("*.tar")) or (path / "_info.json").is_file()):
            found = sorted(item for item in path.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise ValueError(f"{source} holds neither images ({', '.join(sorted(IMAGE_SUFFIXES))}) nor shards")
        elif "{" not in source and not is_remote(source) and not path.exists():
            raise ValueError(f"there is no image, folder or shard {source!r}{suggest_path(path)}")
        else:
            found = []
        are_files.append(bool(found))
        files += found
    if any(are_files) and not all(are_files):
        raise ValueError(f"images and shards are mixed in {', '.join(sources)}: give one kind")
    return files


def _read_files(files: Sequence[Path], *, img_size: int, ranks: Ranks) -> Iterator[Part]:
    first, last = (len(files) * number // ranks.world_size for number in (ranks.rank, ranks.rank + 1))
    for start in range(first, last, FILE_BATCH):
        paths = files[start : min(start + FILE_BATCH, last)]
        yield [str(path) for path in paths], read_images(paths, img_size=img_size), torch.full((len(paths),), -1)


def _read_shards(config: Config, *, ranks: Ranks) -> Iterator[Part]:
    for batch in open_split(config, "train", rank=ranks.rank, world_size=ranks.world_size):
        yield list(batch.keys), batch.images, batch.labels


def _gather(mine: Mapping[str, Tensor], *, ranks: Ranks) -> dict[str, Tensor]:
    if min(ranks.gather(len(mine["labels"]))) < 1:
        raise ValueError(f"there are fewer images than the {ranks.world_size} ranks")
    return {name: torch.cat(ranks.gather_rows(tensor)) for name, tensor in mine.items()}


def _save(tensors: Mapping[str, Tensor], out: Path, *, keys: Sequence[str], origin: str) -> None:
    with replacing(out) as partial:
        if out.suffix == ".safetensors":
            save_file(dict(tensors), partial, metadata={"keys": json.dumps(keys), "origin": origin})
            return
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
        with partial.open("wb") as file:
            np.savez(file, keys=np.array(keys), origin=np.array(origin), **arrays)
