"""Training-free visual-token pruning and merging for vision-language models in transformers."""

# ruff: noqa: F401
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokprune.api import compose, compress, is_patched, patch, trace_of, unpatch
    from tokprune.calibration import calibrate
    from tokprune.engine.session import visual_positions
    from tokprune.errors import (
        AlreadyPatchedError,
        CompositionError,
        ContractError,
        NonFiniteFeaturesError,
        PromptMismatchError,
        UnsupportedModelError,
    )
    from tokprune.families import supported_models
    from tokprune.integrations.clip_retrieval import FrameFeatures, reduce_frames
    from tokprune.integrations.exec.patching import patch_on_load
    from tokprune.likelihood import Likelihood, log_likelihood
    from tokprune.loading import load
    from tokprune.methods import *  # noqa: F403
    from tokprune.registers import register_neurons
    from tokprune.trace import Trace
    from tokprune.trace.overlay import overlay

__version__ = "0.1.0"

# torch and transformers take seconds to import, so names are fetched when first used.
_HOME = {
    "AlreadyPatchedError": "tokprune.errors",
    "CompositionError": "tokprune.errors",
    "ContractError": "tokprune.errors",
    "FrameFeatures": "tokprune.integrations.clip_retrieval",
    "Likelihood": "tokprune.likelihood",
    "NonFiniteFeaturesError": "tokprune.errors",
    "PromptMismatchError": "tokprune.errors",
    "Trace": "tokprune.trace",
    "UnsupportedModelError": "tokprune.errors",
    "calibrate": "tokprune.calibration",
    "compose": "tokprune.api",
    "compress": "tokprune.api",
    "is_patched": "tokprune.api",
    "load": "tokprune.loading",
    "log_likelihood": "tokprune.likelihood",
    "overlay": "tokprune.trace.overlay",
    "patch": "tokprune.api",
    "patch_on_load": "tokprune.integrations.exec.patching",
    "reduce_frames": "tokprune.integrations.clip_retrieval",
    "register_neurons": "tokprune.registers",
    "supported_models": "tokprune.families",
    "trace_of": "tokprune.api",
    "unpatch": "tokprune.api",
    "visual_positions": "tokprune.engine.session",
}
_PACKAGES = ("engine", "families", "methods", "operators", "testing", "vllm")


def __getattr__(name: str) -> Any:
    if name == "__all__":
        methods = importlib.import_module("tokprune.methods").__all__
        value: Any = sorted({*_HOME, *methods})
    elif name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _PACKAGES:
        return importlib.import_module(f"tokprune.{name}")
    elif name.startswith("_"):
        raise AttributeError(f"module 'tokprune' has no attribute {name!r}")
    else:
        methods_module = importlib.import_module("tokprune.methods")
        if name not in methods_module.__all__:
            raise AttributeError(f"module 'tokprune' has no attribute {name!r}")
        value = getattr(methods_module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
