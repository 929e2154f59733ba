"""The ledger of published numbers: its schema, its figures, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokprune.eval.published import (
    BENCHMARKS,
    MODELS,
    Row,
    baseline,
    differing,
    find_benchmark,
    load_ledger,
    load_paper,
    model_key,
    papers,
    read_paper,
    spread,
)
from tokprune.eval.published.ledger import FOLDER
from tokprune.eval.published.reproduce.selection import full_options
from tokprune.eval.sweep.trials import json_options
from tokprune.methods import available_methods

PAPERS = {key: load_paper(key) for key in papers()}
ROWS = [row for rows in PAPERS.values() for row in rows]


def value(paper: str, table: str, label: str, asked: str, benchmark: str, **more: Any) -> float:
    """The one figure that fits."""
    found = [
        row for row in PAPERS[paper]
        if (row.table, row.label, row.budget.printed, row.benchmark)
        == (table, label, asked, benchmark)
        and all(getattr(row, name) == wanted for name, wanted in more.items())
    ]  # fmt: skip
    assert len(found) == 1, (paper, table, label, asked, benchmark, len(found))
    return found[0].value


# ------------------------------------------------------------------------------ all files


def test_every_file_is_of_the_schema() -> None:
    assert len(papers()) >= 18
    assert {path.stem for path in FOLDER.glob("*.json")} == set(papers())
    assert load_ledger() == ROWS
    # a file that loses rows should be noticed; new ones are welcome
    least = {"todre": 221, "transprune": 293, "pitome": 193, "m3": 171, "dart": 119, "tome": 34,
             "flowcut": 106, "divprune": 91, "visionzip": 62, "sparsevlm": 83, "fastv": 45,
             "pyramiddrop": 30, "centerclip": 90, "cdpruner": 26, "mustdrop": 1, "wen2025": 21,
             "vtcbench": 16, "unattributed": 143, "vispruner": 63, "holov": 57,
             "scope": 117, "hiprune": 35, "prunesid": 40, "clse": 96, "priortr": 36,
             "sieve": 88, "msdg": 114, "score": 19, "tops": 119,
             "restore": 231, "era": 17, "centring": 193}  # fmt: skip
    for key, rows in least.items():
        assert len(load_paper(key)) >= rows, key


def test_every_row_says_where_it_comes_from() -> None:
    for row in ROWS:
        assert row.spec.split(", ")[0].split(" and ")[0].endswith(".md") or "field.md" in row.spec
        assert row.source
        assert row.table
        assert math.isfinite(row.value)


@pytest.mark.parametrize("key", papers())
def test_files_are_written_one_row_a_line(key: str) -> None:
    """So that a changed figure is one changed line."""
    text = (FOLDER / f"{key}.json").read_text(encoding="utf-8")
    content = json.loads(text)
    lines = [line.strip().removesuffix(",") for line in text.splitlines()]
    assert all(json.dumps(row, ensure_ascii=False) in lines for row in content["rows"])


def test_published_options_are_taken_by_our_methods() -> None:
    checked = set()
    for row in ROWS:
        if row.options is not None and row.method != "none":
            assert row.method in available_methods(), row.key
            full_options(row)
            checked.add(row.method)
    assert checked >= {"todre", "transprune", "flowcut", "pitome", "tome", "mustdrop", "visionzip",
                       "divprune", "fastv", "pool", "grid"}  # fmt: skip


def test_presets_that_have_figures_are_in_the_ledger() -> None:
    """The options of a row are those of the method's own preset for that budget."""
    cases = {
        ("llava-1.5-7b", "visionzip", "VisionZip", "64"): ("visionzip", "llava-1.5", 64),
        ("llava-1.5-7b", "pitome", "PiToMe", "r=0.9"): ("pitome", "llava-1.5", "r=0.9"),
        ("llava-1.5-7b", "pitome", "ToMe", "r=0.95"): ("tome", "llava-1.5", "r=0.95"),
        ("llava-1.5-7b", "transprune", "TransPrune-High", "High"):
            ("transprune", "llava-1.5", "high"),
        ("llava-1.5-7b", "transprune", "TransPrune-Low", "Low"): ("transprune", "llava-1.5", "low"),
        ("llava-next-7b", "todre", "ToDRE", "10 %"): ("todre", "llava-next", 288),
        ("llava-1.5-7b", "fastv", "FastV", "K=3 R=50 %"): ("fastv", "llava-1.5", "K=3 R=50%"),
        ("llava-next-7b", "flowcut", "FlowCut", "320"): ("flowcut", "llava-next", 320),
        ("llava-1.5-7b", "sparsevlm", "SparseVLM", "128"): ("sparsevlm", "llava-1.5", 128),
        ("llava-1.5-7b", "sparsevlm", "with recycling", "96"): ("sparsevlm", "llava-1.5", 96),
        ("llava-1.5-7b", "dart", "DART", "64"): ("dart", "llava-1.5", 64),
        ("llava-next-7b", "dart", "DART", "320"): ("dart", "llava-next", 320),
        ("llava-1.5-7b", "clse", "CLSE", "64"): ("clse", "llava-1.5", 64),
        ("qwen2-vl-7b", "clse", "CLSE", "−77.8 %"): ("clse", "qwen2-vl", 0.223),
        ("llava-1.5-7b", "priortr", "PriorTR", "128"): ("priortr", "llava-1.5", 128),
        ("llava-1.5-7b", "score", "SCoRe", "64"): ("score", "llava-1.5", 64),
        ("llava-1.5-7b", "tops", "TOPS", "64"): ("tops", "llava-1.5", 64),
        ("llava-next-7b", "tops", "TOPS", "320"): ("tops", "llava-next", 320),
        ("qwen2.5-vl-7b", "tops", "TOPS", "128"): ("tops", "qwen2.5-vl", 128),
    }  # fmt: skip
    for (model, paper, label, asked), (method, family, budget) in cases.items():
        row = next(
            r for r in load_paper(paper)
            if (r.model, r.label, r.budget.printed, r.method) == (model, label, asked, method)
        )  # fmt: skip
        preset = available_methods()[method].preset(family, budget)
        assert full_options(row) == json_options(preset), row.key


