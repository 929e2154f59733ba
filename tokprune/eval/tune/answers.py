"""Answers of whatever is tried, in the rows of a run folder, asked once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokprune.eval.benchmarks.base import Item
from tokprune.eval.sweep.batches import answer_batch, chunks
from tokprune.eval.sweep.builtin import BuiltinHarness, sharing
from tokprune.eval.sweep.evaluator import Batch, Evaluator
from tokprune.eval.sweep.gate import gates
from tokprune.eval.sweep.harness import OpenTrial
from tokprune.eval.sweep.identity import row_id
from tokprune.eval.sweep.runner import Sweep
from tokprune.eval.sweep.trials import Trial


class Answers:
    """Asks trials, the unpruned model always with them.

    Args:
        sweep: prepared; its store holds the rows.
        harness: who asks.
    """

    def __init__(self, sweep: Sweep, harness: BuiltinHarness) -> None:
        self.sweep, self.harness = sweep, harness
        self.trials = {trial.id: trial for trial in sweep.main}
        self.rows: dict[str, dict[str, Any]] = {name: {} for name in self.trials}
        self._known = {row["row"]: row for row in sweep.store.rows}
        self._evaluator = Evaluator(sweep.loaded, harness.benchmark)

    def add(self, trials: Iterable[Trial]) -> None:
        """Take up trials, and write them into run.json."""
        for trial in trials:
            if trial.id not in self.trials:
                self.sweep.main.append(trial)
            self.trials[trial.id] = trial
            self.rows.setdefault(trial.id, {})
        self.sweep.save()

    def ask(self, names: Sequence[str], items: Sequence[Item]) -> None:
        """Have trials answer what they have not answered yet. One that fails on all of a batch is
        asked no more."""
        names = ["none", *(name for name in names if name != "none")]
        missing = {name: self._missing(name, items) for name in names}
        settings, loaded = self.sweep.settings, self.sweep.loaded
        self.sweep.progress.start(
            f"{len(names) - 1} settings, {len(items)} questions", sum(map(len, missing.values()))
        )
        with sharing(loaded, settings) as shared:
            for part in chunks(items, settings.batch_size):
                unanswered = [n for n in names if any(item.id in missing[n] for item in part)]
                if not unanswered:
                    continue
                batch = Batch(loaded, self.harness.benchmark, part)
                if shared is not None:
                    shared.remember(batch.pixels)
                for name in unanswered:
                    task = OpenTrial(self.trials[name], missing[name])
                    step = answer_batch(self._evaluator, task, batch)
                    self.sweep.write(step)
                    self.rows[name].update((row["item"], row) for row in step.rows)
                    if name != "none" and all(row["status"] != "ok" for row in step.rows):
                        missing[name] = {}

    def _missing(self, name: str, items: Sequence[Item]) -> dict[str, str]:
        """Identities of rows that are not there, by item."""
        found, entry = {}, self.trials[name].entry
        for item in items:
            if item.id in self.rows[name]:
                continue
            row = row_id(self.sweep.info, entry, item.id, item.task)
            if row in self._known:
                self.rows[name][item.id] = self._known[row]
            else:
                found[item.id] = row
        return found

    def scores(self, name: str) -> dict[str, float]:
        """What a trial has scored, by item."""
        return {item: row["score"] for item, row in self.rows[name].items()}

    def fault(self, name: str) -> str | None:
        """Why the answers of a trial are no result (:mod:`tokprune.eval.sweep.gate`)."""
        entries = [self.trials["none"].entry, self.trials[name].entry]
        rows = [row for trial in ("none", name) for row in self.rows[trial].values()]
        gate = gates(entries, rows).get(name)
        if gate is None:
            return "no answers"
        return "; ".join(check.text for check in gate.of("fail")) or None
