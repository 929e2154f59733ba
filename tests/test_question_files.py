"""Files of questions in the shapes that people have: read, scored by their rule, or refused."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokprune.eval.benchmarks import load_benchmark

RED, BLUE, GREEN = (200, 30, 30), (0, 0, 250), (0, 200, 0)
#: as VQAv2 has them
PEOPLE = ["red"] * 9 + ["blue"]


def png(colour: tuple[int, int, int] = RED) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def b64(colour: tuple[int, int, int] = RED) -> str:
    return base64.b64encode(png(colour)).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    images.mkdir()
    for name, colour in {
        "red.png": RED, "blue.png": BLUE, "COCO_val2014_000000000042.png": GREEN,
        "000000000007.png": BLUE,
    }.items():  # fmt: skip
        (images / name).write_bytes(png(colour))
    return tmp_path


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def document(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, indent=1))
    return path


def table(path: Path, *rows: list[str]) -> Path:
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    return path


def shards(path: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def colours(benchmark: Any, item: Any) -> list[Any]:
    return [image.getpixel((0, 0)) for image in benchmark.images(item)]


# ----------------------------------------------------------------------------- JSON lines


def test_pope(folder: Path) -> None:
    path = lines(
        folder / "pope.jsonl",
        {"question_id": 1, "image": "red.png", "text": "is there a cat ?", "label": "no",
         "category": "popular"},
        {"question_id": 1, "image": "blue.png", "text": "is there a sea ?", "label": "yes",
         "category": "random"},
    )  # fmt: skip
    benchmark = load_benchmark(path, images=folder / "images")
    first, second = benchmark.items()
    assert (benchmark.shape, benchmark.scoring) == ("llava", "pope")
    assert (first.id, second.id) == ("1", "1#2")
    assert any("#2" in note for note in benchmark.notes)
    assert benchmark.tasks == ("popular", "random")
    assert first.image_id == "red.png"
    assert colours(benchmark, second) == [BLUE]
    assert benchmark.score(first, "No, there is none.") == 1.0
    assert benchmark.score(second, "a sea") == 1.0  # POPE's rule: what is not no is yes


def test_answers_in_a_second_file(folder: Path) -> None:
    asked = lines(
        folder / "llava.jsonl",
        {"question_id": 0, "image": "red.png", "text": "colour ?\nAnswer in one word."},
        {"question_id": 1, "image": "blue.png", "text": "colour ?\nAnswer in one word."},
    )
    images = {"images": folder / "images"}
    with pytest.raises(ValueError, match=r"llava.jsonl has no answers.*--answers"):
        load_benchmark(asked, **images)
    by_id = lines(folder / "a.jsonl", {"question_id": 0, "label": "red"},
                  {"question_id": 1, "label": "blue"})  # fmt: skip
    benchmark = load_benchmark(asked, answers=by_id, **images)
    assert [item.answers for item in benchmark.items()] == [("red",), ("blue",)]
    # POPE's annotations count from 1, LLaVA's questions from 0: image and question decide
    shifted = lines(
        folder / "b.jsonl",
        {"question_id": 1, "image": "red.png", "text": "Colour ?", "label": "red"},
        {"question_id": 2, "image": "blue.png", "text": "Colour ?", "label": "blue"},
    )
    benchmark = load_benchmark(asked, answers=shifted, **images)
    assert [item.answers for item in benchmark.items()] == [("red",), ("blue",)]
    for rows, message in [
        ([{"question_id": 0, "label": "red"}], "'1' has no answer in"),
        ([{"question_id": 0, "label": "a"}, {"question_id": 0, "label": "b"}], "that differ"),
        ([{"question_id": 0, "text": "size ?", "label": "a"}], "another question by that id"),
        ([{"question_id": 0}], "line 1: holds no answer; expected"),
        ([], "holds no answer"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_benchmark(asked, answers=lines(folder / "c.jsonl", *rows), **images)
    with pytest.raises(ValueError, match=r"holds answers and no question.*--answers"):
        load_benchmark(by_id)


def test_several_images(folder: Path) -> None:
    row = {"id": 1, "images": ["red.png", "blue.png"], "question": "which ?", "answer": "both"}
    numbered = {"id": 2, "question": "is <image 2> like <image 1> ?", "answer": "no",
                "image_1": "red.png", "image_2": "blue.png"}  # fmt: skip
    options = {"images": folder / "images"}
    benchmark = load_benchmark(lines(folder / "m.jsonl", row), **options)
    (item,) = benchmark.items()
    assert colours(benchmark, item) == [RED, BLUE]
    assert benchmark.image(item).getpixel((0, 0)) == RED
    benchmark = load_benchmark(lines(folder / "n.jsonl", numbered), **options)
    (item,) = benchmark.items()
    assert item.question == "is <image> like <image> ?"
    assert colours(benchmark, item) == [BLUE, RED]  # in the order of their places
    with pytest.raises(ValueError, match=r"line 1: the question has 1 place.*there are 2 image"):
        load_benchmark(lines(folder / "m.jsonl", {**row, "question": "<image> ?"}), **options)
    with pytest.raises(ValueError, match="names image 3, and there are 2"):
        load_benchmark(lines(folder / "n.jsonl", {**numbered, "question": "<image 3>"}), **options)
    with pytest.raises(ValueError, match=r"field 'images' should be a list of images, is \[\]"):
        load_benchmark(lines(folder / "m.jsonl", {**row, "images": []}), **options)


def test_ten_answers_are_those_of_people(folder: Path) -> None:
    row = {"id": 1, "image": "images/red.png", "question": "?", "answers": PEOPLE}
    benchmark = load_benchmark(lines(folder / "p.jsonl", row))
    (item,) = benchmark.items()
    assert benchmark.scoring == "vqa"
    assert benchmark.score(item, "blue") == pytest.approx(0.3)
    chosen = load_benchmark(lines(folder / "p.jsonl", row), scoring="exact")
    assert chosen.score(item, "blue") == 1.0
    assert chosen.version != benchmark.version
    # ten that are all correct stay so
    several = {**row, "answers": [f"red {n}" for n in range(10)]}
    assert load_benchmark(lines(folder / "q.jsonl", several)).scoring == "exact"
    with pytest.raises(ValueError, match=r"needs at least 4 answers.*one has 1"):
        load_benchmark(lines(folder / "q.jsonl", {**row, "answers": ["red"]}), scoring="vqa")


def test_row_numbers_stand_in_for_ids(folder: Path) -> None:
    row = {"image": "images/red.png", "question": "colour ?", "answer": "red"}
    benchmark = load_benchmark(lines(folder / "q.jsonl", row, row))
    assert [item.id for item in benchmark.items()] == ["1", "2"]
    suffixed = load_benchmark(folder / "q.jsonl", prompt_suffix="\nOne word.")
    assert suffixed.items()[0].question == "colour ?\nOne word."
    assert suffixed.version != benchmark.version


# ----------------------------------------------------------------------------- JSON documents


def test_textvqa_and_vqav2(folder: Path) -> None:
    images = {"images": folder / "images"}
    textvqa = {"dataset_type": "val", "data": [
        {"question_id": 5, "image_id": "red", "question": "colour ?", "answers": PEOPLE},
        {"question_id": 6, "image_id": "blue", "question": "colour ?", "answers": PEOPLE},
    ]}  # fmt: skip
    benchmark = load_benchmark(document(folder / "t.json", textvqa), **images)
    assert (benchmark.shape, benchmark.scoring) == ("vqa", "vqa")
    assert [(i.id, i.image_id) for i in benchmark.items()] == [("5", "red"), ("6", "blue")]
    assert colours(benchmark, benchmark.items()[1]) == [BLUE]
    asked = document(folder / "q.json", {"info": {"year": 2017}, "questions": [
        {"image_id": 42, "question": "colour ?", "question_id": 42000},
        {"image_id": 7, "question": "colour ?", "question_id": 42001},
    ]})  # fmt: skip
    with pytest.raises(ValueError, match="has no answers"):
        load_benchmark(asked, **images)
    said = [{"answer": a, "answer_id": n} for n, a in enumerate(PEOPLE, 1)]
    annotations = document(folder / "a.json", {"annotations": [
        {"question_id": q, "image_id": i, "multiple_choice_answer": "red", "answers": said}
        for q, i in ((42001, 7), (42000, 42))
    ]})  # fmt: skip
    benchmark = load_benchmark(asked, answers=annotations, **images)
    first, second = benchmark.items()
    assert first.answers == tuple(PEOPLE)
    assert benchmark.score(first, "Red!") == 1.0
    assert [colours(benchmark, item) for item in (first, second)] == [[GREEN], [BLUE]]
    with pytest.raises(FileNotFoundError, match=r"42: no file 42.jpg.*--images"):
        load_benchmark(asked, answers=annotations)
    with pytest.raises(ValueError, match="holds answers and no question"):
        load_benchmark(annotations)


def test_scienceqa(folder: Path) -> None:
    row = {"question": "which colour ?", "choices": ["blue", "red", ""], "answer": 1,
           "hint": "look", "image": "red.png", "lecture": "", "skill": "x"}  # fmt: skip
    problems = {"4": row, "9": {**row, "image": None, "answer": 0}}
    benchmark = load_benchmark(document(folder / "p.json", problems), images=folder / "images")
    (item,) = benchmark.items()
    assert (benchmark.shape, benchmark.scoring) == ("scienceqa", "letter")
    assert (item.id, item.answers) == ("4", ("B",))
    assert item.question == (
        "Context: look\nwhich colour ?\nA. blue\nB. red\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert any("1 questions without an image are left out" in note for note in benchmark.notes)
    assert [benchmark.score(item, a) for a in ("B", "The answer is B.", "red", "A", "blue")] == [
        1, 1, 1, 0, 0,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="answer 5 should be one of the options A, B"):
        load_benchmark(document(folder / "p.json", [{**row, "image": "images/red.png",
                                                     "answer": 5}]))  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "shape", "scoring"),
    [
        ({"dataset_name": "docvqa", "data": [{
            "questionId": 3, "question": "?", "image": "red.png", "docId": 1,
            "ucsf_document_id": "x", "answers": ["red"]}]}, "docvqa", "anls"),
        ({"data": [{"questionId": 3, "question": "?", "image_local_name": "red.png",
                    "answers": ["red"]}]}, "infovqa", "anls"),
        ([{"imgname": "red.png", "query": "?", "label": "14"}], "chartqa", "relaxed"),
        ([{"dataset_name": "IIIT5K", "id": 0, "question": "?", "answers": ["red"],
           "image_path": "red.png", "type": "Regular"}], "ocrbench", "contains"),
        ([{"image": "red.png", "question": "?", "answers": [{"answer": a} for a in PEOPLE]}],
         "table", "vqa"),
    ],
)  # fmt: skip
def test_further_documents(folder: Path, rows: Any, shape: str, scoring: str) -> None:
    benchmark = load_benchmark(document(folder / "f.json", rows), images=folder / "images")
    assert (benchmark.shape, benchmark.scoring) == (shape, scoring)
    assert colours(benchmark, benchmark.items()[0]) == [RED]
    assert load_benchmark(folder / "f.json", images=folder / "images", shape="table",
                          scoring="exact").scoring == "exact"  # fmt: skip


# ----------------------------------------------------------------------------- tables

HEADER = ["index", "question", "hint", "A", "B", "C", "answer", "category", "image"]


def test_vlmevalkit(folder: Path) -> None:
    path = table(
        folder / "bench.tsv", HEADER,
        ["0", '"which\ncolour\t""?"""', "nan", "red", "blue", "", "A", "hue", b64()],
        ["1000000", "which colour ?", "look", "blue", "red", "nan", "B", "hue", "0"],
        ["2", "and here ?", "", "blue", "red", "", "A", "hue", json.dumps([b64(BLUE), b64()])
         .replace('"', "'")],
    )  # fmt: skip
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    benchmark = load_benchmark(path)
    items = benchmark.items()
    assert (benchmark.shape, benchmark.scoring, benchmark.tasks) == (
        "vlmevalkit", "letter", ("all",),
    )  # fmt: skip
    assert [item.id for item in items] == ["0", "1000000", "2"]
    assert items[0].question.startswith('which\r\ncolour\t"?"\nA. red\nB. blue\nAnswer with')
    assert items[1].question.startswith("look\nwhich colour ?\nA. blue\nB. red\n")
    assert items[0].image_id == items[1].image_id != items[2].image_id
    assert [colours(benchmark, item) for item in items] == [[RED], [RED], [BLUE, RED]]
    assert items[0].meta == {"options": {"A": "red", "B": "blue"}, "category": "hue"}


