"""What the processes of a run tell: one line of JSON per event, in a file for every process.

Lines are added as things happen, since a process may be killed. A process that was forked goes on
in a file of its own.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokprune.files import parse_json


@dataclass(frozen=True)
class Journal:
    """The events of a run, in the folder that all of its processes know."""

    folder: Path

    def write(self, event: str, **values: Any) -> None:
        """Add an event of this process. What cannot be written is lost: a script that runs in a
        disk that is full, or after the run has ended, has its own troubles."""
        line = json.dumps({"event": event, "process": os.getpid(), **values})
        try:
            with (self.folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError:
            pass

    def read(self) -> list[dict[str, Any]]:
        """All events, each process's in their order; the last line of one that was killed may be
        cut off, and is left out."""
        events = []
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    events.append(parse_json(line))
        return events
