"""``load`` for checkpoints of the original ``llava`` package (``package="llava"``)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from tokprune.api import patch
from tokprune.checkpoint import check_no_code, check_weights
from tokprune.engine.compat import LEGACY
from tokprune.engine.masks import check_backend
from tokprune.errors import UnsupportedModelError
from tokprune.families import bind, supported_models
from tokprune.methods.base import Method

INSTALL = (
    "pip install torch tokprune && pip install --no-deps llava-torch==1.2.2.post1 "
    "transformers==4.37.2 tokenizers==0.15.1 && pip install 'numpy<2' 'huggingface_hub<1' "
    "accelerate einops pillow protobuf requests sentencepiece shortuuid"
)
#: by which the package's own scripts load their models, and where in its result the model is
LOAD = ("llava", "llava.model.builder", "load_pretrained_model", 1)
#: options of the package's loader
_BUILDER = frozenset({
    "device", "device_map", "load_4bit", "load_8bit", "model_name", "use_flash_attn",
})  # fmt: skip
#: options of the package's loader that unpickle files
_PICKLES = "model_base"


class LlavaProcessor(NamedTuple):
    """What the package itself loads beside the model: use them with ``llava.mm_utils``
    (``tokenizer_image_token``, ``process_images``)."""

    tokenizer: Any
    image_processor: Any


def options() -> frozenset[str]:
    """Options that go to ``llava.model.builder.load_pretrained_model``, and through it to
    ``from_pretrained``."""
    named = inspect.signature(PreTrainedModel.from_pretrained).parameters
    return _BUILDER | {_PICKLES} | set(named) | {"attn_implementation", "dtype", "torch_dtype"}


def load(
    path: str | PathLike[str], method: Method | None, options: dict[str, Any], processor: bool
) -> Any:
    """The model, or ``(model, LlavaProcessor)``; see :func:`tokprune.load`."""
    if options.get(_PICKLES) is not None:
        raise ValueError(
            f"option {_PICKLES!r} makes the llava package unpickle .bin files, and load reads "
            "safetensors only; merge the weights into the base model and save that"
        )
    if isinstance(backend := options.get("attn_implementation"), str):
        check_backend(backend, "model")
    _need_llava()
    path = str(path)
    cls, config = _class_and_config(path)
    dtype = _dtype(options)
    if method is not None:
        _check_plan(cls, config, method)
    for part in (path, config.mm_vision_tower):
        _need_safetensors(part)
        check_weights(part, None, {})
        check_no_code(part, mapped=True)  # the package leaves open whether such code is trusted
    # the package tells its classes apart by words in the name of the checkpoint's folder
    kind = "llava-mistral" if "Mistral" in cls.__name__ else "llava"
    name = options.pop("model_name", None) or kind
    from llava.model.builder import load_pretrained_model

    tokenizer, model, image_processor, _ = load_pretrained_model(
        path, None, name, use_safetensors=True, **options
    )
    if dtype is not None:
        model.to(dtype)
    model.eval()
    if method is not None:
        patch(model, method)
    return (model, LlavaProcessor(tokenizer, image_processor)) if processor else model


def _need_llava() -> None:
    try:
        import llava.model.builder  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"package='llava' needs the original llava package ({error}). In an environment of "
            f"its own: {INSTALL}"
        ) from None
    if not LEGACY:
        import transformers

        raise ImportError(
            "package='llava' needs transformers 4.37; this environment has "
            f"{transformers.__version__}. In an environment of its own: {INSTALL}"
        )


def _class_and_config(path: str) -> tuple[Any, Any]:
    """By the architectures alone: checkpoints of LLaVA-1.5 call their model type 'llava', which
    is another class in transformers."""
    values: Mapping[str, Any]
    values, _ = PretrainedConfig.get_config_dict(path)
    import llava.model

    for name in values.get("architectures") or []:
        if name in supported_models():
            cls = getattr(llava.model, name)
            return cls, cls.config_class.from_dict(values)
    found = ", ".join(values.get("architectures") or []) or values.get("model_type")
    raise UnsupportedModelError(
        f"checkpoint of class {found} is not supported with package='llava'; known model classes: "
        + ", ".join(supported_models())
    )


def _need_safetensors(part: str) -> None:
    """transformers 4.37 takes pickled weights of a folder where there are no others, whatever it
    is told.

    Raises:
        OSError: the checkpoint, or the vision tower that its config names, has no safetensors.
    """
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if cached_file(part, file, _raise_exceptions_for_missing_entries=False) is not None:
            return
    raise OSError(
        f"{part} holds no {SAFE_WEIGHTS_NAME}, and load reads safetensors only; convert it once: "
        "from_pretrained(...), then save_pretrained(FOLDER, safe_serialization=True) (a vision "
        "tower: as CLIPVisionModel, and name FOLDER as mm_vision_tower in the config)"
    )


def _check_plan(cls: Any, config: Any, method: Method) -> None:
    """Whether the method fits the model, tried on a copy without weights."""
    from transformers import CLIPVisionModel

    config = copy.copy(config)
    config.unfreeze_mm_vision_tower = False  # would load the tower's weights right away
    with torch.device("meta"):
        skeleton = cls(config)
        tower = skeleton.get_vision_tower()
        if tower is not None and not tower.is_loaded:
            tower.vision_tower = CLIPVisionModel(tower.cfg_only)
    method.plan(bind(skeleton).facts)


def _dtype(options: dict[str, Any]) -> torch.dtype | None:
    """The dtype asked for; the package loads float16 whatever it is told."""
    wanted = options.pop("dtype", None)
    wanted = options.pop("torch_dtype", None) if wanted is None else wanted
    if wanted is None or isinstance(wanted, torch.dtype):
        return wanted
    found = getattr(torch, str(wanted).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"dtype={wanted!r} should be float16 (what the llava package loads), or bfloat16 or "
            "float32, which are converted from that"
        )
    return found
