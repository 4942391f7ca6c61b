"""Hurts training runs in every way that we know, lets them go on, and compares them with undisturbed ones.

    python tests/chaos/driver.py --rounds 100 --seed 1 --folder /tmp/chaos

Each round is one run of real processes with one to three injuries. A run is lost when it cannot be brought to its end
by the same command, or when its losses, rates, freezes, points in TensorBoard or weights differ from the undisturbed
run's: by one bit if it ran on the same number of ranks all the time, by 1e-5 (relative) if that changed. Rounds that
the folder tells of are not played again, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from injuries import DONE, INJURIES, NEEDS_TWO_RANKS, QUICK, TOTAL_STEPS, choose_injuries, choose_kinds  # noqa: E402
from jobs import Bench, Job, Kill, newest_checkpoint, read_events, read_lines, read_losses  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

WATCHDOG = "run.watchdog_minutes=0.2"
CURRICULUM = (
    "optim.schedule=wsd", "optim.cooldown=4 steps", "freeze.rates=stable", "freeze.decay=2 steps",
    "curriculum.img_size=[[0, 16], [0.5, 32]]", "curriculum.mask_ratio=[[0, 0.5], [0.5, 0.75]]",
    "curriculum.decoded_share=[[0, 0.5], [0.75, 1.0]]",
)  # fmt: skip
SCHEDULES = {"plain": (), "curriculum and wsd": CURRICULUM}


@dataclass(kw_only=True)
class Round:
    """One run and what was done to it."""

    name: str
    ranks: list[int]  # of each start from now on
    stage: int
    schedule: str
    injuries: list[str]
    starts: int = 0
    steps_lost: list[int] = field(default_factory=list)  # at each start after the first that got as far as training
    erased: int = 0  # steps whose logs went with a folder that was deleted
    problem: str = ""


class Chaos:
    """The driver: one bench, its undisturbed runs, and the rounds.

    Args:
        folder: in which everything happens.
        seed: of every choice. Instants are random in any case, as the machine is.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.bench = Bench(folder, batch={"micro_size": 2})
        self.random = random.Random(seed)
        self._undisturbed: dict[tuple[int, int, str], Path] = {}
        self._events = self._taken = self._said = 0  # of the start before, or before it

    def play(self, name: str, injuries: list[str], *, ranks: list[int], schedule: str = "plain") -> Round:
        """Run one round and judge it; `ranks` are those of each start, after the last of them the first again."""
        if NEEDS_TWO_RANKS & {*injuries}:
            ranks = [2]
        this = Round(
            name=name, ranks=list(ranks), stage=self.random.choice((1, 2)), schedule=schedule, injuries=injuries
        )
        self._events = 0
        try:
            for injury in injuries:
                INJURIES[injury](self, this)
                self._note_loss(this)
                this.ranks.append(this.ranks.pop(0))
            statuses = self.start(this).wait()
            assert set(statuses) == {DONE}, f"exit statuses {statuses}:\n{self.bench.log(name)[-3000:]}"
            self._note_loss(this)
            self._compare(this)
        except (AssertionError, TimeoutError, OSError) as error:
            this.problem = f"{type(error).__name__}: {error}"[-3000:]
        return this

    def run_dir(self, this: Round) -> Path:
        """Return the folder of the round's run."""
        return self.bench.folder / this.name

    def overrides(self, this: Round) -> tuple[str, ...]:
        """Return the settings of the round."""
        return WATCHDOG, *SCHEDULES[this.schedule]

    def start(self, this: Round, *overrides: str, kill: Kill | None = None) -> Job:
        """Start the round's run."""
        self.note_start(this)
        return self.bench.start(
            this.name, *self.overrides(this), *overrides, ranks=this.ranks[0], stage=this.stage, kill=kill
        )

    def note_start(self, this: Round) -> None:
        """Note where the run stands before a start, and what the one before has lost."""
        self._note_loss(this)
        this.starts += 1
        self._taken = max(read_losses(self.run_dir(this)), default=0)
        log = self.bench.folder / f"{this.name}.log"
        self._said = log.stat().st_size if log.is_file() else 0

    def log(self, this: Round) -> str:
        """Return what the last start has said."""
        with (self.bench.folder / f"{this.name}.log").open("rb") as file:
            file.seek(self._said)
            return file.read().decode(errors="replace")

    def forget_events(self, this: Round) -> None:
        """Note that events.jsonl is gone."""
        self._note_loss(this)
        self._events = 0

    def _note_loss(self, this: Round) -> None:
        begun = read_events(self.run_dir(this), "start", "resume")
        if len(begun) > self._events and this.starts > 1:
            this.steps_lost.append(max(self._taken - begun[-1]["step"], 0))
        self._events = len(begun)

    def undisturbed(self, *, ranks: int, stage: int, schedule: str) -> Path:
        """Return the folder of a run that nothing happened to."""
        if (ranks, stage, schedule) not in self._undisturbed:
            name = f"undisturbed-{ranks}-{stage}-{schedule.split()[0]}"
            if max(read_losses(self.bench.folder / name), default=0) < TOTAL_STEPS:
                shutil.rmtree(self.bench.folder / name, ignore_errors=True)
                assert set(self.bench.run(name, *SCHEDULES[schedule], ranks=ranks, stage=stage)) == {DONE}
            self._undisturbed[ranks, stage, schedule] = self.bench.folder / name
        return self._undisturbed[ranks, stage, schedule]

    def _compare(self, this: Round) -> None:
        mine = self.run_dir(this)
        theirs = self.undisturbed(ranks=this.ranks[0], stage=this.stage, schedule=this.schedule)
        losses, expected = read_losses(mine), read_losses(theirs)
        steps = range(this.erased + 1, TOTAL_STEPS + 1)
        assert sorted(losses) == sorted({*steps, *losses}), f"steps {sorted(losses)} of {steps}"
        assert points_of(mine) == sorted(losses), (
            f"points {points_of(mine)} in TensorBoard, {sorted(losses)} in metrics"
        )
        froze = [freezes_of(folder, after=this.erased) for folder in (mine, theirs)]
        assert froze[0] == froze[1], f"freezes {froze[0]}, not {froze[1]}"
        if len(set(this.ranks)) == 1:
            different = [step for step in losses if losses[step] != expected[step]]
            assert not different, f"other figures at steps {different}"
            files = [newest_checkpoint(folder) / "weights.safetensors" for folder in (mine, theirs)]
            assert files[0].read_bytes() == files[1].read_bytes(), "other weights"
            return
        for step, figures in losses.items():
            difference = abs(figures["loss"] / expected[step]["loss"] - 1)
            assert difference < 1e-5, f"step {step}: the loss differs by {difference:.1e}"
            exact = ("lr", "frozen_layers", "epoch")
            assert all(figures[name] == expected[step][name] for name in exact), f"step {step}: other rates or freezes"


