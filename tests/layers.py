"""Layer and head of a parameter, told from its name alone: what the package's freeze units must agree with."""

from __future__ import annotations


def layer_of(name: str) -> int | None:
    """Layer of the encoder: 0 embeds patches, i is block i (1-based), None is behind the encoder."""
    first, *rest = name.split(".")
    if first == "blocks":
        return int(rest[0]) + 1
    return 0 if first in ("cls_token", "pos_embed", "patch_embed") else None


def head_of(name: str) -> int | None:
    """Head of LocalMIM; None for what belongs to none."""
    return int(name.split(".")[1]) if name.startswith("heads.") else None
