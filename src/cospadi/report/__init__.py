"""What people read: report page, model card, plots, console tables and progress. Takes plain data; imports no torch."""

from cospadi.report.console import (
    print_comparison,
    print_estimate,
    print_evaluation,
    print_inspect,
    print_summary,
)
from cospadi.report.html import write_html
from cospadi.report.model_card import model_card
from cospadi.report.plots import bytes_per_layer, error_per_layer, quality_against_bytes
from cospadi.report.progress import ProgressDisplay
from cospadi.report.write import pages_written, report_json, write_all

__all__ = [
    "ProgressDisplay",
    "bytes_per_layer",
    "error_per_layer",
    "model_card",
    "pages_written",
    "print_comparison",
    "print_estimate",
    "print_evaluation",
    "print_inspect",
    "print_summary",
    "quality_against_bytes",
    "report_json",
    "write_all",
    "write_html",
]
