"""Families by the model classes that they cover."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from tokprune.engine.family import BoundModel, Family
from tokprune.errors import UnsupportedModelError
from tokprune.families import wrappers
from tokprune.plugins import plugins

_FAMILIES: dict[str, Family] = {}
_REFUSED: dict[str, str] = {}


def register_family(family: Family) -> None:
    """Make a family known; later registrations of the same model class win.

    Raises:
        TypeError: no object of a class derived from :class:`~tokprune.engine.family.Family`.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family={family!r} should be an object of a class derived from Family")
    reason = family.unavailable()
    for name in family.model_classes:
        if reason is None:
            _FAMILIES[name] = family
        else:
            _REFUSED[name] = reason
    if reason is None:
        _REFUSED.update(family.refused)


def refuse_models(reasons: Mapping[str, str]) -> None:
    """Say why models cannot be patched, by class name; a family that covers a class wins."""
    _REFUSED.update(reasons)


@functools.cache
def _load_plugins() -> None:
    """Families of other packages, once; those built in win for the classes that they cover."""
    built_in = dict(_FAMILIES)
    for _, family, _ in plugins("families"):
        register_family(family() if isinstance(family, type) else family)
    _FAMILIES.update(built_in)


def supported_models() -> list[str]:
    """Names of the transformers model classes that can be patched."""
    _load_plugins()
    return sorted(_FAMILIES)


def families_with_pieces() -> list[str]:
    """Names of the families whose vision encoder can run in pieces."""
    _load_plugins()
    return sorted({family.name for family in _FAMILIES.values() if family.has_pieces})


def why_refused(name: str) -> str | None:
    """Why a checkpoint of this class is none for transformers' own classes; None: it is one, or
    nothing is known."""
    _load_plugins()
    family = _FAMILIES.get(name)
    if family is None:
        return _REFUSED.get(name)
    if family.package != "transformers":
        return f"it is of another package: package={family.package!r}"
    return None


def _known(model: Any) -> str | None:
    """The name by which a model's class is covered or refused."""
    names = (cls.__name__ for cls in type(model).__mro__)
    return next((name for name in names if name in _FAMILIES or name in _REFUSED), None)


def unwrap(model: Any) -> Any:
    """The model inside wrappers: PEFT, DataParallel, DDP, FSDP, compiled modules, value heads,
    modules of one's own with one model in them; also of objects with a ``model`` (pipelines,
    trainers). ``model`` itself where nothing in it is known.

    Raises:
        UnsupportedModelError: there are several in it (says where).
    """
    _load_plugins()
    return wrappers.unwrap(model, lambda module: _known(module) is not None)


def family_of(model: nn.Module) -> Family:
    """Family of a model (out of its wrappers, see :func:`unwrap`).

    Raises:
        UnsupportedModelError: the model's class is refused (says why) or not known (lists those
            that are).
    """
    _load_plugins()
    name = _known(model)
    if name is None:
        raise UnsupportedModelError(
            f"model {type(model).__name__} is not supported; known model classes: "
            + ", ".join(supported_models())
        )
    if name in _FAMILIES:
        return _FAMILIES[name].of(model)
    raise UnsupportedModelError(f"model {name} is not supported: {_REFUSED[name]}")


def bind(model: nn.Module) -> BoundModel:
    """A model, out of its wrappers, with its family, the modules that are hooked, its facts and
    its widths.

    Raises:
        UnsupportedModelError: its class is not supported, or it lacks something that is needed.
    """
    inner = unwrap(model)
    family = family_of(inner)
    wrappers.check_prompt_learning(model, inner)
    bound = family.bind(inner)
    if bound.parts.image_token_id is None:
        raise UnsupportedModelError(
            f"config.image_token_id of {type(model).__name__} is None; it should be the id of the "
            "token that stands for an image"
        )
    return bound
