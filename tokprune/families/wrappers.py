"""Models in their wrappers: PEFT, DataParallel, DDP, FSDP, compiled modules, value heads, …"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tokprune.errors import UnsupportedModelError


def held(model: Any, known: Callable[[Any], bool]) -> list[tuple[str, Any]]:
    """What is ``known`` of a module and its submodules, outermost only, each once, by path; of
    another object (a pipeline, a trainer), of its ``model``.

    No wrapper is known by name: all of them hold the model as a submodule. But a model class of
    transformers with another in it is no wrapper: it works on the states of that one itself.
    """
    if not isinstance(model, nn.Module):
        inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            return []
        return [(_joined("model", path), found) for path, found in held(inner, known)]
    seen, found, waiting = {id(model)}, [], [("", model)]
    while waiting:
        path, module = waiting.pop(0)
        if known(module):
            found.append((path, module))
            continue
        if type(module).__module__.startswith("transformers.models."):
            continue
        for name, child in module.named_children():
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append((_joined(path, name), child))
    return found


def unwrap(model: Any, known: Callable[[Any], bool]) -> Any:
    """The one ``known`` model that is held; ``model`` itself where none is.

    Raises:
        UnsupportedModelError: several are held (says where).
    """
    found = held(model, known)
    if len(found) > 1:
        places = " or ".join(f"its {path} ({type(own).__name__})" for path, own in found)
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} models; pass one of them: {places}"
        )
    return found[0][1] if found else model


def check_prompt_learning(model: Any, inner: Any) -> None:
    """Whether the model inside sees its prompt as it is.

    Raises:
        UnsupportedModelError: an adapter of peft embeds the prompt itself and puts virtual tokens
            before it. (Prefix tuning does not: its virtual tokens stand in the cache.)
    """
    for module in _around(model, inner):
        config = getattr(module, "active_peft_config", None)
        kind = getattr(config, "peft_type", None)
        kind = str(getattr(kind, "value", kind))
        if getattr(config, "is_prompt_learning", False) and kind != "PREFIX_TUNING":
            raise UnsupportedModelError(
                f"{type(module).__name__}: peft's {kind} puts virtual tokens before the embedded "
                "prompt, so that the model is not told any more where the images stand; adapters "
                "of other kinds (LoRA, IA3, prefix tuning, …) work"
            )


def _around(model: Any, inner: Any) -> list[Any]:
    """The wrappers of ``inner`` that ``model`` is made of, outermost first."""
    around: list[Any] = []
    model = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    while isinstance(model, nn.Module) and model is not inner:
        around.append(model)
        model = next((c for c in model.children() if any(m is inner for m in c.modules())), None)
    return around


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")
