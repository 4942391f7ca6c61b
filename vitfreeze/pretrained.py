"""Weights to begin with or to look at: a run of ours, an export of ours, LocalMIM's or MAE's files, timm's models."""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from vitfreeze.architecture import HEAD_SCALES, MODEL_SIZES, ModelSize
from vitfreeze.checkpoint import Checkpoint, find_checkpoint, read_weights
from vitfreeze.config import Colours, Config
from vitfreeze.data.normalization import IMAGENET
from vitfreeze.extensions import make_target
from vitfreeze.files import parse_json, suggest_path
from vitfreeze.model import LocalMIM, averaged_weights, check_state, from_localmim, from_mae, to_timm
from vitfreeze.text import find_nearest

TIMM_PREFIX = "timm:"
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_WORDS_FOR_WEIGHTS = ("model", "state_dict", "teacher", "student")
HALF = ("bfloat16", "float16")
LAST_NORM = f"heads.{len(HEAD_SCALES) - 1}.norm."
# Bookkeeping of a HOG target or of a decoder's positions; a model makes its own.
_OTHERS = ("hog_bias", "heads.")


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights and where they come from.

    Attributes:
        weights: float32 tensors by the names of `LocalMIM`, or of timm when `is_classifier`.
        size: dimensions of the encoder.
        img_size: side of the images that its positions are made for, in pixels.
        origin: where they come from, in words.
        location: the run folder, file or name that was given.
        checkpoint: ours, if it is one of ours.
        config: the settings of our run.
        colours: what the images that they were trained on were normalised by; ImageNet's, if nothing says so.
        rounded: dtype of each tensor that its source held in half precision, by name.
    """

    weights: Mapping[str, Tensor]
    size: ModelSize
    img_size: int
    origin: str
    location: str
    checkpoint: Checkpoint | None = None
    config: Config | None = None
    colours: Colours = IMAGENET
    rounded: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_classifier(self) -> bool:
        """Whether this is a fine-tuned model, with a classifier in place of LocalMIM's heads."""
        return "head.weight" in self.weights

    @property
    def num_classes(self) -> int:
        """Outputs of the classifier; 0 without one."""
        return len(self.weights["head.bias"]) if self.is_classifier else 0

    @property
    def global_pool(self) -> str:
        """What timm pools by to load these weights: a norm behind the pooling is that of the mean of the patches."""
        return "avg" if "fc_norm.weight" in self.weights else "token"

    @property
    def is_finished(self) -> bool:
        """Whether the run reached its last step; of weights from elsewhere, nothing else is known."""
        return self.checkpoint is None or self.checkpoint.step >= int(self.checkpoint.extra.get("total_steps", 0))


