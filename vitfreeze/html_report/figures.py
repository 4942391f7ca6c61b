"""Curves of runs, drawn by plotly: all panels of a figure share one axis, which the page can change."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfreeze.config import ConfigError
from vitfreeze.html_report.runs import AXES, RunRecord, stages_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Okabe and Ito's colours, in an order that can be told apart on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("solid", "dash", "dot", "dashdot")
PANEL_HEIGHT = 210
NAMED_CURVES = range(2, 7)  # of a panel: one is named by its title, and a dozen by what the mouse points at
FEW_POINTS = 30  # of a curve: its points are marked


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One curve of one panel, in its place among the panels.

    Attributes:
        panel: its title, with the unit.
        name: what it is, besides its run.
        places: where its points stand, by axis.
        style: dash and shape of the line, and what else plotly's line takes.
    """

    panel: str
    name: str
    places: Mapping[str, Sequence[float]]
    values: Sequence[float | None]
    style: Mapping[str, Any]
    dashed: int = 0


def curves_of(run: RunRecord, *, alone: bool) -> Iterator[Curve]:
    """Yield the curves of a run, panel by panel; rates of every layer only if it is alone on the page."""
    metrics = run.metrics
    places = run.places(metrics)

    def curve(panel: str, name: str, values: Sequence[float | None], *, dashed: int = 0, step: bool = False) -> Curve:
        return Curve(panel=panel, name=name, places=places, values=values, style={"shape": "vh" if step else "linear"},
                     dashed=dashed)  # fmt: skip

    scales = list(dict.fromkeys(scale for line in metrics for scale in line["losses"]))
    if not scales:
        yield curve("loss", "loss", [line["loss"] for line in metrics])
    for number, scale in enumerate(scales):
        values = [line["losses"].get(scale) for line in metrics]
        yield curve("loss of each scale", f"{scale} x the patch grid", values, dashed=number)
    units = list(dict.fromkeys(unit for line in metrics for unit in line["lr"]))
    for unit in units if alone else units[-1:]:
        yield curve("learning rate", unit, [line["lr"].get(unit) for line in metrics])
    yield curve("frozen layers", "frozen layers", [line["frozen_layers"] for line in metrics], step=True)
    sizes = stages_of(run)
    if len(sizes) > 1:
        image_sizes = [next(size for first, size in reversed(sizes) if first < line["step"]) for line in metrics]
        yield curve("image size (pixels)", "image size", image_sizes, step=True)
    yield curve("images per second", "measured", [line["images_per_second"] for line in metrics])
    yield from _step_times(run, curve)
    state = [line["optimizer_state_bytes"] / 2**20 for line in metrics]
    yield curve("optimizer state per rank (MiB)", "measured", state, step=True)
    waits = [100 * line["data_wait_fraction"] for line in metrics]
    yield curve("waiting for data (% of the time)", "data wait", waits)
    yield from _probes(run)


def _step_times(run: RunRecord, curve: Any) -> Iterator[Curve]:
    """Yield the time of a step as measured and, scaled by its first stage, as planned."""
    panel = "time of a step (ms)"
    yield curve(panel, "measured", [1000 * line["step_seconds"] for line in run.metrics])
    if run.comparison is None:
        return
    first = run.comparison.stages[0]
    batch = run.prediction.global_batch
    unit = 1000 * batch / (first.images_per_second * first.measured_cost)
    planned = [
        next((unit * stage.relative_cost for stage in run.prediction.stages if line["step"] <= stage.end_step), None)
        for line in run.metrics
    ]
    yield curve(panel, "planned", planned, dashed=2, step=True)


def _probes(run: RunRecord) -> Iterator[Curve]:
    lines = [line for line in run.metrics if line.get("eval")]
    names = dict.fromkeys(name for line in lines for name, value in line["eval"].items() if _is_share(name, value))
    for number, name in enumerate(names):
        known = [line for line in lines if name in line["eval"]]
        values = [100 * line["eval"][name] for line in known]
        yield Curve(panel="probes on the way (% correct)", name=name, places=run.places(known), values=values,
                    style={"shape": "linear"}, dashed=number)  # fmt: skip


def _is_share(name: str, value: Any) -> bool:
    return isinstance(value, float) and 0 <= value <= 1 and not name.endswith(("seconds", "share", "loss"))


