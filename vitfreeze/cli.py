"""The command line. Each subcommand parses, calls one function of a room, and prints; nobody imports this.

Rooms are imported inside the subcommands, so that `vitfreeze plan` need not wait for torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vitfreeze import __version__
from vitfreeze.arguments import Parser
from vitfreeze.files import suggest_path
from vitfreeze.terminal import set_up_logging, wants_colour
from vitfreeze.text import format_table
from vitfreeze.threads import limit_threads

if TYPE_CHECKING:
    from vitfreeze.config import Config
    from vitfreeze.evaluate import EvaluationData

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # as shells say it
EXAMPLES = {
    "pretrain": "paper data.train=shards/imagenet run.dir=runs/paper",
    "finetune": "finetune_b_100ep model.init_from=runs/paper data.train=shards/imagenet data.val=shards/imagenet",
    "knn": "runs/paper --k 10 20",
    "linear": "runs/paper --all-blocks",
    "export": "runs/paper --to timm",
    "features": "runs/paper my_photos -o features.npz --what mean grid",
    "show": "runs/paper photo.jpg --out show.png",
    "config": "paper freeze.t_0=0.9",
    "plan": "paper --nodes 4 --gpus 8",
    "plot": "runs/paper",
    "report": "runs/paper runs/off -o report.html",
    "doctor": "paper data.train=shards/imagenet",
    "bench": "step paper batch.global_size=8",
    "data": "shards/imagenet --workers 4",
    "step": "paper batch.global_size=8 --json",
    "stages": "half batch.global_size=8",
    "freeze": "paper batch.global_size=8",
    "launches": "paper batch.global_size=8",
    "scaling": "paper batch.global_size=8",
    "gpu": "data.train=shards/imagenet --reference ViTFreeze/ViT",
}
SHOWN_EXAMPLES = ("pretrain", "plan", "knn")
Handler = Callable[[argparse.Namespace], int]
# The type that add_subparsers returns has no public name.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand and exit: 0 done, 1 failed, 2 bad input, 75 stopped with everything saved, 130 by Ctrl-C."""
    parsed = parse_arguments(arguments)
    rank = int(os.environ.get("RANK", "0"))
    set_up_logging(parsed.verbosity)
    limit_threads()
    handler: Handler = parsed.handler
    try:
        status = handler(parsed)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:  # before training, which saves first
        status = EXIT_INTERRUPTED
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        if parsed.debug:
            raise
        words = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            meant = suggest_path(Path(error.filename)) if isinstance(error, FileNotFoundError) else ""
            words = f"{error.strerror}: {error.filename}{meant}"
        # What is wrong with files may be wrong on one node only, what is wrong in shards with those of one rank.
        if rank == 0 or isinstance(error, OSError) or getattr(error, "of_one_rank", False):
            print(f"vitfreeze {parsed.command}: {words}", file=sys.stderr)
        status = EXIT_BAD_INPUT
    sys.exit(status)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides of a recipe may also stand behind options."""
    parser = build_parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        parser.exit()
    parsed, rest = parser.parse_known_args(arguments)
    overrides = [argument for argument in rest if not argument.startswith("-") and "=" in argument]
    strange = [argument for argument in rest if argument not in overrides]
    if strange or (overrides and "overrides" not in parsed):
        parser.error(f"unrecognized arguments: {' '.join(strange or overrides)}")
    if overrides:
        parsed.overrides = [*parsed.overrides, *overrides]
    return parsed


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every subcommand."""
    parser = Parser(
        prog="vitfreeze", description="Pre-train Vision Transformers faster.",
        epilog="\n  vitfreeze ".join(["examples:", *(f"{name} {EXAMPLES[name]}" for name in SHOWN_EXAMPLES)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"vitfreeze {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors in the input")
    _add_verbosity(parser, default=0)
    # DeepSpeed's launcher passes this to its programs; the LOCAL_RANK variable says the same.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_training(commands, "pretrain", help="pre-train; in a folder with checkpoints, go on from the newest")
    _add_training(commands, "finetune", help="fine-tune an encoder as a classifier; goes on as pretrain does")
    _add_knn(commands)
    _add_linear(commands)
    _add_export(commands)
    _add_features(commands)
    _add_show(commands)
    _add_config(commands)
    _add_plan(commands)
    _add_plot(commands)
    _add_report(commands)
    _add_doctor(commands)
    _add_bench(commands)
    return parser


def _add_command(commands: Commands, name: str, handler: Handler, *, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help)
    parser.epilog = f"example: {parser.prog} {EXAMPLES[name]}"
    parser.set_defaults(handler=handler)
    _add_verbosity(parser, default=argparse.SUPPRESS)  # what stands before the command holds
    return parser


def _add_verbosity(parser: argparse.ArgumentParser, *, default: int | str) -> None:
    amount = parser.add_mutually_exclusive_group()
    for flags, const, words in (
        (("-q", "--quiet"), -1, "warnings and errors only"),
        (("-v", "--verbose"), 1, "other packages' messages too"),
    ):
        amount.add_argument(*flags, dest="verbosity", action="store_const", const=const, default=default, help=words)


def _add_recipe(parser: argparse.ArgumentParser, *, nargs: str | None = None) -> None:
    parser.add_argument("recipe", nargs=nargs, help="name of a recipe that comes with vitfreeze, or a .yaml file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from it")


def _add_json(parser: argparse.ArgumentParser, help: str = "print JSON") -> None:
    parser.add_argument("--json", action="store_true", help=help)


def _read_config(parsed: argparse.Namespace) -> Config:
    from vitfreeze.config import load_config

    return load_config(parsed.recipe, parsed.overrides)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_result(result: Any, text: str, *, as_json: bool) -> int:
    """Print a dataclass, or a list of them, as JSON, or its text, once for all ranks."""
    if _is_first_rank():
        print(json.dumps(result, default=asdict, indent=1) if as_json else text)
    return 0


def _add_training(commands: Commands, task: str, *, help: str) -> None:
    parser = _add_command(commands, task, _train, help=help)
    _add_recipe(parser)
    parser.add_argument("--fresh", action="store_true", help="start a new run; refuse a folder that holds one")
    parser.add_argument(
        "--cooldown", metavar="FROM", help="with optim.schedule=wsd: cool a run or checkpoint down in another run.dir"
    )


def _train(parsed: argparse.Namespace) -> int:
    config = _read_config(parsed)  # bad settings are told before torch is imported, which takes seconds
    from vitfreeze.training.finetune import finetune
    from vitfreeze.training.pretrain import pretrain

    train = {"pretrain": pretrain, "finetune": finetune}[parsed.command]
    if parsed.cooldown:
        from vitfreeze.training.start import begin_cooldown

        config = begin_cooldown(config, parsed.cooldown)
    return train(config, fresh=parsed.fresh)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", help="a run folder, an export, a LocalMIM or MAE .pth, or timm:NAME")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    _add_weights(parser)
    parser.add_argument("--train", nargs="+", default=(), metavar="SHARDS", help="default: those of the run")
    parser.add_argument("--val", nargs="+", default=(), metavar="SHARDS", help="default: those of the run")
    blocks = parser.add_mutually_exclusive_group()
    blocks.add_argument("--blocks", nargs="+", type=int, default=(), metavar="N", help="from 1; default: the last")
    blocks.add_argument("--all-blocks", action="store_true", help="judge every block")
    parser.add_argument("--pool", help="avg: mean of the patches (default); token: the class token")
    parser.add_argument("--limit", type=int, help="images of each split and rank; default: all")
    parser.add_argument("--workers", type=int, help="decoding processes; default: as the run")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        metavar="SHARE",
        help="samples that may fail to decode; default: the run's data.max_bad_fraction",
    )
    _add_allow_pipe(parser)


def _add_allow_pipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow-pipe", action="store_true", help="allow 'pipe:' shards, which run a shell command")


def _evaluation_data(parsed: argparse.Namespace) -> EvaluationData:
    from vitfreeze.evaluate import EvaluationData

    return EvaluationData(
        train=tuple(parsed.train), val=tuple(parsed.val), blocks=tuple(parsed.blocks), all_blocks=parsed.all_blocks,
        limit=parsed.limit, workers=parsed.workers, max_bad_fraction=parsed.max_bad_fraction,
        allow_pipe=parsed.allow_pipe, **_given(global_pool=parsed.pool),
    )  # fmt: skip


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given; for the others, the function that they are passed to has its defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _add_knn(commands: Commands) -> None:
    parser = _add_command(commands, "knn", _knn, help="classify validation images by their nearest training images")
    _add_evaluation(parser)
    parser.add_argument("--k", nargs="+", type=int, help="numbers of neighbours; default: 10 20")


def _knn(parsed: argparse.Namespace) -> int:
    from vitfreeze.evaluate import evaluate_knn

    found = evaluate_knn(parsed.weights, _evaluation_data(parsed), **_given(k=parsed.k))
    if _is_first_rank():
        neighbours = list(next(iter(found.values())))
        rows = [[str(block), *(f"{100 * found[block][k]:.2f}%" for k in neighbours)] for block in found]
        print(format_table([["block", *(f"{k}-NN" for k in neighbours)], *rows]))
    return 0


def _add_linear(commands: Commands) -> None:
    parser = _add_command(
        commands, "linear", _linear, help="train linear classifiers on the features, one per learning rate"
    )
    _add_evaluation(parser)
    parser.add_argument("--optimizer", help="lars (MAE's, default) or sgd")
    parser.add_argument("--blr", nargs="+", type=float, default=(), help="learning rates per 256 images")
    parser.add_argument("--epochs", type=int, help="default: MAE's, as of the next two")
    parser.add_argument("--warmup-epochs", type=int)
    parser.add_argument("--batch-size", type=int)


def _linear(parsed: argparse.Namespace) -> int:
    from vitfreeze.evaluate import LinearSettings, evaluate_linear, find_best

    given = _given(
        optimizer=parsed.optimizer, epochs=parsed.epochs, warmup_epochs=parsed.warmup_epochs,
        batch_size=parsed.batch_size,
    )  # fmt: skip
    settings = LinearSettings(blr=tuple(parsed.blr), **given)
    found = evaluate_linear(parsed.weights, _evaluation_data(parsed), settings=settings)
    if _is_first_rank():
        rows = [["block", "blr", "top-1", "top-5", "loss", ""]]
        for block, results in found.items():
            best = find_best(results)
            for result in results:
                cells = [str(block), f"{result.blr:g}", f"{100 * result.top1:.2f}%", f"{100 * result.top5:.2f}%"]
                rows.append([*cells, f"{result.loss:.4f}", "best" if result is best else ""])
        print(format_table(rows))
    return 0


def _add_export(commands: Commands) -> None:
    parser = _add_command(
        commands, "export", _export, help="write weights for timm, Hugging Face or torch, with a model card"
    )
    _add_weights(parser)
    parser.add_argument("--to", required=True, help="timm, safetensors, hf or torch")
    parser.add_argument("--out", help="file or folder; default: export/ in the run folder")
    parser.add_argument("--push", default="", metavar="REPO", help="also send it to this repository of Hugging Face")
    parser.add_argument("--private", action="store_true", help="a repository that is made is seen by its owner alone")


def _export(parsed: argparse.Namespace) -> int:
    from vitfreeze.export import export_run

    if parsed.private and not parsed.push:
        raise ValueError("--private is about the repository of --push, which is not given")
    print(export_run(parsed.weights, to=parsed.to, out=parsed.out, push=parsed.push, private=parsed.private))
    return 0


def _add_features(commands: Commands) -> None:
    parser = _add_command(commands, "features", _features, help="write the features of images into a file")
    _add_weights(parser)
    parser.add_argument("images", nargs="+", help="image files, a folder of images, or shards")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help=".npz or .safetensors")
    parser.add_argument("--blocks", nargs="+", type=int, default=(), metavar="N", help="from 1; default: the last")
    what = "token: class token; mean: of the patches; grid: the patches; default: token mean"
    parser.add_argument("--what", nargs="+", default=("token", "mean"), metavar="KIND", help=what)
    parser.add_argument("--workers", type=int, default=0, help="decoding processes, for shards (default %(default)s)")
    _add_allow_pipe(parser)


