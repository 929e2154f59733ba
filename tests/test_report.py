"""Reports on synthetic runs: what they say, and that bad folders are refused clearly."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fake_run
import numpy as np
import pytest

from tokprune.cli import app
from tokprune.eval.report import RunFolderError, analyse, build_report, load_run
from tokprune.eval.report import data as report_data
from tokprune.eval.report.analysis import nearest_budget
from tokprune.eval.report.compare import contest, differences
from tokprune.eval.report.gallery import draw
from tokprune.eval.report.groups import group_tables, make_groups, read_groups
from tokprune.eval.report.palette import looks
from tokprune.eval.report.statistics import flips, mcnemar, wilson

COUNT = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.make_run(
        tmp_path_factory.mktemp("run"), count=COUNT, methods=("divprune", "fastv", "todre"),
        blind=True, overlays=2, failed=2, missing=5, seeds=(0, 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(folder: Path) -> Any:
    return build_report(folder, benchmark=fake_run.FakeBenchmark(COUNT), draws=400)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def _point(analysis: Any, name: str) -> Any:
    return next(r for r in analysis.results if r.point.name == name)


def test_a_report_is_made_without_torch() -> None:
    """Runs are read on machines that have no torch, and quickly on those that do."""
    code = (
        "import sys, tokprune.eval.report.build as b; import tokprune.eval.report.oracle_variants"
    )
    code += "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()


# ------------------------------------------------------------------------------ numbers


def test_numbers_are_those_of_the_rows(folder: Path, made: Any) -> None:
    """Accuracy, flips, loyalty, retention and cost of one point, counted by hand."""
    rows = {(r["trial"], r["item"]): r for r in _rows(folder)}
    names = sorted({item for _, item in rows})
    headline = [t for t in fake_run.TASKS if t not in fake_run.OUTSIDE]
    mine = {i: rows["todre@64", i] for i in names}
    base = {i: rows["none", i] for i in names}
    per_task = {
        t: np.mean([r["score"] for r in mine.values() if r["task"] == t]) for t in fake_run.TASKS
    }
    unpruned = {
        t: np.mean([r["score"] for r in base.values() if r["task"] == t]) for t in fake_run.TASKS
    }
    r = _point(made.analysis, "todre @ 64")
    assert r.accuracy == pytest.approx(np.mean([per_task[t] for t in headline]))
    assert r.drop == pytest.approx(np.mean([unpruned[t] - per_task[t] for t in headline]))
    assert r.interval[0] < r.accuracy < r.interval[1]
    assert r.drop_interval[0] < r.drop < r.drop_interval[1]
    for task in fake_run.TASKS:
        own = r.tasks[task]
        assert own.n == COUNT // len(fake_run.TASKS)
        assert own.interval == wilson(own.accuracy * own.n, own.n)
        assert own.retention == pytest.approx(per_task[task] / unpruned[task])
    counted = [i for i in names if mine[i]["task"] in headline]
    lost = sum(base[i]["score"] > mine[i]["score"] for i in counted)
    gained = sum(base[i]["score"] < mine[i]["score"] for i in counted)
    assert (r.flips.lost, r.flips.gained, r.flips.n) == (lost, gained, len(counted))
    same = np.mean([base[i]["answer"] == mine[i]["answer"] for i in counted])
    assert r.loyalty == pytest.approx(same)
    assert r.point.tokens == 64
    assert r.cost("flops") == 2 * rows["todre@64", names[0]]["macs"]
    timing = json.loads((folder / "latency.json").read_text())["trials"]["todre@64"]
    assert r.cost("latency") == timing["total"]["median"]
    tests = [x for x in made.analysis.results if x.flips is not None]
    assert r.p == pytest.approx(min(1, mcnemar(lost, gained) * len(tests)), rel=len(tests))
    assert r.p >= mcnemar(lost, gained)


def test_accuracies_rank_as_they_were_made(made: Any) -> None:
    variants = [r.point.variant for r in made.analysis.at_budget(16)]
    assert variants.index("todre") < variants.index("divprune") < variants.index("random")
    assert made.analysis.at == 64
    assert made.contest.best.point.variant == "todre"
    assert made.contest.gap > 0
    assert made.contest.interval[0] > 0
    low, high = made.contest.corrected
    assert low <= made.contest.interval[0]
    assert made.contest.interval[1] <= high


def test_failed_and_missing_items(made: Any) -> None:
    """A failed item counts as incorrect and disloyal; a missing one leaves the comparison."""
    failed, short = _point(made.analysis, "divprune @ 16"), _point(made.analysis, "divprune @ 64")
    assert (failed.n, failed.missing, failed.point.failed) == (COUNT, 0, 2)
    assert failed.tasks["presence"].n == COUNT // 9
    assert [e[0] for e in made.analysis.data.errors] == ["divprune @ 16"] * 2
    assert (short.n, short.missing) == (COUNT - 5, 5)
    assert not short.on
    where = made.analysis.data.in_tasks(made.analysis.data.headline)
    both = where & ~np.isnan(short.point.score)
    base = made.analysis.unpruned.point.first
    assert short.flips == flips(base[both], short.point.first[both])
    assert short.flips.n == both.sum() < where.sum()


def test_seeds_are_averaged(folder: Path, made: Any) -> None:
    r = _point(made.analysis, "random @ 64")
    assert r.point.seeds == (0, 1)
    rows = [x["score"] for x in _rows(folder) if x["trial"] in ("random@64", "random@64.s1")
            and x["task"] == "word"]  # fmt: skip
    assert r.tasks["word"].accuracy == pytest.approx(np.mean(rows))


def test_order_of_rows_changes_nothing(folder: Path, tmp_path: Path) -> None:
    for name in ("run.json", "latency.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    lines = (folder / "rows.jsonl").read_text().splitlines()
    mixed = [lines[i] for i in np.random.default_rng(3).permutation(len(lines))]
    (tmp_path / "rows.jsonl").write_text("".join(f"{x}\n" for x in mixed))
    one, two = (analyse(load_run(f), draws=200) for f in (folder, tmp_path))
    for a, b in zip(one.results, two.results, strict=True):
        assert a.point.name == b.point.name
        for name in ("accuracy", "interval", "drop_interval", "flips", "loyalty", "groups", "on"):
            assert getattr(a, name) == getattr(b, name), name


def test_frontiers_leave_nominal_budgets_out(made: Any) -> None:
    points = {r.point.name: r for r in made.analysis.results}
    shrunk = points["downsample @ 64"]
    assert shrunk.point.nominal
    assert shrunk.point.tokens == 64
    assert shrunk.point.measured["tokens_mean"] == fake_run.N
    assert not any(r.on for r in points.values() if r.point.variant == "downsample")
    assert "tokens" in points["unpruned"].on
    best = max((r for r in points.values() if r.point.budget == 16 and not r.point.nominal),
               key=lambda r: r.accuracy)  # fmt: skip
    assert "tokens" in best.on


def test_pairs_of_methods(made: Any) -> None:
    found = made.differences
    assert found.variants == ("todre",)  # divprune lacks answers at 64, fastv cannot reach it
    complete = analyse(made.analysis.data, at=0.25, draws=50)
    assert complete.at == 144
    found = differences(complete)
    assert set(found.variants) == {"divprune", "fastv", "todre"}
    assert len(found.pairs) == 3 * len(fake_run.TASKS)
    raw = []
    for pair in found.pairs:
        a, b = (_point(complete, f"{x} @ 144") for x in (pair.better, pair.worse))
        where = complete.data.in_tasks([pair.task])
        counted = flips(a.point.first[where], b.point.first[where])
        raw.append(counted.p)
        assert counted.lost >= counted.gained
        assert pair.p >= counted.p
    assert min(p.p for p in found.pairs) == pytest.approx(min(1, min(raw) * len(raw)))
    total = sum(found.wins(a, b) for a in found.variants for b in found.variants)
    assert total == sum(map(len, found.tasks().values()))


def test_noise_floor(made: Any) -> None:
    assert [r.point.batch_size for r in made.analysis.noise] == [1, 16]
    assert made.analysis.noise_gap == max(abs(r.drop) for r in made.analysis.noise)
    assert made.analysis.noise[0].loyalty > 0.8
    assert made.analysis.blind[0].accuracy < 0.5


@pytest.mark.parametrize(("wanted", "budget"), [(0.11, 64), (0.02, 16), (100, 64), (9999, 144)])
def test_nearest_budget(wanted: float, budget: float) -> None:
    assert nearest_budget([16, 64, 144], wanted, 576) == budget


# ------------------------------------------------------------------------------ groups


def test_groups_are_as_defined(folder: Path, made: Any) -> None:
    rows = {(r["trial"], r["item"]): r["score"] for r in _rows(folder)}
    names = {item for _, item in rows}
    for table in made.groups:
        g = table.groups
        trial = f"downsample@{g.budget:g}"
        correct = {i for i in names if rows["none", i] == 1}
        assert set(g.hard) == {i for i in correct if rows[trial, i] == 0}
        assert set(g.easy) == {i for i in correct if rows[trial, i] == 1}
        assert "downsample" not in [row.result.point.variant for row in table.rows]
        for row in table.rows:
            if len(row.result.point.seeds) == 1 and not row.hard.missing:
                trial_of = row.result.point.trials[0]
                own = [rows[trial_of, i] for i in g.hard]
                assert (row.hard.correct, row.hard.n) == (sum(own), len(own))
        shares = [row.hard.accuracy for row in table.rows]
        assert shares == sorted(shares, reverse=True)


def test_groups_count_missing_answers(made: Any) -> None:
    table = next(t for t in made.groups if t.groups.budget == 64)
    row = next(r for r in table.rows if r.result.point.variant == "divprune")
    absent = {f"item{n:05d}" for n in range(5)}
    assert row.hard.missing == len(absent & set(table.groups.hard))
    assert row.hard.missing + row.easy.missing > 0
    assert row.hard.n + row.hard.missing == len(table.groups.hard)


def test_groups_round_trip_and_of_another_model(folder: Path, made: Any, tmp_path: Path) -> None:
    own = make_groups(made.analysis)
    assert read_groups(folder) == read_groups(folder / "report") == own
    assert read_groups(folder / "report" / "groups") == own
    other = fake_run.make_run(tmp_path / "other", count=COUNT, seed=9, model="large")
    report = build_report(other, groups_from=folder, draws=50)
    assert [t.groups for t in report.groups] == own
    text = report.markdown.read_text()
    assert "another run's model (tiny)" in text.replace("\\", "")
    # its own lists are written all the same
    assert read_groups(other) == make_groups(report.analysis) != own


def test_groups_match_by_share_of_tokens(made: Any) -> None:
    g = make_groups(made.analysis)[0]
    moved = type(g)(**{**g.__dict__, "budget": 4.0})  # another N, the same fraction
    (table,) = group_tables(made.analysis, [moved])
    assert {row.result.point.budget for row in table.rows} == {16.0}


# ------------------------------------------------------------------------------ pages


def test_files(made: Any) -> None:
    folder = made.html.parent
    assert folder.name == "report"
    plots = {p.name for p in (folder / "plots").iterdir()}
    assert plots == {f"accuracy-vs-{x}.svg" for x in ("tokens", "flops", "latency")} | {
        "accuracy-per-variant.svg", "oracle.svg", "retention.svg"}  # fmt: skip
    for plot in (folder / "plots").iterdir():
        ElementTree.fromstring(plot.read_text())
    text = made.markdown.read_text()
    for plot in plots:
        assert f"](plots/{plot})" in text


def test_markdown_tables_are_regular(made: Any) -> None:
    block: list[int] = []
    for line in [*made.markdown.read_text().splitlines(), ""]:
        if line.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", line)))
        elif block:
            assert len(set(block)) == 1, line
            block = []


def test_page_says_what_it_must(made: Any) -> None:
    text = made.html.read_text()
    for section in ("summary", "plots", "results", "tasks", "oracle", "differences", "groups",
                    "noise", "gallery", "exceptions", "environment"):  # fmt: skip
        assert f'<section id="{section}">' in text
    for words in (
        "2 questions failed", "points lack answers", "Not in the headline average: relation",
        "out of memory", "the lowest mean it can do", "Blind baseline",
        "tokprune sweep --model tiny",
        "Correct answer:", "✓ correct", "✗ incorrect", "frontier", "@media (max-width",
    ):  # fmt: skip
        assert words in text, words
    assert not re.search(r'\b(?:src|href)="(?!data:image/|#)', text)
    assert not re.search(r"<script|<link|@import|url\((?!#)", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert {a or b for a, b in used} <= set(ids)


def test_page_escapes_what_others_wrote(tmp_path: Path) -> None:
    folder = fake_run.make_run(tmp_path, count=90, methods=("todre",), budgets=(64,), overlays=1)
    evil = "<script>alert(1)</script>|*x*"
    text = (folder / "rows.jsonl").read_text().replace("Question 0", json.dumps(evil)[1:-1])
    (folder / "rows.jsonl").write_text(text)
    report = build_report(folder, benchmark=fake_run.FakeBenchmark(90), draws=50)
    page = report.html.read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "\\<script\\>" in report.markdown.read_text()


def test_same_run_same_page(made: Any, folder: Path, tmp_path: Path) -> None:
    again = build_report(folder, tmp_path, benchmark=fake_run.FakeBenchmark(COUNT), draws=400)
    assert again.html.read_bytes() == made.html.read_bytes()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"latency": False}, "Accuracy against latency: not measured"),
        ({"noise": False}, "The noise floor was not measured"),
        ({"controls": ()}, "no down-sampling control"),
        ({"controls": ("random",), "methods": ()}, "Fewer than two finished methods"),
        ({"controls": (), "methods": ()}, "Fewer than two finished methods"),
    ],
)
def test_parts_may_be_absent(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    folder = fake_run.make_run(tmp_path, budgets=(16, 64), **changes)
    report = build_report(folder, draws=50)
    assert expected in report.html.read_text()
    assert "no overlays, so there is no gallery" in report.markdown.read_text()
    if not changes.get("controls", True):
        assert contest(report.analysis) is None


def test_gallery_without_its_benchmark(folder: Path, tmp_path: Path) -> None:
    report = build_report(folder, tmp_path / "one", draws=50)  # no benchmark is called 'fake'
    text = report.html.read_text()
    assert "cannot be loaded, so there is no gallery" in text
    changed = fake_run.FakeBenchmark(COUNT)
    changed.version = "2"
    report = build_report(folder, tmp_path / "two", benchmark=changed, draws=50)
    assert "is version &#39;2&#39; by now" in report.html.read_text()


def test_unfinished_run(tmp_path: Path) -> None:
    folder = fake_run.make_run(tmp_path)
    run = json.loads((folder / "run.json").read_text())
    run["finished"] = False
    (folder / "run.json").write_text(json.dumps(run))
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[: 90 + 30]) + lines[200][:50])
    report = build_report(folder, draws=50)
    text = report.html.read_text()
    assert "The sweep has not finished" in text
    assert "cut off in the middle" in text  # the torn line is named


def test_drawing_shows_kept_patches() -> None:
    from PIL import Image

    image = Image.new("RGB", (96, 96), (200, 30, 30))
    record: dict[str, Any] = {"kept": [[0, 0, 0], [2, 1, 0]], "merged": False}
    drawn = draw(image, record, 16)
    assert drawn is not None
    trial = drawn.width // 4
    middle = [drawn.getpixel((c * trial + trial // 2, r * trial + trial // 2))
              for r, c in ((0, 0), (2, 1), (3, 3), (0, 1))]  # fmt: skip
    assert middle[0] == middle[1] == (200, 30, 30)
    for dropped in middle[2:]:
        assert max(dropped) - min(dropped) < 5  # grey
    assert drawn.getpixel((0, 0)) == (255, 140, 0)
    merged = {**record, "merged": True, "sources": [[[0, 0, 0], [0, 1, 0]], [[2, 1, 0]]]}
    shown = draw(image, merged, 16)
    assert shown is not None
    assert shown.getpixel((trial + trial // 2, trial // 2)) == shown.getpixel(
        (trial // 2, trial // 2)
    )
    assert draw(image, record, 15) is None  # no square


def test_looks_are_distinct() -> None:
    variants = [f"method{n:02d}" for n in range(16)]
    found = looks([*variants, *fake_run.CONTROLS], fake_run.CONTROLS)
    pairs = {(x.colour, x.marker) for x in found.values()}
    assert len(pairs) == 20
    assert len({found[a].colour for a in variants}) == 16
    for look in found.values():
        assert _contrast(look.colour) >= 3, look.colour
        assert look.filled == (look not in [found[c] for c in fake_run.CONTROLS])
    many = looks([f"m{n:02d}" for n in range(40)], [])
    assert len({(x.colour, x.marker) for x in many.values()}) == 40


def _contrast(colour: str) -> float:
    """Contrast with white, WCAG 2."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


