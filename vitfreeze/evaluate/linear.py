"""Linear probe: one linear classifier per learning rate on fixed features, all of them trained in one pass.

Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, appendix A.1 (LARS, no weight decay,
90 epochs with 10 of warm-up, batch norm without affine parameters before the classifier). Features of fixed images
have fixed statistics, so batch norm is here the standardisation of each feature over the training images.
LARS: You et al., "Large Batch Training of Convolutional Networks", 2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfreeze.evaluate.features import Features
from vitfreeze.ranks import Ranks
from vitfreeze.schedule import CosineSchedule

OPTIMIZERS = ("lars", "sgd")
# Learning rates per 256 images. MAE's is 0.1 with LARS; plain SGD needs smaller ones.
LEARNING_RATES = {"lars": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0), "sgd": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)}
_TRUST = 0.001
_TEST_CHUNK = 4096


@dataclass(frozen=True, kw_only=True)
class LinearSettings:
    """How the classifiers are trained; the defaults are MAE's.

    Attributes:
        optimizer: lars or sgd.
        blr: learning rates per 256 images, one classifier each; empty: a range around MAE's.
        batch_size: training images per step, at most an eighth of them.
        epochs: passes over the training images.
        warmup_epochs: linear warm-up; a half cosine to 0 follows.
        momentum: of both optimizers.
        seed: decides the initial weights and the order of the images.
    """

    optimizer: str = "lars"
    blr: tuple[float, ...] = ()
    batch_size: int = 16384
    epochs: int = 90
    warmup_epochs: int = 10
    momentum: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer is {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}")
        if any(not 0 < rate < math.inf for rate in self.blr):
            raise ValueError(f"blr is {self.blr}, expected numbers above 0")
        if self.batch_size < 1 or not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"batch_size {self.batch_size} must be at least 1, and warmup_epochs {self.warmup_epochs} from 0 to "
                f"less than the {self.epochs} epochs"
            )

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Learning rates per 256 images."""
        return self.blr or LEARNING_RATES[self.optimizer]


@dataclass(frozen=True, kw_only=True)
class LinearResult:
    """What one classifier reached: accuracies from 0 to 1, and the last epoch's mean training loss."""

    blr: float
    top1: float
    top5: float
    loss: float


def train_linear(
    train: Features,
    test: Features,
    *,
    settings: LinearSettings | None = None,
    ranks: Ranks | None = None,
) -> list[LinearResult]:
    """Train a classifier for every learning rate and return what each reached, in the order of the rates.

    Args:
        train, test: features with labels.
        settings: how to train.
        ranks: who share the rates, given the same features, each on its device; default: alone, where the features are.

    Raises:
        ValueError: features of different widths.
    """
    settings = settings or LinearSettings()
    ranks = ranks or Ranks.alone(train.features.device)
    if train.features.shape[1] != test.features.shape[1]:
        raise ValueError(f"features have widths {train.features.shape[1]} and {test.features.shape[1]}")
    num_classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    rates = settings.learning_rates
    mine = list(range(ranks.rank, len(rates), ranks.world_size))
    table_R3 = torch.zeros(len(rates), 3, dtype=torch.float64)
    if mine:
        chosen = [rates[index] for index in mine]
        sweep = _Sweep(train, num_classes=num_classes, rates=chosen, settings=settings, device=ranks.device)
        losses = sweep.train()
        table_R3[mine] = torch.stack([*sweep.test(test), losses], dim=1)
    return [
        LinearResult(blr=rate, top1=top1, top5=top5, loss=loss)
        for rate, (top1, top5, loss) in zip(rates, ranks.sum(table_R3).tolist(), strict=True)
    ]


def find_best(results: Sequence[LinearResult]) -> LinearResult:
    """Return the result with the highest top-1 accuracy."""
    return max(results, key=lambda result: result.top1)


