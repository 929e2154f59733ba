#!/usr/bin/env python3
"""The README's table of every method on ``mini``, from a run folder by way of a file of figures.

    tokprune sweep --config evals/studies/mini-methods.yaml
    python scripts/sweep_table.py --run runs/mini-methods
    python scripts/sweep_table.py [--check]

``--run`` writes ``docs/mini-methods.json`` and the README; without it the README is made of the
file as it is. ``--check`` writes nothing and fails where the README is not what the figures say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markers import put

ROOT = Path(__file__).resolve().parent.parent
FIGURES, README = ROOT / "docs" / "mini-methods.json", ROOT / "README.md"


def figures(folder: Path) -> dict[str, Any]:
    """What the table shows of a run."""
    from tokprune.eval.report.analysis import analyse
    from tokprune.eval.report.data import load_run

    settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    words, analysis = labels(settings["methods"]), analyse(load_run(folder))
    data = analysis.data
    points = [
        {
            "variant": r.point.variant,
            "label": words.get(r.point.variant, r.point.variant),
            "control": r.point.control,
            "budget": r.point.budget,
            "tokens_mean": round(r.point.tokens, 2),
            "accuracy": round(r.accuracy, 4),
            "interval": [round(x, 4) for x in r.interval],
            "drop": round(r.drop, 4),
            "drop_interval": [round(x, 4) for x in r.drop_interval],
        }
        for r in (*analysis.results, *analysis.blind)
        if r.complete
    ]
    return {
        "model": "mini",
        "questions": len(data.items),
        "tokens": data.tokens,
        "budgets": sorted({p["budget"] for p in points if p["variant"] not in ("none", "blind")}),
        "points": sorted(points, key=lambda p: (p["variant"], p["budget"])),
    }


def labels(methods: Iterable[Any]) -> dict[str, str]:
    """Variants in words, by their names: the method, and its options as they were given (but for
    long lists)."""
    from tokprune.eval.sweep.variants import Variant, parse_variant

    found = {}
    for spec in methods:
        name, options = parse_variant(spec)
        told = [f"`{option}={value}`" for option, value in options.items() if option != "neurons"]
        found[Variant(name, False, options).name] = ", ".join([name, *told])
    return found


def table(report: dict[str, Any]) -> str:
    budgets = sorted(report["budgets"], reverse=True)
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for point in report["points"]:
        found.setdefault(point["variant"], {})[point["budget"]] = point
    alone = {name: next(iter(found.pop(name).values())) for name in ("none", "blind")}

    def place(variant: str) -> tuple[float, ...]:
        return tuple(-(found[variant].get(b) or {"accuracy": -1})["accuracy"] for b in budgets)

    lines = [
        _row("variant", *(f"{b:g} tokens (1/{report['tokens'] / b:.0f})" for b in budgets)),
        "|---|" + "---:|" * len(budgets),
    ]
    for variant in sorted(found, key=place):
        points = list(found[variant].values())
        name, control = points[0]["label"], points[0]["control"]
        cells = [
            "–" if (point := found[variant].get(b)) is None else _percent(point) for b in budgets
        ]
        lines.append(_row(f"{name} †" if control else name, *cells))
    lines += [
        "",
        f"{report['questions']} questions of the split `quick`; macro average over the headline "
        "types in % with 95 % intervals (bootstrap over questions); budgets are matched on the "
        f"measured mean over the decoder's layers; –: out of reach in six layers. Unpruned "
        f"{_percent(alone['none'])}, blind {100 * alone['blind']['accuracy']:.1f}. † control.",
    ]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(point: dict[str, Any]) -> str:
    low, high = (100 * x for x in point["interval"])
    return f"{100 * point['accuracy']:.1f} ({low:.1f}–{high:.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of the sweep")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    options = parser.parse_args()
    if options.run is not None:
        FIGURES.write_text(json.dumps(figures(options.run), indent=1) + "\n", encoding="utf-8")
    old = README.read_text(encoding="utf-8")
    new = put(old, "mini methods", table(json.loads(FIGURES.read_text(encoding="utf-8"))))
    if options.check and old != new:
        print("README.md is out of date; run python scripts/sweep_table.py", file=sys.stderr)
        return 1
    if not options.check:
        README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