def _features(parsed: argparse.Namespace) -> int:
    from vitfreeze.evaluate import write_features

    out = write_features(
        parsed.weights, parsed.images, out=Path(parsed.out), kinds=parsed.what, blocks=parsed.blocks,
        workers=parsed.workers, allow_pipe=parsed.allow_pipe,
    )  # fmt: skip
    if _is_first_rank():
        print(out)
    return 0


def _add_show(commands: Commands) -> None:
    parser = _add_command(commands, "show", _show, help="draw what a run reconstructs of images, and where it looks")
    _add_weights(parser)
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--blocks", nargs="+", type=int, default=(), metavar="N", help="attention; default: the last")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    parser.add_argument("--out", default="show.png", help="where to (default show.png)")


def _show(parsed: argparse.Namespace) -> int:
    from vitfreeze.evaluate import show_images

    images = [Path(image) for image in parsed.images]
    print(show_images(parsed.weights, images, blocks=parsed.blocks, seed=parsed.seed, out=Path(parsed.out)))
    return 0


def _add_config(commands: Commands) -> None:
    parser = _add_command(commands, "config", _config, help="explain every setting of a recipe, or dump it whole")
    _add_recipe(parser)
    parser.add_argument("--yaml", action="store_true", help="print the resolved recipe instead")


