"""transformers' own processors, where the video processor that they want needs torchvision."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from typing import Any

import transformers
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.processing_utils import ProcessorMixin

from tokprune.inputs.frame_videos import FrameVideos, PatchedVideos
from tokprune.inputs.processor_files import video_options

#: kinds of models whose limits of pixels hold for every frame of a video
_BY_FRAME = ("qwen2_vl", "qwen2_5_vl")
#: kinds of models whose processors make more of a video than frames of one size
_NO_VIDEOS = ("smolvlm", "gemma4")


def load_without_torchvision(path: str | PathLike[str], config: Any, hub: Mapping[str, Any]) -> Any:
    """The processor of a checkpoint with a video processor of ours: prompts are made by
    transformers' class, images by its image processor, frames of videos by Pillow.

    Args:
        path: the checkpoint.
        config: of the model.
        hub: options of the hub.

    Raises:
        ImportError: the processor needs more than that; says what.
        OSError: no processor there.
    """
    told, _ = ProcessorMixin.get_processor_dict(str(path), **hub)
    kind = PROCESSOR_MAPPING_NAMES.get(config.model_type)
    cls = getattr(transformers, str(told.get("processor_class") or kind))
    own = type(cls.__name__, (cls,), {"check_argument_for_proper_class": _any, "__doc__": None})
    tokenizer = AutoTokenizer.from_pretrained(path, **hub)
    parts = {
        "image_processor": AutoImageProcessor.from_pretrained(path, use_fast=False, **hub),
        "tokenizer": tokenizer,
        "video_processor": _videos(path, config.model_type, told, hub),
        "chat_template": told.get("chat_template") or tokenizer.chat_template,
    }
    known = inspect.signature(cls.__init__).parameters
    options = {name: told[name] for name in known if name in told and name not in parts}
    return own(**{name: part for name, part in parts.items() if name in known}, **options)


def _any(self: Any, argument_name: str, argument: Any) -> Any:
    """In place of the check that a part is of the class that a processor expects."""
    return type(argument)


def _videos(
    path: str | PathLike[str], kind: str, told: Mapping[str, Any], hub: Mapping[str, Any]
) -> Any:
    options = told.get("video_processor") or video_options(path, hub)
    if kind in _NO_VIDEOS:
        return _NoVideos(options)
    if "patch_size" in options and "temporal_patch_size" in options:
        return PatchedVideos(options, kind in _BY_FRAME)
    return FrameVideos(options)


class _NoVideos(FrameVideos):
    """Says that videos need torchvision."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ImportError(
            "videos for this model need torchvision, which is not installed (take it from the same "
            "build as torch); images do without"
        )
