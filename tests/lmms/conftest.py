"""Tests of the plug-in for lmms-eval, in an environment of its own (`dev.py test-lmms`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# lmms-eval is nowhere else; other environments do not see these tests at all
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
collect_ignore_glob = [] if INSTALLED else ["*"]

MINI = "base=llava_hf,pretrained=mini,dtype=float32"


@pytest.fixture(scope="session", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing from outside, nothing left behind: data sets are kept in a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(os.environ["HF_DATASETS_CACHE"]))
        yield


@pytest.fixture(scope="session")
def tasks() -> Any:
    """The tasks of this package."""
    from lmms_eval.tasks import TaskManager

    from tokprune.integrations.lmms_eval.tasks import TASKS

    return TaskManager("INFO", include_path=str(TASKS), include_defaults=False,
                       model_name="tokprune")  # fmt: skip


@pytest.fixture
def load() -> Iterator[Callable[..., Any]]:
    """A wrapped model by the arguments that come after base and checkpoint."""
    from tokprune.integrations.lmms_eval.model import Tokprune, TokpruneChat

    made: list[Any] = []

    def get(more: str = "", simple: bool = False, batch_size: int = 1, start: str = MINI) -> Any:
        cls = Tokprune if simple else TokpruneChat
        text = ",".join(part for part in (start, more) if part)
        made.append(cls.create_from_arg_string(text, {"device": "cpu", "batch_size": batch_size}))
        return made[-1]

    yield get
    for lm in made:
        lm._tokprune.close()


@pytest.fixture
def evaluate(tasks: Any) -> Callable[..., Any]:
    """What lmms-eval's command does with ``--model tokprune``, in this process."""
    from lmms_eval.evaluator import simple_evaluate

    def run(more: str, *names: str, simple: bool = False, **options: Any) -> Any:
        return simple_evaluate(
            "tokprune", ",".join(part for part in (MINI, more) if part),
            tasks=[f"tokprune_mini_{name}" for name in names], task_manager=tasks, device="cpu",
            batch_size=1, force_simple=simple, bootstrap_iters=0, process_docs_parallel=1,
            **{"limit": 2, **options},
        )  # fmt: skip

    return run


@pytest.fixture
def said() -> Iterator[list[str]]:
    """Warnings and errors that were logged."""
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lambda m: lines.append(str(m)), level="WARNING", format="{message}")
    yield lines
    logger.remove(sink)