def test_vlmevalkit_paths_and_names(folder: Path) -> None:
    header = ["index", "question", "answer", "image_path"]
    path = table(folder / "DocVQA_VAL.tsv", header, ["1", "?", "['red', 'rot']", "red.png"])
    benchmark = load_benchmark(path, images=folder / "images")
    (item,) = benchmark.items()
    assert (benchmark.scoring, item.answers) == ("anls", ("red", "rot"))
    path = table(folder / "POPE.tsv", header, ["1", "?", "Yes", "red.png"])
    assert load_benchmark(path, images=folder / "images").scoring == "yes-no"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["1", "?", "", "a"], r"line 3: has 4 cells, and the header 9 columns"),
        (["1", '"?', "", "a", "b", "", "A", "", "x"], "line 3: not a row of the table"),
        (["1", "?", "", "a", "b", "", "D", "", "0"], "line 3: answer 'D' should be one of"),
        (["1", "?", "", "a", "b", "", "A", "", "77"], "line 3.*neither an image nor the index"),
        (["1", "?", "", "a", "b", "", "A", "", "no.png"], "line 3: field 'image': no.png: no such"),
        (["1", "?", "", "a", "b", "", "A", "", ""], "line 3: field 'image' should be the path"),
    ],
)
def test_bad_tables(folder: Path, row: list[str], message: str) -> None:
    good = ["0", "?", "", "red", "blue", "", "A", "hue", b64()]
    with pytest.raises((ValueError, OSError), match=message):
        load_benchmark(table(folder / "bad.tsv", HEADER, good, row))


