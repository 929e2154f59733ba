"""The fields of a run folder's files, and checks that say which one is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tokprune.eval.benchmarks.base import Item

SCHEMA = 2

#: keys by which the release before wrote the same
_RENAMED = {
    "cell": "trial", "cells": "trials", "arm": "variant", "budget_asked": "budget_text",
    "exact": "as_published",
}  # fmt: skip

_NUMBER = (int, float)
_TEXT_OR_NONE = (str, type(None))
_INT_OR_NONE = (int, type(None))

#: run.json
RUN: dict[str, Any] = {
    "schema": int, "created": str, "updated": str, "finished": bool, "command": str,
    "tokprune": str, "code": str, "environment": dict, "settings": dict, "model": dict,
    "benchmark": dict, "trials": list,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "name": str, "class": str, "family": str, "hash": str, "parameters": int,
    "visual_tokens": int, "decoder_layers": int, "dtype": str,
}  # fmt: skip
BENCHMARK: dict[str, Any] = {
    "name": str, "version": str, "split": _TEXT_OR_NONE, "tasks": list, "groups": dict,
    "headline": list, "items": int,
}  # fmt: skip
TRIAL: dict[str, Any] = {
    "trial": str, "variant": str, "method": _TEXT_OR_NONE, "options": dict, "repr": str,
    "control": bool, "budget": _NUMBER, "budget_text": (str, int, float), "match": str,
    "seed": int, "dtype": str, "batch_size": int, "noise": bool, "status": str,
    "reason": _TEXT_OR_NONE, "calibrated": (dict, type(None)),
}  # fmt: skip
#: a line of rows.jsonl
ROW: dict[str, Any] = {
    "row": str, "trial": str, "item": str, "image": str, "task": str, "question": str,
    "answers": list, "answer": str, "score": _NUMBER, "status": str, "error": _TEXT_OR_NONE,
    "tokens_in": _INT_OR_NONE, "tokens_last": (*_NUMBER, type(None)),
    "tokens_mean": (*_NUMBER, type(None)), "macs": _INT_OR_NONE, "macs_unpruned": _INT_OR_NONE,
    "kv_bytes": _INT_OR_NONE, "kv_bytes_unpruned": _INT_OR_NONE, "prompt_tokens": _INT_OR_NONE,
    "new_tokens": int, "seconds": (*_NUMBER, type(None)), "time": _NUMBER,
    "evidence": (dict, type(None)),
}  # fmt: skip


def make_row(
    row: str, trial: str, item: Item, answer: str, score: float, error: str | None,
    numbers: Mapping[str, Any], now: float,
) -> dict[str, Any]:  # fmt: skip
    """A line of rows.jsonl; a failed question (``error``) has no answer and scores 0."""
    failed = error is not None
    return {
        "row": row,
        "trial": trial,
        "item": item.id,
        "image": item.image_id,
        "task": item.task,
        "question": item.question,
        "answers": list(item.answers),
        "answer": "" if failed else answer,
        "score": 0.0 if failed else score,
        "status": "failed" if failed else "ok",
        "error": error,
        "evidence": None,
        **numbers,
        "time": round(now, 3),
    }


def current_names(value: Any) -> Any:
    """A JSON object of a run folder by the names of today: folders of schema 1 are read, not
    resumed."""
    if not isinstance(value, dict):
        return value
    named = {_RENAMED.get(name, name): item for name, item in value.items()}
    if isinstance(named.get("options"), dict):
        named["options"] = current_names(named["options"])
    if isinstance(named.get("trials"), list):
        named["trials"] = [current_names(trial) for trial in named["trials"]]
    return named


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
        item = value[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(item, kinds) or (isinstance(item, bool) and bool not in kinds):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise ValueError(f"{where}: field {name!r} should be {wanted}, is {item!r}")


def check_run(run: Any, where: str) -> None:
    """A valid ``run.json``, by the names of today.

    Raises:
        ValueError: names place and field.
    """
    check_object(run, {"schema": int}, where)
    if run["schema"] not in (1, SCHEMA):
        raise ValueError(
            f"{where}: schema {run['schema']} cannot be read; this version of tokprune knows "
            f"schema {SCHEMA}, and 1 of the release before"
        )
    check_object(run, RUN, where)
    check_object(run["model"], MODEL, f"{where}, model")
    check_object(run["benchmark"], BENCHMARK, f"{where}, benchmark")
    seen = set()
    for number, trial in enumerate(run["trials"]):
        check_object(trial, TRIAL, f"{where}, trials[{number}]")
        _choice(trial, "status", ("ok", "unreachable"), f"{where}, trials[{number}]")
        if trial["trial"] in seen:
            raise ValueError(f"{where}: trial {trial['trial']!r} is listed twice")
        seen.add(trial["trial"])


def check_row(row: Any, where: str) -> None:
    """A valid line of ``rows.jsonl``.

    Raises:
        ValueError: names place and field.
    """
    check_object(row, ROW, where)
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: field {name!r} should be a finite number, is {value!r}")
    if not all(isinstance(answer, str) for answer in row["answers"]):
        raise ValueError(f"{where}: field 'answers' should be a list of texts")
    _choice(row, "status", ("ok", "failed"), where)
    if not 0 <= row["score"] <= 1:
        raise ValueError(f"{where}: field 'score' should be in [0, 1], is {row['score']!r}")


def _choice(value: Mapping[str, Any], name: str, choices: tuple[str, ...], where: str) -> None:
    if value[name] not in choices:
        wanted = " or ".join(map(repr, choices))
        raise ValueError(f"{where}: field {name!r} should be {wanted}, is {value[name]!r}")