def test_printed_averages_follow_from_the_printed_parts() -> None:
    """A mistyped figure shows here: averages of retention that papers print, worked out again."""
    odd = {
        # over more benchmarks than our sources list
        ("flowcut", "FlowCut", "64"),
        *(("scope", "SCOPE", budget) for budget in ("128", "64", "32", "640", "320", "160")),
        *(("tops", "TOPS", budget) for budget in ("128", "64", "32", "256", "640")),
        ("todre", "ToDRE", "25 %", "13B"), ("transprune", "PDrop (low)", "low"),  # as printed
        ("sieve", "SIEVE", "128"), ("centring", "HoloV", "128"),
        *(("centring", "PruneSID", budget) for budget in ("128", "64", "32")),
    }  # fmt: skip
    checked = 0
    for average in ROWS:
        if average.metric != "mean of score ÷ unpruned score":
            continue
        same = ("table", "label", "model")
        parts = [
            row.value / base.value for row in PAPERS[average.paper.key]
            if row.quality and row.benchmark != "average"
            and all(getattr(row, n) == getattr(average, n) for n in same)
            and row.budget.printed == average.budget.printed
            and (base := baseline(row, PAPERS[average.paper.key])) is not None
        ]  # fmt: skip
        name = (average.paper.key, average.label, average.budget.printed)
        if len(parts) < 5 or name in odd or (*name, average.table) in odd:
            continue
        assert 100 * sum(parts) / len(parts) == pytest.approx(average.value, abs=0.07), average.key
        checked += 1
    assert checked >= 62


