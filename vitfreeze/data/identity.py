"""Which data a run has: what its checkpoints remember of the shards, and how other shards are told from them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from vitfreeze.data.addresses import Kind, cut_query, read_address
from vitfreeze.data.errors import ShardError

_PIECES, _PIECE_BYTES = 4, 4096
_READERS = 16  # reads of a network disk wait for one another, not for this machine
_SHOWN = 3


class ShardIdentity(NamedTuple):
    """What tells a shard from another one; the folder does not count, because data may be moved.

    name: of the file.
    samples: that it is said to hold.
    size: bytes; -1 of a shard that would have to be fetched.
    fingerprint: of four pieces of 4 KiB, spread evenly from the first byte to the last; of all bytes of a file that is
        not larger. Empty where size is -1.
    """

    name: str
    samples: int
    size: int
    fingerprint: str


def identify_shards(names: Sequence[str], lengths: Iterable[int]) -> list[ShardIdentity]:
    """Return what tells each shard from others, in their order; 16 KiB of each are read.

    Raises:
        ShardError: a shard cannot be read.
    """
    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(_identify, names, lengths))


def _identify(name: str, samples: int) -> ShardIdentity:
    address = read_address(name, allow_pipe=True)  # nothing is opened but files
    if address.kind is not Kind.FILE:
        return ShardIdentity(cut_query(address.name).rpartition("/")[2], samples, -1, "")
    digest = hashlib.sha256()
    try:
        with open(address.target, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            last = max(size - _PIECE_BYTES, 0)
            for start in sorted({last * piece // (_PIECES - 1) for piece in range(_PIECES)}):
                digest.update(os.pread(file.fileno(), _PIECE_BYTES, start))
    except OSError as error:
        raise ShardError(f"shard {address.target} cannot be read ({error.strerror})") from error
    return ShardIdentity(os.path.basename(address.target), samples, size, digest.hexdigest()[:16])


def describe_difference(before: Sequence[Sequence[Any]], now: Sequence[ShardIdentity]) -> str:
    """Return in words how the shards of a run differ from those that it had; empty if they do not.

    Sizes and contents count where both are known: what lies on this disk now may have been fetched from afar before.
    """
    then = [ShardIdentity(*shard) for shard in before]
    if len(then) != len(now):
        return f"{_count(then)} before, {_count(now)} now{_name_strangers(then, now)}"
    changes = [change for old, new in zip(then, now, strict=True) if (change := _describe_change(old, new))]
    if not changes:
        return ""
    if sorted(then) == sorted(now):
        return f"the same {len(now)} shards in another order"
    more = f" and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return f"{len(changes)} of {len(now)} shards differ: {'; '.join(changes[:_SHOWN])}{more}"


def _describe_change(old: ShardIdentity, new: ShardIdentity) -> str:
    if old.name != new.name:
        return f"{old.name} before, {new.name} now"
    if old.samples != new.samples:
        return f"{old.name} with {old.samples} samples before, {new.samples} now"
    if -1 in (old.size, new.size):
        return ""
    if old.size != new.size:
        return f"{old.name} with {old.size:,} bytes before, {new.size:,} now"
    return f"{old.name} with other content" if old.fingerprint != new.fingerprint else ""


def _count(shards: Sequence[ShardIdentity]) -> str:
    return f"{len(shards)} shards of {sum(shard.samples for shard in shards)} samples"


def _name_strangers(then: Sequence[ShardIdentity], now: Sequence[ShardIdentity]) -> str:
    old, new = ({shard.name for shard in shards} for shards in (then, now))
    parts = [(names, word) for names, word in ((sorted(old - new), "gone"), (sorted(new - old), "new")) if names]
    return "".join(f"; {word}: {', '.join(names[:_SHOWN])}{' ...' * (len(names) > _SHOWN)}" for names, word in parts)
