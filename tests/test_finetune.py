"""Fine-tuning: the classifier, its schedule, whole runs, resuming, accuracy over ranks, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from layers import layer_of
from processes import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from vitfreeze.architecture import MODEL_SIZES
from vitfreeze.config import Config, ConfigError, build_config, choose_task, load_config
from vitfreeze.data import ShardError, normalize, open_split
from vitfreeze.data.finetuning import FinetuneTransform
from vitfreeze.data.order import SampleRandom
from vitfreeze.engine.units import plan_groups
from vitfreeze.export import ARCHITECTURE, timm_arguments
from vitfreeze.model import Classifier, LocalMIM, averaged_weights, to_timm
from vitfreeze.pretrained import encoder_weights, read_pretrained
from vitfreeze.schedule import build_schedule
from vitfreeze.training.finetune import Finetuning, finetune
from vitfreeze.training.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[1]
SIZE = MODEL_SIZES["vit_tiny_test"]
CLASSES = 12
SETTINGS: dict[str, Any] = {
    "model.size": "vit_tiny_test",
    "model.img_size": 64,
    "data.workers": 0,
    "optim.blr": None,
    "optim.base_lr": 1e-3,
    "optim.warmup": "2 steps",
    "batch.global_size": 8,
    "batch.micro_size": 4,
    "freeze.t_0": 0.4,
    "finetune.num_classes": CLASSES,
    "finetune.drop_path": 0.1,
    "finetune.model_ema_decay": 0.9,
    "run.length": "12 steps",
    "run.log_every_steps": 4,
    "checkpoint.every": "5 steps",
    "checkpoint.keep": 10,
    "eval.every": "6 steps",
}


def make_config(demo_shards: Path, run_dir: Path, **changes: Any) -> Config:
    values = {
        **SETTINGS,
        "data.train": str(demo_shards),
        "data.val": str(demo_shards),
        "run.dir": str(run_dir),
        **changes,
    }
    return build_config({key: (value, "the test") for key, value in values.items()}, recipe="tiny")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def run_dir(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run in this process, with FreezeOut and an average of the weights."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    assert finetune(make_config(demo_shards, directory)) == 0
    return directory


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make_classifier(**options: Any) -> Classifier:
    torch.manual_seed(1)
    model = Classifier(size=SIZE, img_size=64, num_classes=CLASSES, **options)
    torch.nn.init.normal_(model.head.weight, std=0.1)  # so that there is something to compare
    return model


# The classifier ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_classifier_is_timms_model(pool: str, images: Tensor) -> None:
    model = make_classifier(global_pool=pool).eval()
    theirs = timm.create_model(
        ARCHITECTURE, num_classes=CLASSES, global_pool=pool, **timm_arguments(SIZE, img_size=64)
    ).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, theirs(images), rtol=1e-6, atol=1e-6)


def test_frozen_prefix_has_no_gradient_and_leaves_the_others_theirs(images: Tensor) -> None:
    targets = torch.tensor([0, 5, 11])
    gradients = {}
    for frozen_layers in (0, 3):
        model = make_classifier()
        model(images, targets=targets, frozen_layers=frozen_layers).loss.backward()
        gradients[frozen_layers] = {name: x.grad for name, x in model.named_parameters()}
    for name, gradient in gradients[3].items():
        layer = layer_of(name)
        if layer is not None and layer < 3:
            assert gradient is None, name
        else:
            assert gradient is not None, name
            assert torch.equal(gradient, gradients[0][name]), name


def test_recomputing_activations_changes_no_gradient(images: Tensor) -> None:
    gradients = []
    for recompute in (False, True):
        model = make_classifier(drop_path=0.5, activation_checkpointing=recompute)
        torch.manual_seed(7)
        model(images, targets=torch.tensor([0, 5, 11]), frozen_layers=2).loss.backward()
        gradients.append(model.blocks[4].mlp.fc1.weight.grad)
    assert torch.equal(*gradients)


def test_groups_hold_every_parameter_once_and_decay_no_token() -> None:
    model = make_classifier()
    plans = plan_groups(model)
    names = [name for plan in plans for name in plan.parameter_names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    decays = {name: plan.decays for plan in plans for name in plan.parameter_names}
    units = {name: plan.unit.name for plan in plans for name in plan.parameter_names}
    assert not decays["cls_token"]
    assert not decays["pos_embed"]
    assert decays["head.weight"]
    assert units["head.weight"] == units["fc_norm.bias"] == "classifier"
    assert units["pos_embed"] == "layer_00"
    assert plans[0].unit.name == "classifier"
    assert plans[-1].unit.name == "layer_00"


def test_classifier_begins_with_the_encoder(images: Tensor) -> None:
    torch.manual_seed(2)
    encoder = LocalMIM(
        img_size=64, patch_size=8, embed_dim=48, depth=8, num_heads=3, decoder_embed_dim=32, decoder_num_heads=2
    )
    model = make_classifier(average_decay=0.9)
    fresh = model.head.weight.clone()
    model.load_encoder(to_timm(encoder.state_dict()))
    with torch.no_grad():
        expected = encoder.encode(images, blocks=[8])[0]
        found = model.eval().forward_features(images)
    assert (found - expected).norm() / expected.norm() < 1e-6
    assert torch.equal(model.head.weight, fresh)
    assert torch.equal(averaged_weights(model.state_dict())["cls_token"], encoder.cls_token)
    with pytest.raises(ValueError, match=r"blocks\.3\.norm1\.weight of shape \(48,\) is missing"):
        model.load_encoder({k: x for k, x in to_timm(encoder.state_dict()).items() if k != "blocks.3.norm1.weight"})


def test_average_follows_its_formula() -> None:
    model = make_classifier(average_decay=0.75)
    expected = model.head.bias.detach().clone()
    for step in range(3):
        with torch.no_grad():
            model.head.bias.add_(torch.arange(float(CLASSES)) * (step + 1))
        model.update_average()
        expected = 0.75 * expected + 0.25 * model.head.bias.detach()
    torch.testing.assert_close(averaged_weights(model.state_dict())["head.bias"], expected)


def test_average_keeps_float32_beside_half_weights(images: Tensor) -> None:
    model = make_classifier(average_decay=0.999)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    before = averaged_weights(model.state_dict())["head.bias"].clone()
    with torch.no_grad():
        model.head.bias.add_(1)
    model.update_average()
    moved = averaged_weights(model.state_dict())["head.bias"] - before
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.full_like(moved, 0.001), rtol=1e-3, atol=0)


def test_smaller_images_have_the_positions_of_the_same_places() -> None:
    model = make_classifier().eval()
    with torch.no_grad():
        tokens = [model._pos_embed(torch.zeros(1, side // 8, side // 8, 48)) for side in (64, 32)]
        large, small = (token[0, 1:].view(side, side, 48) for token, side in zip(tokens, (8, 4), strict=True))
        means = large.view(4, 2, 4, 2, 48).mean(dim=(1, 3))  # of the four patches that cover the same place
        assert torch.nn.functional.cosine_similarity(means, small, dim=-1).min() > 0.97
        assert model(torch.zeros(2, 3, 32, 32)).logits.shape == (2, CLASSES)


# The schedule --------------------------------------------------------------------------------------------------------


def test_layer_decay_as_in_mae(demo_shards: Path, tmp_path: Path) -> None:
    config = make_config(demo_shards, tmp_path / "run", **{"freeze.mode": "off", "finetune.layer_decay": 0.5})
    schedule = build_schedule(choose_task(config, "finetune"), steps_per_epoch=10)
    rates = schedule.at(5).learning_rates
    whole = schedule.shared.learning_rate(5)
    assert rates["classifier"] == whole
    assert rates["layer_08"] == pytest.approx(whole / 2)
    assert rates["layer_00"] == pytest.approx(whole / 2**9)
    assert not any(name.startswith("head_") for name in rates)


def test_freezing_is_freezeout_times_the_decay(demo_shards: Path, tmp_path: Path) -> None:
    schedule = build_schedule(choose_task(make_config(demo_shards, tmp_path / "run"), "finetune"), steps_per_epoch=10)
    assert schedule.layers is not None
    assert schedule.at(4).learning_rates["layer_03"] == pytest.approx(schedule.layers.learning_rate(3, 4) * 0.75**6)
    assert schedule.at(11).frozen_layers > schedule.at(4).frozen_layers


# Whole runs ----------------------------------------------------------------------------------------------------------


def test_run_measures_what_it_exports(run_dir: Path, demo_shards: Path) -> None:
    lines = read_lines(run_dir / "metrics.jsonl")
    measured = [line["eval"] for line in lines if "eval" in line]
    assert [line["step"] for line in lines if "eval" in line] == [6, 12]
    assert all(worth["images"] == 25 for worth in measured)
    assert set(measured[-1]) >= {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss"}
    model = timm.create_model(f"local-dir:{run_dir / 'model'}", pretrained=True).eval()
    logits, labels = [], []
    with torch.no_grad():
        for batch in open_split(make_config(demo_shards, run_dir), "validation", num_classes=CLASSES):
            logits.append(model(normalize(batch.images)))
            labels.append(batch.labels)
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels))
    assert float(loss) == pytest.approx(measured[-1]["ema_loss"], rel=1e-5)
    top1 = (torch.cat(logits).argmax(dim=1) == torch.cat(labels)).double().mean()
    assert float(top1) == pytest.approx(measured[-1]["ema_top1"])


def test_run_freezes_and_says_so(run_dir: Path) -> None:
    freezes = [line for line in read_lines(run_dir / "events.jsonl") if line["event"] == "freeze"]
    assert freezes
    assert all(line["heads"] == [] for line in freezes)
    elements = [line["gradient_elements"] for line in read_lines(run_dir / "metrics.jsonl")]
    assert elements[-1] < elements[0]
    card = (run_dir / "model" / "README.md").read_text()
    assert "fine-tuned" in card
    assert "| finished |" in card
    assert "| validation images | 25 |" in card
    early, late = (read_pretrained(run_dir / "checkpoints" / f"step-{step:08d}").weights for step in (10, 12))
    assert torch.equal(early["patch_embed.proj.weight"], late["patch_embed.proj.weight"])
    assert not torch.equal(early["head.weight"], late["head.weight"])


def test_resumed_run_ends_with_the_same_bits(run_dir: Path, demo_shards: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    (again / "checkpoints").mkdir(parents=True)
    shutil.copy(run_dir / "config.yaml", again)
    shutil.copytree(run_dir / "checkpoints" / "step-00000005", again / "checkpoints" / "step-00000005")
    assert finetune(make_config(demo_shards, again)) == 0
    expected, found = (load_file(place / "model" / "model.safetensors") for place in (run_dir, again))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    last = [read_lines(place / "metrics.jsonl")[-1] for place in (run_dir, again)]
    assert last[0]["eval"] == last[1]["eval"]


def test_small_images_first_resume_to_the_bit(demo_shards: Path, tmp_path: Path) -> None:
    sizes = {"curriculum.img_size": [[0, 32], ["5 steps", 48], ["8 steps", 64]], "batch.grow_micro_batch": True}
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert finetune(make_config(demo_shards, whole, **sizes)) == 0
    events = read_lines(whole / "events.jsonl")
    assert [line["step"] for line in events if line["event"] == "stage"] == [5, 8]
    assert next(line["micro_batch"] for line in events if line["event"] == "micro_batch") == 8
    for step in (5, 10):
        (again / "checkpoints").mkdir(parents=True)
        shutil.copy(whole / "config.yaml", again)
        name = f"step-{step:08d}"
        shutil.copytree(whole / "checkpoints" / name, again / "checkpoints" / name)
        assert finetune(make_config(demo_shards, again, **sizes)) == 0
        expected, found = (load_file(place / "model" / "model.safetensors") for place in (whole, again))
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
        shutil.rmtree(again)


def test_what_is_drawn_for_an_image_does_not_depend_on_its_size() -> None:
    pixels = np.zeros((120, 160, 3), dtype=np.uint8)
    pixels[:60] = (200, 100, 50)
    pixels[:, :50] = (20, 220, 90)
    transform = FinetuneTransform(img_size=64, auto_augment="")
    for sample in range(8):
        crops = []
        for side in (64, 32):
            random = SampleRandom(0)
            random.seek(epoch=0, sample=sample, crop=0)
            crops.append(torch.empty(3, side, side, dtype=torch.uint8))
            transform.apply(pixels, random, crops[-1])
        large, small = (crop.float() for crop in crops)
        assert (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean() < 4


def finetune_here(values: dict[str, Any], folder: str) -> int:
    """What each rank does."""
    return finetune(make_config(Path(folder), Path(values["run.dir"]), **values))


@pytest.mark.distributed
def test_two_ranks_count_every_image_once(demo_shards: Path, tmp_path: Path) -> None:
    """25 validation images on two ranks: 13 and 12."""
    directory = tmp_path / "two"
    assert run_ranks(finetune_here, {"run.dir": str(directory)}, str(demo_shards)) == [0, 0]
    worth = read_lines(directory / "metrics.jsonl")[-1]["eval"]
    assert worth["images"] == 25
    model = timm.create_model(f"local-dir:{directory / 'model'}", pretrained=True).eval()
    right = 0
    with torch.no_grad():
        for batch in open_split(make_config(demo_shards, directory), "validation"):
            right += int((model(normalize(batch.images)).argmax(dim=1) == batch.labels).sum())
    assert worth["ema_top1"] == pytest.approx(right / 25)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_recipes_are_localmims() -> None:
    b100, b1600, large = (load_config(f"finetune_{name}") for name in ("b_100ep", "b_1600ep", "l"))
    assert (b100.base_lr, b100.optim.min_lr, b100.finetune.layer_decay) == (4e-3, 1e-6, 0.75)
    assert (b1600.base_lr, b1600.optim.min_lr, b1600.finetune.layer_decay) == (2e-3, 1e-5, 0.65)
    assert (large.base_lr, large.finetune.drop_path, str(large.optim.warmup)) == (3e-3, 0.2, "5 epochs")
    assert (str(b100.run.length), str(large.run.length)) == ("100 epochs", "50 epochs")
    assert b100.batch.global_size == b1600.batch.global_size == large.batch.global_size == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.every": "0 steps"}, r"eval\.every is '0 steps'; allowed: above 0"),
        ({"data.val": []}, r"data\.val is .*; allowed: labelled validation shards"),
        ({"curriculum.mask_ratio": [[0, 0.5]]}, r"curriculum\.mask_ratio is .* `vitfreeze finetune` has no use for it"),
        ({"model.mask_ratio": 0.5}, r"model\.mask_ratio is 0\.5; .* `vitfreeze finetune` has no use for it"),
        ({"finetune.aa": "nonsense"}, r"finetune\.aa is 'nonsense'; allowed: a policy of timm"),
        ({"finetune.layer_decay": 1.5}, r"finetune\.layer_decay is 1\.5; allowed: a number in \(0, 1\]"),
        ({"finetune.global_pool": "max"}, r"finetune\.global_pool is 'max'; allowed: one of avg, token"),
        ({"model.init_from": "nothing"}, r"model\.init_from is 'nothing'; .*no run folder or file"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str, demo_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        Finetuning(make_config(demo_shards, tmp_path / "run", **changes))


def test_weights_of_another_size_are_refused_and_leave_no_folder(
    run_dir: Path, demo_shards: Path, tmp_path: Path
) -> None:
    changes = {"model.init_from": str(run_dir), "model.embed_dim": 96, "model.img_size": 32}
    with pytest.raises(ConfigError, match=r"not with embed_dim 48 there and 96 here, img_size 64 there and 32 here"):
        finetune(make_config(demo_shards, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_positions_are_fitted_to_another_image_size_on_request_only(
    run_dir: Path, demo_shards: Path, tmp_path: Path
) -> None:
    changes = {"model.init_from": str(run_dir), "model.img_size": 96}
    with pytest.raises(ConfigError, match=r"img_size 64 there and 96 here; .*finetune.resample_positions=true fits"):
        finetune(make_config(demo_shards, tmp_path / "run", **changes))
    changes["finetune.resample_positions"] = True
    model = Finetuning(make_config(demo_shards, tmp_path / "run", **changes)).build_model(is_new=True)
    before = encoder_weights(read_pretrained(run_dir))
    assert model.pos_embed.shape == (1, 1 + 12**2, 48)
    assert torch.equal(model.pos_embed[:, 0], before["pos_embed"][:, 0]), "the class token's stays"
    # Half as many again in each direction: every second old place lies between two new ones that resemble it.
    old, new = before["pos_embed"][0, 1:].view(8, 8, 48), model.pos_embed[0, 1:].view(12, 12, 48)
    likeness = torch.nn.functional.cosine_similarity(old[1::2, 1::2], new[2::3, 2::3], dim=-1)
    assert likeness.min() > 0.8
    assert torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])
    assert model(torch.zeros(2, 3, 96, 96)).logits.shape == (2, CLASSES)


def test_wrong_number_of_classes_is_refused(demo_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ShardError, match=r"does not go with 5 classes \(finetune.num_classes\).*label \d+ is not below 5"
    ):
        finetune(make_config(demo_shards, tmp_path / "run", **{"finetune.num_classes": 5}))
    assert not (tmp_path / "run").exists(), "found before a folder is made"


@pytest.mark.parametrize(("task", "other"), [(pretrain, "finetune"), (finetune, "pretrain")])
def test_a_recipe_for_the_other_task_is_refused(task: Callable[[Config], int], other: str, tmp_path: Path) -> None:
    config = load_config("paper", [f"run.task={other}", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=rf"run.task is '{other}'; .*or use `vitfreeze {other}`"):
        task(config)
    assert not (tmp_path / "run").exists()


def test_pretraining_refuses_a_recipe_that_looks_like_fine_tuning(tmp_path: Path) -> None:
    config = load_config("paper", ["finetune.num_classes=1000", f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"finetune.num_classes is a setting of fine-tuning.*add run.task=finetune"):
        pretrain(config)


def test_pretraining_refuses_settings_of_fine_tuning(demo_shards: Path, tmp_path: Path) -> None:
    from vitfreeze.training.pretrain import Pretraining

    with pytest.raises(ConfigError, match=r"finetune\.\w+ is .*`vitfreeze pretrain` has no use for it"):
        Pretraining(make_config(demo_shards, tmp_path / "run"))
