"""The plan as text: one table of stages, the whole run below it, two plans side by side. No torch."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from vitfreeze.planner.comparison import Comparison
from vitfreeze.planner.input import STORED_SIZE
from vitfreeze.planner.prediction import Plan, Stage
from vitfreeze.planner.targets import Targets
from vitfreeze.text import format_bytes, format_table


def format_plan(plan: Plan) -> str:
    """Return the plan as text: settings, a line per stage, and the whole run."""
    return "\n\n".join([_format_settings(plan), _format_stages(plan), _format_whole(plan)])


def _format_settings(plan: Plan) -> str:
    machine = plan.machine
    ranks = f"{machine.world_size} GPU" + ("s" if machine.world_size > 1 else "")
    images = _describe_images(plan)
    return "\n".join(
        [
            f"{plan.recipe}: {plan.model}, freezing: {plan.freezing}" + (f"; images: {images}" if images else ""),
            f"{plan.total_steps:,} steps ({plan.warmup_steps:,} of warm-up) of {plan.global_batch} images, "
            f"{plan.steps_per_epoch:,} an epoch of {plan.images_per_epoch:,}; {ranks}, "
            f"micro-batch {plan.micro_batch} x {plan.accumulation}",
            f"ZeRO stage {machine.zero_stage}, {machine.precision} ({machine.source}): optimizer state "
            f"{machine.state_bytes_per_parameter} bytes a parameter, {_explain_state(plan)}",
        ]
    )


def _explain_state(plan: Plan) -> str:
    if plan.machine.state_bytes_per_parameter == 8:
        return "two fp32 moments; the fp32 weights are their own master"
    where = f"divided over {plan.machine.world_size} ranks" if plan.machine.zero_stage else "whole on every rank"
    return "an fp32 master weight and two fp32 moments" + (f", {where}" if plan.machine.world_size > 1 else "")


# How images are treated: attribute of a stage, heading of its column, and the words for one that never changes.
_TREATMENTS = (
    ("img_size", "pixels", "{:g} pixels"),
    ("mask_ratio", "masked", "{:.4g} of the patches masked"),
    ("decoded_share", "decoded", "{:.4g} of those decoded"),
)


def _changes(plan: Plan, name: str) -> bool:
    return len({getattr(stage.images, name) for stage in plan.stages}) > 1


def _describe_images(plan: Plan) -> str:
    known = [(name, words) for name, _, words in _TREATMENTS if plan.stages[0].heads_left or name == "img_size"]
    return ", ".join(
        words.format(getattr(plan.stages[0].images, name)) for name, words in known if not _changes(plan, name)
    )


def _format_stages(plan: Plan) -> str:
    """Return a line per stage; what never changes of the images stands above the table."""
    changing = [(name, heading) for name, heading, _ in _TREATMENTS if _changes(plan, name)]
    heading = [
        "step", "epoch", "of run", *(heading for _, heading in changing), "freezes", "heads left", "trainable",
        "optimizer", "gradients", "micro-batch", "activations", "memory", "step ms", "step cost", "images/s", "cores",
    ]  # fmt: skip
    rows = [heading + (["comm. ms"] if plan.bandwidth_gigabytes else [])]
    for stage in plan.stages:
        row = [
            f"{stage.first_step:,}", f"{stage.epoch:.2f}", f"{stage.share_of_run:.1%}",
            *(f"{getattr(stage.images, name):g}" for name, _ in changing), _name_layers(stage),
            " ".join(str(head) for head in stage.heads_left), f"{stage.trainable_parameters / 1e6:.2f} M",
            format_bytes(stage.optimizer_state_bytes), format_bytes(stage.gradient_bytes_per_step),
            str(stage.micro_batch), format_bytes(stage.activation_bytes), format_bytes(stage.memory_bytes),
            f"{stage.step_ms:,.0f}" if stage.step_ms >= 100 else f"{stage.step_ms:.3g}", f"{stage.relative_cost:.3f}",
            f"{stage.images_per_second:,.0f}", "-" if stage.input_cores is None else f"{stage.input_cores:.1f}",
        ]  # fmt: skip
        if stage.communication_ms is not None:
            row.append(f"{stage.communication_ms:.1f}")
        rows.append(row)
    return format_table(rows)


def _name_layers(stage: Stage) -> str:
    layers = stage.layers_frozen_now
    if not layers:
        return "-"
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"


def _format_whole(plan: Plan) -> str:
    before = plan.gpu_hours + plan.gpu_hours_saved
    lines = [
        f"Saving: {plan.saving:.1%} of the step time, {plan.gpu_hours_saved:.1f} of {before:.1f} GPU-hours "
        f"({plan.timing})"
    ]
    if not math.isclose(plan.saving, plan.flops_saving, abs_tol=1e-9):
        lines.append(f"        {plan.flops_saving:.1%} of the counted operations")
    if plan.saving:
        lines.append(f"        The same GPU-hours buy {plan.plain_epochs:.1f} epochs without freezing and curriculum")
    last = plan.stages[-1]
    lines.append(
        f"Peak memory: {format_bytes(plan.peak_memory_bytes)} a rank, {format_bytes(last.memory_bytes)} in the last "
        "stage (weights, gradients, optimizer, activations; without temporary buffers)"
    )
    cores = [stage.input_cores for stage in plan.stages if stage.input_cores is not None]
    if cores:
        fewest = f"{min(cores):.1f} to " if len(cores) > 1 else ""
        lines.append(
            f"Input: {fewest}{max(cores):.1f} CPU cores a GPU (an EPYC's, from JPEGs of {STORED_SIZE} pixels unless "
            "their manifest says otherwise; `vitfreeze bench data` measures yours)"
        )
    lines.append(_format_communication(plan))
    if plan.authors:
        lines.append(f"Authors' top-1 (ViT-B, 100 epochs, fine-tuned): {plan.authors}")
    return "\n".join(lines + [f"Note: {note}" for note in plan.notes])


def _format_communication(plan: Plan) -> str:
    if plan.communication_saving is None:
        return "Communication: none with one rank"
    sent = sum(stage.steps * stage.communication_bytes_per_step for stage in plan.stages)
    line = f"Communication: {format_bytes(sent)} sent by each rank, {plan.communication_saving:.1%} less than unfrozen"
    if plan.bandwidth_gigabytes is None:
        return line
    lowest, highest = scaling_efficiency(plan)
    return (
        f"{line}\nScaling efficiency at {plan.bandwidth_gigabytes:g} GB/s (ring all-reduce): {lowest:.1%} if nothing "
        f"overlaps with computing, {highest:.1%} if everything does"
    )


def scaling_efficiency(plan: Plan) -> tuple[float, float]:
    """Return the share of the run spent computing if communication overlaps with nothing, and with everything.

    Raises:
        ValueError: the plan was made without a bandwidth.
    """
    if plan.bandwidth_gigabytes is None:
        raise ValueError("scaling efficiency needs a plan with a bandwidth")
    compute = sum(stage.steps * stage.step_ms for stage in plan.stages)
    apart = sum(stage.steps * (stage.step_ms + (stage.communication_ms or 0)) for stage in plan.stages)
    hidden = sum(stage.steps * max(stage.step_ms, stage.communication_ms or 0) for stage in plan.stages)
    return compute / apart, compute / hidden


def format_plans_side_by_side(plan: Plan, other: Plan) -> str:
    """Return the main figures of two plans in two columns and the difference."""

    def last(of: Plan) -> Stage:
        return of.stages[-1]

    rows = [["", plan.recipe, other.recipe]]
    for name, figure in (
        ("model", lambda p: p.model),
        ("freezing", lambda p: p.mode if p.mode != "schedule" else f"t_0 {p.t_0:g} {p.how}"),
        ("rates", lambda p: p.rates),
        ("steps", lambda p: f"{p.total_steps:,}"),
        ("first freeze at step", lambda p: f"{p.stages[1].first_step:,}" if len(p.stages) > 1 else "never"),
        ("step cost in the last stage", lambda p: f"{last(p).relative_cost:.3f}"),
        ("saving", lambda p: f"{p.saving:.1%}"),
        ("GPU-hours", lambda p: f"{p.gpu_hours:.1f}"),
        ("GPU-hours saved", lambda p: f"{p.gpu_hours_saved:.1f}"),
        ("peak memory a rank", lambda p: format_bytes(p.peak_memory_bytes)),
        ("memory in the last stage", lambda p: format_bytes(last(p).memory_bytes)),
        ("optimizer state at the start", lambda p: format_bytes(p.stages[0].optimizer_state_bytes)),
        ("optimizer state at the end", lambda p: format_bytes(last(p).optimizer_state_bytes)),
        ("communication saved", lambda p: "-" if p.communication_saving is None else f"{p.communication_saving:.1%}"),
        ("authors' top-1", lambda p: p.authors or "-"),
    ):
        rows.append([name, figure(plan), figure(other)])
    return format_table(rows)


def format_targets(targets: Targets) -> str:
    """Return every way to the target with the overrides that make it, and the one that is chosen."""
    rows = [["way", "GPU-hours", "saving", "authors' top-1 near it", "overrides"]]
    for way in targets.ways:
        reached = "unreachable, this is the most" if way.overrides is None else _quote(way.overrides)
        rows.append([way.way, f"{way.gpu_hours:.3g}", f"{way.saving:.2%}", way.authors or "-", reached])
    return (
        f"{targets.recipe} for {targets.budget_gpu_hours:.3g} GPU-hours; its length takes "
        f"{targets.plain_gpu_hours:.3g} without freezing and curriculum ({targets.timing})\n\n{format_table(rows)}\n\n"
        f"Chosen is `{targets.chosen.way}`: small images first, then freezing, then fewer epochs, each as far as the "
        f"target needs it. Add to the command:\n    {_quote(targets.chosen.overrides or ())}"
    )


def _quote(overrides: Sequence[str]) -> str:
    return " ".join(shlex.quote(override) for override in overrides) or "none: the recipe fits"


def format_comparison(comparison: Comparison) -> str:
    """Return the plan and the measured run, stage by stage, and both savings."""
    heading, *kinds = name_stages(comparison)
    rows = [[*heading, "steps", "images/s", "planned cost", "measured", "waits for data", "optimizer", "planned"]]
    for stage, kind in zip(comparison.stages, kinds, strict=True):
        cells = [*kind, f"{stage.steps:,}", f"{stage.images_per_second:.1f}"]
        cells += [f"{stage.predicted_cost:.3f}", f"{stage.measured_cost:.3f}", f"{stage.data_wait_fraction:.0%}"]
        cells += [format_bytes(stage.measured_state_bytes), format_bytes(stage.predicted_state_bytes)]
        rows.append(cells)
    what = "Freezing and the curriculum" if comparison.has_curriculum else "Freezing"
    text = (
        f"{format_table(rows)}\n{what} saved {comparison.measured_saving:.1%} of the step time; the plan said "
        f"{comparison.predicted_saving:.1%}; dropping layers took {comparison.freezing_seconds:.1f} s in all"
    )
    reference = comparison.reference
    if reference.predicted_cost == 1:
        return text
    return (
        f"{text}. The run took no step without freezing and curriculum: what one costs is the plan's ratio to the "
        f"steps at {reference.images.img_size} pixels with nothing frozen"
    )


def name_stages(comparison: Comparison) -> list[list[str]]:
    """Return a heading and a row for each stage: its frozen layers, and what is not the same in all of its images."""
    images = [stage.images for stage in comparison.stages]
    columns = [
        ["pixels", *(str(stage.img_size) for stage in images)],
        ["masked", *(f"{stage.mask_ratio:g}" for stage in images)],
        ["decoded", *(f"{stage.decoded_share:g}" for stage in images)],
    ]
    frozen = ["frozen layers", *(str(stage.frozen_layers) for stage in comparison.stages)]
    differing = [column for column in columns if len(set(column[1:])) > 1]
    return [list(row) for row in zip(frozen, *differing, strict=True)]
