#!/usr/bin/env python3
"""Set up a virtual environment of its own and run one of the project's jobs in it.

    python3 scripts/dev.py demo     # sweep all methods on the embedded model, report, recommend
    python3 scripts/dev.py test     # the test suite (extra arguments go to pytest)
    python3 scripts/dev.py test-llava   # the tests of the patches for the original llava package
    python3 scripts/dev.py test-lmms    # the tests of the plug-in for lmms-eval
    python3 scripts/dev.py test-vllm    # the tests of the plug-in for vLLM (Python ≥ 3.11)
    python3 scripts/dev.py lint     # ruff, mypy, and which room may import which
    python3 scripts/dev.py shell -- python -c "..."   # anything else, in the environment

Needs Python ≥ 3.10 and nothing else. ``--transformers 4.57.6`` picks another release, in an
environment beside the first; ``--environment llava`` runs ``shell`` in one of the named ones.
Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
TRANSFORMERS = ">=5,<6"


@dataclass(frozen=True)
class Environment:
    """A virtual environment ``.venv-NAME`` and what pip installs there, one call per step; then
    ``files`` of the project are put into its site-packages. ``reads``: files that pip is given."""

    name: str
    steps: tuple[tuple[str, ...], ...]
    files: tuple[Path, ...] = ()
    reads: tuple[Path, ...] = ()

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-{self.name}"

    def python(self) -> str:
        """Path of its Python; the environment is made where it is missing or out of date."""
        python = self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        texts = [p.read_bytes() for p in (ROOT / "pyproject.toml", *self.reads, *self.files)]
        wanted = hashlib.sha256(b"".join(texts) + repr(self.steps).encode()).hexdigest()
        stamp = self.folder / "installed"
        if stamp.exists() and stamp.read_text() == wanted:
            return str(python)
        print(f"setting up {self.folder.name} ...", flush=True)
        if not python.exists():
            venv.create(self.folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for step in self.steps:
            subprocess.run([*pip, *step], check=True)
        for file in self.files:
            where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
            site = subprocess.run([str(python), "-c", where], capture_output=True, text=True)
            shutil.copy(file, site.stdout.strip())
        stamp.write_text(wanted)
        return str(python)


def main_environment(transformers: str) -> Environment:
    """The project with its development extra, on a release or range of transformers."""
    spec = transformers if transformers[0] in "<>=!~" else f"=={transformers}"
    name = "newest" if transformers == TRANSFORMERS else transformers.strip("<>=!~")
    project = ("--editable", f"{ROOT}[dev]")
    # torch first and by exact version: a range would let the resolver pick a far larger build
    return Environment(name, ((TORCH,), (TORCH, f"transformers{spec}", *project)))


VLLM = ROOT / "scripts" / "vllm_environment"

#: environments beside the main one, for what pins other releases than the project itself
ENVIRONMENTS = {
    "llava": Environment(
        "llava",
        (
            (TORCH,),
            # its own requirements pin a torch of 2023; what it really needs is the next step
            ("--no-deps", "llava-torch==1.2.2.post1", "transformers==4.37.2", "tokenizers==0.15.1"),
            (
                "--no-warn-conflicts", "numpy<2", "huggingface_hub<1", "accelerate", "einops",
                "packaging", "pillow", "protobuf", "pytest", "pyyaml", "regex", "requests", "rich",
                "safetensors", "sentencepiece", "shortuuid", "tqdm", "typer",
            ),
            ("--no-deps", "--editable", str(ROOT)),
        ),
    ),
    "lmms": Environment(
        "lmms",
        (
            (TORCH,),
            # of its sixty requirements (7 GB with torchvision), what running a model takes
            ("--no-deps", "lmms-eval==0.7.3"),
            (
                "--no-warn-conflicts", TORCH, "transformers>=5,<6", "filelock<4", "accelerate",
                "datasets", "decord", "einops", "evaluate", "httpx", "jinja2", "loguru",
                "matplotlib", "numpy", "packaging", "pillow", "psutil", "pyarrow", "pydantic",
                "pytablewriter", "pytest", "python-dotenv", "pytz", "pyyaml", "rich", "sacrebleu",
                "safetensors", "scikit-learn", "scipy", "tenacity", "tqdm", "typer",
            ),
            ("--no-deps", "--editable", str(ROOT)),
        ),
    ),
    "vllm": Environment(
        "vllm",
        (
            ("--no-compile", TORCH),
            ("--no-compile", "--no-deps", "--requirement", str(VLLM / "requirements.txt")),
            ("--no-deps", "--editable", str(ROOT)),
        ),
        files=(VLLM / "sitecustomize.py",),
        reads=(VLLM / "requirements.txt",),
    ),
}  # fmt: skip

#: what the tests of the original llava package compare with, made by the newest transformers
LLAVA_REFERENCE = str(ROOT / "runs" / "llava-reference")

#: job → (environment, arguments of its Python); None: the main environment, ``...``: the user's
JOBS: dict[str, list[tuple[str | None, list[object]]]] = {
    "demo": [(None, ["scripts/demo.py", ...])],
    "test": [(None, ["-m", "pytest", "-q", ...])],
    "test-llava": [
        (None, ["-W", "ignore", "tests/llava/make_reference.py", LLAVA_REFERENCE]),
        ("llava", ["-m", "pytest", "-q", "tests/llava", "--reference", LLAVA_REFERENCE, ...]),
    ],
    "test-lmms": [("lmms", ["-m", "pytest", "-q", "tests/lmms", ...])],
    "test-vllm": [("vllm", ["-m", "pytest", "-q", "-p", "no:logging", "tests/serving", ...])],
    "lint": [
        (None, ["-m", "ruff", "check", "."]),
        (None, ["-m", "ruff", "format", "--check", "."]),
        (None, ["-m", "mypy", "tokprune", "patches"]),
        (None, ["-c", "import importlinter.cli as c; c.lint_imports_command()"]),
    ],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=(*JOBS, "shell"))
    parser.add_argument("--transformers", default=TRANSFORMERS, help="release or range")
    parser.add_argument("--environment", choices=tuple(ENVIRONMENTS), help="of the shell job")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    options, rest = parser.parse_known_args(given[:end])
    rest += given[end + 1 :]
    if sys.version_info < (3, 10):  # noqa: UP036 (this script is what meets an old Python)
        print(f"Python {sys.version.split()[0]} is too old; 3.10 or newer is needed")
        return 2

    def python(name: str | None) -> str:
        chosen = ENVIRONMENTS[name] if name else main_environment(options.transformers)
        return chosen.python()

    if options.job == "shell":
        line = [python(options.environment) if r == "python" else r for r in rest]
        return subprocess.run(line, cwd=ROOT).returncode
    for environment, arguments in JOBS[options.job]:
        line = [r for a in arguments for r in (rest if a is ... else [str(a)])]
        code = subprocess.run([python(environment), *line], cwd=ROOT).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
