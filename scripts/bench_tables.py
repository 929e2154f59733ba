#!/usr/bin/env python3
"""The README's tables of operators and methods on a CPU, from ``docs/bench-cpu.json``.

    python scripts/bench_operators.py all --clock cpu --json docs/bench-cpu.json
    python scripts/bench_tables.py [--check]

``--check`` writes nothing and fails where the README is not what the figures say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from markers import put

ROOT = Path(__file__).resolve().parent.parent
FIGURES, README = ROOT / "docs" / "bench-cpu.json", ROOT / "README.md"


def operators(report: Mapping[str, Any]) -> str:
    lines = [
        _row("operator", "size", "ours, ms", "plain, ms", "plain ÷ ours (quartiles)"),
        "|---|---|---:|---:|---:|",
    ]
    for row in report["operators"]:
        ratio = row["ratio"]
        lines.append(
            _row(
                row["name"], row["shape"], _ms(row["ours_s"]), _ms(row["plain_s"]),
                f"{ratio['median']:.3g} × ({ratio['q1']:.3g}–{ratio['q3']:.3g})",
            )
        )  # fmt: skip
    return "\n".join(lines)


def methods(report: Mapping[str, Any]) -> str:
    found = report["methods"]
    lines = [
        _row(
            "method", "tokens, last / mean", "method, ms", "replay, ms", "bare, ms",
            "method − bare, % of method (quartiles)", "speed-up",
        ),
        "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in found["rows"]:
        whole, added = row["method_s"]["median"], row["added_s"]
        low, middle, high = (100 * added[name] / whole for name in ("q1", "median", "q3"))
        lines.append(
            _row(
                row["label"], f"{row['kept']} / {row['mean_visual_tokens']:.0f}",
                *(_ms(row[name], 0) for name in ("method_s", "replay_s", "bare_s")),
                f"{middle:.1f} ({low:.1f} … {high:.1f})", f"{row['speedup']['median']:.2f} ×",
            )
        )  # fmt: skip
    model, base = found["model"], found["unpruned_s"]["median"]
    size = model["size"]
    added = [
        f"{100 * found[name]['median'] / base:.1f} % "
        f"({100 * found[name]['q1'] / base:.1f} … {100 * found[name]['q3'] / base:.1f})"
        for name in ("engine_added_s", "everything_added_s")
    ]
    lines += [
        "",
        f"LLaVA of {model['parameters'] / 1e6:.0f} M random parameters (CLIP "
        f"{size['vision_layers']} × {size['vision_width']}, Llama {size['text_layers']} × "
        f"{size['text_width']}), {model['prompt_tokens']} prompt tokens, {model['rounds']} "
        "interleaved rounds on one core, processor time, medians; differences and speed-ups are "
        f"taken per round. Unpruned {_ms(found['unpruned_s'], 0)} ms; the engine, patched in "
        f"without a method, adds {added[0]} to it, and with one that keeps everything {added[1]}.",
    ]
    return "\n".join(lines)


def growth(report: Mapping[str, Any]) -> str:
    rows = report["growth"]
    sizes = sorted({size for row in rows for size in (*row["sizes"], *row["left_out"])})
    lines = [
        _row("operator", *(f"{size:,} tokens: ms, MB" for size in sizes), "exponents"),
        "|---|" + "---:|" * (len(sizes) + 1),
    ]
    for row in rows:
        cells = [
            f"{_ms(spread)}, {held / 1e6:.3g}" for spread, held in zip(row["seconds"], row["bytes"])
        ]
        cells += ["–"] * len(row["left_out"])
        name = f"{row['name']} ‡" if "environment" in row else row["name"]
        lines.append(_row(name, *cells, ", ".join(f"{e:.2f}" for e in row["exponents"])))
    apart = {row["environment"]["cpu"] for row in rows if "environment" in row}
    if apart:
        lines += ["", f"‡ on another machine ({', '.join(sorted(apart))}), which had other work."]
    return "\n".join(lines)


TABLES = {"operators": operators, "methods": methods, "growth": growth}


def filled(text: str, report: Mapping[str, Any]) -> str:
    """The README with all tables made anew."""
    for name, table in TABLES.items():
        text = put(text, f"bench {name}", table(report))
    return text


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _ms(spread: Mapping[str, float], digits: int | None = None) -> str:
    value = 1000 * spread["median"]
    return f"{value:.3g}" if digits is None and value < 1000 else f"{value:,.0f}"


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    options = parser.parse_args(None if arguments is None else list(arguments))
    before = README.read_text(encoding="utf-8")
    after = filled(before, json.loads(FIGURES.read_text(encoding="utf-8")))
    if before == after:
        return 0
    if options.check:
        print("README.md is out of date; run python scripts/bench_tables.py", file=sys.stderr)
        return 1
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
