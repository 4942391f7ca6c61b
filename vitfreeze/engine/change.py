"""How much each layer changed since it was last looked at: what adaptive freezing decides on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vitfreeze.config import check_argument
from vitfreeze.engine.slices import GroupState
from vitfreeze.ranks import Ranks


class ChangeMeter:
    """Relative change of every layer between two readings, the same number on all ranks.

    weight: ||w - w'|| / ||w'|| over the fp32 master weights of the layer, w' those of the reading before; every rank
        keeps its share of them.
    gradient: | ||m|| - ||m'|| | / ||m'||, m being Adam's moving average of the layer's gradients, which stands in for
        the accumulated gradients of AutoFreeze (Liu et al., 2021, section 3.2) and needs no copy of them.
    """

    def __init__(self, measure: str, *, num_layers: int) -> None:
        check_argument("freeze.adaptive_measure", measure, name="measure")
        self.measure = measure
        self.num_layers = num_layers
        self._weights: dict[str, Tensor] = {}
        self._norms: Tensor | None = None

    def read(self, groups: Mapping[str, tuple[int, GroupState]], *, ranks: Ranks) -> tuple[float | None, ...] | None:
        """Return the change of every layer, None for those that have no group; None in all at the first reading.

        `groups` holds, for every group of a layer that trains, that layer and this rank's share of the group. Every
        rank must read at the same step.
        """
        change, size = self._sums(groups, ranks=ranks)
        if change is None:
            return None
        ratios, trained = [float(value) for value in change / size], {layer for layer, _ in groups.values()}
        return tuple(ratios[layer] if layer in trained else None for layer in range(self.num_layers))

    def state(self) -> dict[str, Tensor]:
        """Return what this rank remembers of the last reading; a run that goes on from it measures on."""
        norms = {"norms": self._norms} if self._norms is not None else {}
        return {**{f"weights/{name}": value for name, value in self._weights.items()}, **norms}

    def load_state(self, state: Mapping[str, Tensor], *, device: torch.device) -> None:
        """Remember another reading of as many ranks instead."""
        moved = {name: value.to(device) for name, value in state.items()}
        self._norms = moved.pop("norms", None)
        self._weights = {name.removeprefix("weights/"): value for name, value in moved.items()}

    def _sums(self, groups: Mapping[str, tuple[int, GroupState]], *, ranks: Ranks) -> tuple[Tensor | None, Tensor]:
        squares = torch.zeros(2, self.num_layers, device=ranks.device)
        before, self._weights = self._weights, {}
        for name, (layer, group) in groups.items():
            if self.measure == "gradient":
                squares[1, layer] += group.exp_avg.square().sum()
                continue
            weights = group.master
            self._weights[name] = weights.clone()
            if name in before:
                squares[0, layer] += (weights - before[name]).square().sum()
                squares[1, layer] += before[name].square().sum()
        squares = ranks.sum(squares)
        if self.measure == "weight":
            return (squares[0].sqrt() if before else None), squares[1].sqrt()
        norms, previous = squares[1].sqrt(), self._norms
        self._norms = norms
        return ((norms - previous).abs(), previous) if previous is not None else (None, norms)
