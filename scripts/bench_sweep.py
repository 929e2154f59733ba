#!/usr/bin/env python3
"""What sharing encoder outputs saves in a sweep: the same sweep with it and without, in turns.

    python scripts/bench_sweep.py [--model mini] [--questions 48] [--rounds 3] [--json FILE]

Answers the embedded benchmark's quick split with every method and control at two budgets, once
with one pass of the vision encoder for all trials that leave it alone, once with a pass for every
trial, in alternating order; compares every answer and every count; prints seconds per round and
the ratio. Loading, matching of budgets and timing are not counted, only the answering.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

from tokprune.eval.sweep import Run, Settings, run_sweep
from tokprune.eval.sweep.progress import Progress


class Stopwatch(Progress):
    """Seconds of the stage that answers questions."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def start(self, name: str, total: int) -> None:
        self.began = time.perf_counter() if name == "answers" else 0.0

    def advance(self, steps: int) -> None:
        if self.began:
            self.seconds = time.perf_counter() - self.began


def sweep(folder: Path, options: argparse.Namespace, share: bool) -> tuple[Run, float]:
    watch = Stopwatch()
    settings = Settings(
        model=options.model, out=str(folder), keep=("1/4", "1/9"), limit=options.questions,
        share=share, noise=False, latency=False, fresh=True, batch_size=options.batch_size,
    )  # fmt: skip
    return run_sweep(settings, progress=watch), watch.seconds


def told(run: Run) -> dict[tuple[str, str], Any]:
    """Everything of a run that must not depend on sharing."""
    return {
        (row["trial"], row["item"]): {k: v for k, v in row.items() if k not in ("seconds", "time")}
        for row in run.rows
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini", help="folder or name")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(options.rounds):
            runs = {}
            for share in (True, False) if number % 2 == 0 else (False, True):
                runs[share], spent = sweep(folder / f"run-{share}", options, share)
                seconds[share].append(spent)
            if told(runs[True]) != told(runs[False]):
                print("sharing changed an answer or a count", file=sys.stderr)
                return 1
            print(f"round {number + 1}: {seconds[True][-1]:.1f} s shared, "
                  f"{seconds[False][-1]:.1f} s without", flush=True)  # fmt: skip
        trials = sum(trial["status"] == "ok" for trial in runs[True].trials.values())
    ratios = [alone / shared for shared, alone in zip(seconds[True], seconds[False])]
    print(
        f"{trials} trials, {options.questions} questions: without sharing "
        f"{statistics.median(ratios):.2f} × as long (rounds: "
        f"{', '.join(f'{ratio:.2f}' for ratio in ratios)}); all answers and counts equal"
    )
    if options.json is not None:
        report = {"trials": trials, "questions": options.questions, "ratios": ratios,
                  "shared_s": seconds[True], "alone_s": seconds[False]}  # fmt: skip
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
