"""One process at a time writes a run folder."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import IO, Any

LOCK_FILE = "lock"


class FolderLock:
    """A lock of the operating system on ``folder/lock``, which names its holder. It goes with the
    process however that ends, so a lock file left behind by a killed one is no obstacle.

    Raises:
        BlockingIOError: on entry, if another process holds it; names that process.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._file: IO[str] | None = None

    def __enter__(self) -> FolderLock:
        file = self.path.open("a+", encoding="utf-8")
        try:
            _lock(file)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise BlockingIOError(
                f"run folder {self.path.parent}: {holder} is writing it; wait for it, or choose "
                "another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file is not None:
            self._file.close()  # which gives the lock back
            self._file = None


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
