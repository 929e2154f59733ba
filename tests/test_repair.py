"""Run folders that were damaged: refused with a way out, repaired, and then answered as if nothing
had happened."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_case as case
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_sweep_store import INFO, row, write

from tokprune.eval.sweep.repair import repair
from tokprune.eval.sweep.results import read_run
from tokprune.eval.sweep.runner import run_sweep
from tokprune.eval.sweep.store import Store

ITEMS = "abcdef"
#: of a row, what a hand or a program could make of it
WRONG_FIELDS: list[tuple[str, Any]] = [
    ("row", 3), ("item", None), ("score", "1"), ("score", 2), ("score", True),
    ("score", float("nan")), ("answers", "x"), ("answers", [1]), ("status", "fine"),
    ("seconds", "fast"), ("seconds", float("inf")), ("macs", 1.5), ("time", None),
]  # fmt: skip


def damaged(lines: list[bytes], kind: str, at: int, extra: bytes) -> list[bytes]:
    at %= len(lines)
    line = lines[at]
    try:
        fields = dict(json.loads(line))
    except (ValueError, TypeError, RecursionError):  # an earlier damage
        fields = {}
    new = {
        "blank": [b"\n", line], "spaces": [line, b"   \n"], "garbage": [extra + b"\n", line],
        "cut": [line[: len(line) // 2] + b"\n"], "torn": [line[: len(line) // 3]],
        "zeros": [b"\0" * len(line) + b"\n"], "bytes": [b"\xff" + line],
        "twice": [line, line], "joined": [line.rstrip(b"\n")],
        "deep": [b"[" * 50_000 + b"\n", line], "list": [b"[1, 2]\n", line],
        "missing": [json.dumps({k: v for k, v in fields.items() if k != "item"}).encode() + b"\n"],
        "field": [json.dumps(fields | dict([WRONG_FIELDS[at % len(WRONG_FIELDS)]])).encode()
                  + b"\n"],
        "more": [json.dumps({**fields, "unknown": 1}).encode() + b"\n"],
        "other": [line, json.dumps({**fields, "answer": "another"}).encode() + b"\n"],
    }[kind]  # fmt: skip
    return [*lines[:at], *new, *lines[at + 1 :]]


KINDS = ("blank", "spaces", "garbage", "cut", "torn", "zeros", "bytes", "twice", "joined", "deep",
         "list", "missing", "field", "more", "other")  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@example(damage=[("torn", 0, b""), ("other", 1, b"")])  # the first row eats one side of the second
@given(
    damage=st.lists(
        st.tuples(st.sampled_from(KINDS), st.integers(0, 99), st.binary(max_size=12)), max_size=4
    )
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_is_refused_in_a_sentence_or_harmless_and_repair_makes_it_whole(
    tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[str, int, bytes]]
) -> None:
    folder = write(tmp_path_factory.mktemp("damage") / "run", [row(item) for item in ITEMS])
    path = folder / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    # a contradiction is none any more once one side of it is gone: those come last, on whole lines
    for kind, at, extra in sorted(damage, key=lambda one: one[0] == "other"):
        if kind == "other":
            lines = io.BytesIO(b"".join(lines)).readlines()
        lines = damaged(lines, kind, at, extra.replace(b"\n", b""))
    path.write_bytes(b"".join(lines))
    before = path.read_bytes()
    try:
        read_run(folder)
    except ValueError as error:
        assert "rows.jsonl, line " in str(error)  # noqa: PT017
        assert f"tokprune repair {folder}" in str(error)  # noqa: PT017
        assert len(str(error)) < 1000  # noqa: PT017
    done = repair(folder)
    if done.backups:
        assert done.backups[0].read_bytes() == before
    else:
        assert path.read_bytes() == before
    assert not repair(folder).backups
    with Store(folder) as store:  # what a sweep does: it asks what is missing
        there = {r["item"] for r in store.rows}
        store.append([row(item) for item in ITEMS if item not in there])
    rows = {r["item"]: {k: r[k] for k in row("a")} for r in read_run(folder).rows}
    assert rows == {item: row(item) for item in ITEMS}


def test_broken_files_beside_the_rows_go(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row("a")])
    (folder / "overlays").mkdir()
    for name in ("latency.json", "metrics.json", "overlays/a.json", "overlays/b.json"):
        (folder / name).write_text("{" if name != "overlays/b.json" else "{}")
    done = repair(folder)
    assert set(done.files) == {"latency.json", "metrics.json", "overlays/a.json"}
    assert (folder / "latency.json.bak").read_text() == "{"
    assert (folder / "overlays" / "b.json").exists()
    assert read_run(folder).latency is None
    (folder / "latency.json").write_text("[")
    assert repair(folder).backups == [folder / "latency.json.bak2"]


def test_what_cannot_be_repaired(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        repair(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no run.json"):
        repair(tmp_path)
    folder = write(tmp_path / "run", [row("a"), b"{}\n", row("b")], "{")
    with pytest.raises(ValueError, match=r"run.json: not valid JSON .*--fresh"):
        repair(folder)
    (folder / "run.json").write_text(json.dumps(INFO))
    with Store(write(tmp_path / "busy", [row("a")])):
        with pytest.raises(BlockingIOError, match="is writing it"):
            repair(tmp_path / "busy")


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "run", [row("a"), b"{}\n", row("b")])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        repair(folder)
    monkeypatch.undo()
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    assert after == before


@pytest.mark.usefixtures("load_once")
def test_a_repaired_sweep_equals_the_undamaged(tmp_path: Path) -> None:
    model, bench = case.make_model(tmp_path / "model"), case.make_benchmark(tmp_path / "bench")
    asked: Callable[[], Any] = lambda: run_sweep(case.settings(model, bench, tmp_path / "run"))  # noqa: E731
    same = lambda run: sorted(  # noqa: E731
        (r["trial"], r["item"], r["answer"], r["score"], r["tokens_mean"]) for r in run.rows
    )
    whole = same(asked())
    path = tmp_path / "run" / "rows.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    fields = json.loads(lines[5])
    lines[2] = b"\n" + lines[2][:40] + b"\n"
    lines[5] = json.dumps({**fields, "item": "q0"}).encode() + b"\n"  # another question's answer
    lines[7] = b"\xff\xfe\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"line 4: corrupt row .*tokprune repair"):
        asked()
    assert len(repair(tmp_path / "run").dropped) == 2
    assert same(asked()) == whole


def test_installed_command_repairs(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row("a"), b"{oops\n", row("b")])
    script = Path(sys.executable).with_name("tokprune")
    done = subprocess.run(
        [script, "repair", folder], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "line 2: corrupt row" in done.stdout
    assert "1 rows dropped, 2 kept. As it was: rows.jsonl.bak" in done.stdout
    assert "asks the missing questions again" in done.stdout
    assert [r["item"] for r in read_run(folder).rows] == ["a", "b"]
