"""Paired differences: their interval, what may be said of them, and Holm's correction for saying several things."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of paired differences, its 95 % t-interval, and the two-sided p-value of its being 0.

    Of one pair there is a mean, and nothing else is known.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p_value: float

    @property
    def verdict(self) -> str:
        """What may be said: better, worse, none (the interval holds 0), or that one pair has no interval."""
        if self.pairs < 2:
            return "one seed"
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "none"


def compare_pairs(values: Sequence[float], controls: Sequence[float]) -> Difference:
    """Return the difference of values and controls that belong together by their place (Student's paired t).

    Raises:
        ValueError: no pairs, or not as many controls as values.
    """
    if not values:
        raise ValueError("there are no pairs to compare")
    differences = [value - control for value, control in zip(values, controls, strict=True)]
    count, mean = len(differences), math.fsum(differences) / len(differences)
    if count < 2:
        return Difference(pairs=count, mean=mean, low=-math.inf, high=math.inf, p_value=1.0)
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    error = math.sqrt(variance / count)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * error
    if error == 0:
        p_value = 1.0 if mean == 0 else 0.0
    else:
        p_value = 2 * stats.t.sf(abs(mean) / error, count - 1)
    return Difference(pairs=count, mean=mean, low=mean - half, high=mean + half, p_value=float(p_value))


def mean_interval(values: Sequence[float]) -> Difference:
    """Return the mean of values and its interval, as of differences from 0."""
    return compare_pairs(values, [0.0] * len(values))


def correct_for_many(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given.

    The smallest is multiplied by the number of claims, the next by one less, and so on; none is smaller than the one
    before it, and none above 1 (Holm, "A simple sequentially rejective multiple test procedure", 1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
