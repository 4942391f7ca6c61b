"""Settings of a run: frozen dataclasses, YAML recipes, `section.key=value` overrides, checks.

A recipe is a YAML file of sections; every key that it leaves out has its default here. Each setting remembers
where its value came from, so that an error can say which line to mend. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from vitfreeze.architecture import HEAD_SCALES, MODEL_SIZES, ModelSize, cell_sizes, tap_blocks

RECIPE_FOLDER = Path(__file__).parent / "recipes"
COMMAND_LINE = "the command line"
Origins = Mapping[str, str]
T = TypeVar("T")
_log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value, what is allowed and where it was set."""


@dataclass(frozen=True)
class Duration:
    """A stretch of a run: '500 steps', '10 epochs', '30 minutes', or a fraction of the run (0.1 or '10%')."""

    value: float
    unit: str

    UNITS: typing.ClassVar[tuple[str, ...]] = ("steps", "epochs", "minutes", "fraction")

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read a duration from YAML or the command line; raises ValueError with the accepted spellings."""
        if isinstance(text, (int, float)) and not isinstance(text, bool) and 0 <= text <= 1:
            return cls(float(text), "fraction")
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(step|epoch|minute|%)?s?\s*", str(text))
        try:
            value = float(match.group(1)) if match else -1.0
        except ValueError:
            value = -1.0
        word = match.group(2) if match else None
        if word is None and 0 <= value <= 1:
            return cls(value, "fraction")
        if word == "%" and 0 <= value <= 100:
            return cls(value / 100, "fraction")
        if word in ("step", "epoch", "minute") and 0 <= value < float("inf"):
            return cls(value, f"{word}s")
        raise ValueError("a duration like '500 steps', '10 epochs', '30 minutes', '5%' or a fraction in [0, 1]")

    def to_steps(self, *, steps_per_epoch: int, total_steps: int | None = None) -> int:
        """Return the duration in optimizer steps, rounded to the nearest; minutes cannot be converted."""
        if self.unit == "steps":
            return round(self.value)
        if self.unit == "epochs":
            return round(self.value * steps_per_epoch)
        if self.unit == "fraction" and total_steps is not None:
            return round(self.value * total_steps)
        raise ValueError(f"'{self}' cannot be expressed in steps here; use steps or epochs")

    def __str__(self) -> str:
        return f"{self.value:g}" if self.unit == "fraction" else f"{self.value:g} {self.unit}"


def option(
    default: T,
    help_text: str,
    *,
    may_change: bool = False,
    choices: Sequence[str] = (),
    is_path: bool = False,
    is_permission: bool = False,
) -> T:
    """Declare a setting with its one-line explanation.

    Args:
        default: its value where nobody sets it.
        help_text: what it means.
        may_change: whether it may differ when a run is resumed.
        choices: the values that it may have; empty: any.
        is_path: a leading '~' is the user's home.
        is_permission: only the command line of the very call can grant it; it is neither read from a file nor written
            into one.
    """
    metadata = {"help": help_text, "may_change": may_change, "choices": tuple(choices)}
    return field(default=default, metadata={**metadata, "is_path": is_path, "is_permission": is_permission})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder, its four heads and the masking."""

    size: str = option("vit_base_patch16", "row of the size table", choices=tuple(MODEL_SIZES))
    img_size: int = option(224, "side of the training crops in pixels")
    patch_size: int | None = option(None, "override of the size table")
    embed_dim: int | None = option(None, "override of the size table")
    depth: int | None = option(None, "override of the size table: number of blocks")
    num_heads: int | None = option(None, "override of the size table: attention heads")
    mlp_ratio: float | None = option(None, "override of the size table")
    decoder_embed_dim: int | None = option(None, "override of the size table")
    decoder_depth: int | None = option(None, "override of the size table")
    decoder_num_heads: int | None = option(None, "override of the size table")
    hog_nbins: int = option(9, "orientation bins of the HOG targets (LocalMIM: 9; 18 for ViT-L)")
    hog_bias: bool = option(False, "random biases in the gradient filters, as in LocalMIM's ViT-L recipe")
    mask_ratio: float = option(0.75, "share of the patches that the encoder does not see")
    activation_checkpointing: bool = option(
        False, "recompute active blocks in the backward pass to save memory", may_change=True
    )
    compile: bool = option(False, "torch.compile each block", may_change=True)
    init_from: str = option(
        "",
        "weights to begin with: a run, an export, a LocalMIM or MAE .pth, or timm:NAME",
        may_change=True,
        is_path=True,
    )

    def resolve(self) -> ModelSize:
        """Return the dimensions: the row of the size table with the overrides applied."""
        row = MODEL_SIZES[self.size]
        names = [f.name for f in dataclasses.fields(ModelSize)]
        return dataclasses.replace(row, **{n: v for n in names if (v := getattr(self, n)) is not None})


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are cropped."""

    train: tuple[str, ...] = option((), "training shards: a folder, a brace pattern, URLs, or a list", may_change=True)
    val: tuple[str, ...] = option((), "labelled validation shards, for k-NN and fine-tuning", may_change=True)
    workers: int = option(8, "decoding processes per rank", may_change=True)
    prefetch: int = option(4, "batches that each worker keeps ready", may_change=True)
    crops_per_image: int = option(1, "independent crops and masks taken from one decoded image")
    crop_scale: tuple[float, ...] = option((0.2, 1.0), "area of the random crop as a share of the image")
    max_bad_fraction: float = option(0.001, "share of samples that may fail to decode before the run ends")
    allow_pipe: bool = option(
        False, "allow 'pipe:' shards, which run a shell command; on the command line only, of every call",
        may_change=True, is_permission=True,
    )  # fmt: skip
    cache_dir: str = option(
        "", "folder for fetched remote shards; default: the user's cache", may_change=True, is_path=True
    )
    cache_gigabytes: float = option(200.0, "size at which the oldest fetched shards are removed", may_change=True)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning rate before freezing shapes it."""

    blr: float | None = option(2e-4, "learning rate per 256 images: base_lr = blr * batch.global_size / 256")
    base_lr: float | None = option(None, "absolute learning rate; needs blr=null")
    min_lr: float = option(0.0, "learning rate at the end of the cosine of everything that is not an encoder layer")
    warmup: Duration = option(Duration(10, "epochs"), "linear warm-up; does not count towards t_i")
    betas: tuple[float, ...] = option((0.9, 0.95), "AdamW betas")
    eps: float = option(1e-8, "AdamW epsilon")
    weight_decay: float = option(0.05, "decoupled weight decay; none on biases and other 1-d parameters")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many images make a step."""

    global_size: int = option(2048, "images per optimizer step over all ranks")
    micro_size: int | None = option(
        None, "most images per rank and forward pass; accumulation follows", may_change=True
    )
    grow_micro_batch: bool = option(
        False, "use memory that freezing releases for larger micro-batches", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """FreezeOut."""

    mode: str = option(
        "schedule", "schedule: FreezeOut; adaptive: by measured change; off: plain LocalMIM",
        choices=("schedule", "adaptive", "off"),
    )  # fmt: skip
    t_0: float = option(0.8, "when layer 0 freezes, before `how` bends it, as a share of the steps after warm-up")
    how: str = option("cubic", "how t_i bends from t_0 to 1 over the layers", choices=("linear", "squared", "cubic"))
    scale_lr: bool = option(True, "divide a layer's initial rate by its t_i, so that all layers travel alike")
    cls_token: bool = option(True, "freeze the class token with layer 0; false: backward runs through the prefix")
    patch_embed: bool = option(True, "freeze the patch embedding as layer 0; false: it trains to the end")
    heads_lr: str = option(
        "global", "rate of norms and decoders: one cosine (paper) or that of their tap's layer",
        choices=("global", "layer"),
    )  # fmt: skip
    min_steps_between_drops: int = option(0, "drop layers that freeze within this many steps together")
    prefix_precision: str = option(
        "auto", "precision of the frozen prefix; auto: half on a GPU, fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )  # fmt: skip
    adaptive_measure: str = option(
        "weight", "adaptive: relative change of weights or of gradients", choices=("weight", "gradient")
    )
    adaptive_threshold: float = option(0.002, "adaptive: a layer below this relative change may freeze")
    adaptive_window: Duration = option(Duration(0.02, "fraction"), "adaptive: how long it must stay below")
    adaptive_floor: Duration = option(Duration(0.5, "fraction"), "adaptive: nothing freezes before")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The weights of the four scales."""

    scale_weights: tuple[tuple[float, tuple[float, ...]], ...] = option(
        ((0.0, (1.0, 1.0, 1.0, 1.0)),),
        "four weights, finest first; or a list of [share of the run, [four weights]], joined by straight lines",
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run as a whole."""

    task: str = option(
        "pretrain", "pretrain or finetune: what the recipe is for; the command decides if it does not say",
        choices=("pretrain", "finetune"),
    )  # fmt: skip
    length: Duration = option(Duration(100, "epochs"), "how long to train")
    seed: int = option(0, "seed of weights, sample order, crops and masks")
    dir: str = option("", "run folder; default: runs/<recipe>", may_change=True, is_path=True)
    ds_config: str = option("", "DeepSpeed JSON: precision, ZeRO stage, communication", may_change=True, is_path=True)
    log_every_steps: int = option(20, "steps between lines of metrics.jsonl", may_change=True)
    show_every: Duration = option(
        Duration(0.1, "fraction"), "how often reconstructions go to TensorBoard; 0: never", may_change=True
    )
    max_skipped_steps: int = option(50, "fp16 overflows in a row before the run ends", may_change=True)
    watchdog_minutes: float = option(30.0, "end the job when no step finishes for this long; 0: never", may_change=True)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved."""

    every: Duration = option(Duration(1, "epochs"), "steps, epochs, minutes or a fraction", may_change=True)
    keep: int = option(2, "newest checkpoints to keep", may_change=True)


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """Where the run goes on from."""

    from_: str = option(
        "", "checkpoint to start from instead of the newest in the run folder", may_change=True, is_path=True
    )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the way: k-NN on held-out images in pre-training, all validation images in fine-tuning."""

    every: Duration = option(Duration(0, "steps"), "how often to evaluate; 0: never", may_change=True)
    samples: int = option(
        2000, "held-out images that k-NN classifies, and labelled training images to compare with", may_change=True
    )
    k: int = option(10, "neighbours", may_change=True)
    max_share: float = option(
        0.05, "share of the time that probes may take; above it they are left out", may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What only fine-tuning has; timm's names."""

    num_classes: int = option(1000, "classes of the labels, numbered from 0")
    global_pool: str = option("avg", "avg: mean of the patches; token: the class token", choices=("avg", "token"))
    resample_positions: bool = option(False, "fit the positions of model.init_from to another model.img_size")
    drop_path: float = option(0.1, "probability of skipping a residual branch in the last block, rising from 0")
    layer_decay: float = option(0.75, "factor on the learning rate from each layer to the one below it")
    mixup: float = option(0.8, "alpha of mixup; 0: none")
    cutmix: float = option(1.0, "alpha of cutmix; 0: none")
    smoothing: float = option(0.1, "label smoothing")
    aa: str = option("rand-m9-mstd0.5-inc1", "timm's RandAugment or AutoAugment policy; '': none")
    reprob: float = option(0.25, "probability of erasing a random rectangle of an image")
    clip_grad: float | None = option(None, "largest norm of the gradient; null: as the DeepSpeed JSON says")
    model_ema_decay: float = option(0.0, "decay per step of an average of the weights; 0: no average")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `origins` says where each setting that is not a default was set."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    freeze: FreezeConfig = FreezeConfig()
    loss: LossConfig = LossConfig()
    run: RunConfig = RunConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
    eval: EvalConfig = EvalConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    recipe: str = field(default="defaults", compare=False)
    origins: Origins = field(default_factory=dict, compare=False, repr=False)

    def error(self, key: str, allowed: str) -> ConfigError:
        """Return the error for the setting `section.key`: its value, what is allowed, where it was set."""
        section, name = key.split(".")
        value = _plain(getattr(getattr(self, section), _field_name(name)))
        return ConfigError(f"{key} is {value!r}; allowed: {allowed} (set in {self.origins.get(key, 'the defaults')})")

    @property
    def base_lr(self) -> float:
        """Learning rate before per-layer scaling: as given, or blr times the global batch over 256."""
        if self.optim.blr is None:
            assert self.optim.base_lr is not None
            return self.optim.base_lr
        return self.optim.blr * self.batch.global_size / 256


SECTIONS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Config) if f.name not in ("recipe", "origins"))


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or path, apply `section.key=value` overrides, and check the result.

    Raises:
        ConfigError: the recipe is not found, a key is unknown, a value cannot be used, or the recipe grants what only
            a command line can.
    """
    path = find_recipe(recipe)
    values: dict[str, tuple[Any, str]] = {}
    for key, value, where in _read_recipe(path):
        if _is_granted_by_file(key, value):
            raise ConfigError(_describe_grant(key, value, where))
        values[key] = (value, where)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"{override!r} is not an override; write section.key=value, as in freeze.t_0=0.9")
        values[key.strip()] = (_parse_yaml(text, f"the override {override!r}"), COMMAND_LINE)
    return build_config(values, recipe=path.stem)


def load_run_config(path: Path) -> Config:
    """Read the config.yaml that a run wrote down.

    What it grants does not count, and a warning says so: older versions wrote `data.allow_pipe: true` there, and such
    a run must stay readable, but the folder may as well be a stranger's.

    Raises:
        ConfigError: there is no such file, a key is unknown, or a value cannot be used.
    """
    values: dict[str, tuple[Any, str]] = {}
    for key, value, where in _read_recipe(find_recipe(path)):
        if _is_granted_by_file(key, value):
            _log.warning("%s", _describe_grant(key, value, where))
        else:
            values[key] = (value, where)
    return build_config(values, recipe=path.stem)


def _is_granted_by_file(key: str, value: object) -> bool:
    return key in PERMISSIONS and value is not False


def _describe_grant(key: str, value: object, where: str) -> str:
    return (
        f"{key} is {value!r} in {where}, but a file cannot allow that: whoever means it says {key}=true on the command "
        "line of each call"
    )


def build_config(values: Mapping[str, tuple[Any, str]], *, recipe: str) -> Config:
    """Build a checked Config from {'section.key': (plain value, where it was set)}."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    hints = {name: typing.get_type_hints(type(getattr(Config(), name))) for name in SECTIONS}
    for key, (value, origin) in values.items():
        section, _, name = key.partition(".")
        if section not in sections or _field_name(name) not in hints[section]:
            raise ConfigError(f"unknown setting {key!r} (set in {origin}); did you mean {_nearest(key)!r}?")
        try:
            converted = _convert(value, hints[section][_field_name(name)], key=key)
            sections[section][_field_name(name)] = os.path.expanduser(converted) if key in _PATHS else converted
        except ValueError as error:
            raise ConfigError(f"{key} is {value!r}; allowed: {error} (set in {origin})") from None
    parts = {name: type(getattr(Config(), name))(**given) for name, given in sections.items()}
    config = Config(**parts, recipe=recipe, origins={key: origin for key, (_, origin) in values.items()})
    check_config(config)
    return config