# ------------------------------------------------------------------------------ bad input


def _edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return edit


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def _without_unpruned(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "trials": [c for c in run["trials"] if c["variant"] != "none"]}


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no run.json": (lambda f: (f / "run.json").unlink(), "holds no run.json"),
    "corrupt run.json": (_write("run.json", "{"), r"run\.json: not valid JSON"),
    "list run.json": (_write("run.json", "[]"), "should be a JSON object"),
    "schema": (_edit("run.json", lambda r: {**r, "schema": 3}), "schema 3 cannot be read"),
    "field": (_edit("run.json", lambda r: {k: r[k] for k in r if k != "model"}), "'model'"),
    "no rows": (lambda f: (f / "rows.jsonl").unlink(), "no answers yet"),
    "empty rows": (_write("rows.jsonl", ""), "no answers yet"),
    "corrupt row": (_write("rows.jsonl", "{}\n{}\n"), r"rows\.jsonl, line 1: corrupt row"),
    "other model": (
        _edit("run.json", lambda r: {**r, "model": {**r["model"], "hash": "x"}}),
        "no answers yet .* rows are of older code",
    ),
    "no unpruned": (_edit("run.json", _without_unpruned), "no answers of the unpruned model"),
    "corrupt latency": (_write("latency.json", "nonsense"), r"latency\.json: not valid JSON"),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run.make_run(tmp_path_factory.mktemp("small"), count=18, budgets=(64,))


