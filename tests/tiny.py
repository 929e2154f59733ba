"""The tiny models of :mod:`tokprune.testing`, by the names that the suites use."""

from tokprune.testing.prompts import count_image_tokens as tokens_of
from tokprune.testing.prompts import count_video_tokens as video_tokens_of
from tokprune.testing.prompts import make_inputs
from tokprune.testing.prompts import take_row as single
from tokprune.testing.tiny import (
    GRID,
    IMAGE_SIZE,
    IMAGE_TOKEN,
    PATCHES,
    VIDEO_TOKEN,
    VOCAB,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    vision_config,
)

BUILDERS = {"llava": llava, "llava_next": llava_next}
VIDEO_BUILDERS = {"llava_next_video": llava_next_video, "llava_onevision": llava_onevision}

__all__ = [
    "BUILDERS", "GRID", "IMAGE_SIZE", "IMAGE_TOKEN", "PATCHES", "VIDEO_BUILDERS", "VIDEO_TOKEN",
    "VOCAB", "llava", "llava_next", "llava_next_video", "llava_onevision", "make_inputs", "single",
    "tokens_of", "video_tokens_of", "vision_config",
]  # fmt: skip
