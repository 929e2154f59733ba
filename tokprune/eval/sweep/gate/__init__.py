"""Did the method act? A trial is a result only where it can be seen that it did.

Ports of methods have run whole benchmarks without changing one answer (an audit found four in
eleven, github.com/daryl-888/HuBenchmarks), and their tables look like good ones. So every trial is
compared, question by question, with the unpruned model: that a record says so is not enough (the
cache must be shorter), and neither is an effect alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tokprune.eval.sweep.gate.checks import CHECKS, Check, Outcome, same_as
from tokprune.eval.sweep.gate.pair import Pair, Row

__all__ = ["Check", "Gate", "gates"]


@dataclass(frozen=True)
class Gate:
    """All checks of a trial. ``fail``: it is no result, and must not be averaged or recommended;
    ``warn``: look at it."""

    trial: str
    checks: tuple[Check, ...]

    @property
    def outcome(self) -> Outcome:
        found = {check.outcome for check in self.checks}
        return "fail" if "fail" in found else "warn" if "warn" in found else "ok"

    def to_dict(self) -> dict[str, Any]:
        return {"outcome": self.outcome, "checks": [check.to_dict() for check in self.checks]}

    def of(self, outcome: Outcome) -> list[Check]:
        return [check for check in self.checks if check.outcome == outcome]

    @property
    def reason(self) -> str:
        """What is wrong, the worst first; empty where nothing is."""
        return "; ".join(check.text for kind in ("fail", "warn") for check in self.of(kind))


def gates(trials: Iterable[Mapping[str, Any]], rows: Iterable[Row]) -> dict[str, Gate]:
    """The gate of every trial with answers, but for the unpruned model and the blind one.

    Args:
        trials: of run.json.
        rows: of rows.jsonl.
    """
    every = {trial["trial"]: trial for trial in trials}
    by_trial: dict[str, dict[str, Row]] = {name: {} for name in every}
    for row in rows:
        if row["trial"] in by_trial:
            by_trial[row["trial"]][row["item"]] = row
    plain = [name for name, t in every.items() if t["variant"] == "none" and not t["noise"]]
    blind = next((by_trial[n] for n, t in every.items() if t["variant"] == "blind"), {})
    found: dict[str, Gate] = {}
    seen: list[Pair] = []
    for name, trial in every.items():
        if trial["variant"] in ("none", "blind") or trial["noise"] or not by_trial[name]:
            continue
        base = next((by_trial[n] for n in plain if _alike(every[n], trial)), None)
        if not base:
            found[name] = Gate(
                name, (Check("unpruned", "warn", "no unpruned answers to compare with"),)
            )
            continue
        # another batch size, not another dtype: that is a difference of its own
        noise = [
            by_trial[n] for n, t in every.items() if t["noise"] and t["dtype"] == trial["dtype"]
        ]
        pair = Pair(trial, by_trial[name], base, noise, blind)
        checks = [check for look in CHECKS if (check := look(pair)) is not None]
        if (same := same_as(pair, seen)) is not None:
            checks.append(same)
        seen.append(pair)
        found[name] = Gate(name, tuple(checks))
    return found


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("dtype", "batch_size"))
