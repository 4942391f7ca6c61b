"""What the command line asks of weights: k-NN and linear probe, sharded over the ranks of the launch; pictures."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vitfreeze.config import Config, FinetuneConfig
from vitfreeze.data import open_split
from vitfreeze.engine import join_ranks
from vitfreeze.evaluate.features import Features, extract_block_features, gather_features
from vitfreeze.evaluate.knn import knn_over_ranks
from vitfreeze.evaluate.linear import LinearResult, LinearSettings, find_best, train_linear
from vitfreeze.evaluate.visual import draw_figure, make_panels, read_images, save_figure
from vitfreeze.pretrained import Pretrained, build_encoder, read_pretrained
from vitfreeze.ranks import Ranks

logger = logging.getLogger("vitfreeze")


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Which images to look at, and how; what is empty or None is the run's own.

    Attributes:
        train, val: labelled shards.
        blocks: 1-based blocks to judge; empty: the last.
        all_blocks: judge every block.
        global_pool: avg or token.
        limit: images per split and rank; None: all.
        workers: decoding processes.
        max_bad_fraction: share of the samples of a split that may fail to decode.
        allow_pipe: whether the user's command line allows shards that are shell commands; the run cannot.
    """

    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    all_blocks: bool = False
    global_pool: str = FinetuneConfig.global_pool
    limit: int | None = None
    workers: int | None = None
    max_bad_fraction: float | None = None
    allow_pipe: bool = False


def evaluate_knn(location: str, data: EvaluationData, *, k: Sequence[int] = (10, 20)) -> dict[int, dict[int, float]]:
    """Return, by block and number of neighbours, the top-1 accuracy from 0 to 1.

    Args:
        location: what `read_pretrained` takes.
        data: images and blocks.
        k: numbers of neighbours.

    Raises:
        ValueError: weights or shards that cannot be used.
    """
    if not k or min(k) < 1:
        raise ValueError(f"--k is {', '.join(map(str, k))}, expected numbers of at least 1")
    ranks = join_ranks()
    splits = _extract_splits(location, data, ranks=ranks, at_least=max(k))
    return {block: knn_over_ranks(train, test, k=k, ranks=ranks) for block, train, test in splits}


def evaluate_linear(
    location: str, data: EvaluationData, *, settings: LinearSettings | None = None
) -> dict[int, list[LinearResult]]:
    """Return, by block, what a linear classifier reached with every learning rate; arguments as `evaluate_knn`."""
    ranks = join_ranks()
    results = {}
    for block, train, test in _extract_splits(location, data, ranks=ranks):
        results[block] = train_linear(
            gather_features(train, ranks), gather_features(test, ranks), settings=settings, ranks=ranks
        )
        best = find_best(results[block])
        logger.info("block %d: %.2f %% top-1 with blr %g", block, 100 * best.top1, best.blr)
    return results


def show_images(location: str, paths: Sequence[Path], *, blocks: Sequence[int] = (), seed: int = 0, out: Path) -> Path:
    """Draw what a pre-trained model reconstructs of image files, and where its class token looks; return `out`.

    Args:
        location: a run or a LocalMIM .pth; other weights have no heads.
        paths: image files.
        blocks: 1-based blocks whose attention is shown; the last by default.
        seed: of the masks.
        out: a .png file.

    Raises:
        ValueError: weights without heads, files that are no images, another suffix.
    """
    if out.suffix != ".png":
        raise ValueError(f"--out is {str(out)!r}, expected a name that ends in .png")
    pretrained = read_pretrained(location)
    if not any(name.startswith("heads.0.decoder") for name in pretrained.weights):
        raise ValueError(f"{location} has no heads that predict HOG: give a pre-training run or LocalMIM's .pth")
    model = build_encoder(pretrained)
    frozen_layers = pretrained.checkpoint.frozen_layers if pretrained.checkpoint else 0
    images = read_images(paths, img_size=model.img_size)
    panels = make_panels(
        model, images, frozen_layers=frozen_layers, blocks=tuple(blocks), seed=seed,
        colours=pretrained.colours,
    )  # fmt: skip
    return save_figure(draw_figure(panels, title=pretrained.origin), out)


def _extract_splits(
    location: str, data: EvaluationData, *, ranks: Ranks, at_least: int = 1
) -> Iterator[tuple[int, Features, Features]]:
    """Yield every block with the features of this rank's training and validation images."""
    pretrained = read_pretrained(location)
    if not pretrained.is_finished:
        logger.warning("the run has not finished: these are its weights after %s", pretrained.origin)
    model = build_encoder(pretrained).to(ranks.device)
    blocks = tuple(range(1, model.depth + 1)) if data.all_blocks else data.blocks or (model.depth,)
    config = _choose_data(pretrained, data)
    found = []
    for split in ("train", "validation"):
        loader = open_split(config, split, rank=ranks.rank, world_size=ranks.world_size)
        if loader.num_samples < ranks.world_size:
            raise ValueError(f"{ranks.world_size} ranks have too little to do with {loader.num_samples} {split} images")
        voters = min(loader.num_samples, data.limit * ranks.world_size if data.limit else loader.num_samples)
        if split == "train" and voters < at_least:
            raise ValueError(f"--k is {at_least}, expected at most the {voters} training images that vote")
        logger.info("features of %d %s images of %s", loader.num_samples, split, pretrained.origin)
        found.append(
            extract_block_features(
                model,
                loader,
                blocks=tuple(sorted(set(blocks))),
                global_pool=data.global_pool,
                limit=data.limit,
                colours=pretrained.colours,
            )
        )
        loader.tell_unusable(ranks)
    train, test = found
    for block in train:
        yield block, train[block], test[block]


def _choose_data(pretrained: Pretrained, data: EvaluationData) -> Config:
    """Return the run's settings with the given shards in place of its own."""
    config = pretrained.config or Config()
    own = config.data
    chosen = replace(
        own,
        train=data.train or own.train_shards,
        val=data.val or own.val,
        workers=own.workers if data.workers is None else data.workers,
        max_bad_fraction=own.max_bad_fraction if data.max_bad_fraction is None else data.max_bad_fraction,
        allow_pipe=data.allow_pipe,
    )
    return replace(config, data=chosen, model=replace(config.model, img_size=pretrained.img_size))
