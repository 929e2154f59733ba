"""Benchmarks by name, or from files."""

from __future__ import annotations

from pathlib import Path

from tokprune.errors import did_you_mean
from tokprune.eval.benchmarks.base import Benchmark


def available_benchmarks() -> tuple[str, ...]:
    """Names that :func:`load_benchmark` knows, files aside."""
    return ("mini", "mini-video")


def load_benchmark(name: str | Path) -> Benchmark:
    """A benchmark by name, or from a ``.jsonl`` or ``.parquet`` file of items.

    Raises:
        ValueError: unknown name, or a file that does not hold items (says which line and field).
        OSError: unreadable file.
    """
    path = Path(name)
    if path.suffix.lower() in (".jsonl", ".parquet"):
        from tokprune.eval.benchmarks.files import FileBenchmark

        return FileBenchmark(path)
    if str(name) == "mini":
        from tokprune.eval.benchmarks.mini import MiniBenchmark

        return MiniBenchmark()
    if str(name) == "mini-video":
        from tokprune.eval.benchmarks.mini_video import MiniVideoBenchmark

        return MiniVideoBenchmark()
    hint = did_you_mean(name, available_benchmarks())
    raise ValueError(
        f"benchmark {str(name)!r} is unknown; known: {', '.join(available_benchmarks())}, or a "
        f".jsonl or .parquet file.{hint}"
    )
