"""What a step asks of a GPU, counted on a CPU: kernels, waits of the host, collectives, bytes.

A launch is an operation that torch dispatches, without those in `NOT_COUNTED`: views of memory, allocations, marks for
the profiler. What only a CPU does is told apart: the check that images are finite, and HOG's targets, in whose place
the GPU's way to them is counted: its kernels on bytes or, where they do not serve, the plain version. Matrix products
and attention are counted and not computed, so that every precision and size can be counted in seconds; nothing in a
step hangs on their values.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vitfreeze.architecture import active_heads
from vitfreeze.bench.step import choose_prefixes
from vitfreeze.bench.timing import start_engine
from vitfreeze.config import Config
from vitfreeze.engine import FreezingEngine
from vitfreeze.engine.counting import count_on_cpu
from vitfreeze.model import hog
from vitfreeze.model.targets import find_obstacle
from vitfreeze.text import format_bytes, format_table

PHASES = ("forward", "backward", "optimizer")
NOT_COUNTED: Mapping[str, str] = {
    "views": "whatever returns a view of its argument, and _unsafe_view",
    "allocations": "empty, empty_like, empty_strided, new_empty, new_empty_strided, resize_, set_",
    "marks": "everything in profiler::, and is_pinned, is_same_size",
    "host": "lift_fresh: what torch.tensor makes on the host; as a copy to the device it counts as a wait",
}
_ALLOCATIONS = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"))
_FREE = _ALLOCATIONS | {"_unsafe_view", "lift_fresh", "is_pinned", "is_same_size"}
_WAITS = frozenset(("_local_scalar_dense", "equal", "nonzero", "masked_select"))  # the host needs their result
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm"))
_COPIES = frozenset(("copy_", "_to_copy", "clone", "cat", "stack", "fill_", "zero_", "zeros", "zeros_like"))
_PLAIN_HOG = inspect.unwrap(hog.hog_targets).__code__
_CPU_ONLY = frozenset((hog.check_images.__code__, hog.histogram_by_scatter.__code__))
_HOG = frozenset((_PLAIN_HOG, hog.histogram_by_comparison.__code__))


@dataclass(kw_only=True)
class PhaseCount:
    """What one phase of a step asks for; bytes are those that elementwise operations and copies read and write."""

    launches: int = 0
    cpu_only: int = 0  # not part of the launches
    collectives: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)  # of the host for the device, with the line that waits
    bytes: int = 0
    operations: dict[str, int] = field(default_factory=dict)  # the launches by name


@dataclass(frozen=True, kw_only=True)
class LaunchRow:
    """A step with so many frozen layers; the targets are part of the forward pass."""

    frozen_layers: int
    phases: dict[str, PhaseCount]
    targets: PhaseCount
    launches: int  # the sums over the phases
    waits: int
    collectives: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class LaunchCount:
    """The rows, and what was counted."""

    recipe: str
    model: str
    zero_stage: int
    precision: str
    micro_batch: int
    has_hog_kernel: bool
    not_counted: Mapping[str, str]
    rows: tuple[LaunchRow, ...]


class _Launches(TorchDispatchMode):
    """Adds every dispatched operation to a phase, and to the targets if it belongs to them."""

    def __init__(self, phase: PhaseCount, targets: PhaseCount, *, has_hog_kernel: bool = False) -> None:
        super().__init__()
        self.phase, self.targets = phase, targets
        self.cpu_only = _CPU_ONLY | {_PLAIN_HOG} if has_hog_kernel else _CPU_ONLY

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        output = _skip_product(name, args) if name in _PRODUCTS else func(*args, **(kwargs or {}))
        codes = _codes()
        for count in (self.phase, self.targets) if codes & _HOG else (self.phase,):
            if codes & self.cpu_only:
                count.cpu_only += namespace != "profiler" and not _is_free(func, name)
            elif namespace in ("c10d", "_c10d_functional"):
                _add(count.collectives, name.strip("_"))
            elif name in _WAITS:
                _add(count.waits, f"{name} in {_find_caller()}")
            elif namespace != "profiler" and not _is_free(func, name):
                count.launches += 1
                _add(count.operations, name)
                count.bytes += _moved_bytes(func, name, args, output)
        return output


class _HostCopies(TorchFunctionMode):
    """Notes copies between host and device for which the host waits, which a CPU does not dispatch."""

    def __init__(self, phase: PhaseCount) -> None:
        super().__init__()
        self.phase = phase

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_device = func in (torch.tensor, torch.as_tensor) and "device" in kwargs
        to_host = func in (Tensor.cpu, Tensor.tolist, Tensor.numpy) or (
            # a CPU asked for by name: a device that came in a variable is the accelerator where there is one
            func is Tensor.to and "cpu" in args[1:2] and not kwargs.get("non_blocking")
        )
        if (to_device or to_host) and not _codes() & _CPU_ONLY:
            _add(self.phase.waits, f"{getattr(func, '__name__', func)} in {_find_caller()}")
        return func(*args, **kwargs)


def _add(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1


def _skip_product(name: str, args: Sequence[Any]) -> Tensor:
    left, right = args[-2:]
    return left.new_zeros(*left.shape[:-1], right.shape[-1])


def _codes() -> set[Any]:
    frame, codes = sys._getframe(1), set()
    while frame is not None:
        codes.add(frame.f_code)
        frame = frame.f_back  # type: ignore[assignment]
    return codes


def _find_caller() -> str:
    """Return file and line of the nearest function outside torch and this module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _is_free(func: Any, name: str) -> bool:
    returns = func._schema.returns
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return name in _FREE or is_view