@pytest.mark.parametrize(
    ("paper", "table", "label", "asked", "benchmark", "more", "printed"),
    [
        ("todre", "Table 1", "LLaVA-NeXT-7B", "unpruned", "mme", {}, 1519.6),
        ("todre", "Table 1", "ToDRE", "25 %", "gqa", {}, 63.3),
        ("todre", "Table 1", "ToDRE", "10 %", "vqav2", {}, 74.4),
        ("todre", "Table 1", "DivPrune", "10 %", "mme", {}, 1396.2),
        ("todre", "13B", "ToDRE", "10 %", "vizwiz_vqa", {}, 56.9),
        ("todre", "stages", "both stages", "10 %", "average", {"unit": "s"}, 29 * 60 + 43),
        ("transprune", "LLaVA-1.5-7B", "TransPrune-High", "High", "mme", {}, 1540),
        ("transprune", "LLaVA-1.5-7B", "TransPrune-Low", "Low", "textvqa", {}, 56.5),
        ("transprune", "LLaVA-NeXT-7B", "TransPrune-High", "High", "efficiency", {}, 8.33),
        ("transprune", "ablations", "TTV only", "High", "textvqa", {}, 50.9),
        ("flowcut", "LLaVA-1.5-7B", "FlowCut", "64", "gqa", {}, 55.6),
        ("flowcut", "Qwen2-VL-7B", "FlowCut", "11.1 %", "textvqa", {}, 68.9),
        ("flowcut", "speed", "FlowCut", "160", "pope", {"metric": "prefill time"}, 63.8),
        ("flowcut", "LLaVA-NeXT-7B, quoted methods", "SparseVLM", "160", "mme", {}, 1542),
        ("pitome", "log, odd layers", "PiToMe", "r=0.9", "mme", {}, 1448.0),
        ("pitome", "log, odd layers", "ToMe", "r=0.85", "textvqa", {}, 34.13),
        ("pitome", "Table 3", "PiToMe", "r=0.925", "textvqa", {}, 45.6),
        ("pitome", "Table 4", "PiToMe", "r=0.9", "vqav2", {}, 5 * 3600 + 44 * 60),
        ("pitome", "log, every layer", "PiToMe", "r=0.95", "mme", {"sd": 9}, 1450),
        ("tome", "README", "ToMe", "r=13", "imagenet",
         {"model": "vit-b-16", "unit": "images/s"}, 511),
        ("divprune", "main", "DivPrune", "ratio 0.098", "mmmu", {"model": "llava-1.5-7b"}, 35.89),
        ("divprune", "main", "DivPrune", "ratio 0.098", "seedbench",
         {"model": "llava-next-7b"}, 64.11),
        ("fastv", "README, lmms-eval", "FastV", "K=3 R=50 %", "coco2017_cap", {}, 110.8),
        ("fastv", "README, latency", "FastV", "K=2 R=75 %", "a_okvqa", {"unit": "s"}, 0.124),
        ("visionzip", "LLaVA-1.5-7B", "VisionZip", "64", "pope", {}, 77.0),
        ("visionzip", "LLaVA-NeXT-7B", "VisionZip", "640", "mmbench_cn", {}, 57.8),
        ("sparsevlm", "LLaVA-1.5-7B", "SparseVLM", "192", "mmvet", {}, 33.1),
        ("sparsevlm", "recycling", "without recycling", "96", "pope", {}, 77.5),
        ("dart", "LLaVA-1.5-7B", "DART", "128", "ocrbench", {}, 296),
        ("dart", "LLaVA-1.5-7B", "MustDrop", "64", "pope", {"status": "second-hand"}, 68.0),
        ("dart", "LLaVA-1.5-7B", "MustDrop", "64", "vizwiz_vqa", {"status": "from memory"}, 51.2),
        ("pyramiddrop", "trained", "PyramidDrop, S = 4", "S=4", "scienceqa_img", {}, 71.0),
        ("m3", "training-free, MMBench", "spatial sampling", "36 per tile", "mmbench_en", {},
         60.05),
        ("m3", "LLaVA-NeXT-7B", "M3", "9 per tile", "docvqa", {}, 43.52),
        ("centerclip", "MSVD", "k-medoids++ 4, 160", "S=4 K=160", "msvd_retrieval",
         {"metric": "R@1 text→video"}, 50.6),
        ("cdpruner", "averages", "CDPruner", "320", "average", {}, 98.0),
        ("wen2025", "LLaVA-NeXT-7B, 320 of 2880", "MustDrop", "320", "pope",
         {"metric": "total time"}, 23 * 60 + 40),
        ("vtcbench", "hard group", "DART", "r=2 (25 %)", "vtc_hard", {}, 53.6),
        ("mustdrop", "abstract", "MustDrop", "compression ratio 92.2 %", "efficiency", {}, 88.5),
        ("trim", "GLaMM, in others' tables", "TRIM", "not stated", "refcoco", {}, 62.6),
        ("mmtok", "LLaVA-1.5-7B, few tokens", "MMTok", "4", "average", {}, 76.7),
        ("clse", "LLaVA-1.5-7B", "CLSE", "128", "ocrbench", {}, 284),
        ("clse", "Qwen2-VL-7B", "CLSE", "−88.9 %", "mme", {}, 2008),
        ("priortr", "LLaVA-1.5-7B, average of 12", "PriorTR", "64", "average", {}, 94.5),
        ("sieve", "LLaVA-1.5-7B", "SIEVE", "64", "mme", {}, 1740),
        ("sieve", "Qwen2.5-VL-7B", "SIEVE", "22.2 %", "mmbench_cn", {}, 80.2),
        ("sieve", "time", "random", "not stated", "efficiency",
         {"metric": "prefill time"}, 7 * 60 + 20),
        ("msdg", "LLaVA-1.5-7B", "MSDG-Prune", "192", "vizwiz_vqa", {}, 55.0),
        ("msdg", "Qwen2.5-VL-7B", "MSDG-Prune", "11.1 %", "hrbench8k", {}, 59.0),
        ("msdg", "ablation", "sinks kept", "22.2 %", "average", {}, 96.5),
        ("score", "LLaVA-1.5-7B", "SCoRe", "64", "average", {}, 97.8),
        ("score", "exponent", "alpha = 0", "32", "pope", {}, 76.2),
        ("tops", "LLaVA-1.5-7B", "TOPS", "32", "mme", {}, 1384.7),
        ("tops", "LLaVA-NeXT-7B", "TOPS", "160", "average", {}, 96.4),
        ("tops", "Qwen2.5-VL-7B", "TOPS", "128", "mmstar", {}, 53.9),
        ("tops", "criteria", "R + C", "32", "average", {}, 94.1),
        ("tops", "raters", "last text token", "128", "mmbench_en", {}, 62.4),
        ("restore", "LLaVA-1.5-7B", "HoloV + RESTORE", "64", "mme", {}, 1787),
        ("restore", "LLaVA-1.5-7B", "VisPruner", "64", "average", {}, 92.8),
        ("restore", "LLaVA-1.5-7B, inside the decoder", "FastV + RESTORE", "64", "average", {},
         89.9),
        ("restore", "FlowCut", "FlowCut", "128", "average", {}, 97.0),
        ("restore", "LLaVA-NeXT-7B", "HoloV", "160", "textvqa", {}, 56.0),
        ("restore", "Qwen2.5-VL-7B", "DivPrune + RESTORE", "11.1 %", "average", {}, 89.8),
        ("restore", "ablation: calibration", "VisionZip, size", "64", "average", {}, 94.4),
        ("restore", "cost", "with RESTORE", "64", "efficiency", {}, 151.1),
        ("era", "Table 1", "ERA", "32", "mme", {}, 1312.6),
        ("era", "Table 1", "CDPruner", "160", "average", {"model": "llava-next-13b"}, 95.8),
        ("centring", "LLaVA-1.5-7B", "DivPrune + Cen-Prune", "64", "vizwiz_vqa", {}, 57.4),
        ("centring", "LLaVA-1.5-7B", "CDPruner + Cen-Prune", "128", "ocrbench", {}, 300),
        ("centring", "LLaVA-NeXT-7B", "ZOO-Prune + Cen-Prune", "160", "average", {}, 91.9),
        ("centring", "Qwen2.5-VL-7B", "DivPrune + Cen-Prune", "10 %", "mme", {}, 2156),
        ("centring", "LLaVA-Video-7B", "CDPruner", "16 per frame of 169", "average", {}, 85.8),
        ("centring", "ablation, LLaVA-1.5-7B", "DivPrune, centred", "32", "average", {}, 88.2),
        ("unattributed", "LLaVA-1.5-7B, re-run", "FastV, re-run", "192", "mme", {}, 1821),
    ],
)  # fmt: skip
def test_figures_are_those_of_the_specs(
    paper: str, table: str, label: str, asked: str, benchmark: str, more: dict[str, Any],
    printed: float,
) -> None:  # fmt: skip
    """Typed once more from the result sections, by hand."""
    assert value(paper, table, label, asked, benchmark, **more) == printed


