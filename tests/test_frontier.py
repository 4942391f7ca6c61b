"""The study of what freezing buys: its arithmetic, its statistics, its pages; no training."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.frontier import report
from benchmarks.frontier.__main__ import main
from benchmarks.frontier.arms import DEFAULT_ARMS, parse_arm, parse_arms
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.costs import Planner, Stretch, count_cost, find_length
from benchmarks.frontier.differences import compare_pairs, correct_for_many, mean_interval
from benchmarks.frontier.errors import InputError
from benchmarks.frontier.findings import confirm, find, group_records, read_records
from benchmarks.frontier.records import read_knn, read_linear, summarize_training
from benchmarks.frontier.running import ask
from benchmarks.frontier.sizes import SIZES
from benchmarks.frontier.split import Counts, Split, divide, prepare
from benchmarks.frontier.study import Study, as_overrides
from vitfreeze.config import load_config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "frontier"
PAGE = ROOT / "docs" / "what_freezing_buys.md"


# Arms -----------------------------------------------------------------------------------------------------------------


def test_default_arms_are_at_most_eight() -> None:
    arms = parse_arms(DEFAULT_ARMS)
    assert len(arms) <= 8
    assert [arm.name for arm in arms] == DEFAULT_ARMS.split(",")
    assert {arm.kind.recipe for arm in arms} == {"off", "paper", "unscaled"}


def test_freezing_of_the_default_arms_has_a_run_without_it_to_stand_against() -> None:
    names = {arm.name for arm in parse_arms(DEFAULT_ARMS)}
    assert {arm.kind.unfrozen for arm in parse_arms(DEFAULT_ARMS)} <= names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("frozen", "the arm 'frozen' is not known; there are plain, stopped, paper"),
        ("plain-half", "must end in a share of the budget, as in plain-0.7"),
        ("plain-1.5", "has a share of 1.5; allowed: above 0, at most 1"),
        ("stopped", "needs a share of 0.1, 0.2, ... or 0.9"),
        ("stopped-0.55", "needs a share of 0.1, 0.2, ... or 0.9"),
        ("plain,paper,plain", "--arms names plain twice"),
    ],
)
def test_bad_arms_get_one_sentence(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--arms", text]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--seeds", "0,x", "--seeds is '0,x'; allowed: whole numbers separated by commas"),
        ("--seeds", "1,1", "each of them once"),
        ("--budget", "0", "--budget is '0'; allowed: numbers above 0"),
        ("--tune", "1e-3,fast", "--tune is '1e-3,fast'; allowed: numbers separated by commas"),
        ("--data", "nowhere", "cannot be packed"),
    ],
)
def test_bad_options_get_one_sentence(
    option: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--data": str(tmp_path), "--out": str(tmp_path / "out"), option: value}
    assert main([word for pair in given.items() for word in pair]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "given", "meant"), [(main, "--arm", "--arms"), (report.main, "--clams", "--claims")]
)
def test_misspelt_options_are_met_with_the_nearest(
    program: Callable[[list[str]], int], given: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        program([given, "x"])
    assert ended.value.code == 2
    assert f"unrecognized arguments: {given}; did you mean {meant}?" in capsys.readouterr().err


# Costs ----------------------------------------------------------------------------------------------------------------


def test_cost_of_stretches() -> None:
    stretches = (
        Stretch(first=0, end=60, flops=10),
        Stretch(first=60, end=80, flops=6),
        Stretch(first=80, end=100, flops=4),
    )
    assert count_cost(stretches) == 60 * 10 + 20 * 6 + 20 * 4
    assert count_cost(stretches, stop_step=70) == 60 * 10 + 10 * 6
    assert count_cost(stretches, stop_step=50) == 500


@pytest.mark.parametrize("guess", [1, 90, 118, 200])
def test_length_is_the_longest_within_the_target(guess: int) -> None:
    found = find_length(lambda steps: 8.5 * steps, 1003.0, guess=guess)
    assert found == 118  # 1003 / 8.5
    assert find_length(lambda steps: 8.5 * steps, 1002.9, guess=guess) == 117


def test_budget_below_one_step_is_refused() -> None:
    with pytest.raises(InputError, match="less than one step"):
        find_length(lambda steps: 8.5 * steps, 8.0, guess=3)


def make_study(out: Path, *, size: str = "cpu") -> Study:
    split = Split(
        folder=out / "data", name="images", train=45_000, labelled=5_000, held_out=5_000, test=10_000, num_classes=10
    )
    return Study(size_name=size, size=SIZES[size], split=split, out=out, ask=ask)


def test_every_arm_costs_its_share_of_the_budget_within_a_step(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    one_step = 1 / study.size.steps
    for arm in parse_arms("plain,plain-0.5,stopped-0.5,paper,unscaled,t09"):
        lengths = study.lengths(Cell(arm=arm, seed=0, budget=1.0, blr=1e-3))
        cost = lengths.flops / lengths.reference_flops
        assert arm.share - one_step < cost <= arm.share, arm.name
        assert (lengths.planned_steps > lengths.steps) == arm.kind.stopped
        assert lengths.finetuning_flops > 0
    paper = study.lengths(Cell(arm=parse_arm("paper"), seed=0, budget=1.0, blr=1e-3))
    assert paper.steps > 1.15 * study.size.steps  # what freezing saves buys more steps


def test_stopped_run_costs_exactly_what_the_decayed_run_of_its_share_costs(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    costs = {
        study.lengths(Cell(arm=parse_arm(name), seed=0, budget=1.0, blr=1e-3)).flops
        for name in ("plain-0.7", "stopped-0.7")
    }
    assert len(costs) == 1


def test_run_that_cannot_be_stopped_at_a_tenth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"which has 462 steps at a budget of 0.33; allowed: .* a multiple of 10"):
        make_study(tmp_path).lengths(Cell(arm=parse_arm("stopped-0.5"), seed=0, budget=0.33, blr=1e-3))


def test_count_is_the_planners(tmp_path: Path) -> None:
    from vitfreeze.config import load_config
    from vitfreeze.planner import plan

    settings = [*make_study(tmp_path).pretraining_settings(Cell(arm=parse_arm("paper"), seed=0, budget=1, blr=1e-3))]
    settings.append("run.length=500 steps")
    whole = plan(load_config("paper", settings), images_per_epoch=45_000)
    counted = count_cost(Planner(run=ask, images=45_000).stretches("paper", settings))
    plain = 500 * whole.stages[0].flops_per_image * whole.global_batch
    assert 1 - counted / plain == pytest.approx(whole.flops_saving, rel=1e-12)


def test_settings_of_a_record_hold_no_path(tmp_path: Path) -> None:
    study, cell = make_study(tmp_path), Cell(arm=parse_arm("paper"), seed=0, budget=1.0, blr=1e-3)
    assert "/" not in "".join(study.pretraining_settings(cell) + study.finetuning_settings(cell))


def test_arms_with_level_rates_differ_from_the_run_without_freezing_by_what_their_words_say(tmp_path: Path) -> None:
    def settings(name: str) -> set[str]:
        cell = Cell(arm=parse_arm(name), seed=0, budget=1.0, blr=1e-3)
        return set(make_study(tmp_path).pretraining_settings(cell))

    assert settings("stable_wsd") - settings("wsd") == {"freeze.rates=stable"}
    assert settings("stable_t09") ^ settings("stable") == {"freeze.t_0=0.9"}


def test_the_recipe_that_is_recommended_is_the_arm_that_leads() -> None:
    kind, size = parse_arm("small_wsd").kind, SIZES["imagenet"]
    settings = [*as_overrides(kind.settings), f"curriculum.img_size={size.small_first}"]
    arm, recommended = load_config(kind.recipe, settings), load_config("recommended")
    for section in ("model", "optim", "freeze", "curriculum"):
        assert getattr(arm, section) == getattr(recommended, section)


def test_imagenet_is_written_down_with_planned_hours(tmp_path: Path) -> None:
    arms = ["--arms", "plain,stopped-0.5,paper", "--seeds", "0"]
    assert main(["--data", "none", "--out", str(tmp_path), "--size", "imagenet", *arms]) == 0
    lines = (tmp_path / "commands.sh").read_text().splitlines()
    commands = [line.split()[2] for line in lines if line.startswith("bash launch/local.sh")]
    # The stopped run shares the plain run's pre-training.
    assert commands == [
        "pretrain",
        "finetune",
        "linear",
        "knn",
        "finetune",
        "linear",
        "knn",
        "pretrain",
        "finetune",
        "linear",
        "knn",
    ]
    assert any("checkpoints/step-00031150" in line for line in lines)
    assert (
        "# plain, seed 0: 62300 steps, 1.000 of the plain run; 10.6 hours of pre-training, 37.5 of fine-tuning" in lines
    )
    assert sum("planned" in line for line in lines) == 2


# The images -----------------------------------------------------------------------------------------------------------


def test_parts_are_disjoint_and_hold_every_class_by_its_share() -> None:
    classes = np.random.default_rng(0).choice(4, size=1000, p=[0.4, 0.3, 0.2, 0.1])
    parts = divide(classes, held_out=100, labels=200, makes_test=True)
    assert sorted(np.concatenate([parts["train"], parts["held_out"], parts["test"]])) == list(range(1000))
    assert set(parts["labelled"]) <= set(parts["train"])
    for name, size in (("held_out", 100), ("test", 100), ("labelled", 200)):
        assert len(parts[name]) == size
        for label in range(4):
            expected = size * np.mean(classes == label)
            assert abs(np.sum(classes[parts[name]] == label) - expected) <= 1.5


def test_too_few_images_are_said(caplog: pytest.LogCaptureFixture) -> None:
    wanted = Counts(held_out=5000, labels=5000)
    assert wanted.fit(50_000, makes_test=False) == wanted
    assert wanted.fit(4_000, makes_test=False) == Counts(held_out=400, labels=1800)
    assert "4000 training images: 400 are held out and 1800 labelled, not 5000 and 5000" in caplog.text
    with pytest.raises(InputError, match=r"of 4000 training images 500 cannot be held out .* at most 400"):
        Counts(held_out=500, labels=100, given=True).fit(4_000, makes_test=False)


def list_keys(split: Split, part: str) -> set[str]:
    return {
        name.partition(".")[0]
        for shard in Path(split.shards(part)).glob("*.tar")
        for name in tarfile.open(shard).getnames()
    }


def test_shards_are_split_once_and_for_all(demo_shards: Path, tmp_path: Path) -> None:
    counts = Counts(held_out=10, labels=20)
    split = prepare(demo_shards, tmp_path / "data", counts=counts, pixels=64)
    keys = {part: list_keys(split, part) for part in ("train", "labelled", "held_out", "test")}
    assert {part: len(found) for part, found in keys.items()} == {
        "train": 90,
        "labelled": 20,
        "held_out": 10,
        "test": 25,
    }
    assert keys["labelled"] < keys["train"]
    assert not keys["train"] & keys["held_out"]
    assert prepare(demo_shards, tmp_path / "data", counts=counts, pixels=64) == split
    with pytest.raises(InputError, match="holds the split"):
        prepare(demo_shards, tmp_path / "data", counts=Counts(held_out=5, labels=20), pixels=64)


def test_folder_without_a_test_set_is_given_one(tmp_path: Path) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(30):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    split = prepare(tmp_path / "images", tmp_path / "data", counts=Counts(held_out=6, labels=20), pixels=32)
    assert (split.train, split.held_out, split.test, split.labelled, split.num_classes) == (48, 6, 6, 20, 2)


# Statistics -----------------------------------------------------------------------------------------------------------


def test_difference_of_known_numbers() -> None:
    # Student's sleep data (1908): extra hours under two drugs; t = 4.0621, p = 0.002833, interval 0.70 to 2.46.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = compare_pairs(second, first)
    assert found.mean == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-6)
    assert found.p_value == pytest.approx(0.002833, abs=1e-6)
    assert found.p_value == pytest.approx(stats.ttest_rel(second, first).pvalue)
    assert found.verdict == "better"
    assert compare_pairs(first, second).verdict == "worse"


def test_difference_inside_its_interval_is_none() -> None:
    found = compare_pairs([0.51, 0.50, 0.53], [0.50, 0.51, 0.50])
    assert found.mean > 0 > found.low
    assert found.verdict == "none"


def test_one_pair_has_no_interval() -> None:
    found = compare_pairs([0.6], [0.5])
    assert (found.verdict, found.low, found.high, found.p_value) == ("one seed", -math.inf, math.inf, 1.0)
    with pytest.raises(ValueError, match="no pairs"):
        compare_pairs([], [])


def test_equal_differences_are_certain() -> None:
    assert compare_pairs([2, 3, 4], [1, 2, 3]).p_value == 0
    assert compare_pairs([1, 2, 3], [1, 2, 3]).verdict == "none"


def test_holm_of_known_numbers() -> None:
    # Holm's own rule by hand: 4 * 0.01, 3 * 0.02, 2 * 0.03 and then 0.04, which must not fall below the one before.
    assert correct_for_many([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert correct_for_many([0.6, 0.5]) == [1.0, 1.0]
    assert correct_for_many([0.03]) == [0.03]


def test_interval_of_a_mean() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees of freedom


# Findings -------------------------------------------------------------------------------------------------------------


def make_record(arm: str, seed: int, accuracy: float, *, cost: float = 1.0, **changes: Any) -> dict[str, Any]:
    return {
        "data": "images", "size": "cpu", "images": {"train": 450, "held_out": 50, "test": 100}, "steps_of_plain": 1000,
        "arm": arm, "words": parse_arm(arm).words, "budget": 1.0, "seed": seed, "blr": 1e-3, "labels": 45,
        "judged_on": "held_out",
        "accuracy": {"finetuned": accuracy, "linear": 0.4, "knn_10": 0.3},
        "cost": {"pretraining": cost, "with_finetuning": (cost + 0.5) / 1.5},
        "seconds": {"pretraining": 3600.0, "finetuning": 1800.0}, **changes,
    }  # fmt: skip


EXPLORED = [
    *(make_record("plain", seed, accuracy) for seed, accuracy in enumerate((0.50, 0.52, 0.51))),
    *(make_record("plain-0.5", seed, accuracy, cost=0.5) for seed, accuracy in enumerate((0.47, 0.49, 0.48))),
    *(make_record("paper", seed, accuracy, cost=0.9995) for seed, accuracy in enumerate((0.48, 0.50, 0.4901))),
    make_record("stopped-0.5", 1, 0.48, cost=0.5),
    make_record("stopped-0.7", 1, 0.48, cost=0.7),
]


def test_an_arm_stands_against_the_plain_run_of_its_cost_and_seed() -> None:
    found = {finding.arm: finding for finding in find(EXPLORED)}
    assert found["plain"].control == found["plain-0.5"].control == ""
    paper = found["paper"]
    assert (paper.control, paper.seeds) == ("plain", (0, 1, 2))
    assert paper.differences["finetuned"].mean == pytest.approx(-0.02, abs=1e-4)
    assert paper.differences["finetuned"].verdict == "worse"
    assert found["stopped-0.5"].control == "plain-0.5"
    assert found["stopped-0.5"].differences["finetuned"].mean == pytest.approx(-0.01)
    assert found["stopped-0.5"].differences["finetuned"].verdict == "one seed"
    assert found["stopped-0.7"].control == ""  # nobody ran a plain run of cost 0.7


def test_the_best_plain_rate_is_the_control() -> None:
    faster = [make_record("plain", seed, 0.55, blr=2e-3) for seed in (0, 1, 2)]
    found = {(finding.arm, finding.blr): finding for finding in find([*EXPLORED, *faster])}
    assert len(found) == 6
    assert found["plain", 1e-3].accuracies["finetuned"].mean == pytest.approx(0.51)
    assert found["paper", 1e-3].control_accuracy == found["plain", 2e-3].accuracies["finetuned"]
    assert found["paper", 1e-3].differences["finetuned"].mean == pytest.approx(0.49 - 0.55, abs=1e-3)


def test_explored_arms_stand_against_plain_of_their_own_rate() -> None:
    faster = [make_record("plain", seed, 0.55, blr=2e-3) for seed in (0, 1, 2)]
    other = [make_record("paper", seed, 0.50, blr=4e-3) for seed in (0, 1, 2)]
    found = {(f.arm, f.blr): f for f in find([*EXPLORED, *faster, *other], at_equal_rate=True)}
    assert found["paper", 1e-3].control_blr == 1e-3
    assert found["paper", 1e-3].differences["finetuned"].mean == pytest.approx(0.49 - 0.51, abs=1e-3)
    assert found["paper", 4e-3].control_blr == 2e-3, "nobody ran plain at its rate, so the best plain run counts"


def test_freezing_is_credited_against_the_same_run_without_it() -> None:
    small = [make_record("small", seed, accuracy) for seed, accuracy in enumerate((0.53, 0.54, 0.55))]
    both = [make_record("small_global", seed, accuracy) for seed, accuracy in enumerate((0.52, 0.53, 0.5399))]
    found = {finding.arm: finding for finding in find([*EXPLORED, *small, *both])}
    assert found["small_global"].differences["finetuned"].mean == pytest.approx(0.02, abs=1e-4)
    of_freezing = found["small_global"].of_freezing
    assert of_freezing is not None
    assert of_freezing.mean == pytest.approx(-0.01, abs=1e-4)
    assert (of_freezing.pairs, of_freezing.verdict) == (3, "worse")
    assert found["small"].of_freezing is found["paper"].of_freezing is None
    assert "| -1.0 [-1.0, -1.0] |" in report.format_table(list(found.values()))


def test_records_that_must_not_be_compared_are_parted() -> None:
    others = [make_record("paper", 0, 0.7, judged_on="test"), make_record("paper", 0, 0.7, labels=450)]
    groups = group_records([*EXPLORED, *others])
    assert len(groups) == 3
    assert next(iter(groups))[3] == "test"


def make_confirmation(seeds: range, gain: float, *, arm: str = "t09") -> list[dict[str, Any]]:
    final = {"judged_on": "test", "labels": 450}
    wobble = (0.001, -0.001, 0.0, 0.002, -0.002)
    plain = [make_record("plain", seed, 0.5, **final) for seed in seeds]
    return plain + [make_record(arm, seed, 0.5 + gain + wobble[seed % 5], **final) for seed in seeds]


def test_claims_need_five_fresh_seeds_and_are_corrected_together() -> None:
    fresh = make_confirmation(range(10, 15), 0.01)
    held, lost = confirm(
        [*EXPLORED, *fresh, *make_confirmation(range(10, 15), 0.0, arm="paper")],
        [("t09", "plain", 1.0), ("paper", "plain", 1.0)],
    )
    assert held.holds
    assert held.difference
    assert held.adjusted_p == pytest.approx(2 * held.difference.p_value)
    assert not lost.holds
    first, later, waiting = confirm(
        fresh, [("t09", "plain", 1.0)], [("t09", "plain", 1.0), ("paper", "plain", 1.0)], may_wait=True
    )
    assert first.adjusted_p == later.adjusted_p == pytest.approx(3 * held.difference.p_value)  # over both rounds
    assert (waiting.difference, waiting.adjusted_p, waiting.holds) == (None, 1, False)
    with pytest.raises(InputError, match=r"has 4 pairs .* a claim needs 5"):
        confirm(make_confirmation(range(10, 14), 0.01), [("t09", "plain", 1.0)])
    with pytest.raises(InputError, match="seed 1 was used for exploring"):
        confirm([*EXPLORED, *make_confirmation(range(1, 6), 0.01)], [("t09", "plain", 1.0)])
    with pytest.raises(InputError, match="4 claims are made; allowed: 1 to 3"):
        confirm(fresh, [("t09", "plain", budget) for budget in (0.25, 0.5, 0.75, 1.0)])
    with pytest.raises(InputError, match="t09 at budget 1 has 2 learning rates"):
        confirm([*fresh, make_record("t09", 10, 0.5, blr=2e-3, judged_on="test", labels=450)], [("t09", "plain", 1.0)])
    with pytest.raises(InputError, match="paper at budget 1 has 0 pairs"):
        confirm(EXPLORED, [("paper", "plain", 1.0)])  # exploration confirms nothing
    with pytest.raises(InputError, match="t09 cannot be claimed to beat 'small'; allowed: plain"):
        confirm(fresh, [("t09", "small", 1.0)])
    both, small = (
        make_confirmation(range(10, 15), gain, arm=arm) for arm, gain in (("small_global", 0.02), ("small", 0.01))
    )
    (of_freezing,) = confirm([*both, *small], [report.read_claim("small_global>small@1")])
    assert of_freezing.holds
    assert of_freezing.difference
    assert of_freezing.difference.mean == pytest.approx(0.01, abs=1e-3)


# Pages ----------------------------------------------------------------------------------------------------------------


def write_records(folder: Path) -> Path:
    folder.mkdir()
    for record in EXPLORED:
        (folder / f"{record['arm']}_{record['seed']}.json").write_text(json.dumps(record))
    return folder


def test_report_prints_draws_and_renews_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, document = write_records(tmp_path / "records"), tmp_path / "page.md"
    trials = {"budget": 0.2, "seed": 1000, "linear": {"plain": {"0.002": 0.3, "0.004": 0.31}, "paper": {"0.002": 0.29}}}
    (folder / "tuning.json").write_text(json.dumps(trials))
    document.write_text("before\n<!-- frontier: begin -->\nold\n<!-- frontier: end -->\nafter\n")
    plot = tmp_path / "plot.png"
    assert report.main([str(folder), "--plot", str(plot), "--into", str(document)]) == 0
    printed = capsys.readouterr().out
    assert (
        "Exploration: images, size `cpu`, 450 training images, fine-tuned on 45 labels, judged on 50 held-out"
        in printed
    )
    assert "| 49.0 ± 2.5 | 40.0 ± 0.0 | 30.0 ± 0.0 | -2.0 [-2.0, -2.0] | worse |" in printed
    assert "| no control yet |" in printed
    assert "| linear probe of short runs, cost 0.2 | blr 0.002 | blr 0.004 |" in printed
    assert "| `paper` | 29.0 |  |" in printed
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert printed.strip() in text
    assert plot.stat().st_size < 300_000


def test_claims_that_lie_beside_the_records_are_judged_on_the_page(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "records")
    for record in make_confirmation(range(10, 15), 0.01):
        (folder / f"{record['arm']}_{record['seed']}.json").write_text(json.dumps(record))
    assert "claim" not in report.make_blocks(folder)["frontier"]
    (folder / "claims.json").write_text('[["t09"], ["t09@0.5"]]')
    tables = report.make_blocks(folder)["frontier"].split("\n\n")
    assert tables[0].startswith("Test set")
    assert "| `t09` beats `plain` of equal cost, budget 1 | 5 | +1.0 [" in tables[2]
    judged, waiting = tables[2].splitlines()[2:]
    assert judged.endswith("| confirmed |")
    assert waiting == "| `t09` beats `plain` of equal cost, budget 0.5 |  |  |  | not run yet |"
    assert tables[3].startswith("Exploration")


def test_summary_has_the_best_rate_of_every_arm_beside_its_control() -> None:
    slower = [make_record("paper", seed, 0.50, cost=0.9995, blr=5e-4) for seed in (0, 1, 2)]
    rows = report.format_summary(find([*EXPLORED, *slower])).splitlines()
    assert len(rows) == 4  # two of heading, paper, stopped-0.5; nobody ran the control of stopped-0.7
    assert "(cost 1.00) | 51.0 ± 2.5 (blr 0.001) | 50.0 ± 0.0 (blr 0.0005) | -1.0 [-3.5, +1.5]: none |" in rows[2]
    assert "(cost 0.50) | 49.0 (blr 0.001) | 48.0 (blr 0.001) | -1.0: one seed |" in rows[3]


def test_summary_leaves_out_an_arm_that_was_not_run_at_the_rate_of_its_control() -> None:
    better = [make_record("plain", seed, 0.55, blr=2e-3) for seed in (0, 1, 2)]
    assert "frozen" not in report.format_summary(find([*EXPLORED, *better]))
    tried = [make_record("paper", seed, 0.48, cost=0.9995, blr=2e-3) for seed in (0, 1, 2)]
    row = report.format_summary(find([*EXPLORED, *better, *tried])).splitlines()[2]
    assert "49.0 ± 2.5 (blr 0.001)" in row, "its best rate, not that of the control"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY"], "holds no cell"),
        (["RECORDS", "--claims", "paper"], "a claim needs 5"),
        (["RECORDS", "--claims", "paper@half"], "must be an arm, what it beats, and its budget"),
        (["RECORDS", "--into", "PAGE"], "has no line '<!-- frontier: begin -->'"),
    ],
)
def test_bad_reports_get_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.md").write_text("nothing to renew\n")
    places = {"EMPTY": tmp_path / "empty", "RECORDS": write_records(tmp_path / "records"), "PAGE": tmp_path / "page.md"}
    assert report.main([str(places.get(word, word)) for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_pages_quote_the_published_records() -> None:
    blocks = report.make_blocks(RESULTS)
    quoting = [path for path in (PAGE, ROOT / "README.md") if "<!-- frontier" in path.read_text()]
    assert PAGE in quoting
    for path in quoting:
        assert report.renew(path.read_text(), blocks, name=path.name) == path.read_text(), (
            f"{path.name} does not say what the records say: python -m benchmarks.frontier.report "
            f"benchmarks/results/frontier --into {path.name}"
        )


def test_published_records_are_small_and_name_no_place() -> None:
    for path in RESULTS.glob("*.json"):
        text = path.read_text()
        assert len(text) < 10_000, path.name
        assert "/" not in text.replace("n/a", ""), path.name
    assert len({record["device"] for record in read_records(RESULTS)}) >= 1


# What commands print --------------------------------------------------------------------------------------------------


def test_printed_results_are_read() -> None:
    rows = ["block  blr  top-1  top-5  loss", "8  0.1  40.00%  80.00%  1.7", "8  3  52.25%  91.00%  1.4  best"]
    linear = "\n".join(rows) + "\n"
    assert read_linear(linear) == {"blr": 3.0, "top1": 0.5225}
    assert read_knn("block    10-NN\n    8   41.64%\n") == {"top1": 0.4164}


def test_training_is_summed_up_over_a_resume(tmp_path: Path) -> None:
    lines = [(10, 2.0), (20, 1.0), (30, 1.0), (20, 3.0), (30, 1.5), (35, 1.0)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "loss": 1 / step, "step_seconds": seconds, "frozen_layers": 0}) + "\n"
            for step, seconds in lines
        )
        + '{"step": 40, "lo'
    )
    found = summarize_training(tmp_path)
    assert (found["steps"], found["seconds"]) == (35, 20 + 30 + 15 + 5)
    assert found["curve"]["step"] == [10, 20, 30, 35]
    assert summarize_training(tmp_path, until=20)["seconds"] == 50
