"""What has a name in a recipe and is a function or class somewhere: targets of the heads, and freezing policies.

Some come with vitfreeze. Others are registered by installed packages, as entry points of the groups `vitfreeze.targets`
and `vitfreeze.freezing` (packaging.python.org, "Entry points specification"): a recipe names what is installed and can
run no code of its own. A reference is NAME, or NAME@VERSION with the version of the package that registers it; the
settings that a run writes down have the version, so that no other implementation goes on with it. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any, Protocol

from vitfreeze.text import find_nearest

TARGETS, FREEZING = "vitfreeze.targets", "vitfreeze.freezing"
BUILT_IN: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        TARGETS: {"hog": "vitfreeze.model:hog_targets"},
        FREEZING: {
            "linear": "vitfreeze.schedule:linear",
            "squared": "vitfreeze.schedule:squared",
            "cubic": "vitfreeze.schedule:cubic",
        },
    }
)


class FreezingPolicy(Protocol):
    """How long every layer trains. The function itself is registered."""

    def __call__(self, num_layers: int, t_0: float) -> Sequence[float]:
        """Return the share t_i of the steps after the warm-up that each layer trains: rising, in (0, 1], the last 1.

        Args:
            num_layers: layers that freeze, the patch embedding and every block.
            t_0: `freeze.t_0`, in (0, 1].
        """


class ExtensionError(ValueError):
    """A name that nothing is registered by, or something that cannot be loaded; `allowed` says what could be given."""

    def __init__(self, reference: str, allowed: str) -> None:
        super().__init__(f"{reference!r} cannot be used; allowed: {allowed}")
        self.allowed = allowed


def list_names(group: str) -> list[str]:
    """Return the names that a group has, those that come with vitfreeze first."""
    own = BUILT_IN[group]
    return [*own, *sorted({point.name for point in entry_points(group=group)} - set(own))]


def pin_version(group: str, reference: str) -> str:
    """Return NAME for what comes with vitfreeze, and for others NAME@VERSION with the version that is installed.

    Raises:
        ExtensionError: nothing of this name is installed, two packages claim it, or another version is.
    """
    name, _, wanted = reference.partition("@")
    if name in BUILT_IN[group] and not wanted:
        return name
    point = _find(group, name)
    version = point.dist.version if point.dist is not None else ""
    if wanted not in ("", version):
        whose = point.dist.name if point.dist is not None else point.value
        raise ExtensionError(reference, f"{name}@{version}, the version of {whose} that is installed")
    return f"{name}@{version}"


def load_extension(group: str, reference: str) -> Any:
    """Return the function or class of a reference.

    Raises:
        ExtensionError: as `pin_version`, or its module cannot be imported.
    """
    pin_version(group, reference)
    name = reference.partition("@")[0]
    own = BUILT_IN[group].get(name)
    point = EntryPoint(name, own, group) if own else _find(group, name)
    try:
        return point.load()
    except Exception as error:  # whatever somebody's module raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ExtensionError(reference, f"what can be imported; {point.value} cannot ({reason})") from error


def _find(group: str, name: str) -> EntryPoint:
    found = {point.value: point for point in entry_points(group=group, name=name)}
    if len(found) == 1 and name not in BUILT_IN[group]:
        return next(iter(found.values()))
    if len(found) > 1:
        raise ExtensionError(
            name, f"a name that one package registers, and {name} is registered by {' and '.join(found)}"
        )
    known = list_names(group)
    nearest = find_nearest(name, known)
    raise ExtensionError(name, f"one of {', '.join(known)}" + (f"; did you mean {nearest!r}?" if nearest else ""))


def make_target(reference: str) -> Any:
    """Return the `vitfreeze.model.Target` of `model.target`; None for HOG, which the model makes itself, its biases
    being weights.

    Raises:
        ExtensionError: it cannot be loaded.
    """
    return None if reference == "hog" else load_extension(TARGETS, reference)()


def count_outputs(reference: str) -> int | None:
    """Return how many numbers of a cell a target has; None for HOG, whose bins are a setting."""
    target = make_target(reference)
    return None if target is None else int(target.num_outputs)
