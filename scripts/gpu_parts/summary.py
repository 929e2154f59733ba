"""The results of a GPU check in a few short tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gpu_parts.published import BAR, FIGURES


@dataclass(frozen=True)
class Row:
    """A method at a budget at one point of a bench."""

    #: the shape, as the bench calls it
    model: str
    tokens: int
    method: str
    #: visual tokens after the last pruning
    kept: float
    batch_size: int
    new_tokens: int
    #: of :mod:`tokprune.bench.run`: ``speedup``, ``ideal_speedup``, ``achieved``, ``split``, …
    measured: Mapping[str, Any]
    rounds: int


def rows(data: Mapping[str, Any]) -> Iterator[Row]:
    """Every trial at every point that was measured."""
    for part in data["parts"]:
        if part["kind"] != "bench" or part["status"] != "ok" or "trials" not in part["result"]:
            continue
        result = part["result"]
        name = result["model"]["name"].removeprefix("random weights ")
        for point in result["points"]:
            for trial in result["trials"] if "trials" in point else ():
                seconds = point["seconds"][trial["trial"]]
                yield Row(
                    name, result["model"]["visual_tokens"], trial["method"], trial["tokens_last"],
                    point["batch_size"], point["new_tokens"],
                    point["trials"][trial["trial"]], min(map(len, seconds.values())),
                )  # fmt: skip


def tables(data: Mapping[str, Any]) -> list[Any]:
    """What rich can print: speed, growth, then what happened to every part."""
    from rich import box
    from rich.table import Table

    out: list[Any] = []
    found = list(rows(data))
    if found:
        table = Table(title="Speed-up over no compression", box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("model", "method", "kept", "batch", "new", "prefill", "÷ ideal", "total",
                     "rounds"):  # fmt: skip
            left = name in ("model", "method")
            table.add_column(name, justify="left" if left else "right", overflow="fold")
        for row in found:
            table.add_row(
                row.model, row.method, f"{row.kept:.0f}", str(row.batch_size), str(row.new_tokens),
                ratio(row, "prefill"), achieved(row), ratio(row, "total"), str(row.rounds),
            )  # fmt: skip
        out.append(table)
        reached = sum(row.measured["achieved"]["prefill"]["median"] >= BAR for row in found)
        out.append(
            f"Prefill reaches {100 * BAR:.0f} % of the ideal in {reached} of {len(found)} rows.\n"
            "Published by others, on other machines: " + "; ".join(FIGURES) + "."
        )
    grown = [part["result"] for part in data["parts"]
             if part["kind"] == "operators" and part["status"] == "ok"]  # fmt: skip
    if grown:
        table = Table(title="Operators, microseconds", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for size in grown[0]["sizes"]:
            table.add_column(str(size), justify="right")
        table.add_column("exponent", justify="right")
        for own in grown:
            table.add_row(
                own["operator"], *(f"{us:.0f}" for us in own["microseconds"]),
                f"{own['exponent']['median']:.2f}",
            )  # fmt: skip
        out.append(table)
    counts = Counter(part["status"] for part in data["parts"])
    out.append(f"{data['status']} in {data['seconds']:.0f} s; parts: "
               + ", ".join(f"{number} {status}" for status, number in counts.items()))  # fmt: skip
    out += [f"{part['status']}: {part['name']}: {part.get('error', part.get('reason', ''))}"
            for part in data["parts"] if part["status"] not in ("ok", "running")]  # fmt: skip
    return out


def ratio(row: Row, part: str) -> str:
    """The median ratio, marked where it is within noise; – where it was not measured."""
    told = row.measured["speedup"].get(part)
    if told is None:
        return "–"
    return f"{told['ratio']['median']:.2f}×" + ("" if told["speedup"] is not None else " ~")


def achieved(row: Row) -> str:
    return f"{100 * row.measured['achieved']['prefill']['median']:.0f} %"
