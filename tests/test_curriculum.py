"""Stages of a run: which step belongs to which, what they cost, what is refused, and exact resumption across them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from jobs import KILLED, Bench, Kill, newest_checkpoint, read_events, read_losses
from safetensors.torch import load_file
from tiny_shards import write_shards

from vitfreeze.config import Config, ConfigError, build_config, differing_settings, dump_config, load_config
from vitfreeze.planner import format_plan, plan
from vitfreeze.planner.input import core_seconds_per_crop
from vitfreeze.schedule import build_schedule

CURRICULUM = {
    "curriculum.mask_ratio": [[0, 0.85], ["5 steps", 0.75]],
    "curriculum.decoded_share": [[0, 0.5], [0.75, 1]],
    "model.img_size": 64,
    "model.patch_size": 8,
    "run.length": "16 steps",
    "optim.warmup": "1 steps",
}


def configure(**values: Any) -> Config:
    values = {**CURRICULUM, **{key.replace("__", "."): value for key, value in values.items()}}
    return build_config({key: (value, "a test") for key, value in values.items()}, recipe="test")


def test_a_stage_holds_until_the_next_begins() -> None:
    run = build_schedule(configure(freeze__mode="off"), steps_per_epoch=10)
    seen = [(run.at(s).images.mask_ratio, run.at(s).images.decoded_share) for s in (0, 4, 5, 11, 12, 15)]
    assert seen == [(0.85, 0.5)] * 2 + [(0.75, 0.5)] * 2 + [(0.75, 1.0)] * 2
    assert [step for step in range(16) if run.at(step).ends_stage] == [4, 11]


def test_without_a_curriculum_there_is_one_stage() -> None:
    run = build_schedule(configure(curriculum__mask_ratio=[], curriculum__decoded_share=[]), steps_per_epoch=10)
    assert {(run.at(s).images.mask_ratio, run.at(s).images.decoded_share) for s in range(16)} == {(0.75, 1.0)}


def test_stages_come_back_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(configure()))
    assert load_config(path).curriculum == configure().curriculum


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mask_ratio", [[0, 0.8], [0.5, 0.7], [0.4, 0.6]], "in rising order"),
        ("mask_ratio", [[0.1, 0.8]], r"stages \[\[0, value\]"),
        ("mask_ratio", [[0, 0.8], ["2 steps", 0.7], ["1 steps", 0.7]], "in rising order"),
        ("mask_ratio", [[0, 0.8], ["16 steps", 0.7]], "in the 16 steps of the run; 16 steps is step 16, behind 0"),
        ("mask_ratio", [[0, 0.8], ["1 epochs", 0.7], [0.5, 0.7]], "0.5 is step 8, behind 10"),
        ("mask_ratio", [[0, 1.0]], r"values in \(0, 1\)"),
        ("mask_ratio", [[0, 0.99]], "from step 0 on, 0.99 at 64 pixels leaves 0 of 64 patches visible"),
        ("mask_ratio", 0.8, "stages"),
        ("img_size", [[0, 48], [0.5, 32]], "the last of them model.img_size, which is 64"),
        ("img_size", [[0, 40], [0.5, 64]], "5 x 5 patch grid, which scale 0.5 cannot divide into cells of 16 pixels"),
        ("img_size", [[0, 50], [0.5, 64]], "img_size 50 is not a multiple of patch_size 8"),
        ("decoded_share", [[0, 0]], r"values in \(0, 1\]"),
        ("decoded_share", [[0, 0.01]], "0.01 at 64 pixels leaves none of 55 masked patches to reconstruct"),
    ],
)
def test_stages_that_cannot_be(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_schedule(configure(**{f"curriculum__{key}": value}), steps_per_epoch=10)


def test_the_plan_counts_every_stage_beside_the_plain_run() -> None:
    config = load_config(
        "off", ["curriculum.decoded_share=[[0, 0.5]]", "curriculum.mask_ratio=[[0, 0.8], [0.5, 0.75]]"]
    )
    planned, plain = plan(config), plan(load_config("off"))
    assert [stage.images.mask_ratio for stage in planned.stages] == [0.8, 0.75]
    assert [stage.first_step for stage in planned.stages] == [0, 31_250]
    costs = [stage.flops_per_image / plain.stages[0].flops_per_image for stage in planned.stages]
    assert costs == [stage.relative_cost for stage in planned.stages]
    assert planned.saving == pytest.approx(1 - sum(costs) / 2)
    assert planned.plain_epochs == pytest.approx(100 * planned.gpu_hours / plain.gpu_hours)
    assert f"buy {planned.plain_epochs:.1f} epochs without freezing" in format_plan(planned)
    assert "buy" not in format_plan(plain)
    assert planned.gpu_hours + planned.gpu_hours_saved == pytest.approx(plain.gpu_hours)
    assert planned.stages[0].activation_bytes < planned.stages[1].activation_bytes < plain.stages[0].activation_bytes


def test_the_plan_says_what_every_stage_asks_of_gpu_and_host() -> None:
    sizes = "curriculum.img_size=[[0, 128], [0.5, 224]]"
    planned = plan(load_config("off", [sizes, "batch.grow_micro_batch=true"]), teraflops=100, world_size=2)
    small, large = planned.stages
    assert (small.micro_batch, small.accumulation) == (512, 2)  # a third of the activations leaves room for twice
    assert (large.micro_batch, large.accumulation) == (256, 4)
    assert planned.communication_saving is not None
    assert planned.communication_saving == pytest.approx((1 - (2 * 2 * 2 + 2) / (2 * 4 * 2 + 2)) / 2), (
        "half of the run sums gradients twice, the plain run four times; weights are gathered once"
    )
    for stage in planned.stages:
        assert stage.images_per_second == pytest.approx(100e12 / stage.flops_per_image)
    assert small.input_cores is not None
    assert large.input_cores is not None
    assert 2.4 < small.input_cores / large.input_cores < 2.7, "three times the images, each hardly cheaper"
    heading, *rows = format_plan(planned).split("\n\n")[1].splitlines()
    assert "pixels" in heading
    assert "masked" not in heading, "what never changes stands above the table"
    assert "0.75 of the patches masked, 1 of those decoded" in format_plan(planned)
    for row, stage in zip(rows, planned.stages, strict=True):
        assert f" {stage.images.img_size} " in row
        assert row.endswith(f"{stage.images_per_second:,.0f}{stage.input_cores:7.1f}")
    assert asdict(planned)["stages"][0]["input_cores"] == small.input_cores


def test_the_cores_of_the_plan_are_those_that_were_measured() -> None:
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "data_amd_epyc_cpu.txt"
    line = next(line for line in results.read_text().splitlines() if line.startswith("whole pipeline"))
    measured = float(line.split()[2].replace(",", ""))
    full, small = (core_seconds_per_crop(img_size=size, crops_per_image=1) for size in (224, 128))
    assert 1 / full == pytest.approx(measured, rel=0.01)
    assert 1.14 < full / small < 1.19
    assert core_seconds_per_crop(img_size=224, crops_per_image=2) < 0.75 * full, "one decoding for two crops"
    smaller = core_seconds_per_crop(img_size=128, crops_per_image=1, stored_size=160)
    assert 1.7 < small / smaller < 1.8, "decoding 160 pixels was measured at 0.36 of 288, in one process"


def test_the_cores_of_the_plan_know_how_the_shards_are_stored(tmp_path: Path) -> None:
    for size in (160, 288):
        (tmp_path / str(size)).mkdir()
        (tmp_path / str(size) / "manifest.json").write_text(json.dumps({"settings": {"resize_shorter": size}}))
    staged = f"data.train=[[0, {tmp_path / '160'}], [0.5, {tmp_path / '288' / '0.tar'}]]"
    sizes = "curriculum.img_size=[[0, 128], [0.5, 224]]"
    planned, alone = (plan(load_config("off", [sizes, *more]), teraflops=100) for more in ([staged], []))
    cores = [[stage.input_cores or 0 for stage in of.stages] for of in (planned, alone)]
    assert 1.7 < cores[1][0] / cores[0][0] < 1.8
    assert cores[1][1] == cores[0][1]


@pytest.mark.distributed
def test_killed_around_every_border_it_ends_to_the_bit(tmp_path: Path) -> None:
    stages = {"img_size": [[0, 16], ["5 steps", 32]], "decoded_share": [[0, 0.5], ["10 steps", 1]]}
    bench = Bench(
        tmp_path, curriculum=stages, checkpoint={"every": "1 steps"},
        model={"size": "vit_tiny_test", "img_size": 32, "mask_ratio": 0.5},
        batch={"global_size": 8, "micro_size": 2, "grow_micro_batch": True}, data={"workers": 1},
    )  # fmt: skip
    assert bench.run("whole") == [0], bench.log("whole")
    grown = [(event["step"], event["micro_batch"]) for event in read_events(bench.folder / "whole", "micro_batch")]
    assert grown[:2] == [(0, 4), (5, 2)]  # a quarter of the patches leaves room; then as configured
    for step in (4, 5, 9, 10):  # the last step of a stage, and the first of the next
        job = bench.start("killed", kill=Kill(where="update", step=step))
        assert job.wait() == [KILLED], bench.log("killed")
    assert bench.run("killed", "curriculum.img_size=[[0, 32]]") == [2]
    assert "curriculum.img_size" in bench.log("killed")
    assert bench.run("killed") == [0], bench.log("killed")
    assert read_losses(bench.folder / "killed") == read_losses(bench.folder / "whole")
    names = ("weights.safetensors", "rank-00000.safetensors")
    for name in names:
        mine, theirs = (load_file(newest_checkpoint(bench.folder / run) / name) for run in ("killed", "whole"))
        assert [key for key, value in mine.items() if not value.equal(theirs[key])] == []
    assert [event["step"] for event in read_events(bench.folder / "whole", "stage")] == [5, 10]


@pytest.mark.distributed
def test_on_one_two_and_one_ranks_again_it_ends_to_the_bit(tmp_path: Path) -> None:
    """Stages begin at steps 4, 8 and 12, where the runs are taken up again; layers freeze before and after."""
    stages = {"img_size": [[0, 16], ["4 steps", 32]], "decoded_share": [[0, 0.5], ["8 steps", 1]]}
    stages["mask_ratio"] = [[0, 0.6], ["12 steps", 0.5]]
    bench = Bench(
        tmp_path, curriculum=stages, checkpoint={"every": "4 steps", "keep": 100},
        model={"size": "vit_tiny_test", "img_size": 32, "mask_ratio": 0.5},
    )  # fmt: skip
    chain = [("one", 1, ""), ("two", 2, "one/checkpoints/step-00000004"), ("last", 1, "two/checkpoints/step-00000012")]
    for run, ranks, begin in chain:
        begins = [f"resume.from={bench.folder / begin}"] if begin else []
        assert bench.run(run, *begins, ranks=ranks) == [0] * ranks, bench.log(run)
    for ranks, step in ((1, 6), (2, 10), (2, 14), (1, 0)):
        kill = Kill(where="update", step=step) if step else None
        job = bench.start("killed", ranks=ranks, kill=kill, kill_rank=ranks - 1)
        job.processes[-1].join(120)
        if kill:
            job.kill()
        assert job.processes[-1].exitcode == (KILLED if kill else 0), bench.log("killed")
    resumed = [(event["step"], event["world_size"]) for event in read_events(bench.folder / "killed", "resume")]
    assert resumed == [(4, 1), (8, 2), (12, 2)], "the step, and the ranks that had saved it"
    killed, one, two, last = (read_losses(bench.folder / run) for run in ("killed", "one", "two", "last"))
    assert killed == {step: (one if step <= 4 else two if step <= 12 else last)[step] for step in range(1, 17)}
    frozen = [killed[step]["frozen_layers"] for step in (1, 4, 8, 12, 16)]
    assert frozen[0] == 0 < frozen[2] < frozen[4]
    for step in (8, 12, 16):
        assert killed[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-4)


def test_shards_by_stages_are_read_checked_and_written_down(tmp_path: Path) -> None:
    staged = configure(data__train=[[0, "small"], ["8 steps", ["a.tar", "b.tar"]]], freeze__mode="off")
    assert staged.data.train_shards == ("a.tar", "b.tar")
    run = build_schedule(staged, steps_per_epoch=10)
    assert [run.at(step).images.shards for step in (0, 7, 8, 15)] == [-2, -2, -1, -1]
    assert [step for step in range(16) if run.at(step).ends_stage] == [4, 7, 11]
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(staged))
    assert load_config(path).data == staged.data
    moved, alone = (configure(data__train=of, freeze__mode="off") for of in ([[0, "z"], ["8 steps", "c.tar"]], "a.tar"))
    assert differing_settings(moved, staged) == []
    assert "data.train" in differing_settings(alone, staged)[0], "other steps would see other pixels"
    for value, told in (
        ([[0, "a"], [0, "b"]], "in rising order"), ([[0.2, "a"]], "in rising order"), ([[0, []]], "none of them empty"),
        ([[0, "a"], "b"], "or stages"), ([[0, "a"], ["16 steps", "b"]], "in the 16 steps of the run"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"data.train is .*{told}"):
            build_schedule(configure(data__train=value), steps_per_epoch=10)


@pytest.mark.distributed
def test_shards_by_stages_are_resumed_to_the_bit(tmp_path: Path) -> None:
    """Two sizes in which the same images are stored; other steps or other samples than before are refused."""
    bench = Bench(tmp_path, checkpoint={"every": "1 steps"}, data={"workers": 1}, batch={"micro_size": 8})
    small, other = tmp_path / "small", tmp_path / "other"
    write_shards(small, [40, 40], size=(36, 27))
    write_shards(other, [40, 40], size=(36, 27), first=1)
    staged = f"data.train=[[0, {small}], [5 steps, {tmp_path / 'shards'}]]"
    assert bench.run("plain") == [0], bench.log("plain")
    assert bench.run("whole", staged) == [0], bench.log("whole")
    for step in (4, 5):
        job = bench.start("killed", staged, kill=Kill(where="update", step=step))
        assert job.wait() == [KILLED], bench.log("killed")
    late, strange = staged.replace("5 steps", "6 steps"), staged.replace(str(small), str(other))
    for elsewhere, told in ((late, "other settings"), (strange, "the same samples")):
        assert bench.run("killed", elsewhere) == [2]
        assert told in bench.log("killed")
    assert bench.run("killed", staged) == [0], bench.log("killed")
    plain, whole = read_losses(bench.folder / "plain"), read_losses(bench.folder / "whole")
    assert read_losses(bench.folder / "killed") == whole
    assert whole[1]["loss"] != plain[1]["loss"]
    event = read_events(bench.folder / "whole", "stage")[0]
    assert (event["step"], event["shards"]) == (5, -1)
    assert f"shards {tmp_path / 'shards'} from here on" in bench.log("whole")
