"""Benchmarks: what a sweep asks a model, and how answers are scored."""

from evals.base import Benchmark, Item, available_benchmarks, load_benchmark

__all__ = ["Benchmark", "Item", "available_benchmarks", "load_benchmark"]
