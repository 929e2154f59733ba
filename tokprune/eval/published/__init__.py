"""The ledger of published numbers: method × model × benchmark × budget, one file a paper."""

from tokprune.eval.published.benchmarks import BENCHMARKS, Benchmark, find_benchmark
from tokprune.eval.published.ledger import (
    Budget,
    Paper,
    Row,
    baseline,
    differing,
    load_ledger,
    load_paper,
    papers,
    read_paper,
    spread,
)
from tokprune.eval.published.models import MODELS, model_key

__all__ = [
    "BENCHMARKS", "MODELS", "Benchmark", "Budget", "Paper", "Row", "baseline", "differing",
    "find_benchmark", "load_ledger", "load_paper", "model_key", "papers", "read_paper", "spread",
]  # fmt: skip
