"""Later turns, generate(), prompts without images."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from tokprune.engine.cache import cache_argument
from tokprune.testing.case import GREEDY, Case
from tokprune.testing.numbering import later_positions, prompt_positions
from tokprune.testing.oracle import assert_same_logits, compressed_logits, continuation_tokens
from tokprune.testing.report import Fault


def second_turn(case: Case) -> str:
    """A later turn on the compressed cache equals its tokens fed one by one."""
    one, turn = case.having(prompts=case.prompts[:1]), continuation_tokens(1, 5)
    inputs = one.inputs()
    start = inputs["input_ids"].shape[1]
    with case.compress(), torch.no_grad():
        numbers = prompt_positions(case.model, inputs)
        cache = case.model(**inputs, **numbers, use_cache=True).past_key_values
        stepwise = copy.deepcopy(cache)

        def feed(tokens: Tensor, first: int, cache: Any) -> Tensor:
            mask = torch.ones(1, first + tokens.shape[1], dtype=torch.long)
            return case.model(
                input_ids=tokens,
                attention_mask=mask,
                **later_positions(case.model, mask, tokens.shape[1]),
                **{cache_argument(case.model): cache},
            ).logits[:, -1]

        together = feed(turn, start, cache)
        for i in range(turn.shape[1]):
            single = feed(turn[:, i : i + 1], start + i, stepwise)
    assert_same_logits(
        together, single, "against the turn fed token by token, the second turn:",
        tolerance=2 * case.family.tolerance,  # kernels for other shapes round differently
    )  # fmt: skip
    return f"{turn.shape[1]} tokens on the same cache, together and one by one"


def generates(case: Case) -> str:
    """generate() picks the argmax of what single forwards on the cache give."""
    inputs = case.inputs()
    with case.compress(), torch.no_grad():
        tokens = case.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        logits = compressed_logits(case.model, inputs, tokens[:, :-1])
    if logits.argmax(-1).tolist() != tokens.tolist():
        raise Fault(
            f"generate() answers {tokens.tolist()}, and forwards step by step "
            f"{logits.argmax(-1).tolist()}"
        )
    return f"generate() answers as {tokens.shape[1]} single forwards do"


def passes_text(case: Case) -> str:
    """Prompts without images pass through untouched."""
    text = case.having(prompts=[[9], [4]])
    inputs = text.inputs()
    with torch.no_grad():
        want = case.model(**inputs).logits
        with case.compress() as trace:
            got = case.model(**inputs).logits
    if not torch.equal(got, want):
        raise Fault(
            "a prompt without images gives other logits than unpatched, by up to "
            f"{(got - want).abs().max().item():.3g}"
        )
    if trace.last is not None:
        raise Fault("a prompt without images is recorded as a compressed prefill")
    return "prompts without images pass through untouched"
