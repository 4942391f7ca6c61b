"""The command line: `python -m benchmarks.frontier`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.frontier.arms import DEFAULT_ARMS, parse_arm, parse_arms
from benchmarks.frontier.cells import EXIT_STOPPED, Cell, Laboratory
from benchmarks.frontier.errors import CellError, InputError, StoppedError
from benchmarks.frontier.files import write_json
from benchmarks.frontier.sizes import SIZES
from benchmarks.frontier.split import prepare

logger = logging.getLogger("frontier")
TUNING_SEED = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M", stream=sys.stderr)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--arms", default=DEFAULT_ARMS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budget", default="1.0")
    parser.add_argument("--size", choices=tuple(SIZES), default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tune", default="")
    parser.add_argument("--tune-budget", type=float, default=0.2)
    parser.add_argument("--all-labels", action="store_true")
    parser.add_argument("--final", action="store_true")
    options = parser.parse_args(arguments)
    try:
        size = SIZES[options.size]
        arms = parse_arms(options.arms)
        split = prepare(
            options.data, options.out / "data", held_out=size.held_out, labels=size.labels, pixels=size.stored_pixels
        )
        laboratory = Laboratory(size_name=options.size, size=size, split=split, out=options.out)
        rates, tuned = {}, {}
        if options.tune:
            for kind in dict.fromkeys(arm.kind.tuned_as for arm in arms):
                found = {}
                for blr in options.tune.split(","):
                    cell = Cell(arm=parse_arm(kind), seed=TUNING_SEED, budget=options.tune_budget, blr=float(blr))
                    found[cell.blr] = laboratory.try_rate(cell)
                    write_json({**tuned, kind: found}, options.out / "tuning.json")
                tuned[kind] = found
                logger.info("%s: %s", kind, found)
                rates[kind] = max(found, key=lambda rate: found[rate])
        for budget in options.budget.split(","):
            for seed in options.seeds.split(","):
                for arm in arms:
                    cell = Cell(
                        arm=arm,
                        seed=int(seed),
                        budget=float(budget),
                        blr=rates.get(arm.kind.tuned_as, size.blr),
                        all_labels=options.all_labels,
                        final=options.final,
                    )
                    run_cell(laboratory, cell, options.out / "cells")
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except CellError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except StoppedError as error:
        sys.stderr.write(f"{error}; the same command goes on from here\n")
        return EXIT_STOPPED
    return 0


def run_cell(laboratory: Laboratory, cell: Cell, folder: Path) -> dict:
    path = folder / f"{cell.name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    begin = time.time()
    record = laboratory.run(cell)
    write_json(record, path)
    logger.info("%s: %s in %.0f s", cell.name, record["accuracy"], time.time() - begin)
    return record


if __name__ == "__main__":
    sys.exit(main())
