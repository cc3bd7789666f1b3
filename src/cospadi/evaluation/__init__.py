"""Loading, running and measuring any checkpoint that transformers can load."""

from cospadi.checkpoint import export_dense
from cospadi.evaluation.compare import compare
from cospadi.evaluation.measure import evaluate
from cospadi.evaluation.models import generate, inspect, load, weight_bytes
from cospadi.evaluation.perplexity import Perplexity, perplexity
from cospadi.evaluation.tasks import run_tasks

__all__ = [
    "Perplexity",
    "compare",
    "evaluate",
    "export_dense",
    "generate",
    "inspect",
    "load",
    "perplexity",
    "run_tasks",
    "weight_bytes",
]
