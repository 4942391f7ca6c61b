"""From the settings of a run to its loaders."""

from __future__ import annotations

from vitfreeze.config import Config, derive_accumulation
from vitfreeze.data.addresses import is_remote
from vitfreeze.data.augmentation import Transform
from vitfreeze.data.errors import ShardError
from vitfreeze.data.loading import EvalLoader, ReadOptions, TrainLoader
from vitfreeze.data.shards import find_shards

EVAL_BATCH_SIZE = 64


def build_train_loader(
    config: Config,
    *,
    rank: int = 0,
    world_size: int = 1,
    transform: Transform | None = None,
    num_classes: int | None = None,
) -> TrainLoader:
    """Open the training shards on one rank.

    Args:
        config: the run.
        rank, world_size: which share of every batch is this process's.
        transform: makes the images instead of the random crop of the settings.
        num_classes: labels must exist and be smaller; None: labels are not looked at, and masks are drawn.

    Raises:
        ConfigError: a setting cannot be used.
        ShardError: the shards cannot be read.
    """
    if not config.data.train_shards:
        raise config.error("data.train", "a folder of shards, a brace pattern or URLs; make shards with data_prep")
    micro_batch, _ = derive_accumulation(config, world_size=world_size)
    data, model = config.data, config.model
    *others, shards = (names for _, names in data.train_stages)
    return TrainLoader(
        shards,
        other_sizes=others,
        img_size=model.img_size,
        num_patches=(model.img_size // model.resolve().patch_size) ** 2,
        global_batch=config.batch.global_size,
        micro_batch=micro_batch,
        rank=rank,
        world_size=world_size,
        seed=config.run.seed,
        crops_per_image=data.crops_per_image,
        crop_scale=data.crop_scale,
        transform=transform,
        options=_read_options(config, num_classes=num_classes),
    )


def open_split(
    config: Config, split: str, *, rank: int = 0, world_size: int = 1, num_classes: int | None = None
) -> EvalLoader:
    """Open the shards of one split, `train` or `validation`, for evaluation: every image once over the ranks.

    Raises:
        ConfigError: the recipe names no shards for it.
        ShardError: the shards cannot be read.
    """
    setting = "train" if split == "train" else "val"
    shards = getattr(config.data, setting)
    if not shards:
        raise config.error(f"data.{setting}", f"shards of the {split} split")
    return EvalLoader(
        shards,
        split=split,
        img_size=config.model.img_size,
        batch_size=EVAL_BATCH_SIZE,
        rank=rank,
        world_size=world_size,
        options=_read_options(config, num_classes=num_classes),
    )


def count_training_images(config: Config) -> int | None:
    """Return how many images the training shards hold by what lies beside them on this machine; None if nothing says.

    No shard is opened and nothing is fetched.
    """
    shards = config.data.train_shards
    if not shards or any(is_remote(name) for name in shards):
        return None
    try:
        lengths = find_shards(shards, split="train").lengths
    except ShardError:
        return None
    known = [length for length in lengths if length is not None]
    return sum(known) if len(known) == len(lengths) else None


def check_labels(config: Config, key: str, loader: TrainLoader | EvalLoader) -> None:
    """Make sure, before a run begins, that k-NN will find labels; those of remote shards are not looked at.

    Args:
        config: the run.
        key: the setting that names the shards.
        loader: of these shards.

    Raises:
        ConfigError: there are none.
    """
    name = loader.shards.names[0]
    if not is_remote(name) and not loader.reader.has_labels(0):
        raise config.error(key, f"shards whose samples have a .cls member each, to compare by k-NN; {name} has none")


def _read_options(config: Config, *, num_classes: int | None) -> ReadOptions:
    data = config.data
    return ReadOptions(
        workers=data.workers,
        prefetch=data.prefetch,
        num_classes=num_classes,
        max_bad_fraction=data.max_bad_fraction,
        allow_pipe=data.allow_pipe,
        cache_dir=data.cache_dir or None,
        cache_gigabytes=data.cache_gigabytes,
    )
