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
