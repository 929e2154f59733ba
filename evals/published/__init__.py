"""The ledger of published numbers: method × model × benchmark × budget, one file a paper."""

from evals.published.benchmarks import BENCHMARKS, Benchmark, find_benchmark
from evals.published.ledger import (
    Budget,
    Paper,
    Row,
    baseline,
    load_ledger,
    load_paper,
    papers,
    read_paper,
)
from evals.published.models import MODELS, model_key

__all__ = [
    "BENCHMARKS", "MODELS", "Benchmark", "Budget", "Paper", "Row", "baseline", "find_benchmark",
    "load_ledger", "load_paper", "model_key", "papers", "read_paper",
]  # fmt: skip
