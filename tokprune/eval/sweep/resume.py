"""Whether a run folder belongs to this sweep, and what of it can be used again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokprune.eval.sweep.results import RUN_FILE, read_object
from tokprune.eval.sweep.schema import SCHEMA, check_run
from tokprune.eval.sweep.settings import Settings

#: settings that decide which rows belong together; methods, budgets and seeds may be added
_SAME = ("tasks", "split", "limit", "match", "batch_size", "max_new_tokens", "calibrate")
#: of the harness entry: the arguments of lmms-eval; its version is part of the code's hash
_SAME_HARNESS = ("name", "base", "model_args")

_WAYS_OUT = "choose another --out, or start over with --fresh"


def earlier_run(folder: Path, rows: int) -> dict[str, Any] | None:
    """run.json of a folder, None for a new one.

    Raises:
        OSError: the folder cannot be read, or is used for something else.
        ValueError: run.json is not valid, or missing although there are rows.
    """
    path = folder / RUN_FILE
    if not path.exists():
        if rows:
            raise ValueError(
                f"run folder {folder}: holds {rows} rows but no {RUN_FILE} that says what they "
                f"are; {_WAYS_OUT}"
            )
        return None
    try:
        run = read_object(path)
    except ValueError as error:
        raise ValueError(f"{error}; {_WAYS_OUT}") from None
    check_run(run, str(path))
    if run["schema"] != SCHEMA:
        raise ValueError(
            f"run folder {folder} is of the older schema {run['schema']}, this version writes "
            f"{SCHEMA}: it can be read, for example by 'tokprune report', but not resumed; "
            f"{_WAYS_OUT}"
        )
    return run


def check_settings(run: Mapping[str, Any], settings: Settings, folder: Path) -> None:
    """The settings that rows depend on are those of the folder.

    Raises:
        ValueError: names the first that differs, with both values.
    """
    table = settings.to_dict()
    for name in _SAME:
        before, now = run["settings"].get(name), _json(table.get(name))
        if before != now:
            raise ValueError(
                f"run folder {folder} was made with {name}={before!r}, this sweep has {now!r}; "
                f"use the same, {_WAYS_OUT}"
            )


def check_harness(run: Mapping[str, Any], now: Mapping[str, Any] | None, folder: Path) -> None:
    """The questions of a folder were asked in the same way; ``now``: the harness entry of this
    sweep, None for the builtin one.

    Raises:
        ValueError: another harness, base model or arguments; names both values.
    """
    before, here = run.get("harness") or {"name": "builtin"}, now or {"name": "builtin"}
    for name in _SAME_HARNESS:
        if before.get(name) != _json(here.get(name)):
            raise ValueError(
                f"run folder {folder} was made with harness {before['name']}, "
                f"{name}={before.get(name)!r}; this sweep has {here['name']}, "
                f"{name}={here.get(name)!r}; {_WAYS_OUT}"
            )


def check_same(run: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Benchmark or model of a folder are those of this sweep; ``now``: the entries that are known
    so far.

    Raises:
        ValueError: another benchmark, version, model or dtype.
    """
    for part, fields in (
        ("benchmark", ("name", "scoring", "version")), ("model", ("hash", "dtype")),
    ):  # fmt: skip
        if part not in now:
            continue
        before, here = ({"scoring": "exact", **entries[part]} for entries in (run, now))
        for field in fields:
            if before[field] != here[field]:
                raise ValueError(
                    f"run folder {folder} belongs to another {part}: {before['name']} ({field} "
                    f"{str(before[field])[:16]}), not {here['name']} ({field} "
                    f"{str(here[field])[:16]}); {_WAYS_OUT}"
                )


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))
