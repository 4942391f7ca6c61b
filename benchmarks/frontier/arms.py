"""The arms of the study: what is pre-trained, and what share of the budget it may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from benchmarks.frontier.errors import InputError

STOP_GRID = 10  # a run that is stopped early is stopped after a whole number of tenths, where it is saved


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to pre-train.

    Attributes:
        recipe: recipe of vitfreeze that it follows.
        tuned_as: kind whose learning rate it takes.
        words: what it is, in words.
        settings: what it changes in its recipe.
        small_first: whether the run begins with small images: sizes and shares are those of the study's size.
        stopped: whether it is the plain run of the whole budget, stopped before its rate has decayed.
        unfrozen: kind that does all but the freezing, against which freezing is credited; of others it is plain.
    """

    recipe: str
    tuned_as: str
    words: str
    settings: Mapping[str, str] = field(default_factory=dict)
    small_first: bool = False
    stopped: bool = False
    unfrozen: str = "plain"


_GLOBAL = {"freeze.rates": "global"}
_STABLE = {"freeze.rates": "stable"}
_WSD = {"optim.schedule": "wsd"}
_LATE = _STABLE | _WSD | {"freeze.t_0": "0.9", "freeze.decay": "10%"}
_HALF_DECODED = {"curriculum.decoded_share": "[[0, 0.5]]"}
KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "plain": Kind(recipe="off", tuned_as="plain", words="plain LocalMIM, rate decayed"),
        "stopped": Kind(recipe="off", tuned_as="plain", words="plain LocalMIM, stopped undecayed", stopped=True),
        "paper": Kind(recipe="paper", tuned_as="paper", words="frozen: t_0 0.8, cubic, scaled rates"),
        "unscaled": Kind(recipe="unscaled", tuned_as="plain", words="frozen: t_0 0.8, cubic, unscaled rates"),
        "t09": Kind(recipe="t09", tuned_as="paper", words="frozen: t_0 0.9, cubic, scaled rates"),
        "global": Kind(
            recipe="unscaled", tuned_as="plain", words="frozen: t_0 0.8, cubic, one cosine for all", settings=_GLOBAL
        ),
        "stable": Kind(
            recipe="unscaled", tuned_as="plain", words="frozen: t_0 0.8, cubic, stable rates", settings=_STABLE,
            unfrozen="wsd",
        ),
        "stable_wsd": Kind(
            recipe="unscaled", tuned_as="plain", words="frozen: t_0 0.8, cubic, stable rates, heads level",
            settings=_STABLE | _WSD, unfrozen="wsd",
        ),
        "stable_t09": Kind(
            recipe="unscaled", tuned_as="plain", words="frozen: t_0 0.9, cubic, stable rates",
            settings=_STABLE | {"freeze.t_0": "0.9"}, unfrozen="wsd",
        ),
        "late": Kind(
            recipe="unscaled", tuned_as="plain", settings=_LATE, unfrozen="wsd",
            words="frozen: t_0 0.9, cubic, stable rates, twice their decay, heads level",
        ),
        "small_late": Kind(
            recipe="unscaled", tuned_as="plain", words="small images first, frozen as `late`", settings=_LATE,
            small_first=True, unfrozen="small_wsd",
        ),
        "wsd": Kind(
            recipe="off", tuned_as="plain", words="not frozen; warm-up, level, decay over the last tenth", settings=_WSD
        ),
        "small_wsd": Kind(
            recipe="off", tuned_as="plain", words="small images first, not frozen; warm-up, level, decay",
            settings=_WSD, small_first=True,
        ),
        "small": Kind(recipe="off", tuned_as="plain", words="small images first, not frozen", small_first=True),
        "small_global": Kind(
            recipe="unscaled", tuned_as="plain", words="small images first, frozen as `global`", settings=_GLOBAL,
            small_first=True, unfrozen="small",
        ),
        "small_stable": Kind(
            recipe="unscaled", tuned_as="plain", words="small images first, frozen as `stable`", settings=_STABLE,
            small_first=True, unfrozen="small_wsd",
        ),
        "half_decoded": Kind(
            recipe="off", tuned_as="plain", words="half of the masked patches decoded, not frozen",
            settings=_HALF_DECODED,
        ),
        "half_decoded_global": Kind(
            recipe="unscaled", tuned_as="plain", words="half of the masked patches decoded, frozen as `global`",
            settings=_GLOBAL | _HALF_DECODED, unfrozen="half_decoded",
        ),
    }
)  # fmt: skip
# {Full size, small first} x {not frozen, frozen late}, all at level rates; the paper; the frontier.
DEFAULT_ARMS = "plain,wsd,late,small_wsd,small_late,paper,plain-0.7,stopped-0.7"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: a kind, and the share of the budget that its pre-training costs by the planner's count."""

    kind_name: str
    share: float = 1.0

    @property
    def name(self) -> str:
        """The arm as it is written on the command line."""
        return self.kind_name if self.share == 1 else f"{self.kind_name}-{self.share:g}"

    @property
    def kind(self) -> Kind:
        """How it is pre-trained."""
        return KINDS[self.kind_name]

    @property
    def words(self) -> str:
        """What it is, in words."""
        return self.kind.words if self.share == 1 else f"{self.kind.words}, {self.share:g} of the budget"


def parse_arm(text: str) -> Arm:
    """Read an arm: a kind such as 'paper', or a kind with its share of the budget such as 'plain-0.7'.

    Raises:
        InputError: an unknown kind, or a share that it cannot have.
    """
    kind_name, dash, share_text = text.strip().partition("-")
    if kind_name not in KINDS:
        raise InputError(f"the arm {text!r} is not known; there are {', '.join(KINDS)}, each with or without -SHARE")
    if not dash:
        share = 1.0
    else:
        try:
            share = float(share_text)
        except ValueError:
            raise InputError(f"the arm {text!r} must end in a share of the budget, as in plain-0.7") from None
    if not 0 < share <= 1:
        raise InputError(f"the arm {text!r} has a share of {share:g}; allowed: above 0, at most 1")
    arm = Arm(kind_name=kind_name, share=share)
    if arm.kind.stopped and (share == 1 or abs(share * STOP_GRID - round(share * STOP_GRID)) > 1e-9):
        raise InputError(f"the arm {text!r} is stopped early: it needs a share of 0.1, 0.2, ... or 0.9")
    return arm


def parse_arms(text: str) -> tuple[Arm, ...]:
    """Read arms separated by commas; raises InputError as `parse_arm`, and for one that is given twice."""
    arms = tuple(parse_arm(word) for word in text.split(","))
    names = [arm.name for arm in arms]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"--arms names {twice} twice")
    return arms
