"""Features and k-nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vitfreeze.data import Batch, normalize
from vitfreeze.evaluate import extract_block_features, extract_features, knn_accuracy
from vitfreeze.evaluate import knn as knn_room
from vitfreeze.model import LocalMIM


@pytest.fixture(scope="module")
def model() -> LocalMIM:
    torch.manual_seed(0)
    return LocalMIM(
        img_size=64, patch_size=16, embed_dim=48, depth=8, num_heads=4, decoder_embed_dim=32, decoder_num_heads=4
    )


def make_batches(sizes: tuple[int, ...], *, seed: int = 0, labelled: bool = True) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for step, size in enumerate(sizes):
        yield Batch(
            images=torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8, generator=generator),
            labels=torch.arange(size) if labelled else torch.full((size,), -1),
            noise=torch.empty(size, 0),
            keys=[f"{step}_{row}" for row in range(size)],
            indices=torch.arange(size),
            epoch=0,
            step=step,
            wait_seconds=0.0,
        )


def test_features_are_the_mean_of_normed_patches(model: LocalMIM) -> None:
    images = torch.cat([batch.images for batch in make_batches((3, 2))])
    with torch.no_grad():
        tokens = model.encode(normalize(images), blocks=[8], norm=True)[0]
    found = extract_features(model, make_batches((3, 2)))
    torch.testing.assert_close(found.features, tokens[:, 1:].mean(dim=1))
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    by_token = extract_features(model, make_batches((3, 2)), global_pool="token")
    torch.testing.assert_close(by_token.features, tokens[:, 0])
    assert not found.features.requires_grad


def test_every_block_in_one_pass(model: LocalMIM) -> None:
    together = extract_block_features(model, make_batches((4,)), blocks=(2, 5, 8))
    for block, found in together.items():
        torch.testing.assert_close(found.features, extract_features(model, make_batches((4,)), block=block).features)
    assert not torch.allclose(together[2].features, together[8].features)


def test_limit_takes_the_first_images(model: LocalMIM) -> None:
    whole = extract_features(model, make_batches((3, 3)))
    part = extract_features(model, make_batches((3, 3)), limit=4)
    assert len(part.labels) == 4
    torch.testing.assert_close(part.features, whole.features[:4])


def test_half_precision_weights_run_in_float32_on_a_cpu_and_stay(model: LocalMIM) -> None:
    half = LocalMIM(
        img_size=64, patch_size=16, embed_dim=48, depth=8, num_heads=4, decoder_embed_dim=32, decoder_num_heads=4
    )
    half.load_state_dict(model.state_dict())
    half.blocks[:4].to(torch.bfloat16)
    rounded = extract_features(half, make_batches((2,))).features
    exact = extract_features(model, make_batches((2,))).features
    assert rounded.dtype == torch.float32
    assert half.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert 1e-5 < (rounded - exact).abs().max() < 0.05


def test_features_refuse_what_cannot_be_evaluated(model: LocalMIM) -> None:
    with pytest.raises(ValueError, match=r"sample 0_0 has no label"):
        extract_features(model, make_batches((2,), labelled=False))
    with pytest.raises(ValueError, match=r"no image"):
        extract_features(model, make_batches(()))
    with pytest.raises(ValueError, match=r"'max', expected one of avg, token"):
        extract_features(model, make_batches((2,)), global_pool="max")
    with pytest.raises(ValueError, match=r"1 to depth 8"):
        extract_features(model, make_batches((2,)), block=9)


def vote_by_hand(train: Tensor, labels: Tensor, query: Tensor, *, k: int, temperature: float) -> int:
    """One image at a time, by the words of the paper."""
    votes: dict[int, float] = {}
    similarity = [float(torch.cosine_similarity(query, row, dim=0)) for row in train]
    for index in sorted(range(len(train)), key=lambda i: -similarity[i])[:k]:
        label = int(labels[index])
        votes[label] = votes.get(label, 0.0) + float(torch.tensor(similarity[index] / temperature).exp())
    return max(sorted(votes), key=lambda label: votes[label])


@pytest.mark.parametrize("bank_chunk", [7, 1000])
def test_knn_agrees_with_votes_by_hand(bank_chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn_room, "BANK_CHUNK", bank_chunk)
    monkeypatch.setattr(knn_room, "QUERY_CHUNK", 8)
    generator = torch.Generator().manual_seed(1)
    train, test = (torch.randn(n, 6, generator=generator) for n in (50, 31))
    train_labels, test_labels = (torch.randint(0, 4, (n,), generator=generator) for n in (50, 31))
    found = knn_accuracy(train, train_labels, test, test_labels, k=(1, 10, 20))
    for k in (1, 10, 20):
        guesses = [vote_by_hand(train, train_labels, query, k=k, temperature=0.07) for query in test]
        by_hand = sum(g == int(label) for g, label in zip(guesses, test_labels, strict=True)) / 31
        assert found[k] == pytest.approx(by_hand)


def test_knn_takes_direction_and_not_length() -> None:
    train = torch.tensor([[10.0, 0.0], [0.1, 0.1], [0.0, 1.0]])
    found = knn_accuracy(train, torch.tensor([0, 1, 2]), torch.tensor([[5.0, 5.1]]), torch.tensor([1]), k=(1,))
    assert found == {1: 1.0}


def test_knn_refuses_bad_input() -> None:
    features, labels = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"k is \(6,\), expected numbers from 1 to the 5"):
        knn_accuracy(features, labels, features, labels, k=(6,))
    with pytest.raises(ValueError, match="same width"):
        knn_accuracy(features, labels, torch.randn(5, 4), labels, k=(1,))
    with pytest.raises(ValueError, match="one each"):
        knn_accuracy(features, labels[:4], features, labels, k=(1,))
    with pytest.raises(ValueError, match="above 0"):
        knn_accuracy(features, labels, features, labels, k=(1,), temperature=0)
