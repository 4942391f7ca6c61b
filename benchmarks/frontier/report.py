"""Tables and the figure of a folder of records: `python -m benchmarks.frontier.report FOLDER`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frontier.differences import Difference
from benchmarks.frontier.errors import InputError
from benchmarks.frontier.files import write_text
from benchmarks.frontier.findings import (
    FRESH_SEEDS,
    METRICS,
    PRIMARY,
    Claim,
    Finding,
    GroupKey,
    confirm,
    find,
    group_records,
    is_confirmation,
    read_records,
)
from vitfreeze.arguments import Parser

NAMES = {"finetuned": "fine-tuned", "linear": "linear", "knn_10": "10-NN"}
INK, BAND, ACCENT = "#222222", "#BBD3E6", "#D55E00"
PLAIN_COLOUR = "#0072B2"
MARKERS = "s^Dv<>PX*"
CLAIMS_FILE = "claims.json"  # beside the records: rounds of claims, each chosen before its runs were judged


def describe_group(key: GroupKey, records: Sequence[Any]) -> str:
    """Return what a group of records is, in one sentence; exploration is called exploration."""
    data, size, labels, judge = key
    one = records[0]
    seeds = sorted({record["seed"] for record in records})
    judged = f"{one['images'][judge]:,} {'test' if judge == 'test' else 'held-out'} images"
    kind = "Test set" if all(map(is_confirmation, records)) else "Exploration"
    return (
        f"{kind}: {data}, size `{size}`, {one['images']['train']:,} training images, fine-tuned on {labels:,} labels, "
        f"judged on {judged}; seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}."
    )


def format_table(findings: Sequence[Finding]) -> str:
    """Return findings as a markdown table: cost, accuracies in per cent, difference from its control."""
    head = [
        "arm",
        "blr",
        "cost",
        "with fine-tuning",
        "seeds",
        *NAMES.values(),
        "fine-tuned, minus plain of equal cost",
        "so",
        "minus the same, not frozen, of equal cost",
    ]
    rows = [head, ["---"] * len(head)]
    for finding in findings:
        difference = finding.differences.get(PRIMARY)
        costs = [f"{finding.blr:g}", f"{finding.cost:.3f}", f"{finding.cost_with_finetuning:.3f}"]
        reached = [format_mean(finding.accuracies[metric]) for metric in METRICS]
        freezing = format_difference(finding.of_freezing) if finding.of_freezing else ""
        against = [format_difference(difference) if difference else "", describe_verdict(finding), freezing]
        rows.append([f"`{finding.arm}`: {finding.words}", *costs, str(len(finding.seeds)), *reached, *against])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def describe_verdict(finding: Finding) -> str:
    """Return what may be said of an arm against its control."""
    if finding.is_plain:
        return "frontier"
    difference = finding.differences.get(PRIMARY)
    return difference.verdict if difference else "no control yet"


def format_mean(value: Difference) -> str:
    """Return a mean accuracy in per cent, with half of its interval if there are several seeds."""
    if value.pairs < 2:
        return f"{100 * value.mean:.1f}"
    return f"{100 * value.mean:.1f} ± {50 * (value.high - value.low):.1f}"


def format_difference(difference: Difference) -> str:
    """Return a paired difference in points, with its 95 % interval if there are several pairs."""
    if difference.pairs < 2:
        return f"{100 * difference.mean:+.1f}"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def format_claims(claims: Sequence[Claim]) -> str:
    """Return tested claims as a markdown table."""
    rows = [["claim", "pairs", "difference", "Holm's p", "so"], ["---"] * 5]
    for claim in claims:
        words = f"`{claim.arm}` beats `{claim.control}` of equal cost, budget {claim.budget:g}"
        if claim.difference is None:
            rows.append([words, "", "", "", "not run yet"])
            continue
        verdict = "confirmed" if claim.holds else "not confirmed"
        pairs = str(claim.difference.pairs)
        rows.append([words, pairs, format_difference(claim.difference), f"{claim.adjusted_p:.3f}", verdict])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def format_summary(findings: Sequence[Finding]) -> str:
    """Return the rows of a short table for a first page: each frozen or stopped arm beside plain of equal cost.

    Of an arm with several learning rates, the best is shown. One that was never run at the rate of its control is left
    out: the rates would be compared as much as the arms.
    """
    rows = [["pre-training at equal counted cost", "plain", "arm", "difference, points"], ["---"] * 4]
    best: dict[tuple[str, float], Finding] = {}
    for finding in sorted(findings, key=lambda finding: finding.accuracies[PRIMARY].mean):
        best[finding.arm, finding.budget] = finding
    tried = {(finding.arm, finding.budget, finding.blr) for finding in findings}
    for finding in findings:
        if finding.control_accuracy is None or best[finding.arm, finding.budget] is not finding:
            continue
        if (finding.arm, finding.budget, finding.control_blr) not in tried:
            continue
        difference = finding.differences[PRIMARY]
        rows.append([
            f"{finding.words} (cost {finding.cost:.2f})",
            f"{format_mean(finding.control_accuracy)} (blr {finding.control_blr:g})",
            f"{format_mean(finding.accuracies[PRIMARY])} (blr {finding.blr:g})",
            f"{format_difference(difference)}: {difference.verdict}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def format_tuning(tuning: Mapping[str, Any]) -> str:
    """Return what trials of learning rates found, as a markdown table of linear probes in per cent."""
    found = tuning["linear"]
    rates = sorted({rate for tried in found.values() for rate in tried}, key=float)
    rows = [[f"linear probe of short runs, cost {tuning['budget']:g}", *(f"blr {rate}" for rate in rates)]]
    rows.append(["---"] * len(rows[0]))
    for kind, tried in found.items():
        rows.append([f"`{kind}`", *(f"{100 * tried[rate]:.1f}" if rate in tried else "" for rate in rates)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(findings: Sequence[Finding], path: Path, *, title: str) -> Path:
    """Draw accuracy against counted cost: the plain frontier with its 95 % band, every other arm as a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    plain = best_at_each_cost([finding for finding in findings if finding.is_plain])
    costs = [finding.cost for finding in plain]
    means = [100 * finding.accuracies[PRIMARY].mean for finding in plain]
    if plain and all(finding.accuracies[PRIMARY].pairs > 1 for finding in plain):
        intervals = [finding.accuracies[PRIMARY] for finding in plain]
        low, high = [100 * x.low for x in intervals], [100 * x.high for x in intervals]
        axes.fill_between(costs, low, high, color=BAND, label="95 % interval over seeds")
    axes.plot(costs, means, "o-", color=PLAIN_COLOUR, label="plain LocalMIM, rate decayed")
    series: dict[tuple[str, float], list[Finding]] = {}
    for finding in findings:
        if not finding.is_plain:
            series.setdefault((finding.arm, finding.blr), []).append(finding)
    for number, ((arm, blr), points) in enumerate(series.items(), start=1):
        values = [finding.accuracies[PRIMARY] for finding in points]
        spreads = [50 * (value.high - value.low) if value.pairs > 1 else 0.0 for value in values]
        axes.errorbar(
            [finding.cost for finding in points], [100 * value.mean for value in values],
            yerr=spreads if any(spreads) else None, color=f"C{number}", capsize=3,
            fmt=f"{MARKERS[number % len(MARKERS)]}:", label=f"{arm}, blr {blr:g}: {points[0].words}",
        )  # fmt: skip
    axes.set_xlim(0, 1.1 * max(finding.cost for finding in findings))
    axes.set_xlabel("counted cost of pre-training (plain run = 1)")
    axes.set_ylabel("fine-tuned top-1, per cent")
    axes.set_title(title, loc="left", fontsize=9, wrap=True)
    figure.legend(fontsize=7, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def best_at_each_cost(plain: Sequence[Finding]) -> list[Finding]:
    """Return the frontier of plain runs by rising cost: of several learning rates, the best."""
    best: dict[float, Finding] = {}
    for finding in sorted(plain, key=lambda finding: (finding.cost, finding.accuracies[PRIMARY].mean)):
        best[round(finding.cost, 3)] = finding
    return list(best.values())


def replace_block(text: str, name: str, content: str) -> str:
    """Return a document with the text between `<!-- NAME: begin -->` and `<!-- NAME: end -->` replaced.

    Raises:
        InputError: the document has no such block.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise InputError(f"the document needs one line '{begin}' and one '{end}'")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"


def make_blocks(folder: Path) -> dict[str, str]:
    """Return what documents quote of a folder of records: block frontier (all tables), block frontier summary.

    Raises:
        InputError: there is no record, or the claims of claims.json cannot be judged by them.
    """
    records = read_records(folder)
    groups = group_records(records)
    tables = [
        f"{describe_group(key, group)}\n\n{format_table(find(group, at_equal_rate=True))}"
        for key, group in groups.items()
    ]  # of the test set first
    if (folder / CLAIMS_FILE).is_file():
        rounds = [[read_claim(text) for text in chosen] for chosen in json.loads((folder / CLAIMS_FILE).read_text())]
        tables.insert(1, format_claims(confirm(records, *rounds, may_wait=True)))
    if (folder / "tuning.json").is_file():
        tables.append(format_tuning(json.loads((folder / "tuning.json").read_text())))
    key, group = next(iter(groups.items()))
    summary = f"{format_summary(find(group))}\n\n{describe_group(key, group)}"
    return {"frontier": "\n\n".join(tables), "frontier summary": summary}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = Parser(prog="python -m benchmarks.frontier.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="records: cells/ of a study, or published ones")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against cost, as .png or .svg")
    parser.add_argument(
        "--into", type=Path, nargs="+", default=(), metavar="FILE", help="renew the tables in documents"
    )
    parser.add_argument(
        "--claims", metavar="A,B", default="",
        help=f"put at most 3 claims to the test, as in paper@0.5 or 'small_global>small'; each needs {FRESH_SEEDS} "
        "fresh seeds",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, and draw or write what is asked for; return the exit status, 2 for bad input."""
    options = build_parser().parse_args(arguments)
    try:
        records = read_records(options.folder)
        blocks = make_blocks(options.folder)
        sys.stdout.write(f"{blocks['frontier']}\n")
        if options.claims:
            claims = [read_claim(text) for text in options.claims.split(",")]
            sys.stdout.write(f"\n{format_claims(confirm(records, claims))}\n")
        if options.plot:
            key, group = next(iter(group_records(records).items()))
            draw(find(group), options.plot, title=describe_group(key, group))
        for path in options.into:
            write_text(renew(path.read_text(), blocks, name=str(path)), path)
    except (InputError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def renew(text: str, blocks: dict[str, str], *, name: str) -> str:
    """Return a document with every block that it has renewed; raises InputError if it has none."""
    wanted = [block for block in blocks if f"<!-- {block}: begin -->" in text]
    if not wanted:
        raise InputError(f"{name} has no line '<!-- frontier: begin -->' or '<!-- frontier summary: begin -->'")
    for block in wanted:
        text = replace_block(text, block, blocks[block])
    return text


def read_claim(text: str) -> tuple[str, str, float]:
    """Read a claim: an arm, then > and what it beats unless that is plain, then @ and its budget unless that is 1."""
    claim, _, budget = text.partition("@")
    arm, _, control = claim.partition(">")
    try:
        return arm, control or "plain", float(budget or 1)
    except ValueError:
        raise InputError(
            f"the claim {text!r} must be an arm, what it beats, and its budget, as in paper or 'small_global>small@0.5'"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
