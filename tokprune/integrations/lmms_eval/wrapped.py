"""The lmms-eval model that is wrapped: its class, what that takes, whether it batches."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from tokprune.errors import did_you_mean

#: lmms-eval's model for a family of ours
BASES = {"llava-1.5": "llava_hf", "llava-next": "llava_hf"}
#: models of lmms-eval that take one question at a time
SINGLE = frozenset({"llava_hf"})


@dataclass(frozen=True)
class Base:
    """The lmms-eval model that the plug-in extends."""

    name: str
    #: names of its arguments
    parameters: frozenset[str]

    @property
    def batches(self) -> bool:
        """Whether it answers several questions together."""
        return self.name not in SINGLE

    def takes(self, name: str) -> bool:
        return name in self.parameters


def base_class(base: Any, force_simple: bool) -> type:
    """The class of an lmms-eval model.

    Raises:
        ValueError: no name, or an unknown one; names the nearest.
        ImportError: the class needs a package that is not installed.
    """
    from lmms_eval.models import get_model, list_available_models

    if base is None:
        raise ValueError("base is missing: it should name an lmms-eval model, as in base=llava_hf")
    known = [n for n in list_available_models(include_aliases=True) if n != "tokprune"]
    if base not in known:
        hint = did_you_mean(base, known)
        raise ValueError(f"base={base!r} should be an lmms-eval model: {', '.join(known)}.{hint}")
    found: type = get_model(base, force_simple)
    return found


def parameters(cls: type) -> tuple[dict[str, Any], bool]:
    """Names and defaults of what a class takes, and whether it may take more than these."""
    names: dict[str, Any] = {}
    for part in cls.__mro__:
        if "__init__" not in vars(part):
            continue
        takes = list(inspect.signature(vars(part)["__init__"]).parameters.values())[1:]
        for p in takes:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                names.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in takes):
            return names, False
        if any(p.kind is p.VAR_POSITIONAL for p in takes):
            continue  # hands everything to the class above
        return names, True
    return names, True