def test_quoted_rows_are_filed_under_the_paper_that_printed_them() -> None:
    printed = {row.paper.key for row in ROWS if row.method == "mustdrop" and row.unit == "%"}
    assert printed == {"dart", "wen2025"}
    divprune = [row for row in load_paper("todre") if row.method == "divprune"]
    assert {row.options_from for row in divprune if row.options is not None} == {"inferred"}
    assert value("todre", "Table 1", "DivPrune", "25 %", "gqa") == 61.8


def test_rows_of_methods_with_something_on_top_are_not_the_methods_own() -> None:
    rows = [r for key in ("restore", "centring") for r in PAPERS[key]]
    assert {r.label.partition(" + ")[2] for r in rows if r.plain} == {""}
    lifts = {"anchors", "rectify", "centre"}
    for row in rows:
        on_top = bool(lifts & {*(row.options or {})})
        assert not (on_top and row.plain), row.key
    reading = next(r for r in rows if r.label == "DivPrune + RESTORE" and r.benchmark == "textvqa")
    assert reading.options is not None
    assert "anchors" not in reading.options
    assert reading.options["rectify"] == {"size": True, "distance": True, "dropped": "none"}


def test_unpruned_figure_of_a_row() -> None:
    rows = load_paper("visionzip")
    row = next(r for r in rows if r.budget.printed == "64" and r.benchmark == "textvqa")
    base = baseline(row, rows)
    assert base is not None
    assert (base.method, base.value, base.budget.tokens) == ("none", 58.2, 576)
    alone = next(r for r in load_paper("centerclip") if r.model == "clip-vit-b-16"
                 and r.table == "ActivityNet")  # fmt: skip
    assert baseline(alone, load_paper("centerclip")) is None


