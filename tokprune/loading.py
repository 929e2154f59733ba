"""Load a supported model, and its processor, with a method already at work."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from tokprune.api import check_pieces, patch
from tokprune.checkpoint import (
    check_config,
    check_no_code,
    check_place,
    check_size,
    check_weights,
    reading,
)
from tokprune.engine.masks import check_backend
from tokprune.errors import UnsupportedModelError
from tokprune.families import bind, supported_models
from tokprune.families.registry import why_refused
from tokprune.methods.base import Method
from tokprune.methods.registry import available_methods, make_method, option_names
from tokprune.methods.setting import load_setting
from tokprune.models import resolve
from tokprune.plugins import plugins

#: options of the hub, for config, model and processor alike
_HUB = frozenset({
    "cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
})  # fmt: skip
#: options of from_pretrained that its signature does not name
_LOADER = frozenset({
    "attn_implementation", "code_revision", "device_map", "dtype", "low_cpu_mem_usage",
    "max_memory", "offload_buffers", "offload_folder", "offload_state_dict", "output_loading_info",
    "quantization_config", "state_dict", "torch_dtype", "tp_plan", "tp_size", "variant",
})  # fmt: skip


def load(
    path: str | PathLike[str],
    method: str | Method | None = None,
    *,
    package: str = "transformers",
    setting: str | PathLike[str] | Mapping[str, Any] | None = None,
    processor: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    encode_at_once: int | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Load a model from safetensors and patch it.

    Method, options and model class are checked before any weight is read.

    Args:
        path: folder, hub name, or the name of a shipped model (``"mini"``, ``"mini-video"``).
        method: name or object; None loads the model unpatched.
        package: whose model classes: ``"transformers"``, or ``"llava"`` for a checkpoint of the
            original ``llava`` package, loaded by that package's own
            ``llava.model.builder.load_pretrained_model`` (in an environment of its own, with
            transformers 4.37).
        setting: instead of a method, the JSON file (or its content) that ``tokprune recommend``
            wrote.
        processor: return ``(model, processor)``; with ``package="llava"``, which has no processor,
            the second is the named tuple ``(tokenizer, image_processor)``. Models that take videos
            get transformers' processor; where torchvision is not installed, with a video processor
            of ours in it, or, for LLaVA-NeXT-Video and LLaVA-OneVision, one for videos alone
            (:func:`tokprune.inputs.frames_processor.load_processor`).
        min_pixels, max_pixels: limits of the processor for models that take images as large as
            they are (Qwen-VL, GLM-4V): smaller images are enlarged, larger ones shrunk. They say
            how many visual tokens an image has, of which ``keep`` then leaves some: on Qwen2.5-VL
            28 × 28 pixels are a token.
        encode_at_once: how many images, tiles or frames the vision encoder runs at a time, as
            :func:`tokprune.patch` takes it.
        trust_remote_code: whether transformers may run code of the checkpoint's own. Without it
            none is run, and nobody is asked.
        options: fields of the method go to the method; all others (``dtype``, ``device_map``,
            ``attn_implementation``, …) to ``from_pretrained``. With ``package="llava"``: to
            ``load_pretrained_model`` (``device_map``, ``device``, ``load_4bit``, …; ``model_base``
            is refused, since it is unpickled); it loads float16, and another ``dtype`` is
            converted from that.

    Raises:
        UnsupportedModelError: the checkpoint is of no supported class; lists those.
        ValueError, TypeError: bad method or option.
        ImportError: ``package="llava"`` where that package is not installed; says how to.
        OSError: no such checkpoint, a broken file in it, weights that are no safetensors in its own
            folder, or code of its own that would run; names the file.

    Example::

        model, processor = tokprune.load("llava-hf/llava-1.5-7b-hf", "todre", keep=64,
                                         processor=True, dtype="bfloat16", device_map="cuda")
    """
    if setting is not None:
        if method is not None:
            raise ValueError("give method or setting, not both: a setting names its method")
        method = load_setting(setting if isinstance(setting, Mapping) else Path(setting))
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    if (not processor or package != "transformers") and any(limits.values()):
        given = ", ".join(f"{n}={v!r}" for n, v in limits.items() if v is not None)
        raise ValueError(f"{given}: of transformers' processor, which needs processor=True")
    if encode_at_once is not None and (package != "transformers" or method is None):
        raise ValueError(
            f"encode_at_once={encode_at_once} belongs to a patch of a model of transformers, and "
            "needs a method (method='random' with keep=1.0 drops nothing)"
        )
    if package != "transformers":
        loader = _loader(package)
        made, options = _split(method, options, loader.options())
        return loader.load(path, made, options, processor)
    path = resolve(path)
    check_place(path, options.get("subfolder", ""))
    own = _HUB | _LOADER | set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    made, options = _split(method, options, own)
    hub = {name: options[name] for name in options if name in _HUB}
    # said in so many words: left open, transformers asks whoever sits at the terminal
    hub["trust_remote_code"] = options["trust_remote_code"] = trust_remote_code
    if not trust_remote_code:
        check_no_code(path, options.get("subfolder", ""))
    with reading(path, "config.json"):
        config = AutoConfig.from_pretrained(path, **hub)
    cls = model_class(config)
    if isinstance(backend := options.get("attn_implementation"), str):
        check_backend(backend, "model")
    check_config(path, config, trust_remote_code, options.get("subfolder", ""))
    with reading(path, "config.json"):
        skeleton = meta_model(cls, config)
    if made is not None:
        bound = bind(skeleton)
        check_pieces(encode_at_once, bound, made.plan(bound.facts), made.name)
    files = check_weights(path, config, options)
    with reading(path, "weights"):
        check_size(path, files, skeleton)
        told = bool(options.pop("output_loading_info", False))
        model, info = cls.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **options
        )
    if info["missing_keys"] and options.get("state_dict") is None:
        lacking = sorted(info["missing_keys"])
        raise OSError(
            f"model {path}: its weights lack {len(lacking)} that the model has, and that would be "
            f"random: {', '.join(lacking[:3])}" + (", …" if len(lacking) > 3 else "")
        )
    loaded = (model, info) if told else model
    if made is not None:
        patch(model, made, encode_at_once=encode_at_once)
    if not processor:
        return loaded
    # not for the transformers of llava
    from tokprune.inputs.frames_processor import load_processor
    from tokprune.inputs.pixel_limits import limit_pixels

    with reading(path, "processor"):
        made_for = load_processor(path, model, hub)
    limit_pixels(made_for, min_pixels, max_pixels)
    return loaded, made_for


