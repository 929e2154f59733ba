"""The loop that all phases share: schedule, log, checkpoints, resuming."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mini_training.optimizer import Optimizer


def schedule(done: float, warmup: float = 0.02, cooldown: float = 0.35) -> float:
    """Learning-rate factor at a fraction of a phase: up, flat, then linearly down."""
    return max(0.02, min(1.0, done / warmup, (1 - done) / cooldown))


class Phase:
    """One phase of training in a folder of its own: ``log.jsonl`` and ``state.safetensors``."""

    def __init__(
        self, folder: Path, optimizer: Optimizer, total: int, cooldown: float = 0.35
    ) -> None:
        self.folder, self.optimizer, self.total = folder, optimizer, total
        self.cooldown = cooldown
        self.seen, self.seconds = 0, 0.0
        self.level = 0.0  #: difficulty of a curriculum, for phases that have one
        folder.mkdir(parents=True, exist_ok=True)
        progress = folder / "progress.json"
        if progress.exists():
            facts = json.loads(progress.read_text())
            self.seen, self.seconds = facts["seen"], facts["seconds"]
            self.level = facts["level"]
            optimizer.load(load_file(folder / "state.safetensors"))
            print(f"{folder.name}: resumed at {self.seen} scenes", flush=True)

    def run(
        self,
        step: Callable[[int], tuple[int, dict[str, float]]],
        evaluate: Callable[[], dict[str, Any]],
        every: float = 120.0,
    ) -> None:
        """Until ``total`` scenes: ``step(seen)`` computes gradients of one batch and returns the
        number of its scenes and what to log. Evaluates and saves every ``every`` seconds."""
        last = time.perf_counter()
        saved, sums, steps = last, {}, 0
        while self.seen < self.total:
            batch, told = step(self.seen)
            told["norm"] = self.optimizer.step(
                schedule(self.seen / self.total, cooldown=self.cooldown)
            )
            self.seen += batch
            steps += 1
            for key, value in told.items():
                sums[key] = sums.get(key, 0.0) + value
            now = time.perf_counter()
            self.seconds += now - last
            last = now
            if now - saved > every or self.seen >= self.total:
                means = {key: round(value / steps, 4) for key, value in sums.items()}
                facts = {"seen": self.seen, "seconds": round(self.seconds), "level": self.level}
                entry = {**facts, **means, **evaluate()}
                self._save(entry)
                sums, steps = {}, 0
                last = saved = time.perf_counter()

    def _save(self, entry: dict[str, Any]) -> None:
        print(json.dumps({"phase": self.folder.name, **entry}), flush=True)
        with open(self.folder / "log.jsonl", "a") as log:
            log.write(json.dumps(entry) + "\n")
        for name, write in (
            ("state.safetensors", lambda p: save_file(_owned(self.optimizer.state()), p)),
            ("progress.json", lambda p: p.write_text(
                json.dumps({"seen": self.seen, "seconds": self.seconds, "level": self.level}))),
        ):  # fmt: skip
            draft = self.folder / f"{name}.part"
            write(draft)
            os.replace(draft, self.folder / name)


def _owned(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.contiguous().clone() for k, v in state.items()}


def per_task(right: list[bool], tasks: list[str]) -> dict[str, float]:
    """Share of right turns per task."""
    out = {}
    for task in dict.fromkeys(tasks):
        own = [r for r, t in zip(right, tasks) if t == task]
        out[task] = round(sum(own) / len(own), 3)
    return dict(sorted(out.items()))