@pytest.fixture
def copied(small: Path, tmp_path: Path) -> Path:
    for file in small.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("case", BROKEN)
def test_bad_run_folders(copied: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(copied)
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    with pytest.raises(RunFolderError, match=message):
        build_report(copied)
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before


def test_damaged_overlay_costs_only_the_gallery(copied: Path) -> None:
    (copied / "overlays").mkdir()
    (copied / "overlays" / "x.json").write_text("{")
    assert "no gallery: " in build_report(copied, draws=20).markdown.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no group files"),
        ("corrupt", "not a group file"),
        ({"schema": 7}, "schema=7"),
        ({"hard": None}, "not a group file"),
        (
            {"benchmark": {"name": "other", "version": "1", "split": "test"}},
            "benchmark name 'other'",
        ),
        ({"benchmark": {"name": "fake", "version": "0", "split": "test"}}, "benchmark version '0'"),
        ({"fraction": 0.5}, "groups at 50 % of the visual tokens"),
    ],
)
def test_bad_groups(copied: Path, tmp_path: Path, change: Any, message: str) -> None:
    place = tmp_path / "groups_of_others"
    place.mkdir()
    if change is not None:
        (made,) = make_groups(analyse(load_run(copied), draws=20))
        text = "{" if change == "corrupt" else json.dumps({**made.to_dict(), **change})
        (place / "budget-64.json").write_text(text)
    with pytest.raises(RunFolderError, match=message):
        build_report(copied, groups_from=place)
    assert not (copied / "report").exists()