def _loader(package: str) -> Any:
    """What loads models of another package: ``options()``, the names of the options that its
    loader takes, and ``load(path, method, options, processor)``."""
    loaders = {name: found for name, found, _ in plugins("loaders")}
    if package not in loaders:
        known = " or ".join(map(repr, ["transformers", *loaders]))
        raise ValueError(f"package={package!r} should be {known}")
    return loaders[package]


def _split(
    method: str | Method | None, options: dict[str, Any], loader: frozenset[str]
) -> tuple[Method | None, dict[str, Any]]:
    """The method with its own options, and the options that are left; ``loader``: names of those
    that the model's loader takes."""
    if "use_safetensors" in options:
        raise ValueError("option 'use_safetensors' cannot be set: load reads safetensors only")
    if method is None:
        known = {name for cls in available_methods().values() for name in option_names(cls)}
        for name in options:
            if name in known - loader:
                raise ValueError(f"option {name!r} belongs to a method, but method is None")
        return None, options
    # an unknown method is refused here, whatever its options
    cls = (
        type(method) if isinstance(method, Method) else available_methods().get(str(method).lower())
    )
    own = [] if cls is None else option_names(cls)
    for name in options:
        if name in own and name in loader:
            raise ValueError(
                f"option {name!r} is known to {cls.name} and to from_pretrained; pass a method "  # type: ignore[union-attr]
                "object instead of a name to say which is meant"
            )
        near = difflib.get_close_matches(name, own, n=1)
        if name not in own and name not in loader and near:
            raise ValueError(
                f"option {name!r} is unknown to {cls.name} and to from_pretrained. "  # type: ignore[union-attr]
                f"Did you mean {near[0]!r}?"
            )
    made = make_method(method, **{n: v for n, v in options.items() if n in own})
    return made, {n: v for n, v in options.items() if n not in own}


def model_class(config: Any) -> Any:
    """The supported transformers class of a config, by its architectures or its model type."""
    names = supported_models()
    asked = getattr(config, "architectures", None) or []
    asked = [asked] if isinstance(asked, str) or not isinstance(asked, Iterable) else list(asked)
    for name in asked:
        if name in names and hasattr(transformers, name):
            return getattr(transformers, name)
    for name in names:
        cls = getattr(transformers, name, None)
        kind = getattr(getattr(cls, "config_class", None), "model_type", None)
        if kind is not None and kind == config.model_type and not asked:
            return cls
    asked = [str(name) for name in asked] or [_usual_class(config)]
    reason = next(filter(None, map(why_refused, asked)), None)
    raise UnsupportedModelError(
        f"checkpoint of class {', '.join(asked)} is not supported"
        + ("" if reason is None else f": {reason}")
        + f"; known model classes: {', '.join(names)}"
    )


def _usual_class(config: Any) -> str:
    """The class that transformers reads a model of this kind with, or the name of the kind."""
    # not in the transformers of llava
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind: str = config.model_type
    return str(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind, kind))


def check_plan(cls: Any, config: Any, method: Method) -> None:
    """Whether the method fits the model, tried on a copy without weights."""
    method.plan(bind(meta_model(cls, config)).facts)


def meta_model(cls: Any, config: Any) -> Any:
    """A model without weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a broken config is said in one sentence
        return cls(config)