# ----------------------------------------------------------------------------- parquet


def test_shards(folder: Path) -> None:
    rows = [
        {"question_id": "a.png", "question": f"is it {n} ?", "answer": answer, "category": "hue",
         "image": {"bytes": png(colour), "path": "a.png"}}
        for n, (answer, colour) in enumerate([("Yes", RED), ("No", RED), ("Yes", BLUE)])
    ]  # fmt: skip
    benchmark = load_benchmark(shards(folder / "mme.parquet", rows))
    items = benchmark.items()
    assert (benchmark.shape, benchmark.scoring) == ("mme", "mme")
    assert [item.id for item in items] == ["a.png", "a.png#2", "a.png#3"]
    assert items[0].image_id == items[1].image_id != items[2].image_id
    # in any order, forth and back over the groups
    for n in (2, 0, 1, 0, 2):
        assert colours(benchmark, items[n]) == [BLUE if n == 2 else RED]
    several = [{"question_id": 1, "question": "?", "answers": PEOPLE,
                "images": [{"bytes": png(c), "path": None} for c in (RED, BLUE)]}]  # fmt: skip
    benchmark = load_benchmark(shards(folder / "several.parquet", several))
    assert benchmark.scoring == "vqa"
    assert colours(benchmark, benchmark.items()[0]) == [RED, BLUE]
    science = [
        {"question": "?", "choices": ["a", "b"], "answer": n, "hint": "", "skill": "x",
         "image": image}
        for n, image in enumerate([None, {"bytes": png(BLUE), "path": None}])
    ]  # fmt: skip
    benchmark = load_benchmark(shards(folder / "science.parquet", science))
    (item,) = benchmark.items()
    assert (item.id, item.answers, colours(benchmark, item)) == ("2", ("B",), [BLUE])


