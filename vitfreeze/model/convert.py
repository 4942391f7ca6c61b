"""Weights of LocalMIM and MAE in, timm's out.

Every function maps a state dict to a state dict, without copying tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitfreeze.architecture import HEAD_SCALES
from vitfreeze.model.local_mim import check_state

_ENCODER = re.compile(r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|blocks\.\d+\..+")
_SOBEL = torch.tensor(
    [[[[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]], [[[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]]]
)


def from_localmim(state_dict: Mapping[str, Any], *, hog_bias_of_scale: int | None = None) -> dict[str, Tensor]:
    """Rename the weights that LocalMIM's published code saves to those of `vitfreeze.model.LocalMIM`.

    Args:
        state_dict: the weights, or a checkpoint that holds them under `model`.
        hog_bias_of_scale: which scale's pair of gradient biases all scales use from now on (0 is the finest), for a
            checkpoint whose four scales have different ones, as LocalMIM's ViT-L has.

    Raises:
        ValueError: a tensor is missing, unknown or of a shape that does not fit the others (with both shapes), the
            gradient filters are not LocalMIM's, or the scales' biases differ and none is chosen.
    """
    source = _tensors(state_dict)
    check_state(source, _localmim_shapes(source))
    for scale in range(len(HEAD_SCALES)):
        filters = source[f"hog_enc.{scale}.conv.weight"]
        if not torch.equal(filters.float().cpu(), _SOBEL):
            raise ValueError(f"tensor hog_enc.{scale}.conv.weight of shape {tuple(filters.shape)} is no Sobel filter")
    result = {}
    for name, tensor in source.items():
        if name.startswith("hog_enc."):
            continue
        name = re.sub(r"^norm\.(\d+)\.", r"heads.\1.norm.", name)
        result[re.sub(r"^decoder\.(\d+)\.", r"heads.\1.decoder.", name)] = tensor
    if "hog_enc.0.conv.bias" in source:
        result["hog_bias"] = _shared_hog_bias(source, chosen=hog_bias_of_scale)
    return result


def _shared_hog_bias(source: Mapping[str, Tensor], *, chosen: int | None) -> Tensor:
    biases = [source[f"hog_enc.{scale}.conv.bias"] for scale in range(len(HEAD_SCALES))]
    if chosen is None:
        for scale, bias in enumerate(biases):
            if not torch.equal(bias, biases[0]):
                raise ValueError(
                    f"tensor hog_enc.{scale}.conv.bias of shape {tuple(bias.shape)} differs from hog_enc.0.conv.bias "
                    f"of shape {tuple(biases[0].shape)}, while this model has one pair for all scales: choose it with "
                    "hog_bias_of_scale"
                )
        chosen = 0
    if not 0 <= chosen < len(biases):
        raise ValueError(f"hog_bias_of_scale is {chosen}, expected 0 to {len(biases) - 1}")
    return biases[chosen]


def from_mae(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the encoder out of an MAE checkpoint (pre-training, with or without its decoder).

    MAE's final norm becomes the last head's. The heads' other tensors do not exist there: load the result with
    `strict=False` into a model whose heads are initialised.

    Raises:
        ValueError: a tensor is missing or unknown, or has a shape that does not fit the others (with both shapes).
    """
    source = _tensors(state_dict)
    decoder = ("decoder_", "mask_token")
    encoder = {name: tensor for name, tensor in source.items() if not name.startswith(decoder)}
    expected = {**_encoder_shapes(encoder), **_norm_shapes("norm", _width(encoder))}
    check_state(encoder, expected)
    return {re.sub(r"^norm\.", f"heads.{len(HEAD_SCALES) - 1}.norm.", name): x for name, x in encoder.items()}


