"""How far a sweep is: rate and remaining time, as a bar or, outside a terminal, as lines."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

#: seconds between lines
_EVERY = 15.0


class Progress:
    """What a sweep tells about itself; this one says nothing, for use from Python."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: Any) -> None: ...
    def say(self, text: str) -> None:
        """A line for the user."""

    def start(self, name: str, total: int) -> None:
        """A stage begins that has ``total`` steps; the earlier one is over."""

    def advance(self, steps: int) -> None:
        """Steps of this stage are done."""


class Lines(Progress):
    """Plain lines, one every 15 seconds and one at the end of a stage."""

    def __init__(self, file: TextIO | None = None, every: float = _EVERY) -> None:
        self.file, self.every = sys.stderr if file is None else file, every
        self.name, self.total, self.done = "", 0, 0
        self._began = self._said = time.monotonic()

    def say(self, text: str) -> None:
        print(text, file=self.file, flush=True)

    def start(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self._began = self._said = time.monotonic()

    def advance(self, steps: int) -> None:
        self.done += steps
        now = time.monotonic()
        if self.done < self.total and (now - self._said < self.every or not self.done):
            return
        self._said = now
        rate = self.done / max(now - self._began, 1e-9)
        left = (
            "done" if self.done >= self.total else f"{_time((self.total - self.done) / rate)} left"
        )
        self.say(f"{self.name}: {self.done}/{self.total}, {rate:.3g}/s, {left}")


class Bar(Progress):
    """A bar of rich, for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress
        from rich.text import Text

        class Rate(ProgressColumn):
            def render(self, task: Any) -> Text:
                return Text("" if not task.speed else f"{task.speed:.3g}/s")

        self.console = Console(stderr=True, emoji=False)
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self.console,
        )  # fmt: skip
        self._task: Any = None

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, name: str, total: int) -> None:
        self._task = self._bar.add_task(name, total=total)

    def advance(self, steps: int) -> None:
        self._bar.advance(self._task, steps)


def progress_for(file: TextIO) -> Progress:
    """A bar on a terminal, lines elsewhere."""
    return Bar() if file.isatty() else Lines(file)


def _time(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes else f"{int(seconds)} s"
