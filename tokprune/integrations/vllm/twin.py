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
from tokprune.errors import UnsupportedModelError
from tokprune.families import bind
from tokprune.integrations.vllm.architectures import FAMILIES, served_by


def twin_of(config: Any) -> BoundModel:
    """The model of a config on the meta device, bound to its family.

    Raises:
        UnsupportedModelError: its architecture is not served, or not with its vision tower.
    """
    name = served_by(config.architectures)
    bound = _twin(name, config.__class__, config.to_json_string(use_diff=False))
    if bound.family.name not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} with a vision tower of the kind {config.vision_config.model_type!r} is not "
            "served with tokprune in vLLM; with a CLIP or SigLIP tower it is"
        )
    return bound


@functools.lru_cache(maxsize=4)
def _twin(name: str, cls: Hashable, text: str) -> BoundModel:
    kind: Any = cls
    config = kind.from_dict(json.loads(text))
    with torch.device("meta"):
        return bind(getattr(transformers, name)(config))