# ----------------------------------------------------------------------------- doors


def test_images_stay_in_their_folder(folder: Path, tmp_path_factory: Any) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "secret.png").write_bytes(png(GREEN))
    os.symlink(other / "secret.png", folder / "link.png")
    os.symlink(other, folder / "linked")
    relative = os.path.relpath(other / "secret.png", folder)
    row = {"id": 1, "question": "?", "answer": "x"}
    for name in (str(other / "secret.png"), relative, "link.png", "linked/secret.png"):
        path = lines(folder / "q.jsonl", {**row, "image": name})
        with pytest.raises(ValueError, match=r"line 1: field 'image'.*lies outside the folder"):
            load_benchmark(path)
        for allowed in ("/", other):
            benchmark = load_benchmark(path, images=allowed)
            assert colours(benchmark, benchmark.items()[0]) == [GREEN]
    # an absolute path into the folder is no way out of it
    inside = {**row, "image": str(folder / "images" / "red.png")}
    assert load_benchmark(lines(folder / "q.jsonl", inside)).items()[0].image_id == "images/red.png"
    for name, message in [
        ("https://x.org/a.png", "a web address"), ("a\0b", "no usable path"),
        ("images", "no such file"), ("x" * 5000 + ".", "no usable path"),
    ]:  # fmt: skip
        with pytest.raises((ValueError, OSError), match=message):
            load_benchmark(lines(folder / "q.jsonl", {**row, "image": name}))
    with pytest.raises(FileNotFoundError, match=r"images .*nowhere: no such folder"):
        load_benchmark(path, images=folder / "nowhere")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n', "line 1: no column holds a question.*expected.*found id"),
        (
            "a.jsonl",
            b'{"id": 1, "question": "?", "image": "a", "gold": "x"}\n',
            "has no answers.*expected one of answers, answer.*found id, question, image, gold",
        ),
        ("a.jsonl", b'{"question": "\\ud800", "image": "a", "answer": "x"}\n', "a lone surrogate"),
        ("a.jsonl", b"", "holds no question"),
        ("a.jsonl", b'{"q": "\xff"}\n', "line 1: not valid UTF-8"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "line 1: (JSON that is nested too deeply|not valid)"),
        ("a.jsonl", b'{"question": NaN, "image": "a"}\n', "field 'question' should be text"),
        ("a.json", b"", "holds no question"),
        ("a.json", b"[]", "holds no question"),
        ("a.json", b'{"data": []}', "holds no question"),
        ("a.json", b'{"version": 1}', "holds no list of questions.*'version'"),
        ("a.json", b'"text"', "line 1: should be a list of questions"),
        ("a.json", b'[\n{"question": "?",\n oops}]', "line 3: not valid JSON"),
        ("a.json", b'[{"question": "?"', "not valid JSON"),
        ("a.json", b'[{"question": "\xff"}]', "not valid UTF-8"),
        ("a.json", b"[3]", "line 1: should be an object"),
        ("a.json", b'[{"a":' * 50_000, "nested too deeply|not valid JSON"),
        ("a.json", b"[] x", "something follows"),
        ("a.tsv", b"", "holds no question"),
        ("a.tsv", b"index\tquestion\n", "holds no question"),
        ("a.tsv", b"index\tindex\n", "column 'index' stands in the header twice"),
        ("a.tsv", b"index\tquestion\n1\t\xff\n", "line 2: not valid UTF-8"),
        ("a.tsv", b"index\tquestion\timage\tanswer\n1\t\tx.png\tx\n", "field 'question' should"),
        ("a.parquet", b"PAR1", "not a readable parquet file"),
        ("a.txt", b"x", "unknown"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_benchmark(tmp_path / name)


def test_bytes_that_are_no_image_fail_by_name(folder: Path) -> None:
    rows = [{"question_id": 1, "question": "?", "answer": "x", "image": b"no image"}]
    benchmark = load_benchmark(shards(folder / "q.parquet", rows))
    with pytest.raises(ValueError, match=r"q.parquet, item '1': not an image"):
        benchmark.image(benchmark.items()[0])


def test_a_file_that_changes_is_not_misread(folder: Path) -> None:
    row = {"id": 1, "image": "images/red.png", "question": "colour ?", "answer": "red"}
    benchmark = load_benchmark(lines(folder / "q.jsonl", row))
    lines(folder / "q.jsonl", {**row, "id": 12})
    with pytest.raises(ValueError, match="has changed while it was in use"):
        list(benchmark.items())


def test_options_are_checked(folder: Path) -> None:
    path = lines(folder / "q.jsonl", {"id": 1})
    with pytest.raises(ValueError, match=r"scoring='vqq' should be one of.*Did you mean 'vqa'"):
        load_benchmark(path, scoring="vqq")
    with pytest.raises(ValueError, match=r"shape='lava' should be one of.*Did you mean 'llava'"):
        load_benchmark(path, shape="lava")
    with pytest.raises(ValueError, match=r"shape='llava' is for files of questions, not .* mini"):
        load_benchmark("mini", shape="llava")


def test_limits_read_no_other_images(folder: Path) -> None:
    rows = [
        {"id": n, "image": f"images/{name}.png", "question": "?", "answer": "x"}
        for n, name in enumerate(["red", "blue"])
    ]
    benchmark = load_benchmark(lines(folder / "q.jsonl", *rows), lazy=True)
    (folder / "images" / "blue.png").unlink()
    assert benchmark.version_of(benchmark.items(limit=1))
    with pytest.raises(OSError, match=r"blue\.png"):
        benchmark.version_of(benchmark.items())


# ----------------------------------------------------------------------------- memory

_MEASURE = """
import sys, tracemalloc
from tokprune.eval.benchmarks import load_benchmark
load_benchmark(sys.argv[2], lazy=True)  # what is imported once
tracemalloc.start()
benchmark = load_benchmark(sys.argv[1], lazy=True)
assert sum(1 for item in benchmark.items()) == int(sys.argv[3])
used = tracemalloc.get_traced_memory()[1]
if sys.argv[1].endswith("parquet"):  # decoded by a library with memory of its own
    import pyarrow

    used += pyarrow.default_memory_pool().max_memory()
print(used)
"""


@pytest.mark.parametrize("suffix", ["jsonl", "json", "tsv", "parquet"])
def test_memory_hardly_grows_with_the_file(folder: Path, suffix: str) -> None:
    """5,000 questions, as text or with images of 6 kB in the file, in a few megabytes."""
    number, filler = 5_000, "x" * 6000

    def write(path: Path, many: int) -> Path:
        rows = ({"id": n, "image": "images/red.png", "question": f"{n} {filler}", "answer": "x"}
                for n in range(many))  # fmt: skip
        if suffix == "parquet":
            one = {"bytes": png() + filler.encode(), "path": "a.png"}
            return shards(
                path, [{"question_id": n, "question": "?", "answer": "x", "image": one}
                       for n in range(many)], 500,
            )  # fmt: skip
        with path.open("w") as file:
            if suffix == "jsonl":
                file.writelines(json.dumps(row) + "\n" for row in rows)
            elif suffix == "json":
                file.write('{"questions": [')
                file.writelines((", " if row["id"] else "") + json.dumps(row) for row in rows)
                file.write("]}")
            else:
                cell = base64.b64encode(png() + bytes(4500)).decode()
                file.write("index\tquestion\tanswer\timage\n")
                file.writelines(f"{n}\t?\tx\t{cell}\n" for n in range(many))
        return path

    large, small = folder / f"large.{suffix}", folder / f"small.{suffix}"
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(write(large, number)), str(write(small, 10)),
         str(number)], check=True, capture_output=True, text=True,
    )  # fmt: skip
    # 30 MB of text, or of images
    assert int(done.stdout) < 12e6, f"{int(done.stdout) / 1e6:.0f} MB"
