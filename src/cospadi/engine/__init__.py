"""Plan, run, journal: from a recipe to a checkpoint."""

from cospadi.engine.plan import Estimate, Plan, PlannedGroup, estimate, make_plan
from cospadi.engine.run import Result, compress

__all__ = ["Estimate", "Plan", "PlannedGroup", "Result", "compress", "estimate", "make_plan"]
