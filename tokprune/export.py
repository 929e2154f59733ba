"""Take a setting to another engine that has the method.

::

    from tokprune.export import export

    found = export("cdpruner", "openvino", keep=0.25)
    found.options  # {'pruning_ratio': 75, 'relevance_weight': 0.0}
    found.nearness  # what is not the same there, in sentences

and on the command line ``tokprune export --to openvino --method cdpruner --keep 1/4``. None of the
engines is needed to make it. For vLLM, in which tokprune's own code runs, see :mod:`tokprune.vllm`.
"""

from __future__ import annotations

from os import PathLike
from typing import Any, NoReturn

from tokprune.errors import UnsupportedModelError, did_you_mean
from tokprune.integrations.engines import edge_llm, openvino, sglang
from tokprune.integrations.engines.engine import Engine, Export
from tokprune.methods.base import Method
from tokprune.methods.setting import method_of

__all__ = ["Export", "engines", "export"]

_ENGINES: dict[str, Engine] = {
    own.name: own for own in (openvino.ENGINE, sglang.ENGINE, edge_llm.ENGINE)
}


def engines() -> list[str]:
    """Names of the engines that :func:`export` knows."""
    return list(_ENGINES)


def export(
    setting: str | PathLike[str] | dict[str, Any] | Method,
    to: str,
    *,
    model: str | PathLike[str] | None = None,
    image_size: tuple[int, int] | None = None,
    tokens: int | None = None,
    **options: Any,
) -> Export:
    """A setting in the words of another engine, and how near it is.

    Args:
        setting: file of ``tokprune recommend``, what is in one, the name of a method with its
            ``options``, or a method.
        to: "openvino" (OpenVINO GenAI), "sglang" or "edge-llm" (TensorRT Edge-LLM).
        model: folder or name of the checkpoint: its config is read, and a class that the engine
            does not prune is refused.
        image_size: (width, height) in pixels of a usual image, with ``model``: the engines take
            shares, and a ``keep`` that is a count is turned into one on an image of this size.
        tokens: instead, the visual tokens of an image; of a whole video for methods of videos.

    Raises:
        UnsupportedModelError: the engine has not the method, or not in this model; says what would
            work.
        ValueError, TypeError: a bad setting, an option that has no counterpart there, or a count
            without the number of tokens that it is a share of.
        OSError: the setting, or the model's config, cannot be read.
    """
    if to not in _ENGINES:
        raise ValueError(
            f"to={to!r} should be one of {', '.join(_ENGINES)}.{did_you_mean(to, _ENGINES)} For "
            "vLLM use tokprune.vllm.overrides ('tokprune vllm-overrides')"
        )
    method, engine = method_of(setting, **options), _ENGINES[to]
    if type(method) not in engine.methods:
        _refuse(method, engine)
    if model is not None:
        engine.check_model(method, _architectures(model))
    if tokens is not None and tokens < 1:
        raise ValueError(f"tokens={tokens} should be at least 1")
    if image_size is not None:
        if tokens is not None:
            raise ValueError(f"image_size={image_size} stands beside tokens={tokens}; drop one")
        if method.videos_only:
            raise ValueError(
                f"image_size={image_size} says nothing of a video, which {method.name} works on; "
                "give its number of visual tokens: tokens (--tokens)"
            )
        if model is None:
            raise ValueError(
                f"image_size={image_size} needs a model, which says how many tokens it makes of it"
            )
        tokens = _tokens(model, image_size)
    return engine.export(method, tokens)


def _refuse(method: Method, engine: Engine) -> NoReturn:
    has = ", ".join(cls.name for cls in engine.methods)
    others = [own for own in _ENGINES.values() if type(method) in own.methods]
    near = "".join(f"; {own.label} has it (--to {own.name})" for own in others)
    raise UnsupportedModelError(
        f"{engine.label} has no {method.name}, only {has}{near}. 'tokprune vllm-overrides' serves "
        "methods of tokprune in vLLM, and in transformers all of them run"
    )


def _architectures(model: str | PathLike[str]) -> list[str]:
    """Model classes that a checkpoint names; the code of its own is not run."""
    from transformers import PretrainedConfig

    from tokprune.models import resolve

    config, _ = PretrainedConfig.get_config_dict(resolve(model))
    if not config:
        raise OSError(f"model {str(model)!r}: no config.json found")
    # where transformers 4.57 saves those of Qwen2-VL and Qwen2.5-VL
    inner = (config.get("text_config") or {}).get("architectures")
    return list(config.get("architectures") or inner or ())


def _tokens(model: str | PathLike[str], size: tuple[int, int]) -> int:
    """Visual tokens of an image of (width, height) pixels, as the model's processor cuts it."""
    from transformers import AutoImageProcessor

    from tokprune.models import resolve

    processor: Any = AutoImageProcessor.from_pretrained(resolve(model))
    width, height = size
    patches = int(processor.get_number_of_image_patches(height, width, {}))
    return patches // int(processor.merge_size) ** 2
