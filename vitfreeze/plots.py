"""Figures of a schedule and of a run, as PNG or SVG. Matplotlib is imported when a figure is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfreeze.architecture import FreezeUnit, count_layers
from vitfreeze.config import Config, ConfigError, load_run_config
from vitfreeze.files import read_json_lines, suggest_path
from vitfreeze.planner import Comparison, Plan, compare_run, is_comparable, name_stages, plan
from vitfreeze.schedule import RunSchedule, build_schedule, units_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, which people with any common colour vision tell apart; each scale has a dash of its own too.
SCALE_STYLES: Mapping[str, tuple[str, str]] = {
    "4": ("#0072B2", "-"),
    "2": ("#D55E00", "--"),
    "1": ("#009E73", "-."),
    "0.5": ("#CC79A7", ":"),
}
INK, SHADE, ACCENT = "#222222", "#EEEEEE", "#D55E00"
LEGEND: Mapping[str, Any] = {"edgecolor": "none", "framealpha": 0.9, "fontsize": "small"}
POINTS_PER_CURVE = 600


def plot_schedule(config: Config, path: Path, *, steps_per_epoch: int | None = None) -> Path:
    """Draw, over one time, every layer's learning rate, the image sizes, and the cost of a step; return `path`.

    As figures 2 and 3 of ViTFreeze, with the warm-up; sizes only where a curriculum changes them. `steps_per_epoch` is
    ImageNet-1K's if not given.

    Raises:
        ConfigError: a suffix other than .png and .svg, or settings that cannot be planned.
    """
    prediction = plan(config, steps_per_epoch=steps_per_epoch)
    schedule = build_schedule(config, steps_per_epoch=prediction.steps_per_epoch)
    resizes = len(config.curriculum.img_size) > 1
    heights, size = ((3, 0.6, 1), (9, 8)) if resizes else ((3, 1), (9, 7))
    figure, axes = _new_figure(rows=len(heights), columns=1, size=size, heights=heights)
    (rates,), *sizes, (cost,) = axes
    _draw_rates(rates, schedule, steps_per_epoch=prediction.steps_per_epoch)
    for (axis,) in sizes:
        _draw_sizes(axis, prediction)
    _draw_cost(cost, prediction)
    rates.set_title(f"{prediction.recipe}: {prediction.model}, freezing {prediction.freezing}", loc="left")
    return _save(figure, path)


def plot_run(run_dir: Path, path: Path) -> Path:
    """Draw what a run folder holds: losses, rates, frozen layers, speed, memory, the plan beside it; return `path`.

    Raises:
        ConfigError: a suffix other than .png and .svg, no such folder, or no metrics in it.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"there is no run folder {str(run_dir)!r}{suggest_path(run_dir)}")
    metrics = read_json_lines(run_dir / "metrics.jsonl")
    if not metrics:
        raise ConfigError(f"{run_dir} holds no metrics.jsonl with a logged step, so there is nothing to draw")
    events = read_json_lines(run_dir / "events.jsonl")
    config = load_run_config(run_dir / "config.yaml")
    comparable = is_comparable(metrics)
    rows = 4 if comparable else 3
    figure, axes = _new_figure(rows=rows, columns=2, size=(12, 3.25 * rows), heights=(1,) * rows)
    steps = [line["step"] for line in metrics]
    _draw_losses(axes[0][0], axes[0][1], metrics)
    _draw_logged_rates(axes[1][0], metrics, units=units_of(config))
    _draw_staircase(axes[1][1], steps, [line["frozen_layers"] for line in metrics], label="frozen layers")
    axes[1][1].set_ylim(0, config.model.resolve().num_layers)
    _draw_series(axes[2][0], steps, [line["images_per_second"] for line in metrics], label="images per second")
    megabytes = [line["optimizer_state_bytes"] / 2**20 for line in metrics]
    _draw_staircase(axes[2][1], steps, megabytes, label="optimizer state per rank (MiB)")
    if comparable:
        _draw_comparison(axes[3][0], axes[3][1], compare_run(config, metrics, events=events))
    for axis in [axis for row in axes[:3] for axis in row]:
        _mark_freezes(axis, metrics)
        axis.set(xlabel="step", xlim=(0, steps[-1]))
    figure.suptitle(f"{run_dir.resolve().name}: {config.model.size}, {steps[-1]:,} steps", x=0.01, ha="left")
    return _save(figure, path)


# Parts of the figures -------------------------------------------------------------------------------------------------


