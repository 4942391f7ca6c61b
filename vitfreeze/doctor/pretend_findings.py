"""From what one rank of many was to findings, and all of it as text. Nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence

from vitfreeze.doctor.findings import Finding, format_findings, ok, red
from vitfreeze.doctor.pretend import Pretence, StageFacts
from vitfreeze.text import format_bytes, format_table

REPORT_IT = "this is no fault of the recipe: report it with the command"


def judge_pretence(pretence: Pretence) -> dict[str, Finding]:
    """Hold what the rank was against the plan."""
    plan, stages = pretence.plan, pretence.stages
    return {
        "batch": ok(
            f"{plan.global_batch} images: micro-batch {plan.micro_batch} x {plan.accumulation} on each of "
            f"{pretence.world_size:,} ranks"
        ),
        "partitions": _judge_partitions(pretence),
        "freezes": _judge_freezes(pretence),
        "gradients": _judge_gradients(stages),
        "memory": _judge_memory(pretence),
        "samples": _judge_samples(stages),
        "host": _judge_host(pretence),
        "input": _tell_input(pretence),
    }


def _judge_partitions(pretence: Pretence) -> Finding:
    first = pretence.stages[0]
    share = first.trainable / pretence.world_size if pretence.plan.machine.zero_stage else first.trainable
    found = (
        f"this rank holds {first.held:,} of {first.trainable:,} parameters ({share:,.0f} would be its even share), "
        f"{format_bytes(first.state_bytes)} of optimizer state and {format_bytes(first.padding_bytes)} of padding"
    )
    for stage in pretence.stages:
        if stage.held > stage.planned_held:
            found += (
                f"; from step {stage.first_step:,} on {stage.held:,}, and at most {stage.planned_held:,} are planned"
            )
            return red(found, cure=REPORT_IT)
    return ok(f"{found}; nowhere more than planned")


def _judge_freezes(pretence: Pretence) -> Finding:
    stages, planned = pretence.stages, pretence.plan.stages
    for stage, expected in zip(stages, planned, strict=True):
        if stage.trainable != expected.trainable_parameters:
            found = (
                f"{stage.trainable:,} parameters train from step {stage.first_step:,} on, and the plan says "
                f"{expected.trainable_parameters:,}"
            )
            return red(found, cure=REPORT_IT)
    slowest = max(stage.drop_seconds for stage in stages)
    return ok(f"{len(stages)} stages, parameters that train as planned in each; dropping layers took {slowest:.1f} s")


def _judge_gradients(stages: Sequence[StageFacts]) -> Finding:
    wrong = [stage for stage in stages if stage.gradient_elements != stage.planned_gradient_elements]
    found = (
        f"{stages[0].gradient_elements:,} elements are summed in a step at first, {stages[-1].gradient_elements:,} last"
    )
    return red(f"{found}; not as planned", cure=REPORT_IT) if wrong else ok(f"{found}, as planned in every stage")


def _judge_memory(pretence: Pretence) -> Finding:
    plan, stages = pretence.plan, pretence.stages
    ratios = [stage.activation_bytes / stage.planned_activation_bytes for stage in stages]
    found = (
        f"autograd keeps {min(ratios):.2f} to {max(ratios):.2f} of what is planned for an image; so the plan's peak of "
        f"{format_bytes(plan.peak_memory_bytes)} in {plan.machine.precision}, for micro-batches of {plan.micro_batch}, "
        "holds"
    )
    if max(ratios) > 1.02:
        return red(found.replace(", holds", ", is too low").replace("so ", ""), cure=REPORT_IT)
    return ok(found)


def _judge_samples(stages: Sequence[StageFacts]) -> Finding:
    if not all(stage.is_ordered for stage in stages):
        return red("not every sample of a step is on one rank", cure=REPORT_IT)
    shown = ", ".join(map(str, stages[0].samples))
    return ok(f"each of a step on one rank, in every stage; this rank begins with {shown}")


def _judge_host(pretence: Pretence) -> Finding:
    plan, host = pretence.plan, pretence.host
    # A GPU waits where the host needs longer to ask for a step's kernels than they take.
    found = "; ".join(
        f"{time.step:.0f} ms a step with {time.frozen_layers} frozen ({time.forward:.0f} forward, {time.backward:.0f} "
        f"backward, {time.optimizer:.0f} optimizer; {time.collectives} collectives)"
        for time in host
    )
    by_frozen = {stage.frozen_layers: stage.step_ms for stage in plan.stages}
    late = [time for time in host if time.step > by_frozen[time.frozen_layers]]
    found += f"; the plan's GPU takes {plan.stages[0].step_ms:.3g} ms at first, {plan.stages[-1].step_ms:.3g} last"
    if late:
        cure = (
            "a GPU would wait for a host like this one: a larger batch.global_size or fewer ranks give it more to do, "
            "model.compile=true asks for fewer kernels"
        )
        return red(found, cure=cure)
    return ok(found)


def _tell_input(pretence: Pretence) -> Finding:
    cores = [stage.input_cores for stage in pretence.plan.stages if stage.input_cores is not None]
    speeds = [stage.images_per_second for stage in pretence.plan.stages]
    if not cores:
        return ok(
            f"{min(speeds):,.0f} to {max(speeds):,.0f} images/s a GPU; `vitfreeze bench data` measures what cores give"
        )
    return ok(
        f"{min(cores):.1f} to {max(cores):.1f} cores a GPU for {min(speeds):,.0f} to {max(speeds):,.0f} images/s "
        "(an EPYC's, from JPEGs of 288 pixels; `vitfreeze bench data` measures yours)"
    )


def format_pretence(pretence: Pretence, *, colour: bool) -> str:
    """Return what was made otherwise, a line per stage, and the findings."""
    head = [
        f"{pretence.recipe}: rank {pretence.rank} of {pretence.world_size:,} through torch's fake process group; no "
        "other rank is there, and losses mean nothing",
        "Otherwise than in the run:",
        *(f"  - {change}" for change in pretence.changes),
    ]
    heading = ["step", "frozen", "micro-batch", "trainable", "held here", "padding", "optimizer", "planned"]
    rows = [[*heading, "kept an image", "planned", "drop s", "step s", "first samples"]]
    for stage in pretence.stages:
        rows.append(
            [
                f"{stage.first_step:,}", str(stage.frozen_layers), f"{stage.micro_batch} x {stage.accumulation}",
                f"{stage.trainable:,}", f"{stage.held:,}", format_bytes(stage.padding_bytes),
                format_bytes(stage.state_bytes), format_bytes(stage.planned_state_bytes),
                format_bytes(stage.activation_bytes), format_bytes(stage.planned_activation_bytes),
                f"{stage.drop_seconds:.1f}", f"{stage.step_seconds:.2f}", " ".join(map(str, stage.samples)),
            ]
        )  # fmt: skip
    return "\n\n".join(["\n".join(head), format_table(rows), format_findings(judge_pretence(pretence), colour=colour)])
