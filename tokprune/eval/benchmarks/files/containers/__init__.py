"""Files of questions as entries (columns by name), one at a time and by number."""

from __future__ import annotations

from pathlib import Path

from tokprune.eval.benchmarks.files.containers.base import STORED, Container, parse_json
from tokprune.eval.benchmarks.files.containers.json_lines import JsonLines
from tokprune.eval.benchmarks.files.containers.json_list import JsonList
from tokprune.eval.benchmarks.files.containers.parquet import Parquet
from tokprune.eval.benchmarks.files.containers.table import Table

__all__ = ["STORED", "SUFFIXES", "Container", "open_container", "parse_json"]

_BY_SUFFIX: dict[str, type[Container]] = {
    ".jsonl": JsonLines, ".parquet": Parquet, ".json": JsonList, ".tsv": Table,
}  # fmt: skip
#: of the files that can be read
SUFFIXES = tuple(_BY_SUFFIX)


def open_container(path: Path, what: str) -> Container:
    """A file of entries. ``what``: what the user calls it.

    Raises:
        ValueError: another kind of file.
        OSError: no such file.
    """
    container = _BY_SUFFIX.get(path.suffix.lower())
    if container is None:
        raise ValueError(
            f"{what} {path}: should be a .jsonl or .parquet file, or a .json or .tsv file"
        )
    if not path.is_file():
        kind = "is a folder; it should be a file" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{what} {path}: {kind}")
    return container(path)