def _draw_rates(axis: Axes, schedule: RunSchedule, *, steps_per_epoch: int) -> None:
    colors = _layer_colors(schedule.num_layers)
    for unit in schedule.units:
        if unit.layer is not None:
            steps = _sample_steps(schedule, unit.layer)
            rates = [schedule.learning_rate(unit, step) for step in steps]
            axis.plot([step / steps_per_epoch for step in steps], rates, color=colors(unit.layer), linewidth=1.4)
    frozen_at = [(step / steps_per_epoch, frozen - 1) for step, frozen in schedule.prefix_changes()]
    for epoch, layer in frozen_at:
        axis.plot(epoch, 0, marker="|", markersize=9, color=colors(layer), clip_on=False)
    if frozen_at:
        axis.plot([], [], marker="|", markersize=9, color=INK, linestyle="none", label="a layer freezes")
    steps = _spread(0, schedule.total_steps)
    shared = [schedule.shared.learning_rate(step) for step in steps]
    has_heads = any(unit.head is not None for unit in schedule.units)
    if not has_heads or schedule.heads_lr == "global" or schedule.layers is None:
        label = "heads" if has_heads else "classifier"
        axis.plot([step / steps_per_epoch for step in steps], shared, color=INK, linestyle="--", label=label)
    else:
        axis.plot([], [], color=INK, linestyle="none", label="heads: as the layer of their tap")
    warmup = schedule.shared.warmup_steps / steps_per_epoch
    axis.axvspan(0, warmup, color=SHADE, zorder=0)
    axis.set(xlim=(0, schedule.total_steps / steps_per_epoch), ylim=(0, None), ylabel="learning rate")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, -3))
    if warmup:
        axis.text(warmup / 2, 0.97, "warm-up", transform=axis.get_xaxis_transform(), ha="center", va="top", color=INK)
    # Below the curves: level rates fill the upper right, falling ones begin at the upper left.
    warm = schedule.shared.warmup_steps / schedule.total_steps
    axis.legend(loc="lower left", bbox_to_anchor=(warm, 0), frameon=False)
    _add_layer_bar(axis, schedule.num_layers - 1)


def _sample_steps(schedule: RunSchedule, layer: int) -> list[int]:
    """Steps from 0 to the one at which the layer is frozen, dense enough to look smooth, with the warm-up's corner."""
    end = schedule.total_steps
    if schedule.layers is not None:
        end = min(end, schedule.layers.freeze_step(layer))
    return sorted({*_spread(0, end), schedule.shared.warmup_steps})


def _spread(start: int, end: int) -> list[int]:
    return sorted({round(start + (end - start) * i / POINTS_PER_CURVE) for i in range(POINTS_PER_CURVE + 1)})


def _stage_borders(prediction: Plan) -> list[float]:
    """The epochs between which the stages of a plan lie."""
    return [*(stage.epoch for stage in prediction.stages), prediction.total_steps / prediction.steps_per_epoch]


def _draw_sizes(axis: Axes, prediction: Plan) -> None:
    """The side of the images, each size with its number where it begins."""
    epochs, sizes = _stage_borders(prediction), [stage.images.img_size for stage in prediction.stages]
    axis.stairs(sizes, epochs, color=INK, linewidth=1.6, baseline=None)
    for epoch, size, before in zip(epochs, sizes, [None, *sizes], strict=False):
        if size != before:
            axis.annotate(f"{size}", (epoch, size), xytext=(3, -3), textcoords="offset points", va="top", color=INK)
    axis.set(xlim=(0, epochs[-1]), ylim=(0, 1.15 * max(sizes)), ylabel="image side\n(pixels)")


def _draw_cost(axis: Axes, prediction: Plan) -> None:
    epochs = _stage_borders(prediction)
    costs = [stage.relative_cost for stage in prediction.stages]
    axis.stairs(costs, epochs, color=ACCENT, linewidth=1.6, baseline=None)
    axis.stairs(costs, epochs, baseline=1, fill=True, color=ACCENT, alpha=0.15)
    axis.set(xlim=(0, epochs[-1]), ylim=(0, 1.08), xlabel="epoch", ylabel="cost of a step\n(plain = 1)")
    saved = f"saves {prediction.saving:.1%} of the computing" if prediction.saving else "nothing freezes by schedule"
    axis.text(0.01, 0.08, saved, transform=axis.transAxes, color=INK)


