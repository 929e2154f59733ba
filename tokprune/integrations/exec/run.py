"""Run a command whose Python processes patch the models that they load."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokprune.integrations.exec.child import RUN
from tokprune.integrations.exec.journal import Journal
from tokprune.integrations.exec.patching import known_loads
from tokprune.methods.base import Method
from tokprune.methods.setting import setting_of

#: Python runs a module of this name before anything else. It starts us, then the one that stood
#: behind it, if there is one.
_SITE = '''\
"""Of `tokprune exec`: has every Python process of its command patch the models that it loads."""
import json, os, sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_folder = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [place for place in sys.path if place != _folder]
try:
    from tokprune.integrations.exec.child import start
except ImportError as error:
    with open(os.path.join(_folder, f"{os.getpid()}.jsonl"), "a") as file:
        event = {"event": "absent", "python": sys.executable, "reason": str(error)}
        file.write(json.dumps(event) + chr(10))
else:
    start(_folder)
_next = PathFinder.find_spec("sitecustomize")
if _next is not None:
    _next.loader.exec_module(module_from_spec(_next))
'''


def run_patched(words: Sequence[str], method: Method, strict: bool) -> tuple[int, list[Any]]:
    """Run a command until it ends.

    Every Python process in it that this package is installed for, however many processes it starts
    in turn, patches the models that it loads. They find the way by ``PYTHONPATH``, so that
    ``python -I``, ``-E`` and ``-S`` and programs that clear their environment lose it.

    Args:
        words: the command; ``-m MODULE`` or a file ``*.py`` is run by this Python.
        method: what to patch with.
        strict: whether a model that the method does not fit ends its process with the error, or is
            left as it is.

    Returns:
        The exit code (128 + n where signal n ended it), and the events of all processes
        (:mod:`~tokprune.integrations.exec.journal`).

    Raises:
        FileNotFoundError: there is no such program.
    """
    with tempfile.TemporaryDirectory(prefix="tokprune-exec-") as name:
        folder = Path(name).resolve()
        run = {"setting": setting_of(method), "strict": strict, "loads": known_loads()}
        (folder / RUN).write_text(json.dumps(run), encoding="utf-8")
        (folder / "sitecustomize.py").write_text(_SITE, encoding="utf-8")
        # programs beside this Python (python, torchrun, accelerate) come first, as if its
        # environment had been activated
        here = str(Path(sys.executable).parent)
        environment = {
            **os.environ,
            "PATH": os.pathsep.join([here, *filter(None, [os.environ.get("PATH")])]),
            "PYTHONPATH": os.pathsep.join(
                [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        if words[0] == "-m" or words[0].endswith(".py"):
            words = [sys.executable, *words]
        program = shutil.which(words[0], path=environment["PATH"])
        if program is None:
            raise FileNotFoundError(
                f"{words[0]}: no such program; after '--' comes a command (python SCRIPT.py, "
                "torchrun …), -m MODULE, or SCRIPT.py"
            )
        process = subprocess.Popen([program, *words[1:]], env=environment)
        with _passed_on(process):
            code = process.wait()
        return (code if code >= 0 else 128 - code), Journal(folder).read()


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C reaches the command by the terminal, and it decides what comes of it; SIGTERM reaches
    us alone, and is handed on."""
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