def read_pretrained(location: str | Path) -> Pretrained:
    """Read weights from wherever they are.

    Args:
        location: a run folder (its newest whole checkpoint), one checkpoint in it, a .pth file of LocalMIM, MAE or
            DINO, a .safetensors file that `vitfreeze export` or timm wrote, or 'timm:' with the name of a model that
            timm fetches from its hub. Nothing is unpickled but tensors, plain containers and the arguments beside them.

    Raises:
        ValueError: nothing there can be used; the message says what was found and what is allowed.
    """
    text, path = str(location), Path(location)
    if text.startswith(TIMM_PREFIX):
        return _read_timm(text)
    if path.is_dir():
        return _read_run(path)
    if not path.exists():
        raise ValueError(f"there is no run folder or file of weights {text!r}{suggest_path(path)}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _read_torch(path)
    raise ValueError(
        f"{text!r} is neither a run folder nor a file that ends in .safetensors, {', '.join(TORCH_SUFFIXES)}"
    )


def encoder_weights(pretrained: Pretrained) -> dict[str, Tensor]:
    """Return the encoder by timm's names, without anybody's classifier or heads; averaged, if there is an average."""
    if not pretrained.is_classifier:
        return to_timm(pretrained.weights)
    weights = averaged_weights(pretrained.weights)
    return {name: x for name, x in weights.items() if not name.startswith(("head.", "fc_norm."))}


def build_encoder(pretrained: Pretrained, **options: Any) -> LocalMIM:
    """Return a LocalMIM with these weights; heads that the source does not have keep their random ones.

    Args:
        pretrained: weights of an encoder.
        options: further arguments of `LocalMIM`; those of our own run are the defaults.

    Raises:
        ValueError: the weights are those of a classifier, their shapes do not fit, or the target of their heads is not
            installed.
    """
    if pretrained.is_classifier:
        weights = from_mae(_with_norm(encoder_weights(pretrained)))
    else:
        weights = dict(pretrained.weights)
    own: dict[str, Any] = {}
    if pretrained.config is not None and not pretrained.is_classifier:
        model = pretrained.config.model
        target = make_target(model.target)
        own = {
            "target": target,
            "hog_nbins": model.hog_nbins,
            "hog_bias": model.hog_bias,
            "mask_ratio": model.mask_ratio,
        }
    made = LocalMIM(**asdict(pretrained.size), img_size=pretrained.img_size, **{**own, **options})
    load_encoder(made, weights)
    return made


def _with_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add a plain final norm where fine-tuning has left none: its own stands behind the pooling."""
    width = weights["cls_token"].shape[-1]
    return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width), **weights}


def load_encoder(model: LocalMIM, weights: Mapping[str, Tensor]) -> None:
    """Load every tensor of the encoder, and of the heads where there are any of the same shape.

    Raises:
        ValueError: a tensor of the encoder or of its final norm is missing, unknown, or of another shape.
    """
    expected = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    optional = {name for name in expected if name.startswith(_OTHERS) and not name.startswith(LAST_NORM)}
    usable = {name: x for name, x in weights.items() if name not in optional or tuple(x.shape) == expected[name]}
    usable = {name: x for name, x in usable.items() if name in expected or not name.startswith(_OTHERS)}
    check_state(usable, {name: shape for name, shape in expected.items() if name in usable or name not in optional})
    model.load_state_dict(usable, strict=False)


def _read_run(path: Path) -> Pretrained:
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise ValueError(f"{path} holds no checkpoint, so there are no weights yet")
    config = checkpoint.read_config()
    weights = read_weights(checkpoint)
    with safe_open(checkpoint.path / "weights.safetensors", framework="pt") as file:
        computed = {name: str(file.get_tensor(name).dtype).removeprefix("torch.") for name in file.keys()}  # noqa: SIM118
    exact = {name for group in checkpoint.manifest["groups"].values() for name, _ in group["parameters"]}
    if (checkpoint.path / "masters.safetensors").is_file():
        with safe_open(checkpoint.path / "masters.safetensors", framework="pt") as file:
            exact |= set(file.keys())
    rounded = {name: dtype for name, dtype in computed.items() if name not in exact and dtype in HALF}
    return Pretrained(
        weights=weights,
        size=config.model.resolve(),
        img_size=config.model.img_size,
        origin=f"step {checkpoint.step} of the run in {path}",
        location=str(path),
        checkpoint=checkpoint,
        config=config,
        colours=config.data.colours,
        rounded=rounded,
    )


def _read_safetensors(path: Path) -> Pretrained:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            source = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}") from None
    try:
        size = ModelSize(**parse_json(metadata["model_size"], name="model_size")) if "model_size" in metadata else None
        colours = _read_colours(*parse_json(metadata["colours"], name="colours")) if "colours" in metadata else IMAGENET
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} has metadata that cannot be used: {error}") from None
    return _from_tensors(
        source, path=path, size=size, colours=colours, origin=metadata.get("origin", f"the weights in {path}")
    )


def _read_torch(path: Path) -> Pretrained:
    try:
        # LocalMIM's and MAE's files keep their command line beside the weights, and nothing else that is not plain.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+\w)", str(error))
        reason = found[1] if found else "its pickle does more than that"  # torch's own words advise to trust it
        raise ValueError(
            f"{path} holds objects that are not read from untrusted files, only tensors, plain containers and "
            f"argparse.Namespace are: {reason}"
        ) from None
    # A damaged stream makes the unpickler meet whatever its operations can: no type of error is left out.
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable file of torch.save: {reason}") from None
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a {kind}, expected the weights, or a dict with them as 'model'")
    return _from_tensors(_find_weights(content), path=path, size=None, origin=f"the weights in {path}")


def _find_weights(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the weights of a checkpoint by the encoder's own names.

    They may lie under a word, as in MAE's and timm's files (`model`, `state_dict`) or in those of DINO and iBOT
    (`teacher`, `student`), and their names may begin with those of the modules around them.
    """
    inner = next((content[word] for word in _WORDS_FOR_WEIGHTS if isinstance(content.get(word), Mapping)), content)
    names = {name: re.sub(r"^(module\.)?(_orig_mod\.)?", "", name) for name in inner}
    if any(name.startswith("backbone.") for name in names.values()):  # the others are the projection head's
        return {new[9:]: inner[old] for old, new in names.items() if new.startswith("backbone.")}
    return {new: inner[old] for old, new in names.items()}


def _read_timm(text: str) -> Pretrained:
    name = text.removeprefix(TIMM_PREFIX)
    if not timm.is_model(name):
        nearest = find_nearest(name, timm.list_models())
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {nearest!r}?" if nearest else ""))
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (HTTPError, OSError, RuntimeError) as error:  # huggingface_hub's, a full disk's, timm's
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"timm's weights of {name} cannot be fetched ({reason})") from None
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"timm's {name} is a {type(model).__name__}, expected a VisionTransformer")
    return _from_tensors(
        model.state_dict(), path=Path(name), size=None, origin=f"timm's model {name}", location=text,
        num_heads=cast(Block, model.blocks[0]).attn.num_heads,
        colours=_read_colours(model.pretrained_cfg["mean"], model.pretrained_cfg["std"]),
    )  # fmt: skip


