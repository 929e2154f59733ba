"""Log-likelihoods of given tokens, under methods and without, against the whole logits."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import SHAPES, case_of

import tokprune
from tokprune.methods import make_method
from tokprune.testing.numbering import prompt_positions

PAGE = Path(__file__).resolve().parent.parent / "docs" / "training.md"
FAMILIES = ["llava-1.5", "llava-next", "qwen2.5-vl", "gemma3", "paligemma"]
METHODS = ["random", "fastv", "visionzip", "pool"]


def answers_of(inputs: dict[str, Any], length: int = 3) -> torch.Tensor:
    """The last tokens of every row."""
    labels = inputs["input_ids"].clone()
    real = inputs["attention_mask"].flip(1).cumsum(1).flip(1)
    return labels.masked_fill((real > length) | (inputs["attention_mask"] == 0), -100)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", [None, *METHODS])
def test_equals_the_whole_logits(method: str | None, family: str, side: str) -> None:
    case = case_of(method or "random", family, SHAPES["ragged"])
    model, inputs = case.model, case.inputs(pad_side=side)
    inputs = {**inputs, **prompt_positions(model, inputs)}
    labels = answers_of(inputs)
    try:
        if method is not None:
            tokprune.patch(model, case.method)
        with torch.no_grad():
            got = tokprune.log_likelihood(model, inputs, labels)
            out = model(**inputs, labels=labels)
        trace = tokprune.trace_of(model)
    except tokprune.UnsupportedModelError as refusal:
        pytest.skip(str(refusal))
    finally:
        tokprune.unpatch(model)
    columns = torch.arange(labels.shape[1]).expand_as(labels)
    columns = columns.masked_fill(inputs["attention_mask"] == 0, -1)
    if trace is not None:
        assert trace.last is not None
        columns = trace.last.layers[-1].column
        if out.logits.shape[1] == labels.shape[1]:
            columns = columns.sort(1, stable=True).values
    assert torch.equal(got.scored, labels != -100)
    for b, row in enumerate(columns.tolist()):
        for i, c in enumerate(row):
            if c < 0 or int(labels[b, c]) == -100:
                continue
            want = out.logits[b, i - 1].log_softmax(-1)
            assert got.log_probs[b, c].item() == pytest.approx(want[labels[b, c]].item(), abs=1e-5)
            assert bool(got.greedy[b, c]) == (int(want.argmax()) == int(labels[b, c]))
    assert (-got.log_probs.sum() / got.scored.sum()).item() == pytest.approx(out.loss.item(), 1e-5)
    assert torch.allclose(got.perplexity, (-got.total / 3).exp())


def test_gradients_flow() -> None:
    case = case_of("divprune", "llava-1.5", SHAPES["ragged"])
    inputs = case.inputs()
    with case.compress():
        tokprune.log_likelihood(case.model, inputs, answers_of(inputs)).total.sum().backward()
    grads = [p.grad for p in case.model.parameters() if p.grad is not None]
    assert sum(bool((g != 0).any()) for g in grads) > 20
    case.model.zero_grad(set_to_none=True)


def test_a_text_prompt_after_a_compressed_one() -> None:
    case = case_of(make_method("random", keep=4), "llava-1.5", [[4, "image", 6]])
    text = case.having(prompts=[[9]]).inputs()
    with torch.no_grad():
        want = tokprune.log_likelihood(case.model, text, answers_of(text)).log_probs
        with case.compress():
            case.model(**case.inputs())
            got = tokprune.log_likelihood(case.model, text, answers_of(text)).log_probs
    assert torch.equal(got, want)


def test_bad_labels() -> None:
    case = case_of("random", "llava-1.5", SHAPES["single"])
    inputs = case.inputs()
    with pytest.raises(ValueError, match=r"labels has shape \[1, 3\].*input_ids"):
        tokprune.log_likelihood(case.model, inputs, inputs["input_ids"][:, :3])
    with pytest.raises(ValueError, match="-100 everywhere"):
        tokprune.log_likelihood(case.model, inputs, torch.full_like(inputs["input_ids"], -100))


def test_the_page_on_training_runs() -> None:
    pytest.importorskip("peft")
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        exec(block, names)
    losses = names["losses"]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert not tokprune.is_patched(names["model"])
    assert all(math.isfinite(x) for x in names["scored"].perplexity.tolist())