def choose_task(config: Config, task: str) -> Config:
    """Return the settings of a run that `vitfreeze TASK` shall do.

    Raises:
        ConfigError: the recipe is for the other task.
    """
    if config.run.task != task and "run.task" in config.origins:
        raise config.error("run.task", f"{task!r} for `vitfreeze {task}`; or use `vitfreeze {config.run.task}`")
    if task == "pretrain":
        check_task_is_clear(config)
    origins = {"run.task": f"the command `vitfreeze {task}`", **config.origins}
    return replace(config, run=replace(config.run, task=task), origins=origins)


def check_task_is_clear(config: Config) -> None:
    """Refuse settings of fine-tuning in a recipe that does not say what it is for; raises ConfigError."""
    finetuning = next((key for key in config.origins if key.startswith("finetune.")), "")
    if finetuning and "run.task" not in config.origins:
        raise ConfigError(
            f"{finetuning} is a setting of fine-tuning (set in {config.origins[finetuning]}), and the recipe does not "
            "say what it is for: add run.task=finetune, or leave that setting out"
        )


def find_recipe(recipe: str | Path) -> Path:
    """Return the path of a recipe given by path or by name; raises ConfigError listing the names there are."""
    if Path(recipe).suffix in (".yaml", ".yml"):
        if not Path(recipe).is_file():
            raise ConfigError(f"there is no recipe file {str(recipe)!r}")
        return Path(recipe)
    path = RECIPE_FOLDER / f"{recipe}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in RECIPE_FOLDER.glob("*.yaml"))
        raise ConfigError(f"there is no recipe {str(recipe)!r}; there are {', '.join(names)}, or give a .yaml file")
    return path