def _config(parsed: argparse.Namespace) -> int:
    from vitfreeze.config import dump_config, explain_config

    config = _read_config(parsed)
    print(dump_config(config) if parsed.yaml else explain_config(config))
    return 0


def _add_plan(commands: Commands) -> None:
    parser = _add_command(commands, "plan", _plan, help="predict, without a GPU or data, what freezing saves")
    _add_recipe(parser, nargs="?")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="put two recipes side by side instead")
    searched = "search t_0, image sizes and epochs for a run that"
    parser.add_argument("--target-saving", type=float, metavar="SHARE", help=f"{searched} saves this, as 0.20")
    parser.add_argument("--target-hours", type=float, metavar="H", help=f"{searched} takes at most so many GPU-hours")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs in each")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="between nodes, to predict communication")
    parser.add_argument("--tflops", type=float, help="what one GPU sustains; default: the authors' V100")
    parser.add_argument("--bench", metavar="FILE", help="what `bench step --json` printed: predict for that machine")
    parser.add_argument("--images", type=int, help="training images; default: data.train's, or ImageNet-1K's")
    _add_json(parser)


def _plan(parsed: argparse.Namespace) -> int:
    from vitfreeze import planner
    from vitfreeze.config import load_config

    if not parsed.compare and not parsed.recipe:
        raise ValueError("give a recipe to plan, or two after --compare")
    targets = _given(target_saving=parsed.target_saving, target_gpu_hours=parsed.target_hours)
    if len(targets) + bool(parsed.compare) > 1:
        raise ValueError(
            "--compare, --target-saving and --target-hours exclude each other: give one target, one recipe"
        )
    times = planner.read_step_times(Path(parsed.bench)) if parsed.bench else None
    # After --compare A B, what stands in the place of the recipe is the first override.
    overrides = [parsed.recipe, *parsed.overrides] if parsed.compare and parsed.recipe else parsed.overrides
    configs = [load_config(recipe, overrides) for recipe in parsed.compare or [parsed.recipe]]
    counts = _given(images_per_epoch=parsed.images or _count_images(configs[0]))
    counts |= _given(teraflops=parsed.tflops)
    if targets:
        solved = planner.solve_targets(configs[0], times=times, **targets, **counts)
        return _print_result(solved, planner.format_targets(solved), as_json=parsed.json)
    plans = [
        planner.plan(
            config, world_size=parsed.nodes * parsed.gpus, times=times, bandwidth_gigabytes=parsed.bandwidth, **counts
        )
        for config in configs
    ]  # fmt: skip
    if len(plans) == 1:
        return _print_result(plans[0], planner.format_plan(plans[0]), as_json=parsed.json)
    return _print_result(plans, planner.format_plans_side_by_side(*plans), as_json=parsed.json)


