"""The end of a run: export, k-NN, the plot of the run, and a table of what freezing saved."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitfreeze.config import Config
from vitfreeze.data import open_split
from vitfreeze.evaluate.features import extract_features
from vitfreeze.evaluate.knn import knn_accuracy
from vitfreeze.evaluate.ridge import ridge_over_ranks
from vitfreeze.export import export_run
from vitfreeze.files import read_json_lines
from vitfreeze.model import LocalMIM
from vitfreeze.planner import compare_run, format_comparison, is_comparable
from vitfreeze.plots import plot_run
from vitfreeze.ranks import Ranks
from vitfreeze.text import format_bytes, format_table

logger = logging.getLogger("vitfreeze")


def summarize_run(config: Config, directory: Path, *, model: LocalMIM, fresh_model: LocalMIM) -> None:
    """Export the encoder, compare it with a random one by k-NN if there is validation data, plot, and print it all.

    Args:
        fresh_model: the same model with its initial weights, to compare with.
    """
    encoder = export_run(directory, to="safetensors", out=directory / "encoder.safetensors")
    lines = [f"encoder   {encoder} (timm.create_model loads it with strict=True)"]
    if config.data.val:
        lines += compare_by_knn(config, model=model, fresh_model=fresh_model)
    plot = plot_run(directory, directory / "run.png")
    lines += [
        f"plot      {plot}",
        f"metrics   {directory / 'metrics.jsonl'}",
        f"board     tensorboard --logdir {directory / 'tensorboard'}",
        f"weights   {directory / 'checkpoints'}",
    ]
    log_summary(config, directory, lines)


def log_summary(config: Config, directory: Path, lines: Sequence[str]) -> None:
    """Log what freezing changed in a run, the plan beside it, and lines that say where everything is."""
    metrics = read_json_lines(directory / "metrics.jsonl")
    parts = [summary_table(metrics), hold_against_plan(config, directory, metrics), "\n".join(lines)]
    logger.info("\n%s", "\n\n".join(part for part in parts if part))


def hold_against_plan(config: Config, directory: Path, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return the saving that the plan predicted beside the measured one; nothing for a plain run."""
    if not is_comparable(metrics):
        return ""
    comparison = compare_run(config, metrics, events=read_json_lines(directory / "events.jsonl"))
    return format_comparison(comparison) if len(comparison.stages) > 1 or comparison.has_curriculum else ""


def compare_by_knn(config: Config, *, model: LocalMIM, fresh_model: LocalMIM) -> list[str]:
    """Return lines with the accuracy, by k-NN and a linear probe, of the encoder and of itself before training."""
    k, device = config.eval.k, next(model.parameters()).device
    lines = []
    for name, candidate in (("pre-trained", model), ("random", fresh_model.to(device))):
        train, test = (
            extract_features(
                candidate, open_split(config, split), limit=config.eval.samples, colours=config.data.colours
            )
            for split in ("train", "validation")
        )
        whose = f"% top-1, {name} encoder ({len(test.labels)} held-out images)"
        lines.append(f"{k}-NN     {100 * knn_accuracy(*train, *test, k=(k,))[k]:.1f} {whose}")
        lines.append(f"linear    {100 * ridge_over_ranks(train, test, ranks=Ranks.alone(device)):.1f} {whose}")
    return lines


def summary_table(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return speed and optimizer state before the first freeze and after the last one, medians over logged lines.

    Where the size of the images changed before the first freeze, its last size counts.
    """
    fewest = min(line["frozen_layers"] for line in metrics)
    most = max(line["frozen_layers"] for line in metrics)
    # The first line of a process holds its warm-up.
    unfrozen = [line for line in metrics if line["frozen_layers"] == fewest][1:] or metrics[:1]
    before = [line for line in unfrozen if line.get("img_size") == unfrozen[-1].get("img_size")]
    after = [line for line in metrics if line["frozen_layers"] == most]

    def row(name: str, key: str, show: Any) -> tuple[str, str, str, str]:
        first, last = (statistics.median(line[key] for line in lines) for lines in (before, after))
        return name, show(first), show(last), f"{last / first:.2f}"

    return format_table(
        [
            ("", "before first freeze", "after last freeze", "ratio"),
            ("frozen layers", str(fewest), str(most), ""),
            *_sizes(before, after),
            row("images/s", "images_per_second", "{:.1f}".format),
            row("step time", "step_seconds", lambda seconds: f"{1000 * seconds:.0f} ms"),
            row("optimizer state per rank", "optimizer_state_bytes", format_bytes),
            row("gradients reduced per step", "gradient_elements", lambda count: f"{count:,.0f}"),
        ]
    )


def _sizes(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Return a row with the sizes of the images, if they differ."""

    def name(lines: Sequence[Mapping[str, Any]]) -> str:
        return ", ".join(dict.fromkeys(str(line.get("img_size", "")) for line in lines))

    return [] if name(before) == name(after) else [("image size", name(before), name(after), "")]
