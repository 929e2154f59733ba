"""The lmms-eval model that is wrapped: its class, what that takes, whether it batches."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokprune.errors import did_you_mean
from tokprune.inputs.pixel_limits import limit_pixels

#: lmms-eval's model for a family of ours
BASES = {
    "llava-1.5": "llava_hf", "llava-next": "llava_hf", "llava-onevision": "llava_hf",
    "qwen2-vl": "qwen2_vl", "qwen2.5-vl": "qwen2_5_vl", "qwen3-vl": "qwen3_vl",
    "qwen3.5": "qwen3_5", "internvl": "internvl_hf", "gemma3": "gemma3",
}  # fmt: skip
#: models of lmms-eval that take one question at a time
SINGLE = frozenset({"llava_hf", "internvl_hf"})
#: what models without an argument ``dtype`` load their weights in; others: as the checkpoint says
DTYPES = dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl_hf", "gemma3"), "bfloat16")
#: models of lmms-eval that hold none of transformers' classes, and what to do instead
REFUSED = {
    "llava_onevision": "it loads models of the LLaVA-NeXT package, which tokprune cannot patch; "
    "base=llava_hf takes transformers' own (llava-hf/llava-onevision-…-hf)"
}
#: arguments that say how large an image is shown, the least and the most
_SIZES = {
    "qwen2_vl": ("min_pixels", "max_pixels"), "qwen2_5_vl": ("min_pixels", "max_pixels"),
    "internvl_hf": ("min_patches", "max_patches"),
}  # fmt: skip
#: models whose images qwen_vl_utils alone resizes, without being told limits, and its own (pixels)
_UTILS, _UTILS_PIXELS = ("qwen3_vl", "qwen3_5"), (4 * 32**2, 16384 * 32**2)
#: modules that models of lmms-eval import, and the packages, which come with our extra, of these
_EXTRA = {"av": "av", "decord": "decord", "qwen_vl_utils": "qwen-vl-utils"}


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
        ValueError: no name, or an unknown one; names the nearest. One that cannot be wrapped.
        ImportError: the class needs a package that is not installed; names it.
    """
    from lmms_eval.models import get_model, list_available_models

    if base is None:
        raise ValueError("base is missing: it should name an lmms-eval model, as in base=llava_hf")
    known = [n for n in list_available_models(include_aliases=True) if n != "tokprune"]
    if base not in known:
        hint = did_you_mean(base, known)
        raise ValueError(f"base={base!r} should be an lmms-eval model: {', '.join(known)}.{hint}")
    if base in REFUSED:
        raise ValueError(f"base={base!r} cannot be used: {REFUSED[base]}")
    try:
        found: type = get_model(base, force_simple)
    except ModuleNotFoundError as error:
        raise _missing(base, str(error.name)) from error
    # imported where it is there, and called all the same
    if any(vars(sys.modules[c.__module__]).get("_has_qwen_vl") is False for c in found.__mro__):
        raise _missing(base, "qwen_vl_utils")
    return found


def _missing(base: str, module: str) -> ImportError:
    package = _EXTRA.get(module.partition(".")[0])
    how = f"pip install {package}, or 'tokprune[eval]'" if package else "see lmms-eval's documents"
    return ImportError(
        f"lmms-eval's {base} needs {package or module}, which is not installed ({how})", name=module
    )


def fit_processor(processor: Any, base: Base, model_args: Mapping[str, Any]) -> None:
    """Have our processor show images in the sizes that the base shows them.

    Raises:
        ValueError: limits that contradict each other, or that the processor does not have.
    """
    if base.name in _UTILS:
        limit_pixels(processor, *_UTILS_PIXELS)
    names = _SIZES.get(base.name)
    if names is None:
        return
    usual, _ = parameters(base_class(base.name, False))
    least, most = (int(model_args.get(name, usual[name])) for name in names)
    if base.name == "internvl_hf":
        for name, value in zip(names, (least, most)):
            setattr(processor.image_processor, name, value)
    else:
        limit_pixels(processor, least, most)


def parameters(cls: type) -> tuple[dict[str, Any], bool]:
    """Names and defaults of what a class takes, and whether it may take more than these."""
    names: dict[str, Any] = {}
    open_ended = False
    for part in cls.__mro__:
        if "__init__" not in vars(part):
            continue
        takes = list(inspect.signature(vars(part)["__init__"]).parameters.values())[1:]
        for p in takes:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                names.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in takes):
            break
        # what also takes unnamed ones hands everything to the class above
        open_ended |= not any(p.kind is p.VAR_POSITIONAL for p in takes)
    return names, open_ended