def _count_images(config: Config) -> int | None:
    """Return the number of training images, where that can be known; a recipe without data is planned without torch."""
    if not config.data.train_shards:
        return None
    from vitfreeze.data import count_training_images

    images = count_training_images(config)
    if images is None:
        logging.warning("nothing here says how many images data.train holds: planned for ImageNet-1K's; give --images")
    return images


def _add_plot(commands: Commands) -> None:
    parser = _add_command(
        commands, "plot", _plot, help="draw a run, or the learning rates of a recipe: plot schedule RECIPE"
    )
    parser.add_argument("what", metavar="RUN | schedule RECIPE", help="a run folder, or the word schedule")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="recipe and settings of a schedule")
    parser.add_argument("--out", metavar="FILE", help=".png or .svg; default: run.png in the folder, RECIPE.png here")


def _plot(parsed: argparse.Namespace) -> int:
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


def _add_report(commands: Commands) -> None:
    parser = _add_command(commands, "report", _report, help="one HTML page about runs, several laid over each other")
    parser.add_argument("sources", nargs="+", metavar="RUN", help="run folders, or folders of the study's cells")
    parser.add_argument("-o", "--out", default="report.html", metavar="FILE", help="default: report.html here")


def _report(parsed: argparse.Namespace) -> int:
    from vitfreeze.html_report import write_report

    print(write_report([Path(source) for source in parsed.sources], Path(parsed.out)))
    return 0