# ------------------------------------------------------------------------------ refused


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / "visionzip.json").read_text(encoding="utf-8"))
    return content


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for part in path[:-1]:
            content = content[part]
        content[path[-1]] = to

    return change


def _remove(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for part in path[:-1]:
            content = content[part]
        del content[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_remove("schema"), r"visionzip.json: field 'schema' is missing"),
        (_set("schema", to=9), "schema 9 cannot be read"),
        (_set("extra", to=1), "field 'extra' is unknown"),
        (_set("rows", to=[]), "holds no row"),
        (_set("paper", "year", to="2025"), "paper: field 'year' should be int or null"),
        (_set("paper", "key", to="zip"), "field 'key' should be the file's name, is 'zip'"),
        (_set("tables", "Table 99", to="?"), "no row is of 'Table 99'"),
        (_set("tables", "LLaVA-1.5-7B", to=""), "remark on 'LLaVA-1.5-7B' should be text"),
        (_remove("rows", 3, "value"), r"rows\[3\]: field 'value' is missing"),
        (_set("rows", 3, "value", to="63.3"), r"rows\[3\]: field 'value' should be int or float"),
        (_set("rows", 3, "value", to=True), "field 'value' should be int or float"),
        (_set("rows", 3, "value", to=142.0), "field 'value' in '%' should be from 0 to 100"),
        (_set("rows", 3, "value", to=-1), "should be from 0 to 100, is -1"),
        (_set("rows", 3, "value", to=math.nan), "should be from 0 to 100, is nan"),
        (_set("rows", 3, "unit", to="percent"), "field 'unit' should be one of %, "),
        (_set("rows", 3, "model", to="llava"), "field 'model' should be one of llava-1.5-7b, "),
        (_set("rows", 3, "benchmark", to="GQA"), "field 'benchmark' should be one of gqa, "),
        (_set("rows", 3, "split", to="train"), "field 'split' should be one of test, is 'train'"),
        (_set("rows", 3, "status", to="sure"), "field 'status' should be one of read, "),
        (_set("rows", 3, "positions", to="kept"), "should be one of compact, preserve, is 'kept'"),
        (_set("rows", 3, "cache", to="yes"), "field 'cache' should be bool or null"),
        (_set("rows", 3, "harness", to=""), "field 'harness' is empty; leave it null"),
        (_set("rows", 3, "table", to=""), "field 'table' is empty"),
        (_set("rows", 3, "options", to=None), "'options' and 'options_from' go together"),
        (_set("rows", 3, "options_from", to="guess"), "should be one of official, paper, inferred"),
        (_set("rows", 3, "colour", to="red"), r"rows\[3\]: field 'colour' is unknown"),
        (_set("rows", 3, "sd", to="9"), "field 'sd' should be int or float or null"),
        (_set("rows", 10, "budget", "tokens", to=600), "field 'tokens' is 600, more than the 576"),
        (_set("rows", 10, "budget", "mean", to=600), "field 'mean' is 600, more than the 576"),
        (_set("rows", 10, "budget", "tokens", to=0), "field 'tokens' should be above 0"),
        (_set("rows", 10, "budget", "kind", to="average"), "field 'kind' should be one of input"),
        (_set("rows", 10, "budget", "each", to=5), "budget: field 'each' is unknown"),
        (_set("rows", 0, "budget", "tokens", to=64), "the unpruned model has all its tokens"),
        (_set("dialect", to=[]), "json, dialect: should be a JSON object, is list"),
        (_set("dialect", "rows", to={}), "dialect: field 'rows' is unknown"),
        (_set("dialect", "paper", to=None), "dialect: field 'paper' should be dict"),
        (_set("dialect", "paper", "mood", to=["", "r"]),
         "dialect, paper: column 'mood' is unknown; there are harness, harness_version, "),
        (_set("dialect", "paper", "pope", to="F1"), r"should be \[value, mark\], is 'F1'"),
        (_set("dialect", "paper", "pope", to=["F1", "r", 2]), r"should be \[value, mark\]"),
        (_set("dialect", "paper", "textvqa_ocr", to=["maybe", "r"]),
         "dialect, paper, column 'textvqa_ocr': should be one of 'yes', 'no', is 'maybe'"),
        (_set("dialect", "paper", "mme", to=["P / T", "r"]), "one of 'P', 'C', .* is 'T'"),
        (_set("dialect", "paper", "mme", to=["P", "R"]), "mark should be one of r, i, u, is 'R'"),
        (_set("dialect", "paper", "mme", to=["P", "u"]), 'null and "u" go together'),
        (_set("dialect", "paper", "mme", to=[None, "i"]), 'null and "u" go together'),
        (_set("dialect", "paper", "mme", to=[3, "i"]), "should be text, is 3"),
        (_set("dialect", "paper", "pixels_max", to=["3", "r"]), "should be an integer above 0"),
        (_set("dialect", "paper", "pixels_max", to=[True, "r"]), "should be an integer above 0"),
        (_set("dialect", "tables", to={"Table 99": None}), "tables: no row is of 'Table 99'"),
        (_set("dialect", "tables", to={"LLaVA-1.5-7B": {"mme": ["T", "r"]}}),
         "dialect, tables, 'LLaVA-1.5-7B', column 'mme': should be one of "),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(change: Callable[[Any], None], message: str) -> None:
    content = copy.deepcopy(_content())
    assert read_paper(content, "visionzip.json")
    change(content)
    with pytest.raises(ValueError, match=message):
        read_paper(content, "visionzip.json")


def test_a_repeated_row_is_refused() -> None:
    content = _content()
    content["rows"].append({**content["rows"][4], "value": 12.0})
    with pytest.raises(ValueError, match=rf"rows\[{len(content['rows']) - 1}\]: repeats rows\[4\]"):
        read_paper(content, "visionzip.json")


def test_unknown_papers_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'todrex' is not in the ledger.* Did you mean 'todre'"):
        load_paper("todrex")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: not valid JSON"):
        load_paper("broken", tmp_path)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match=r"list\.json: should be a JSON object"):
        load_paper("list", tmp_path)


