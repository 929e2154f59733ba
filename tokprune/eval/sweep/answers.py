"""Put a batch of questions to the model, greedily."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from tokprune.eval.sweep.evidence import FirstLogits, cache_entries
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
    #: largest logits of its first token, with their ids, and whether all logits were numbers
    ids: list[int]
    logits: list[float]
    finite: bool
    #: tokens of its batch's prompts that were cached, mean over layers
    cache: float | None


def generate_answers(loaded: LoadedModel, inputs: Any, max_new_tokens: int) -> list[Answer]:
    """Answers to the prompts of ``inputs``, by the model in whatever state it is."""
    model, tokenizer = loaded.model, loaded.processor.tokenizer
    first = FirstLogits()
    start = now(loaded.device)
    with torch.inference_mode():
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            logits_processor=[first],
            return_dict_in_generate=True,
        )
    seconds = (now(loaded.device) - start) / len(out.sequences)
    new_tokens = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    cache = cache_entries(out.past_key_values, len(new_tokens[0]))
    ends = end_tokens(model.generation_config.eos_token_id)
    answers = []
    for row, (ids, logits, finite) in zip(new_tokens, first.rows(), strict=True):
        tokens = until_end(row, ends)
        text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        answers.append(Answer(text, len(tokens), seconds, ids, logits, finite, cache))
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
