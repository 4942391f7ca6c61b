"""How large the study is: model, length of the plain run, labels. Chosen once and the same for every arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

Settings = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of the study.

    Attributes:
        encoder: model settings that pre-training and fine-tuning share.
        pretraining: settings of every arm's pre-training but its recipe, length, rate and seed.
        finetuning: settings of fine-tuning; `recipe` names the one that they change.
        steps: steps of the plain run of budget 1, a multiple of 10, whatever the number of images.
        finetuning_steps, all_labels_steps: steps of fine-tuning with few labels, and with all.
        blr: learning rate per 256 images where none is tuned or given.
        labels: labels for fine-tuning, unless all are wanted.
        held_out: training images put aside for every choice.
        stored_pixels: shorter side to which larger images are shrunk when a folder is packed.
        small_first: image sizes of the arms that begin with small images: share of the run, pixels.
        probe: options of both probes.
        linear: options of the linear probe.
        all_labels: whether fine-tuning always sees all labels.
        teraflops: what a GPU is assumed to sustain, for planned hours; where it is set, nothing is run, and the
            commands are written down instead.
    """

    encoder: Settings
    pretraining: Settings
    finetuning: Settings
    recipe: str
    steps: int
    finetuning_steps: int
    all_labels_steps: int
    blr: float
    labels: int
    held_out: int
    stored_pixels: int
    small_first: str
    probe: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    all_labels: bool = False
    teraflops: float | None = None


_LIGHT = {  # few epochs on few labels: a crop and a mirror, smoothed labels, nothing else
    "optim.warmup": "10%",
    "finetune.drop_path": "0",
    "finetune.mixup": "0",
    "finetune.cutmix": "0",
    "finetune.aa": "",
    "finetune.reprob": "0",
}
_CPU_ENCODER = {
    "model.size": "vit_small_patch16",
    "model.img_size": "48",
    "model.patch_size": "8",
    "model.embed_dim": "96",
    "model.depth": "8",
    "model.num_heads": "3",
}
_GPU_ENCODER = {
    "model.size": "vit_small_patch16",
    "model.img_size": "64",
    "model.patch_size": "8",
    "model.embed_dim": "192",
    "model.depth": "12",
    "model.num_heads": "3",
}

SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "minutes": Size(
            encoder={"model.size": "vit_tiny_test", "model.img_size": "32"},
            pretraining={
                "batch.global_size": "16",
                "batch.micro_size": "16",
                "optim.warmup": "10%",
                "data.workers": "0",
                "run.ds_config": "cpu",
                "run.log_every_steps": "5",
            },
            finetuning={
                **_LIGHT,
                "batch.global_size": "16",
                "batch.micro_size": "16",
                "data.workers": "0",
                "run.ds_config": "cpu",
            },
            recipe="finetune_b_100ep",
            steps=20,
            finetuning_steps=12,
            all_labels_steps=12,
            blr=8e-3,
            labels=48,
            held_out=24,
            stored_pixels=64,
            small_first="[[0, 16], [0.6, 32]]",
            linear=("--epochs", "12", "--warmup-epochs", "1"),
        ),
        "cpu": Size(
            encoder=_CPU_ENCODER,
            pretraining={
                "model.decoder_embed_dim": "48",
                "model.decoder_num_heads": "2",
                "batch.global_size": "128",
                "batch.micro_size": "128",
                "optim.warmup": "10%",
                "data.workers": "0",
                "run.ds_config": "cpu",
                "run.log_every_steps": "10",
            },
            finetuning={
                **_LIGHT,
                "optim.base_lr": "2e-3",
                "data.crop_scale": "[0.35, 1.0]",
                "batch.global_size": "128",
                "batch.micro_size": "128",
                "data.workers": "0",
                "run.ds_config": "cpu",
            },
            recipe="finetune_b_100ep",
            steps=1400,
            finetuning_steps=312,
            all_labels_steps=1050,  # three epochs
            blr=2e-3,  # the best of four for plain, by fine-tuning after the whole run (docs/what_freezing_buys.md)
            labels=5000,
            held_out=5000,
            stored_pixels=72,
            small_first="[[0, 32], [0.6, 48]]",
            probe=("--limit", "10000"),
            linear=("--blr", "1", "3", "10", "30", "100"),
        ),
        "gpu": Size(
            encoder=_GPU_ENCODER,
            pretraining={
                "model.decoder_embed_dim": "96",
                "model.decoder_num_heads": "3",
                "batch.global_size": "512",
                "batch.micro_size": "512",
                "optim.warmup": "10%",
                "data.workers": "12",
                "run.ds_config": "zero1_bf16",
            },
            finetuning={
                **_LIGHT,
                "optim.base_lr": "2e-3",
                "data.crop_scale": "[0.35, 1.0]",
                "batch.global_size": "512",
                "batch.micro_size": "512",
                "data.workers": "12",
                "run.ds_config": "zero1_bf16",
            },
            recipe="finetune_b_100ep",
            steps=8000,
            finetuning_steps=500,
            all_labels_steps=2500,
            blr=1e-3,
            labels=5000,
            held_out=5000,
            stored_pixels=96,
            small_first="[[0, 48], [0.6, 64]]",
            linear=("--blr", "1", "3", "10", "30", "100"),
        ),
        "imagenet": Size(
            encoder={},
            pretraining={"optim.warmup": "10%", "data.workers": "12", "run.ds_config": "zero1_bf16"},
            finetuning={"optim.warmup": "20%", "data.workers": "12", "run.ds_config": "zero1_bf16"},
            recipe="finetune_b_100ep",
            steps=62300,  # 100 epochs of what is left of ImageNet-1K, 2048 images a step
            finetuning_steps=124600,  # 100 epochs, 1024 images a step
            all_labels_steps=124600,
            blr=2e-4,
            labels=1_276_167,
            held_out=5000,
            stored_pixels=288,
            small_first="[[0, 160], [0.6, 224]]",  # as in the recipe `recommended`
            all_labels=True,
            teraflops=100,
        ),
    }
)
