"""What is done to runs: every injury starts the run of a round, hurts it, and leaves it ended."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from jobs import Job, Kill, newest_checkpoint, read_losses
from processes import free_port

if TYPE_CHECKING:
    from driver import Chaos, Round

DONE, FAILED, BAD_INPUT, STOPPED, HUNG = 0, 1, 2, 75, 79
INTERRUPTED = 130  # by Ctrl-C, before training
TOTAL_STEPS = 16
YEAR = 31_536_000
SHARDS = ("tiny-train-0000.tar", "tiny-train-0001.tar")


def steps_taken(chaos: Chaos, this: Round) -> int:
    """Return the last step that the run has logged."""
    return max(read_losses(chaos.run_dir(this)), default=0)


def wait_until(what: str, is_so: Callable[[], bool], *, seconds: float = 120) -> None:
    """Wait for something; AssertionError says what never came."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.005)


def has_ended(job: Job) -> bool:
    """Tell whether every process has."""
    return all(process.exitcode is not None for process in job.processes)


def wait_for_progress(chaos: Chaos, this: Round, job: Job, *, most: int = 4) -> None:
    """Let the job take some steps, and then some moment more."""
    goal = min(steps_taken(chaos, this) + chaos.random.randint(1, most), TOTAL_STEPS - 1)
    wait_until("a step", lambda: steps_taken(chaos, this) >= goal or has_ended(job))
    time.sleep(chaos.random.uniform(0, 0.3))


def expect(chaos: Chaos, this: Round, statuses: list[int | None], *allowed: int) -> None:
    """Assert how the processes ended."""
    assert set(statuses) <= set(allowed), f"exit statuses {statuses}:\n{chaos.bench.log(this.name)[-3000:]}"


# -- processes -----------------------------------------------------------------------------------------------------


def kill_everything(chaos: Chaos, this: Round) -> None:
    job = chaos.start(this)
    if chaos.random.random() < 0.3:  # before the first step, too
        time.sleep(chaos.random.uniform(0, 5))
    else:
        wait_for_progress(chaos, this, job)
    job.kill()


def kill_one_rank(chaos: Chaos, this: Round) -> None:
    job = chaos.start(this)
    wait_for_progress(chaos, this, job)
    job.signal(signal.SIGKILL, ranks=[chaos.random.randrange(len(job.processes))])
    time.sleep(chaos.random.uniform(0, 2))
    job.kill()  # as the launcher does when a rank is gone


def kill_in_a_save(chaos: Chaos, this: Round) -> None:
    begun = steps_taken(chaos, this)
    later = [step for step in range(3, TOTAL_STEPS, 3) if step > begun + 3] or [TOTAL_STEPS]
    where = chaos.random.choice(("write_files", "write_manifest", "write_pointer", "delete_old"))
    job = chaos.start(this, kill=Kill(where=where, step=later[0]))
    wait_until("the save", lambda: any(process.exitcode is not None for process in job.processes))
    job.kill()


def kill_a_data_worker(chaos: Chaos, this: Round) -> None:
    job = chaos.start(this, "data.workers=1")
    wait_for_progress(chaos, this, job)
    victim = chaos.random.choice(job.processes)
    with suppress(psutil.NoSuchProcess):
        for worker in psutil.Process(victim.pid).children():
            worker.kill()
    # One that had made its last batch is not missed.
    victim.join(60)
    job.kill()  # as the launcher does when a rank has ended
    expect(chaos, this, [victim.exitcode], DONE, FAILED)
    if victim.exitcode == FAILED and victim is job.processes[0]:
        assert "a decoding process is gone" in chaos.log(this)
    assert "Traceback" not in chaos.log(this)


