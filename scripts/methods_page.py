#!/usr/bin/env python3
"""The table of methods in the README, and ``docs/methods.md``, from the methods themselves.

    python scripts/methods_page.py [--check]

A row says where a method acts, what it reads, whether that is the question, whether its counts
depend on the image, on which families it works, what it was written from, and the best average that
anybody has published for it. ``--check`` writes nothing and fails where a page is not up to date.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from markers import put

from tokprune.cli.fits import Fit, fits
from tokprune.cli.known_models import facts_of, family_names
from tokprune.engine.contracts import Rectify
from tokprune.eval.published import Row, load_ledger, spread
from tokprune.methods import Method, available_methods
from tokprune.methods.anchors import Anchors
from tokprune.methods.base import preset_mean

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
#: where published averages are compared: the model and the tokens that most papers print
MODEL, TOKENS = "llava-1.5-7b", 64


@functools.cache
def table_of_fits() -> dict[str, dict[str, Fit]]:
    """How every method does on every family, by method."""
    found: dict[str, dict[str, Fit]] = {name: {} for name in available_methods()}
    for family in family_names():
        for fit in fits(facts_of(family)):
            found[fit.method][family] = fit
    return found


@functools.cache
def best_published() -> dict[str, str]:
    """The best mean of score ÷ unpruned score at 64 of 576 tokens in a method's own file, or, where
    it has none, in others'; not of an ablation, which goes over some of the tasks."""
    found: dict[str, list[Row]] = {}
    for row in load_ledger():
        if (
            (row.benchmark, row.unit, row.model) == ("average", "% of unpruned", MODEL)
            and (row.budget.printed == str(TOKENS) or row.budget.tokens == TOKENS)
            and row.plain
        ):  # fmt: skip
            found.setdefault(row.method, []).append(row)
    return {
        method: _best([row for row in rows if row.paper.key == method] or rows)
        for method, rows in found.items()
    }


def _best(rows: list[Row]) -> str:
    """The highest figure and what to know of it; the lowest as well where they are others', or not
    measured alike."""
    low, high, columns = spread(rows)
    others = high.paper.key != high.method
    remarks = [high.paper.key] if others else []
    if (mean := high.budget.layer_mean) is None and high.budget.kind == "last":
        remarks.append("tokens after the last cut")
    elif mean is not None and round(mean) != TOKENS:
        remarks.append(f"{mean:.0f} on the mean over layers")
    if columns or (others and low.value < high.value):
        apart = ", not measured alike" if columns else ""
        remarks.append(f"{low.value:g} % in {low.paper.key}{apart}")
    return f"{high.value:g} %" + (f" ({'; '.join(remarks)})" if remarks else "")


def families(name: str) -> str:
    """How many families it works on, and on how many with something else in place."""
    states = [fit.status for fit in table_of_fits()[name].values()]
    works, other = states.count("works"), states.count("substitute")
    text = f"{works + other} of {len(states)}"
    return text + (f", {other} otherwise" if other else "")


def paper_link(paper: str) -> str:
    return (
        re.sub(r"arXiv (\d{4}\.\d{5})(v\d)?", r"[\1\2](https://arxiv.org/abs/\1\2)", paper) or "–"
    )


def yes(value: bool | str) -> str:
    return value if isinstance(value, str) and value else "yes" if value else "no"


def main_table() -> str:
    head = (
        "method (`name`)", "acts", "reads", "the question", "count depends on the image",
        "families", "written from", "best published¹", "paper",
    )  # fmt: skip
    lines = [_row(head), _row(["---"] * len(head))]
    for name, cls in available_methods().items():
        best = best_published().get(name, "–")
        lines.append(
            _row(
                [
                    f"[{cls.__name__}](docs/methods.md#{name}) (`{name}`)", ", ".join(cls.stages),
                    cls.needs, yes(cls.reads_prompt), cls.adaptive or "no", families(name),
                    cls.source, best, paper_link(cls.paper),
                ]
            )
        )  # fmt: skip
    note = (
        f"¹ Best mean of score ÷ unpruned score at {TOKENS} of 576 tokens on LLaVA-1.5-7B, as "
        "papers count them, that our figures of the method's paper have, or, where they have none, "
        "those of another, which is named. Sets of benchmarks, harnesses and prompts differ from "
        "paper to paper: figures of different rows cannot be compared."
    )
    return "\n".join([*lines, "", note])


