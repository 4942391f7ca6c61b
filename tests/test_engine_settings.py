"""Which DeepSpeed configurations are taken, and what is said about the others."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from vitfreeze.config import ConfigError, find_ds_config
from vitfreeze.engine.launch import check_version
from vitfreeze.engine.settings import best_ds_config, complete_settings, read_settings

FOLDER = Path(__file__).resolve().parents[1] / "ds_configs"
SHIPPED = sorted(path.name for path in FOLDER.glob("*.json"))
GOOD: dict[str, Any] = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0}


def change(**changes: Any) -> dict[str, Any]:
    return {**GOOD, **changes}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_what_their_names_say(name: str) -> None:
    settings = read_settings(FOLDER / name)
    if name == "cpu.json":
        assert (settings.stage, settings.precision) == (1, "fp32")
    else:
        stage, precision = name.removesuffix(".json").split("_")
        assert (f"zero{settings.stage}", settings.precision) == (stage, precision)
    assert settings.content["gradient_clipping"] == 0


def test_all_five_are_shipped_and_explained() -> None:
    assert SHIPPED == ["cpu.json", "zero1_bf16.json", "zero1_fp16.json", "zero2_bf16.json", "zero2_fp16.json"]
    explained = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in SHIPPED:
        assert f"`{name}`" in explained
        for section, value in json.loads((FOLDER / name).read_text()).items():
            keys = [f"{section}.{key}" for key in value] if isinstance(value, dict) else [section]
            for key in keys:
                assert f"`{key}`" in explained, f"{key} in {name} has no reason in README.md"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (change(train_batch_size=8), "train_batch_size = 8 in .* is not allowed: the recipe owns it: set batch.global"),
        (change(train_micro_batch_size_per_gpu=8), "the recipe owns it: set batch.micro_size"),
        (change(gradient_accumulation_steps=2), "it is derived from the global batch"),
        (change(optimizer={"type": "Adam"}), "optimizer = .*the recipe owns it: set optim"),
        (change(scheduler={"type": "WarmupLR"}), "scheduler = .*the recipe owns it"),
        (change(tensorboard={"enabled": True}), "DeepSpeed rebuilds its monitors"),
        (change(gradient_cliping=1.0), "gradient_cliping = 1.0 .*did you mean gradient_clipping?"),
        (change(zero_optimization={"stage": 3}), "zero_optimization.stage = 3 in .*allowed are 0, 1 and 2"),
        (change(zero_optimization={"stage": True}), "zero_optimization.stage = True"),
        (change(zero_optimization={}), "zero_optimization.stage = None"),
        (change(zero_optimization=2), "zero_optimization = 2 .* must be an object"),
        (change(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}), "a dropped layer's memory"),
        (change(zero_optimization={"stage": 1, "round_robin_gradients": True}), "ZeRO's flat buffers"),
        (change(zero_optimization={"stage": 0}, fp16={"enabled": True}), "stage 0 does not scale the loss"),
        (change(fp16={"enabled": True}, bf16={"enabled": True}), "only one of fp16 and bf16"),
        (change(fp16={"enabled": True, "auto_cast": True}), "the HOG targets are computed"),
        (change(bf16={"enabled": True}, data_types={"grad_accum_dtype": "fp32"}), "only stage 2 keeps fp32 sums"),
        (change(data_types={"grad_accum_dtype": "fp16"}), "data_types.grad_accum_dtype = 'fp16'"),
        ({"zero_optimization": {"stage": 1}}, "gradient_clipping = None .*DeepSpeed's default is 1.0"),
        (change(gradient_clipping=-1), "gradient_clipping = -1"),
    ],
)  # fmt: skip
def test_others_are_refused_in_one_sentence(content: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=sentence) as error:
        read_settings(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read: No such file"):
        read_settings(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json is not valid JSON"):
        read_settings(tmp_path / "broken.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds a list, not an object"):
        read_settings(tmp_path / "list.json")


def test_buckets_are_not_larger_than_what_trains() -> None:
    settings = read_settings(change(zero_optimization={"stage": 2, "reduce_bucket_size": 1000}))
    common = {"micro_batch": 4, "accumulation": 2, "world_size": 3}
    small = complete_settings(settings, active_elements=10, **common)
    assert small["zero_optimization"]["reduce_bucket_size"] == 10
    large = complete_settings(settings, active_elements=10**6, **common)
    assert large["zero_optimization"]["reduce_bucket_size"] == 1000
    assert large["train_batch_size"] == 24


def test_choice_without_a_wish() -> None:
    assert find_ds_config(best_ds_config(torch.device("cpu"))) == FOLDER / "cpu.json"
    with pytest.raises(ConfigError, match=r"'mine\.json'; allowed: a \.json file that exists, or one of cpu, "):
        find_ds_config("mine.json")


def test_untested_versions_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_version()
        assert not caplog.records
        monkeypatch.setattr("deepspeed.__version__", "0.20.1")
        check_version()
    assert "DeepSpeed 0.20.1 is installed" in caplog.text
