"""Weights for other people's tools: timm, Hugging Face, a plain safetensors file, torch; with a card that says what
they are.

Every tensor is written in float32, from master weights where the run computed in half precision.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vitfreeze import __version__
from vitfreeze.architecture import ModelSize
from vitfreeze.data.augmentation import CROP_PCT
from vitfreeze.files import read_json_lines, replacing
from vitfreeze.hub import HubError, push_files
from vitfreeze.model import averaged_weights, to_timm
from vitfreeze.model.local_mim import LAYER_NORM_EPS
from vitfreeze.pretrained import Pretrained, read_pretrained

logger = logging.getLogger("vitfreeze")
FORMATS = ("timm", "safetensors", "hf", "torch")
FOLDERS = ("timm", "hf")
_COSTS = ("seconds", "share_of_time")
_FIGURE_NAMES = {
    "linear": "linear probe",
    "top1": "top-1",
    "top5": "top-5",
    "loss": "validation loss",
    "images": "validation images",
}
ARCHITECTURE = "vit_base_patch16_224"  # timm's class; `model_args` give it the dimensions
_TO_HF = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.layer.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.layer.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layer.\1.attention.output.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc1\.", r"encoder.layer.\1.intermediate.dense."),
    (r"^blocks\.(\d+)\.mlp\.fc2\.", r"encoder.layer.\1.output.dense."),
)


def export_run(
    location: str | Path, *, to: str, out: str | Path | None = None, push: str = "", private: bool = False
) -> Path:
    """Write the encoder, or the fine-tuned model, of a run for another tool; return the file or folder written.

    Args:
        location: a run folder, or anything else that `read_pretrained` takes.
        to: timm: a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`; safetensors: one file by
            timm's names; hf: a folder for Hugging Face's ViTModel and ViTMAEModel; torch: a .pth file as MAE's and
            LocalMIM's fine-tuning reads it. Each comes with a model card.
        out: where to; by default `export/` in the run folder, or beside the file.
        push: a repository of the Hugging Face Hub, to which the files are sent as well.
        private: whether that repository, if it is new, is seen by its owner alone.

    Raises:
        ValueError: another format, weights that cannot be read, or a fine-tuned model for Hugging Face, whose ViT
            classifies by the class token and not by the mean of the patches.
        HubError: the files are written, but could not be sent.
    """
    if to not in FORMATS:
        raise ValueError(f"--to is {to!r}, expected one of {', '.join(FORMATS)}")
    pretrained = read_pretrained(location)
    if not pretrained.is_finished:
        logger.warning("the run has not finished: these are its weights after %s", pretrained.origin)
    if to == "hf" and pretrained.is_classifier:
        raise ValueError(
            f"{pretrained.location} is a fine-tuned classifier; only encoders go to Hugging Face, whose ViT does not "
            "classify the mean of its patches: export it to timm"
        )
    target = Path(out) if out else _default_target(pretrained, to=to)
    is_folder = to in FOLDERS
    (target if is_folder else target.parent).mkdir(parents=True, exist_ok=True)
    written = _write_files(pretrained, to=to, target=target)
    card = target / "README.md" if is_folder else target.with_suffix(".md")
    card.write_text(write_model_card(pretrained, to=to, target=target), encoding="utf-8")
    if push:
        about = write_model_card(pretrained, to=to, target=target, hub=push).encode()
        files: dict[str, Path | bytes] = {**{path.name: path for path in written}, "README.md": about}
        try:
            url = push_files(files, repo=push, message=f"Export of {_name_origin(pretrained)}", private=private)
        except HubError as error:
            raise HubError(f"{error}; the export itself is in {target}") from None
        logger.info("%s holds the export", url)
    return target


def _write_files(pretrained: Pretrained, *, to: str, target: Path) -> list[Path]:
    """Write weights and what describes them to machines; return the files."""
    weights = _exported_weights(pretrained)
    metadata = {
        "format": "pt", "model_size": json.dumps(asdict(pretrained.size)), "origin": _name_origin(pretrained),
        "colours": json.dumps(pretrained.colours),
    }  # fmt: skip
    if to == "safetensors":
        _save_atomically(weights, target, metadata=metadata)
        return [target]
    if to == "torch":
        with replacing(target) as temporary:
            torch.save({"model": weights}, temporary)
        return [target]
    named = to_hugging_face(weights) if to == "hf" else weights
    _save_atomically(named, target / "model.safetensors", metadata=metadata)
    described = {"config.json": hugging_face_config(pretrained) if to == "hf" else timm_config(pretrained)}
    if to == "hf":
        described["preprocessor_config.json"] = _hugging_face_preprocessing(pretrained)
    for name, content in described.items():
        _write_json(target / name, content)
    return [target / name for name in ("model.safetensors", *described)]


def to_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an encoder's tensors from timm's names to those of Hugging Face's ViTModel and ViTMAEModel.

    The joint projection of queries, keys and values, (3D, D), becomes three of (D, D).
    """
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        joint = re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name)
        if joint:
            block, kind = joint.groups()
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[f"encoder.layer.{block}.attention.attention.{part}.{kind}"] = piece.contiguous()
            continue
        for pattern, replacement in _TO_HF:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result


def timm_config(pretrained: Pretrained) -> dict[str, Any]:
    """Return the config.json from which `timm.create_model("local-dir:FOLDER")` builds the model."""
    # LocalMIM trains the patches, but an encoder for timm keeps its norm in front of the pooling: global_pool="token".
    pool = pretrained.global_pool
    return {
        "architecture": ARCHITECTURE,
        "num_classes": pretrained.num_classes,
        "num_features": pretrained.size.embed_dim,
        "global_pool": pool,
        "model_args": {**timm_arguments(pretrained.size, img_size=pretrained.img_size), "global_pool": pool},
        "pretrained_cfg": {
            "input_size": [3, pretrained.img_size, pretrained.img_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": CROP_PCT,
            "mean": list(pretrained.colours.mean),
            "std": list(pretrained.colours.std),
            "num_classes": pretrained.num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def timm_arguments(size: ModelSize, *, img_size: int) -> dict[str, Any]:
    """Return the arguments that make timm's ViT-B one of these dimensions."""
    names = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    return {"img_size": img_size} | {name: getattr(size, name) for name in names}


def hugging_face_config(pretrained: Pretrained) -> dict[str, Any]:
    """Return the config.json of Hugging Face's ViTModel; ViTMAEModel reads the same dimensions from it."""
    size = pretrained.size
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": size.embed_dim,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.num_heads,
        "intermediate_size": int(size.embed_dim * size.mlp_ratio),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": LAYER_NORM_EPS,
        "image_size": pretrained.img_size,
        "patch_size": size.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
    }


def write_model_card(pretrained: Pretrained, *, to: str, target: Path, hub: str = "") -> str:
    """Return the model card in Markdown: what it is, how to load it, how it was made, and what it measured.

    A card for a repository of the `hub` begins with what the Hub reads, and names no path of this machine.
    """
    size = pretrained.size
    kind = "classifier, fine-tuned from an encoder" if pretrained.is_classifier else "encoder, without a classifier,"
    library = {"hf": "transformers"}.get(to, "timm")
    task = "image-classification" if pretrained.is_classifier else "image-feature-extraction"
    front = ["---", f"library_name: {library}", f"pipeline_tag: {task}", "tags: [vitfreeze]", "---", ""]
    lines = [
        *(front if hub else ()),
        f"# Vision Transformer, {size.depth} blocks of width {size.embed_dim}",
        "",
        f"A {kind} pre-trained with LocalMIM. Written by vitfreeze {__version__} from "
        f"{_name_origin(pretrained) if hub else pretrained.origin}.",
        "",
        "## Loading",
        "",
        "```python",
        *_loading_lines(pretrained, to=to, target=target, hub=hub),
        "```",
        "",
        f"Images: {pretrained.img_size} x {pretrained.img_size} pixels (shorter side resized bicubically to "
        f"{round(pretrained.img_size / CROP_PCT)}, central crop), RGB from 0 to 1, less the mean "
        f"{list(pretrained.colours.mean)}, divided by {list(pretrained.colours.std)}. "
        "Features: the mean of the patch tokens, without the class token.",
        "",
        "## Training",
        "",
        *_training_lines(pretrained, is_public=bool(hub)),
        "",
        "## Precision",
        "",
        *_precision_lines(pretrained),
    ]
    return "\n".join(lines) + "\n"


