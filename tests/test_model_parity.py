"""Every figure that the authors' code gave, computed again."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layers import head_of

from vitfreeze.architecture import MODEL_SIZES
from vitfreeze.model import LocalMIM, from_localmim

Figures = dict[str, Any]
SETTINGS = (
    *("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "decoder_embed_dim", "decoder_depth"),
    *("decoder_num_heads", "hog_nbins", "mask_ratio"),
)


@pytest.fixture(scope="module")
def figures(shared_dir: Path) -> Figures:
    with np.load(shared_dir / "reference" / "localmim_small.npz") as file:
        return {name: torch.from_numpy(file[name]) if file[name].dtype.kind in "fi" else file[name] for name in file}


@pytest.fixture
def model(figures: Figures) -> LocalMIM:
    config = json.loads(str(figures["config_json"]))
    model = LocalMIM(**{name: config[name] for name in SETTINGS})
    weights = {name.removeprefix("w/"): tensor for name, tensor in figures.items() if name.startswith("w/")}
    model.load_state_dict(from_localmim(weights))
    return model


def authors_name(name: str) -> str:
    return re.sub(r"heads\.(\d)\.decoder", r"decoder.\1", re.sub(r"heads\.(\d)\.norm", r"norm.\1", name))


def test_latents_predictions_targets_and_weights(figures: Figures, model: LocalMIM) -> None:
    seen = model.predict(figures["images"][0], noise=figures["noise"][0])
    assert list(seen) == [0, 1, 2, 3]
    for head, (latents, predictions, targets, weights) in seen.items():
        torch.testing.assert_close(latents, figures[f"latent{head}"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(predictions, figures[f"pred{head}"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(targets, figures[f"target{head}"], rtol=1e-5, atol=1e-5)
        assert torch.equal(weights, figures[f"weight{head}"])


def test_mask_is_that_of_the_noise(figures: Figures, model: LocalMIM) -> None:
    seen = model.predict(figures["images"][0], noise=figures["noise"][0])
    assert torch.equal(seen[2].weights, figures["mask"])


def test_losses(figures: Figures, model: LocalMIM) -> None:
    output = model(figures["images"][0], noise=figures["noise"][0])
    assert output.heads == (0, 1, 2, 3)
    for head, loss in enumerate(output.losses):
        torch.testing.assert_close(loss, figures[f"loss{head}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(output.loss, figures["loss"], rtol=1e-5, atol=0)


def test_gradient_norm_of_every_tensor(figures: Figures, model: LocalMIM) -> None:
    model(figures["images"][0], noise=figures["noise"][0]).loss.backward()
    norms = {authors_name(name): weight.grad.norm() for name, weight in model.named_parameters()}
    expected = {name.removeprefix("g/"): norm for name, norm in figures.items() if name.startswith("g/")}
    assert norms.keys() == expected.keys()
    for name, norm in expected.items():
        torch.testing.assert_close(norms[name], norm, rtol=1e-5, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_ten_steps_of_adamw(figures: Figures, model: LocalMIM) -> None:
    settings = json.loads(str(figures["adamw"]))
    decayed, plain = [], []
    for name, weight in model.named_parameters():
        (plain if weight.ndim <= 1 or name.endswith(".bias") else decayed).append(weight)
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"], weight_decay=settings["weight_decay"]
    )
    losses = []
    for images, noise in zip(figures["images"], figures["noise"], strict=True):
        loss = model(images, noise=noise).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    torch.testing.assert_close(torch.stack(losses), figures["adamw_losses"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", ["vit_small_patch16", "vit_base_patch16", "vit_large_patch16"])
def test_parameter_counts(shared_dir: Path, size: str) -> None:
    counts = json.loads((shared_dir / "reference" / "parameter_counts.json").read_text())[f"MIM_{size}"]
    with torch.device("meta"):
        model = LocalMIM(
            img_size=224,
            hog_nbins=counts["hog_nbins"],
            hog_bias=counts["hog_bias"],
            **dataclasses.asdict(MODEL_SIZES[size]),
        )
    encoder = norms = 0
    decoders = [0] * 4
    for name, weight in model.named_parameters():
        head = head_of(name)
        if head is None:
            encoder += weight.numel()
        elif name.startswith(f"heads.{head}.norm."):
            norms += weight.numel()
        else:
            decoders[head] += weight.numel()
    assert encoder == counts["encoder_with_cls"]
    assert norms == counts["norms"]
    assert decoders == counts["decoders"]
    assert encoder + norms + sum(decoders) == counts["trainable"]
