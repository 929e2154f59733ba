"""The run folder on disk: torn and corrupt lines, full disks, locks, reading back."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tokprune.eval.sweep.identity import row_id
from tokprune.eval.sweep.results import Run, read_run
from tokprune.eval.sweep.store import Store

TRIAL: dict[str, Any] = {
    "trial": "todre@9", "variant": "todre", "method": "todre", "options": {"keep": 9},
    "repr": "ToDRE", "control": False, "budget": 9, "budget_text": "9", "match": "mean", "seed": 0,
    "dtype": "float32", "batch_size": 4, "noise": False, "status": "ok", "reason": None,
    "calibrated": {"tokens_last": 9.0, "tokens_mean": 9.0},
}  # fmt: skip
INFO: dict[str, Any] = {
    "schema": 2, "created": "t", "updated": "t", "finished": True, "command": "tokprune sweep",
    "tokprune": "0", "code": "c", "environment": {}, "settings": {},
    "model": {
        "name": "m", "class": "L", "family": "f", "hash": "h", "parameters": 1,
        "visual_tokens": 36, "decoder_layers": 8, "dtype": "float32",
    },
    "benchmark": {
        "name": "b", "version": "v", "split": "test", "tasks": ["all"], "groups": {},
        "headline": ["all"], "items": 3,
    },
    "trials": [TRIAL],
}  # fmt: skip


def row(item: str, **changes: Any) -> dict[str, Any]:
    return {
        "row": row_id(INFO, TRIAL, item, "all"), "trial": "todre@9", "item": item, "image": "i",
        "task": "all", "question": "ä?", "answers": ["x"], "answer": "x", "score": 1.0,
        "status": "ok", "error": None, "tokens_in": 36, "tokens_last": 9.0, "tokens_mean": 9.5,
        "macs": 10, "macs_unpruned": 20, "kv_bytes": 5, "kv_bytes_unpruned": 6,
        "prompt_tokens": 40, "new_tokens": 2, "seconds": 0.1, "time": 1.0, "evidence": None,
        **changes,
    }  # fmt: skip


def write(folder: Path, lines: list[Any], info: Any = INFO) -> Path:
    folder.mkdir(exist_ok=True)
    if info is not None:
        (folder / "run.json").write_text(info if isinstance(info, str) else json.dumps(info))
    data = b"".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines
    )
    (folder / "rows.jsonl").write_bytes(data)
    return folder


def items(run: Run) -> list[str]:
    return [r["item"] for r in run.rows]


# ------------------------------------------------------------------------------ reading


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    with Store(tmp_path / "run") as store:
        store.write_json("run.json", INFO)
        store.append([row("a"), row("b")])
        store.append([row("c", status="failed", score=0.0, answer="", error="E: x")])
    run = read_run(tmp_path / "run")
    assert run.rows == [row("a"), row("b"), run.rows[2]]
    assert run.rows[2]["error"] == "E: x"
    assert (run.stale, run.duplicates, run.latency, run.overlays()) == (0, 0, None, [])
    assert len(run.rows_of("todre@9")) == 3
    with pytest.raises(ValueError, match=r"trial 'x' is not in .*todre@9"):
        run.rows_of("x")


def test_repeated_and_stale_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    old_code = row("b", row=row_id({**INFO, "code": "old"}, TRIAL, "b", "all"))
    other = row_id(INFO, {**TRIAL, "options": {"keep": 8}}, "c", "all")
    lines = [row("a"), row("a"), old_code, row("c", row=other), row("d", trial="gone")]
    run = read_run(write(tmp_path / "run", lines))
    assert (items(run), run.stale, run.duplicates) == (["a"], 3, 1)


@pytest.mark.parametrize(
    "tail",
    [b'{"row": "ab', b"\0\0\0\0", b'{"row": 3}\n', b"\xff\xfe\n", json.dumps(row("b")).encode()],
    ids=["torn", "zeros", "fields", "bytes", "no-newline"],
)
def test_corrupt_last_line_is_left_out_then_removed(tmp_path: Path, tail: bytes) -> None:
    folder = write(tmp_path / "run", [row("a"), tail])
    before = (folder / "rows.jsonl").read_bytes()
    with pytest.warns(UserWarning, match=r"rows.jsonl, line 2: corrupt row"):
        assert items(read_run(folder)) == ["a"]
    assert (folder / "rows.jsonl").read_bytes() == before, "reading must not write"
    store = Store(folder)
    with pytest.warns(UserWarning, match="removed and its question asked again"):
        store.__enter__()
    assert [r["item"] for r in store.rows] == ["a"]
    store.append([row("b")])
    store.__exit__()
    assert items(read_run(folder)) == ["a", "b"]


def test_corrupt_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row("a"), b"{oops}\n", row("b")])
    before = (folder / "rows.jsonl").read_bytes()
    for read in (read_run, lambda f: Store(f).__enter__()):
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2: corrupt row"):
            read(folder)
    assert (folder / "rows.jsonl").read_bytes() == before
    with Store(folder, fresh=True) as store:  # the lock was given back
        assert store.rows == []


BAD_FOLDERS: list[tuple[Any, str]] = [
    (None, "holds no run.json"),
    ("{", "run.json: not valid JSON"),
    ("[]", "should be a JSON object"),
    ({**INFO, "schema": 3}, "schema 3 cannot be read"),
    ({k: v for k, v in INFO.items() if k != "model"}, "field 'model' is missing"),
    ({**INFO, "model": {"name": "m"}}, "model: field 'class' is missing"),
    ({**INFO, "finished": 1}, "field 'finished' should be bool, is 1"),
    ({**INFO, "trials": [{**TRIAL, "seed": True}]}, r"trials\[0\]: field 'seed' should be int"),
    ({**INFO, "trials": [{**TRIAL, "status": "new"}]}, "field 'status' should be 'ok' or"),
    ({**INFO, "trials": [TRIAL, TRIAL]}, "'todre@9' is listed twice"),
]


@pytest.mark.parametrize(("info", "message"), BAD_FOLDERS)
def test_bad_run_json(tmp_path: Path, info: Any, message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        read_run(write(tmp_path / "run", [], info))


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_run(tmp_path / "none")


@pytest.mark.parametrize(("field", "value"), [("score", 2), ("status", "lost"), ("tokens_in", "x")])
def test_bad_fields_of_a_row(tmp_path: Path, field: str, value: Any) -> None:
    folder = write(tmp_path / "run", [row("a", **{field: value}), row("b")])
    with pytest.raises(ValueError, match=f"line 1: .*'{field}'"):
        read_run(folder)


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    from pyarrow import parquet

    run = read_run(write(tmp_path / "run", [row("a"), row("b", tokens_in=None, seconds=None)]))
    run.to_parquet(tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert [{k: r[k] for k in row("a")} for r in table] == run.rows
    assert table[0]["options"] == '{"keep":9}'
    assert (table[0]["variant"], table[0]["budget"], table[0]["control"]) == ("todre", 9.0, False)


# ------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("place", ["write", "half", "fsync"])
def test_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real = os.write

    def refuse(*_: Any) -> Any:
        raise full

    def half(descriptor: int, data: Any) -> int:
        if len(data) < 200:
            raise full
        return real(descriptor, data[: len(data) // 2])

    with Store(tmp_path / "run") as store:
        store.write_json("run.json", INFO)
        store.append([row("a")])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync" if place == "fsync" else "write",
                          half if place == "half" else refuse)  # fmt: skip
            with pytest.raises(OSError, match=r"rows.jsonl: no space left.*run the same command"):
                store.append([row("b"), row("c")])
        assert items(read_run(tmp_path / "run")) == ["a"]
        store.append([row("b")])
    assert items(read_run(tmp_path / "run")) == ["a", "b"]


def test_full_disk_leaves_the_old_run_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    with Store(tmp_path / "run") as store:
        store.write_json("run.json", INFO)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", refuse)
            with pytest.raises(OSError, match=r"run.json: no space left"):
                store.write_json("run.json", {**INFO, "code": "new"})
    assert read_run(tmp_path / "run").info == INFO
    assert not list((tmp_path / "run").glob(".*"))


def test_interruption_between_two_writes_leaves_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def interrupted(descriptor: int, data: Any) -> int:
        real(descriptor, data[:50])
        raise KeyboardInterrupt

    with Store(tmp_path / "run") as store:
        store.append([row("a")])
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.append([row("b")])
    assert (tmp_path / "run" / "rows.jsonl").read_text().count("\n") == 1


def test_one_writer_at_a_time_and_stale_locks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "lock").write_text("process 1 on elsewhere\n")  # what a killed process leaves
    with Store(folder) as store:
        store.append([row("a")])
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .* is writing it"):
            Store(folder).__enter__()
    with Store(folder) as store:
        assert len(store.rows) == 1


def test_a_sweep_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    with Store(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


def test_folders_with_other_things_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("x")
    for fresh in (False, True):
        with pytest.raises(OSError, match=r"holds other files and no run.json"):
            Store(tmp_path, fresh).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]
    with pytest.raises(NotADirectoryError, match="is a file"):
        Store(tmp_path / "photo.png").__enter__()
    with pytest.raises(OSError, match="cannot be made"):
        Store(tmp_path / "photo.png" / "run").__enter__()


def test_fresh_throws_away_what_a_sweep_made(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [row("a")])
    (folder / "overlays").mkdir()
    (folder / "overlays" / "a.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    with Store(folder, fresh=True) as store:
        assert store.rows == []
    assert {path.name for path in folder.iterdir()} >= {"notes.txt"}
    assert not (folder / "run.json").exists()
    assert not list((folder / "overlays").iterdir())
