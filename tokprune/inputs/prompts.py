"""Questions and images, or videos, as a batch of model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal


def prompt_text(processor: Any, question: str, images: int = 1, videos: int = 0) -> str:
    """The prompt of one question about some images and videos, which come first: by the
    processor's chat template, or in LLaVA-1.5's own form where it has none."""
    if getattr(processor, "chat_template", None):
        content = [
            *({"type": "image"} for _ in range(images)),
            *({"type": "video"} for _ in range(videos)),
            {"type": "text", "text": question},
        ]
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text
    shown = "<image>" * images + "<video>" * videos
    return f"USER: {shown}{chr(10) * bool(shown)}{question} ASSISTANT:"


def encode(
    processor: Any,
    questions: Sequence[str],
    visuals: Sequence[Any],
    device: Any,
    media: Literal["image", "video"] = "image",
) -> Any:
    """Model inputs of a batch, padded at the left.

    Args:
        visuals: one a question: an image, or the list of a video's frames (PIL images; equally
            many in all videos of a batch).
        media: which of the two.
    """
    video = media == "video"
    texts = [prompt_text(processor, q, images=not video, videos=video) for q in questions]
    given = {"videos" if video else "images": list(visuals)}
    inputs = processor(**given, text=texts, padding=True, return_tensors="pt")
    return inputs.to(device)


#: names of the pixels among model inputs, by what they show
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
