"""Names, questions and answers that look like mark-up are text in every part of a report."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import fake_run
import pytest

from tokprune.eval.report import build_report
from tokprune.eval.report.legible import legible, one_line, short
from tokprune.eval.sweep.overlays import overlay_name
from tokprune.eval.sweep.results import read_run
from tokprune.eval.sweep.store import Store

TEXTS = (
    r"price $\frac{ in $", "$", "a $x_1$ b", r"\alpha_{", "a|b `c` *d* _e_", "[red]x[/red] [/]",
    ":smile: x", "<script>alert(1)</script>", "&lt; &amp; ©", 'id="a" url(#a) href="#b"',
    "two\nlines\r\nand more", "_hidden", "nul\0 esc\x1b[31m bell\a", "half \ud800 of one",
    "漢字 и ещё", "x" * 3000, "{{ 7 * 7 }} {% raw %}", "../../etc/passwd", "]](http://x) ![a](b)",
    "```\ncode", "# heading", "- list", "%s %d {} {0}", "–" * 40,
)  # fmt: skip


def renamed(folder: Path, texts: tuple[str, ...]) -> dict[str, str]:
    """Put the texts in place of tasks, questions and answers of a run; gives the tasks' names."""
    info = json.loads((folder / "run.json").read_text())
    names = dict(zip(info["benchmark"]["tasks"], texts))
    assert len(texts) >= len(names)
    told = json.dumps(info)
    for old, new in names.items():
        told = told.replace(f'"{old}"', json.dumps(new))
    lines = []
    for number, line in enumerate((folder / "rows.jsonl").read_text().splitlines()):
        row = json.loads(line)
        text = texts[number % len(texts)]
        row["task"] = names.get(row["task"], row["task"])
        row["question"] = texts[sum(row["item"].encode()) % len(texts)]
        row["answers"] = [row["question"], "b"]
        if row["status"] == "failed":
            row["error"] = text
        else:
            row["answer"] = text
        lines.append(row)
    info = json.loads(told)
    from tokprune.eval.sweep.identity import row_id

    trials = {trial["trial"]: trial for trial in info["trials"]}
    for row in lines:
        row["row"] = row_id(info, trials[row["trial"]], row["item"], row["task"])
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return names


@pytest.mark.parametrize("start", range(0, len(TEXTS), 6))
def test_text_is_text(tmp_path: Path, start: int, recwarn: Any) -> None:
    folder = fake_run.make_run(tmp_path / "run", count=24, overlays=2, failed=2)
    texts = (*TEXTS[start:], *TEXTS[:start])
    names = renamed(folder, texts)
    built = build_report(folder, benchmark=fake_run.FakeBenchmark(24), draws=50)
    page = built.html.read_text(encoding="utf-8")
    assert "<script" not in page
    for name in names.values():
        assert html.escape(legible(name), quote=False) in page.replace("&#34;", '"').replace(
            "&#39;", "'"
        )
    plots = list((built.markdown.parent / "plots").glob("*.svg"))
    assert plots
    for plot in plots:
        ElementTree.fromstring(plot.read_text(encoding="utf-8"))  # well formed
    heat = html.unescape((built.markdown.parent / "plots" / "retention.svg").read_text())
    for name in names.values():
        # matplotlib puts no-break spaces nowhere, and keeps what it cannot draw
        assert short(legible(name)) in heat, name
    markdown = built.markdown.read_text(encoding="utf-8")
    seen = set()
    for line in markdown.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1]]
            plain = [
                re.sub(r"\\.", "", re.sub(r"^(\*\*|~~)(.*)\1$", r"\2", cell)) for cell in cells
            ]
            assert not any(set(cell) & set("`*_<>[]$~&\\") for cell in plain), line
            seen |= {re.sub(r"\\(.)", r"\1", cell).removesuffix(" *") for cell in cells}
    for name in names.values():
        assert one_line(legible(name)) in seen, name
    assert not [w for w in recwarn if "Glyph" in str(w.message) or "legend" in str(w.message)]


def test_the_installed_command_writes_the_report(tmp_path: Path) -> None:
    folder = fake_run.make_run(tmp_path / "run", count=24)
    renamed(folder, TEXTS)
    script = Path(sys.executable).with_name("tokprune")
    done = subprocess.run(
        [script, "report", folder], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "report" / "report.html").is_file()
    assert "\x1b[31m" not in done.stdout


def test_rows_hold_any_text(tmp_path: Path) -> None:
    from test_sweep_store import INFO, row

    rows = [row(f"q{n}", question=text, answer=text) for n, text in enumerate(TEXTS)]
    with Store(tmp_path / "run") as store:
        store.write_json("run.json", INFO)
        store.append(rows)
    assert read_run(tmp_path / "run").rows == rows


def test_file_names_of_overlays() -> None:
    names = [overlay_name(text, "todre@9") for text in TEXTS]
    assert len(set(names)) == len(TEXTS)
    for name in names:
        assert len(name) < 120
        assert set(name) & set("/\\\0\n $<>|:*?\"'") == set()
    assert overlay_name("q1", "todre@9") == "q1__todre@9.json"
