"""Weights come in under the names of others and go out under timm's, or are refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vitfreeze.architecture import MODEL_SIZES
from vitfreeze.model import LocalMIM, from_localmim, from_mae, to_timm

State = dict[str, Tensor]


def build(**changes: Any) -> LocalMIM:
    options: dict[str, Any] = {
        "img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 5, "num_heads": 2, "decoder_embed_dim": 16,
        "decoder_depth": 2, "decoder_num_heads": 2, "hog_nbins": 6,
    }  # fmt: skip
    return LocalMIM(**{**options, **changes})


def as_localmim(model: LocalMIM) -> State:
    """Spell a model's weights as LocalMIM's code does."""
    state = model.state_dict()
    bias = state.pop("hog_bias", None)
    renamed = {re.sub(r"heads\.(\d)\.decoder", r"decoder.\1", name): tensor for name, tensor in state.items()}
    renamed = {re.sub(r"heads\.(\d)\.norm", r"norm.\1", name): tensor for name, tensor in renamed.items()}
    horizontal = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    for scale in range(4):
        renamed[f"hog_enc.{scale}.conv.weight"] = torch.stack([horizontal, horizontal.t()])[:, None]
        if bias is not None:
            renamed[f"hog_enc.{scale}.conv.bias"] = bias.clone()
    return renamed


def assert_same(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("hog_bias", [False, True])
def test_localmim_there_and_back(hog_bias: bool) -> None:
    model = build(hog_bias=hog_bias, hog_bias_seed=3)
    source = as_localmim(model)
    assert_same(from_localmim(source), model.state_dict())
    assert_same(from_localmim({"model": source, "epoch": 7}), model.state_dict())
    build(hog_bias=hog_bias).load_state_dict(from_localmim(source))


def test_the_authors_weights_fit(shared_dir: Path) -> None:
    with np.load(shared_dir / "reference" / "localmim_small.npz") as figures:
        source = {name[2:]: torch.from_numpy(figures[name]) for name in figures if name.startswith("w/")}
    assert_same(from_localmim(source), {
        re.sub(r"^decoder\.(\d)", r"heads.\1.decoder", re.sub(r"^norm\.(\d)", r"heads.\1.norm", name)): tensor
        for name, tensor in source.items() if not name.startswith("hog_enc")
    })  # fmt: skip


def test_scales_with_different_biases_need_a_choice() -> None:
    source = as_localmim(build(hog_bias=True))
    source["hog_enc.2.conv.bias"] = torch.tensor([0.5, -0.5])
    with pytest.raises(ValueError, match=r"hog_enc\.2\.conv\.bias of shape \(2,\) differs.*hog_bias_of_scale"):
        from_localmim(source)
    assert torch.equal(from_localmim(source, hog_bias_of_scale=2)["hog_bias"], torch.tensor([0.5, -0.5]))
    with pytest.raises(ValueError, match="hog_bias_of_scale is 4, expected 0 to 3"):
        from_localmim(source, hog_bias_of_scale=4)


def test_every_tensor_of_localmim_is_needed_in_its_shape() -> None:
    source = as_localmim(build(hog_bias=True))
    for name, tensor in source.items():
        rest = {other: x for other, x in source.items() if other != name}
        if name != "hog_enc.0.conv.bias":  # without the first there is no bias, and the second is one too many
            with pytest.raises(ValueError, match=rf"tensor {re.escape(name)} .*is missing"):
                from_localmim(rest)
        with pytest.raises(ValueError, match=r"tensor .* has shape .*expected|no Sobel filter"):
            from_localmim({**rest, name: torch.zeros(*tensor.shape, 2)})


def test_what_localmim_does_not_have_is_refused() -> None:
    source = as_localmim(build())
    with pytest.raises(ValueError, match=r"tensor blocks\.4\.gamma of shape \(3,\) is in the checkpoint"):
        from_localmim({**source, "blocks.4.gamma": torch.zeros(3)})
    with pytest.raises(ValueError, match="entry epoch of the checkpoint is a int, expected a tensor"):
        from_localmim({**source, "epoch": 3})
    with pytest.raises(ValueError, match=r"hog_enc\.1\.conv\.weight of shape \(2, 1, 3, 3\) is no Sobel filter"):
        from_localmim({**source, "hog_enc.1.conv.weight": torch.ones(2, 1, 3, 3)})


def test_mae_fills_the_encoder_and_the_last_norm() -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=5, num_heads=2, num_classes=0)
    mae = {**vit.state_dict(), "mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(16, 24)}
    mae["norm.weight"] = torch.rand(24)
    state = from_mae({"model": mae})
    model = build()
    untouched = model.state_dict()["heads.0.decoder.embed.weight"].clone()
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(name.startswith("heads.") for name in result.missing_keys)
    assert torch.equal(model.state_dict()["heads.3.norm.weight"], mae["norm.weight"])
    assert torch.equal(model.state_dict()["blocks.4.mlp.fc2.weight"], mae["blocks.4.mlp.fc2.weight"])
    assert torch.equal(model.state_dict()["heads.0.decoder.embed.weight"], untouched)


def test_mae_with_missing_or_extra_tensors_is_refused() -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=5, num_heads=2, num_classes=0)
    state = vit.state_dict()
    with pytest.raises(ValueError, match=r"tensor blocks\.2\.attn\.proj\.bias of shape \(24,\) is missing"):
        from_mae({name: x for name, x in state.items() if name != "blocks.2.attn.proj.bias"})
    with pytest.raises(ValueError, match=r"tensor patch_embed\.proj.weight with 4 dimensions is missing"):
        from_mae({name: x for name, x in state.items() if not name.startswith("patch_embed")})
    with pytest.raises(ValueError, match=r"tensor fc_norm\.weight of shape \(24,\) is in the checkpoint"):
        from_mae({**state, "fc_norm.weight": torch.zeros(24)})


def test_timm_accepts_the_export() -> None:
    size = MODEL_SIZES["vit_small_patch16"]
    model = LocalMIM(img_size=64, patch_size=16, embed_dim=384, depth=12, num_heads=6, decoder_embed_dim=32)
    assert (size.embed_dim, size.depth, size.num_heads) == (384, 12, 6)
    vit = timm.create_model("vit_small_patch16_224", img_size=64, num_classes=0, global_pool="token")
    vit.load_state_dict(to_timm(model.state_dict()), strict=True)
    images = torch.randn(1, 3, 64, 64)
    (features,) = model.encode(images, blocks=[12], norm=True)
    torch.testing.assert_close(vit.forward_features(images), features, rtol=1e-6, atol=1e-6)


def test_export_refuses_a_state_without_its_last_norm() -> None:
    state = build().state_dict()
    del state["heads.3.norm.bias"]
    with pytest.raises(ValueError, match=r"tensor norm\.bias of shape \(24,\) is missing"):
        to_timm(state)
