"""The one place that asks which transformers is installed.

Supported are transformers ≥ 4.57 with its own LLaVA classes, and 4.36/4.37 with the classes of the
original ``llava`` package, which cannot run on anything newer. What the older release lacks is
made up for in :mod:`tokprune.engine.legacy_cache` and in the integration of that package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

#: (major, minor) of the installed transformers
RELEASE = tuple(int(part) for part in transformers.__version__.split(".")[:2])
#: transformers of the original ``llava`` package: tuples as cache, rotary tables in each layer
LEGACY = (4, 36) <= RELEASE <= (4, 37)

if not LEGACY and RELEASE < (4, 57):
    raise ImportError(
        f"transformers {transformers.__version__} is not supported: it should be 4.57 or newer, or "
        "4.37 for models of the original llava package"
    )

if TYPE_CHECKING or not LEGACY:
    from transformers import AttentionInterface, DynamicCache, StaticCache
    from transformers.cache_utils import DynamicLayer, StaticLayer, StaticSlidingWindowLayer
    from transformers.modeling_layers import GradientCheckpointingLayer
else:
    from tokprune.engine.legacy_cache import GrowingLayer as DynamicLayer
    from tokprune.engine.legacy_cache import LayeredCache as DynamicCache

    AttentionInterface = StaticCache = StaticLayer = StaticSlidingWindowLayer = None

__all__ = [
    "HOOKS_IN_CHECKPOINT", "LEGACY", "RELEASE", "AttentionInterface", "DynamicCache",
    "DynamicLayer", "StaticCache", "StaticLayer", "StaticSlidingWindowLayer", "new_cache",
]  # fmt: skip


#: whether a layer's hooks run inside its gradient checkpoint
HOOKS_IN_CHECKPOINT = not LEGACY and "__call__" in vars(GradientCheckpointingLayer)


def new_cache(config: Any) -> DynamicCache:
    """An empty cache whose layers may come to hold different numbers of tokens."""
    return DynamicCache() if LEGACY else DynamicCache(config=config)
