"""Benchmarks by name, or from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokprune.errors import did_you_mean
from tokprune.eval.benchmarks.base import Benchmark

#: arguments of :func:`load_benchmark` that are for files, which are settings of a sweep as well
FILE_OPTIONS = ("images", "answers", "shape", "scoring", "prompt_suffix")


def available_benchmarks() -> tuple[str, ...]:
    """Names that :func:`load_benchmark` knows, files aside."""
    return ("mini", "mini-video")


def load_benchmark(name: str | Path, **options: Any) -> Benchmark:
    """A benchmark by name, or from a file of questions.

    Args:
        name: one of :func:`available_benchmarks`, or a ``.jsonl``, ``.parquet``, ``.json`` or
            ``.tsv`` file.
        **options: for files, as for :class:`tokprune.eval.benchmarks.files.FileBenchmark`; None
            stands for what is usual.

    Raises:
        ValueError: unknown name, a file that does not hold questions (says which line and field),
            or an option for files where there is none.
        OSError: unreadable file.
    """
    from tokprune.eval.benchmarks.files import SUFFIXES, FileBenchmark

    given = {option: value for option, value in options.items() if value is not None}
    path = Path(name)
    if path.suffix.lower() in SUFFIXES:
        return FileBenchmark(path, **given)
    if str(name) not in available_benchmarks():
        hint = did_you_mean(name, available_benchmarks())
        raise ValueError(
            f"benchmark {str(name)!r} is unknown; known: {', '.join(available_benchmarks())}, or a "
            f".jsonl or .parquet file, or a .json or .tsv file of questions.{hint}"
        )
    given.pop("lazy", None)
    for option, value in given.items():
        raise ValueError(f"{option}={value!r} is for files of questions, not benchmark {name}")
    if str(name) == "mini":
        from tokprune.eval.benchmarks.mini import MiniBenchmark

        return MiniBenchmark()
    from tokprune.eval.benchmarks.mini_video import MiniVideoBenchmark

    return MiniVideoBenchmark()