# ------------------------------------------------------------------------------ dialects


def _row_of(paper: str, label: str, printed: str, benchmark: str, table: str = "") -> Row:
    return next(
        r for r in PAPERS[paper]
        if (r.label, r.budget.printed, r.benchmark) == (label, printed, benchmark)
        and r.table.startswith(table)
    )  # fmt: skip


def _known(row: Row) -> dict[str, Any]:
    return {name: (known.value, known.mark) for name, known in row.dialect.items()}


def test_a_row_goes_before_its_table_and_that_before_its_paper() -> None:
    sparse = _known(_row_of("sparsevlm", "SparseVLM", "64", "gqa"))
    assert sparse["harness"] == ("LLaVA scripts", "r")
    assert sparse["mme"] == ("P+C", "i")
    assert sparse["pope"] == (None, "u")
    assert sparse["budget_rule"] == ("mean over layers", "r")
    assert "attention" not in sparse  # the sources are silent
    video = next(r for r in PAPERS["sparsevlm"] if r.model == "video-llava-7b")
    assert "harness" not in _known(video)
    # the README's table has a harness of its own, row by row
    fastv = _known(_row_of("fastv", "FastV", "K=3 R=50 %", "coco2017_cap"))
    assert (fastv["harness"], fastv["cache"]) == (("lmms-eval", "r"), ("on", "r"))
    assert _known(_row_of("clse", "CLSE", "64", "gqa"))["cache"][0] == "on, earlier layers cut"
    limits = _known(_row_of("apet", "ApET", "20 %", "average"))
    assert (limits["pixels_min"], limits["pixels_max"]) == ((200704, "r"), (1605632, "r"))
    assert limits["textvqa_ocr"] == (None, "u")
    # of another method in the paper's table neither rule nor cache is known
    other = _known(_row_of("priortr", "VisPruner", "64", "average"))
    assert other["harness"] == ("lmms-eval", "r")
    assert not other.keys() & {"budget_rule", "cache"}
    assert "budget_rule" not in _known(_row_of("sparsevlm", "LLaVA-1.5-7B", "unpruned", "gqa"))
    # the kind of a budget tells the rule
    assert _known(_row_of("tops", "TOPS", "64", "gqa"))["budget_rule"] == ("mean over layers", "i")


