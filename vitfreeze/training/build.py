"""From the settings of a run to its parts: data, model, engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vitfreeze.config import Config, derive_accumulation, find_ds_config
from vitfreeze.data import TrainLoader, build_train_loader
from vitfreeze.data.augmentation import Transform
from vitfreeze.engine import FreezingEngine, best_ds_config, read_settings
from vitfreeze.extensions import ExtensionError, make_target
from vitfreeze.files import read_json
from vitfreeze.model import Classifier, LocalMIM
from vitfreeze.ranks import LaunchEnvironment, Ranks
from vitfreeze.rendezvous import Rendezvous, join_timeout, run_facts


def open_training(
    config: Config,
    ranks: Ranks,
    *,
    transform: Transform | None = None,
    num_classes: int | None = None,
    check_data: Callable[[TrainLoader], None],
) -> TrainLoader:
    """Open the training shards on every rank, and make sure that all ranks mean the same run.

    `check_data` is given the loader and raises what else is wrong with the data; the other arguments are those of
    `build_train_loader`.

    Raises:
        ConfigError: a setting cannot be used.
        ShardError: the shards cannot be read.
        ClusterError: either of them on some ranks only, or ranks with other software, settings or shards.
    """

    def open_all() -> tuple[TrainLoader, Mapping[str, Any]]:
        loader = build_train_loader(
            config, rank=ranks.rank, world_size=ranks.world_size, transform=transform, num_classes=num_classes
        )
        settings = read_settings(read_ds_config(config, ranks.device))
        check_data(loader)
        return loader, settings.content

    if ranks.world_size == 1:
        return open_all()[0]
    rendezvous = Rendezvous("start", launch=LaunchEnvironment.read(), timeout=join_timeout())
    with rendezvous.raise_on_all_ranks():
        loader, ds_config = open_all()
    names, lengths = loader.all_shards()
    rendezvous.check_agreement(run_facts(config, shards=names, lengths=lengths, ds_config=ds_config))
    return loader


def build_model(config: Config) -> LocalMIM:
    """Build the model with the weights that the seed gives; raises ConfigError if its target cannot be loaded."""
    try:
        target = make_target(config.model.target)
    except ExtensionError as error:
        raise config.error("model.target", error.allowed) from None
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
        target=target,
    )
    if config.model.compile:
        model.compile_parts()
    return model


def build_classifier(config: Config) -> Classifier:
    """Build the classifier of fine-tuning with the weights that the seed gives."""
    settings = config.finetune
    torch.manual_seed(config.run.seed)
    model = Classifier(
        size=config.model.resolve(),
        img_size=config.model.img_size,
        num_classes=settings.num_classes,
        global_pool=settings.global_pool,
        drop_path=settings.drop_path,
        activation_checkpointing=config.model.activation_checkpointing,
        average_decay=settings.model_ema_decay,
    )
    if config.model.compile:
        model.compile_parts()
    return model


def build_engine(
    config: Config, ranks: Ranks, *, frozen_layers: int, model: LocalMIM | Classifier | None = None
) -> FreezingEngine:
    """Wrap a model, by default a new one, in the DeepSpeed engine, with the first `frozen_layers` layers frozen."""
    micro_batch, accumulation = derive_accumulation(config, world_size=ranks.world_size)
    return FreezingEngine(
        model or build_model(config),
        ds_config=read_ds_config(config, ranks.device),
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
    return path if clip_grad is None else {**read_json(path), "gradient_clipping": clip_grad}
