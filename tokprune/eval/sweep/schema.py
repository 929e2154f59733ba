"""The fields of a run folder's files, and checks that say which one is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCHEMA = 1

_NUMBER = (int, float)
_TEXT_OR_NONE = (str, type(None))
_INT_OR_NONE = (int, type(None))

#: run.json
RUN: dict[str, Any] = {
    "schema": int, "created": str, "updated": str, "finished": bool, "command": str,
    "tokprune": str, "code": str, "environment": dict, "settings": dict, "model": dict,
    "benchmark": dict, "cells": list,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "name": str, "class": str, "family": str, "hash": str, "parameters": int,
    "visual_tokens": int, "decoder_layers": int, "dtype": str,
}  # fmt: skip
BENCHMARK: dict[str, Any] = {
    "name": str, "version": str, "split": _TEXT_OR_NONE, "tasks": list, "groups": dict,
    "headline": list, "items": int,
}  # fmt: skip
CELL: dict[str, Any] = {
    "cell": str, "arm": str, "method": _TEXT_OR_NONE, "options": dict, "repr": str,
    "control": bool, "budget": _NUMBER, "budget_asked": (str, int, float), "match": str,
    "seed": int, "dtype": str, "batch_size": int, "noise": bool, "status": str,
    "reason": _TEXT_OR_NONE, "calibrated": (dict, type(None)),
}  # fmt: skip
#: a line of rows.jsonl
ROW: dict[str, Any] = {
    "row": str, "cell": str, "item": str, "image": str, "task": str, "question": str,
    "answers": list, "answer": str, "score": _NUMBER, "status": str, "error": _TEXT_OR_NONE,
    "tokens_in": _INT_OR_NONE, "tokens_last": (*_NUMBER, type(None)),
    "tokens_mean": (*_NUMBER, type(None)), "macs": _INT_OR_NONE, "macs_unpruned": _INT_OR_NONE,
    "kv_bytes": _INT_OR_NONE, "kv_bytes_unpruned": _INT_OR_NONE, "prompt_tokens": _INT_OR_NONE,
    "new_tokens": int, "seconds": (*_NUMBER, type(None)), "time": _NUMBER,
}  # fmt: skip


def check_object(value: Any, fields: Mapping[str, Any], where: str) -> None:
    """All ``fields`` are there and of their type; further ones are allowed.

    Raises:
        ValueError: names place and field.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: should be a JSON object, is {type(value).__name__}")
    for name, kind in fields.items():
        if name not in value:
            raise ValueError(f"{where}: field {name!r} is missing")
        given = value[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise ValueError(f"{where}: field {name!r} should be {wanted}, is {given!r}")


def check_run(run: Any, where: str) -> None:
    """A valid ``run.json`` of this schema version.

    Raises:
        ValueError: names place and field.
    """
    check_object(run, {"schema": int}, where)
    if run["schema"] != SCHEMA:
        raise ValueError(
            f"{where}: schema {run['schema']} cannot be read; this version of tokprune knows "
            f"schema {SCHEMA}"
        )
    check_object(run, RUN, where)
    check_object(run["model"], MODEL, f"{where}, model")
    check_object(run["benchmark"], BENCHMARK, f"{where}, benchmark")
    seen = set()
    for number, cell in enumerate(run["cells"]):
        check_object(cell, CELL, f"{where}, cells[{number}]")
        _choice(cell, "status", ("ok", "unreachable"), f"{where}, cells[{number}]")
        if cell["cell"] in seen:
            raise ValueError(f"{where}: cell {cell['cell']!r} is listed twice")
        seen.add(cell["cell"])


def check_row(row: Any, where: str) -> None:
    """A valid line of ``rows.jsonl``.

    Raises:
        ValueError: names place and field.
    """
    check_object(row, ROW, where)
    _choice(row, "status", ("ok", "failed"), where)
    if not 0 <= row["score"] <= 1:
        raise ValueError(f"{where}: field 'score' should be in [0, 1], is {row['score']!r}")


def _choice(value: Mapping[str, Any], name: str, choices: tuple[str, ...], where: str) -> None:
    if value[name] not in choices:
        wanted = " or ".join(map(repr, choices))
        raise ValueError(f"{where}: field {name!r} should be {wanted}, is {value[name]!r}")
