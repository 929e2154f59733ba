#!/usr/bin/env python3
"""Set up a virtual environment of its own and run one of the project's jobs in it.

    python3 scripts/dev.py demo     # sweep all methods on the embedded model, report, recommend
    python3 scripts/dev.py test     # the test suite (extra arguments go to pytest)
    python3 scripts/dev.py lint     # ruff and mypy
    python3 scripts/dev.py shell -- python -c "..."   # anything else, in the environment

Needs Python ≥ 3.10 and nothing else. ``--transformers 4.57.6`` picks another release, in an
environment beside the first. Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TRANSFORMERS = ">=5,<6"


def environment(transformers: str) -> Path:
    """Path of the Python of an environment with the project installed; made where missing."""
    spec = transformers if transformers[0] in "<>=!~" else f"=={transformers}"
    tag = "newest" if transformers == TRANSFORMERS else transformers.strip("<>=!~")
    folder = ROOT / f".venv-{tag}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256(
        (ROOT / "pyproject.toml").read_bytes() + f"{TORCH} {spec}".encode()
    ).hexdigest()
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"setting up {folder.name} ({TORCH}, transformers{spec}) ...", flush=True)
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and by exact version: a range would let the resolver pick a far larger build
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, TORCH, f"transformers{spec}", "--editable", f"{ROOT}[dev]"], check=True)
    stamp.write_text(wanted)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=("demo", "test", "lint", "shell"))
    parser.add_argument("--transformers", default=TRANSFORMERS, help="release or range")
    options, rest = parser.parse_known_args()
    if sys.version_info < (3, 10):  # noqa: UP036 (this script is what meets an old Python)
        print(f"Python {sys.version.split()[0]} is too old; 3.10 or newer is needed")
        return 2
    python = str(environment(options.transformers))
    rest = [r for r in rest if r != "--"]
    jobs = {
        "demo": [[python, "scripts/demo.py", *rest]],
        "test": [[python, "-m", "pytest", "-q", *rest]],
        "lint": [
            [python, "-m", "ruff", "check", "."],
            [python, "-m", "ruff", "format", "--check", "."],
            [python, "-m", "mypy", "tokprune", "evals"],
        ],
        "shell": [[python if r == "python" else r for r in rest]],
    }
    for command in jobs[options.job]:
        code = subprocess.run(command, cwd=ROOT).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
