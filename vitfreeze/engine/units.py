"""From the names of a model's parameters to the optimizer's parameter groups, one pair for each freeze unit."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from vitfreeze.model import Classifier, LocalMIM
from vitfreeze.schedule import FreezeUnit, freeze_units

FreezableModel = LocalMIM | Classifier
# A fine-tuned model's norm behind the pooling and its classifier train to the end.
CLASSIFIER = FreezeUnit(name="classifier", leaves_with=None)


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


def is_trained(unit: FreezeUnit, *, frozen_layers: int) -> bool:
    """Tell whether a unit still trains when the first `frozen_layers` layers are frozen."""
    return unit.leaves_with is None or frozen_layers <= unit.leaves_with


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Tell whether a parameter has weight decay: not if it is 1-d or a bias (LocalMIM).

    A model names others that have none; LocalMIM decays its class token, fine-tuning does not.
    """
    return parameter.ndim > 1 and not name.endswith(".bias")


def unit_name(parameter_name: str, *, model: FreezableModel) -> str:
    """Return the name of the freeze unit that a parameter of the model belongs to.

    Raises:
        ValueError: it belongs neither to an encoder layer nor to a head.
    """
    layer, head = model.layer_of(parameter_name), model.head_of(parameter_name)
    if layer is not None:
        if parameter_name == "cls_token" and not model.freeze_cls_token:
            return "cls_token"
        if parameter_name.startswith("patch_embed.") and not model.freeze_patch_embed:
            return "patch_embed"
        return f"layer_{layer:02d}"
    if head is None and isinstance(model, Classifier):
        return CLASSIFIER.name
    if head is None:
        raise ValueError(f"parameter {parameter_name} trains but belongs to no encoder layer and to no head")
    return f"head_{head}"


def plan_groups(model: FreezableModel) -> tuple[GroupPlan, ...]:
    """Return the parameter groups of all units, the last to freeze first, `<unit>.decay` before `<unit>.no_decay`.

    The order makes the groups that are dropped next the last of the optimizer.

    Raises:
        ValueError: a trainable parameter belongs to no freeze unit.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    freezing = freeze_units(model.depth, cls_token=model.freeze_cls_token, patch_embed=model.freeze_patch_embed)
    units = {unit.name: unit for unit in (CLASSIFIER, *freezing)}
    members: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in parameters.items():
        decays = is_decayed(name, parameter) and name not in model.no_weight_decay()
        key = (unit_name(name, model=model), decays)
        members.setdefault(key, []).append(name)
    unknown = {unit for unit, _ in members} - set(units)
    if unknown:
        raise ValueError(f"an encoder of depth {model.depth} has no freeze unit {', '.join(sorted(unknown))}")
    return tuple(
        GroupPlan(
            name=f"{unit.name}.{'decay' if decays else 'no_decay'}",
            unit=unit,
            decays=decays,
            parameters=tuple((name, tuple(parameters[name].shape)) for name in members[unit.name, decays]),
            numel=sum(parameters[name].numel() for name in members[unit.name, decays]),
        )
        for unit in units.values()
        for decays in (True, False)
        if (unit.name, decays) in members
    )