# ------------------------------------------------------------------------------ command line


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str, str]]:
    def run(*args: Any) -> tuple[Any, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            app([*map(str, args)])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run


def test_cli(small: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    code, out, err = call("report", small, "--out", tmp_path / "r", "--at", "64", "--open")
    assert (code, err) == (0, "")
    assert str(tmp_path / "r" / "report.html") in out
    assert "at 64 tokens" in out
    assert "todre" in out
    assert "unpruned" in out
    assert opened == [(tmp_path / "r" / "report.html").resolve().as_uri()]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["a", "b"], "takes one run folder, got 2"),
        (["RUN", "--at", "-3"], "--at -3 should be"),
        (["RUN", "--groups-from", "nowhere"], "nowhere: no group files"),
        ([], "Missing argument"),
    ],
)
def test_cli_bad_input(small: Path, call: Any, args: list[str], message: str) -> None:
    code, out, err = call("report", *[str(small) if a == "RUN" else a for a in args])
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert message in err


def test_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokprune.eval import extra

    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "scipy" else object())
    with pytest.raises(ImportError, match=r"need scipy.*pip install 'tokprune\[sweep\]'"):
        extra.check_extra("reports")


def test_unknown_numbers_are_left_out(copied: Path) -> None:
    """Rows of failed items have no costs; a point that failed altogether has none at all."""
    lines = []
    for row in _rows(copied):
        if row["trial"] == "todre@64":
            row |= {"status": "failed", "score": 0.0, "answer": "", "error": "E: x"}
            row |= dict.fromkeys(report_data.MEASURED) | {"new_tokens": 0}
        lines.append(json.dumps(row))
    (copied / "rows.jsonl").write_text("".join(f"{x}\n" for x in lines))
    report = build_report(copied, draws=20)
    r = _point(report.analysis, "todre @ 64")
    assert r.accuracy == 0
    assert r.loyalty == 0
    assert math.isnan(r.cost("tokens"))
    assert not set(r.on) & {"tokens", "flops"}


