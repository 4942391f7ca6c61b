"""The command line: `vitfreeze-data {imagenet,folder,demo,verify,describe}`, or `python -m data_prep ...`."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from data_prep.arguments import Parser
from data_prep.catalogue import ImageSet
from data_prep.errors import InputError, OutputError, suggest
from data_prep.workers import default_workers

SHOWN_PROBLEMS = 10  # of one shard
EPILOG = """examples:
  vitfreeze-data imagenet --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar \\
      --devkit ILSVRC2012_devkit_t12.tar.gz --out shards/imagenet
  vitfreeze-data imagenet --kaggle imagenet-object-localization-challenge --out shards/imagenet
  vitfreeze-data folder my_photos --out shards/photos --resize-shorter 288 --quality 90
  vitfreeze-data folder scans --no-labels --out shards/scans
  vitfreeze-data demo --out shards/demo
  vitfreeze-data verify shards/imagenet
  vitfreeze-data describe shards/imagenet

From a checkout, `python -m data_prep` is the same. A command that was stopped, even killed, goes on where it
was when it is given again.
"""


# The type that add_subparsers returns has no public name.
Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    parser = Parser(
        prog="vitfreeze-data",
        description="Turn ImageNet's archives, or any folder of images, into WebDataset shards.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_imagenet(commands)
    _add_folder(commands)
    _add_demo(commands)
    _add_verify(commands)
    _add_describe(commands)
    return parser


def _add_imagenet(commands: Commands) -> None:
    parser = commands.add_parser("imagenet", help="ImageNet from its archives, extracted folders or Kaggle's layout")
    parser.add_argument("--train", type=Path, metavar="PATH", help="ILSVRC2012_img_train.tar, or the extracted folder")
    parser.add_argument("--val", type=Path, metavar="PATH", help="ILSVRC2012_img_val.tar, or a folder")
    parser.add_argument(
        "--devkit", type=Path, metavar="PATH", help="ILSVRC2012_devkit_t12.tar.gz: names the classes, labels --val"
    )
    parser.add_argument("--kaggle", type=Path, metavar="DIR", help="the folder that holds ILSVRC/Data/CLS-LOC")
    _add_packing_options(parser, name="imagenet1k")
    parser.add_argument("--limit-classes", type=int, metavar="N", help="only the first N classes in sorted order")
    _add_resize_options(parser)
    parser.set_defaults(run=run_imagenet)


def _add_folder(commands: Commands) -> None:
    parser = commands.add_parser(
        "folder", help="any tree of images: a folder per class, or no classes; train/ and val/"
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="the tree, nested or flat")
    parser.add_argument("--no-labels", action="store_true", help="folders are no classes: pack all images, unlabelled")
    _add_packing_options(parser, name=None)
    parser.add_argument("--limit-classes", type=int, metavar="N", help="only the first N classes in sorted order")
    _add_resize_options(parser)
    parser.set_defaults(run=run_folder)


def _add_demo(commands: Commands) -> None:
    parser = commands.add_parser("demo", help="draw a small labelled data set, no download needed")
    _add_packing_options(parser, name="demo", samples_per_shard=64, workers=1)
    parser.add_argument(
        "--samples", type=int, default=600, metavar="N", help="images in all; a fifth is for validation (default 600)"
    )
    parser.add_argument("--size", type=int, default=64, metavar="PX", help="height and width (default 64)")
    parser.set_defaults(run=run_demo)


def _add_verify(commands: Commands) -> None:
    parser = commands.add_parser("verify", help="check every checksum, count, label and image of a folder of shards")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of shards")
    _add_workers_option(parser, default_workers())
    parser.set_defaults(run=run_verify)


def _add_describe(commands: Commands) -> None:
    parser = commands.add_parser("describe", help="counts, balance of classes and sizes of images, as text and figure")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of shards")
    parser.add_argument("--png", type=Path, metavar="FILE", help="where to draw the figure (default DIR/describe.png)")
    _add_workers_option(parser, default_workers())
    parser.set_defaults(run=run_describe)


def _add_workers_option(parser: argparse.ArgumentParser, default: int) -> None:
    parser.add_argument("--workers", type=int, default=default, metavar="N", help=f"processes (default {default})")


def _add_packing_options(
    parser: argparse.ArgumentParser,
    *,
    name: str | None,
    samples_per_shard: int | None = None,
    workers: int | None = None,
) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument(
        "--name", default=name, help=f"first part of the shards' names (default {name or 'the folder'})"
    )
    _add_workers_option(parser, default_workers() if workers is None else workers)
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=samples_per_shard,
        metavar="N",
        help=f"default {samples_per_shard or '1252 (train) and 782 (validation): 1024 and 64 shards of ImageNet'}",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffle (default 0)")


def _add_resize_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resize-shorter",
        type=int,
        metavar="PX",
        help="shrink images whose shorter side is larger, and store them as JPEG (default: keep the original bytes)",
    )
    parser.add_argument("--quality", type=int, metavar="Q", help="JPEG quality of shrunk images, 1 to 100 (default 90)")


def run_imagenet(options: argparse.Namespace) -> int:
    """Pack ImageNet."""
    from data_prep.imagenet import read_imagenet
    from data_prep.kaggle import read_kaggle

    def read() -> ImageSet:
        if options.kaggle is not None:
            return read_kaggle(options.kaggle, limit_classes=options.limit_classes)
        return read_imagenet(
            train=options.train,
            val=options.val,
            devkit=options.devkit,
            limit_classes=options.limit_classes,
            workers=options.workers,
        )

    given = [name for name in ("train", "val", "devkit") if getattr(options, name) is not None]
    if options.kaggle is not None and given:
        raise InputError(f"--kaggle names the whole layout: leave out --{given[0]}.")
    return _pack(read, options)


def run_folder(options: argparse.Namespace) -> int:
    """Pack a tree of images, with a class per folder or without classes."""
    from data_prep.folders import find_split_folders, read_folder

    if options.name is None:
        options.name = re.sub(r"[^A-Za-z0-9_]", "_", options.folder.resolve().name) or "images"

    def read() -> ImageSet:
        out = options.out.resolve()
        for root in find_split_folders(options.folder, labels=not options.no_labels)[0].values():
            if root.resolve() in (out, *out.parents):  # the next call would take the shards for a class
                raise InputError(f"--out {options.out} lies in {root}, where images are searched: give one beside it.")
        return read_folder(options.folder, limit_classes=options.limit_classes, labels=not options.no_labels)

    return _pack(read, options)


def run_demo(options: argparse.Namespace) -> int:
    """Draw and pack the demo set."""
    from data_prep.drawing import draw_image_set

    return _pack(lambda: draw_image_set(options.samples, seed=options.seed, image_size=options.size), options)


def run_verify(options: argparse.Namespace) -> int:
    """Check a folder of shards and say what is wrong with it."""
    from data_prep.verification import verify

    _check_inputs(options)
    verdict = verify(options.folder, workers=options.workers)
    if not verdict.problems:
        sys.stdout.write(f"{verdict.num_shards} shards with {verdict.num_samples} samples: all checks passed\n")
        return 0
    for name, problems in sorted(verdict.problems.items()):
        for problem in problems[:SHOWN_PROBLEMS]:
            sys.stdout.write(f"{name}: {problem}\n")
        if len(problems) > SHOWN_PROBLEMS:
            sys.stdout.write(f"{name}: and {len(problems) - SHOWN_PROBLEMS} more\n")
    sys.stdout.write(f"FAILED: {sum(map(len, verdict.problems.values()))} problems\n")
    return 1


def run_describe(options: argparse.Namespace) -> int:
    """Say what is in a folder of shards."""
    from data_prep.description import describe, draw_figure

    _check_inputs(options)
    description = describe(options.folder, workers=options.workers)
    figure = options.png or options.folder / "describe.png"
    sys.stdout.write(f"{description}\n")
    draw_figure(description, figure)
    sys.stdout.write(f"\nfigure: {figure}\n")
    return 0


def _pack(read: Callable[[], ImageSet], options: argparse.Namespace) -> int:
    """Check the settings before the images are listed, which may take minutes."""
    from data_prep.packing import PackSettings, pack

    settings = PackSettings(
        dataset=options.name,
        seed=options.seed,
        samples_per_shard=options.samples_per_shard,
        resize_shorter=getattr(options, "resize_shorter", None),
        quality=getattr(options, "quality", None),
    )
    _check_inputs(options)
    images = read()
    for note in images.notes:
        sys.stdout.write(f"{note}\n")
    sys.stdout.flush()
    summary = pack(images, options.out, settings=settings, workers=options.workers)
    sys.stdout.write(f"{summary}\n")
    return 0


def _check_inputs(options: argparse.Namespace) -> None:
    """Make sure that what is to be read is there; raises InputError with the nearest name that is."""
    for name in ("train", "val", "devkit", "kaggle", "folder"):
        path = getattr(options, name, None)
        if path is not None and not path.exists():
            there = os.listdir(path.parent) if path.parent.is_dir() else []
            raise InputError(f"there is no {path}{suggest(path.name, there) or '.'}")


def _set_up_logging() -> None:
    """Say warnings and, where there is no terminal for a bar, how far a command is; there every line has its time."""
    has_terminal = sys.stderr.isatty()
    layout = "%(levelname)s: %(message)s" if has_terminal else "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(format=layout, datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("data_prep").setLevel(logging.INFO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        exit status: 0, 1 when `verify` finds something wrong, 2 for bad input, 130 after Ctrl-C.
    """
    _set_up_logging()
    options = build_parser().parse_args(arguments)
    try:
        if options.workers < 1:
            raise InputError(f"--workers must be at least 1, not {options.workers}.")
        return int(options.run(options))
    except (InputError, OutputError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on from here\n")
        return 130


if __name__ == "__main__":
    sys.exit(main())
