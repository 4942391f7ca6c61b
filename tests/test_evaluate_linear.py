"""The linear probe against a plain one, one classifier at a time."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vitfreeze.evaluate import Features, LinearSettings, find_best, train_linear


def make_clusters(count: int, *, classes: int = 4, width: int = 10, spread: float = 0.8, seed: int = 0) -> Features:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Features(centres[labels] + spread * torch.randn(count, width, generator=generator), labels)


def train_one(train: Features, *, blr: float, settings: LinearSettings, batch_size: int) -> torch.nn.Linear:
    """One classifier by autograd, with torch's SGD, and LARS as the paper writes it."""
    generator = torch.Generator().manual_seed(settings.seed)
    inputs = (train.features - train.features.mean(0)) / (train.features.var(0, correction=0) + 1e-6).sqrt()
    linear = torch.nn.Linear(inputs.shape[1], 4)
    with torch.no_grad():
        linear.weight.copy_((0.01 * torch.randn(inputs.shape[1], 4, generator=generator)).T)
        linear.bias.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=settings.momentum)
    velocity = {name: torch.zeros_like(x) for name, x in linear.named_parameters()}
    steps = -(-len(inputs) // batch_size)
    total, warmup = settings.epochs * steps, settings.warmup_epochs * steps
    order_generator = torch.Generator().manual_seed(settings.seed)
    for step in range(total):
        if step % steps == 0:
            order = torch.randperm(len(inputs), generator=order_generator)
        chosen = order[step % steps * batch_size :][:batch_size]
        rate = blr * batch_size / 256
        rate *= step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        optimizer.zero_grad()
        F.cross_entropy(linear(inputs[chosen]), train.labels[chosen]).backward()
        for name, value in linear.named_parameters():
            gradient = value.grad
            if settings.optimizer == "lars" and name == "weight":
                gradient = gradient * (0.001 * value.detach().norm() / gradient.norm())
            velocity[name] = settings.momentum * velocity[name] + gradient
            with torch.no_grad():
                value -= rate * velocity[name]
    return linear


@pytest.mark.parametrize("optimizer", ["lars", "sgd"])
def test_sweep_agrees_with_one_at_a_time(optimizer: str) -> None:
    train, test = make_clusters(100), make_clusters(400, seed=1)
    rates = (0.3, 3.0) if optimizer == "lars" else (0.01, 0.1)
    settings = LinearSettings(optimizer=optimizer, blr=rates, batch_size=12, epochs=3, warmup_epochs=1)
    found = train_linear(train, test, settings=settings)
    inputs = (test.features - train.features.mean(0)) / (train.features.var(0, correction=0) + 1e-6).sqrt()
    for rate, result in zip(rates, found, strict=True):
        linear = train_one(train, blr=rate, settings=settings, batch_size=12)
        top1 = (linear(inputs).argmax(dim=1) == test.labels).double().mean()
        assert result.blr == rate
        assert result.top1 == pytest.approx(float(top1), abs=1 / 400)
        assert result.top5 == 1.0


def test_best_is_far_above_chance_and_reported_with_all() -> None:
    found = train_linear(make_clusters(400), make_clusters(200, seed=1))
    assert len(found) == 7
    assert find_best(found).top1 == max(result.top1 for result in found) > 0.8
    assert all(math.isfinite(result.loss) for result in found)


def test_large_batches_are_cut_to_an_eighth_of_the_images() -> None:
    settings = LinearSettings(optimizer="sgd", epochs=20, warmup_epochs=2)
    assert find_best(train_linear(make_clusters(160), make_clusters(100, seed=1), settings=settings)).top1 > 0.7


def test_linear_refuses_bad_input() -> None:
    with pytest.raises(ValueError, match="'adam', expected one of lars, sgd"):
        LinearSettings(optimizer="adam")
    with pytest.raises(ValueError, match="numbers above 0"):
        LinearSettings(blr=(0.1, -1.0))
    with pytest.raises(ValueError, match="less than the 5 epochs"):
        LinearSettings(epochs=5)
    clusters = make_clusters(40)
    with pytest.raises(ValueError, match="widths 10 and 9"):
        train_linear(clusters, Features(clusters.features[:, :9], clusters.labels))
