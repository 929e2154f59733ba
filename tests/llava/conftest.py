"""Tests of the original ``llava`` package, in an environment of its own (`dev.py test-llava`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# transformers 4.37 and llava are nowhere else; other environments do not see these tests at all
_spec = importlib.util.find_spec("llava")
INSTALLED = _spec is not None and _spec.origin is not None  # this folder is a "llava" as well
collect_ignore_glob = [] if INSTALLED else ["*"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference", type=Path, help="folder that make_reference.py wrote (same checkout)"
    )


@pytest.fixture(scope="session")
def reference(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--reference", None)
    if folder is None or not folder.is_dir():
        pytest.fail("run these tests with: python3 scripts/dev.py test-llava")
    return folder  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def original(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Models of the original package by name of the reference and attention backend."""
    from original import Original

    made: dict[tuple[str, str], Any] = {}

    def get(name: str, attention: str = "sdpa") -> Any:
        if (name, attention) not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name, attention] = Original(reference / name, folder, attention)
        return made[name, attention]

    return get
