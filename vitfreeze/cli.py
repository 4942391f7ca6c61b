"""The command line. Each subcommand parses, calls one function of a room, and prints; nobody imports this.

Rooms are imported inside the subcommands, so that `vitfreeze plan` need not wait for torch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from vitfreeze import __version__

EXIT_BAD_INPUT = 2
Handler = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit: 0 done, 1 failed, 2 bad input, 75 stopped on request with everything saved."""
    parsed = build_parser().parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
    handler: Handler = parsed.handler
    try:
        status = handler(parsed)
    except ValueError as error:
        if parsed.debug:
            raise
        if rank == 0:
            print(f"vitfreeze {parsed.command}: {error}", file=sys.stderr)
        status = EXIT_BAD_INPUT
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        if parsed.debug:
            raise
        print(f"vitfreeze {parsed.command}: {error.strerror}: {error.filename}", file=sys.stderr)
        status = EXIT_BAD_INPUT
    sys.stdout.flush()
    sys.exit(status)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every subcommand."""
    parser = argparse.ArgumentParser(prog="vitfreeze", description="Pre-train Vision Transformers faster.")
    parser.add_argument("--version", action="version", version=f"vitfreeze {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors in the input")
    # DeepSpeed's launcher passes this to its programs; the LOCAL_RANK variable says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_pretrain(commands)
    _add_config(commands)
    _add_plan(commands)
    _add_plot(commands)
    _add_doctor(commands)
    return parser


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="name of a recipe that comes with vitfreeze, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from it")


def _add_pretrain(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("pretrain", help="pre-train; in a folder with checkpoints, go on from the newest")
    _add_recipe(parser)
    parser.add_argument("--fresh", action="store_true", help="start a new run; refuse a folder that holds one")
    parser.set_defaults(handler=_pretrain)


def _pretrain(parsed: argparse.Namespace) -> int:
    from vitfreeze.config import load_config
    from vitfreeze.train import pretrain

    return pretrain(load_config(parsed.recipe, parsed.overrides), fresh=parsed.fresh)


def _add_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("config", help="explain every setting of a recipe, or dump it whole")
    _add_recipe(parser)
    parser.add_argument("--yaml", action="store_true", help="print the resolved recipe instead")
    parser.set_defaults(handler=_config)


def _config(parsed: argparse.Namespace) -> int:
    from vitfreeze.config import dump_config, explain_config, load_config

    config = load_config(parsed.recipe, parsed.overrides)
    print(dump_config(config) if parsed.yaml else explain_config(config))
    return 0


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("plan", help="predict, without a GPU or data, what freezing saves")
    parser.add_argument("recipe", nargs="?", help="name of a recipe that comes with vitfreeze, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from it")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="put two recipes side by side instead")
    parser.add_argument("--target-saving", type=float, metavar="SHARE", help="find the t_0 that saves this, as 0.20")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs in each")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="between nodes, to predict communication")
    parser.add_argument("--tflops", type=float, help="what one GPU sustains; default: the authors' V100")
    parser.add_argument("--bench", metavar="FILE", help="what `bench step --json` printed: predict for that machine")
    parser.add_argument("--images", type=int, help="training images; default: ImageNet-1K")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=_plan)


def _plan(parsed: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict
    from pathlib import Path

    from vitfreeze import planner
    from vitfreeze.config import load_config

    if not parsed.compare and not parsed.recipe:
        raise ValueError("give a recipe to plan, or two after --compare")
    if parsed.compare and parsed.target_saving is not None:
        raise ValueError("--compare and --target-saving exclude each other: a target is found for one recipe")
    times = planner.read_step_times(Path(parsed.bench)) if parsed.bench else None
    counts = {} if parsed.images is None else {"images_per_epoch": parsed.images}
    # After --compare A B, what stands in the place of the recipe is the first override.
    overrides = [parsed.recipe, *parsed.overrides] if parsed.compare and parsed.recipe else parsed.overrides
    configs = [load_config(recipe, overrides) for recipe in parsed.compare or [parsed.recipe]]
    if parsed.target_saving is not None:
        targets = planner.solve_targets(configs[0], target_saving=parsed.target_saving, times=times, **counts)
        as_text = planner.format_targets(targets, target_saving=parsed.target_saving)
        print(json.dumps([asdict(target) for target in targets], indent=1) if parsed.json else as_text)
        return 0
    speed = {} if parsed.tflops is None else {"teraflops": parsed.tflops}
    plans = [
        planner.plan(
            config, world_size=parsed.nodes * parsed.gpus, times=times, bandwidth_gigabytes=parsed.bandwidth,
            **speed, **counts,
        )
        for config in configs
    ]  # fmt: skip
    if parsed.json:
        print(plans[0].to_json() if len(plans) == 1 else f"[{plans[0].to_json()}, {plans[1].to_json()}]")
    else:
        print(planner.format_plan(plans[0]) if len(plans) == 1 else planner.format_plans_side_by_side(*plans))
    return 0


def _add_plot(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("plot", help="draw a run, or the learning rates of a recipe: plot schedule RECIPE")
    parser.add_argument("what", metavar="RUN | schedule RECIPE", help="a run folder, or the word schedule")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="recipe and settings of a schedule")
    parser.add_argument("--out", metavar="FILE", help=".png or .svg; default: run.png in the folder, RECIPE.png here")
    parser.set_defaults(handler=_plot)


def _plot(parsed: argparse.Namespace) -> int:
    from pathlib import Path

    from vitfreeze.config import load_config
    from vitfreeze.plots import plot_run, plot_schedule

    if parsed.what == "schedule":
        if not parsed.settings:
            raise ValueError("plot schedule needs a recipe after it")
        config = load_config(parsed.settings[0], parsed.settings[1:])
        print(plot_schedule(config, Path(parsed.out or f"{config.recipe}.png")))
    else:
        if parsed.settings:
            raise ValueError(
                f"plot RUN takes no settings, but {parsed.settings[0]!r} follows; or plot schedule RECIPE?"
            )
        print(plot_run(Path(parsed.what), Path(parsed.out or f"{parsed.what}/run.png")))
    return 0


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="run under the launcher on all nodes: is this cluster fit to train?")
    parser.add_argument("recipe", nargs="?", help="the run that it shall carry: a recipe by name, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from it")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to read shards (default %(default)s)")
    parser.add_argument("--images-per-second", type=float, metavar="N", help="what a GPU trains, if it is known")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for ranks that do not answer")
    parser.set_defaults(handler=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    from datetime import timedelta

    from vitfreeze.config import load_config
    from vitfreeze.doctor import examine, format_findings

    findings = examine(
        load_config(parsed.recipe, parsed.overrides) if parsed.recipe else None,
        seconds=parsed.seconds,
        images_per_second=parsed.images_per_second,
        timeout=timedelta(seconds=parsed.timeout),
    )
    if os.environ.get("RANK", "0") == "0":
        print(format_findings(findings, colour=sys.stdout.isatty()))
    return 1 if any(finding.fit is False for finding in findings) else 0
