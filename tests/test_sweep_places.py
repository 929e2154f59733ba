"""Where kept tokens stand: counted in a sweep, drawn in a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sweep_case
import tiny
import torch
from fake_run import make_run

import tokprune
from tokprune.eval.benchmarks.base import Item
from tokprune.eval.report import analyse, build_report, load_run
from tokprune.eval.report.places_plot import places_plot
from tokprune.eval.report.plots import styled
from tokprune.eval.sweep import run_sweep
from tokprune.eval.sweep.places import BANDS, kept_places, placed_items
from tokprune.testing import tiny_family


def places(model: Any, inputs: Any, method: str, **options: Any) -> tuple[Any, Any]:
    with tokprune.compress(model, method, **options) as trace, torch.no_grad():
        model(**inputs)
    return trace, [kept_places(trace.last, row) for row in range(len(inputs["input_ids"]))]


def by_hand(trace: Any, row: int, height: int, width: int) -> dict[str, list[int]]:
    found = {"rows": [0] * BANDS, "columns": [0] * BANDS}
    for token in trace.kept(-1, row):
        if token.kind == "patch" and token.tile == 0:
            found["rows"][token.row * BANDS // height] += 1
            found["columns"][token.col * BANDS // width] += 1
    return found


@pytest.mark.parametrize(
    ("method", "options"),
    [("divprune", {"keep": 9}), ("visionzip", {"keep": 9}), ("fastv", {"keep": 7}),
     ("pitome", {"keep": 9})],
)  # fmt: skip
def test_places_are_those_of_the_trace(method: str, options: dict[str, Any]) -> None:
    model = tiny.llava()
    prompts: list[list[Any]] = [[4, "image", 6], [9], [3, "image", "image", 2]]
    trace, found = places(model, tiny.make_inputs(model, prompts), method, **options)
    height = width = tiny.GRID
    for row, own in enumerate(found):
        assert own == (None if row == 1 else by_hand(trace, row, height, width))
    assert sum(found[2]["rows"]) == sum(found[2]["columns"]) > 0


def test_all_tokens_are_spread_evenly() -> None:
    model = tiny.llava()
    _, (own,) = places(model, tiny.make_inputs(model, [[4, "image", 6]]), "random", keep=1.0)
    height = width = tiny.GRID
    for name, side, other in (("rows", height, width), ("columns", width, height)):
        bands = [n * BANDS // side for n in range(side)]
        assert own[name] == [other * bands.count(n) for n in range(BANDS)]


def test_of_tiles_the_one_that_shows_all() -> None:
    model = tiny.llava_next()
    inputs = tiny.make_inputs(model, [[3, "image", 5]], [(40, 30)])
    trace, (own,) = places(model, inputs, "divprune", keep=24)
    assert own == by_hand(trace, 0, tiny.GRID, tiny.GRID)
    assert sum(own["rows"]) < 24


@pytest.mark.parametrize("unit", ["video", "frame", 2])
def test_frames_of_a_video(unit: Any) -> None:
    made = tiny_family("llava-next-video")
    model = made.build(attention="sdpa")
    inputs = made.inputs(model, [[3, "video", 5]])
    trace, (own,) = places(model, inputs, "divprune", keep=6, video_unit=unit)
    frames = [0] * BANDS
    for token in trace.kept(-1):
        if token.kind == "patch":
            frames[token.tile * BANDS // 4] += 1
    assert own["frames"] == frames
    assert sum(own["frames"]) == sum(own["rows"])


def test_the_report_draws_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", count=60, methods=("divprune", "todre"))
    assert places_plot(analyse(load_run(folder)).at_budget()) is None
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        if row["trial"].startswith("divprune@"):
            row["evidence"] = {"places": {"rows": [2, 0, 0, 0, 0, 0, 0, 2], "columns": [1] * 8}}
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    analysis = analyse(load_run(folder), at=64)
    point = next(r.point for r in analysis.results if r.point.name == "divprune @ 64")
    assert point.places == {"rows": [120, 0, 0, 0, 0, 0, 0, 120], "columns": [60] * 8}
    plot = styled(places_plot, analysis.at_budget())
    assert plot is not None
    assert ">4.0<" in plot.wide  # half of the tokens in an eighth of the image
    assert ">1.0<" in plot.wide
    assert "todre" not in plot.wide
    assert "Where kept tokens stand, at 64 tokens" in build_report(folder).markdown.read_text()


def test_a_sweep_counts_some_questions(tmp_path: Path) -> None:
    model = sweep_case.make_model(tmp_path / "model")
    benchmark = sweep_case.make_benchmark(tmp_path / "questions", 5)
    settings = sweep_case.settings(model, benchmark, tmp_path / "run", methods=("divprune",))
    run = run_sweep(settings)
    for row in run.rows:
        found = row["evidence"].get("places")
        assert (found is None) == (row["trial"] == "none")
        if found is not None:
            assert sum(found["rows"]) == sum(found["columns"]) == row["tokens_last"]


def test_questions_are_counted_evenly_and_not_too_many() -> None:
    items = [Item(str(n), "t", "i", "?", ("x",)) for n in range(1000)]
    placed = placed_items(items)
    assert placed == {str(n) for n in range(0, 1000, 5)}
    assert placed_items(items[:7]) == {str(n) for n in range(7)}
    assert placed_items([]) == frozenset()
