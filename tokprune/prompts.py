"""Questions and pictures as a batch of model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def prompt_text(processor: Any, question: str, pictures: int = 1, videos: int = 0) -> str:
    """The prompt of one question about some pictures and videos, which come first: by the
    processor's chat template, or in LLaVA-1.5's own form where it has none."""
    if getattr(processor, "chat_template", None):
        content = [
            *({"type": "image"} for _ in range(pictures)),
            *({"type": "video"} for _ in range(videos)),
            {"type": "text", "text": question},
        ]
        text: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text
    shown = "<image>" * pictures + "<video>" * videos
    return f"USER: {shown}{chr(10) * bool(shown)}{question} ASSISTANT:"


def encode(processor: Any, questions: Sequence[str], pictures: Sequence[Any], device: Any) -> Any:
    """Model inputs of a batch, one picture a question, padded at the left."""
    texts = [prompt_text(processor, question) for question in questions]
    inputs = processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
    return inputs.to(device)