def kill_the_launcher(chaos: Chaos, this: Round) -> None:
    """Kill DeepSpeed's launcher; its ranks live on, the next start names one of them, and that one can end them all."""
    command = f"{sys.executable} -m deepspeed.launcher.runner --num_accelerators {this.ranks[0]} --log_level error"
    command += f" --master_port {free_port()} --no_local_rank --module vitfreeze"
    orphans: list[psutil.Process] = []
    with (chaos.bench.folder / f"{this.name}.log").open("ab") as log:
        chaos.note_start(this)
        arguments = chaos.bench.arguments(this.name, *chaos.overrides(this), stage=this.stage)
        launcher = subprocess.Popen([*command.split(), *arguments], stdout=log, stderr=log)
    try:
        begun, parent = steps_taken(chaos, this), psutil.Process(launcher.pid)

        def is_training() -> bool:
            return steps_taken(chaos, this) > begun or launcher.poll() is not None

        wait_until("a step", is_training, seconds=180)
        family = parent.children(recursive=True) if launcher.poll() is None else []
        orphans = [process for process in family if is_rank(process)]
        signal_all(orphans, signal.SIGSTOP)  # or so short a run would end before the next start
        for process in [parent, *family]:
            if process not in orphans:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        launcher.wait()
        refuse_beside_orphans(chaos, this, orphans)
    finally:
        signal_all(orphans, signal.SIGKILL)
        psutil.wait_procs(orphans, timeout=20)


def is_rank(process: psutil.Process) -> bool:
    """Tell whether a descendant of the launcher is a rank, not a launcher nor a rank's own child."""
    with suppress(psutil.Error):
        command, parents = process.cmdline(), process.parent()
        is_vitfreeze = command[1:4] == ["-u", "-m", "vitfreeze"] or command[1:3] == ["-m", "vitfreeze"]
        return is_vitfreeze and parents is not None and "vitfreeze" not in parents.cmdline()[1:4]
    return False