def _add_doctor(commands: Commands) -> None:
    parser = _add_command(
        commands, "doctor", _doctor, help="run under the launcher on all nodes: is this cluster fit to train?"
    )
    _add_recipe(parser, nargs="?")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to read shards (default %(default)s)")
    parser.add_argument("--images-per-second", type=float, metavar="N", help="what a GPU trains, if it is known")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS", help="for ranks that do not answer")
    alone = parser.add_argument_group("without a cluster, on one CPU")
    alone.add_argument("--pretend", type=int, metavar="N", help="try the recipe as one rank of N: no launcher, no GPU")
    alone.add_argument("--rank", type=int, default=0, metavar="R", help="which of them (default %(default)s)")
    alone.add_argument("--images", type=int, default=2, help="of a micro-batch to compute (default %(default)s)")
    alone.add_argument("--steps", type=int, default=2, help="of each stage (default %(default)s)")
    alone.add_argument("--json", action="store_true", help="print JSON")


def _doctor(parsed: argparse.Namespace) -> int:
    from datetime import timedelta

    from vitfreeze.doctor import format_findings, run_checks

    if parsed.pretend is not None:
        return _pretend(parsed)
    findings = run_checks(
        _read_config(parsed) if parsed.recipe else None,
        seconds=parsed.seconds,
        images_per_second=parsed.images_per_second,
        timeout=timedelta(seconds=parsed.timeout),
    )
    if _is_first_rank():
        print(format_findings(findings, colour=wants_colour()))
    return 1 if any(finding.fit is False for finding in findings.values()) else 0


