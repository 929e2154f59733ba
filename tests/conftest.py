"""Shared pytest options and fixtures."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from methods_table import ALIKE_CASES

from tokprune.engine.check import set_validation

GOLDEN_DIR = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=GOLDEN_DIR,
        help="folder of golden vectors: <method>/<case>.safetensors (default: tests/golden)",
    )
    parser.addoption(
        "--full",
        action="store_true",
        help="run the tests marked full, too: whole products of which the default suite is a cover",
    )


#: suites about methods: everything else is about the engine, or families
OF_METHODS = (
    "test_conformance", "test_family_conformance", "test_merging_conformance", "test_syncs",
    "test_methods_", "test_kit", "test_words", "test_recommend",
)  # fmt: skip


def _alike(item: pytest.Item) -> bool:
    """A case of a method that is to the engine like another one."""
    own = getattr(item, "callspec", None)
    cased = own is not None and str(own.params.get("case")) in ALIKE_CASES
    return cased and not item.path.name.startswith(OF_METHODS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if _alike(item):
            item.add_marker(pytest.mark.full)
    if not config.getoption("--full"):
        whole = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=whole)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other
    set_validation(True)


#: what the values of must not be looked at: tensors without any, and the clock
UNVALIDATED = {"test_syncs.py", "test_bench.py"}


@pytest.fixture(autouse=True)
def validation(request: pytest.FixtureRequest) -> Iterator[None]:
    """All tests check the values that methods answer with, but for the files above."""
    before = set_validation(request.path.name not in UNVALIDATED)
    yield
    set_validation(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        root = metafunc.config.getoption("--golden-dir")
        files = sorted(root.glob("**/*.safetensors"))
        metafunc.parametrize(
            "golden_file", files, ids=[str(f.relative_to(root).with_suffix("")) for f in files]
        )


@pytest.fixture(scope="module")
def loaded_once() -> Callable[..., Any]:
    """``LoadedModel.load`` that reads a model once for all tests of a module."""
    from tokprune.eval.sweep.loaded_model import (
        LoadedModel,  # not in the environment of the original llava
    )

    return functools.cache(LoadedModel.load)


@pytest.fixture
def load_once(monkeypatch: pytest.MonkeyPatch, loaded_once: Callable[..., Any]) -> None:
    """Sweeps of this test share their models with all others of its module."""
    monkeypatch.setattr("tokprune.eval.sweep.loaded_model.LoadedModel.load", loaded_once)