def signal_all(processes: list[psutil.Process], number: int) -> None:
    """Send a signal to those that live."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def refuse_beside_orphans(chaos: Chaos, this: Round, orphans: list[psutil.Process]) -> None:
    """Start the run beside its orphans: refused, with the process that a kill asks to save and stop."""
    living = [process for process in orphans if process.is_running()]
    if not living:  # the run had come to its end
        return
    statuses = chaos.start(this).wait()
    expect(chaos, this, statuses, BAD_INPUT)
    named = next((process for process in living if f"kill {process.pid} there" in chaos.log(this)), None)
    assert named is not None, f"no orphan is named:\n{chaos.log(this)[-2000:]}"
    signal_all(living, signal.SIGCONT)
    signal_all([named], signal.SIGTERM)
    _, left = psutil.wait_procs(living, timeout=60)
    assert not left, f"{len(left)} orphans went on"


def ask_to_stop(chaos: Chaos, this: Round) -> None:
    job = chaos.start(this)
    wait_for_progress(chaos, this, job)
    number = chaos.random.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    victim = chaos.random.choice(job.processes)
    job.signal(number, ranks=[job.processes.index(victim)])
    victim.join(60)
    # A run that has taken and saved its last step may be ended by the signal as any process is.
    if steps_taken(chaos, this) == TOTAL_STEPS and victim.exitcode in (-number, INTERRUPTED):
        job.kill()  # as the launcher does when a rank is gone
    else:
        expect(chaos, this, job.wait(), STOPPED, DONE)


def stop_one_rank(chaos: Chaos, this: Round) -> None:
    """SIGSTOP to one of two ranks: the watchdog of the other ends the job."""
    job = chaos.start(this)
    if steps_taken(chaos, this) >= TOTAL_STEPS - 1:  # no step is to come in which one could be missed
        expect(chaos, this, job.wait(), DONE)
        return
    wait_for_progress(chaos, this, job, most=3)
    victim = chaos.random.randrange(2)
    job.signal(signal.SIGSTOP, ranks=[victim])
    other = job.processes[1 - victim]
    other.join(90)
    job.kill()
    assert other.exitcode in (HUNG, DONE), f"exit status {other.exitcode} beside a rank that stands still"
    if other.exitcode == HUNG:
        assert (chaos.run_dir(this) / f"hang-rank-{1 - victim:05d}.txt").is_file()


def suspend(chaos: Chaos, this: Round) -> None:
    """SIGSTOP to all ranks for longer than the watchdog waits, then SIGCONT: the run goes on."""
    minutes = 0.05
    job = chaos.start(this, f"run.watchdog_minutes={minutes}")
    wait_for_progress(chaos, this, job, most=3)
    job.signal(signal.SIGSTOP)
    time.sleep(60 * minutes + 1)
    job.signal(signal.SIGCONT)
    if chaos.random.random() < 0.5:
        wait_for_progress(chaos, this, job)
        job.kill()
        assert HUNG not in [process.exitcode for process in job.processes]
    else:
        expect(chaos, this, job.wait(), DONE)


# -- the clock -----------------------------------------------------------------------------------------------------


def set_the_clock_forward(chaos: Chaos, this: Round) -> None:
    _set_the_clock(chaos, this, YEAR)


def set_the_clock_back(chaos: Chaos, this: Round) -> None:
    _set_the_clock(chaos, this, -YEAR)


def _set_the_clock(chaos: Chaos, this: Round, seconds: int) -> None:
    """Let the clock jump in mid-run; it has jumped back at the next start."""
    step = min(steps_taken(chaos, this) + 2, TOTAL_STEPS - 1)
    job = chaos.start(this, kill=Kill(where="clock", step=step, index=seconds))
    wait_for_progress(chaos, this, job)
    job.kill()


# -- files ---------------------------------------------------------------------------------------------------------


def truncate_a_file(chaos: Chaos, this: Round) -> None:
    kill_everything(chaos, this)
    _damage(chaos, this, lambda data: data[: chaos.random.randrange(len(data))])


def flip_a_byte(chaos: Chaos, this: Round) -> None:
    kill_everything(chaos, this)

    def flip(data: bytes) -> bytes:
        place = chaos.random.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << chaos.random.randrange(8))]) + data[place + 1 :]

    _damage(chaos, this, flip)


def _damage(chaos: Chaos, this: Round, change: Callable[[bytes], bytes]) -> None:
    whole = sorted((chaos.run_dir(this) / "checkpoints").glob("step-*"))
    if len(whole) < 2:  # damage to the only checkpoint is a loss, and said to be one
        return
    victim = chaos.random.choice(sorted(whole[-1].iterdir()))
    victim.write_bytes(change(victim.read_bytes()))


def remove_the_pointer(chaos: Chaos, this: Round) -> None:
    kill_everything(chaos, this)
    (chaos.run_dir(this) / "checkpoints" / "newest").unlink(missing_ok=True)


def delete_the_folder(chaos: Chaos, this: Round) -> None:
    """Delete the run folder in mid-run: told, and the last state is kept; the steps that were logged are gone."""
    job, begun = chaos.start(this), steps_taken(chaos, this)
    wait_for_progress(chaos, this, job)
    job.signal(signal.SIGSTOP)
    time.sleep(0.05)
    if (
        begun >= TOTAL_STEPS - 1 or has_ended(job) or steps_taken(chaos, this) == TOTAL_STEPS
    ):  # the last state may be on its way already
        job.signal(signal.SIGCONT)
        expect(chaos, this, job.wait(), DONE)
        return
    this.erased = steps_taken(chaos, this)
    shutil.rmtree(chaos.run_dir(this))
    chaos.forget_events(this)
    job.signal(signal.SIGCONT)
    said = ("is gone, deleted or moved", "is made anew for the last state", "checkpoints cannot be written")
    wait_until("a word on the folder", lambda: any(words in chaos.log(this) for words in said))
    if chaos.random.random() < 0.5:
        job.signal(signal.SIGTERM, ranks=[0])
    expect(chaos, this, job.wait(), DONE, STOPPED)
    assert newest_checkpoint(chaos.run_dir(this)).is_dir()


def fill_the_disk(chaos: Chaos, this: Round) -> None:
    """Put the run folder on a small tmpfs, fill it while the run goes on, and make room again."""
    if not chaos.run_dir(this).is_dir():
        ask_to_stop(chaos, this)
    if steps_taken(chaos, this) >= TOTAL_STEPS - 3:
        return  # no save is to come but the last
    with _on_a_small_disk(chaos.run_dir(this)) as run_dir:
        job, begun = chaos.start(this), steps_taken(chaos, this)
        wait_until("a step", lambda: steps_taken(chaos, this) > begun or has_ended(job))
        job.signal(signal.SIGSTOP)
        ballast = run_dir / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        job.signal(signal.SIGCONT)
        wait_until("a word on the disk", lambda: "cannot be written" in chaos.log(this) or has_ended(job))
        time.sleep(chaos.random.uniform(0, 0.3))
        ballast.unlink()
        expect(chaos, this, job.wait(), DONE, FAILED)
        assert chaos.log(this).count("cannot be written") <= 1, f"said more than once:\n{chaos.log(this)}"
        assert (newest_checkpoint(run_dir) / "manifest.json").is_file(), "the pointer names nothing whole"


@contextmanager
def _on_a_small_disk(folder: Path) -> Iterator[Path]:
    elsewhere = folder.with_name(f"{folder.name}.elsewhere")
    shutil.copytree(folder, elsewhere)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], check=True)
    try:
        shutil.copytree(elsewhere, folder, dirs_exist_ok=True)
        shutil.rmtree(elsewhere)
        yield folder
        shutil.copytree(folder, elsewhere)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
    shutil.rmtree(folder)
    elsewhere.rename(folder)


# -- data ----------------------------------------------------------------------------------------------------------


def drop_a_shard(chaos: Chaos, this: Round) -> None:
    shard = chaos.bench.folder / "shards" / SHARDS[1]
    away = shard.with_suffix(".away")
    job = chaos.start(this)
    try:
        wait_for_progress(chaos, this, job)
        shard.rename(away)
        job.kill()
        expect(chaos, this, chaos.start(this).wait(), BAD_INPUT)  # it must say that it cannot start without
    finally:
        away.rename(shard)


def swap_the_data(chaos: Chaos, this: Round) -> None:
    """Let two shards change places between two starts: refused, whatever the step, until they are back."""
    ask_to_stop(chaos, this)  # which saves, so that the run knows its data
    _swap_shards(chaos)
    try:
        metrics = chaos.run_dir(this) / "metrics.jsonl"
        before = metrics.read_bytes()
        expect(chaos, this, chaos.start(this).wait(), BAD_INPUT)
        assert "2 of 2 shards differ" in chaos.log(this)
        assert metrics.read_bytes() == before, "metrics changed"
    finally:
        _swap_shards(chaos)


def _swap_shards(chaos: Chaos) -> None:
    left, right = (chaos.bench.folder / "shards" / name for name in SHARDS)
    aside = left.with_suffix(".aside")
    os.rename(left, aside)
    os.rename(right, left)
    os.rename(aside, right)


INJURIES: Mapping[str, Callable[[Chaos, Round], None]] = {
    "kill": kill_everything,
    "kill one rank": kill_one_rank,
    "kill in a save": kill_in_a_save,
    "kill a data worker": kill_a_data_worker,
    "kill the launcher": kill_the_launcher,
    "ask to stop": ask_to_stop,
    "stop one rank": stop_one_rank,
    "suspend": suspend,
    "set the clock forward": set_the_clock_forward,
    "set the clock back": set_the_clock_back,
    "truncate a file": truncate_a_file,
    "flip a byte": flip_a_byte,
    "remove the pointer": remove_the_pointer,
    "delete the folder": delete_the_folder,
    "fill the disk": fill_the_disk,
    "drop a shard": drop_a_shard,
    "swap the data": swap_the_data,
}
NEEDS_TWO_RANKS = frozenset({"kill one rank", "stop one rank"})
QUICK = ("kill", "kill in a save", "ask to stop", "truncate a file", "remove the pointer", "swap the data")


def choose_kinds(folder: Path) -> list[str]:
    """Return the injuries that this user can do: to fill a disk one must be allowed to mount a tmpfs."""
    place = folder / "mount"
    place.mkdir(exist_ok=True)
    can_mount = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode == 0
    if can_mount:
        subprocess.run(["umount", place], check=True)
    return [kind for kind in INJURIES if kind != "fill the disk" or can_mount]


def choose_injuries(kinds: list[str], number: int, source: random.Random) -> list[str]:
    """Return what is done to the round of a number: every kind in turn, and up to two others."""
    return [kinds[number % len(kinds)], *source.choices(kinds, k=source.randint(0, 2))]