def test_figures_differ_in_what_both_sides_know() -> None:
    def of(paper: str, benchmark: str, **columns: tuple[Any, str]) -> Row:
        content = _content()
        content["paper"]["key"] = paper
        content["dialect"] = {"paper": {n: list(cell) for n, cell in columns.items()}}
        return next(r for r in read_paper(content, f"{paper}.json") if r.benchmark == benchmark
                    and r.method == "visionzip")  # fmt: skip

    def apart(benchmark: str, one: dict[str, Any], other: dict[str, Any]) -> tuple[str, ...]:
        a, b = of("visionzip", benchmark, **one), of("visionzip", benchmark, **other)
        assert differing(a, b) == differing(b, a)
        assert differing(a, a) == ()
        return differing(a, b)

    yes, no = {"textvqa_ocr": ("yes", "r")}, {"textvqa_ocr": ("no", "i")}
    assert apart("textvqa", yes, no) == ("textvqa_ocr",)
    assert apart("gqa", yes, no) == ()  # which does not concern it
    assert apart("textvqa", yes, {"textvqa_ocr": (None, "u")}) == ()
    assert apart("textvqa", yes, {}) == ()
    assert apart("mmbench_en", {"mmbench_file": ("dev, CN", "r")},
                 {"mmbench_file": ("dev 20230712, CN 20231003", "r")}) == ()  # fmt: skip
    assert apart("mmbench_en", {"mmbench_file": ("dev 20231003, CN 20231003", "r")},
                 {"mmbench_file": ("dev 20230712", "r")}) == ("mmbench_file",)  # fmt: skip
    assert apart("pope", {"pope": ("acc, all rows / F1, all rows", "r")},
                 {"pope": ("F1, all rows", "i")}) == ()  # fmt: skip
    assert apart("pope", {"pope": ("acc, all rows / F1, all rows", "r")},
                 {"pope": ("F1, mean of three", "i")}) == ("pope",)  # fmt: skip
    # tiles, and limits of pixels, are of other models; who ran it is no way to measure
    assert apart("gqa", {"next_packing": ("unpad", "r"), "budget_rule": ("door, total", "r"),
                         "pixels_max": (5, "r"), "own_or_copied_from": ("own", "r")},
                 {"next_packing": ("2880", "r"), "budget_rule": ("door, per tile", "r"),
                  "pixels_max": (6, "r"), "own_or_copied_from": ("a", "r")}) == ()  # fmt: skip
    # versions are of one harness
    old = {"harness": ("lmms-eval", "r"), "harness_version": ("0.3.0", "r")}
    assert apart("gqa", old, {**old, "harness_version": ("0.1.2", "r")}) == ("harness_version",)
    assert apart("gqa", old, {"harness": ("LLaVA scripts", "r"), "harness_version": ("1.2.2", "r"),
                              "cache": ("on", "r")}) == ("harness",)  # fmt: skip


def test_the_spread_of_figures_says_in_what_they_differ() -> None:
    rows = [_row_of("sparsevlm", "SparseVLM", "64", "average", "LLaVA-1.5-7B"),
            _row_of("priortr", "SparseVLM", "64", "average")]  # fmt: skip
    low, high, columns = spread(rows)
    assert (low.value, high.value) == (81.4, 89.3)
    assert columns == ("harness", "textvqa_ocr", "mme")
    assert spread(rows[:1]) == (rows[0], rows[0], ())


