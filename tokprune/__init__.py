"""Training-free visual-token pruning and merging for vision-language models in transformers."""

from tokprune.engine.session import visual_positions
from tokprune.errors import (
    AlreadyPatchedError,
    CompositionError,
    NonFiniteFeaturesError,
    PromptMismatchError,
    UnsupportedModelError,
)
from tokprune.families import supported_models
from tokprune.methods import *  # noqa: F403
from tokprune.methods import __all__ as _methods
from tokprune.patching import compose, compress, is_patched, patch, trace_of, unpatch

__version__ = "0.1.0"

__all__ = [
    "AlreadyPatchedError",
    "CompositionError",
    "NonFiniteFeaturesError",
    "PromptMismatchError",
    "UnsupportedModelError",
    "compose",
    "compress",
    "is_patched",
    "patch",
    "supported_models",
    "trace_of",
    "unpatch",
    "visual_positions",
    *_methods,
]
