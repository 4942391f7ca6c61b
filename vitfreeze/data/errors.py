"""What the input pipeline raises."""

from __future__ import annotations


class ShardError(ValueError):
    """A shard, or the list of them, cannot be used; one sentence names it and says what is wrong.

    Attributes:
        of_one_rank: whether it was met in what this rank alone reads, so that no other rank can tell of it.
    """

    of_one_rank = False


class BadSampleError(ValueError):
    """One sample cannot be used; the message says why in a few words."""
