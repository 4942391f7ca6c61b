"""Pre-training goes on from public weights: made here from timm's configs, spelled as their authors spell them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from vitfreeze.config import ConfigError, load_config
from vitfreeze.pretrained import read_pretrained, to_timm
from vitfreeze.training.pretrain import Pretraining

NAME = "vit_small_patch16_224.dino"
SIZE = ["model.size=vit_small_patch16", "data.val=[]"]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Have timm build what it would fetch; return its weights."""
    create = timm.create_model
    model = create(NAME, pretrained=False, num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, *, pretrained, **options: model)
    return {name: x.clone() for name, x in model.state_dict().items()}


def spell(weights: dict[str, Tensor], whose: str) -> dict[str, Any]:
    head = {"head.mlp.0.weight": torch.zeros(2, 2)}
    return {
        "dino": weights,
        "dino, whole": {
            "student": {f"module.backbone.{name}": torch.zeros_like(x) for name, x in weights.items()},
            "teacher": {**{f"backbone.{name}": x for name, x in weights.items()}, **head},
            "epoch": 3,
            "args": Namespace(arch="vit_small"),
        },
        "mae": {"model": {**weights, "mask_token": torch.zeros(1, 1, 512), "decoder_embed.bias": torch.zeros(512)}},
        "ddp": {"state_dict": {f"module.{name}": x for name, x in weights.items()}},
    }[whose]


@pytest.mark.parametrize("whose", ["timm", "dino", "dino, whole", "mae", "ddp"])
def test_a_run_begins_with_public_weights(whose: str, published: dict[str, Tensor], tmp_path: Path) -> None:
    location = f"timm:{NAME}"
    if whose != "timm":
        location = str(tmp_path / "published.pth")
        torch.save(spell(published, whose), location)
    config = load_config("continue", [f"model.init_from={location}", f"run.dir={tmp_path / 'run'}", *SIZE])
    model = Pretraining(config).build_model(is_new=True)
    began_with = to_timm(model.state_dict())
    assert began_with.keys() == published.keys()
    assert all(torch.equal(began_with[name], published[name]) for name in published)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda weights: {f"visual.{name}": x for name, x in weights.items()},
         "there is no tensor patch_embed.proj.weight, only visual.patch_embed.proj.weight: save it without the prefix"),
        (lambda weights: {**weights, "blocks.last.gamma": torch.ones(1)}, "blocks.last.gamma belongs to no block"),
        (lambda weights: {**weights, "pos_embed": weights["pos_embed"][:, 1:]},
         "pos_embed has 196 positions, expected one for the class token and a square number of patches"),
        (lambda weights: {**weights, "pos_embed": weights["pos_embed"][:, :0]}, "pos_embed has 0 positions"),
        (lambda weights: {**weights, "pos_embed": weights["pos_embed"][0]}, "expected 3 dimensions"),
        (lambda weights: {name: x for name, x in weights.items() if name != "pos_embed"}, "pos_embed .* is missing"),
        (lambda weights: {**weights, "blocks.3.attn.qkv.weight": torch.zeros(3, 3)},
         r"blocks.3.attn.qkv.weight has shape \(3, 3\), expected \(1152, 384\)"),
    ],
)  # fmt: skip
def test_weights_with_other_names_or_shapes_are_refused_with_what_is_wrong(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str, published: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({"model": spoil(published)}, tmp_path / "odd.pth")
    given = [f"model.init_from={tmp_path / 'odd.pth'}", f"run.dir={tmp_path / 'run'}", *SIZE]
    with pytest.raises(ConfigError, match=words) as refused:
        Pretraining(load_config("continue", given))
    assert "odd.pth" in str(refused.value)


def test_colours_of_the_weights_are_compared(
    published: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_pretrained(f"timm:{NAME}").colours.mean == (0.485, 0.456, 0.406)
    given = [f"model.init_from=timm:{NAME}", f"run.dir={tmp_path / 'run'}", "data.mean=[0.5,0.5,0.5]", *SIZE]
    Pretraining(load_config("continue", given))
    assert "data.mean=[0.485, 0.456, 0.406]" in caplog.text


def test_weights_of_another_size_are_refused(published: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embed_dim 384 there and 768 here"):
        Pretraining(load_config("continue", [f"model.init_from=timm:{NAME}", f"run.dir={tmp_path / 'run'}"]))
