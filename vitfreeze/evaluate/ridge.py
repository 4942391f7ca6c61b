"""A linear probe that is solved, not trained: ridge regression of the classes, for encoders that are still learning.

It needs no gradient, of the encoder or of its own, and takes milliseconds for a few thousand features; the full
protocol, with its schedule and its choice of rates, is in `linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitfreeze.evaluate.features import Features, gather_features
from vitfreeze.ranks import Ranks

PENALTY = 0.1  # times the number of training images, on standardised features


@torch.no_grad()
def ridge_over_ranks(train: Features, test: Features, *, ranks: Ranks) -> float:
    """Return the top-1 accuracy, from 0 to 1, over the test images of all ranks.

    Features are standardised by the training images, and each class's indicator is fitted by least squares with an
    intercept and a penalty of PENALTY on the weights (Hoerl and Kennard 1970); the largest output is the class.

    Args:
        train, test: features of this rank's images; each rank fits on those of all.
        ranks: who add up.
    """
    bank = gather_features(train, ranks)
    mean_D, std_D = bank.features.double().mean(dim=0), bank.features.double().std(dim=0, correction=0)
    train_ND, test_MD = ((x.features.double() - mean_D) / std_D.clamp_min(1e-6) for x in (bank, test))
    classes = int(bank.labels.max()) + 1
    targets_NC = F.one_hot(bank.labels, classes).double()
    share_C = targets_NC.mean(dim=0)
    gram_DD = train_ND.T @ train_ND + PENALTY * len(train_ND) * torch.eye(train_ND.shape[1], dtype=torch.float64)
    weights_DC = torch.linalg.solve(gram_DD, train_ND.T @ (targets_NC - share_C), left=True)
    hits = ((test_MD @ weights_DC + share_C).argmax(dim=1) == test.labels).sum()
    right, images = ranks.sum(torch.tensor([int(hits), len(test.labels)])).tolist()
    return float(right / images)
