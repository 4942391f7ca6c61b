"""The main job, through the deepspeed launcher, in two real processes; and what it says to bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from processes import free_port, run_ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vitfreeze import cli
from vitfreeze.config import load_config
from vitfreeze.curriculum import ImageStage
from vitfreeze.planner import ModelCosts
from vitfreeze.schedule import build_schedule

ROOT = Path(__file__).resolve().parents[1]
STEPS = 24
SMALL = [
    "model.embed_dim=48", "model.num_heads=3", "model.decoder_embed_dim=32", "model.decoder_num_heads=2",
    "data.workers=1", "batch.global_size=16", f"run.length={STEPS} steps", "run.log_every_steps=4",
    "checkpoint.every=3 steps", "checkpoint.keep=100", "freeze.t_0=0.4", "run.show_every=0.5",
]  # fmt: skip


def launch(arguments: list[str], *, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Run `vitfreeze pretrain` under the deepspeed launcher on gloo."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks), "--log_level", "error",
        "--master_port", str(free_port()), "--no_local_rank", "--module", "vitfreeze", "pretrain", *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)


@pytest.fixture(scope="module")
def job(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The run folder and output of a whole small run in two processes."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    done = launch(["demo", *SMALL, f"data.train={demo_shards}", f"data.val={demo_shards}", f"run.dir={run_dir}"])
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir, done


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.distributed
def test_run_freezes_layers_and_reports_each(job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, done = job
    output = done.stdout + done.stderr
    config = load_config(run_dir / "config.yaml")
    schedule = build_schedule(config, steps_per_epoch=100 // 16)
    depth = config.model.resolve().depth
    freezes = [event for event in read_lines(run_dir / "events.jsonl") if event["event"] == "freeze"]
    assert [layer for event in freezes for layer in event["layers"]] == list(
        range(schedule.at(STEPS - 1).frozen_layers)
    )
    assert schedule.at(STEPS - 1).frozen_layers > (depth + 1) / 2
    assert len(schedule.at(STEPS - 1).heads) <= 2
    for event in freezes:
        assert output.count(f"step {event['step']}: froze layer {event['layers'][0]}") == 1
    sizes = [event["optimizer_state_bytes"] for event in freezes]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    for words in ("before first freeze", "images/s", "optimizer state", "pre-trained encoder", "random", "run.png"):
        assert words in output


@pytest.mark.distributed
def test_frozen_weights_do_not_move_by_one_bit(job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, _ = job
    config = load_config(run_dir / "config.yaml")
    assert config.optim.weight_decay > 0
    schedule = build_schedule(config, steps_per_epoch=100 // 16)
    saved = {
        int(path.name.split("-")[1]): load_file(path / "weights.safetensors")
        for path in (run_dir / "checkpoints").glob("step-*")
    }
    assert sorted(saved) == list(range(3, STEPS + 1, 3))
    last = saved[STEPS]
    compared = 0
    for step, weights in saved.items():
        for layer in range(schedule.at(step).frozen_layers):
            prefixes = ("cls_token", "patch_embed.") if layer == 0 else (f"blocks.{layer - 1}.",)
            names = [name for name in weights if name.startswith(prefixes)]
            assert names
            for name in names:
                assert torch.equal(weights[name], last[name]), f"{name} moved between step {step} and the end"
                compared += 1
    assert compared > 100
    assert not torch.equal(saved[3]["cls_token"], last["cls_token"])  # it did train before it froze
    assert not torch.equal(saved[21]["blocks.7.mlp.fc1.weight"], last["blocks.7.mlp.fc1.weight"])


@pytest.mark.distributed
def test_encoder_opens_in_timm(job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, _ = job
    size = load_config(run_dir / "config.yaml").model.resolve()
    model = timm.create_model(
        "vit_base_patch16_224", img_size=64, patch_size=size.patch_size, embed_dim=size.embed_dim, depth=size.depth,
        num_heads=size.num_heads, num_classes=0,
    )  # fmt: skip
    model.load_state_dict(load_file(run_dir / "encoder.safetensors"), strict=True)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, size.embed_dim)


@pytest.mark.distributed
def test_metrics_and_tensorboard_tell_the_same(job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, _ = job
    lines = read_lines(run_dir / "metrics.jsonl")
    assert lines[-1]["step"] == STEPS
    for line in lines:
        assert line["loss"] == pytest.approx(sum(line["losses"].values()), rel=1e-5)
    assert {"epoch", "lr", "frozen_layers", "images_per_second", "data_wait_fraction", "optimizer_state_bytes",
            "gradient_elements", "loss_scale"} <= set(lines[0])  # fmt: skip
    config = load_config(run_dir / "config.yaml")
    for line in lines:
        treatment = {name: line[name] for name in ("img_size", "mask_ratio", "decoded_share")}
        costs = ModelCosts.from_config(config, ImageStage(first_step=0, **treatment))
        per_rank = line["images_per_second"] / line["world_size"] * costs.step_flops(line["frozen_layers"])
        assert line["teraflops"] == pytest.approx(per_rank / 1e12)
    board = EventAccumulator(str(run_dir / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [line["step"] for line in lines]
    assert [event.value for event in board.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])


@pytest.mark.distributed
def test_other_ranks_say_nothing(job: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = job
    shown = done.stdout + done.stderr
    assert "\r" not in shown
    for words in ("a new run in", f"step {STEPS} of {STEPS}"):
        assert shown.count(words) == 1
    for words in ("DeepSpeed", "Gloo", "Warning", "Rank 1"):
        assert words not in shown


def pretrain_here(arguments: list[str], folder: Path) -> int:
    """What each rank of a second call does; its output goes into a file."""
    output = os.open(folder / f"{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    with pytest.raises(SystemExit) as ended:
        cli.main(["pretrain", *arguments])
    return int(ended.value.code or 0)


@pytest.mark.distributed
def test_second_call_finds_the_run_finished(
    job: tuple[Path, subprocess.CompletedProcess[str]], demo_shards: Path, tmp_path: Path
) -> None:
    run_dir, _ = job
    before = (run_dir / "metrics.jsonl").read_bytes()
    arguments = ["demo", *SMALL, f"data.train={demo_shards}", f"data.val={demo_shards}", f"run.dir={run_dir}"]
    assert run_ranks(pretrain_here, arguments, tmp_path) == [0, 0]
    assert "before first freeze" in (tmp_path / "0.txt").read_text()
    assert "before first freeze" not in (tmp_path / "1.txt").read_text()
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["freeze.t0=0.5"], ["freeze.t0", "freeze.t_0", "the command line"]),
        (["freeze.t_0=1.5"], ["freeze.t_0", "1.5", "(0, 1]", "the command line"]),
        (["data.train=/nowhere/at/all"], ["/nowhere/at/all"]),
        (["data.train="], ["data.train"]),
        (["batch.global_size=100", "batch.micro_size=33"], ["batch.global_size", "100", "33", "3.030"]),
        (["batch.global_size=1000000"], ["1000000"]),
        (["model.patch_size=14", "model.img_size=224", "curriculum.img_size=[]"], ["14 / 4 = 3.5"]),
        (["run.ds_config=nothing"], ["run.ds_config", "zero1_fp16"]),
    ],
)
def test_bad_input_gets_one_sentence(
    overrides: list[str], words: list[str], demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    given = [f"data.train={demo_shards}", f"run.dir={run_dir}", "data.workers=0", *overrides]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["pretrain", "demo", *given])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    for word in words:
        assert word in message
    assert not (run_dir / "metrics.jsonl").exists()


def test_folder_of_another_run_is_left_alone(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("freeze:\n  t_0: 0.123\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            [
                "pretrain", "demo", f"data.train={demo_shards}", f"data.val={demo_shards}", f"run.dir={tmp_path}",
                "data.workers=0",
            ]
        )  # fmt: skip
    assert stopped.value.code == 2
    assert "freeze.t_0: 0.123 there, 0.6 now" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == "freeze:\n  t_0: 0.123\n"


def test_bad_input_shows_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vitfreeze", "pretrain", "no_such_recipe", f"run.dir={tmp_path / 'run'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "there is no recipe 'no_such_recipe'" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
