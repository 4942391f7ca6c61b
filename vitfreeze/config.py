"""Settings of a run: frozen dataclasses, YAML recipes, `section.key=value` overrides, checks.

A recipe is a YAML file of sections; every key that it leaves out has its default here. Each setting remembers
where its value came from, so that an error can say which line to mend. Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from vitfreeze.architecture import HEAD_SCALES, MODEL_SIZES, ModelSize, cell_sizes, tap_blocks
from vitfreeze.extensions import FREEZING, TARGETS, ExtensionError, list_names, pin_version
from vitfreeze.files import suggest_path
from vitfreeze.text import find_nearest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE_FOLDER = Path(__file__).parent / "recipes"
COMMAND_LINE = "the command line"
Origins = Mapping[str, str]
T = TypeVar("T")
_log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value, what is allowed and where it was set."""


class ArgumentError(ValueError):
    """An argument that cannot be used: its name, its value, and what is allowed instead."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        super().__init__(name, value, allowed)
        self.name, self.value, self.allowed = name, value, allowed

    def __str__(self) -> str:
        return f"{self.name} is {self.value!r}, expected {self.allowed}"


class Colours(NamedTuple):
    """Mean and deviation of R, G and B that images are normalised by, as shares of white; by default ImageNet's."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True)
class Duration:
    """A stretch of a run: '500 steps', '10 epochs', '30 minutes', or a fraction of the run (0.1 or '10%')."""

    value: float
    unit: str

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read a duration from YAML or the command line; raises ValueError with the accepted spellings."""
        match = re.fullmatch(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(step|epoch|minute|%)?s?\s*", str(text))
        value, word = (float(match.group(1)), match.group(2)) if match else (math.inf, None)
        if word is None and value <= 1:
            return cls(value, "fraction")
        if word == "%" and value <= 100:
            return cls(value / 100, "fraction")
        if word in ("step", "epoch", "minute") and value < math.inf:
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


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, an open end excluded; of a tuple every number, `rising` in this order."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    rising: bool = False

    def __contains__(self, value: float | tuple[float, ...]) -> bool:
        numbers = value if isinstance(value, tuple) else (value,)
        inside = all(self.low <= number <= self.high and math.isfinite(number) for number in numbers)
        at_open_end = (self.open_low and self.low in numbers) or (self.open_high and self.high in numbers)
        return inside and not at_open_end and (not self.rising or list(numbers) == sorted(numbers))

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"above {self.low}" if self.open_low else f"of at least {self.low}"
        interval = f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"
        return f"{interval} and in rising order" if self.rising else interval


AT_LEAST_0, AT_LEAST_1, ABOVE_0 = Range(0), Range(1), Range(0, open_low=True)
SHARE, SHARE_ABOVE_0, SHARE_BELOW_1 = Range(0, 1), Range(0, 1, open_low=True), Range(0, 1, open_high=True)
_MOST_RECIPE_BYTES, _MOST_NODES, _MOST_BASES = 4 << 20, 100_000, 20
_LONGEST_NUMBER, _LONGEST_QUOTE = 100, 300  # characters
IN_RUN = "steps, epochs, fraction"  # a duration that can be counted in the steps of its run
# Values that hold from a moment of the run until the next.
Stages = tuple[tuple[Duration, float], ...]
ShardNames = tuple[str, ...]
ShardStages = tuple[tuple[Duration, ShardNames], ...]
TrainShards = ShardNames | ShardStages
_SCALE_WEIGHTS = "four numbers >= 0, not all 0, or such lists behind rising shares of the run: [share, [four numbers]]"
_NOUNS = {
    "int": "an integer", "float": "a number", "bool": "true or false", "str": "a text", "Duration": "a duration",
    "Stages": "stages [[0, value], [share of the run or duration, value], ...] in rising order, or [] for none",
    "TrainShards": "a text or a list of texts, or stages [[0, such], [share of the run or duration, such], "
    "...] in rising order",
    "tuple[str, ...]": "a text or a list of texts", "tuple[float, float]": "two numbers",
    "tuple[float, float, float]": "three numbers",
}  # fmt: skip


def option(
    default: T, help_text: str, within: Range | None = None, *, unit: str = "", choices: Sequence[str] = (),
    may_change: bool = False, is_path: bool = False, is_permission: bool = False, group: str = "",
) -> T:  # fmt: skip
    """Declare a setting with its one-line explanation and its rule, which is told nowhere else.

    Numbers lie `within` a range and count `unit`; a duration may be given in each `unit` of a list; a text is one of
    `choices`, or a name of `group`, of which only what is to be run need be installed. `may_change` settings may differ
    when a run is resumed. In a path a leading '~' is the user's home. Only the command line of the very call can grant
    a permission: it is neither read from a file nor written into one.
    """
    metadata = {
        "help": help_text, "within": within, "unit": unit, "choices": choices, "may_change": may_change,
        "is_path": is_path, "is_permission": is_permission, "group": group,
    }  # fmt: skip
    return field(default=default, metadata=metadata)


def describe_allowed(option_field: dataclasses.Field[Any]) -> str:
    """Return what a setting may be, as in 'a number in (0, 1]'; it completes 'allowed: '."""
    rule, (kind, *optional) = option_field.metadata, str(option_field.type).split(" | ")
    choices = rule["choices"] or (list_names(rule["group"]) if rule["group"] else ())
    noun = f"one of {', '.join(choices)}" if choices else _NOUNS.get(kind, _SCALE_WEIGHTS)
    unit = f" ({rule['unit']})" if rule["unit"] else ""
    return f"{noun} {rule['within'] or ''}".rstrip() + unit + (", or null" if optional else "")


def is_allowed(value: Any, option_field: dataclasses.Field[Any]) -> bool:
    """Say whether the rule of a setting allows a value of its type; null needs no rule."""
    rule, number = option_field.metadata, value.value if isinstance(value, Duration) else value
    unit_fits = not isinstance(value, Duration) or value.unit in rule["unit"].split(", ")
    allowed = rule["choices"] or rule["within"]
    return value is None or (unit_fits and (not allowed or number in allowed))


def check_argument(key: str, value: Any, *, name: str = "") -> None:
    """Refuse an argument that the rule of setting `section.key` does not allow; raises ArgumentError for `name`."""
    section, _, setting = key.partition(".")
    option_field = getattr(Config, section).__dataclass_fields__[setting]
    if value is None or not is_allowed(value, option_field):
        raise ArgumentError(name or setting, value, describe_allowed(option_field))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder, its four heads and the masking."""

    size: str = option("vit_base_patch16", "row of the size table", choices=tuple(MODEL_SIZES))
    img_size: int = option(224, "side of the training crops", unit="pixels")
    patch_size: int | None = option(None, "override of the size table: side of a patch", unit="pixels")
    embed_dim: int | None = option(None, "override of the size table", AT_LEAST_1)
    depth: int | None = option(None, "override of the size table: number of blocks")
    num_heads: int | None = option(None, "override of the size table: attention heads", AT_LEAST_1)
    mlp_ratio: float | None = option(None, "override of the size table", ABOVE_0)
    decoder_embed_dim: int | None = option(None, "override of the size table", AT_LEAST_1)
    decoder_depth: int | None = option(None, "override of the size table", AT_LEAST_1)
    decoder_num_heads: int | None = option(None, "override of the size table", AT_LEAST_1)
    target: str = option("hog", "what the heads predict", group=TARGETS)
    hog_nbins: int = option(9, "orientation bins of the HOG targets (LocalMIM: 9; 18 for ViT-L)", AT_LEAST_1)
    hog_bias: bool = option(False, "random biases in the gradient filters, as in LocalMIM's ViT-L recipe")
    mask_ratio: float = option(
        0.75, "share of the patches that the encoder does not see", Range(0, 1, open_low=True, open_high=True)
    )
    activation_checkpointing: bool = option(False, "recompute active blocks to save memory", may_change=True)
    compile: bool = option(
        False, "torch.compile each block and head; the first steps take minutes, most of all on a CPU", may_change=True
    )
    init_from: str = option(
        "",
        "first weights: a run, an export, a .pth of LocalMIM, MAE or DINO, timm:NAME",
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

    train: TrainShards = option(
        (), "training shards: a folder, a brace pattern, URLs, or a list; or stages of them, [[0, shards], [0.5, "
        "shards]]: the same samples stored at other sizes", may_change=True,
    )  # fmt: skip
    val: tuple[str, ...] = option((), "labelled validation shards, for k-NN and fine-tuning", may_change=True)
    workers: int = option(8, "decoding processes per rank", Range(0, 1024), may_change=True)
    prefetch: int = option(4, "batches that each worker keeps ready", AT_LEAST_1, may_change=True)
    crops_per_image: int = option(1, "independent crops and masks taken from one decoded image", AT_LEAST_1)
    crop_scale: tuple[float, float] = option(
        (0.2, 1.0), "area of the random crop as a share of the image", Range(0, 1, open_low=True, rising=True)
    )
    mean: tuple[float, float, float] = option(
        IMAGENET_MEAN, "what is taken from R, G and B, as shares of white; `vitfreeze-data describe` measures it", SHARE
    )
    std: tuple[float, float, float] = option(IMAGENET_STD, "what R, G and B are then divided by", SHARE_ABOVE_0)
    max_bad_fraction: float = option(0.001, "share of samples that may fail to decode before the run ends", SHARE)
    allow_pipe: bool = option(
        False, "allow 'pipe:' shards, which run a shell command; on the command line only, of every call",
        may_change=True, is_permission=True,
    )  # fmt: skip
    cache_dir: str = option(
        "", "folder for fetched remote shards; default: the user's cache", may_change=True, is_path=True
    )
    cache_gigabytes: float = option(200.0, "size at which the oldest fetched shards go", ABOVE_0, may_change=True)

    @property
    def train_stages(self) -> ShardStages:
        """The training shards of each stage; of the whole run, if they never change."""
        if self.train and isinstance(self.train[0], tuple):
            return self.train
        return ((Duration(0, "fraction"), typing.cast(ShardNames, self.train)),)

    @property
    def train_shards(self) -> ShardNames:
        """The training shards of the last stage, at whose size the run ends."""
        return self.train_stages[-1][1]

    @property
    def colours(self) -> Colours:
        """What images are normalised by."""
        return Colours(self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and the learning rate before freezing shapes it."""

    blr: float | None = option(2e-4, "rate per 256 images: base_lr = blr * batch.global_size / 256", AT_LEAST_0)
    base_lr: float | None = option(None, "absolute learning rate; needs blr=null", AT_LEAST_0)
    min_lr: float = option(0.0, "rate at the end of the cosine of all that is not an encoder layer", AT_LEAST_0)
    warmup: Duration = option(Duration(10, "epochs"), "linear warm-up; does not count towards t_i", unit=IN_RUN)
    schedule: str = option(
        "cosine", "cosine: down over the whole run; wsd: warm-up, stable, decay at the end", choices=("cosine", "wsd")
    )
    cooldown: Duration = option(Duration(0.1, "fraction"), "wsd: linear decay to min_lr", ABOVE_0, unit=IN_RUN)
    cooldown_from: Duration | None = option(
        None, "wsd: cool down from here and end the run with it; `pretrain --cooldown` sets it", unit=IN_RUN
    )
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW betas", SHARE_BELOW_1)
    eps: float = option(1e-8, "AdamW epsilon", AT_LEAST_0)
    weight_decay: float = option(0.05, "decoupled weight decay; none on biases and other 1-d parameters", AT_LEAST_0)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many images make a step."""

    global_size: int = option(2048, "size of an optimizer step over all ranks", AT_LEAST_1, unit="images")
    micro_size: int | None = option(
        None, "most per rank and forward pass; accumulation follows", AT_LEAST_1, unit="images", may_change=True
    )
    grow_micro_batch: bool = option(False, "let micro-batches grow into memory that freezing frees", may_change=True)


@dataclass(frozen=True, kw_only=True)
class FreezeConfig:
    """FreezeOut."""

    mode: str = option(
        "schedule",
        "schedule: FreezeOut; adaptive: by measured change; off: plain LocalMIM",
        choices=("schedule", "adaptive", "off"),
    )
    t_0: float = option(0.8, "share of steps after warm-up that layer 0 trains, before `how` bends it", SHARE_ABOVE_0)
    how: str = option("cubic", "how t_i rises from t_0 to 1 over the layers", group=FREEZING)
    rates: str = option(
        "cosine", "cosine: from a layer's initial rate to 0 at its t_i (paper); global: all layers as optim.schedule, "
        "until they leave; stable: level, then a decay before each t_i", choices=("cosine", "global", "stable"),
    )  # fmt: skip
    scale_lr: bool = option(True, "rates cosine: divide a layer's initial rate by its t_i: all layers travel alike")
    decay: Duration = option(Duration(0.05, "fraction"), "rates stable: linear decay before t_i", ABOVE_0, unit=IN_RUN)
    cls_token: bool = option(True, "freeze the class token with layer 0; false: backward runs through the prefix")
    patch_embed: bool = option(True, "freeze the patch embedding as layer 0; false: it trains to the end")
    heads_lr: str = option(
        "global", "rate of norms and decoders: one cosine (paper) or that of their tap", choices=("global", "layer")
    )
    min_steps_between_drops: int = option(0, "drop layers that freeze within this many steps together", AT_LEAST_0)
    prefix_precision: str = option(
        "auto",
        "precision of the frozen prefix; auto: half on a GPU, fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    adaptive_measure: str = option("weight", "adaptive: change of weights or gradients", choices=("weight", "gradient"))
    adaptive_threshold: float = option(0.002, "adaptive: a layer below this relative change may freeze", ABOVE_0)
    adaptive_window: Duration = option(Duration(0.02, "fraction"), "adaptive: how long it must stay below", unit=IN_RUN)
    adaptive_floor: Duration = option(Duration(0.5, "fraction"), "adaptive: nothing freezes before", unit=IN_RUN)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The weights of the four scales."""

    scale_weights: tuple[tuple[float, tuple[float, ...]], ...] = option(
        ((0.0, (1.0, 1.0, 1.0, 1.0)),),
        "four weights, finest first; or a list of [share of the run, [four weights]], joined by straight lines",
    )


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """What changes in the images on the way: stages [[0, value], [share of the run or duration, value], ...]."""

    img_size: Stages = option((), "stages of the side of the crops; the last is model.img_size", unit="pixels")
    mask_ratio: Stages = option((), "stages of model.mask_ratio, such as [[0, 0.8], [0.5, 0.75]]")
    decoded_share: Stages = option(
        (), "share of the masked patches that the heads reconstruct, drawn anew for every crop; LocalMIM: 1"
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run as a whole."""

    task: str = option(
        "pretrain", "what the recipe is for; the command decides if it does not say", choices=("pretrain", "finetune")
    )
    length: Duration = option(Duration(100, "epochs"), "how long to train", ABOVE_0, unit="steps, epochs")
    seed: int = option(0, "seed of weights, sample order, crops and masks", Range(0, 2**31 - 1))
    dir: str = option("", "run folder; default: runs/<recipe>", may_change=True, is_path=True)
    ds_config: str = option("", "DeepSpeed JSON: precision, ZeRO stage, communication", may_change=True, is_path=True)
    log_every_steps: int = option(20, "steps between lines of metrics.jsonl", AT_LEAST_1, may_change=True)
    show_every: Duration = option(
        Duration(0.1, "fraction"), "how often boards get reconstructions; 0: never", unit=IN_RUN, may_change=True
    )
    wandb: str = option(
        "", "project of Weights & Biases, or entity/project, that the run is shown in as well", may_change=True
    )
    max_skipped_steps: int = option(50, "fp16 overflows in a row before the run ends", AT_LEAST_1, may_change=True)
    watchdog_minutes: float = option(
        30.0, "end the job if no step ends for so long; 0: never", AT_LEAST_0, may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is saved."""

    every: Duration = option(
        Duration(1, "epochs"), "how often to save", ABOVE_0, unit="steps, epochs, minutes, fraction", may_change=True
    )
    keep: int = option(
        2, "newest checkpoints to keep; with wsd also the newest before the cooldown", AT_LEAST_1, may_change=True
    )


@dataclass(frozen=True, kw_only=True)
class ResumeConfig:
    """Where the run goes on from."""

    from_: str = option(
        "", "checkpoint to start from instead of the newest in the run folder", may_change=True, is_path=True
    )
    other_data: str = option(
        "refuse", "training shards that are not those of the checkpoint; keep_steps: go on with them, while length, "
        "rates, freezing and all else that was given in epochs stay at the steps that they had",
        choices=("refuse", "keep_steps"), may_change=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the way: k-NN on held-out images in pre-training, all validation images in fine-tuning."""

    every: Duration = option(Duration(0, "steps"), "how often to evaluate; 0: never", unit=IN_RUN, may_change=True)
    samples: int = option(2000, "held-out images of probes, and as many training images", AT_LEAST_1, may_change=True)
    k: int = option(10, "neighbours", AT_LEAST_1, may_change=True)
    max_share: float = option(0.05, "share of the time above which probes are left out", SHARE, may_change=True)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """What only fine-tuning has; timm's names."""

    num_classes: int = option(1000, "classes of the labels, numbered from 0", AT_LEAST_1)
    global_pool: str = option("avg", "avg: mean of the patches; token: the class token", choices=("avg", "token"))
    resample_positions: bool = option(False, "fit the positions of model.init_from to another model.img_size")
    drop_path: float = option(0.1, "probability of skipping a branch of the last block, rising from 0", SHARE_BELOW_1)
    layer_decay: float = option(0.75, "factor on the learning rate from a layer to the one below it", SHARE_ABOVE_0)
    mixup: float = option(0.8, "alpha of mixup; 0: none", AT_LEAST_0)
    cutmix: float = option(1.0, "alpha of cutmix; 0: none", AT_LEAST_0)
    smoothing: float = option(0.1, "label smoothing", SHARE_BELOW_1)
    aa: str = option("rand-m9-mstd0.5-inc1", "timm's RandAugment or AutoAugment policy; '': none")
    reprob: float = option(0.25, "probability of erasing a random rectangle of an image", SHARE)
    clip_grad: float | None = option(None, "largest norm of the gradient; null: as the DeepSpeed JSON says", AT_LEAST_0)
    model_ema_decay: float = option(0.0, "decay per step of an average of the weights; 0: no average", SHARE_BELOW_1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. `origins` says where each setting that is not a default was set."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    batch: BatchConfig = BatchConfig()
    freeze: FreezeConfig = FreezeConfig()
    loss: LossConfig = LossConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
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
        return ConfigError(
            f"{key} is {_shorten(repr(value))}; allowed: {allowed} (set in {self.origins.get(key, 'the defaults')})"
        )

    @contextmanager
    def attribute_errors(self, keys: Mapping[str, str], *, steps_per_epoch: int) -> Iterator[None]:
        """Turn the error of an argument into that of the setting which, by `keys`, it was made of."""
        try:
            yield
        except ArgumentError as error:
            key = keys[error.name]
            steps = f"; with {steps_per_epoch} steps an epoch, {error.name} is {error.value}"
            here = "" if key.endswith(f".{error.name}") else steps
            raise self.error(key, f"{error.allowed}{here}") from None

    @property
    def rates(self) -> str:
        """The learning rates of the layers in one word."""
        if self.freeze.mode != "schedule":
            return f"one {self.optim.schedule}"
        scaled = "scaled" if self.freeze.scale_lr else "unscaled"
        if self.freeze.rates == "stable" and self.optim.schedule == "cosine":
            return "stable"  # only the heads follow the cosine
        return scaled if self.freeze.rates == "cosine" else f"{self.freeze.rates} {self.optim.schedule}"

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
        with _reading_yaml(f"the override {_shorten(override)!r}"):
            node = _compose_yaml(text, f"the override {_shorten(override)!r}")
            value = None if node is None else yaml.SafeLoader("").construct_object(node, deep=True)
        values[key.strip()] = (value, COMMAND_LINE)
    return pin_extensions(build_config(values, recipe=path.stem))


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


def pin_extensions(config: Config) -> Config:
    """Return the settings with the versions of what other packages register; raises ConfigError for unknown names."""
    for key, value, option_field in settings(config):
        if group := option_field.metadata["group"]:
            try:
                pinned = pin_version(group, value)
            except ExtensionError as error:
                raise config.error(key, error.allowed) from None
            section, _, name = key.partition(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: pinned})})
    if config.model.target != "hog":
        for key in ("model.hog_nbins", "model.hog_bias"):
            if key in config.origins:
                raise config.error(key, f"left out, because model.target is {config.model.target}, which is not HOG")
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
            raise ConfigError(f"there is no recipe file {str(recipe)!r}{suggest_path(Path(recipe))}")
        return Path(recipe)
    path = RECIPE_FOLDER / f"{recipe}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in RECIPE_FOLDER.glob("*.yaml"))
        nearest = find_nearest(str(recipe), names)
        meant = f" (did you mean {nearest}?)" if nearest else ""
        raise ConfigError(
            f"there is no recipe {str(recipe)!r}{meant}; there are {', '.join(names)}, or give a .yaml file"
        )
    return path


def find_ds_config(name: str) -> Path:
    """Return a DeepSpeed JSON: a path that ends in .json, or a name in ds_configs/.

    Raises:
        ConfigError: there is no such file.
    """
    folder = find_ds_config_folder()
    path = Path(name) if name.endswith(".json") else folder / f"{name}.json"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.json"))
        nearest = find_nearest(name, known)
        meant = suggest_path(path) if name.endswith(".json") else f"; did you mean {nearest}?" if nearest else ""
        names = ", ".join(known) or f"none in {folder}"
        raise ConfigError(f"run.ds_config is {name!r}; allowed: a .json file that exists, or one of {names}{meant}")
    return path


def find_ds_config_folder() -> Path:
    """Return ds_configs/: inside the package where a wheel put it, and beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    packed = package / "ds_configs"
    return packed if packed.is_dir() else package.parent / "ds_configs"


def check_config(config: Config) -> None:
    """Check what can be checked without data, ranks or torch; raises ConfigError."""
    for key, value, option_field in settings(config):
        if not is_allowed(value, option_field):
            raise config.error(key, describe_allowed(option_field))
    if (config.optim.blr is None) == (config.optim.base_lr is None):
        raise config.error("optim.base_lr", f"one of base_lr and blr, the other null; blr is {config.optim.blr!r}")
    shares = [share for share, _ in config.loss.scale_weights]
    rows = [weights for _, weights in config.loss.scale_weights]
    well_formed = all(len(row) == len(HEAD_SCALES) and min(row) >= 0 and max(row) > 0 for row in rows)
    if not well_formed or shares != sorted(set(shares)) or not all(share in SHARE for share in shares):
        raise config.error("loss.scale_weights", _SCALE_WEIGHTS)
    _check_curriculum(config)
    if config.optim.cooldown_from is not None and config.optim.schedule != "wsd":
        raise config.error("optim.cooldown_from", "null, because optim.schedule is not wsd")
    if config.optim.schedule == "wsd" and config.freeze.mode == "schedule" and config.freeze.rates == "cosine":
        raise config.error(
            "freeze.rates", "global or stable with optim.schedule wsd, which leaves open where the run ends"
        )
    _check_model(config)


def _check_curriculum(config: Config) -> None:
    between = Range(0, 1, open_low=True, open_high=True)
    ranges = {"img_size": AT_LEAST_1, "mask_ratio": between, "decoded_share": SHARE_ABOVE_0}
    _check_order(config, "data.train", config.data.train_stages)
    for name, within in ranges.items():
        stages: Stages = getattr(config.curriculum, name)
        _check_order(config, f"curriculum.{name}", stages)
        if not all(value in within for _, value in stages):
            raise config.error(f"curriculum.{name}", f"values {within}")
    sizes = [size for _, size in config.curriculum.img_size]
    if sizes and (sizes[-1] != config.model.img_size or any(size != int(size) for size in sizes)):
        allowed = f"whole numbers, the last of them model.img_size, which is {config.model.img_size}"
        raise config.error("curriculum.img_size", allowed)
    try:
        for size in sizes:
            cell_sizes(img_size=int(size), patch_size=config.model.resolve().patch_size)
    except ValueError as error:
        raise config.error("curriculum.img_size", str(error)) from None


def _check_order(config: Config, key: str, stages: Stages | ShardStages) -> None:
    """Refuse stages that do not begin with 0 and rise, as far as that shows without the number of steps."""
    begins = [begin for begin, _ in stages]
    alike = len({begin.unit for begin in begins[1:]}) < 2  # others can be compared only in steps
    rises = not alike or all(a.value < b.value for a, b in pairwise(begins))
    if stages and (begins[0].value or not rises or any(begin.unit == "minutes" for begin in begins)):
        raise config.error(key, _NOUNS["TrainShards" if key == "data.train" else "Stages"])


def _check_model(config: Config) -> None:
    size = config.model.resolve()
    for name, heads_name in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
        width, heads = getattr(size, name), getattr(size, heads_name)
        if width % heads or width % 4:
            allowed = f"a multiple of 4 and of {heads_name} ({heads}), and here it is {width}"
            raise config.error(f"model.{name}", allowed)
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
    if total % world_size == 0 and (micro is None or total // world_size < micro):
        return total // world_size, 1
    if micro is None:
        raise config.error(
            "batch.global_size", f"a multiple of the {world_size} ranks; {total} / {world_size} is not whole"
        )
    if total % (micro * world_size):
        raise config.error(
            "batch.global_size",
            f"a multiple of batch.micro_size x ranks = {micro} x {world_size} = {micro * world_size}; "
            f"{total} / {micro * world_size} = {total / (micro * world_size):.3f}",
        )
    return micro, total // (micro * world_size)


@dataclass(frozen=True, kw_only=True)
class StepCounts:
    """Every duration of a run in optimizer steps, converted once.

    `total_steps` is the length of the run as it was planned, of which shares are taken; `end_step` where it ends, which
    a cooldown from an earlier step brings forward.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    end_step: int

    @property
    def cooldown_start(self) -> int:
        """The step at which the cooldown begins."""
        return self.end_step - self.cooldown_steps


def check_run_length(*, total_steps: int, warmup_steps: int) -> None:
    """Refuse a run without steps, and a warm-up that leaves no step after it; raises ArgumentError."""
    if total_steps < 1:
        raise ArgumentError("total_steps", total_steps, "at least 1 step")
    if not 0 <= warmup_steps < total_steps:
        allowed = f"0 to {total_steps - 1} steps, shorter than the run: {warmup_steps} of {total_steps} steps"
        raise ArgumentError("warmup_steps", warmup_steps, allowed)


def count_steps(config: Config, *, steps_per_epoch: int) -> StepCounts:
    """Convert the durations of a run; raises ConfigError when the warm-up leaves nothing or the run is empty."""
    total = config.run.length.to_steps(steps_per_epoch=steps_per_epoch)
    optim = config.optim
    warmup = optim.warmup.to_steps(steps_per_epoch=steps_per_epoch, total_steps=total)
    keys = {"total_steps": "run.length", "warmup_steps": "optim.warmup"}
    with config.attribute_errors(keys, steps_per_epoch=steps_per_epoch):
        check_run_length(total_steps=total, warmup_steps=warmup)
    cooldown, end = 0, total
    if optim.schedule == "wsd":
        cooldown = max(1, optim.cooldown.to_steps(steps_per_epoch=steps_per_epoch, total_steps=total))
        if warmup + cooldown > total:
            raise config.error("optim.cooldown", f"at most {total - warmup} steps, {warmup} of {total} being warm-up")
    if optim.cooldown_from is not None:
        begin = optim.cooldown_from.to_steps(steps_per_epoch=steps_per_epoch, total_steps=total)
        if not warmup <= begin <= total - cooldown:
            raise config.error(
                "optim.cooldown_from",
                f"step {warmup} to {total - cooldown}, behind the warm-up and before the run cools down by itself",
            )
        end = begin + cooldown
    return StepCounts(
        steps_per_epoch=steps_per_epoch, total_steps=total, warmup_steps=warmup, cooldown_steps=cooldown, end_step=end
    )


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
    """Return every setting with its value, where it was set, its one-line explanation and what it may be."""
    lines = []
    for key, value, option_field in settings(config):
        note = f"  [{config.origins[key]}]" if key in config.origins else ""
        lines.append(f"{key} = {_plain(value)!r}{note}\n    {option_field.metadata['help']}")
        lines.append(f"    allowed: {describe_allowed(option_field)}")
    return "\n".join(lines)


def differing_settings(config: Config, other: Config, *, free: Collection[str] = ()) -> list[str]:
    """Return a line for each setting, but `free` ones, that a resumed run may not change and that differs."""
    lines = []
    for (key, mine, option_field), (_, theirs, _) in zip(settings(config), settings(other), strict=True):
        fixed = not option_field.metadata["may_change"] or (key == "data.train" and _moves_stages(config, other))
        if mine != theirs and key not in free and fixed:
            lines.append(f"{key}: {_plain(theirs)!r} there, {_plain(mine)!r} now")
    return lines


def _moves_stages(config: Config, other: Config) -> bool:
    """Say whether shards that lie elsewhere now, as they may, would also be used at other steps."""
    mine, theirs = ([begin for begin, _ in of.data.train_stages] for of in (config, other))
    return mine != theirs and config.resume.other_data == "refuse"


def overrides_between(config: Config, other: Config) -> list[str]:
    """Return the overrides `section.key=value` that make `other` of `config`."""
    return [
        f"{key}={_format_value(_plain(theirs))}"
        for (key, mine, _), (_, theirs, _) in zip(settings(config), settings(other), strict=True)
        if mine != theirs
    ]


def _format_value(value: Any) -> str:
    """Return a plain value as an override spells it."""
    if isinstance(value, list):
        return f"[{', '.join(_format_value(item) for item in value)}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _read_recipe(path: Path, *, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, Any, str]]:
    """Yield ('section.key', plain value, where it stands) from a YAML file of sections, those of its base first."""
    if path.resolve() in above:
        raise ConfigError(f"{path} is, by way of `base:`, its own base")
    if len(above) > _MOST_BASES:
        raise ConfigError(f"{above[0]} has more than {_MOST_BASES} recipes below one another by way of `base:`")
    with _reading_yaml(path):
        if path.stat().st_size > _MOST_RECIPE_BYTES:
            raise ConfigError(f"{path} is larger than {_MOST_RECIPE_BYTES >> 20} MiB, which no recipe is")
        root = _compose_yaml(path.read_text(), str(path))
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
            with _reading_yaml(f"{path} line {key_node.start_mark.line + 1}"):
                value = yaml.SafeLoader("").construct_object(value_node, deep=True)
            yield key, value, where


@contextmanager
def _reading_yaml(where: str | Path) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{where} is not readable YAML: it is nested too deeply") from None
    # PyYAML raises what Python's own conversions do: !!bool x is a KeyError, !!int _ an IndexError.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, ArithmeticError, AttributeError) as error:
        raise ConfigError(f"{where} is not readable YAML: {_shorten(' '.join(str(error).split()))}") from None


def _compose_yaml(text: str, where: str) -> yaml.Node | None:
    """Return the nodes of a YAML text; raises ConfigError for one that would grow without bound when it is read."""
    root: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None and _count_nodes(root, {}) > _MOST_NODES:
        raise ConfigError(f"{where} stands for more than {_MOST_NODES:,} values, or for itself, by its aliases")
    return root


def _count_nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """Return how many values a node stands for when its aliases are written out."""
    if id(node) not in known:
        known[id(node)] = math.inf  # if it is met again inside of itself
        inner = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
        if isinstance(node, yaml.ScalarNode):
            if node.tag != "tag:yaml.org,2002:str" and len(node.value) > _LONGEST_NUMBER:
                raise yaml.YAMLError(f"a number of {len(node.value):,} characters")
            inner = ()
        known[id(node)] = 1 + sum(_count_nodes(child, known) for child in inner)
    return known[id(node)]


def _shorten(text: str) -> str:
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}..."


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
    if key == "data.train":
        return _convert_shards(value)
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if key == "loss.scale_weights":
        return _convert_scale_weights(value)
    if key.startswith("curriculum."):
        return _convert_stages(value)
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        kind, *others = typing.get_args(hint)
        converted = tuple(_convert(item, kind, key=key) for item in items if item != "")
        if others != [...] and len(converted) != 1 + len(others):
            raise ValueError(_NOUNS[f"tuple[{', '.join(['float'] * (1 + len(others)))}]"])
        return converted
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
    if isinstance(value, bool):
        raise ValueError("a number")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError("a number") from None
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def _convert_stages(value: Any) -> Stages:
    if not isinstance(value, list) or not all(isinstance(row, list) and len(row) == 2 for row in value):
        raise ValueError(_NOUNS["Stages"])
    return tuple((Duration.parse(begin), _convert_number(of)) for begin, of in value)


def _convert_shards(value: Any) -> TrainShards:
    """Convert shards, or the shards of stages: the first item of a stage's pair is a number or a duration."""
    if not (isinstance(value, list) and any(isinstance(item, list) for item in value)):
        return typing.cast(ShardNames, _convert(value, ShardNames, key=""))
    if not all(isinstance(row, list) and len(row) == 2 for row in value):
        raise ValueError(_NOUNS["TrainShards"])
    stages = tuple((Duration.parse(begin), _convert(names, ShardNames, key="")) for begin, names in value)
    if not all(names for _, names in stages):
        raise ValueError(f"{_NOUNS['TrainShards']}, none of them empty")
    return stages


def _convert_scale_weights(value: Any) -> tuple[tuple[float, tuple[float, ...]], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(_SCALE_WEIGHTS)
    if not isinstance(value[0], list):
        return ((0.0, tuple(_convert_number(item) for item in value)),)
    rows = []
    for row in value:
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[1], list)):
            raise ValueError(_SCALE_WEIGHTS)
        rows.append((_convert_number(row[0]), tuple(_convert_number(item) for item in row[1])))
    return tuple(rows)
