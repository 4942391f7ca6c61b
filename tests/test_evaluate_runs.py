"""Evaluation of a whole run: from the command line, over ranks, and while it trains."""

from __future__ import annotations

import io
import json
import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_shards import jpeg_of, spoil

from vitfreeze import cli
from vitfreeze.config import Config, ConfigError, build_config
from vitfreeze.engine import join_ranks
from vitfreeze.evaluate import EvaluationData, Features, LinearSettings, evaluate_knn, knn_over_ranks, train_linear
from vitfreeze.evaluate.probe import Probe
from vitfreeze.evaluate.ridge import ridge_over_ranks
from vitfreeze.ranks import Ranks
from vitfreeze.training.pretrain import pretrain

ROOT = Path(__file__).resolve().parents[1]
ALONE = Ranks.alone(torch.device("cpu"))
SETTINGS: dict[str, Any] = {
    "model.size": "vit_tiny_test",
    "model.img_size": 64,
    "data.workers": 0,
    "batch.global_size": 8,
    "optim.warmup": "1 steps",
    "freeze.t_0": 0.5,
    "run.length": "12 steps",
    "run.log_every_steps": 5,
    "run.show_every": "6 steps",
    "checkpoint.every": "12 steps",
    "eval.every": "4 steps",
    "eval.samples": 20,
    "eval.k": 3,
    "eval.max_share": 1.0,
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


@pytest.fixture(scope="module")
def run_dir(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    assert pretrain(make_config(demo_shards, directory)) == 0
    return directory


def test_probe_is_logged_beside_the_loss(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    probed = {line["step"]: line["eval"] for line in lines if "eval" in line}
    assert set(probed) == {4, 8, 12}
    assert all(0 <= worth["knn_3"] <= 1 and 0 < worth["share_of_time"] <= 1 for worth in probed.values())
    assert all(0 <= worth["linear"] <= 1 for worth in probed.values())
    assert all("loss" in line for line in lines)
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [event.step for event in board.Scalars("eval/knn_3")] == [4, 8, 12]
    assert [event.step for event in board.Scalars("eval/linear")] == [4, 8, 12]
    assert [event.step for event in board.Images("reconstruction")] == [6, 12]


def test_probe_is_left_out_above_its_share_of_the_time(
    demo_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from vitfreeze.training.build import build_model

    config = make_config(demo_shards, tmp_path, **{"eval.max_share": 0.0})
    probe = Probe(config, ranks=ALONE)
    model = build_model(config)
    with caplog.at_level(logging.INFO):
        assert probe.measure(model)["knn_3"] >= 0  # the first one, whose cost nobody knew
        assert probe.measure(model) == {}
    assert "left out" in caplog.text
    assert "max_share=0" in caplog.text


def test_probe_without_validation_shards_is_refused(demo_shards: Path, tmp_path: Path) -> None:
    from vitfreeze.training.build import build_model

    config = make_config(demo_shards, tmp_path, **{"data.val": []})
    with pytest.raises(ConfigError, match=r"data\.val"):
        Probe(config, ranks=ALONE).measure(build_model(config))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    return printed.out


def test_command_knn(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = call(capsys, "knn", str(run_dir), "--blocks", "2", "8", "--k", "1", "5").splitlines()[-3:]
    assert rows[0].split() == ["block", "1-NN", "5-NN"]
    found = evaluate_knn(str(run_dir), EvaluationData(blocks=(2, 8)), k=(1, 5))
    for row, block in zip(rows[1:], (2, 8), strict=True):
        assert row.split() == [str(block), *(f"{100 * found[block][k]:.2f}%" for k in (1, 5))]


def test_command_linear(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--optimizer", "sgd", "--blr", "0.01", "0.1", "--epochs", "10", "--warmup-epochs", "1")
    rows = call(capsys, "linear", str(run_dir), *options).splitlines()[-3:]
    assert rows[0].split() == ["block", "blr", "top-1", "top-5", "loss"]
    assert [row.split()[1] for row in rows[1:]] == ["0.01", "0.1"]
    assert sum(row.endswith("best") for row in rows) == 1


def test_command_export_and_show(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "encoder.safetensors"
    assert str(file) in call(capsys, "export", str(run_dir), "--to", "safetensors", "--out", str(file))
    assert evaluate_knn(str(file), EvaluationData(train=_shards_of(run_dir), val=_shards_of(run_dir), workers=0))
    from PIL import Image

    for number in range(2):
        pixels = torch.randint(0, 256, (80, 90, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    out = tmp_path / "show.png"
    call(capsys, "show", str(run_dir), str(tmp_path / "0.png"), str(tmp_path / "1.png"), "--out", str(out))
    assert Image.open(out).size[0] > 500


def _shards_of(run_dir: Path) -> tuple[str, ...]:
    from vitfreeze.config import load_config

    return load_config(run_dir / "config.yaml").data.train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("knn", "nowhere"), "there is no run folder or file of weights 'nowhere'"),
        (("knn", "RUN", "--blocks", "9"), "expected numbers from 1 to depth 8"),
        (("knn", "RUN", "--pool", "max"), "expected one of avg, token"),
        (("knn", "RUN", "--k", "1000"), "--k is 1000, expected at most the 100 training images that vote"),
        (("knn", "RUN", "--k", "0"), "--k is 0, expected numbers of at least 1"),
        (("knn", "RUN", "--max-bad-fraction", "2"), "max_bad_fraction is 2.0, expected"),
        (("linear", "RUN", "--optimizer", "adam"), "expected one of lars, sgd"),
        (("export", "RUN", "--to", "onnx"), "expected one of timm, safetensors, hf, torch"),
        (("show", "RUN", "pyproject.toml"), "pyproject.toml: not a readable image"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], message: str, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(run_dir) if word == "RUN" else word for word in arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A shard of one image without a label."""
    data = jpeg_of((200, 10, 10))
    with tarfile.open(tmp_path / "bare-0000.tar", "w") as file:
        member = tarfile.TarInfo("sample0.jpg")
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))
    return str(tmp_path / "bare-0000.tar")


def test_images_without_labels_are_refused(run_dir: Path, bare: str) -> None:
    with pytest.raises(ValueError, match=r"sample sample0 has no label"):
        evaluate_knn(str(run_dir), EvaluationData(val=(bare,)))


def test_broken_images_are_left_out_as_far_as_the_command_allows(
    run_dir: Path, demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = shutil.copytree(demo_shards, tmp_path / "shards")
    path = min(shards.glob("*-validation-*.tar"))
    with tarfile.open(path) as archive:
        first = next(name for name in archive.getnames() if name.endswith(".jpg"))
    spoil(path, first)
    command = ("knn", str(run_dir), "--val", str(shards), "--k", "1")
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 2
    assert "unusable, over data.max_bad_fraction=0.001" in capsys.readouterr().err.splitlines()[-1]
    assert "1-NN" in call(capsys, *command, "--max-bad-fraction", "0.1")


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ("BARE", r"data.val is .*shards whose samples have a .cls member each.*bare-0000.tar has none"),
        ("", r"data.val is .*labelled shards, because eval.every asks for k-NN"),
        ("/nowhere/val-0000.tar", r"shard /nowhere/val-0000.tar does not exist"),
    ],
)
def test_a_run_that_could_not_be_evaluated_does_not_begin(
    val: str, message: str, bare: str, demo_shards: Path, tmp_path: Path
) -> None:
    given = bare if val == "BARE" else val or []
    config = make_config(demo_shards, tmp_path / "run", **{"data.val": given})
    with pytest.raises(ValueError, match=message):
        pretrain(config)
    assert not (tmp_path / "run").exists()


# Over ranks ----------------------------------------------------------------------------------------------------------


def make_features(count: int, *, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(count, 8, generator=generator), torch.randint(0, 5, (count,), generator=generator))


def share(features: Features, rank: int, world_size: int) -> Features:
    count = len(features.labels)
    part = slice(count * rank // world_size, count * (rank + 1) // world_size)
    return Features(features.features[part], features.labels[part])


def test_ridge_finds_what_is_linear_and_nothing_in_noise() -> None:
    """Labels by the largest of three directions are found; labels that have nothing to do with the features are not."""
    train, test = make_features(400, seed=1), make_features(200, seed=2)
    seen = [Features(x.features, x.features[:, :3].argmax(dim=1)) for x in (train, test)]
    assert ridge_over_ranks(*seen, ranks=ALONE) > 0.8
    assert ridge_over_ranks(train, test, ranks=ALONE) < 0.35


def evaluate_here() -> tuple[dict[int, float], list[tuple[float, float]]]:
    """What each rank does with its share."""
    ranks = join_ranks()
    train, test = make_features(101, seed=1), make_features(53, seed=2)
    shares = [share(x, ranks.rank, ranks.world_size) for x in (train, test)]
    settings = LinearSettings(optimizer="sgd", blr=(0.01, 0.1, 1.0), epochs=5, warmup_epochs=1)
    results = train_linear(train, test, settings=settings, ranks=ranks)
    knn = knn_over_ranks(shares[0], shares[1], k=(1, 7), ranks=ranks)
    knn[0] = ridge_over_ranks(shares[0], shares[1], ranks=ranks)
    return knn, [(result.top1, result.loss) for result in results]


@pytest.mark.distributed
def test_ranks_agree_with_one_process() -> None:
    knn, linear = run_ranks(evaluate_here, world_size=1)[0]
    for other_knn, other_linear in run_ranks(evaluate_here, world_size=3):
        assert other_knn == pytest.approx(knn)
        assert [top1 for top1, _ in other_linear] == pytest.approx([top1 for top1, _ in linear])
        assert [loss for _, loss in other_linear] == pytest.approx([loss for _, loss in linear], rel=1e-5)
