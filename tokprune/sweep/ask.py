"""Put a batch of questions to the model, greedily."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from tokprune.sweep.subject import Subject


@dataclass(frozen=True)
class Answer:
    """``text``: trimmed, special tokens left out; ``new_tokens``: generated, the end token
    included; ``seconds``: time of its batch divided by the batch size."""

    text: str
    new_tokens: int
    seconds: float


def ask(subject: Subject, inputs: Any, max_new_tokens: int) -> list[Answer]:
    """Answers to the prompts of ``inputs``, by the model in whatever state it is."""
    model, tokenizer = subject.model, subject.processor.tokenizer
    start = _now(subject.device)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    seconds = (_now(subject.device) - start) / len(tokens)
    new = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    ends = _end_tokens(model)
    answers = []
    for row in new:
        stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        own = row[: stop + 1]
        text = tokenizer.decode(own, skip_special_tokens=True)
        answers.append(Answer(str(text).strip(), len(own), seconds))
    return answers


def _end_tokens(model: Any) -> set[int]:
    end = model.generation_config.eos_token_id
    if end is None:
        return set()
    return set(end) if isinstance(end, (list, tuple)) else {int(end)}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
