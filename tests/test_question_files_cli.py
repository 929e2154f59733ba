"""`tokprune sweep` on files of questions: options, what the run folder says, refusals."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokprune.cli import app
from tokprune.eval.benchmarks.mini import MiniBenchmark
from tokprune.eval.sweep import read_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Images of two questions of `mini`, under the names that COCO gives."""
    home: Path = tmp_path_factory.mktemp("questions")
    (home / "images").mkdir()
    benchmark = MiniBenchmark()
    for number, item in enumerate(ITEMS, 1):
        benchmark.image(item).save(home / "images" / f"COCO_val2014_{number:012}.png")
    return home


ITEMS = MiniBenchmark().items("quick", ["number", "color"], 2)


def name_of(number: int) -> str:
    return f"COCO_val2014_{number:012}.png"


def sweep(file: Path, *options: str) -> None:
    out = file.parent / f"run-{file.name}"
    app([
        "sweep", "--model", "mini", "--benchmark", str(file), "--methods", "divprune", "--keep",
        "1/4", "--no-controls", "--no-noise", "--no-latency", "--out", str(out), *options,
    ])  # fmt: skip


def finished(file: Path, *options: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        sweep(file, *options)
    assert caught.value.code == 0
    run = read_run(file.parent / f"run-{file.name}")
    assert run.info["finished"]
    assert {row["status"] for row in run.rows} == {"ok"}
    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a sweep that must be refused; gives its one sentence."""

    def call(file: Path, *options: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            sweep(file, *options)
        assert caught.value.code == 2
        said = capsys.readouterr().err
        assert said.startswith("Error: ")
        assert said.count("\n") == 1
        return said

    return call


def test_llava_questions_with_answers_beside_them(
    folder: Path, refused: Callable[..., str]
) -> None:
    asked, said = folder / "llava.jsonl", folder / "said.jsonl"
    asked.write_text("".join(
        json.dumps({"question_id": n, "image": name_of(n), "text": item.question}) + "\n"
        for n, item in enumerate(ITEMS, 1)
    ))  # fmt: skip
    said.write_text("".join(
        json.dumps({"question_id": n, "label": item.answers[0]}) + "\n"
        for n, item in enumerate(ITEMS, 1)
    ))  # fmt: skip
    images = ("--images", str(folder / "images"))
    said_so = refused(asked, *images)
    assert "has no answers" in said_so
    assert "--answers" in said_so
    assert not (folder / "run-llava.jsonl").exists()
    run = finished(asked, *images, "--answers", str(said))
    assert {k: run.info["benchmark"][k] for k in ("shape", "scoring")} == {
        "shape": "llava", "scoring": "exact",
    }  # fmt: skip
    assert run.info["settings"]["images"] == images[1]
    assert sum(row["score"] for row in run.rows_of("none")) == 2  # mini answers them
    # another rule is another run
    other = refused(asked, *images, "--answers", str(said), "--scoring", "contains")
    assert "llava (scoring exact), not llava (scoring contains)" in other
    finished(asked, *images, "--answers", str(said))  # the same again has nothing to do


def test_vqa_accuracy_of_ten_people(folder: Path) -> None:
    asked, said = folder / "vqa.json", folder / "people.json"
    asked.write_text(json.dumps({"questions": [
        {"question_id": 10 * n, "image_id": n, "question": item.question}
        for n, item in enumerate(ITEMS, 1)
    ]}))  # fmt: skip
    said.write_text(json.dumps({"annotations": [
        {"question_id": 10 * n, "image_id": n, "answers": [
            {"answer": item.answers[0] if person == 10 else "xyz", "answer_id": person}
            for person in range(1, 11)]}
        for n, item in enumerate(ITEMS, 1)
    ]}))  # fmt: skip
    run = finished(asked, "--images", str(folder / "images"), "--answers", str(said))
    assert run.info["benchmark"]["scoring"] == "vqa"
    assert [row["score"] for row in run.rows_of("none")] == pytest.approx([0.3, 0.3])


def test_a_table_of_options(folder: Path) -> None:
    path = folder / "mmbench.tsv"
    data = (folder / "images" / name_of(1)).read_bytes()
    item, right = ITEMS[0], ITEMS[0].answers[0]
    path.write_text(
        "index\tquestion\thint\tA\tB\tanswer\timage\n"
        f"0\t{item.question}\t\tnothing\t{right}\tB\t{base64.b64encode(data).decode()}\n"
        f"1000000\t{item.question}\t\t{right}\tnothing\tA\t0\n"
    )
    run = finished(path)
    assert run.info["benchmark"]["scoring"] == "letter"
    assert {row["item"] for row in run.rows} == {"0", "1000000"}
    assert all("Answer with the option's letter" in row["question"] for row in run.rows)


def test_several_images_count_in_the_rows_and_one_in_the_budget(folder: Path) -> None:
    path = folder / "several.jsonl"
    path.write_text(json.dumps({
        "id": 1, "question": ITEMS[0].question, "answer": list(ITEMS[0].answers),
        "images": [f"images/{name_of(n)}" for n in (1, 2)],
    }))  # fmt: skip
    run = finished(path)
    (row,) = run.rows_of("divprune@144")
    assert (row["tokens_in"], row["tokens_mean"]) == (2 * 576, 2 * 144)


def test_options_for_files_name_themselves(folder: Path, refused: Callable[..., str]) -> None:
    path = folder / "plain.jsonl"
    path.write_text(json.dumps({"id": 1, "question": "?", "answer": "x", "image": name_of(1)}))
    for options, message in [
        (("--shape", "lava"), "shape='lava' should be one of"),
        (("--scoring", "vq"), "scoring='vq' should be one of"),
        (("--images", str(folder / "none")), "no such folder"),
        (("--answers", str(folder / "none.jsonl")), "no such file"),
        (("--benchmark", "mini", "--shape", "llava"), "is for files of questions"),
    ]:  # fmt: skip
        assert message in refused(path, *options)