def draw_runs(runs: Sequence[RunRecord]) -> tuple[Figure, list[dict[str, list[float]]]]:
    """Draw runs over each other; return the figure and, curve by curve, where the points stand on each axis."""
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    drawn = [(run, number, curve) for number, run in enumerate(runs) for curve in curves_of(run, alone=len(runs) == 1)]
    panels = list(dict.fromkeys(curve.panel for _, _, curve in drawn))
    figure = make_subplots(
        rows=len(panels), cols=1, shared_xaxes=True, subplot_titles=panels, vertical_spacing=0.28 / len(panels)
    )
    sizes = Counter(curve.panel for _, _, curve in drawn)
    named: set[str] = set()
    for run, number, curve in drawn:
        label = curve.name if len(runs) == 1 else run.name
        is_named = label not in named and (len(runs) > 1 or sizes[curve.panel] in NAMED_CURVES)
        line = {"color": _colour(curve, number, drawn), "dash": DASHES[curve.dashed % len(DASHES)], "width": 1.6}
        figure.add_trace(
            Scatter(
                x=list(curve.places["step"]), y=list(curve.values), name=label, legendgroup=label,
                line={**line, **curve.style}, mode="lines+markers" if len(curve.values) < FEW_POINTS else "lines",
                marker={"size": 4}, showlegend=is_named, legend=_legend(panels.index(curve.panel), runs),
                hovertemplate=f"{run.name}, {curve.name}: %{{y:.4g}}<extra></extra>",
            ),
            row=panels.index(curve.panel) + 1, col=1,
        )  # fmt: skip
        named.add(label if len(runs) > 1 else "")
    figure.update_xaxes(title_text=AXES["step"], row=len(panels), col=1)
    figure.update_yaxes(rangemode="tozero")
    if len(runs) == 1:
        for row in range(len(panels)):
            top = figure.get_subplot(row + 1, 1).yaxis.domain[1]
            legend = {"y": top, "yanchor": "top", "font": {"size": 10}, "tracegroupgap": 0}
            figure.update_layout({_legend(row, runs): legend})
    figure.update_layout(height=PANEL_HEIGHT * len(panels) + 80, hovermode="x unified")
    return figure, [{axis: list(curve.places[axis]) for axis in AXES} for _, _, curve in drawn]


def _legend(row: int, runs: Sequence[RunRecord]) -> str:
    """Return which legend names a curve: one for all where runs are compared, else one beside each panel."""
    return "legend" if len(runs) > 1 or row == 0 else f"legend{row + 1}"


def _colour(curve: Curve, number: int, drawn: Sequence[tuple[RunRecord, int, Curve]]) -> str:
    """Return the colour of a curve: that of its run, or, where there is one run only, one of its own in its panel."""
    if any(other for _, other, _ in drawn):
        return COLOURS[number % len(COLOURS)]
    names = [other.name for _, _, other in drawn if other.panel == curve.panel]
    return COLOURS[names.index(curve.name) % len(COLOURS)]


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """Return the study's cells in a folder, none if it is something else; raises ConfigError for a broken file."""
    cells = []
    for path in sorted(folder.glob("*.json")):
        try:
            cell = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
        if isinstance(cell, dict) and "accuracy" in cell and "cost" in cell:
            cells.append(cell)
    return cells


def group_cells(cells: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Part cells that must not be compared, by what they share, in words; those judged on the test set first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["judged_on"] != "test"):
        judge = "the test set" if cell["judged_on"] == "test" else "held-out images"
        shared = f"{cell['data']}, size {cell['size']}: fine-tuned on {cell['labels']:,} labels, judged on {judge}"
        groups.setdefault(shared, []).append(cell)
    return groups


def draw_frontier(cells: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw fine-tuned accuracy against counted cost: a point a cell, the plain runs of each cost joined.

    Args:
        cells: of one group. Of plain runs with several learning rates the line takes the one with the best mean.
    """
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    arms = list(dict.fromkeys(str(cell["arm"]).partition("-")[0] for cell in cells))
    for number, arm in enumerate(sorted(arms, key=lambda arm: arm != "plain")):
        mine = [cell for cell in cells if str(cell["arm"]).partition("-")[0] == arm]
        hover = [f"{cell['words']}, seed {cell['seed']}, blr {cell['blr']:g}" for cell in mine]
        points = [_place(cell) for cell in mine]
        style = {"color": COLOURS[number % len(COLOURS)], "size": 9, "symbol": number}
        figure.add_trace(
            Scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="markers", name=arm, text=hover,
                    marker=style, hovertemplate="%{text}: %{y:.1f} %<extra></extra>")
        )  # fmt: skip
        if arm == "plain":
            best, line = _best_means(mine), {"color": style["color"], "width": 1.2}
            figure.add_trace(
                Scatter(x=[*best], y=[*best.values()], mode="lines", line=line, showlegend=False, hoverinfo="skip")
            )
    figure.update_layout(height=420)
    figure.update_xaxes(title_text="counted cost of pre-training (plain run = 1)", rangemode="tozero")
    figure.update_yaxes(title_text="fine-tuned top-1 (%)")
    return figure


def _place(cell: Mapping[str, Any]) -> tuple[float, float]:
    return round(cell["cost"]["pretraining"], 3), 100 * cell["accuracy"]["finetuned"]


def _best_means(cells: Sequence[Mapping[str, Any]]) -> dict[float, float]:
    """Return by rising cost the mean accuracy over seeds, at the learning rate where it is highest."""
    reached: dict[tuple[float, float], list[float]] = {}
    for cell in cells:
        cost, accuracy = _place(cell)
        reached.setdefault((cost, cell["blr"]), []).append(accuracy)
    best: dict[float, float] = {}
    for (cost, _), accuracies in sorted(reached.items()):
        best[cost] = max(best.get(cost, 0.0), sum(accuracies) / len(accuracies))
    return best
