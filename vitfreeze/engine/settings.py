"""Reading a DeepSpeed JSON: precision, ZeRO stage and communication, and nothing that the recipe owns."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from vitfreeze.config import ConfigError
from vitfreeze.files import read_json

_RECIPE = "the recipe owns it"
_LAYOUT = "it changes where a layer's values lie in ZeRO's flat buffers, on which dropping a layer relies"
_MONITOR = "DeepSpeed rebuilds its monitors whenever a layer is dropped; runs write metrics.jsonl and TensorBoard files"
_OFFLOAD = "offloaded optimizer state stays referenced by the parameters, so a dropped layer's memory never returns"

_GROUPS = "the engine lays the gradients of whole groups end to end and reduces them so"
_CHECKED = "the engine checks every step's gradients, and skips the step if one is not finite"

# Why a key that DeepSpeed knows is not allowed here.
REFUSED_KEYS: Mapping[str, str] = {
    "train_batch_size": f"{_RECIPE}: set batch.global_size, or micro_batch and accumulation of FreezingEngine",
    "train_micro_batch_size_per_gpu": f"{_RECIPE}: set batch.micro_size, or micro_batch of FreezingEngine",
    "gradient_accumulation_steps": f"{_RECIPE}: it is derived from the global batch",
    "optimizer": f"{_RECIPE}: set optim.*, or betas, eps and weight_decay of FreezingEngine",
    "scheduler": f"{_RECIPE}: set optim.* and freeze.*",
    "zero_allow_untested_optimizer": "it is set for you",
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "tensorboard": _MONITOR,
    "wandb": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "activation_checkpointing": f"{_RECIPE}: set model.activation_checkpointing, or your model's own, not reentrant",
    "amp": "use fp16 or bf16",
    "torch_autocast": "use fp16 or bf16",
    "zero_optimization.offload_optimizer": _OFFLOAD,
    "zero_optimization.cpu_offload": _OFFLOAD,
    "zero_optimization.zenflow": _OFFLOAD,
    "zero_optimization.offload_param": "it needs stage 3",
    "zero_optimization.round_robin_gradients": _LAYOUT,
    "zero_optimization.parameter_alignment": _LAYOUT,
    "zero_optimization.contiguous_gradients": _GROUPS,
    "zero_optimization.reduce_scatter": _GROUPS,
    "zero_optimization.use_multi_rank_bucket_allreduce": _GROUPS,
    "zero_optimization.allgather_partitions": "DeepSpeed does not read it in the stages that are supported",
    "zero_optimization.compute_grad_norm": "only clipping needs the norm: set gradient_clipping",
    "bf16.check_grad_overflow": _CHECKED,
    "fp16.auto_cast": "it would round the images from which the HOG targets are computed",
    "fp16.fp16_master_weights_and_grads": "it gives up the fp32 master weights",
    "bf16.bf16_master_weights_and_grads": "it gives up the fp32 master weights",
    "bf16.bf16_optimizer_states": "it gives up the fp32 moments",
}
ALLOWED_KEYS: Mapping[str, tuple[str, ...]] = {
    "": (
        *("fp16", "bf16", "zero_optimization", "gradient_clipping", "communication_data_type", "data_types"),
        *("wall_clock_breakdown", "comms_logger"),
    ),
    "fp16": (
        *("enabled", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"),
        "consecutive_hysteresis",
    ),
    "bf16": ("enabled",),
    "data_types": ("grad_accum_dtype",),
    "zero_optimization": (*("stage", "reduce_bucket_size", "allgather_bucket_size", "overlap_comm"),),
}
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size


@dataclass(frozen=True, kw_only=True)
class DeepSpeedSettings:
    """A checked DeepSpeed JSON: its content, where it came from, and the two facts that decide how state is held."""

    content: Mapping[str, Any]
    source: str
    stage: int
    precision: str  # fp32, bf16 or fp16

    @property
    def sums_in_fp32(self) -> bool:
        """Whether gradients are summed in fp32 over the micro-batches of a step."""
        return self.content.get("data_types", {}).get("grad_accum_dtype", self.precision) == "fp32"

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped by their norm."""
        return bool(self.content["gradient_clipping"])

    def refuse(self, key: str, value: object, allowed: str) -> ConfigError:
        """Return the error for a value that cannot be used."""
        return ConfigError(f"{key} = {value!r} in {self.source}: {allowed}")


