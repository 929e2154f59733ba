#!/usr/bin/env python3
"""The README's table of speed, from the JSON of ``scripts/gpu_check.py``.

    python scripts/speed_table.py gpu.json [--readme README.md]

Replaces what stands between the two markers. A row is a method at a budget: the median speed-up of
prefill and total over no compression, with its 95 % interval, what share of the ideal (the same
model on as many tokens with no method work) the prefill reaches, and what a language model that
takes no time would give. A ratio within the noise of its measurement is marked ~. Only rows that
were measured appear.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "scripts") not in sys.path:
    sys.path.append(str(ROOT / "scripts"))

from gpu_parts.summary import Row, rows  # noqa: E402
from markers import put  # noqa: E402


def table(data: Mapping[str, Any]) -> str:
    """Markdown: what was measured on what, and the table.

    Raises:
        ValueError: nothing was measured.
    """
    found = list(rows(data))
    if not found:
        raise ValueError("no part of the bench was measured")
    known: dict[tuple[Any, ...], dict[int, Row]] = {}
    for row in found:
        key = (row.model, row.tokens, row.method, round(row.kept), row.batch_size)
        points = known.setdefault(key, {})
        # where a point was measured twice, once with its total, that one counts
        before = points.get(row.new_tokens)
        if before is None or ("total" in row.measured["speedup"], row.rounds) > (
            "total" in before.measured["speedup"], before.rounds,
        ):  # fmt: skip
            points[row.new_tokens] = row
    lengths = sorted({r.new_tokens for r in found if "total" in r.measured["speedup"]})
    head = ["model (visual tokens)", "method", "kept", "batch", "prefill", "of the ideal"]
    head += [f"total, {n} new" for n in lengths] + ["at most"]
    lines = [_row(head), _row(["---", "---", *["---:"] * (len(head) - 2)])]
    for (model, tokens, method, kept, batch), points in known.items():
        best = max(points.values(), key=lambda row: row.rounds)
        lines.append(
            _row(
                [
                    f"{model} ({tokens:,})", method, f"{kept:,}", str(batch),
                    _ratio(best, "prefill"), _share(best),
                    *(_ratio(points[n], "total") if n in points else "–" for n in lengths),
                    _bound(points),
                ]
            )
        )  # fmt: skip
    return "\n".join([_heading(data), "", *lines])


def _heading(data: Mapping[str, Any]) -> str:
    env, counts = data["environment"], [row.rounds for row in rows(data)]
    what = "**Rehearsal on tiny models: it shows the form and no speed.** " * data["rehearsal"]
    cut = "" if data["status"] == "complete" else f" (the run was {data['status']})"
    commit = (data["commit"] or "unknown")[:12]
    return (
        f"{what}{env['device']}, torch {env['torch']}, transformers {env['transformers']}, commit "
        f"{commit}{cut}: `scripts/gpu_check.py`, random weights, medians of {min(counts)} to "
        f"{max(counts)} interleaved rounds with 95 % intervals; ~: within noise. *At most*: a "
        "language model that takes no time."
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(row: Row, part: str) -> str:
    told = row.measured["speedup"].get(part)
    if told is None:
        return "–"
    ratio = told["ratio"]
    span = "" if ratio["low"] is None else f" ({ratio['low']:.2f}–{ratio['high']:.2f})"
    return f"{ratio['median']:.2f} ×{span}{'' if told['speedup'] is not None else ' ~'}"


def _share(row: Row) -> str:
    return f"{100 * row.measured['achieved']['prefill']['median']:.0f} %"


def _bound(points: Mapping[int, Row]) -> str:
    """Of the shortest answer, where the encoder weighs most."""
    for length in sorted(points):
        if (split := points[length].measured["split"]) is not None:
            return f"{split['bound']['median']:.1f} × ({length} new)"
    return "–"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what gpu_check.py wrote")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to change")
    parser.add_argument(
        "--allow-rehearsal", action="store_true", help="take the JSON of a rehearsal, and say so"
    )
    given = parser.parse_args()
    try:
        data = json.loads(given.json.read_text(encoding="utf-8"))
        made = table(data)
    except (OSError, KeyError, TypeError, ValueError) as error:
        parser.error(f"{given.json} should be a JSON of gpu_check.py: {error}")
    if data["rehearsal"] and not given.allow_rehearsal:
        parser.error(f"{given.json} is of a rehearsal on tiny models; it holds no speed")
    try:
        text = put(given.readme.read_text(encoding="utf-8"), "speed table", made)
    except (OSError, ValueError) as error:
        parser.error(f"--readme {given.readme}: {error}")
    given.readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