def _loading_lines(pretrained: Pretrained, *, to: str, target: Path, hub: str) -> list[str]:
    pool = pretrained.global_pool
    arguments = {**timm_arguments(pretrained.size, img_size=pretrained.img_size), "num_classes": pretrained.num_classes}
    plain = [
        f"arguments = {arguments}",
        f'model = timm.create_model("{ARCHITECTURE}", global_pool="{pool}", **arguments)',
    ]
    if to == "timm":
        where = f"hf-hub:{hub}" if hub else f"local-dir:{target}"
        return ["import timm", f'model = timm.create_model("{where}", pretrained=True)']
    if to == "hf":
        load = f'model = ViTModel.from_pretrained("{hub or target}", add_pooling_layer=False)'
        return ["from transformers import ViTModel", load]
    file = f'hf_hub_download("{hub}", "{target.name}")' if hub else f'"{target}"'
    load = f"load_file({file})" if to == "safetensors" else f'torch.load({file}, weights_only=True)["model"]'
    return [
        "import timm" if to == "safetensors" else "import timm, torch",
        *(["from huggingface_hub import hf_hub_download"] if hub else ()),
        *(["from safetensors.torch import load_file"] if to == "safetensors" else ()),
        *plain,
        f"model.load_state_dict({load}, strict=True)",
    ]


