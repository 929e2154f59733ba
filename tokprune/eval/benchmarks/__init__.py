"""Benchmarks: what a sweep asks a model, and how answers are scored."""

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.benchmarks.load import available_benchmarks, load_benchmark

__all__ = ["Benchmark", "Item", "available_benchmarks", "load_benchmark"]