def _pretend(parsed: argparse.Namespace) -> int:
    from vitfreeze.doctor.pretend import pretend
    from vitfreeze.doctor.pretend_findings import format_pretence, judge_pretence

    if not parsed.recipe:
        raise ValueError("--pretend needs a recipe to try")
    found = pretend(
        _read_config(parsed), world_size=parsed.pretend, rank=parsed.rank, images=parsed.images, steps=parsed.steps
    )
    findings = judge_pretence(found)
    print(
        json.dumps({**asdict(found), "findings": {name: asdict(f) for name, f in findings.items()}}, indent=1)
        if parsed.json
        else format_pretence(found, colour=wants_colour())
    )
    return 1 if any(finding.fit is False for finding in findings.values()) else 0


def _add_bench(commands: Commands) -> None:
    words = "measure a part of a run on this machine"
    parser = commands.add_parser("bench", help=words, description=words)
    parser.epilog = f"example: {parser.prog} {EXAMPLES['bench']}"
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    _add_bench_data(parts)
    _add_bench_of_engine(parts, "step", _bench_step, help="time and memory of a recipe's step as more layers freeze")
    _add_bench_of_engine(
        parts, "stages", _bench_stages, help="what curriculum and freezing of a recipe save, and what the plan says"
    )
    _add_bench_of_engine(parts, "freeze", _bench_freeze, help="seconds in which frozen layers leave, beside a step's")
    _add_bench_of_engine(
        parts, "launches", _bench_launches, help="kernels, host waits, collectives of a recipe's step, counted on a CPU"
    )
    _add_bench_of_engine(
        parts, "scaling", _bench_scaling, help="under the launcher: what more ranks cost, and the plan"
    )
    _add_bench_gpu(parts)


def _add_bench_data(parts: Commands) -> None:
    parser = _add_command(parts, "data", _bench_data, help="images per second of the input pipeline, and torchvision's")
    parser.add_argument("shards", help="a folder of shards, a brace pattern or a URL")
    parser.add_argument("--split", default="train", help="split of the folder's _info.json (default %(default)s)")
    parser.add_argument("--images", type=int, default=2000, help="photographs to measure on (default %(default)s)")
    parser.add_argument("--img-size", type=int, default=224, help="side of the crops (default %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each pipeline (default %(default)s)")
    parser.add_argument("--step-seconds", type=float, metavar="S", help="time of a step: how many workers feed it?")
    parser.add_argument("--step-images", type=int, metavar="N", help="images per rank in such a step")
    _add_json(parser)
    _add_allow_pipe(parser)


def _bench_data(parsed: argparse.Namespace) -> int:
    from vitfreeze.bench.data import format_data_benchmark, run_data_benchmark

    if (parsed.step_seconds is None) != (parsed.step_images is None):
        raise ValueError("--step-seconds and --step-images make sense together only: so many images in so many seconds")
    if parsed.step_seconds is not None and not parsed.step_seconds > 0:
        raise ValueError(f"--step-seconds is {parsed.step_seconds:g}; a step takes some time")
    speed = {} if not parsed.step_seconds else {"device_images_per_second": parsed.step_images / parsed.step_seconds}
    result = run_data_benchmark(
        parsed.shards, split=parsed.split, images=parsed.images, img_size=parsed.img_size, workers=parsed.workers,
        rounds=parsed.rounds, allow_pipe=parsed.allow_pipe, **speed,
    )  # fmt: skip
    return _print_result(result, format_data_benchmark(result), as_json=parsed.json)


def _add_bench_of_engine(parts: Commands, name: str, handler: Handler, *, help: str) -> None:
    parser = _add_command(parts, name, handler, help=help)
    _add_recipe(parser)
    if name != "launches":
        parser.add_argument("--rounds", type=int, default=5, help="measured steps of each (default %(default)s)")
    if name not in ("freeze", "stages"):
        frozen = "numbers of frozen layers; 0 is always measured"
        parser.add_argument("--frozen", type=_parse_frozen, metavar="K,K,...", help=frozen)
    if name in ("step", "stages"):
        parser.add_argument("--threads", type=int, metavar="N", help="threads on a CPU (default: all cores)")
        clock = "wall, or processor on a CPU that others use too (default %(default)s)"
        parser.add_argument("--clock", default="wall", help=clock)
    _add_json(parser, "print JSON" + (", which `plan --bench` reads" if name == "step" else ""))