def find_ds_config(name: str) -> Path:
    """Return a DeepSpeed JSON: a path that ends in .json, or a name in ds_configs/.

    Raises:
        ConfigError: there is no such file.
    """
    folder = find_ds_config_folder()
    path = Path(name) if name.endswith(".json") else folder / f"{name}.json"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or f"none in {folder}"
        raise ConfigError(f"run.ds_config is {name!r}; allowed: a .json file that exists, or one of {names}")
    return path


def find_ds_config_folder() -> Path:
    """Return ds_configs/: inside the package where a wheel put it, and beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    packed = package / "ds_configs"
    return packed if packed.is_dir() else package.parent / "ds_configs"


def check_config(config: Config) -> None:
    """Check what can be checked without data, ranks or torch; raises ConfigError."""
    for key, value, option_field in settings(config):
        choices = option_field.metadata["choices"]
        if choices and value not in choices:
            raise config.error(key, f"one of {', '.join(choices)}")
    for key, low, high, words in _RANGES:
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None and not low <= value <= high:
            raise config.error(key, words)
    if not 0 < config.freeze.t_0 <= 1:
        raise config.error("freeze.t_0", "a number in (0, 1]")
    if not 0 < config.model.mask_ratio < 1:
        raise config.error("model.mask_ratio", "a number strictly between 0 and 1")
    if (config.optim.blr is None) == (config.optim.base_lr is None):
        raise config.error("optim.base_lr", f"one of base_lr and blr, the other null; blr is {config.optim.blr!r}")
    _check_lists(config)
    _check_durations(config)
    _check_model(config)


_AT_LEAST_1 = (1, 2**62, "an integer of at least 1")
_NOT_NEGATIVE = (0, float("inf"), "a number of at least 0")
_RANGES: tuple[tuple[str, float, float, str], ...] = (
    ("model.hog_nbins", *_AT_LEAST_1),
    ("data.workers", 0, 1024, "an integer from 0 to 1024"),
    ("data.prefetch", *_AT_LEAST_1),
    ("data.crops_per_image", *_AT_LEAST_1),
    ("data.max_bad_fraction", 0, 1, "a number in [0, 1]"),
    ("data.cache_gigabytes", *_NOT_NEGATIVE),
    ("optim.blr", *_NOT_NEGATIVE),
    ("optim.base_lr", *_NOT_NEGATIVE),
    ("optim.min_lr", *_NOT_NEGATIVE),
    ("optim.eps", *_NOT_NEGATIVE),
    ("optim.weight_decay", *_NOT_NEGATIVE),
    ("batch.global_size", *_AT_LEAST_1),
    ("batch.micro_size", *_AT_LEAST_1),
    ("freeze.min_steps_between_drops", *_NOT_NEGATIVE),
    ("freeze.adaptive_threshold", *_NOT_NEGATIVE),
    ("run.log_every_steps", *_AT_LEAST_1),
    ("run.seed", 0, 2**31 - 1, "an integer from 0 to 2147483647"),
    ("run.max_skipped_steps", *_AT_LEAST_1),
    ("run.watchdog_minutes", *_NOT_NEGATIVE),
    ("checkpoint.keep", *_AT_LEAST_1),
    ("eval.samples", *_AT_LEAST_1),
    ("eval.k", *_AT_LEAST_1),
    ("eval.max_share", 0, 1, "a number in [0, 1]"),
    ("finetune.num_classes", *_AT_LEAST_1),
    ("finetune.drop_path", 0, 0.999, "a number in [0, 1)"),
    ("finetune.layer_decay", 1e-6, 1, "a number in (0, 1]"),
    ("finetune.mixup", *_NOT_NEGATIVE),
    ("finetune.cutmix", *_NOT_NEGATIVE),
    ("finetune.smoothing", 0, 0.999, "a number in [0, 1)"),
    ("finetune.reprob", 0, 1, "a number in [0, 1]"),
    ("finetune.clip_grad", *_NOT_NEGATIVE),
    ("finetune.model_ema_decay", 0, 0.999999, "a number in [0, 1)"),
)


def _check_lists(config: Config) -> None:
    low_high = config.data.crop_scale
    if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] <= 1:
        raise config.error("data.crop_scale", "two numbers, 0 < low <= high <= 1")
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise config.error("optim.betas", "two numbers in [0, 1)")
    shares = [share for share, _ in config.loss.scale_weights]
    rows = [weights for _, weights in config.loss.scale_weights]
    well_formed = all(len(row) == len(HEAD_SCALES) and min(row) >= 0 and max(row) > 0 for row in rows)
    if not well_formed or shares != sorted(set(shares)) or not all(0 <= share <= 1 for share in shares):
        raise config.error(
            "loss.scale_weights",
            "four numbers >= 0, not all 0, or such lists at increasing shares of the run in [0, 1]",
        )


def _check_durations(config: Config) -> None:
    allowed_units = {
        "run.length": ("steps", "epochs"),
        "optim.warmup": ("steps", "epochs", "fraction"),
        "freeze.adaptive_window": ("steps", "epochs", "fraction"),
        "freeze.adaptive_floor": ("steps", "epochs", "fraction"),
        "run.show_every": ("steps", "epochs", "fraction"),
        "eval.every": ("steps", "epochs", "fraction"),
        "checkpoint.every": Duration.UNITS,
    }
    for key, value, _ in settings(config):
        if isinstance(value, Duration) and value.unit not in allowed_units[key]:
            raise config.error(key, f"a duration in {', '.join(allowed_units[key])}")
    for key, duration in (("run.length", config.run.length), ("checkpoint.every", config.checkpoint.every)):
        if duration.value <= 0:
            raise config.error(key, "a duration above 0")


def _check_model(config: Config) -> None:
    size = config.model.resolve()
    for name in ("embed_dim", "decoder_embed_dim"):
        heads_name = "num_heads" if name == "embed_dim" else "decoder_num_heads"
        width, heads = getattr(size, name), getattr(size, heads_name)
        if width <= 0 or heads <= 0 or width % heads or width % 4:
            raise config.error(
                f"model.{name}", f"a multiple of 4 and of {heads_name} ({heads}), and here it is {width}"
            )
    try:
        tap_blocks(size.depth)
    except ValueError as error:
        raise config.error("model.depth", str(error)) from None
    try:
        cell_sizes(img_size=config.model.img_size, patch_size=size.patch_size)
    except ValueError as error:
        key = "model.patch_size" if "model.patch_size" in config.origins else "model.img_size"
        raise config.error(key, str(error)) from None


def derive_accumulation(config: Config, *, world_size: int) -> tuple[int, int]:
    """Return (micro-batch per rank, accumulation steps) that make the global batch on `world_size` ranks.

    A rank whose share of the global batch is less than batch.micro_size takes it as one micro-batch.

    Raises:
        ConfigError: the sizes do not divide; the message shows the arithmetic.
    """
    total, micro = config.batch.global_size, config.batch.micro_size
    if micro is None:
        if total % world_size:
            raise config.error(
                "batch.global_size", f"a multiple of the {world_size} ranks; {total} / {world_size} is not whole"
            )
        return total // world_size, 1
    if total % world_size == 0 and total // world_size < micro:
        return total // world_size, 1
    if total % (micro * world_size):
        raise config.error(
            "batch.global_size",
            f"a multiple of batch.micro_size x ranks = {micro} x {world_size} = {micro * world_size}; "
            f"{total} / {micro * world_size} = {total / (micro * world_size):.3f}",
        )
    return micro, total // (micro * world_size)


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Every duration of a run in optimizer steps, converted once."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int


def count_steps(config: Config, *, steps_per_epoch: int) -> StepCounts:
    """Convert the durations of a run; raises ConfigError when the warm-up leaves nothing or the run is empty."""
    total = config.run.length.to_steps(steps_per_epoch=steps_per_epoch)
    if total < 1:
        raise config.error("run.length", f"at least one step; with {steps_per_epoch} steps an epoch this is {total}")
    warmup = config.optim.warmup.to_steps(steps_per_epoch=steps_per_epoch, total_steps=total)
    if warmup >= total:
        raise config.error("optim.warmup", f"shorter than the run: {warmup} of {total} steps")
    return StepCounts(steps_per_epoch=steps_per_epoch, total_steps=total, warmup_steps=warmup)


def settings(config: Config) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yield ('section.key', value, field) for every setting."""
    for section in SECTIONS:
        part = getattr(config, section)
        for option_field in dataclasses.fields(part):
            yield f"{section}.{_yaml_name(option_field.name)}", getattr(part, option_field.name), option_field


