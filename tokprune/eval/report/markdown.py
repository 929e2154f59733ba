"""The report as Markdown, with its plots as SVG files beside it."""

from __future__ import annotations

import re
from pathlib import Path

from tokprune.eval.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Exhibit,
    Figure,
    Gallery,
    Table,
    Text,
)
from tokprune.eval.report.legible import one_line


def write_markdown(document: Document, folder: Path) -> Path:
    """``report.md`` and ``plots/*.svg`` in a folder."""
    lines = [f"# {_plain(document.title)}", "", _plain(document.subtitle), ""]
    lines += [*_table(Table(("", ""), document.facts, words=frozenset(range(2)))), ""]
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    for section in document.sections:
        lines += [f"## {_plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*_block(block, plots), ""]
    path = folder / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _block(block: Block, plots: Path) -> list[str]:
    if isinstance(block, Text):
        return [f"> **Note:** {_plain(block.text)}" if block.warning else _plain(block.text)]
    if isinstance(block, Bullets):
        return [f"- {_plain(line)}" for line in block.lines]
    if isinstance(block, Code):
        longest = max((len(run) for run in re.findall("`+", block.text)), default=0)
        fence = "`" * max(3, longest + 1)
        return [f"{fence}bash", block.text, fence]
    if isinstance(block, Table):
        title = [f"### {_plain(block.title)}", ""] if block.title else []
        note = ["", _plain(block.note)] if block.note else []
        return [*title, *_table(block), *note]
    if isinstance(block, Figure):
        (plots / f"{block.plot.name}.svg").write_text(block.plot.wide, encoding="utf-8")
        return [
            f"![{_plain(block.plot.alt)}](plots/{block.plot.name}.svg)",
            "",
            _plain(block.caption),
        ]
    return _gallery(block)


def _gallery(gallery: Gallery) -> list[str]:
    lines = ["The images are in report.html."]
    for exhibit in gallery.exhibits:
        lines += ["", *_exhibit(exhibit)]
    return lines


def _exhibit(exhibit: Exhibit) -> list[str]:
    cards = [*([exhibit.unpruned] if exhibit.unpruned else []), *exhibit.cards]
    rows = [[c.variant, c.detail, c.answer, "correct" if c.correct else "incorrect"] for c in cards]
    table = Table(("variant", "tokens", "answer", ""), rows, words=frozenset(range(4)))
    return [f"**{_plain(exhibit.question)}** ({_plain(exhibit.task)}; correct: "
            f"{_plain(' or '.join(exhibit.answers))})", "", *_table(table)]  # fmt: skip


def _table(table: Table) -> list[str]:
    rule = [":---" if n in table.words else "---:" for n in range(len(table.header))]
    rows = [
        [
            _marked(_cell(v), n in table.strong and not c, n in table.struck)
            for c, v in enumerate(row)
        ]
        for n, row in enumerate(table.rows)
    ]
    return [f"| {' | '.join(line)} |" for line in ([_cell(h) for h in table.header], rule, *rows)]


def _marked(text: str, strong: bool, struck: bool) -> str:
    if struck and text:
        return f"~~{text}~~"
    return f"**{text}**" if strong else text


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text of others in a line, with what Markdown would take as mark-up escaped."""
    return re.sub(r"([\\`*_<>\[\]$~&])", r"\\\1", one_line(text))
