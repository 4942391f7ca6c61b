"""Command lines that are met with the nearest known word where one is misspelt; `data_prep` has the same. No torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from vitfreeze.text import find_nearest


class Parser(argparse.ArgumentParser):
    """Names the nearest command or option in the error about a misspelt one, and takes no option by its beginning.

    What a script abbreviates today is another option tomorrow. Options that are not known come before arguments that
    are missing, which may be what was misspelt.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does; ends with an error if an option of this parser is not known."""
        self._refuse_unknown(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        known = {flag: action for action in self._actions for flag in action.option_strings}
        for word in words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return  # what follows is no option, or the command's
            flag = word.partition("=")[0]
            is_value = re.match(r"-(\.?\d|$)", word) or not word.startswith("-") or " " in flag
            if is_value or flag in known or (word[1] != "-" and word[:2] in known):  # as in -oFILE
                continue
            offered = [name for name, action in known.items() if action.help is not argparse.SUPPRESS]
            whole = next((name for name in offered if word[1] == "-" and name.startswith(flag)), "")
            meant = f"; did you mean {whole}?" if whole else _suggest(flag, offered)
            self.error(f"unrecognized arguments: {flag}{meant}")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and exit with 2."""
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        super().error(message + (_suggest(found[1], re.findall(r"[\w-]+", found[2])) if found else ""))


def _suggest(word: str, known: Sequence[str]) -> str:
    nearest = find_nearest(word, known)
    return f"; did you mean {nearest}?" if nearest else ""