def dump_config(config: Config) -> str:
    """Return the resolved configuration as a YAML recipe that `load_config` reads back; permissions are left out."""
    tree: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for key, value, _ in settings(config):
        section, name = key.split(".")
        if key not in PERMISSIONS:
            tree[section][name] = _plain(value)
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=110)


def explain_config(config: Config) -> str:
    """Return every setting with its value, where it was set, and its one-line explanation."""
    lines = []
    for key, value, option_field in settings(config):
        origin = config.origins.get(key)
        note = f"  [{origin}]" if origin else ""
        lines.append(f"{key} = {_plain(value)!r}{note}\n    {option_field.metadata['help']}")
    return "\n".join(lines)


def differing_settings(config: Config, other: Config) -> list[str]:
    """Return a line for each setting that a resumed run may not change and that differs between the two."""
    lines = []
    for (key, mine, option_field), (_, theirs, _) in zip(settings(config), settings(other), strict=True):
        if mine != theirs and not option_field.metadata["may_change"]:
            lines.append(f"{key}: {_plain(theirs)!r} there, {_plain(mine)!r} now")
    return lines


def _read_recipe(path: Path, *, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, Any, str]]:
    """Yield ('section.key', plain value, where it stands) from a YAML file of sections, those of its base first."""
    if path.resolve() in above:
        raise ConfigError(f"{path} is, by way of `base:`, its own base")
    try:
        root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} must hold sections such as 'freeze:' with keys below them")
    for name_node, body in root.value:
        if name_node.value == "base":
            name = str(body.value)
            base = path.parent / name if name.endswith((".yaml", ".yml")) else name
            yield from _read_recipe(find_recipe(base), above=(*above, path.resolve()))
    seen: dict[str, str] = {}
    for name_node, body in root.value:
        if name_node.value == "base":
            continue
        if not isinstance(body, yaml.MappingNode):
            where = f"{path.name} line {name_node.start_mark.line + 1}"
            raise ConfigError(f"{where}: {name_node.value!r} must be a section with keys below it")
        for key_node, value_node in body.value:
            key, where = f"{name_node.value}.{key_node.value}", f"{path.name} line {key_node.start_mark.line + 1}"
            if key in seen:
                raise ConfigError(f"{key} is set twice: in {seen[key]} and in {where}")
            seen[key] = where
            yield key, _construct(value_node, where), where


