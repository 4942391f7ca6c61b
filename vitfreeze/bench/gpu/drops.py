"""Cells of the drops: what they cost, the memory that they free, and an overflow of fp16 on the step of one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from vitfreeze.bench.gpu.cells import NO_GPU, Cell, Stepper, Trial, Unmeasured, open_stepper, tell
from vitfreeze.engine import supports
from vitfreeze.planner import plan

MOST_STEPS_TO_FIND_A_SCALE = 30


def measure_drops(trial: Trial) -> Iterator[Cell]:
    """Yield a cell for every layer that leaves, with the plan's memory beside; and one for what is held over them."""
    config = trial.configure()
    planned = {stage.frozen_layers: stage.memory_bytes for stage in plan(config).stages}
    held: list[int] = []
    with open_stepper(config, images=trial.images) as stepper:
        for k in range(config.model.resolve().depth + 1):
            event = stepper.engine.freeze(k, step=k)
            next_step, peak = stepper.time_run(), stepper.peak_bytes()
            on_gpu = isinstance(peak, int)
            held += [torch.cuda.memory_allocated(stepper.engine.device)] if on_gpu else []
            expected = planned.get(k)
            yield tell(
                "drop",
                f"{k} frozen",
                drop_ms=1e3 * event.seconds if event else 0.0,
                next_step_ms=1e3 * next_step,
                step_ms=1e3 * stepper.time_steps(trial.rounds),
                peak_bytes=peak,
                planned_bytes=Unmeasured("the schedule never stops here") if expected is None else expected,
                peak_over_plan=peak / expected if isinstance(peak, int) and expected else Unmeasured(NO_GPU),
            )
    falls = all(later <= earlier for earlier, later in pairwise(held))
    yield tell("held memory", f"{k} drops", never_grows=falls if held else Unmeasured(NO_GPU))


def measure_overflow(trial: Trial) -> Iterator[Cell]:
    """Yield a cell that says whether an overflow on the step of a drop moves no weight, and the next step does."""
    name = "fp16, at the drop of layer 0"
    if not supports("fp16"):
        yield tell("overflow", name, skipped=Unmeasured("DeepSpeed takes no fp16 on this device"))
        return
    with open_stepper(trial.configure(ds_config="zero1_fp16"), images=trial.images) as stepper:
        engine = stepper.engine
        for _ in range(MOST_STEPS_TO_FIND_A_SCALE):
            stepper.take()
            if not engine.overflowed:
                break
        engine.freeze(1, step=1)
        before, scale = _copy_weights(stepper), engine.loss_scale
        stepper.take(factor=1e30)
        skipped, scale_after, after = engine.overflowed, engine.loss_scale, _copy_weights(stepper)
        stepper.take()
        yield tell(
            "overflow",
            name,
            skipped=skipped,
            weights_moved=not all(torch.equal(x, y) for x, y in zip(before, after, strict=True)),
            scale_before=scale,
            scale_after=scale_after,
            next_step_trains=not engine.overflowed
            and not all(torch.equal(x, y) for x, y in zip(after, _copy_weights(stepper), strict=True)),
        )


def _copy_weights(stepper: Stepper) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in stepper.engine.module.parameters()]
