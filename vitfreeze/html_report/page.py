"""The page: HTML around the figures. It holds everything that it shows and asks the network for nothing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitfreeze import __version__
from vitfreeze.config import ConfigError
from vitfreeze.files import replacing, suggest_path
from vitfreeze.html_report.figures import draw_frontier, draw_runs, group_cells, read_cells
from vitfreeze.html_report.runs import AXES, RunRecord, differing_settings, freezes_of, read_run
from vitfreeze.planner import name_stages
from vitfreeze.text import format_bytes

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PICTURES_SHOWN = 3  # first, middle, last
STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ddd; --soft: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #16181c; --line: #3a3d44; --soft: #999; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1100px; padding: 0 1rem; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td { overflow-wrap: anywhere; } .note, figcaption { color: var(--soft); }
img { max-width: 100%; image-rendering: pixelated; } figure { margin: 0 0 1rem; } summary { cursor: pointer; }
"""
SCRIPT = """
function paint() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const change = {"font.color": ink};
    for (const key of Object.keys(plot.layout)) {
      if (/^[xy]axis[0-9]*$/.test(key)) {
        for (const part of ["gridcolor", "linecolor", "zerolinecolor"]) change[key + "." + part] = line;
      }
    }
    Plotly.relayout(plot, change);
  }
}
function choose(axis) {
  const plot = document.getElementById("runs"), last = Object.keys(plot.layout).filter(k => /^xaxis/.test(k)).pop();
  Plotly.restyle(plot, {x: PLACES.map(places => places[axis])});
  Plotly.relayout(plot, {[last + ".title.text"]: AXES[axis], "xaxis.autorange": true});
}
window.addEventListener("load", paint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
"""


def write_report(sources: Sequence[Path], path: Path) -> Path:
    """Write one page about run folders, and folders of the study's cells; return `path`.

    Raises:
        ConfigError: plotly is not installed, a source is neither, or the file's name does not end in .html.
    """
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"the report's file is {str(path)!r}, but its name must end in .html")
    if find_spec("plotly") is None:
        raise ConfigError("a report is drawn by plotly, which is not installed here: pip install 'vitfreeze[report]'")
    runs, studies = [], []
    for source in sources:
        if not source.is_dir():
            takes = "a report takes run folders, and folders of the study's cells"
            raise ConfigError(f"{source} is no folder; {takes}{suggest_path(source)}")
        cells = read_cells(source)
        if cells:
            studies.append((source, cells))
        else:
            runs.append(read_run(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text("\n".join(_make_page(_tell_apart(runs), studies)))
    return path


def _tell_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs with a number behind names that several share."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.name} ({names[:place].count(run.name) + 1})") if names.count(run.name) > 1 else run
        for place, run in enumerate(runs)
    ]


def _make_page(runs: Sequence[RunRecord], studies: Sequence[tuple[Path, list[dict[str, Any]]]]) -> Iterator[str]:
    from plotly.offline import get_plotlyjs

    title = ", ".join([*(run.name for run in runs), *(folder.name for folder, _ in studies)])
    yield f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    yield '<link rel="icon" href="data:,">'  # or the browser asks for one
    yield f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body><h1>{escape(title)}</h1>"
    if runs:
        yield from _tell_runs(runs)
    for folder, cells in studies:
        yield f"<h2>What freezing buys: {escape(folder.name)}</h2>"
        for number, (shared, group) in enumerate(group_cells(cells).items()):
            yield f"<p>{escape(shared)}.</p>"
            yield _embed(draw_frontier(group), f"study-{escape(folder.name)}-{number}")
        yield '<p class="note">A point is one run. Runs of other data, labels or judges are not to be compared.</p>'
    yield f'<p class="note">vitfreeze {__version__}</p><script>{SCRIPT}</script></body></html>'


def _tell_runs(runs: Sequence[RunRecord]) -> Iterator[str]:
    yield _table(["run", "model", "freezing", "steps", "loss", "saved: planned", "measured"], map(_summarize, runs))
    figure, places = draw_runs(runs)
    buttons = "".join(
        f'<label><input type="radio" name="axis" onchange="choose(\'{axis}\')"{" checked" * (axis == "step")}> '
        f"{escape(words)}</label> "
        for axis, words in AXES.items()
    )
    yield f"<h2>Curves</h2><p>Over {buttons}</p>"
    yield _embed(figure, "runs")
    yield f"<script>const PLACES = {json.dumps(places)}, AXES = {json.dumps(dict(AXES))};</script>"
    for run in runs:
        yield from _tell_run(run)
    words = "Settings" if len(runs) == 1 else "Settings that differ"
    rows = [[key, *values] for key, values in differing_settings(runs).items()]
    yield f"<details><summary>{words}</summary>{_table(['setting', *(run.name for run in runs)], rows)}</details>"


def _summarize(run: RunRecord) -> list[str]:
    last, comparison, prediction = run.metrics[-1], run.comparison, run.prediction
    measured = f"{comparison.measured_saving:.1%}" if comparison else "nothing logged before the first freeze"
    planned = f"{comparison.predicted_saving:.1%}" if comparison else f"{prediction.saving:.1%}"
    steps = f"{last['step']:,} of {prediction.total_steps:,}"
    loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
    return [run.name, prediction.model, prediction.freezing, steps, loss, planned, measured]


def _tell_run(run: RunRecord) -> Iterator[str]:
    yield f"<h2>{escape(run.name)}</h2>"
    if run.comparison:
        yield "<h3>Stages: plan and measurement</h3>"
        heading, *kinds = name_stages(run.comparison)
        head = [*heading, "steps", "images/s", "cost planned", "measured", "optimizer state planned", "measured"]
        rows = [
            [*kind, f"{s.steps:,}", f"{s.images_per_second:,.0f}", f"{s.predicted_cost:.2f}",
             f"{s.measured_cost:.2f}", format_bytes(s.predicted_state_bytes), format_bytes(s.measured_state_bytes)]
            for s, kind in zip(run.comparison.stages, kinds, strict=True)
        ]  # fmt: skip
        yield _table(head, rows)
    freezes = freezes_of(run)
    if freezes:
        yield "<h3>Freezes</h3>"
        rows = [[str(event["step"]), ", ".join(event["units"]), f"{event['seconds']:.1f} s"] for event in freezes]
        yield _table(["step", "left training", "took"], rows)
    skipped: dict[str, int] = {}
    for event in run.events:
        for shard, count in event.get("skipped_per_shard", {}).items():
            skipped[shard] = skipped.get(shard, 0) + count
    total = sum(skipped.values())
    yield f"<p>Skipped samples: {total:,}{' in ' if total else ''}{escape(', '.join(sorted(skipped)))}.</p>"
    if run.versions:
        yield f"<p>Versions: {escape(', '.join(f'{name} {version}' for name, version in run.versions.items()))}.</p>"
    yield from _show_pictures(run)


def _show_pictures(run: RunRecord) -> Iterator[str]:
    count = len(run.pictures)
    chosen = (
        sorted({round(place * (count - 1) / (PICTURES_SHOWN - 1)) for place in range(PICTURES_SHOWN)}) if count else []
    )
    if chosen:
        yield "<h3>Reconstructions</h3>"
    for place in chosen:
        step, png = run.pictures[place]
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        image = f'<img alt="reconstructions at step {step}" src="{source}">'
        yield f"<figure>{image}<figcaption>step {step}</figcaption></figure>"


def _embed(figure: Figure, name: str) -> str:
    figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", margin={"l": 70, "r": 20, "t": 40, "b": 50}
    )
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config={"responsive": True}))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rest = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{rest}</table>"
