"""Shards -> decoded, augmented batches, in an order that is a function of (seed, epoch)."""

from vitfreeze.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, CenterCrop, RandomCrop
from vitfreeze.data.errors import BadSampleError, ShardError
from vitfreeze.data.finetuning import BatchMixing, FinetuneTransform
from vitfreeze.data.loading import (
    Batch,
    EvalLoader,
    TrainLoader,
    normalize,
    workers_needed,
)
from vitfreeze.data.order import EpochOrder
from vitfreeze.data.reporting import EpochReport, SkippedSample, merge_reports

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BadSampleError",
    "Batch",
    "BatchMixing",
    "CenterCrop",
    "EpochOrder",
    "EpochReport",
    "EvalLoader",
    "FinetuneTransform",
    "RandomCrop",
    "ShardError",
    "SkippedSample",
    "TrainLoader",
    "merge_reports",
    "normalize",
    "workers_needed",
]
