"""What the records of cells say: every arm against the plain run of its own seed that costs the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.frontier.arms import parse_arm
from benchmarks.frontier.differences import Difference, compare_pairs, correct_for_many, mean_interval
from benchmarks.frontier.errors import InputError

PRIMARY = "finetuned"
METRICS = (PRIMARY, "linear", "knn_10")
FRESH_SEEDS = 5
MOST_CLAIMS = 3
SIGNIFICANCE = 0.05
Record = Mapping[str, Any]
GroupKey = tuple[str, str, int, str]
ArmKey = tuple[str, float, float]  # arm, budget, blr


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One arm at one budget and learning rate: what it costs, what it reaches, what it is worth against its control.

    Attributes:
        blr: learning rate of pre-training per 256 images.
        accuracies: by metric, the mean over seeds and its interval, from 0 to 1.
        control: the plain arm of the same cost; empty if the arm is plain itself or nobody ran one.
        control_blr: learning rate of the control.
        control_accuracy: what the control reaches by the primary metric, on the seeds that are shared.
        differences: by metric, the paired difference from the control, where seeds are shared with it.
        of_freezing: of arms that do more than freeze, the paired difference by the primary metric from the run of equal
            cost that does all but freeze.
    """

    arm: str
    budget: float
    blr: float
    cost: float
    cost_with_finetuning: float
    seeds: tuple[int, ...]
    accuracies: Mapping[str, Difference]
    control: str
    control_blr: float | None
    control_accuracy: Difference | None
    differences: Mapping[str, Difference]
    of_freezing: Difference | None

    @property
    def words(self) -> str:
        """What the arm is, in today's words; records keep those of the day that they were made."""
        return parse_arm(self.arm).words

    @property
    def is_plain(self) -> bool:
        """Whether it is a point of the plain frontier."""
        return parse_arm(self.arm).kind_name == "plain"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim that an arm beats a run of equal cost, put to the test with the others that are made.

    Attributes:
        control: `plain`, or the kind that does all but the freezing.
        difference: None if not all of its runs are there.
        adjusted_p: 1 if not all of its runs are there.
    """

    arm: str
    control: str
    budget: float
    difference: Difference | None
    adjusted_p: float

    @property
    def holds(self) -> bool:
        """Whether it is confirmed: the interval above 0, and Holm's p below 5 %."""
        return self.difference is not None and self.difference.low > 0 and self.adjusted_p < SIGNIFICANCE


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Read all cells of a folder; raises InputError if there are none."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    cells = [record for record in records if "accuracy" in record]
    if not cells:
        raise InputError(f"{folder} holds no cell: no .json file with an accuracy")
    return cells


def group_records(records: Iterable[Record]) -> dict[GroupKey, list[Record]]:
    """Part records that must not be compared: other data, size, number of labels, or judges; the test set first."""
    groups: dict[GroupKey, list[Record]] = {}
    for record in records:
        key = (record["data"], record["size"], record["labels"], record["judged_on"])
        groups.setdefault(key, []).append(record)
    return {key: groups[key] for key in sorted(groups, key=lambda key: (key[3] != "test", key))}


def find(records: Sequence[Record], *, at_equal_rate: bool = False) -> list[Finding]:
    """Return the findings of one group, by falling cost.

    Args:
        records: of one group.
        at_equal_rate: hold every arm against a control of its own learning rate where there is one. Otherwise the
            control has the rate that suits it best, as a user's would.
    """
    arms: dict[ArmKey, dict[int, Record]] = {}
    for record in records:
        arms.setdefault((record["arm"], record["budget"], record["blr"]), {})[record["seed"]] = record
    control = partial(_find_control, arms=arms, at_equal_rate=at_equal_rate)
    found = []
    for runs in arms.values():
        unfrozen = parse_arm(next(iter(runs.values()))["arm"]).kind.unfrozen
        without_freezing = {} if unfrozen == "plain" else control(runs, kind_name=unfrozen)
        found.append(_find_arm(runs, control(runs, kind_name="plain"), without_freezing))
    return sorted(found, key=lambda finding: (-round(finding.cost, 3), not finding.is_plain, finding.arm, finding.blr))


def _find_control(
    runs: Mapping[int, Record], *, arms: Mapping[ArmKey, Mapping[int, Record]], kind_name: str, at_equal_rate: bool
) -> Mapping[int, Record]:
    """Return the runs of a kind of the same cost, which may differ by one step, that share most seeds with `runs`."""
    one = next(iter(runs.values()))
    if parse_arm(one["arm"]).kind_name == kind_name:
        return {}

    def fits(other: Record) -> bool:
        difference = abs(other["cost"]["pretraining"] - one["cost"]["pretraining"])
        return parse_arm(other["arm"]).kind_name == kind_name and difference <= 1.001 / one["steps_of_plain"]

    controls = [others for others in arms.values() if fits(next(iter(others.values())))]

    def rank(others: Mapping[int, Record]) -> tuple[int, bool, float]:
        mean = sum(other["accuracy"][PRIMARY] for other in others.values()) / len(others)
        is_equal = at_equal_rate and next(iter(others.values()))["blr"] == one["blr"]
        return len(others.keys() & runs.keys()), is_equal, mean

    return max(controls, key=rank, default={})


