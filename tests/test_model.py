"""LocalMIM beside a second, plain implementation, at every length of the frozen prefix and in every precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layers import head_of, layer_of
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitfreeze.architecture import HEAD_SCALES, active_heads, tap_blocks
from vitfreeze.engine.units import assign_units
from vitfreeze.model import to_timm
from vitfreeze.model.hog import histogram_by_comparison, hog_targets
from vitfreeze.model.local_mim import LocalMIM, sincos_positions

SMALL: Mapping[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": 7,
    "num_heads": 3,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "hog_nbins": 9,
}
DEPTH = SMALL["depth"]


def build(**changes: Any) -> LocalMIM:
    torch.manual_seed(0)
    model = LocalMIM(**{**SMALL, **changes})
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def batch(model: LocalMIM, *, size: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, model.img_size, model.img_size, generator=generator)
    return images, torch.rand(size, model.num_patches, generator=generator)


def gradients(model: LocalMIM) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


# ------------------------------------------------------------------ a second implementation, as plain as can be


def plain_losses(model: LocalMIM, images: Tensor, noise: Tensor, *, frozen_layers: int = 0) -> dict[int, Tensor]:
    """LocalMIM step by step: embed all, drop, encode under no_grad as far as frozen, decode everything, convolve."""
    grid, sides = model.grid_size, len(images)
    with torch.set_grad_enabled(frozen_layers == 0):
        tokens = model.patch_embed(images) + model.pos_embed[:, 1:]
        order = noise.argsort(dim=1)
        kept = order[:, : model.num_visible, None].expand(-1, -1, tokens.shape[2])
        cls_token = (model.cls_token + model.pos_embed[:, :1]).expand(sides, -1, -1)
        tokens = torch.cat([cls_token, tokens.gather(1, kept)], dim=1)
    mask = torch.ones_like(noise).scatter(1, order[:, : model.num_visible], 0.0)
    taps = tap_blocks(model.depth)
    losses = {}
    for number, block in enumerate(model.blocks, start=1):
        with torch.set_grad_enabled(number >= frozen_layers):
            tokens = plain_block(block, tokens)
        for k in (k for k, tap in enumerate(taps) if tap == number and number >= frozen_layers):
            prediction = plain_prediction(model, k, model.heads[k].norm(tokens), order)
            cell = int(model.patch_size / HEAD_SCALES[k])
            (target,) = hog_targets(images, cell_sizes=[cell], nbins=model.hog_nbins, bias=model.hog_bias)
            weight = F.interpolate(mask.view(sides, 1, grid, grid), scale_factor=HEAD_SCALES[k], mode="area").flatten(1)
            losses[k] = ((prediction - target).square().mean(dim=2) * weight).sum() / weight.sum()
    return dict(sorted(losses.items()))


def plain_block(block: nn.Module, tokens: Tensor) -> Tensor:
    return Block.forward(block, tokens)


def plain_prediction(model: LocalMIM, k: int, latents: Tensor, order: Tensor) -> Tensor:
    decoder, grid = model.heads[k].decoder, model.grid_size
    tokens = decoder.embed(latents)
    masked = decoder.mask_token.expand(len(tokens), order.shape[1] - model.num_visible, -1)
    patches = torch.cat([tokens[:, 1:], masked], dim=1)
    back = order.argsort(dim=1)[..., None].expand_as(patches)
    tokens = torch.cat([tokens[:, :1], patches.gather(1, back)], dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        tokens = plain_block(block, tokens)
    image = decoder.norm(tokens)[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    for layer in decoder.pred:
        if isinstance(layer, nn.LayerNorm):
            image = layer(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        else:
            image = layer(image)
    return image.flatten(2).transpose(1, 2)


# ------------------------------------------------------------------ exactness


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"img_size": 64, "patch_size": 16, "hog_nbins": 18, "hog_bias": True},
        {"img_size": 48, "patch_size": 12, "mask_ratio": 0.6},
        {"img_size": 80, "patch_size": 20, "mlp_ratio": 3.0},
        {"img_size": 40, "patch_size": 4, "mask_ratio": 0.9, "hog_nbins": 5},
        {"img_size": 16, "patch_size": 8, "depth": 4, "hog_nbins": 7},
        {"decoder_depth": 3, "decoder_embed_dim": 32, "decoder_num_heads": 4},
        {"depth": 5, "embed_dim": 32, "num_heads": 1},
        {"depth": 6, "hog_bias": True, "hog_nbins": 1},
    ],
)
def test_equals_the_plain_implementation(changes: dict[str, Any]) -> None:
    model = build(**changes)
    images, noise = batch(model)
    output = model(images, noise=noise)
    output.loss.backward()
    fast = gradients(model)
    model.zero_grad()
    losses = plain_losses(model, images, noise)
    torch.stack(list(losses.values())).sum().backward()
    plain = gradients(model)
    assert output.heads == tuple(losses)
    torch.testing.assert_close(output.losses, tuple(losses.values()), rtol=1e-5, atol=0)
    assert fast.keys() == plain.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("changes", [{}, {"decoder_depth": 2, "img_size": 48, "patch_size": 12}])
def test_predict_shows_what_forward_weighs(changes: dict[str, Any]) -> None:
    model = build(**changes)
    images, noise = batch(model)
    output = model(images, noise=noise)
    seen = model.predict(images, noise=noise)
    assert tuple(seen) == output.heads
    for loss, head in zip(output.losses, seen.values(), strict=True):
        errors = (head.predictions - head.targets).square().mean(dim=2)
        torch.testing.assert_close((errors * head.weights).sum() / head.weights.sum(), loss, rtol=1e-5, atol=0)


def test_smallest_noise_stays_visible() -> None:
    model = build()
    images, noise = batch(model)
    mask = model.predict(images, noise=noise)[2].weights
    threshold = noise.sort(dim=1).values[:, model.num_visible - 1 : model.num_visible]
    assert torch.equal(mask, (noise > threshold).float())


def test_noise_is_drawn_when_none_is_given() -> None:
    model = build()
    images, _ = batch(model)
    torch.manual_seed(1)
    first, second = model(images).loss, model(images).loss
    assert first != second
    torch.manual_seed(1)
    assert model(images).loss == first


def test_positions_are_those_of_mae() -> None:
    positions = sincos_positions(3, 8)
    assert positions.shape == (1, 10, 8)
    assert (positions[0, 0] == 0).all()
    for patch in range(9):
        row, column = divmod(patch, 3)
        expected = [
            function(coordinate / 10000 ** (i / 2)) for coordinate in (column, row) for function in (math.sin, math.cos)
            for i in range(2)
        ]  # fmt: skip
        torch.testing.assert_close(positions[0, 1 + patch], torch.tensor(expected))


@pytest.mark.parametrize(("img_size", "patch_size"), [(32, 8), (48, 12)])
def test_encode_equals_timm(img_size: int, patch_size: int) -> None:
    model = build(img_size=img_size, patch_size=patch_size)
    vit = VisionTransformer(
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=SMALL["embed_dim"],
        depth=DEPTH,
        num_heads=SMALL["num_heads"],
        num_classes=0,
        global_pool="token",
    )
    vit.load_state_dict(to_timm(model.state_dict()))
    images, _ = batch(model)
    expected = vit.get_intermediate_layers(images, n=DEPTH, return_prefix_tokens=True)
    features = model.encode(images)
    assert len(features) == DEPTH
    for feature, (patches, prefix) in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, torch.cat([prefix, patches], dim=1), rtol=1e-6, atol=1e-6)
    (final,) = model.encode(images, blocks=[DEPTH], norm=True)
    torch.testing.assert_close(final, vit.forward_features(images), rtol=1e-6, atol=1e-6)
    fourth, second = model.encode(images, blocks=[4, 2])
    assert torch.equal(fourth, features[3])
    assert torch.equal(second, features[1])


# ------------------------------------------------------------------ freezing


@pytest.mark.parametrize("frozen_layers", range(DEPTH + 1))
def test_frozen_prefix_equals_no_grad_by_hand(frozen_layers: int) -> None:
    model = build()
    images, noise = batch(model)
    assert all(weight.requires_grad for weight in model.parameters())
    output = model(images, noise=noise, frozen_layers=frozen_layers)
    losses = plain_losses(model, images, noise, frozen_layers=frozen_layers)
    heads = active_heads(model.units, frozen_layers)
    assert output.heads == heads == tuple(losses)
    torch.testing.assert_close(output.losses, tuple(losses.values()), rtol=1e-5, atol=0)
    torch.testing.assert_close(output.loss, torch.stack(list(losses.values())).sum(), rtol=1e-5, atol=0)

    output.loss.backward()
    fast = gradients(model)
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    plain = gradients(model)
    assert fast.keys() == plain.keys() == expected_to_train(model, frozen_layers)
    for name, gradient in plain.items():
        torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}")


def expected_to_train(model: LocalMIM, frozen_layers: int) -> set[str]:
    names = set()
    for name, _ in model.named_parameters():
        layer, head = layer_of(name), head_of(name)
        position = tap_blocks(DEPTH)[head] if head is not None else layer
        assert position is not None
        if position >= frozen_layers:
            names.add(name)
    return names


@pytest.mark.parametrize("frozen_layers", range(1, DEPTH + 1))
def test_frozen_prefix_keeps_no_activations(frozen_layers: int) -> None:
    model = build()
    images, noise = batch(model)
    frozen = {id(w) for n, w in model.named_parameters() if n not in expected_to_train(model, frozen_layers)}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(id(x)), x)[1], lambda x: x):
        model(images, noise=noise, frozen_layers=frozen_layers)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved_fully.append(id(x)), x)[1], lambda x: x):
        saved_fully: list[int] = []
        model(images, noise=noise, frozen_layers=frozen_layers - 1)
    assert not frozen & set(saved)
    assert len(saved) < len(saved_fully)


@pytest.mark.parametrize("frozen_layers", [1, 2, 3, 7])
@pytest.mark.parametrize("free", ["freeze_cls_token", "freeze_patch_embed"])
def test_what_is_not_frozen_gets_its_gradient_through_the_prefix(frozen_layers: int, free: str) -> None:
    model = build(**{free: False})
    images, noise = batch(model)
    output = model(images, noise=noise, frozen_layers=frozen_layers)
    output.loss.backward()
    fast = gradients(model)
    model.zero_grad()
    losses = plain_losses(model, images, noise)
    torch.stack([losses[k] for k in output.heads]).sum().backward()
    plain = gradients(model)
    kept = {"cls_token"} if free == "freeze_cls_token" else {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert fast.keys() == expected_to_train(model, frozen_layers) | kept
    for name, gradient in fast.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("freeze_cls_token", [True, False])
def test_prefix_in_half_precision_under_a_float32_rest(dtype: torch.dtype, freeze_cls_token: bool) -> None:
    model = build(freeze_cls_token=freeze_cls_token)
    images, noise = batch(model)
    exact = model(images, noise=noise, frozen_layers=4)
    model.patch_embed.to(dtype)
    model.blocks[:3].to(dtype)
    output = model(images, noise=noise, frozen_layers=4)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.losses, exact.losses, rtol=0.03, atol=0)
    assert output.losses != exact.losses
    trained = expected_to_train(model, 4) | (set() if freeze_cls_token else {"cls_token"})
    assert gradients(model).keys() == trained
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())


def test_activation_checkpointing_changes_no_number() -> None:
    model, recomputing = build(), build(activation_checkpointing=True)
    images, noise = batch(model)
    for frozen_layers in (0, 3):
        for one in (model, recomputing):
            one.zero_grad()
            one(images, noise=noise, frozen_layers=frozen_layers).loss.backward()
        assert gradients(model).keys() == gradients(recomputing).keys()
        for name, gradient in gradients(model).items():
            assert torch.equal(gradient, gradients(recomputing)[name]), name


def test_scale_weights_multiply_the_losses() -> None:
    model = build(scale_weights=(1.0, 2.0, 0.0, 0.5))
    images, noise = batch(model)
    output = model(images, noise=noise)
    torch.testing.assert_close(output.losses, tuple(plain_losses(model, images, noise).values()), rtol=1e-5, atol=0)
    expected = output.losses[0] + 2 * output.losses[1] + 0.5 * output.losses[3]
    torch.testing.assert_close(output.loss, expected)
    other = model(images, noise=noise, frozen_layers=3, scale_weights=(9.0, 1.0, 1.0, 3.0))
    torch.testing.assert_close(other.loss, other.losses[0] + other.losses[1] + 3 * other.losses[2])


# ------------------------------------------------------------------ precision and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_targets_and_losses_in_float32(dtype: torch.dtype) -> None:
    model = build(hog_bias=True)
    images = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float() * 4.8 - 2.2
    noise = batch(model)[1]
    exact = model.predict(images, noise=noise)
    model.to(dtype)
    seen = model.predict(images, noise=noise)
    output = model(images, noise=noise)
    output.loss.backward()
    for k, head in seen.items():
        assert torch.equal(head.targets, exact[k].targets)
        assert head.predictions.dtype == dtype
    assert {loss.dtype for loss in (output.loss, *output.losses)} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    torch.testing.assert_close(output.loss, plain_total(exact), rtol=0.05, atol=0)


def plain_total(seen: Mapping[int, Any]) -> Tensor:
    errors = {k: (head.predictions - head.targets).square().mean(dim=2) for k, head in seen.items()}
    return torch.stack([(errors[k] * seen[k].weights).sum() / seen[k].weights.sum() for k in seen]).sum()


def test_autocast_leaves_targets_and_losses_in_float32() -> None:
    model = build()
    images, noise = batch(model)
    exact = model(images, noise=noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, noise=noise, frozen_layers=0)
    assert {loss.dtype for loss in output.losses} == {torch.float32}
    torch.testing.assert_close(output.losses, exact.losses, rtol=0.03, atol=0)


@pytest.mark.parametrize("frozen_layers", [0, 4])
def test_a_step_never_looks_at_values(frozen_layers: int) -> None:
    """Tensors on the meta device have no values: any synchronisation or shape that depends on data would fail."""
    with torch.device("meta"):
        model = LocalMIM(**SMALL, hog_bias=True)
        output = model(torch.empty(2, 3, 32, 32), frozen_layers=frozen_layers)
    output.loss.backward()
    assert gradients(model).keys() == expected_to_train(model, frozen_layers)


def test_hog_bias_comes_from_its_seed_and_not_from_the_global_one() -> None:
    torch.manual_seed(1)
    first = build(hog_bias=True).hog_bias
    torch.manual_seed(2)
    same, other = build(hog_bias=True).hog_bias, build(hog_bias=True, hog_bias_seed=1).hog_bias
    assert first is not None
    assert other is not None
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert other.abs().max() <= 1 / 3
    assert build().hog_bias is None


@pytest.mark.slow
def test_compiled_parts_survive_a_longer_prefix() -> None:
    model = build()
    compiled = copy.deepcopy(model)
    compiled.compile_parts(backend="aot_eager")  # the same graphs as inductor's, without minutes of C++
    images, noise = batch(model)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    graphs = []
    for frozen_layers in range(DEPTH + 1):
        for one in (model, compiled):
            one.zero_grad()
        expected = model(images, noise=noise, frozen_layers=frozen_layers)
        output = compiled(images, noise=noise, frozen_layers=frozen_layers)
        torch.testing.assert_close(output.losses, expected.losses, rtol=1e-4, atol=1e-6)
        expected.loss.backward()
        output.loss.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradients(compiled)[name], gradient, rtol=1e-3, atol=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert list(compiled.state_dict()) == list(model.state_dict())
    # With 1 layer frozen the first block's input needs no gradient, with 2 a block is frozen; nothing new after that.
    assert graphs[0] < graphs[1] < graphs[2] == graphs[-1]


# ------------------------------------------------------------------ names and bad input


@pytest.mark.parametrize("apart", [(), ("cls_token",), ("cls_token", "patch_embed")])
def test_units_own_every_parameter_once(apart: tuple[str, ...]) -> None:
    model = build(hog_bias=True, **{f"freeze_{name}": False for name in apart})
    units = assign_units([name for name, _ in model.named_parameters()], model.freeze_units())
    assert set(units.values()) == set(model.units)
    for name, unit in units.items():
        own = name.split(".")[0] in apart
        assert (unit.layer, unit.head) == ((None, None) if own else (layer_of(name), head_of(name))), name
        assert unit.feeds_layers == own
        leaves_with = layer_of(name) if unit.head is None else tap_blocks(DEPTH)[unit.head]
        assert unit.leaves_with == (None if own else leaves_with)


def bad_pixel(value: float) -> Tensor:
    images = torch.zeros(2, 3, 32, 32)
    images[1, 2, 5, 7] = value
    return images


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.zeros(2, 1, 32, 32), {}, r"images has shape \(2, 1, 32, 32\), expected \(batch, 3, height, width\)"),
        (torch.zeros(3, 32, 32), {}, r"images has shape \(3, 32, 32\)"),
        (torch.zeros(2, 3, 36, 32), {}, r"images has shape \(2, 3, 36, 32\).*not multiples of patch_size 8"),
        (torch.zeros(2, 3, 40, 40), {}, r"images has shape \(2, 3, 40, 40\), expected \(2, 3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), {}, "dtype torch.uint8"),
        (bad_pixel(math.nan), {}, r"images of shape \(2, 3, 32, 32\) holds 1 values that are NaN"),
        (bad_pixel(math.inf), {}, "holds 1 values that are NaN or infinite"),
        (torch.zeros(2, 3, 32, 32), {"noise": torch.rand(2, 15)}, r"noise has shape \(2, 15\), expected \(2, 16\)"),
        (torch.zeros(2, 3, 32, 32), {"noise": torch.rand(1, 16)}, r"noise has shape \(1, 16\), expected \(2, 16\)"),
        (torch.zeros(2, 3, 32, 32), {"frozen_layers": -1}, "frozen_layers is -1, expected 0 to depth 7"),
        (torch.zeros(2, 3, 32, 32), {"frozen_layers": 8}, "frozen_layers is 8, expected 0 to depth 7"),
        (torch.zeros(2, 3, 32, 32), {"scale_weights": (1.0, 1.0)}, "scale_weights has 2 numbers, expected 4"),
    ],
)
def test_bad_batches_are_refused(images: Tensor, options: dict[str, Any], message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        model(images, **options)
    if "scale_weights" not in options:
        with pytest.raises(ValueError, match=message):
            model.predict(images, **options)
    if not options:
        with pytest.raises(ValueError, match=message):
            model.encode(images)


def test_a_nan_reaches_the_loss_where_checking_would_synchronise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an accelerator does, played through on the CPU: no check of values, histogram by comparison."""
    monkeypatch.setattr("vitfreeze.model.local_mim.check_images", lambda images: None)
    monkeypatch.setattr("vitfreeze.model.hog.check_images", lambda images: None)
    monkeypatch.setattr("vitfreeze.model.hog.histogram_by_scatter", histogram_by_comparison)
    model = build()
    images, noise = batch(model)
    assert model(images, noise=noise).loss.isfinite()
    for row, column in ((0, 0), (5, 7), (31, 31), (16, 30)):
        spoiled = images.clone()
        spoiled[0, 1, row, column] = math.nan
        assert model(spoiled, noise=noise).loss.isnan()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 36}, "img_size 36 is not a multiple of patch_size 8"),
        ({"img_size": 42, "patch_size": 14}, "14 / 4 = 3.5"),
        ({"img_size": 24}, "3 x 3 patch grid"),
        ({"depth": 3}, "depth 3 is too small"),
        ({"embed_dim": 22, "num_heads": 2}, "width 22 must be a multiple of 4"),
        ({"num_heads": 5}, "embed_dim 24 is not a multiple of its 5 attention heads"),
        ({"decoder_num_heads": 3}, "decoder_embed_dim 16 is not a multiple of its 3 attention heads"),
        ({"mask_ratio": 0.99}, r"int\(16 \* \(1 - 0.99\)\) = 0 of 16 patches visible"),
        ({"mask_ratio": 0.0}, "= 16 of 16 patches visible"),
        ({"hog_nbins": 0}, "hog_nbins 0"),
        ({"decoder_depth": 0}, "decoder_depth 0"),
        ({"scale_weights": (1.0,)}, "scale_weights has 1 numbers, expected 4"),
    ],
)
def test_impossible_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalMIM(**{**SMALL, **changes})


