"""Run lmms-eval as a process: follow its progress, keep its log, never outlive the sweep."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

#: the plug-in shows this bar: "tokprune:  50%|█████     | 6/12 [00:03<00:03, 2.00it/s]"
_BAR = re.compile(r"tokprune: .*?(\d+)/(\d+) \[")
#: lines of the log that are told when a process fails
_TAIL = 15
#: seconds that a process gets to end when told to
_PATIENCE = 15.0
_PR_SET_PDEATHSIG = 1


class ChildFailedError(RuntimeError):
    """A process ended with an error; the message has the end of its log."""


def run_child(
    words: Sequence[str],
    folder: Path,
    log: Path,
    environment: Mapping[str, str],
    advance: Callable[[int], None],
) -> None:
    """Run a command until it ends.

    Interrupted (Ctrl-C, or SIGTERM turned into KeyboardInterrupt), the process and all it started
    are ended as well.

    Args:
        words: the command.
        folder: where it runs.
        log: file for all it says.
        environment: its environment.
        advance: told the number of answers whenever the process shows a higher one.

    Raises:
        ChildFailedError: it ended with another status than 0.
        OSError: it could not be started.
    """
    tail: deque[str] = deque(maxlen=_TAIL)
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            _follow(process.stdout, file, tail, advance)
            status = process.wait()
        except BaseException:
            _end(process)
            raise
    if status:
        how = f"signal {-status}" if status < 0 else f"status {status}"
        raise ChildFailedError(f"it ended with {how}\n{log_end(tail)}")


def log_end(lines: Sequence[str]) -> str:
    """The last lines of a log, indented."""
    return "\n".join(f"    {line}" for line in lines)


def read_tail(log: Path) -> str:
    """The last lines of a log file, indented."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return log_end([line for line in lines if not _BAR.search(line)][-_TAIL:])


def _follow(
    stream: IO[bytes], file: IO[bytes], tail: deque[str], advance: Callable[[int], None]
) -> None:
    """Copy the output, keep its last lines, and read the bar in it, which ends in no newline."""
    rest, seen = "", 0
    descriptor = stream.fileno()
    while block := os.read(descriptor, 1 << 16):
        file.write(block)
        file.flush()
        *lines, rest = re.split(r"[\r\n]+", rest + block.decode("utf-8", errors="replace"))
        for line in [*lines, rest]:
            found = _BAR.search(line)
            if found is not None and int(found[1]) > seen:
                seen = int(found[1])
                advance(seen)
        tail.extend(line for line in lines if line.strip() and not _BAR.search(line))
    if rest.strip():
        tail.append(rest)


def _end(process: subprocess.Popen[Any]) -> None:
    """End a process and those it started: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal(process, number)
        until = time.monotonic() + _PATIENCE
        # a second Ctrl-C must not leave the process behind
        while process.poll() is None and time.monotonic() < until:
            with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
                process.wait(0.1)
    # workers that their launcher has left
    _signal(process, signal.SIGKILL)


def _signal(process: subprocess.Popen[Any], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _die_with_parent() -> None:
    """Between fork and exec: the kernel ends this process when the sweep is killed outright."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