#: options that many methods have, and the tables of options that they take
LIFTS = {"rectify": Rectify, "anchors": Anchors}


def page() -> str:
    parts = [
        "# Methods",
        "",
        "One section a method, from its docstring: made by `scripts/methods_page.py`, not by hand.",
        "Every method also has the option `video_unit`: what of a video is compressed as one "
        '(`"video"`, a number of frames, or `"frame"`).',
    ]
    for name, kind in LIFTS.items():
        parts += ["", f"## The option `{name}`", "", *_described(kind)]
    for name, cls in available_methods().items():
        parts += ["", f"## {name}", "", *section(name, cls)]
    return "\n".join(parts) + "\n"


def section(name: str, cls: type[Method]) -> Iterator[str]:
    yield f"**{cls.__name__}** · {', '.join(cls.stages)} · written from: {cls.source}"
    yield ""
    yield from _described(cls)
    if cls.presets:
        yield ""
        yield "| published on | budget | mean over layers | options | where |"
        yield "|---|---|---|---|---|"
        for preset in cls.presets:
            given = ", ".join(f"{n}={v!r}" for n, v in preset.options.items())
            mean = preset_mean(cls, preset)
            told = "" if mean is None else f"{mean:.0f}"
            yield _row([preset.model, str(preset.budget), told, f"`{given}`", preset.source])
    notes: dict[tuple[str, str], list[str]] = {}
    for family, fit in table_of_fits()[name].items():
        if fit.status != "works":
            notes.setdefault((fit.status, fit.why), []).append(family)
    for (status, why), own in notes.items():
        yield ""
        word = "Refused" if status == "refused" else "Otherwise"
        yield f"{word} on {', '.join(own)}: {_markdown(why)}."


def _described(cls: type) -> Iterator[str]:
    """What a docstring says: text, a table of the options, and the source."""
    text = inspect.cleandoc(cls.__doc__ or "")
    body, _, source = text.partition("\n\nSource: ")
    before, _, options = body.partition("\n\nArgs:\n")
    options, _, behind = options.partition("\n\n")
    yield _markdown(before)
    if options:
        yield ""
        yield from _options(options, cls)
    if behind:
        yield ""
        yield _markdown(inspect.cleandoc(behind))
    if source:
        yield ""
        yield f"Source: {_markdown(' '.join(source.split()))}"


def _options(text: str, cls: type) -> Iterator[str]:
    defaults = {
        field.name: "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        for field in dataclasses.fields(cls)
    }
    yield "| option | default | |"
    yield "|---|---|---|"
    for entry in re.split(r"\n(?=\S)", inspect.cleandoc(text)):
        names, _, words = entry.partition(":")
        own = [n.strip() for n in names.split(",")]
        default = ", ".join(filter(None, (defaults.get(n, "") for n in own)))
        yield _row([f"`{', '.join(own)}`", default, _markdown(" ".join(words.split()))])


def _markdown(text: str) -> str:
    """Docstring text as Markdown."""
    text = re.sub(r":(?:class|func|meth|mod|attr):`~?([^`]*)`", r"`\1`", text)
    return text.replace("``", "`")


def _row(cells: Iterator[str] | list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def pages() -> dict[Path, str]:
    """The pages as they should be."""
    readme = ROOT / "README.md"
    text = put(readme.read_text(encoding="utf-8"), "methods", main_table())
    return {readme: text, PAGE: page()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    options = parser.parse_args()
    old = []
    for path, text in pages().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            old.append(path.name)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    if options.check and old:
        print(f"out of date: {', '.join(old)}; run python scripts/methods_page.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
