"""The embedded benchmark: cluttered scenes made in code, twelve types of question about them."""

from tokprune.eval.benchmarks.mini.benchmark import MiniBenchmark

__all__ = ["MiniBenchmark"]