def _training_lines(pretrained: Pretrained, *, is_public: bool) -> list[str]:
    config, checkpoint = pretrained.config, pretrained.checkpoint
    if config is None or checkpoint is None:
        return [f"Not a run of vitfreeze: {pretrained.origin}. How it was trained is not recorded there."]
    freeze, counters = config.freeze, checkpoint.manifest["scalars"]
    schedule = {
        "off": "nothing frozen",
        "adaptive": "layers frozen when they stopped changing",
        "schedule": f"FreezeOut, t_0 {freeze.t_0:g}, {freeze.how}, rates {config.rates}",
    }[freeze.mode]
    folder = checkpoint.path.parent.parent
    rows = {
        "run": folder.name,
        "data": ", ".join(
            place.rstrip("/").rpartition("/")[2] if is_public else place for place in config.data.train_shards
        ),
        "length": f"{config.run.length}, of which {checkpoint.step} steps were taken",
        "state": "finished" if pretrained.is_finished else "NOT FINISHED",
        "global batch": str(config.batch.global_size),
        "learning rate": f"{config.base_lr:g}, warm-up {config.optim.warmup}",
        "schedule": schedule,
        "frozen at the end": f"{checkpoint.frozen_layers} of {pretrained.size.num_layers} layers",
        "skipped steps": str(counters.get("skipped_steps", 0)),
        "seed": str(config.run.seed),
        "began with": config.model.init_from or "random weights",
        **_figures(folder, step=checkpoint.step),
    }
    return [
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        *([] if is_public else ["", f"All settings are in `{folder / 'config.yaml'}`."]),
    ]


def _figures(folder: Path, *, step: int) -> dict[str, str]:
    """Return what the run measured last before `step`."""
    figures = {}
    metrics = [line for line in read_json_lines(folder / "metrics.jsonl") if line["step"] <= step]
    if metrics:
        if metrics[-1]["loss"] is not None:  # as JSON has a loss that was not finite
            figures["training loss"] = f"{metrics[-1]['loss']:.4f}"
        figures["images per second"] = f"{metrics[-1]['images_per_second']:.1f}"
    evaluated = [line["eval"] for line in metrics if "eval" in line]
    if evaluated:
        worth = {name: value for name, value in evaluated[-1].items() if name not in _COSTS}
        figures |= {_FIGURE_NAMES.get(name, name): f"{value:.4g}" for name, value in worth.items()}
    return figures


def _precision_lines(pretrained: Pretrained) -> list[str]:
    """Say of each layer whether its float32 values are exact or were rounded before they were saved."""
    rows: dict[str, set[str]] = {}
    for name in _exported_weights(pretrained):
        source = name if name in pretrained.weights else f"heads.3.{name}"
        layer = re.sub(r"^blocks\.(\d+)\..*", lambda match: f"block {int(match[1]) + 1}", name)
        layer = "patch embedding" if name.startswith(("patch_embed", "cls_token", "pos_embed")) else layer
        layer = "final norm" if name.startswith(("norm.", "fc_norm.")) else layer
        layer = "classifier" if name.startswith("head.") else layer
        dtype = pretrained.rounded.get(source)
        rows.setdefault(layer, set()).add(f"rounded to {dtype} in the run" if dtype else "exact")
    lines = ["All tensors are stored in float32.", "", "| layer | values |", "|---|---|"]
    return lines + [f"| {layer} | {', '.join(sorted(values))} |" for layer, values in rows.items()]


def _exported_weights(pretrained: Pretrained) -> dict[str, Tensor]:
    is_classifier = pretrained.is_classifier
    weights = averaged_weights(pretrained.weights) if is_classifier else to_timm(pretrained.weights)
    return {name: tensor.float().contiguous() for name, tensor in weights.items()}


def _name_origin(pretrained: Pretrained) -> str:
    """Return where weights come from by names alone: the paths of a machine are no business of those who load them."""
    checkpoint = pretrained.checkpoint
    place = checkpoint.path.parent.parent if checkpoint is not None else Path(pretrained.location)
    return pretrained.origin.replace(f"in {place}", place.name)


def _default_target(pretrained: Pretrained, *, to: str) -> Path:
    location = Path(pretrained.location.replace(":", "_"))
    if pretrained.checkpoint is not None:
        parent = pretrained.checkpoint.path.parent.parent / "export"
    else:
        parent = location.parent / f"{location.stem}_export"
    return parent / {"timm": "timm", "hf": "hf", "safetensors": "encoder.safetensors", "torch": "encoder.pth"}[to]


def _save_atomically(weights: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    with replacing(path) as temporary:
        save_file(dict(weights), temporary, metadata=dict(metadata))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _hugging_face_preprocessing(pretrained: Pretrained) -> dict[str, Any]:
    img_size = pretrained.img_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": img_size, "width": img_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pretrained.colours.mean),
        "image_std": list(pretrained.colours.std),
    }
