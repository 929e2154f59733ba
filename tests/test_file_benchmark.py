"""Benchmarks from JSONL and parquet files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokprune.eval.benchmarks import load_benchmark
from tokprune.eval.benchmarks.files import FileBenchmark


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "red.png").write_bytes(png())
    (tmp_path / "images" / "blue.png").write_bytes(png((0, 0, 250)))
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


ROW = {"id": "a", "image": "images/red.png", "question": "colour ?", "answer": "red"}


def write(folder: Path, *rows: Any, name: str = "q.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


def write_parquet(folder: Path, rows: list[dict[str, Any]], name: str = "q.parquet") -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return folder / name


def test_json_lines(folder: Path) -> None:
    path = write(
        folder, ROW, "\n",
        {**ROW, "id": 2, "task": "hue", "image": "images/blue.png", "answer": ["blue", 7]},
        {**ROW, "id": "c", "task": "hue", "image_id": "x", "meta": {"hard": True}, "other": 1},
    )  # fmt: skip
    benchmark = load_benchmark(path)
    assert isinstance(benchmark, FileBenchmark)
    items = benchmark.items()
    assert [item.id for item in items] == ["a", "2", "c"]
    assert (benchmark.name, benchmark.tasks, benchmark.headline) == (
        "q",
        ("all", "hue"),
        ("all", "hue"),
    )
    assert (dict(benchmark.groups), benchmark.splits) == ({}, ("test",))
    assert items[1].answers == ("blue", "7")
    assert [item.image_id for item in items] == ["images/red.png", "images/blue.png", "x"]
    assert items[2].meta == {"hard": True}
    assert benchmark.image(items[1]).getpixel((0, 0)) == (0, 0, 250)
    assert benchmark.score(items[1], " Blue. ") == 1.0
    assert benchmark.score(items[1], "red") == 0.0


def test_parquet_with_bytes_paths_and_hugging_face_images(folder: Path) -> None:
    rows = [
        {"id": str(i), "image": image, "question": "colour ?", "answers": ["red"]}
        for i, image in enumerate([png(), png((0, 0, 250)), png()])
    ]
    benchmark = load_benchmark(write_parquet(folder, rows))
    items = benchmark.items()
    assert items[0].image_id == items[2].image_id != items[1].image_id
    assert benchmark.image(items[1]).getpixel((0, 0)) == (0, 0, 250)
    nested = [{**rows[0], "image": {"bytes": png((0, 9, 0)), "path": None}},
              {**rows[1], "image": {"bytes": None, "path": "images/red.png"}}]  # fmt: skip
    benchmark = load_benchmark(write_parquet(folder, nested, "n.parquet"))
    first, second = benchmark.items()
    assert benchmark.image(first).getpixel((0, 0)) == (0, 9, 0)
    assert benchmark.image(second).getpixel((0, 0)) == (200, 30, 30)


def test_version_follows_questions_answers_and_images(folder: Path) -> None:
    seen = [load_benchmark(write(folder, ROW)).version]
    assert load_benchmark(write(folder, ROW, name="other.jsonl")).version == seen[0]
    for change in ({"answer": "r"}, {"question": "hue ?"}, {"id": "b"}, {"task": "t"}):
        seen.append(load_benchmark(write(folder, {**ROW, **change})).version)
    (folder / "images" / "red.png").write_bytes(png((201, 30, 30)))
    seen.append(load_benchmark(write(folder, ROW)).version)
    assert len(set(seen)) == len(seen)


def test_tasks_and_balanced_limits(folder: Path) -> None:
    rows = [{**ROW, "id": f"{t}{i}", "task": t} for t, n in (("a", 6), ("b", 2)) for i in range(n)]
    benchmark = load_benchmark(write(folder, *rows))
    assert [x.id for x in benchmark.items(limit=4)] == ["a0", "a1", "b0", "b1"]
    assert [x.id for x in benchmark.items(limit=6)] == ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert [x.id for x in benchmark.items(limit=1)] == ["a0"]
    assert len(benchmark.items(limit=99)) == 8
    assert {x.task for x in benchmark.items(tasks=["b"])} == {"b"}
    for bad, message in [
        ({"split": "train"}, "split='train' is unknown.*test"),
        ({"tasks": ["c"]}, "task 'c' is unknown.*a, b"),
        ({"limit": 0}, "limit=0"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            benchmark.items(**bad)


def without(name: str) -> dict[str, Any]:
    return {k: v for k, v in ROW.items() if k != name}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, "{oops\n"], "q.jsonl, line 2: not valid JSON"),
        ([ROW, "3\n"], "line 2: should be an object"),
        ([{**ROW, "id": None}], "line 1: field 'id' should be text, is missing"),
        ([{**ROW, "id": True}], "line 1: field 'id' should be text, is True"),
        ([ROW, ROW], "line 2: field 'id': 'a' is used twice"),
        ([without("image")], "line 1: field 'image' should be the path of an image, is missing"),
        ([{**ROW, "image": 3}], "field 'image' should be the path of an image, is 3"),
        ([{**ROW, "image": "no.png"}], "line 1: field 'image': no.png: no such file"),
        ([{**ROW, "question": " "}], "field 'question' should be text"),
        ([without("answer")], "field 'answer' or 'answers' should be given, neither"),
        ([{**ROW, "answers": ["x"]}], "should be given, both"),
        ([{**ROW, "answer": []}], "field 'answer' should be text or a list"),
        ([{**ROW, "answer": [None]}], "field 'answer' should be text or a list"),
        ([{**ROW, "task": 3}], "field 'task' should be text, is 3"),
        ([{**ROW, "meta": 3}], "field 'meta' should be an object"),
        ([], "holds no question"),
    ],
)
def test_bad_files_name_line_and_field(folder: Path, rows: list[Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        load_benchmark(write(folder, *rows))


def test_unreadable_files(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_benchmark(folder / "none.jsonl")
    (folder / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load_benchmark(folder / "bad.parquet")
    with pytest.raises(ValueError, match=r"should be a .jsonl or .parquet"):
        FileBenchmark(folder / "q.csv")
    benchmark = load_benchmark(write(folder, {**ROW, "image": "text.png"}))
    with pytest.raises(ValueError, match="item 'a': not an image"):
        benchmark.image(benchmark.items()[0])