def _load(ds_config: Mapping[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    if isinstance(ds_config, Mapping):
        return dict(ds_config), "the given DeepSpeed configuration"
    try:
        content = read_json(Path(ds_config))
    except ValueError as error:
        raise ConfigError(f"DeepSpeed configuration {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"DeepSpeed configuration {ds_config} holds a {type(content).__name__}, not an object")
    return content, str(ds_config)


def _check_keys(content: Mapping[str, Any], source: str, section: str = "") -> None:
    for key, value in content.items():
        path = f"{section}.{key}" if section else key
        if path in REFUSED_KEYS:
            raise ConfigError(f"{path} = {value!r} in {source} is not allowed: {REFUSED_KEYS[path]}")
        if key not in ALLOWED_KEYS[section]:
            near = difflib.get_close_matches(key, ALLOWED_KEYS[section], n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(ALLOWED_KEYS[section])}"
            raise ConfigError(f"{path} = {value!r} in {source} is not a key that can be used here; {hint}")
        if path in ALLOWED_KEYS and path:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{path} = {value!r} in {source} must be an object with keys")
            _check_keys(value, source, path)


def _enabled(content: Mapping[str, Any], section: str) -> bool:
    return bool(content.get(section, {}).get("enabled", False))


def read_settings(ds_config: Mapping[str, Any] | str | Path) -> DeepSpeedSettings:
    """Read and check a DeepSpeed configuration, given as a path to JSON or as its content.

    Raises:
        ConfigError: it cannot be read, sets what the recipe owns, asks for a ZeRO stage or a combination that is
            not supported, or leaves gradient clipping to DeepSpeed's default.
    """
    content, source = _load(ds_config)
    _check_keys(content, source)
    stage = content.get("zero_optimization", {}).get("stage")
    fp16, bf16 = _enabled(content, "fp16"), _enabled(content, "bf16")
    settings = DeepSpeedSettings(
        content=content, source=source, stage=stage, precision="fp16" if fp16 else "bf16" if bf16 else "fp32"
    )
    if stage not in (0, 1, 2) or isinstance(stage, bool):
        reason = (
            " (3 gathers every weight, frozen or not, in every pass, from buffers that a layer cannot leave)"
            if stage == 3
            else ""
        )
        raise settings.refuse("zero_optimization.stage", stage, f"allowed are 0, 1 and 2{reason}")
    if fp16 and bf16:
        raise settings.refuse("bf16.enabled", True, "only one of fp16 and bf16 may be enabled")
    if fp16 and stage == 0:
        raise settings.refuse("zero_optimization.stage", 0, "fp16 needs stage 1 or 2: stage 0 does not scale the loss")
    clipping = content.get("gradient_clipping")
    if isinstance(clipping, bool) or not isinstance(clipping, (int, float)) or clipping < 0:
        raise settings.refuse(
            "gradient_clipping", clipping, "give a norm, or 0 for none as in LocalMIM; DeepSpeed's default is 1.0"
        )
    _check_accumulation_dtype(settings)
    return settings


def _check_accumulation_dtype(settings: DeepSpeedSettings) -> None:
    dtype = settings.content.get("data_types", {}).get("grad_accum_dtype", settings.precision)
    allowed = {settings.precision, "fp32"} if settings.stage == 2 else {settings.precision}
    if dtype not in allowed:
        raise settings.refuse(
            "data_types.grad_accum_dtype",
            dtype,
            f"with {settings.precision} and stage {settings.stage} allowed is {' or '.join(sorted(allowed))}; only "
            "stage 2 keeps fp32 sums in parts, stage 1 would keep and reduce them whole on every rank",
        )


def complete_settings(
    settings: DeepSpeedSettings,
    *,
    micro_batch: int,
    accumulation: int,
    world_size: int,
    active_elements: int,
    checks_gradients: bool = True,
) -> dict[str, Any]:
    """Return what DeepSpeed is given: the settings, with the recipe's batch sizes.

    `checks_gradients`: leave it to DeepSpeed to find gradients that are not finite, parameter by parameter.

    ZeRO allocates `reduce_bucket_size` elements in every backward pass whatever the model's size, so the bucket is
    never larger than what is still trained: this memory, too, comes back as layers freeze.
    """
    zero = dict(settings.content["zero_optimization"])
    if settings.stage:
        bucket = int(zero.get("reduce_bucket_size", DEFAULT_BUCKET))
        zero["reduce_bucket_size"] = min(bucket, max(active_elements, 1))
    content = {**settings.content, "zero_optimization": zero}
    if settings.stage and checks_gradients and world_size > 1:
        # DeepSpeed's own handling of gradients cuts them into a slice for each rank that it then reduces whole all the
        # same. Python calls in a step of ViT-B's depth with and without slices (the milliseconds of the host's
        # processor in the backward pass): 2 ranks 45,472 and 39,067 (36, 34), 8: 47,818 and 36,007 (40, 37), 64: 98,124
        # and 35,327 (56, 42), 1,024: 644,052 and 35,157 (220, 31).
        zero["reduce_scatter"] = False
    if not checks_gradients:
        zero |= {"compute_grad_norm": False, "contiguous_gradients": False}
        if settings.precision == "bf16":
            content["bf16"] = {"enabled": True, "check_grad_overflow": False}
    return {
        **content,
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it makes the device wait twice in a micro-batch
        "log_level": "warning",
    }


def supports(precision: str) -> bool:
    """Return whether DeepSpeed takes fp32, bf16 or fp16 on this process's device."""
    accelerator = get_accelerator()
    supported = {"fp32": lambda: True, "bf16": accelerator.is_bf16_supported, "fp16": accelerator.is_fp16_supported}
    return bool(supported[precision]())


def best_ds_config(device: torch.device) -> str:
    """Return the name in ds_configs/ that suits a device, for runs that choose none.

    A GPU with bf16 units sums gradients in fp32, which ZeRO offers in stage 2 without whole copies on every rank; an
    older one takes fp16.
    """
    if device.type != "cuda":
        return "cpu"
    return "zero2_bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "zero1_fp16"
