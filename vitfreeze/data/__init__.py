"""Shards -> decoded, augmented batches, in an order that is a function of (seed, epoch)."""

from vitfreeze.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, CenterCrop, RandomCrop
from vitfreeze.data.errors import BadSampleError, ShardError
from vitfreeze.data.loading import (
    Batch,
    EpochReport,
    EvalLoader,
    SkippedSample,
    TrainLoader,
    normalize,
    workers_needed,
)
from vitfreeze.data.order import EpochOrder

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BadSampleError",
    "Batch",
    "CenterCrop",
    "EpochOrder",
    "EpochReport",
    "EvalLoader",
    "RandomCrop",
    "ShardError",
    "SkippedSample",
    "TrainLoader",
    "normalize",
    "workers_needed",
]
