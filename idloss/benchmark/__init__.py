"""Speed and memory, side by side with a reference."""

from idloss.benchmark.evaluation import EvaluationCase, benchmark_evaluation, format_evaluation
from idloss.benchmark.loss import LossCase, Timing, benchmark_loss, format_timings
from idloss.benchmark.search import SearchCase, benchmark_search, format_search

__all__ = [
    "EvaluationCase",
    "LossCase",
    "SearchCase",
    "Timing",
    "benchmark_evaluation",
    "benchmark_loss",
    "benchmark_search",
    "format_evaluation",
    "format_search",
    "format_timings",
]
