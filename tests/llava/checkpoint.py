"""Tiny checkpoints of the original package on disk: weights, tower, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece
from transformers import LlamaTokenizer

#: what the tokenizer learns from: the prompt of conversation template v1, and questions
TEXT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions. USER: what is in the picture? "
    "ASSISTANT: how many red squares are there? is the circle left of the triangle? yes no"
)


def write_tokenizer(folder: Path) -> None:
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(TEXT.split(". ")))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=100,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    LlamaTokenizer(str(folder / "tokenizer.model")).save_pretrained(folder)


def write_checkpoint(form: Any, folder: Path, safe: bool = True, **changes: Any) -> Path:
    """``folder/model``, whose config names ``folder/clip`` as its tower; ``safe``: safetensors."""
    tower, path = folder / "clip", folder / "model"
    model = form.build()
    clip = model.get_vision_tower()
    clip.vision_tower.save_pretrained(tower, safe_serialization=safe)
    processor = "preprocessor_config.json"
    (tower / processor).write_bytes((form.tower / processor).read_bytes())
    for name, value in {"mm_vision_tower": str(tower), **changes}.items():
        setattr(model.config, name, value)
    model.save_pretrained(path, safe_serialization=True)
    write_tokenizer(path)
    return path