class _Sweep:
    """R linear classifiers on the same standardised features."""

    def __init__(
        self,
        train: Features,
        *,
        num_classes: int,
        rates: Sequence[float],
        settings: LinearSettings,
        device: torch.device,
    ) -> None:
        self.device = device
        self.settings = settings
        self.train_set = train
        self.batch_size = max(1, min(settings.batch_size, len(train.labels) // 8))
        self.rates_R = torch.tensor(rates, device=self.device) * self.batch_size / 256
        self.mean_D = train.features.mean(dim=0).to(self.device)
        self.std_D = (train.features.var(dim=0, correction=0) + 1e-6).sqrt().to(self.device)
        generator = torch.Generator().manual_seed(settings.seed)
        weight_DC = 0.01 * torch.randn(train.features.shape[1], num_classes, generator=generator)
        self.weight_RDC = weight_DC.to(self.device).repeat(len(rates), 1, 1)
        self.bias_RC = torch.zeros(len(rates), num_classes, device=self.device)
        self.momenta = (torch.zeros_like(self.weight_RDC), torch.zeros_like(self.bias_RC))

    def train(self) -> Tensor:
        """Train all classifiers and return each one's mean loss of the last epoch, (R,) float64."""
        settings, count = self.settings, len(self.train_set.labels)
        steps_per_epoch = -(-count // self.batch_size)
        total, warmup = settings.epochs * steps_per_epoch, settings.warmup_epochs * steps_per_epoch
        schedule = CosineSchedule(total_steps=total, warmup_steps=warmup, base_lr=1.0)
        generator = torch.Generator().manual_seed(settings.seed)
        losses_R = torch.zeros(len(self.rates_R), device=self.device)
        for step in range(total):
            batch = step % steps_per_epoch
            if batch == 0:
                order_N = torch.randperm(count, generator=generator)
                losses_R.zero_()
            chosen_B = order_N[batch * self.batch_size : (batch + 1) * self.batch_size]
            losses_R += self._take_step(chosen_B, factor=schedule.learning_rate(step)) / steps_per_epoch
        return losses_R.double().cpu()

    def _take_step(self, chosen_B: Tensor, *, factor: float) -> Tensor:
        inputs_BD = self._standardize(self.train_set.features[chosen_B])
        labels_B = self.train_set.labels[chosen_B].to(self.device)
        logits_RBC = torch.baddbmm(self.bias_RC[:, None], inputs_BD.expand(len(self.rates_R), -1, -1), self.weight_RDC)
        log_RBC = F.log_softmax(logits_RBC, dim=2)
        error_RBC = log_RBC.exp()
        error_RBC[:, torch.arange(len(labels_B), device=self.device), labels_B] -= 1
        error_RBC /= len(labels_B)
        gradient_RDC = inputs_BD.T @ error_RBC
        if self.settings.optimizer == "lars":
            gradient_RDC *= _trust_ratio(self.weight_RDC, gradient_RDC)
        for value, gradient, momentum in (
            (self.weight_RDC, gradient_RDC, self.momenta[0]),
            (self.bias_RC, error_RBC.sum(dim=1), self.momenta[1]),
        ):
            momentum.mul_(self.settings.momentum).add_(gradient)
            value -= momentum * (factor * self.rates_R).view(-1, *[1] * (value.ndim - 1))
        return -log_RBC.gather(2, labels_B.expand(len(log_RBC), -1)[..., None]).mean(dim=(1, 2))

    def _standardize(self, features_BD: Tensor) -> Tensor:
        return (features_BD.to(self.device, torch.float32) - self.mean_D) / self.std_D

    def test(self, test: Features) -> tuple[Tensor, Tensor]:
        """Return the top-1 and top-5 accuracy of each classifier, (R,) float64 from 0 to 1."""
        hits = torch.zeros(2, len(self.rates_R), dtype=torch.float64)
        for start in range(0, len(test.labels), _TEST_CHUNK):
            inputs_BD = self._standardize(test.features[start : start + _TEST_CHUNK])
            labels_B = test.labels[start : start + _TEST_CHUNK].to(self.device)
            for index in range(len(self.rates_R)):
                logits_BC = inputs_BD @ self.weight_RDC[index] + self.bias_RC[index]
                found_B5 = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
                right_B5 = found_B5 == labels_B[:, None]
                hits[0, index] += int(right_B5[:, 0].sum())
                hits[1, index] += int(right_B5.sum())
        top1_R, top5_R = hits / len(test.labels)
        return top1_R, top5_R


def _trust_ratio(weight_RDC: Tensor, gradient_RDC: Tensor) -> Tensor:
    """Return LARS's factor of each classifier, (R, 1, 1): 0.001 |weight| / |gradient|, or 1 where either is 0."""
    weight, gradient = (x.flatten(1).norm(dim=1) for x in (weight_RDC, gradient_RDC))
    usable = (weight > 0) & (gradient > 0)
    return torch.where(usable, _TRUST * weight / gradient.clamp_min(1e-30), 1.0).view(-1, 1, 1)
