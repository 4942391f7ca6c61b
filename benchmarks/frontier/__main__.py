"""The command line: `python -m benchmarks.frontier`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.frontier.arms import DEFAULT_ARMS, KINDS, Arm, parse_arms
from benchmarks.frontier.cells import Cell
from benchmarks.frontier.cluster import describe_imagenet, write_commands
from benchmarks.frontier.errors import CellError, InputError, StoppedError
from benchmarks.frontier.files import write_text
from benchmarks.frontier.running import EXIT_STOPPED, ask, run_cells, tune
from benchmarks.frontier.sizes import SIZES
from benchmarks.frontier.split import Counts, prepare
from benchmarks.frontier.study import Study
from vitfreeze.arguments import Parser

logger = logging.getLogger("frontier")

EPILOG = """arms:
{arms}
  An arm with a share, such as plain-0.7, costs that share of the budget. A budget is a counted cost, in units of the
  plain run of the chosen size; every arm takes as many steps as it can for it, so a plain arm of the same cost is its
  exact control.

A study that was stopped, even killed, goes on where it was when the same command is given again.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    arms = "\n".join(f"  {name:<10} {kind.words}" for name, kind in KINDS.items())
    parser = Parser(
        prog="python -m benchmarks.frontier",
        description="Measure accuracy against cost: arms x seeds x budgets, pre-trained, fine-tuned and probed.",
        epilog=EPILOG.format(arms=arms), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a labelled folder, or its shards")
    parser.add_argument("--arms", default=DEFAULT_ARMS, metavar="A,B", help=f"default {DEFAULT_ARMS}")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,N", help="default 0,1,2")
    parser.add_argument("--budget", default="1.0", metavar="X,Y", help="counted costs; default 1.0, the plain run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="work folder; cells/ holds the records")
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu", help="model and lengths (default cpu)")
    parser.add_argument("--all-labels", action="store_true", help="fine-tune on all labels, not on few")
    parser.add_argument("--final", action="store_true", help="judge on the test set: once, when all is chosen")
    parser.add_argument("--prepare-only", action="store_true", help="pack and split the images, and no more")
    parser.add_argument("--held-out", type=int, metavar="N", help="training images for choosing; default by size")
    parser.add_argument("--labels", type=int, metavar="N", help="labels for fine-tuning; default by size")
    rates = parser.add_mutually_exclusive_group()
    rates.add_argument("--tune", metavar="X,Y,Z", help="try these learning rates per 256 images out for each arm")
    rates.add_argument("--blr", type=float, metavar="X", help="learning rate of all arms; default by size")
    parser.add_argument("--tune-budget", type=float, default=0.2, metavar="X", help="cost of a trial (default 0.2)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; return the exit status: 0, 1 when a cell fails, 2 for bad input, 75 when it was stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M", stream=sys.stderr)
    options = build_parser().parse_args(arguments)
    try:
        run_study(options)
    except (InputError, CellError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, InputError) else 1
    except (StoppedError, KeyboardInterrupt) as error:
        sys.stderr.write(f"{error or 'stopped'}; the same command goes on from here\n")
        return EXIT_STOPPED
    return 0


def run_study(options: argparse.Namespace) -> None:
    """Prepare the images, tune if asked to, and run every cell."""
    size, arms = SIZES[options.size], parse_arms(options.arms)
    seeds = read_numbers("--seeds", options.seeds, whole=True)
    budgets = read_numbers("--budget", options.budget)
    rates = read_numbers("--tune", options.tune) if options.tune else []
    given = options.held_out is not None or options.labels is not None
    counts = Counts(held_out=options.held_out or size.held_out, labels=options.labels or size.labels, given=given)
    if size.teraflops is None or options.prepare_only:
        split = prepare(options.data, options.out / "data", counts=counts, pixels=size.stored_pixels)
    else:
        split = describe_imagenet(options.out / "data", held_out=counts.held_out)
    if options.prepare_only:
        return
    study = Study(size_name=options.size, size=size, split=split, out=options.out, ask=ask)
    tuned = tune(study, arms, rates=rates, budget=options.tune_budget) if rates else {}
    fallback = size.blr if options.blr is None else options.blr

    all_labels = options.all_labels or size.all_labels

    def make_cell(arm: Arm, seed: int, budget: float) -> Cell:
        blr = tuned.get(arm.kind.tuned_as, fallback)
        return Cell(arm=arm, seed=seed, budget=budget, blr=blr, all_labels=all_labels, final=options.final)

    cells = [make_cell(arm, int(seed), budget) for budget in budgets for seed in seeds for arm in arms]
    if size.teraflops is not None:
        write_text(write_commands(study, cells), options.out / "commands.sh")
        logger.info("%d cells are written down in %s; nothing was run", len(cells), options.out / "commands.sh")
        return
    run_cells(study, cells)


def read_numbers(option: str, text: str, *, whole: bool = False) -> list[float]:
    """Read numbers separated by commas; raises InputError for what is none, or is not above 0 (whole: at least 0)."""
    try:
        numbers = [int(word) if whole else float(word) for word in text.split(",")]
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        raise InputError(f"{option} is {text!r}; allowed: {kind} separated by commas") from None
    if any(number < 0 or (number == 0 and not whole) for number in numbers) or len(set(numbers)) < len(numbers):
        raise InputError(f"{option} is {text!r}; allowed: numbers above 0 (seeds: from 0), each of them once")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
