"""Hurts training runs in every way that we know, lets them go on, and compares them with undisturbed ones.

    python tests/chaos/driver.py --rounds 50 --seed 1 --folder /tmp/chaos

Each round is one run of real processes with one to three injuries. A run is lost when it cannot be brought to its end
by the same command, or when its losses or weights differ from the undisturbed run's: by one bit if it ran on the same
number of ranks all the time, by 1e-5 (relative) if that changed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from jobs import Bench, Job, Kill, newest_checkpoint, read_events, read_losses  # noqa: E402

DONE, STOPPED, HUNG, BAD_INPUT = 0, 75, 79, 2
TOTAL_STEPS = 16
WATCHDOG = "run.watchdog_minutes=0.2"


@dataclass(kw_only=True)
class Round:
    """One run and what was done to it."""

    name: str
    ranks: list[int]  # of each start
    stage: int
    injuries: list[str]
    starts: list[tuple[float, int]] = field(default_factory=list)  # when, and the steps that had been taken by then
    steps_lost: list[int] = field(default_factory=list)  # at each start after the first
    problem: str = ""


class Chaos:
    """The driver: one bench, its undisturbed runs, and the injuries.

    Args:
        folder: in which everything happens.
        seed: of every choice. Instants are random in any case, as the machine is.
    """

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.bench = Bench(folder)
        self.random = random.Random(seed)
        self._undisturbed: dict[tuple[int, int], Path] = {}
        self.injuries: dict[str, Callable[[Round, str], None]] = {
            "kill": self.kill_everything,
            "kill one rank": self.kill_one_rank,
            "kill in a save": self.kill_in_a_save,
            "ask to stop": self.ask_to_stop,
            "truncate a file": self.truncate_a_file,
            "flip a byte": self.flip_a_byte,
            "remove the pointer": self.remove_the_pointer,
            "drop a shard": self.drop_a_shard,
            "stop one rank": self.stop_one_rank,
            "fill the disk": self.fill_the_disk,
        }

    # -- rounds --------------------------------------------------------------------------------------------------

    def play(self, name: str, injuries: list[str], *, change_ranks: bool) -> Round:
        """Run one round and judge it."""
        ranks = [self.random.choice((1, 2))]
        ranks += [self.random.choice((1, 2)) if change_ranks else ranks[0] for _ in injuries]
        if "stop one rank" in injuries or "kill one rank" in injuries:
            ranks = [2] * len(ranks)
        this = Round(name=name, ranks=ranks, stage=self.random.choice((1, 2)), injuries=injuries)
        try:
            for injury in injuries:
                self.injuries[injury](this, name)
                this.ranks.append(this.ranks.pop(0))
            self._expect(this, self.start(this).wait(), (DONE,))
            self._compare(this)
        except (AssertionError, TimeoutError, FileNotFoundError) as error:
            this.problem = f"{type(error).__name__}: {error}"[-1500:]
        this.steps_lost = self._count_lost_steps(this)
        return this

    def run_dir(self, this: Round) -> Path:
        return self.bench.folder / this.name

    def start(self, this: Round, *overrides: str, kill: Kill | None = None) -> Job:
        this.starts.append((time.time(), max(read_losses(self.run_dir(this)), default=0)))
        return self.bench.start(this.name, WATCHDOG, *overrides, ranks=this.ranks[0], stage=this.stage, kill=kill)

    def undisturbed(self, *, ranks: int, stage: int) -> Path:
        """Return the folder of a run that nothing happened to."""
        if (ranks, stage) not in self._undisturbed:
            name = f"undisturbed-{ranks}-{stage}"
            assert set(self.bench.run(name, ranks=ranks, stage=stage)) == {DONE}
            self._undisturbed[ranks, stage] = self.bench.folder / name
        return self._undisturbed[ranks, stage]

    def _count_lost_steps(self, this: Round) -> list[int]:
        """Return how many steps had to be taken again at each start after the first that got as far as training."""
        begun = read_events(self.run_dir(this), "start", "resume")
        lost = []
        for event in begun:
            taken = [steps for moment, steps in this.starts if moment < event["time"]]
            lost.append(max(taken[-1] - event["step"], 0))
        return lost[1:]

    def _expect(self, this: Round, statuses: list[int | None], allowed: tuple[int, ...]) -> None:
        assert set(statuses) <= set(allowed), f"exit statuses {statuses}:\n{self.bench.log(this.name)[-3000:]}"

    def _compare(self, this: Round) -> None:
        mine, theirs = self.run_dir(this), self.undisturbed(ranks=this.ranks[0], stage=this.stage)
        losses, expected = read_losses(mine), read_losses(theirs)
        assert sorted(losses) == sorted(expected) == list(range(1, TOTAL_STEPS + 1)), f"steps {sorted(losses)}"
        if len(set(this.ranks)) == 1:
            different = [step for step in expected if losses[step] != expected[step]]
            assert not different, f"other figures at steps {different}"
            files = [newest_checkpoint(folder) / "weights.safetensors" for folder in (mine, theirs)]
            assert files[0].read_bytes() == files[1].read_bytes(), "other weights"
            return
        for step, figures in expected.items():
            difference = abs(losses[step]["loss"] / figures["loss"] - 1)
            assert difference < 1e-5, f"step {step}: the loss differs by {difference:.1e}"

    # -- injuries: each starts the run, hurts it, and leaves it ended ----------------------------------------------

    def wait_for_progress(self, this: Round, job: Job, *, steps: int | None = None) -> None:
        """Let the job take some steps, and then some moment more."""
        last = max(read_losses(self.run_dir(this)), default=0)
        goal = last + (self.random.randint(1, 6) if steps is None else steps)
        while max(read_losses(self.run_dir(this)), default=0) < min(goal, TOTAL_STEPS - 1):
            if all(process.exitcode is not None for process in job.processes):
                return
            assert time.monotonic() - job.started < 120, f"no progress:\n{self.bench.log(this.name)[-3000:]}"
            time.sleep(0.005)
        time.sleep(self.random.uniform(0, 0.3))

    def kill_everything(self, this: Round, name: str) -> None:
        job = self.start(this)
        if self.random.random() < 0.3:  # before the first step, too
            time.sleep(self.random.uniform(0, 5))
        else:
            self.wait_for_progress(this, job)
        job.kill()

    def kill_one_rank(self, this: Round, name: str) -> None:
        job = self.start(this)
        self.wait_for_progress(this, job)
        victim = self.random.randrange(len(job.processes))
        job.signal(signal.SIGKILL, ranks=[victim])
        time.sleep(self.random.uniform(0, 2))
        job.kill()  # as the launcher does when a rank is gone

    def kill_in_a_save(self, this: Round, name: str) -> None:
        begun = max(read_losses(self.run_dir(this)), default=0)
        later = [step for step in range(3, TOTAL_STEPS, 3) if step > begun + 3] or [TOTAL_STEPS]
        where = self.random.choice(("write_files", "write_manifest", "write_pointer", "delete_old"))
        job = self.start(this, kill=Kill(where=where, step=later[0]))
        while all(process.exitcode is None for process in job.processes):
            assert time.monotonic() - job.started < 120, "the save never came"
            time.sleep(0.01)
        job.kill()

    def ask_to_stop(self, this: Round, name: str) -> None:
        job = self.start(this)
        self.wait_for_progress(this, job)
        number = self.random.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
        job.signal(number, ranks=[self.random.randrange(len(job.processes))])
        statuses = job.wait()
        # A run that has taken and saved its last step may be ended by the signal as any process is.
        finished = max(read_losses(self.run_dir(this)), default=0) == TOTAL_STEPS
        self._expect(this, statuses, (STOPPED, DONE, -number) if finished else (STOPPED, DONE))

    def truncate_a_file(self, this: Round, name: str) -> None:
        self.kill_everything(this, name)
        self._damage(this, lambda data: data[: self.random.randrange(len(data))])

    def flip_a_byte(self, this: Round, name: str) -> None:
        self.kill_everything(this, name)

        def flip(data: bytes) -> bytes:
            place = self.random.randrange(len(data))
            return data[:place] + bytes([data[place] ^ (1 << self.random.randrange(8))]) + data[place + 1 :]

        self._damage(this, flip)

    def _damage(self, this: Round, change: Callable[[bytes], bytes]) -> None:
        whole = sorted((self.run_dir(this) / "checkpoints").glob("step-*"))
        if len(whole) < 2:  # damage to the only checkpoint is a loss, and said to be one
            return
        victim = self.random.choice(sorted(whole[-1].iterdir()))
        victim.write_bytes(change(victim.read_bytes()))

    def remove_the_pointer(self, this: Round, name: str) -> None:
        self.kill_everything(this, name)
        (self.run_dir(this) / "checkpoints" / "newest").unlink(missing_ok=True)

    def drop_a_shard(self, this: Round, name: str) -> None:
        shard = self.bench.folder / "shards" / "tiny-train-0001.tar"
        away = shard.with_suffix(".away")
        job = self.start(this)
        try:
            self.wait_for_progress(this, job)
            shard.rename(away)
            job.signal(signal.SIGKILL)
            job.kill()
            statuses = self.start(this).wait()  # it cannot start without the shard, and must say so
            assert set(statuses) == {BAD_INPUT}, f"exit statuses {statuses} without a shard"
        finally:
            away.rename(shard)

    def stop_one_rank(self, this: Round, name: str) -> None:
        job = self.start(this)
        self.wait_for_progress(this, job, steps=self.random.randint(1, 3))
        victim = self.random.randrange(2)
        job.signal(signal.SIGSTOP, ranks=[victim])
        other = job.processes[1 - victim]
        other.join(90)
        job.kill()
        assert other.exitcode in (HUNG, DONE), f"exit status {other.exitcode} beside a rank that stands still"
        if other.exitcode == HUNG:
            assert (self.run_dir(this) / f"hang-rank-{1 - victim:05d}.txt").is_file()

    def fill_the_disk(self, this: Round, name: str) -> None:
        """Put the checkpoints on a small tmpfs, fill it while the run goes on, and make room again."""
        if not (self.run_dir(this) / "checkpoints").is_dir():
            self.ask_to_stop(this, name)
        if max(read_losses(self.run_dir(this)), default=0) >= TOTAL_STEPS - 3:
            return  # no save is to come but the last
        parent = self.run_dir(this) / "checkpoints"
        elsewhere = self.run_dir(this).with_name(f"{name}.checkpoints")
        shutil.copytree(parent, elsewhere)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", parent], check=True)
        try:
            shutil.copytree(elsewhere, parent, dirs_exist_ok=True)
            shutil.rmtree(elsewhere)
            ballast = parent / "ballast"
            with ballast.open("wb") as file:
                room = shutil.disk_usage(parent).free
                file.write(bytes(max(room - 100_000, 0)))
            job = self.start(this)
            deadline = time.monotonic() + 120
            while not read_events(self.run_dir(this), "save_failed") and time.monotonic() < deadline:
                time.sleep(0.02)
            assert read_events(self.run_dir(this), "save_failed"), "a full disk was not reported"
            newest = newest_checkpoint(self.run_dir(this))
            assert (newest / "manifest.json").is_file(), "the pointer names nothing whole"
            ballast.unlink(missing_ok=True)
            self._expect(this, job.wait(), (DONE, 1))
            shutil.copytree(parent, elsewhere)
        finally:
            subprocess.run(["umount", parent], check=True)
        shutil.rmtree(parent)
        elsewhere.rename(parent)

    def can_mount(self) -> bool:
        """Tell whether this user may mount a tmpfs."""
        place = self.bench.folder / "mount"
        place.mkdir(exist_ok=True)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode == 0
        if mounted:
            subprocess.run(["umount", place], check=True)
        return mounted


def main() -> None:
    """Play the rounds and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    chaos = Chaos(options.folder, seed=options.seed)
    kinds = [kind for kind in chaos.injuries if kind != "fill the disk" or chaos.can_mount()]
    rounds: list[Round] = []
    for number in range(options.rounds):
        injuries = [kinds[number % len(kinds)]]
        injuries += chaos.random.choices(kinds, k=chaos.random.randint(0, 2))
        this = chaos.play(f"round-{number:03d}", injuries, change_ranks=chaos.random.random() < 0.3)
        rounds.append(this)
        print(json.dumps(vars(this)), flush=True)
        if not this.problem:
            shutil.rmtree(options.folder / this.name, ignore_errors=True)
    print(json.dumps(summarize(rounds)))


def summarize(rounds: list[Round]) -> dict[str, Any]:
    """Return the figures of all rounds."""
    lost = [steps for this in rounds for steps in this.steps_lost]
    return {
        "rounds": len(rounds),
        "runs lost": sum(bool(this.problem) for this in rounds),
        "injuries": Counter(injury for this in rounds for injury in this.injuries),
        "restarts": len(lost),
        "steps lost at a restart, mean": sum(lost) / max(len(lost), 1),
        "steps lost at a restart, worst": max(lost, default=0),
    }


if __name__ == "__main__":
    main()
