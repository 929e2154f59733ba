"""Facts of a model that a command line names: a family, a model class, or a checkpoint."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from tokprune.cli.app import BadInput
from tokprune.engine.model import ModelFacts


def facts_of(name: str) -> ModelFacts:
    """Facts of a model, without weights.

    Args:
        name: a family (``qwen2.5-vl``: its tiny model stands for it), a model class
            (``Qwen2VLForConditionalGeneration``), a shipped model, a folder, or a hub name.

    Raises:
        BadInput: nothing of the kind is known, or it is refused; says which.
    """
    from tokprune.errors import UnsupportedModelError
    from tokprune.families import bind

    tiny = _tiny(name)
    if tiny is not None:
        return bind(tiny).facts
    try:
        return bind(_skeleton(name)).facts
    except UnsupportedModelError as error:
        raise BadInput(f"--model {name}: {error}") from None


def family_names() -> list[str]:
    """Families that have a model of their own to plan on."""
    from tokprune.testing import tiny_families

    return list(tiny_families())


def _tiny(name: str) -> Any:
    """A tiny model of a family or class; None where the name is neither."""
    from tokprune.families import family_of, supported_models
    from tokprune.families.registry import why_refused
    from tokprune.testing import tiny_families

    known = tiny_families()
    if name in known:
        return known[name].build()
    if reason := why_refused(name):
        raise BadInput(f"--model {name}: {reason}")
    is_class = name in supported_models()
    if not is_class and (Path(name).expanduser().exists() or "/" in name):
        return None
    for family in known.values():
        model = family.build()
        if name in (type(model).__name__, family_of(model).name):
            return model
    if is_class:
        raise BadInput(
            f"--model {name}: the installed transformers does not have it; name a model folder of "
            "its kind instead"
        )
    return None


def _skeleton(name: str) -> Any:
    """The model of a checkpoint, without weights."""
    from transformers import AutoConfig

    from tokprune.checkpoint import check_config, check_place, reading
    from tokprune.cli.model import naming_option, quiet
    from tokprune.loading import meta_model, model_class
    from tokprune.models import resolve

    quiet()
    path = resolve(os.path.expanduser(name))
    if "/" not in name and str(path) == name and not Path(name).exists():
        near = difflib.get_close_matches(name, family_names(), n=1)
        raise BadInput(
            f"--model {name}: no such family, model class, or folder"
            + (f"; did you mean {near[0]}?" if near else f"; families: {', '.join(family_names())}")
        )
    with naming_option():
        check_place(path)
        with reading(path, "config.json"):
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_config(path, config, trust_remote_code=False)
        cls = model_class(config)
        with reading(path, "config.json"):
            return meta_model(cls, config)
