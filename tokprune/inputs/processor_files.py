"""Files of a checkpoint that say how its images and videos are shown."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from transformers.image_processing_base import ImageProcessingMixin


def video_options(path: str | PathLike[str], hub: Mapping[str, Any]) -> Mapping[str, Any]:
    """Config of the video processor where it has a file of its own, or of the image processor
    (older checkpoints)."""

    def read(name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any]
        found, _ = ImageProcessingMixin.get_image_processor_dict(
            str(path), image_processor_filename=name, **hub
        )
        return found

    try:
        return read("video_preprocessor_config.json")
    except OSError:
        return read("preprocessor_config.json")