def test_encode_refuses_unknown_blocks() -> None:
    for blocks in ([0], [8], []):
        with pytest.raises(ValueError, match="expected numbers from 1 to depth 7"):
            build().encode(torch.zeros(1, 3, 32, 32), blocks=blocks)


def test_state_that_does_not_fit_is_refused() -> None:
    model = build()
    state = model.state_dict()
    name = "blocks.2.attn.qkv.weight"
    with pytest.raises(ValueError, match=rf"tensor {name} of shape \(72, 24\) is missing"):
        model.load_state_dict({key: x for key, x in state.items() if key != name})
    with pytest.raises(ValueError, match=rf"tensor {name} has shape \(24, 72\), expected \(72, 24\)"):
        model.load_state_dict({**state, name: state[name].t()})
    with pytest.raises(ValueError, match=r"tensor extra of shape \(3,\) is in the checkpoint"):
        model.load_state_dict({**state, "extra": torch.zeros(3)})
    model.load_state_dict({"cls_token": state["cls_token"]}, strict=False)
    with pytest.raises(ValueError, match=r"tensor cls_token has shape \(3,\), expected \(1, 1, 24\)"):
        model.load_state_dict({"cls_token": torch.zeros(3)}, strict=False)


@pytest.mark.parametrize("frozen_layers", [0, 3])
@pytest.mark.parametrize("mask_ratio", [0.5, 0.75])
def test_a_mask_ratio_for_one_step_is_that_of_another_model(mask_ratio: float, frozen_layers: int) -> None:
    model, other = build(), build(mask_ratio=mask_ratio)
    images, noise = batch(model)
    here = model(images, noise=noise, frozen_layers=frozen_layers, mask_ratio=mask_ratio, decoded_share=1.0)
    there = other(images, noise=noise, frozen_layers=frozen_layers)
    assert [loss.item() for loss in here.losses] == [loss.item() for loss in there.losses]


