"""What freezing will save, before training; and what it did save, after."""

from vitfreeze.planner.comparison import Comparison, compare_run, compare_with_measurement, is_comparable, quartiles
from vitfreeze.planner.costs import ClassifierCosts, EncoderCosts, ModelCosts, costs_of
from vitfreeze.planner.growth import fit_micro_batch
from vitfreeze.planner.measured import StepTimes, read_step_times
from vitfreeze.planner.prediction import Plan, Stage, plan
from vitfreeze.planner.targets import solve_targets
from vitfreeze.planner.text import (
    format_comparison,
    format_plan,
    format_plans_side_by_side,
    format_targets,
    name_stages,
    scaling_efficiency,
)

__all__ = [
    "ClassifierCosts",
    "Comparison",
    "EncoderCosts",
    "ModelCosts",
    "Plan",
    "Stage",
    "StepTimes",
    "compare_run",
    "compare_with_measurement",
    "costs_of",
    "fit_micro_batch",
    "format_comparison",
    "format_plan",
    "format_plans_side_by_side",
    "format_targets",
    "is_comparable",
    "name_stages",
    "plan",
    "quartiles",
    "read_step_times",
    "scaling_efficiency",
    "solve_targets",
]