def _moved_bytes(func: Any, name: str, args: Any, output: Any) -> int:
    if not (name in _COPIES or name.startswith(("_foreach", "_fused")) or torch.Tag.pointwise in func.tags):
        return 0
    return sum(leaf.nbytes for leaf in tree_leaves((args, output)) if isinstance(leaf, Tensor))


def count_launches(config: Config, *, frozen_layers: Sequence[int] | None = None, images: int = 2) -> LaunchCount:
    """Count the steps of a recipe's engine on one rank, each of one micro-batch.

    Counts depend on the recipe's depth and precision, not on `images` or widths, so that `model.embed_dim` may be made
    small; bytes depend on all of them.

    Args:
        config: the run; its data is not read, images are random.
        frozen_layers: lengths of the prefix; nothing and all blocks by default.
        images: of the micro-batch.

    Raises:
        ConfigError: a setting cannot be used.
        ValueError: a length that does not exist.
    """
    depth = config.model.resolve().depth
    prefixes = choose_prefixes([0, depth] if frozen_layers is None else frozen_layers, depth=depth)
    waits: list[str] = []
    count_on_cpu(lambda: waits.append(f"synchronize in {_find_caller()}"))
    few = replace(config.batch, global_size=images, micro_size=images)
    engine, random_images = start_engine(replace(config, batch=few), rounds=1)
    obstacle = find_obstacle(engine.module.cell_sizes)
    rows = tuple(_count_step(engine, random_images, k, waits, has_hog_kernel=obstacle is None) for k in prefixes)
    return LaunchCount(
        recipe=config.recipe,
        model=config.model.size,
        zero_stage=engine.settings.stage,
        precision=engine.settings.precision,
        micro_batch=images,
        has_hog_kernel=obstacle is None,
        not_counted=NOT_COUNTED,
        rows=rows,
    )


def _count_step(
    engine: FreezingEngine, images: Tensor, frozen_layers: int, waits: list[str], *, has_hog_kernel: bool
) -> LaunchRow:
    engine.freeze(frozen_layers, step=frozen_layers)
    noise = torch.rand(len(images), engine.module.num_patches)

    @contextmanager
    def counting(name: str) -> Iterator[None]:
        waits.clear()
        with _HostCopies(phases[name]), _Launches(phases[name], targets, has_hog_kernel=has_hog_kernel):
            yield
        for what in waits:
            _add(phases[name].waits, what)

    for _ in range(2):  # the first step fills caches, and is not counted
        phases, targets = {name: PhaseCount() for name in PHASES}, PhaseCount()
        with counting("forward"):
            loss = engine(images, noise=noise).loss
            if not has_hog_kernel:
                _count_histogram(engine, images)
        with counting("backward"):
            engine.backward(loss)
        with counting("optimizer"):
            engine.step()
    if has_hog_kernel:
        _count_hog_kernel(engine, images, (phases["forward"], targets))
    counts = phases.values()
    return LaunchRow(
        frozen_layers=frozen_layers,
        phases=phases,
        targets=targets,
        launches=sum(count.launches for count in counts),
        waits=sum(sum(count.waits.values()) for count in counts),
        collectives=sum(sum(count.collectives.values()) for count in counts),
        bytes=sum(count.bytes for count in counts),
    )


def _count_histogram(engine: FreezingEngine, images: Tensor) -> None:
    """Do what an accelerator does in place of the CPU's way to the histograms."""
    model = engine.module
    cells = [model.cell_sizes[k] for k in active_heads(model.units, engine.frozen_layers)]
    planes = images.new_zeros(3 * len(images), *images.shape[-2:])
    hog.histogram_by_comparison(planes, planes, cell_size=math.gcd(*cells), nbins=model.hog_nbins)


def _count_hog_kernel(engine: FreezingEngine, images: Tensor, counts: Sequence[PhaseCount]) -> None:
    """Add the kernels that make targets of bytes."""
    from vitfreeze.model.hog_kernel import plan_launches

    model = engine.module
    launches, _ = plan_launches(
        torch.empty(images.shape, dtype=torch.uint8, device="meta"),
        cell_sizes=[model.cell_sizes[k] for k in active_heads(model.units, engine.frozen_layers)],
        nbins=model.hog_nbins,
        bias=model.hog_bias,
        table=torch.empty(3, 256, device="meta"),
    )
    for launch in launches:
        for count in counts:
            count.launches += 1
            count.bytes += launch.num_bytes
            _add(count.operations, launch.kernel.__name__)


def format_launch_count(result: LaunchCount) -> str:
    """Return the result as tables: launches by phase, and the lines that make the host wait."""
    head = [
        f"{result.recipe}: {result.model}, one rank, ZeRO stage {result.zero_stage}, {result.precision}, "
        f"one micro-batch a step; bytes are those of {result.micro_batch} images",
        "HOG targets are made "
        + ("by kernels of their own" if result.has_hog_kernel else "without a kernel of their own"),
        *(f"not counted: {what}: {which}" for what, which in result.not_counted.items()),
    ]
    rows = [["frozen", *PHASES, "launches", "of them HOG", "only on a CPU", "collectives", "host waits", "moved"]]
    rows[0].append("by HOG")
    for row in result.rows:
        cells = [str(row.frozen_layers), *(str(row.phases[name].launches) for name in PHASES), str(row.launches)]
        cells += [str(row.targets.launches), str(sum(phase.cpu_only for phase in row.phases.values()))]
        rows.append(
            [*cells, str(row.collectives), str(row.waits), format_bytes(row.bytes), format_bytes(row.targets.bytes)]
        )
    waits = [
        f"{row.frozen_layers} frozen, {name}: {count} x {what}"
        for row in result.rows
        for name, phase in row.phases.items()
        for what, count in phase.waits.items()
    ]
    return "\n".join([*head, "", format_table(rows), "", *(waits or ["no host wait"])])
