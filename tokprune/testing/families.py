"""All tiny families under one roof: what each is built from, and which prompts it takes.

Their builders are imported when first used, so that importing :mod:`tokprune.testing` stays quick.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import transformers

from tokprune.testing import tiny
from tokprune.testing.tiny import Builder, Inputs, TinyFamily, register_tiny

#: those that together exercise everything, so that a check of all of them stays quick
REPRESENTATIVE = (
    "llava-1.5",
    "llava-next",
    "llava-next-video",
    "llava-onevision",
    "qwen2.5-vl",
    "qwen3-vl",
    "gemma3",
    "internvl",
)

#: share of the largest logit where chunks and steps of a recurrence round differently
_RECURRENT = 1e-4


@dataclass(frozen=True)
class _Entry:
    """A tiny family before its module is imported; see :class:`TinyFamily`."""

    module: str
    #: classes that the installed transformers has to have
    classes: tuple[str, ...]
    options: dict[str, Any]

    @property
    def installed(self) -> bool:
        return _NAMES.issuperset(self.classes)


#: what transformers has, without importing any of it
_NAMES: frozenset[str] = frozenset(vars(transformers)["__all__"])


def _entry(module: str, *kinds: str, config: str | None = None, **options: Any) -> _Entry:
    classes = tuple(f"{kind}ForConditionalGeneration" for kind in kinds)
    return _Entry(module, (*classes, *([config] if config else [])), options)


def _llava(decoder: str, **options: Any) -> _Entry:
    return _entry("tiny_others", "Llava", config=f"{decoder}Config", **options)


_GRIDS = ((24, 40), (40, 24), (32, 32), (16, 48))
_TILES = ((24, 24), (24, 48), (48, 48))
_QWEN: dict[str, Any] = {"videos": True, "sizes": _GRIDS}
_GLM: dict[str, Any] = {"videos": True, "mixed": False, "sizes": _GRIDS}
_EAGER: dict[str, Any] = {"backends": ("eager",)}

_ENTRIES: dict[str, _Entry] = {
    "qwen2-vl": _entry("tiny_qwen", "Qwen2VL", **_QWEN),
    "qwen2.5-vl": _entry("tiny_qwen", "Qwen2_5_VL", **_QWEN),
    "qwen3-vl": _entry("tiny_qwen", "Qwen3VL", **_QWEN),
    "qwen3-vl-moe": _entry("tiny_qwen", "Qwen3VLMoe", **_QWEN),
    "qwen3.5": _entry("tiny_qwen", "Qwen3_5", tolerance=_RECURRENT, **_QWEN),
    "qwen3.5-moe": _entry("tiny_qwen", "Qwen3_5Moe", tolerance=_RECURRENT, **_QWEN),
    "glm4v": _entry("tiny_glm", "Glm4v", **_GLM),
    "glm4v-moe": _entry("tiny_glm", "Glm4vMoe", **_GLM),
    "glm46v": _entry("tiny_glm", "Glm46V", **_GLM),
    "internvl": _entry("tiny_tiles", "InternVL", sizes=_TILES),
    "smolvlm": _entry("tiny_tiles", "SmolVLM", sizes=((24, 24), (24, 48), (20, 24))),
    "idefics3": _entry("tiny_tiles", "Idefics3", sizes=((24, 24), (24, 48), (20, 24))),
    "aya-vision": _entry("tiny_tiles", "AyaVision", sizes=_TILES),
    "cohere2-vision": _entry("tiny_tiles", "Cohere2Vision", sizes=_TILES),
    "gemma3": _entry("tiny_gemma", "Gemma3"),
    "gemma4": _entry("tiny_gemma", "Gemma4", sizes=((24, 24), (24, 48), (32, 16))),
    "paligemma": _entry("tiny_gemma", "PaliGemma"),
    "paligemma2": _entry("tiny_gemma", "PaliGemma", **_EAGER),
    "mistral3": _entry("tiny_pixtral", "Mistral3", sizes=_GRIDS),
    "llava-pixtral": _entry("tiny_pixtral", "Llava", sizes=_GRIDS),
    "video-llava": _entry("tiny_others", "VideoLlava", videos=True),
    "llava-1.5/qwen3": _llava("Qwen3"),
    "llava-1.5/phi3": _llava("Phi3"),
    "llava-1.5/gemma2": _llava("Gemma2", **_EAGER),
    "llava-1.5/cohere": _llava("Cohere"),
    "llava-1.5/stablelm": _llava("StableLm"),
    "llava-1.5/glm4": _llava("Glm4"),
    "llava-1.5/phi": _llava("Phi"),
    "llava-1.5/granite": _llava("Granite"),
    "llava-1.5/mistral": _llava("Mistral"),
}


class _Lazy:
    """Builder and prompts of a family whose module is imported when one of them is called."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self.module = name, f"{__package__}.{module}"

    def _own(self) -> tuple[Builder, Any]:
        found: tuple[Builder, Any] = importlib.import_module(self.module).FAMILIES[self.name]
        return found

    def build(self, *args: Any, **kwargs: Any) -> Any:
        return self._own()[0](*args, **kwargs)

    def inputs(self, *args: Any, **kwargs: Any) -> Inputs:
        made: Inputs = self._own()[1].inputs(*args, **kwargs)
        return made

    def row(self, *args: Any, **kwargs: Any) -> Inputs:
        made: Inputs = self._own()[1].row(*args, **kwargs)
        return made


def _register() -> None:
    for name, build, videos in (
        ("llava-1.5", tiny.llava, False),
        ("llava-next", tiny.llava_next, False),
        ("llava-next-video", tiny.llava_next_video, True),
        ("llava-onevision", tiny.llava_onevision, True),
    ):
        register_tiny(name, build, videos=videos)
    for name, entry in _ENTRIES.items():
        if entry.installed:
            lazy = _Lazy(name, entry.module)
            register_tiny(name, lazy.build, lazy.inputs, lazy.row, **entry.options)


_register()
#: names of all families that come with tokprune and that the installed transformers has
BUILT_IN = tuple(tiny.tiny_families())


def default_families() -> list[str]:
    """Names of the families that a method is checked on unless told otherwise:
    :data:`REPRESENTATIVE`, and those that others registered."""
    return [n for n in tiny.tiny_families() if n in REPRESENTATIVE or n not in BUILT_IN]


def made_by(build: Callable[..., Any], families: Sequence[TinyFamily]) -> TinyFamily | None:
    """Of ``families`` the one that ``build`` is the builder of."""
    known = {family.name: family for family in families}
    for name, entry in _ENTRIES.items():
        module = sys.modules.get(f"{__package__}.{entry.module}")
        own = {} if module is None else module.FAMILIES
        if name in known and name in own and own[name][0] is build:
            return known[name]
    return next((family for family in families if family.build is build), None)
