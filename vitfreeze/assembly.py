"""From the settings of a run to its parts: data, model, engine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vitfreeze.classifier import Classifier
from vitfreeze.cluster import Meeting, Place, join_timeout, run_facts
from vitfreeze.config import Config, derive_accumulation, find_ds_config
from vitfreeze.data import EvalLoader, TrainLoader
from vitfreeze.data.augmentation import Transform
from vitfreeze.engine import FreezingEngine, Processes, best_ds_config
from vitfreeze.model import LocalMIM


def build_loader(
    config: Config, processes: Processes, *, transform: Transform | None = None, num_classes: int | None = None
) -> TrainLoader:
    """Open the training shards.

    Args:
        transform: makes the images instead of the random crop of the settings.
        num_classes: labels must exist and be smaller; None: labels are not looked at, and masks are drawn.
    """
    if not config.data.train:
        raise config.error("data.train", "a folder of shards, a brace pattern or URLs; make shards with data_prep")
    micro_batch, _ = derive_accumulation(config, world_size=processes.world_size)
    data = config.data
    return TrainLoader(
        data.train,
        img_size=config.model.img_size,
        num_patches=(config.model.img_size // config.model.resolve().patch_size) ** 2,
        global_batch=config.batch.global_size,
        micro_batch=micro_batch,
        rank=processes.rank,
        world_size=processes.world_size,
        seed=config.run.seed,
        workers=data.workers,
        prefetch=data.prefetch,
        crops_per_image=data.crops_per_image,
        crop_scale=(data.crop_scale[0], data.crop_scale[1]),
        transform=transform,
        num_classes=num_classes,
        max_bad_fraction=data.max_bad_fraction,
        allow_pipe=data.allow_pipe,
        cache_dir=data.cache_dir or None,
        cache_gigabytes=data.cache_gigabytes,
    )


def open_training(
    config: Config, processes: Processes, *, transform: Transform | None = None, num_classes: int | None = None
) -> TrainLoader:
    """Open the training shards on every rank, and make sure that all ranks mean the same run.

    Raises:
        ConfigError: a setting cannot be used.
        ShardError: the shards cannot be read.
        ClusterError: either of them on some ranks only, or ranks with other software, settings or shards.
    """
    if processes.world_size == 1:
        return build_loader(config, processes, transform=transform, num_classes=num_classes)
    meeting = Meeting("start", place=Place.from_environment(), timeout=join_timeout())
    with meeting.fail_together():
        loader = build_loader(config, processes, transform=transform, num_classes=num_classes)
        ds_config = json.loads(find_ds_config(config.run.ds_config or best_ds_config(processes.device)).read_text())
    meeting.check_agreement(run_facts(config, shards=loader.shards.names, lengths=loader.lengths, ds_config=ds_config))
    return loader


def open_split(
    config: Config, split: str, *, rank: int = 0, world_size: int = 1, num_classes: int | None = None
) -> EvalLoader:
    """Open the shards of one split, `train` or `validation`, for evaluation: every image once over the ranks.

    Raises:
        ConfigError: the recipe names no shards for it.
        ShardError: the shards cannot be read.
    """
    data = config.data
    shards = data.train if split == "train" else data.val
    if not shards:
        raise config.error("data.train" if split == "train" else "data.val", f"shards of the {split} split")
    return EvalLoader(
        shards,
        split=split,
        img_size=config.model.img_size,
        batch_size=64,
        rank=rank,
        world_size=world_size,
        num_classes=num_classes,
        workers=data.workers,
        prefetch=data.prefetch,
        max_bad_fraction=data.max_bad_fraction,
        allow_pipe=data.allow_pipe,
        cache_dir=data.cache_dir or None,
        cache_gigabytes=data.cache_gigabytes,
    )


def build_model(config: Config) -> LocalMIM:
    """Build the model with the weights that the seed gives."""
    torch.manual_seed(config.run.seed)
    model = LocalMIM(
        **asdict(config.model.resolve()),
        img_size=config.model.img_size,
        hog_nbins=config.model.hog_nbins,
        hog_bias=config.model.hog_bias,
        hog_bias_seed=config.run.seed,
        mask_ratio=config.model.mask_ratio,
        freeze_cls_token=config.freeze.cls_token,
        freeze_patch_embed=config.freeze.patch_embed,
        activation_checkpointing=config.model.activation_checkpointing,
    )
    if config.model.compile:
        model.compile_parts()
    return model


def build_engine(
    config: Config, processes: Processes, *, frozen_layers: int, model: LocalMIM | Classifier | None = None
) -> FreezingEngine:
    """Wrap a model, by default a new one, in the DeepSpeed engine, with the first `frozen_layers` layers frozen."""
    micro_batch, accumulation = derive_accumulation(config, world_size=processes.world_size)
    return FreezingEngine(
        model or build_model(config),
        ds_config=read_ds_config(config, processes.device),
        micro_batch=micro_batch,
        accumulation=accumulation,
        frozen_layers=frozen_layers,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        min_steps_between_drops=config.freeze.min_steps_between_drops,
        prefix_precision=config.freeze.prefix_precision,
    )


def read_ds_config(config: Config, device: torch.device) -> Path | dict[str, Any]:
    """Return the DeepSpeed JSON; its content, with the recipe's clipping, if the recipe clips."""
    path, clip_grad = find_ds_config(config.run.ds_config or best_ds_config(device)), config.finetune.clip_grad
    return path if clip_grad is None else {**json.loads(path.read_text()), "gradient_clipping": clip_grad}