def _construct(node: yaml.Node, where: str) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not readable YAML: {' '.join(str(error).split())}") from None


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not readable YAML: {' '.join(str(error).split())}") from None


def _nearest(key: str) -> str:
    known = [name for name, _, _ in settings(Config())]
    by_name = difflib.get_close_matches(key.rpartition(".")[2], [name.rpartition(".")[2] for name in known], n=1)
    whole = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if whole:
        return whole[0]
    if by_name:
        return next(name for name in known if name.rpartition(".")[2] == by_name[0])
    return difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]


def _field_name(name: str) -> str:
    return "from_" if name == "from" else name


def _yaml_name(name: str) -> str:
    return "from" if name == "from_" else name


PERMISSIONS = frozenset(key for key, _, option_field in settings(Config()) if option_field.metadata["is_permission"])
_PATHS = frozenset(key for key, _, option_field in settings(Config()) if option_field.metadata["is_path"])


def _plain(value: Any) -> Any:
    """Return a setting as YAML can hold it."""
    if isinstance(value, Duration):
        return value.value if value.unit == "fraction" else str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _convert(value: Any, hint: Any, *, key: str) -> Any:
    """Convert a YAML value to the type of its field; raises ValueError whose text says what is allowed."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if key == "loss.scale_weights":
        return _convert_scale_weights(value)
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(item, typing.get_args(hint)[0], key=key) for item in items if item != "")
    if hint is Duration:
        return Duration.parse(value)
    if hint is float:  # PyYAML reads 2e-4 as a string
        return _convert_number(value)
    if hint is int:
        number = _convert_number(value)
        if number != int(number):
            raise ValueError("a whole number")
        return int(number)
    if hint is bool and not isinstance(value, bool):
        raise ValueError("true or false")
    if hint is str:
        return _convert_text(value)
    return value


def _convert_text(value: Any) -> str:
    if value is False:  # YAML 1.1 reads a bare `off` as false; freeze.mode has such a value
        return "off"
    if value is None or isinstance(value, (list, dict, bool)):
        raise ValueError("a text")
    return str(value)


def _convert_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("a number")
    try:
        number = float(value)
    except ValueError:
        raise ValueError("a number") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError("a finite number")
    return number


def _convert_scale_weights(value: Any) -> tuple[tuple[float, tuple[float, ...]], ...]:
    words = "four numbers, or a list of [share of the run, [four numbers]]"
    if not isinstance(value, list) or not value:
        raise ValueError(words)
    if not isinstance(value[0], list):
        return ((0.0, tuple(_convert_number(item) for item in value)),)
    rows = []
    for row in value:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[1], list)):
            raise ValueError(words)
        rows.append((_convert_number(row[0]), tuple(_convert_number(item) for item in row[1])))
    return tuple(rows)