def to_timm(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take the encoder out of a `LocalMIM` state dict, as timm's VisionTransformer names it.

    `timm.create_model(..., num_classes=0, global_pool="token").load_state_dict(result)` accepts it; the final norm is
    the last head's, because that is the one the last block was trained with.

    Raises:
        ValueError: a tensor of the encoder or of the last head's norm is missing or has a shape that does not fit.
    """
    source = _tensors(state_dict)
    last = f"heads.{len(HEAD_SCALES) - 1}.norm."
    result = {name: tensor for name, tensor in source.items() if _ENCODER.fullmatch(name)}
    result |= {f"norm.{name.removeprefix(last)}": tensor for name, tensor in source.items() if name.startswith(last)}
    check_state(result, {**_encoder_shapes(result), **_norm_shapes("norm", _width(result))})
    return result


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    inner = state_dict.get("model", state_dict)
    wrong = [name for name, value in inner.items() if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"entry {wrong[0]} of the checkpoint is a {type(inner[wrong[0]]).__name__}, expected a tensor")
    return dict(inner)


def _shape(source: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    """Return the shape of a tensor that fixes the sizes of all others."""
    if name not in source:
        raise ValueError(f"tensor {name} with {dims} dimensions is missing from the checkpoint")
    if source[name].ndim != dims:
        raise ValueError(f"tensor {name} has shape {tuple(source[name].shape)}, expected {dims} dimensions")
    return tuple(source[name].shape)


def _width(source: Mapping[str, Tensor]) -> int:
    return _shape(source, "patch_embed.proj.weight", 4)[0]


def _depth(source: Mapping[str, Tensor], prefix: str) -> int:
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in source if name.startswith(prefix)]
    return max(numbers, default=0) + 1


def _norm_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}


def _block_shapes(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        **_norm_shapes(f"{prefix}.norm1", width),
        f"{prefix}.attn.qkv.weight": (3 * width, width),
        f"{prefix}.attn.qkv.bias": (3 * width,),
        f"{prefix}.attn.proj.weight": (width, width),
        f"{prefix}.attn.proj.bias": (width,),
        **_norm_shapes(f"{prefix}.norm2", width),
        f"{prefix}.mlp.fc1.weight": (hidden, width),
        f"{prefix}.mlp.fc1.bias": (hidden,),
        f"{prefix}.mlp.fc2.weight": (width, hidden),
        f"{prefix}.mlp.fc2.bias": (width,),
    }


def _encoder_shapes(source: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    width, _, side, _ = _shape(source, "patch_embed.proj.weight", 4)
    tokens = _shape(source, "pos_embed", 3)[1]
    hidden = _shape(source, "blocks.0.mlp.fc1.weight", 2)[0]
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, side, side),
        "patch_embed.proj.bias": (width,),
    }
    for block in range(_depth(source, "blocks.")):
        shapes |= _block_shapes(f"blocks.{block}", width, hidden)
    return shapes


def _localmim_shapes(source: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything a LocalMIM of this size consists of, in its authors' names."""
    shapes = _encoder_shapes(source)
    width, tokens = _width(source), shapes["pos_embed"][1]
    decoder_width = _shape(source, "decoder.0.embed.weight", 2)[0]
    hidden = _shape(source, "decoder.0.blocks.0.mlp.fc1.weight", 2)[0]
    outputs = _shape(source, "decoder.2.pred.0.weight", 4)[0]
    for scale in range(len(HEAD_SCALES)):
        prefix = f"decoder.{scale}"
        shapes |= _norm_shapes(f"norm.{scale}", width)
        shapes[f"{prefix}.mask_token"] = (1, 1, decoder_width)
        shapes[f"{prefix}.pos_embed"] = (1, tokens, decoder_width)
        shapes[f"{prefix}.embed.weight"] = (decoder_width, width)
        shapes[f"{prefix}.embed.bias"] = (decoder_width,)
        for block in range(_depth(source, "decoder.0.blocks.")):
            shapes |= _block_shapes(f"{prefix}.blocks.{block}", decoder_width, hidden)
        shapes |= _norm_shapes(f"{prefix}.norm", decoder_width)
        shapes[f"hog_enc.{scale}.conv.weight"] = (2, 1, 3, 3)
        if "hog_enc.0.conv.bias" in source:
            shapes[f"hog_enc.{scale}.conv.bias"] = (2,)
    return shapes | _predictor_shapes(decoder_width, outputs)


def _predictor_shapes(width: int, outputs: int) -> dict[str, tuple[int, ...]]:
    half, quarter = width // 2, width // 4
    return {
        "decoder.0.pred.0.weight": (width, half, 2, 2),
        "decoder.0.pred.0.bias": (half,),
        **_norm_shapes("decoder.0.pred.1", half),
        "decoder.0.pred.3.weight": (half, quarter, 2, 2),
        "decoder.0.pred.3.bias": (quarter,),
        "decoder.0.pred.4.weight": (outputs, quarter, 1, 1),
        "decoder.0.pred.4.bias": (outputs,),
        "decoder.1.pred.0.weight": (width, half, 2, 2),
        "decoder.1.pred.0.bias": (half,),
        "decoder.1.pred.1.weight": (outputs, half, 1, 1),
        "decoder.1.pred.1.bias": (outputs,),
        "decoder.2.pred.0.weight": (outputs, width, 1, 1),
        "decoder.2.pred.0.bias": (outputs,),
        "decoder.3.pred.1.weight": (outputs, width, 1, 1),
        "decoder.3.pred.1.bias": (outputs,),
    }
