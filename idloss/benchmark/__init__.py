"""Speed and memory, side by side with a reference."""

from idloss.benchmark.evaluation import EvaluationCase, benchmark_evaluation, format_evaluation
from idloss.benchmark.loss import LossCase, Timing, benchmark_loss, format_timings

__all__ = [
    "EvaluationCase",
    "LossCase",
    "Timing",
    "benchmark_evaluation",
    "benchmark_loss",
    "format_evaluation",
    "format_timings",
]
