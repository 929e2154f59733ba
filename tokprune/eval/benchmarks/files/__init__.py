"""Benchmarks from files of questions, in the shapes that people have."""

from tokprune.eval.benchmarks.files.benchmark import FileBenchmark, FileItem
from tokprune.eval.benchmarks.files.containers import SUFFIXES
from tokprune.eval.benchmarks.files.shapes import SHAPES

__all__ = ["SHAPES", "SUFFIXES", "FileBenchmark", "FileItem"]
