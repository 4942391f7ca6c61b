"""Weighted k-nearest-neighbour classification of features: what an encoder knows, with nothing trained on top.

Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section 3.4:
the k most similar training images vote with exp(cosine similarity / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfreeze.evaluate.features import Features, gather_features
from vitfreeze.ranks import Ranks

# 512 test images x 32768 training images x 4 bytes = 64 MiB of similarities at a time, whatever their numbers.
QUERY_CHUNK, BANK_CHUNK = 512, 32768


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: Sequence[int] = (10, 20),
    temperature: float = 0.07,
    device: torch.device | None = None,
) -> dict[int, float]:
    """Return the top-1 accuracy, from 0 to 1, for each number of neighbours.

    Args:
        train_features: (N, D) features of the images that vote.
        train_labels: (N,) int64.
        test_features: (M, D).
        test_labels: (M,) int64.
        k: numbers of neighbours.
        temperature: how much more the nearest neighbours count.
        device: where to compute; default: where the features are.

    Raises:
        ValueError: shapes that do not fit, k outside 1 to N, or a temperature that is not positive.
    """
    train, test = Features(train_features, train_labels), Features(test_features, test_labels)
    correct = _count_correct(train, test, k=k, temperature=temperature, device=device)
    return {neighbours: count / len(test_labels) for neighbours, count in correct.items()}


def _count_correct(
    train: Features, test: Features, *, k: Sequence[int], temperature: float = 0.07, device: torch.device | None = None
) -> dict[int, int]:
    """Return how many test images are classified rightly with each number of neighbours; see `knn_accuracy`."""
    _check(train, test, k=k, temperature=temperature)
    device = device or train.features.device
    num_classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    queries_MD = F.normalize(test.features.to(device, torch.float32), dim=1)
    similarities_MK, neighbours_MK = _find_nearest(queries_MD, train.features, k=max(k))
    classes_MK, labels_M = train.labels.to(device)[neighbours_MK], test.labels.to(device)
    votes_MK = (similarities_MK / temperature).exp()
    correct = dict.fromkeys(k, 0)
    for start in range(0, len(labels_M), QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        for count in k:
            votes_QC = torch.zeros(len(labels_M[rows]), num_classes, device=device)
            votes_QC.scatter_add_(1, classes_MK[rows, :count], votes_MK[rows, :count])
            correct[count] += int((votes_QC.argmax(dim=1) == labels_M[rows]).sum())
    return correct


def knn_over_ranks(train: Features, test: Features, *, k: Sequence[int], ranks: Ranks) -> dict[int, float]:
    """Return the top-1 accuracy, from 0 to 1, over the test images of all ranks.

    Every rank gets all training features, and classifies its own test images.

    Args:
        train, test: features of this rank's images.
        k: numbers of neighbours.
        ranks: who add up, each on its device.

    Raises:
        ValueError: as `knn_accuracy`.
    """
    bank = gather_features(train, ranks)
    correct = _count_correct(bank, test, k=k, device=ranks.device)
    *hits, images = ranks.sum(torch.tensor([*correct.values(), len(test.labels)])).tolist()
    return {count: hit / images for count, hit in zip(correct, hits, strict=True)}


def _find_nearest(queries_MD: Tensor, bank_ND: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Return the cosine similarities (M, k) of the nearest training images, nearest first, and their numbers (M, k).

    The training images come to the device, and are normalised, part by part and once.
    """
    device = queries_MD.device
    best_MK = torch.empty(len(queries_MD), 0, device=device)
    index_MK = torch.empty(len(queries_MD), 0, dtype=torch.int64, device=device)
    for start in range(0, len(bank_ND), BANK_CHUNK):
        part_ND = F.normalize(bank_ND[start : start + BANK_CHUNK].to(device, torch.float32), dim=1)
        found = [
            (queries_QD @ part_ND.T).topk(min(k, len(part_ND)), dim=1) for queries_QD in queries_MD.split(QUERY_CHUNK)
        ]
        joined = torch.cat([best_MK, torch.cat([values for values, _ in found])], dim=1)
        numbers = torch.cat([index_MK, torch.cat([indices for _, indices in found]) + start], dim=1)
        best_MK, kept = joined.topk(min(k, joined.shape[1]), dim=1)
        index_MK = numbers.gather(1, kept)
    return best_MK, index_MK


def _check(train: Features, test: Features, *, k: Sequence[int], temperature: float) -> None:
    shapes = [tuple(part.features.shape) for part in (train, test)]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"features have shapes {shapes[0]} and {shapes[1]}, expected two tables of the same width")
    counts = [len(part.labels) for part in (train, test)]
    if counts != [shape[0] for shape in shapes]:
        raise ValueError(f"{counts} labels for {[shape[0] for shape in shapes]} training and test images, not one each")
    if not k or min(k) < 1 or max(k) > counts[0]:
        raise ValueError(f"k is {tuple(k)}, expected numbers from 1 to the {counts[0]} training images")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature:g}, expected a number above 0")
