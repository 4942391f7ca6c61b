"""What a shard's name means: a file, a URL or a shell command. Nothing else in the package decides it.

Names come from recipes, run folders and lists beside the shards, any of which a stranger may have written. So they are
judged in their final form, when every prefix is stripped and every brace expanded, and judged again where they are
opened: a command is run only there, and only where the caller says that the user allows it.
"""

from __future__ import annotations

import enum
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from braceexpand import braceexpand

from vitfreeze.data.errors import ShardError

MAX_SHARDS = 1_000_000
# Object stores, hubs and servers that hand out bytes. Others that fsspec knows run code (`reference` renders templates,
# `dask` and `jupyter` speak to interpreters), unpickle caches, or were put there by any package that is installed.
FSSPEC_SCHEMES = frozenset({
    "abfs", "abfss", "adl", "az", "ftp", "gcs", "gs", "hf", "memory", "oci", "oss", "s3", "s3a", "sftp", "ssh",
    "webhdfs",
})  # fmt: skip
WEB_SCHEMES = frozenset({"http", "https"})
_COMMAND_PREFIX = "pipe:"
_FILE_PREFIX = re.compile(r"file:(//)?", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(://|::)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DEEPEST_BRACES = 20
_INT_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?\n?")  # braceexpand's grammar, to the newline
_LETTER_RANGE = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?\n?")
_MOST_DIGITS = 18  # of a number in a range; its width is that of every name


class Kind(enum.Enum):
    """What stands behind a shard's name."""

    FILE = "file"
    URL = "URL"
    COMMAND = "command"


@dataclass(frozen=True)
class Address:
    """A shard's name, understood.

    Attributes:
        kind: what stands behind it.
        target: the path, the URL with its scheme in lower case, or the shell command.
    """

    kind: Kind
    target: str

    @property
    def name(self) -> str:
        """The name in its plainest form, which means the same when it is read again."""
        return _COMMAND_PREFIX + self.target if self.kind is Kind.COMMAND else self.target

    @property
    def scheme(self) -> str:
        """The scheme of a URL; empty for others."""
        return self.target.partition("://")[0] if self.kind is Kind.URL else ""


def read_address(name: str, *, allow_pipe: bool = False) -> Address:
    """Decide what a name means; 'file:' before it, also repeatedly, and space around it mean nothing.

    Args:
        name: without braces that are still to be expanded.
        allow_pipe: whether the user's command line allows commands.

    Raises:
        ShardError: it is a command and none is allowed, or a URL of a kind that is not read.
    """
    text = name.strip()
    while prefix := _FILE_PREFIX.match(text):
        text = text[prefix.end() :].strip()
    is_command = text[: len(_COMMAND_PREFIX)].lower() == _COMMAND_PREFIX
    if not text or "\0" in text or (_CONTROL.search(text) and not is_command):
        raise ShardError(f"{name!r} names no shard; give a folder, a path, a brace pattern or a URL")
    if is_command:
        if not allow_pipe:
            raise ShardError(
                f"{name!r} would run a shell command, and that is not allowed; if it is meant, allow it on the command "
                "line of this call, as of every other: data.allow_pipe=true, or --allow-pipe where a command takes no "
                "recipe. No recipe, run folder or list of shards can allow it"
            )
        return Address(Kind.COMMAND, text[len(_COMMAND_PREFIX) :])
    scheme = _SCHEME.match(text)
    if scheme is None:
        return Address(Kind.FILE, os.path.expanduser(text))
    return Address(Kind.URL, _check_scheme(text, scheme[1].lower(), text[scheme.end(1) :]))


def _check_scheme(text: str, scheme: str, rest: str) -> str:
    """Return the URL; raises ShardError for a scheme that is not read, or a chain of them."""
    if rest.startswith("::") or (scheme not in WEB_SCHEMES and "::" in rest):
        raise ShardError(
            f"{cut_query(text)!r} is a chain of file systems, which is not read; give the URL of the shards themselves "
            "(a file of that name is ./NAME)"
        )
    if scheme not in WEB_SCHEMES | FSSPEC_SCHEMES:
        allowed = ", ".join(sorted(WEB_SCHEMES | FSSPEC_SCHEMES))
        raise ShardError(f"{cut_query(text)!r} has the scheme {scheme!r}; allowed are {allowed}")
    return scheme + rest


def is_remote(name: str) -> bool:
    """Whether a shard's name, as `ShardSet` has it, is a URL or a command rather than a path."""
    return read_address(name, allow_pipe=True).kind is not Kind.FILE


def cut_query(name: str) -> str:
    """Return a URL without user, query and fragment, which may hold secrets; a path or a command as it is."""
    if name[: len(_COMMAND_PREFIX)].lower() == _COMMAND_PREFIX or not _SCHEME.match(name):
        return name
    return re.sub(r"//[^/@]*@", "//", re.split(r"[?#]", name)[0])


def expand_names(sources: Sequence[str]) -> list[str]:
    """Expand the braces of every name, as bash does; a folder that exists is taken as it is.

    Raises:
        ShardError: braces that do not match, or that stand for more than a million names.
    """
    if sum(1 if _names_folder(source) else count_expansions(source) for source in sources) > MAX_SHARDS:
        raise ShardError(f"{_shorten(sources)} stands for more than {MAX_SHARDS:,} shards; give fewer, larger ones")
    names: list[str] = []
    for source in sources:
        names += [source] if _names_folder(source) else braceexpand(source)
    return names


def _names_folder(source: str) -> bool:
    return "{" in source and os.path.isdir(os.path.expanduser(source.strip()))


def _shorten(sources: Sequence[str]) -> str:
    text = repr(sources[0] if len(sources) == 1 else list(sources))
    return text if len(text) <= 200 else f"{text[:200]}..."


def count_expansions(pattern: str) -> float:
    """Return how many names braces stand for without making them; infinity for what cannot even be counted.

    Groups are counted from the innermost outwards, each giving way to '\\0COUNT\\0'.

    Raises:
        ShardError: a brace without its partner.
    """
    text = re.sub(r"\\.?", "_", pattern.replace("\0", "_"), flags=re.DOTALL)
    for _ in range(_DEEPEST_BRACES):
        text, found = re.subn(r"\{([^{}]*)\}", lambda group: f"\0{_count_group(group[1])}\0", text)
        if not found:
            break
    if "{" in text or "}" in text:
        raise ShardError(
            f"{_shorten([pattern])} has braces that do not match, or more than {_DEEPEST_BRACES} in one another; write "
            "one that is meant as it is with a backslash before it"
        )
    return _count_product(text)


def _count_group(content: str) -> float:
    for pattern in (_INT_RANGE, _LETTER_RANGE):
        if found := pattern.fullmatch(content):
            if max(len(number or "") for number in found.groups()) > _MOST_DIGITS:
                return math.inf
            first, last = (int(x) if pattern is _INT_RANGE else _letter_place(x) for x in found.groups()[:2])
            return abs(last - first) // (int(found[3] or 1) or 1) + 1
    return sum(_count_product(part) for part in content.split(","))


def _letter_place(letter: str) -> int:
    """Return where braceexpand's alphabet has a letter: capitals before small ones, and nothing between."""
    return ord(letter) - ord("A") if letter.isupper() else ord(letter) - ord("a") + 26


def _count_product(text: str) -> float:
    return math.prod(float(count) for count in text.split("\0")[1::2])
