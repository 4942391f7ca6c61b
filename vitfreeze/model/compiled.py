"""How parts of a model are compiled: each by itself, one graph for each shape and each way in which it runs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)
# Three for each shape: a block that trains, the first above the frozen prefix, and one within it; so this is enough for
# 21 shapes. torch's own limit is 8, beyond which blocks run as if they were not compiled, and hardly a word is said.
MOST_GRAPHS = 64


def compile_each(parts: Iterable[nn.Module], **options: Any) -> None:
    """Compile modules in place; options are those of `torch.compile`.

    A micro-batch or a stage of the curriculum of another shape gets graphs of its own, which are the fastest.
    """
    logger.info("model.compile: steps of a new shape wait for the compiler, on a CPU for minutes; false does without")
    options.setdefault("dynamic", False)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options.setdefault("recompile_limit", MOST_GRAPHS)
    else:  # an older torch is told for the whole process
        torch._dynamo.config.recompile_limit = max(MOST_GRAPHS, torch._dynamo.config.recompile_limit)
    for part in parts:
        part.compile(**options)
