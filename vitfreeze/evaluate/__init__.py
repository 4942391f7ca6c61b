"""What an encoder is worth: features, k-nearest neighbours, linear probes, and pictures of what it sees."""

from vitfreeze.evaluate.features import Features, extract_block_features, extract_features, gather_features
from vitfreeze.evaluate.knn import knn_accuracy, knn_over_ranks

__all__ = [
    "Features",
    "extract_block_features",
    "extract_features",
    "gather_features",
    "knn_accuracy",
    "knn_over_ranks",
]
