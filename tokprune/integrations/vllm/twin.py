"""The model of transformers behind a config, without weights: what families say of a model, facts
and layouts, is asked of it, so that it is the same here and in transformers."""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable
from typing import Any

import torch
import transformers

from tokprune.engine.family import BoundModel
from tokprune.families import bind
from tokprune.integrations.vllm.architectures import served_by


def twin_of(config: Any) -> BoundModel:
    """The model of a config on the meta device, bound to its family.

    Raises:
        UnsupportedModelError: its architecture is not served.
    """
    name = served_by(config.architectures)
    return _twin(name, config.__class__, config.to_json_string(use_diff=False))


@functools.lru_cache(maxsize=4)
def _twin(name: str, cls: Hashable, text: str) -> BoundModel:
    kind: Any = cls
    config = kind.from_dict(json.loads(text))
    with torch.device("meta"):
        return bind(getattr(transformers, name)(config))
