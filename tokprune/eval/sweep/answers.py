"""Put a batch of questions to the model, greedily."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from tokprune.eval.sweep.loaded_model import LoadedModel


@dataclass(frozen=True)
class Answer:
    """What the model said to one question."""

    #: trimmed, special tokens left out
    text: str
    #: generated, the end token included
    new_tokens: int
    #: time of its batch divided by the batch size
    seconds: float


def generate_answers(loaded: LoadedModel, inputs: Any, max_new_tokens: int) -> list[Answer]:
    """Answers to the prompts of ``inputs``, by the model in whatever state it is."""
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    start = now(loaded.device)
    with torch.inference_mode():
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    seconds = (now(loaded.device) - start) / len(tokens)
    new_tokens = tokens[:, inputs["input_ids"].shape[1] :].tolist()
    ends = end_tokens(model.generation_config.eos_token_id)
    answers = []
    for row in new_tokens:
        tokens = until_end(row, ends)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append(Answer(str(text).strip(), len(tokens), seconds))
    return answers


def end_tokens(setting: Any) -> set[int]:
    """The ids of an ``eos_token_id``: a number, several, or None."""
    if setting is None:
        return set()
    return set(setting) if isinstance(setting, (list, tuple)) else {int(setting)}


def until_end(row: list[int], ends: set[int]) -> list[int]:
    """The tokens of one answer up to and with its end; without one, all of them."""
    stop = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: stop + 1]


def now(device: torch.device) -> float:
    """Seconds of a clock, when all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
