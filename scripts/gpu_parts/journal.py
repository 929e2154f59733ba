"""Results on disk as they come, so that a run that is cut short still counts."""

from __future__ import annotations

import json
import math
import os
import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
#: lines of a traceback that are kept
LAST_LINES = 12


class Skipped(Exception):
    """Raised inside a part that has nothing to do here; the words say why."""


class Journal:
    """One JSON file, rewritten atomically when a part begins and when it ends.

    ``data``: ``schema``, what the caller gave, ``status`` ("running", "complete", "interrupted")
    and ``parts``, each with ``name``, ``kind``, ``status`` ("running", "ok", "failed", "skipped",
    "interrupted"), ``seconds``, and ``result``, or ``reason``, or ``error`` and ``traceback``.
    """

    def __init__(self, path: Path, **about: Any) -> None:
        self.path, self.start = path, time.perf_counter()
        self.data: dict[str, Any] = {"schema": 1, **about, "status": "running", "parts": []}
        self.write()

    @property
    def parts(self) -> list[dict[str, Any]]:
        own: list[dict[str, Any]] = self.data["parts"]
        return own

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [part for part in self.parts if part["status"] == "failed"]

    @contextmanager
    def part(self, kind: str, name: str) -> Iterator[dict[str, Any]]:
        """A part of the run: the block puts what it found into ``result`` of the dictionary it
        gets. An error is written down and goes no further; Ctrl-C is written down and goes on."""
        own: dict[str, Any] = {"name": name, "kind": kind, "status": "running"}
        self.parts.append(own)
        self.write()
        start = time.perf_counter()
        try:
            yield own
            own["status"] = "ok"
        except Skipped as reason:
            own |= {"status": "skipped", "reason": str(reason)}
        except Exception as error:
            own |= {
                "status": "failed", "error": f"{type(error).__name__}: {error}"[:2000],
                "traceback": last_lines(traceback.format_exc()),
            }  # fmt: skip
        except BaseException:
            own["status"] = self.data["status"] = "interrupted"
            raise
        finally:
            own["seconds"] = round(time.perf_counter() - start, 3)
            self.write()
            print(f"{time.perf_counter() - self.start:6.1f} s  {own['status']:8} {name}  "
                  f"{own.get('reason') or own.get('error') or ''}"[:160], flush=True)  # fmt: skip

    def skip(self, kind: str, name: str, reason: str) -> None:
        with self.part(kind, name):
            raise Skipped(reason)

    def write(self) -> None:
        self.data["seconds"] = round(time.perf_counter() - self.start, 3)
        temporary = self.path.with_name(f".{self.path.name}.part")
        # whatever a part found, the file stays JSON
        text = json.dumps(_finite(self.data), indent=1, ensure_ascii=False, default=str)
        temporary.write_text(text + "\n")
        os.replace(temporary, self.path)


def _finite(value: Any) -> Any:
    """Nested lists and dictionaries with None for numbers that JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def last_lines(text: str) -> list[str]:
    """The end of a traceback, without the paths of this machine."""
    text = text.replace(f"{ROOT}{os.sep}", "")
    text = re.sub(r'File "[^"]*?(site-packages|dist-packages|lib/python[\d.]+)/', 'File "', text)
    return text.strip().splitlines()[-LAST_LINES:]
