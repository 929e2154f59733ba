"""lmms-eval as a process: its command, progress and log; it never outlives the sweep."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tokprune.eval.sweep.settings import Settings
from tokprune.integrations.lmms_eval.tasks.loading import MODEL

#: files of a trial's folder
CONFIG, LOG, OUTPUT = "config.json", "log.txt", "output"
#: the plug-in shows this bar: "tokprune:  50%|█████     | 6/12 [00:03<00:03, 2.00it/s]"
_BAR = re.compile(r"tokprune: .*?(\d+)/(\d+) \[")
#: lines of the log that are shown when a process fails
_TAIL = 15
#: seconds that a process gets to end
_PATIENCE = 15.0
_PR_SET_PDEATHSIG = 1


def configuration(
    settings: Settings, model_args: str, tasks: Sequence[str], folders: Sequence[str],
    device: str, batch_size: int,
) -> str:  # fmt: skip
    """The file for ``lmms-eval --config``, run inside the trial's folder."""
    config: dict[str, Any] = {
        "model": MODEL,
        "model_args": model_args,
        "tasks": ",".join(tasks),
        "batch_size": batch_size,
        "output_path": OUTPUT,
        "log_samples": True,
        "verbosity": "INFO",
        "process_docs_parallel": 1,
        "include_path": list(folders),
    }
    if settings.limit is not None:
        config["limit"] = settings.limit
    if settings.max_new_tokens is not None:
        config["gen_kwargs"] = f"max_new_tokens={settings.max_new_tokens}"
    if device == "cpu":
        config["device"] = "cpu"
    return json.dumps(config, indent=1) + "\n"


#: how lmms-eval is started
LMMS_EVAL = ("-m", "lmms_eval")
_ACCELERATE = ("-m", "accelerate.commands.launch")
#: what accelerate would otherwise ask for, or take from a file of the user's
_LAUNCH = {"--num_machines": "1", "--mixed_precision": "no", "--dynamo_backend": "no"}


def command(settings: Settings) -> list[str]:
    """Words that run a trial's configuration, in one process or through ``accelerate launch``."""
    what = [*LMMS_EVAL, "--config", CONFIG]
    if settings.processes == 1 and not settings.launch and not settings.launcher:
        return [sys.executable, *what]
    usual = dict(_LAUNCH)
    if "--num_machines" not in settings.launch:
        usual["--main_process_port"] = "0"  # any free one: several sweeps may run on a machine
    elif "--machine_rank" not in settings.launch:
        # every node runs the same words, and they agree on their ranks when they meet
        usual |= {"--rdzv_backend": "c10d", "--machine_rank": "0"}
    defaults = [word for name, value in usual.items() if name not in settings.launch
                for word in (name, value)]  # fmt: skip
    many = [] if settings.processes == 1 else ["--multi_gpu"]
    return [
        *settings.launcher, sys.executable, *_ACCELERATE, "--num_processes",
        str(settings.processes), *many, *defaults, *settings.launch, *what,
    ]  # fmt: skip


def environment(device: str) -> dict[str, str]:
    """What the child's environment has beside the sweep's own."""
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    return {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", **on_cpu}


# ------------------------------------------------------------------------- its life


class ChildFailedError(RuntimeError):
    """A process ended with an error; the message has the end of its log."""


def run_child(
    words: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Generator[int, None, None]:
    """Run a command until it ends; all that it says goes to the file ``LOG``.

    Interrupted (Ctrl-C, or SIGTERM turned into KeyboardInterrupt) or closed, the process and all it
    started are ended as well.

    Args:
        words: the command.
        folder: where it runs.
        environment: its environment.

    Yields:
        The number of answers whenever the process shows a higher one.

    Raises:
        ChildFailedError: it ended with another status than 0.
        OSError: it could not be started.
    """
    tail: deque[str] = deque(maxlen=_TAIL)
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            words, cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            yield from _follow(process.stdout, log, tail)
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


def _follow(stream: IO[bytes], log: IO[bytes], tail: deque[str]) -> Generator[int, None, None]:
    """Copy the output, keep its last lines, and read the bar in it, which ends in no newline."""
    rest, seen = "", 0
    while block := os.read(stream.fileno(), 1 << 16):
        log.write(block)
        log.flush()
        *lines, rest = re.split(r"[\r\n]+", rest + block.decode("utf-8", errors="replace"))
        tail.extend(line for line in lines if line.strip() and not _BAR.search(line))
        for line in [*lines, rest]:
            found = _BAR.search(line)
            if found is not None and int(found[1]) > seen:
                seen = int(found[1])
                yield seen
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
