"""The embedded video task: short clips made in code, five types of question about what happens."""

from tokprune.eval.benchmarks.mini_video.benchmark import MiniVideoBenchmark

__all__ = ["MiniVideoBenchmark"]