def _draw_losses(total: Axes, scales: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    _draw_series(total, [line["step"] for line in metrics], [line["loss"] for line in metrics], label="loss (sum)")
    for scale, (color, dashes) in SCALE_STYLES.items():
        lines = [line for line in metrics if scale in line["losses"]]
        if lines:
            steps, losses = [line["step"] for line in lines], [line["losses"][scale] for line in lines]
            scales.plot(steps, losses, color=color, linestyle=dashes, linewidth=1.4, label=f"{scale} x the patch grid")
    scales.set_ylabel("loss of each scale")
    if not scales.lines:
        _draw_accuracy(scales, metrics)
    scales.legend(loc="best" if not metrics[-1]["losses"] else "upper right", **LEGEND)
    scales.grid(axis="y", color=SHADE)


def _draw_accuracy(axis: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draw what fine-tuning measured on its validation images, where pre-training has the losses of its scales."""
    lines = [line for line in metrics if "top1" in line.get("eval", {})]
    for name, color in (("top1", INK), ("ema_top1", ACCENT), ("top5", "#0072B2")):
        values = [100 * line["eval"][name] for line in lines if name in line["eval"]]
        if values:
            axis.plot([line["step"] for line in lines], values, color=color, marker=".", label=name)
    axis.set_ylabel("validation accuracy (%)")


def _draw_logged_rates(axis: Axes, metrics: Sequence[Mapping[str, Any]], *, units: Sequence[FreezeUnit]) -> None:
    colors = _layer_colors(count_layers(units))
    for unit in units:
        if unit.layer is not None:
            lines = [line for line in metrics if line["lr"].get(unit.name, 0.0) > 0]
            rates = [line["lr"][unit.name] for line in lines]
            axis.plot([line["step"] for line in lines], rates, color=colors(unit.layer), linewidth=1.2)
    rest = [unit for unit in units if unit.layer is None and not unit.feeds_layers][-1]
    lines = [line for line in metrics if rest.name in line["lr"]]
    rates = [line["lr"][rest.name] for line in lines]
    label = "classifier" if rest.head is None else "heads"
    axis.plot([line["step"] for line in lines], rates, color=INK, linestyle="--", linewidth=1.2, label=label)
    axis.legend(loc="upper right", **LEGEND)
    axis.set(ylim=(0, None), ylabel="learning rate")
    _add_layer_bar(axis, count_layers(units) - 1)


def _draw_series(axis: Axes, steps: Sequence[int], values: Sequence[float], *, label: str) -> None:
    axis.plot(steps, values, color=INK, linewidth=1.2)
    axis.set_ylabel(label)
    axis.grid(axis="y", color=SHADE)


def _draw_staircase(axis: Axes, steps: Sequence[int], values: Sequence[float], *, label: str) -> None:
    axis.step([0, *steps], [values[0], *values], where="pre", color=INK, linewidth=1.4)
    axis.set(ylim=(0, None), ylabel=label)
    axis.grid(axis="y", color=SHADE)


def _mark_freezes(axis: Axes, metrics: Sequence[Mapping[str, Any]]) -> None:
    for before, after in pairwise(metrics):
        if after["frozen_layers"] > before["frozen_layers"]:
            axis.axvline(before["step"], color=ACCENT, linewidth=0.6, alpha=0.5, zorder=0)


def _draw_comparison(costs: Axes, savings: Axes, comparison: Comparison) -> None:
    """Cost of a step in every stage, planned and measured; and the savings of the whole run."""
    places = [*range(len(comparison.stages))]
    heading, *kinds = name_stages(comparison)
    planned = [stage.predicted_cost for stage in comparison.stages]
    measured = [stage.measured_cost for stage in comparison.stages]
    costs.plot(places, planned, color=INK, marker="o", fillstyle="none", linestyle="--", label="planned")
    ranges = [
        [stage.measured_cost - stage.measured_range[0] for stage in comparison.stages],
        [stage.measured_range[1] - stage.measured_cost for stage in comparison.stages],
    ]
    costs.errorbar(
        places, measured, yerr=ranges, color=ACCENT, marker="s", linewidth=1.4, elinewidth=0.8, capsize=3,
        label="measured (median and quartiles)",
    )  # fmt: skip
    costs.set_xticks(places, ["\n".join(kind) for kind in kinds])
    costs.set(ylim=(0, None), xlabel=", ".join(heading), ylabel="cost of a step (plain = 1)")
    costs.legend(loc="lower left", **LEGEND)
    costs.grid(axis="y", color=SHADE)
    shares = [100 * comparison.predicted_saving, 100 * comparison.measured_saving]
    bars = savings.barh(["planned", "measured"], shares, height=0.5, color=["white", ACCENT], edgecolor=[INK, ACCENT])
    savings.bar_label(bars, labels=[f"{share:.1f} %" for share in shares], padding=4)
    savings.invert_yaxis()
    savings.margins(x=0.2)
    savings.axvline(0, color=INK, linewidth=0.8)
    savings.set_xlabel("saved step time of the whole run (%)")


# Drawing --------------------------------------------------------------------------------------------------------------


def _layer_colors(count: int) -> Colormap:
    """Colours of the layers from first to last: viridis without its palest end, which vanishes on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    viridis = colormaps["viridis"]
    return ListedColormap([viridis(0.92 * layer / (count - 1)) for layer in range(count)])


def _add_layer_bar(axis: Axes, depth: int) -> None:
    """Add the key of the layers' colours: a bar with one step per layer, first layer at the bottom."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    norm = BoundaryNorm([layer - 0.5 for layer in range(depth + 2)], depth + 1)
    every = 1 if depth <= 12 else 4
    bar = axis.figure.colorbar(
        ScalarMappable(norm=norm, cmap=_layer_colors(depth + 1)), ax=axis, ticks=range(0, depth + 1, every), pad=0.02
    )
    bar.set_label("layer (0: patch embedding)")
    bar.ax.tick_params(length=0, which="both")


def _new_figure(
    *, rows: int, columns: int, size: tuple[float, float], heights: Iterable[float]
) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=list(heights))
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes.tolist()


def _save(figure: Figure, path: Path) -> Path:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"the figure's file is {str(path)!r}, but its name must end in {' or '.join(SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
