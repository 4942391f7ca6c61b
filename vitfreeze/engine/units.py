"""From the names of a model's parameters to the optimizer's parameter groups, one pair for each freeze unit."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from vitfreeze.architecture import FreezeUnit

log = logging.getLogger(__name__)

# The prefixes of the parameters that each unit owns, first to freeze first.
Units = Mapping[FreezeUnit, Sequence[str]]
REST = FreezeUnit(name="rest")  # what no prefix of a unit matches


@runtime_checkable
class HasFreezeUnits(Protocol):
    """A model that knows its own freeze units."""

    def freeze_units(self) -> Units:
        """Return its units, first to freeze first, each with the prefixes of the parameters that it owns."""


@runtime_checkable
class HasNoWeightDecay(Protocol):
    """A model that names parameters without weight decay, by timm's convention."""

    def no_weight_decay(self) -> Collection[str]:
        """Return names of parameters that have no weight decay beside biases and 1-d ones."""


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """One parameter group: parameters of one unit, in the order in which ZeRO lays them end to end."""

    name: str
    unit: FreezeUnit
    decays: bool
    parameters: tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes
    numel: int

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters, in flat order."""
        return tuple(name for name, _ in self.parameters)


def complete_units(units: Mapping[str, Sequence[str]] | None, *, model: nn.Module) -> Units:
    """Return the freeze units of a model: those given, unit i freezing with layer i, or else the model's own.

    Raises:
        ValueError: no units are given, and the model has none of its own.
    """
    if units is not None:
        return {
            FreezeUnit(name=name, leaves_with=number, layer=number): prefixes
            for number, (name, prefixes) in enumerate(units.items())
        }
    if not isinstance(model, HasFreezeUnits):
        raise ValueError(
            f"{type(model).__name__} has no freeze units of its own: give `units`, a mapping from the name of each "
            "unit to the prefixes of its parameters' names, first to freeze first"
        )
    return model.freeze_units()


def assign_units(names: Collection[str], units: Units) -> dict[str, FreezeUnit]:
    """Return the unit of every parameter; what no prefix matches is in a unit `rest`, which trains to the end.

    A prefix is a whole name or the beginning of one up to a dot, so that `h.1` does not own `h.10.weight`.

    Raises:
        ValueError: a unit has no prefix, a prefix matches nothing, or two units own the same parameter.
    """
    owners: dict[str, FreezeUnit] = {}
    for unit, prefixes in units.items():
        if unit.name == REST.name:
            raise ValueError(f"no unit can be named {REST.name!r}: that is what belongs to none and trains to the end")
        if not prefixes:
            raise ValueError(f"unit {unit.name!r} is empty: give the prefixes of the parameters that it owns")
        for prefix in prefixes:
            owned = [name for name in names if name == prefix or name.startswith(prefix.rstrip(".") + ".")]
            if not owned:
                raise ValueError(f"prefix {prefix!r} of unit {unit.name!r} matches no trainable parameter")
            for name in owned:
                if owners.setdefault(name, unit) != unit:
                    raise ValueError(
                        f"parameter {name!r} belongs to two units: {owners[name].name!r} and {unit.name!r}"
                    )
    return {name: owners.get(name, REST) for name in names}


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names of every trainable parameter, by its first; a tied weight has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(id(parameter), []).append(name)
    return {first: (first, *others) for first, *others in names.values()}


def assign_tied(tied: Mapping[str, Sequence[str]], units: Units) -> dict[str, FreezeUnit]:
    """Return the unit of every parameter: of those that its names belong to, the last that freezes.

    Args:
        tied: all names of every parameter, by its first, as from `tied_names`.
        units: prefixes may match any of the names.

    Raises:
        ValueError: as `assign_units`, or a unit is left with no parameter of its own.
    """
    by_name = assign_units([name for names in tied.values() for name in names], units)
    owners = {first: max((by_name[name] for name in names), key=_end_of_training) for first, names in tied.items()}
    for first, names in tied.items():
        for name in names:
            if by_name[name] != owners[first]:
                other = next(alias for alias in names if by_name[alias] == owners[first])
                log.warning(
                    "%s of unit %r is tied to %s of unit %r, so it trains as long as that; name both in one unit to "
                    "freeze them together",
                    *(name, by_name[name].name, other, owners[first].name),
                )
    for unit in units:
        if unit not in owners.values():
            raise ValueError(
                f"unit {unit.name!r} is empty: all its parameters are tied to those of units that train longer; name "
                "them in one unit to freeze them together"
            )
    return owners


def _end_of_training(unit: FreezeUnit) -> float:
    return math.inf if unit.leaves_with is None else unit.leaves_with


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter has weight decay: not if it is 1-d or a bias (LocalMIM).

    A model names others that have none; LocalMIM decays its class token, fine-tuning does not.
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


def find_frozen_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the largest modules that have parameters, none of which trains."""
    parameters = list(model.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        yield model
        return
    for child in model.children():
        yield from find_frozen_modules(child)


def plan_groups(model: nn.Module, units: Mapping[str, Sequence[str]] | None = None) -> tuple[GroupPlan, ...]:
    """Return the parameter groups of all units, the last to freeze first, `<unit>.decay` before `<unit>.no_decay`.

    The order makes the groups that are dropped next the last of the optimizer.

    Raises:
        ValueError: as `complete_units` and `assign_tied`, or a model's own units leave out a parameter.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    known = complete_units(units, model=model)
    owners = assign_tied(tied_names(model), known)
    if units is None:
        for name, unit in owners.items():
            if unit == REST:
                raise ValueError(f"parameter {name} trains but belongs to no freeze unit of {type(model).__name__}")
    undecayed = set(model.no_weight_decay()) if isinstance(model, HasNoWeightDecay) else set()
    members: dict[tuple[FreezeUnit, bool], list[str]] = {}
    for name, parameter in parameters.items():
        decays = is_decayed(name, parameter) and name not in undecayed
        members.setdefault((owners[name], decays), []).append(name)
    return tuple(
        GroupPlan(
            name=f"{unit.name}.{'decay' if decays else 'no_decay'}",
            unit=unit,
            decays=decays,
            parameters=tuple((name, tuple(parameters[name].shape)) for name in members[unit, decays]),
            numel=sum(parameters[name].numel() for name in members[unit, decays]),
        )
        for unit in (REST, *reversed([*known]))
        for decays in (True, False)
        if (unit, decays) in members
    )