def _read_colours(mean: Sequence[float], std: Sequence[float]) -> Colours:
    """Check that there are three of each; raises ValueError."""
    (r, g, b), (r_std, g_std, b_std) = mean, std
    return Colours((r, g, b), (r_std, g_std, b_std))


def _from_tensors(
    source: Mapping[str, Any],
    *,
    path: Path,
    size: ModelSize | None,
    origin: str,
    location: str | None = None,
    num_heads: int | None = None,
    colours: Colours = IMAGENET,
) -> Pretrained:
    """Recognise whose names these are, and the sizes behind them."""
    if found := _find_strange(source):
        raise ValueError(f"{path} holds no Vision Transformer: {found}")
    if "hog_enc.0.conv.weight" in source:
        # Only the encoder is wanted here, so it does not matter which of its four pairs of biases a ViT-L keeps.
        weights, whose = from_localmim(source, hog_bias_of_scale=0), "LocalMIM's names"
    elif any(name.startswith("heads.") for name in source):
        weights, whose = dict(source), "vitfreeze's names"
    elif "head.weight" in source and "norm.weight" not in source:
        weights, whose = dict(source), "a fine-tuned classifier"
    else:
        encoder = {name: x for name, x in source.items() if not name.startswith("head.")}
        weights, whose = from_mae(encoder), "MAE's or timm's names"
    weights = {name: x.float() if x.is_floating_point() else x for name, x in weights.items()}
    dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in source.items()}
    rounded = {name: dtype for name, dtype in dtypes.items() if dtype in HALF}
    size = size or _guess_size(weights, path=path, num_heads=num_heads)
    grid = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return Pretrained(
        weights=weights,
        size=size,
        img_size=grid * size.patch_size,
        origin=f"{origin} ({whose})",
        location=location or str(path),
        colours=colours,
        rounded=rounded,
    )


def _find_strange(source: Mapping[str, Any]) -> str:
    """Return, in words, why these are no weights of a Vision Transformer; empty if nothing says so."""
    wrong = next((name for name, value in source.items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        return f"{wrong} is no tensor"
    first = "patch_embed.proj.weight"
    if first not in source:
        longer = next((name for name in source if name.endswith(f".{first}")), "")
        return f"there is no tensor {first}" + (f", only {longer}: save it without the prefix" if longer else "")
    numbered = re.compile(r"blocks\.\d+\..")
    if odd := next((name for name in source if name.startswith("blocks.") and not numbered.match(name)), None):
        return f"{odd} belongs to no block of a number"
    tokens = source["pos_embed"].shape[1] if getattr(source.get("pos_embed"), "ndim", 0) == 3 else 2
    if tokens < 2 or math.isqrt(tokens - 1) ** 2 != tokens - 1:
        return f"pos_embed has {tokens} positions, expected one for the class token and a square number of patches"
    return ""


def _guess_size(weights: Mapping[str, Tensor], *, path: Path, num_heads: int | None) -> ModelSize:
    """Return the dimensions that the shapes show; the number of attention heads they do not show."""
    width, _, patch_size, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    published = {name: size for name, size in MODEL_SIZES.items() if not name.endswith("_test")}
    known = [size for size in published.values() if (size.embed_dim, size.depth) == (width, depth)]
    if num_heads is None and not known:
        raise ValueError(
            f"{path} has {depth} blocks of width {width}, and from shapes alone the number of attention heads is known "
            f"only for the sizes {', '.join(published)}; export it with vitfreeze, whose files say it"
        )
    hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
    return ModelSize(
        patch_size=patch_size,
        embed_dim=width,
        depth=depth,
        num_heads=num_heads or known[0].num_heads,
        mlp_ratio=hidden / width,
    )
