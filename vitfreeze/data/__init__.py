"""Shards -> decoded, augmented batches, in an order that is a function of (seed, epoch)."""

from vitfreeze.data.augmentation import CenterCrop, RandomCrop
from vitfreeze.data.build import build_train_loader, check_labels, count_training_images, open_split
from vitfreeze.data.epoch_report import merge_reports
from vitfreeze.data.errors import BadSampleError, ShardError
from vitfreeze.data.finetuning import BatchMixing, FinetuneTransform
from vitfreeze.data.identity import ShardIdentity, describe_difference, identify_shards
from vitfreeze.data.loading import (
    Batch,
    BatchShape,
    EvalLoader,
    ReadOptions,
    TrainLoader,
    describe_lost_worker,
    workers_needed,
)
from vitfreeze.data.normalization import normalize, tabulate
from vitfreeze.data.order import EpochOrder, find_places

__all__ = [
    "BadSampleError",
    "Batch",
    "BatchMixing",
    "BatchShape",
    "CenterCrop",
    "EpochOrder",
    "EvalLoader",
    "FinetuneTransform",
    "RandomCrop",
    "ReadOptions",
    "ShardError",
    "ShardIdentity",
    "TrainLoader",
    "build_train_loader",
    "check_labels",
    "count_training_images",
    "describe_difference",
    "describe_lost_worker",
    "find_places",
    "identify_shards",
    "merge_reports",
    "normalize",
    "open_split",
    "tabulate",
    "workers_needed",
]
