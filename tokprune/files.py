"""Text files that people and other programs write: read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, what: str = "") -> Any:
    """The value of a JSON file.

    Args:
        path: the file.
        what: comes before its name in errors: ``"setting"``.

    Raises:
        OSError: it cannot be read.
        ValueError: not UTF-8, not JSON, or nested deeper than can be read; names the file.
    """
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{what} {path}: not valid JSON ({error})".lstrip()) from None


def parse_json(text: str | bytes) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: not UTF-8, not JSON, or nested deeper than can be read.
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path, what: str = "") -> dict[str, Any]:
    """The same of a file that holds a JSON object.

    Raises:
        OSError, ValueError: as :func:`read_json`; or it holds something else.
    """
    value = read_json(path, what)
    if not isinstance(value, dict):
        where = f"{what} {path}".lstrip()
        raise ValueError(f"{where}: should be a JSON object, is {type(value).__name__}")
    return value
