"""The transformers model inside an lmms-eval model, and whether a method fits it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from tokprune.errors import UnsupportedModelError
from tokprune.families import family_of, supported_models
from tokprune.integrations.lmms_eval.arguments import Arguments
from tokprune.integrations.lmms_eval.wrapped import parameters
from tokprune.loading import check_plan, model_class
from tokprune.models import resolve


def find_model(lm: Any, base: str) -> nn.Module:
    """The first supported model that an lmms-eval model holds, wrappers taken off.

    Raises:
        UnsupportedModelError: there is none; says what was found.
    """
    seen: list[str] = []
    for candidate in _candidates(lm):
        try:
            family_of(candidate)
            return candidate
        except UnsupportedModelError:
            seen.append(type(candidate).__name__)
    found = f"found {', '.join(dict.fromkeys(seen[:3]))}" if seen else "it holds no PyTorch model"
    raise UnsupportedModelError(
        f"base={base}: no model in it can be patched ({found}); known model classes: "
        + ", ".join(supported_models())
    )


def _candidates(lm: Any) -> Iterator[nn.Module]:
    """Modules that the wrapped model holds, and what wrappers (several devices, adapters) hold."""
    seen: set[int] = set()
    values = [getattr(lm, name, None) for name in ("model", "_model")]
    for value in (*values, *vars(lm).values()):
        while isinstance(value, nn.Module) and id(value) not in seen:
            seen.add(id(value))
            yield value
            inner = (getattr(value, name, None) for name in ("module", "base_model", "model"))
            value = next((v for v in inner if isinstance(v, nn.Module) and v is not value), None)


def check_fit(arguments: Arguments) -> None:
    """Whether the checkpoint's class is known and the method fits it, before weights are read.

    What cannot be told from a transformers config is left for later.

    Raises:
        UnsupportedModelError: a model class that is not supported.
        ValueError: an option does not fit the model.
    """
    from transformers import AutoConfig

    takes, _ = parameters(arguments.base_class)
    path = arguments.passed.get("pretrained", takes.get("pretrained"))
    if not isinstance(path, str):
        return
    hub = {"trust_remote_code": False} | {
        n: v for n, v in arguments.passed.items() if n in ("revision", "trust_remote_code")
    }
    try:
        config = AutoConfig.from_pretrained(resolve(path), **hub)
    except Exception:
        return  # the base may know how to load what transformers does not
    try:
        cls = model_class(config)
    except UnsupportedModelError:
        if set(getattr(config, "architectures", None) or []) & set(supported_models()):
            return  # a class of another package
        raise
    if arguments.method is not None:
        check_plan(cls, config, arguments.method)
