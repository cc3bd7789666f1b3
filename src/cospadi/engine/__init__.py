"""Plan, run, journal: from a recipe to a checkpoint."""

from cospadi.engine.compression import compress
from cospadi.engine.estimation import Estimate, estimate
from cospadi.engine.plan import Plan, PlannedGroup, make_plan
from cospadi.engine.prune_run import PruneResult, prune
from cospadi.engine.run import Result

__all__ = ["Estimate", "Plan", "PlannedGroup", "PruneResult", "Result", "compress", "estimate", "make_plan", "prune"]