def _find_arm(runs: Mapping[int, Record], control: Mapping[int, Record], unfrozen: Mapping[int, Record]) -> Finding:
    seeds = tuple(sorted(runs))
    one, shared = runs[seeds[0]], sorted(runs.keys() & control.keys())

    def values(of: Mapping[int, Record], metric: str, chosen: Sequence[int]) -> list[float]:
        return [of[seed]["accuracy"][metric] for seed in chosen]

    def compare(other: Mapping[int, Record], metric: str) -> Difference:
        pairs = sorted(runs.keys() & other.keys())
        return compare_pairs(values(runs, metric, pairs), values(other, metric, pairs))

    return Finding(
        arm=one["arm"], budget=one["budget"], blr=one["blr"], seeds=seeds,
        cost=one["cost"]["pretraining"], cost_with_finetuning=one["cost"]["with_finetuning"],
        accuracies={metric: mean_interval(values(runs, metric, seeds)) for metric in METRICS},
        control=control[shared[0]]["arm"] if shared else "",
        control_blr=control[shared[0]]["blr"] if shared else None,
        control_accuracy=mean_interval(values(control, PRIMARY, shared)) if shared else None,
        differences={metric: compare(control, metric) for metric in METRICS if shared},
        of_freezing=compare(unfrozen, PRIMARY) if runs.keys() & unfrozen.keys() else None,
    )  # fmt: skip


def confirm(
    records: Sequence[Record], *rounds: Sequence[tuple[str, str, float]], may_wait: bool = False
) -> list[Claim]:
    """Put claims (arm, control, budget) to the test, on the test set, with all labels and at least five fresh seeds.

    Args:
        rounds: claims that were chosen together, before their runs were judged. Holm's correction is over all rounds.
        may_wait: a claim whose runs are not all there is no error: it counts with a p of 1.

    Raises:
        InputError: too many claims in a round, or records that are exploration and cannot confirm anything.
    """
    for chosen in rounds:
        if not 1 <= len(chosen) <= MOST_CLAIMS:
            raise InputError(
                f"{len(chosen)} claims are made; allowed: 1 to {MOST_CLAIMS}, chosen before the test set is seen"
            )
    judging = [record for record in records if is_confirmation(record)]
    explored = {(r["data"], r["seed"]) for r in records if not is_confirmation(r)}
    findings = find(judging) if judging else []
    claims = [claim for chosen in rounds for claim in chosen]
    differences = [_judge(findings, claim, may_wait=may_wait) for claim in claims]
    stale = sorted({record["seed"] for record in judging if (record["data"], record["seed"]) in explored})
    if stale:
        raise InputError(f"seed {stale[0]} was used for exploring; a claim needs seeds that no choice has seen")
    adjusted = correct_for_many([difference.p_value if difference else 1.0 for difference in differences])
    return [
        Claim(arm=arm, control=control, budget=budget, difference=difference, adjusted_p=p_value)
        for (arm, control, budget), difference, p_value in zip(claims, differences, adjusted, strict=True)
    ]


def _judge(findings: Sequence[Finding], claim: tuple[str, str, float], *, may_wait: bool) -> Difference | None:
    arm, control, budget = claim
    made = [finding for finding in findings if (finding.arm, finding.budget) == (arm, budget)]
    if len(made) > 1:
        raise InputError(f"{arm} at budget {budget:g} has {len(made)} learning rates; a claim has one, chosen")
    difference = _difference_from(control, made[0]) if made else None
    pairs = difference.pairs if difference else 0
    if pairs >= FRESH_SEEDS:
        return difference
    if may_wait:
        return None
    raise InputError(
        f"{arm} at budget {budget:g} has {pairs} pairs with a {control} run of its cost, judged on the test set with "
        f"all labels; a claim needs {FRESH_SEEDS}"
    )


def _difference_from(control: str, finding: Finding) -> Difference | None:
    """Return what a finding is worth against a control; raises InputError for one that it cannot stand against."""
    allowed = dict.fromkeys(("plain", parse_arm(finding.arm).kind.unfrozen))
    if control not in allowed:
        raise InputError(f"{finding.arm} cannot be claimed to beat {control!r}; allowed: {', '.join(allowed)}")
    return finding.differences.get(PRIMARY) if control == "plain" else finding.of_freezing


def is_confirmation(record: Record) -> bool:
    """Whether a record may confirm a claim: judged by the test set, fine-tuned on all labels."""
    return record["judged_on"] == "test" and record["labels"] == record["images"]["train"]
