"""Tests of the plug-in for vLLM, in an environment of its own (`dev.py test-vllm`)."""

from __future__ import annotations

import importlib.metadata
import json
import os
from typing import Any

import pytest


def _installed() -> bool:
    return any((own.name or "").startswith("vllm") for own in importlib.metadata.distributions())


# vLLM is nowhere else; other environments do not see these tests at all
collect_ignore_glob = [] if _installed() else ["*"]

if _installed():  # before it is imported: engines in this process, on the loopback
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_HOST_IP="127.0.0.1", VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="WARNING",
    )  # fmt: skip


@pytest.fixture(scope="session")
def engines() -> Any:
    """Engines of vLLM by setting and options, each made once."""
    from serving_case import engine

    made: dict[str, Any] = {}

    def get(*words: str, **options: Any) -> Any:
        key = json.dumps([words, options], sort_keys=True)
        if key not in made:
            made[key] = engine(*words, **options)
        return made[key]

    return get