def _add_bench_gpu(parts: Commands) -> None:
    words = "all that a new GPU is to answer, in ten minutes: one JSON file and tables"
    parser = _add_command(parts, "gpu", _bench_gpu, help=words)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ from `paper`")
    parser.add_argument("--reference", type=Path, metavar="DIR", help="the authors' folder that holds models_mim.py")
    parser.add_argument("--models", metavar="SIZE,SIZE,...", help="the first has all cells, others those of the step")
    parser.add_argument("--images", type=int, default=256, help="of a step, one micro-batch (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="steps between two looks (default %(default)s)")
    words = "begin no more cells after so many (default %(default)s)"
    parser.add_argument("--minutes", type=float, default=10.0, help=words)
    words = "what is written (default %(default)s)"
    parser.add_argument("-o", "--output", type=Path, default=Path("bench_gpu.json"), metavar="FILE", help=words)


def _bench_gpu(parsed: argparse.Namespace) -> int:
    from vitfreeze.bench.gpu import MODELS, format_gpu_benchmark, run_gpu_benchmark
    from vitfreeze.config import load_config
    from vitfreeze.files import format_json, replacing

    models = tuple(parsed.models.split(",")) if parsed.models else MODELS
    config = load_config("paper", parsed.overrides)
    with replacing(parsed.output) as path:
        path.touch()  # a folder that cannot be written to is told before ten minutes are spent
        result = run_gpu_benchmark(
            config, models=models, images=parsed.images, rounds=parsed.rounds, minutes=parsed.minutes,
            reference=parsed.reference,
        )  # fmt: skip
        path.write_text(format_json(asdict(result)) + "\n")
    print(format_gpu_benchmark(result))
    return 1 if any(cell.failed for cell in result.cells) else 0


def _parse_frozen(text: str) -> list[int]:
    try:
        return [int(k) for k in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers with commas, as 0,3,12") from None


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads is {threads}, expected at least 1")
        torch.set_num_threads(threads)


def _bench_stages(parsed: argparse.Namespace) -> int:
    from vitfreeze.bench.stages import format_stage_benchmark, run_stage_benchmark

    _set_threads(parsed.threads)
    result = run_stage_benchmark(_read_config(parsed), rounds=parsed.rounds, clock=parsed.clock)
    return _print_result(result, format_stage_benchmark(result), as_json=parsed.json)


def _bench_step(parsed: argparse.Namespace) -> int:
    from vitfreeze.bench.step import format_step_benchmark, run_step_benchmark

    _set_threads(parsed.threads)
    result = run_step_benchmark(
        _read_config(parsed), frozen_layers=parsed.frozen, rounds=parsed.rounds, clock=parsed.clock
    )
    return _print_result(result, format_step_benchmark(result), as_json=parsed.json)


def _bench_freeze(parsed: argparse.Namespace) -> int:
    from vitfreeze.bench.freeze import format_freeze_benchmark, run_freeze_benchmark

    result = run_freeze_benchmark(_read_config(parsed), rounds=parsed.rounds)
    return _print_result(result, format_freeze_benchmark(result), as_json=parsed.json)


def _bench_launches(parsed: argparse.Namespace) -> int:
    from vitfreeze.bench.launches import count_launches, format_launch_count

    result = count_launches(_read_config(parsed), frozen_layers=parsed.frozen)
    return _print_result(result, format_launch_count(result), as_json=parsed.json)


def _bench_scaling(parsed: argparse.Namespace) -> int:
    from vitfreeze.bench.scaling import format_scaling_benchmark, run_scaling_benchmark

    result = run_scaling_benchmark(_read_config(parsed), frozen_layers=parsed.frozen, rounds=parsed.rounds)
    return _print_result(result, format_scaling_benchmark(result), as_json=parsed.json)