def test_a_share_decoded_is_as_if_the_other_masked_patches_were_not_there() -> None:
    """Each scale's loss against the plain decoder, given only the tokens of the patches that are left."""
    model = build()
    images, noise = batch(model)
    order = noise.argsort(dim=1)[:, : model.num_visible + 6]  # half of the 12 masked ones
    taps, _, targets = model._encode_visible(images, noise=noise, frozen_layers=0, num_visible=model.num_visible)
    output = model(images, noise=noise, decoded_share=0.5)
    for k, scale in enumerate(HEAD_SCALES):
        decoder = model.heads[k].decoder
        total, weights = torch.zeros(()), 0.0
        for i, ids in enumerate(order):
            latents = model.heads[k].norm(taps[k][i : i + 1])
            masked = decoder.mask_token.expand(1, 6, -1)
            positions = torch.cat([decoder.pos_embed[:, :1], decoder.pos_embed[:, 1:][:, ids]], dim=1)
            tokens = torch.cat([decoder.embed(latents), masked], dim=1) + positions
            for block in decoder.blocks:
                tokens = plain_block(block, tokens)
            tokens = decoder.norm(tokens)[0, 1:]
            if scale < 1:
                for cell, patches in enumerate(decoder.cell_order):
                    there = [place for place, patch in enumerate(ids.tolist()) if patch in patches.tolist()]
                    weight = sum(place >= model.num_visible for place in there) / 4
                    if weight:
                        prediction = decoder.pred(tokens[there].mean(dim=0)[None, None])[0, 0, 0]
                        total = total + weight * (prediction - targets[k][i, cell]).square().mean()
                        weights += weight
            else:
                predictions = decoder.pred(tokens[None, model.num_visible :])[0]
                cells = decoder.cell_order[ids[model.num_visible :]]
                total = total + (predictions - targets[k][i][cells]).square().mean(dim=-1).sum()
                weights += cells.numel()
        assert output.losses[k].item() == pytest.approx((total / weights).item(), rel=1e-5), scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.99}, "= 0 of 16 patches visible"),
        ({"decoded_share": 0.05}, "decoded_share is 0.05, expected above 0 to 1, and a patch of 12"),
        ({"decoded_share": 1.5}, "decoded_share is 1.5"),
    ],
)
def test_shares_without_a_patch_are_refused(options: dict[str, float], message: str) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        model(batch(model)[0], **options)