# ------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("task", "name", "split"),
    [
        ("gqa", "gqa", None), ("vqav2_val", "vqav2", "val"),
        ("mmbench_en_dev", "mmbench_en", "dev"),
        ("textvqa_val", "textvqa", "val"), ("vizwiz_vqa_test", "vizwiz_vqa", "test"),
        ("SQA-I", "scienceqa_img", None), ("MMB-CN", "mmbench_cn", None),
        ("MMB", "mmbench_en", None),
        ("POPE", "pope", None), ("MME-P", "mme", None), ("SEED-I", "seedbench_image", None),
        ("mme", "mme", None), ("ok_vqa_val2014", "ok_vqa", None),
    ],
)  # fmt: skip
def test_tasks_by_any_of_their_names(task: str, name: str, split: str | None) -> None:
    found = find_benchmark(task)
    assert found is not None
    assert (found[0].name, found[1]) == (name, split)


def test_other_tasks_have_no_benchmark() -> None:
    assert find_benchmark("presence") is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b"), ("/models/llava-1.5-7b-hf/", "llava-1.5-7b"),
        ("LLaVA-1.5-7B", "llava-1.5-7b"), ("liuhaotian/llava-v1.5-13b", "llava-1.5-13b"),
        ("llava-hf/llava-v1.6-vicuna-7b-hf", "llava-next-7b"),
        ("llava-hf/llava-v1.6-mistral-7b-hf", "llava-v1.6-mistral-7b"), ("mini", "mini"),
    ],
)  # fmt: skip
def test_models_by_any_of_their_names(name: str, key: str) -> None:
    assert model_key(name) == key


def test_hub_names_lead_back_to_their_models() -> None:
    supported = [model for model in MODELS.values() if model.supported]
    assert len(supported) == 4
    for model in supported:
        assert model.hub is not None
        assert model_key(model.hub) == model.name


# ------------------------------------------------------------------------------ tolerances


def test_tolerance_is_twice_the_binomial_error() -> None:
    gqa = BENCHMARKS["gqa"]
    assert gqa.tolerance(62.0, "accuracy") == pytest.approx(
        2 * 100 * math.sqrt(0.62 * 0.38 / 12578)
    )
    assert gqa.tolerance(62.0, "accuracy", questions=100) == pytest.approx(9.71, abs=0.01)
    assert BENCHMARKS["vqav2"].tolerance(78.5, "accuracy", split="test-dev") == pytest.approx(
        2 * 100 * math.sqrt(0.785 * 0.215 / 107394)
    )
    # a score of 1000 is counted in its own unit
    assert BENCHMARKS["ocrbench"].tolerance(297, "accuracy") == pytest.approx(
        2 * 1000 * math.sqrt(0.297 * 0.703 / 1000)
    )


def test_tolerances_that_are_stated_or_unknown() -> None:
    assert BENCHMARKS["mme"].tolerance(1506, "perception") == 20
    assert BENCHMARKS["mme"].tolerance(1862, "perception + cognition", questions=5) == 20
    assert BENCHMARKS["flickr30k"].tolerance(0.75, "CIDEr", questions=1000) is None
    assert BENCHMARKS["seedbench_image"].tolerance(66.2, "accuracy") is None
    assert BENCHMARKS["seedbench_image"].tolerance(66.2, "accuracy", questions=900) is not None
    assert BENCHMARKS["gqa"].tolerance(62.0, "loyalty") is None


def test_every_figure_of_a_runnable_benchmark_has_a_metric() -> None:
    """Else a row could never be repeated, and would say so for no good reason."""
    for row in ROWS:
        benchmark = BENCHMARKS[row.benchmark]
        if row.quality and benchmark.tasks:
            assert row.metric in benchmark.metrics, row.key


def test_rows_tell_everything_in_json() -> None:
    row = next(r for r in ROWS if r.paper.key == "todre")
    told = json.loads(json.dumps(row.to_dict()))
    assert told["paper"] == {"key": "todre", "title": row.paper.title, "arxiv": "2505.18757"}
    assert told["budget"]["tokens"] == 2880
    assert set(told) == {f.name for f in Row.__dataclass_fields__.values()}