def points_of(run_dir: Path) -> list[int]:
    """Return the steps at which TensorBoard shows a loss."""
    board = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [point.step for point in board.Scalars("loss")]


def freezes_of(run_dir: Path, *, after: int) -> list[tuple[int, list[int]]]:
    """Return step and layers of every freeze after a step."""
    return [(event["step"], event["layers"]) for event in read_events(run_dir, "freeze") if event["step"] > after]


def choose_round(number: int, *, kinds: list[str], seed: int) -> dict[str, Any]:
    """Return the arguments of `play` for the round of a number, whatever was played before."""
    source = random.Random(f"{seed}-{number}")
    choices: dict[str, Any] = {"schedule": source.choice([*SCHEDULES])}
    if number % 10 == 9:
        return choices | {"injuries": source.choices(QUICK, k=3), "ranks": [1, 2, 4, 1]}
    injuries, ranks = choose_injuries(kinds, number, source), [source.choice((1, 2))]
    if source.random() < 0.3:
        ranks = [source.choice((1, 2, 4)) for _ in range(len(injuries) + 1)]
    return choices | {"injuries": injuries, "ranks": ranks}


def main() -> None:
    """Play the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    told = options.folder / "rounds.jsonl"
    rounds = [Round(**line) for line in read_lines(told)]
    chaos = Chaos(options.folder, seed=options.seed)
    kinds = choose_kinds(options.folder)
    for number in range(options.rounds):
        name = f"round-{number:03d}"
        if name in {this.name for this in rounds}:
            continue
        for path in options.folder.glob(f"{name}*"):  # it was stopped in the middle
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        chaos.random.seed(f"{options.seed}-{name}")
        rounds.append(chaos.play(name, **choose_round(number, kinds=kinds, seed=options.seed)))
        with told.open("a") as file:
            file.write(json.dumps(vars(rounds[-1])) + "\n")
        if not rounds[-1].problem:
            shutil.rmtree(options.folder / name, ignore_errors=True)
    print(json.dumps(summarize(rounds), indent=1))


def summarize(rounds: list[Round]) -> dict[str, Any]:
    """Return the figures of all rounds."""
    lost = [steps for this in rounds for steps in this.steps_lost]
    return {
        "rounds": len(rounds),
        "runs lost or silently changed": sum(bool(this.problem) for this in rounds),
        "schedules": Counter(this.schedule for this in rounds),
        "numbers of ranks": Counter(" ".join(map(str, sorted(set(this.ranks)))) for this in rounds),
        "injuries": Counter(injury for this in rounds for injury in this.injuries),
        "starts": sum(this.starts for this in rounds),
        "restarts that got as far as training": len(lost),
        "steps lost at a restart, mean": round(sum(lost) / max(len(lost), 1), 2),
        "steps lost at a restart, worst": max(lost, default=0),
    }


if __name__ == "__main__":
    main()
