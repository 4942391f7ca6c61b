"""What an encoder is worth: features, k-nearest neighbours, linear probes, and pictures of what it sees."""

from vitfreeze.evaluate.commands import EvaluationData, evaluate_knn, evaluate_linear, show_images
from vitfreeze.evaluate.feature_files import write_features
from vitfreeze.evaluate.features import Features, extract_block_features, extract_features
from vitfreeze.evaluate.knn import knn_accuracy, knn_over_ranks
from vitfreeze.evaluate.linear import LinearSettings, find_best, train_linear

__all__ = [
    "EvaluationData",
    "Features",
    "LinearSettings",
    "evaluate_knn",
    "evaluate_linear",
    "extract_block_features",
    "extract_features",
    "find_best",
    "knn_accuracy",
    "knn_over_ranks",
    "show_images",
    "train_linear",
    "write_features",
]