def test_the_harness_s_own_metrics_have_a_table(tmp_path: Path) -> None:
    folder = fake_run.make_run(tmp_path, methods=("todre",), budgets=(64,))
    assert "own metrics" not in build_report(folder).markdown.read_text()
    metrics = {
        "none": {"mme": {"mme_perception_score": 1510.72, "mme_perception_score_stderr": 3.0}},
        "todre@64": {"mme": {"mme_perception_score": 1444.0}, "pope": {"pope_f1_score": 0.81234}},
        "elsewhere@3": {"gqa": {"exact_match": 0.5}},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    lines = build_report(folder).markdown.read_text().replace("\\_", "_").splitlines()
    (head,) = [n for n, line in enumerate(lines) if "own metrics at 64 tokens" in line]
    table = [
        [trial.strip() for trial in line.strip("|").split("|")]
        for line in lines[head : head + 7]
        if line.startswith("|")
    ]
    names = table[0]
    rows = {(row[0], row[1]): dict(zip(names, row)) for row in table[2:]}
    assert set(rows) == {("mme", "mme_perception_score"), ("pope", "pope_f1_score")}
    assert rows["mme", "mme_perception_score"]["unpruned"] == "1510.7"
    assert rows["mme", "mme_perception_score"]["todre"] == "1444.0"
    assert rows["pope", "pope_f1_score"]["todre"] == "0.8123"
    assert rows["pope", "pope_f1_score"]["unpruned"] == "–"
