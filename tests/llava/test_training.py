"""Loss of a compressed prompt in the original package."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from original import any_positions
from torch.nn import functional as F

import tokprune
from tokprune.errors import UnsupportedModelError

IGNORED = -100
MODELS = ("square", "anyres", "anyres-mistral")


def labels_of(inputs: dict[str, Any]) -> torch.Tensor:
    ids = inputs["input_ids"]
    return ids.masked_fill((ids < 0) | (inputs["attention_mask"] == 0), IGNORED)


@pytest.mark.parametrize("name", MODELS)
def test_loss_of_everything_is_that_of_the_unpatched_model(
    original: Callable[..., Any], name: str
) -> None:
    form = original(name)
    inputs = form.inputs("ragged")
    call = {**inputs, "position_ids": any_positions(inputs), "labels": labels_of(inputs)}
    with torch.no_grad():
        want = form.model(**call).loss
        with tokprune.compress(form.model, "random", keep=1.0):
            got = form.model(**call).loss
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_loss_is_that_of_the_tokens_left(original: Callable[..., Any], name: str) -> None:
    form = original(name)
    inputs = form.inputs("ragged")
    prepared = form.model.prepare_inputs_labels_for_multimodal(
        inputs["input_ids"], any_positions(inputs), inputs["attention_mask"], None,
        labels_of(inputs), inputs["images"], inputs.get("image_sizes"),
    )  # fmt: skip
    labels = prepared[5]
    call = {**inputs, "position_ids": any_positions(inputs), "labels": labels_of(inputs)}
    with torch.no_grad(), tokprune.compress(form.model, "random", keep=5) as trace:
        out = form.model(**call)
        assert form.model(**call, return_dict=False)[0].item() == out.loss.item()
    assert trace.last is not None
    total = []
    for b, row in enumerate(trace.last.layers[-1].column.tolist()):
        real = [i for i, c in enumerate(row) if c >= 0]
        for before, now in itertools.pairwise(real):
            if (label := int(labels[b, row[now]])) != IGNORED:
                total.append(-F.log_softmax(out.logits[b, before], -1)[label])
    assert out.loss.item() == pytest.approx(torch.stack(total).mean().item(), rel=1e-6)


def test_checkpointing_is_refused(original: Callable[..., Any]) -> None:
    model = original("square").build()
    inputs = original("square").inputs("ragged")
    model.gradient_checkpointing_enable()
    model.train()
    with (
        tokprune.compress(model, "random", keep=5),
        pytest.raises(UnsupportedModelError, match=r"gradient checkpointing.*4\.37"),
    ):
        model(**inputs, labels=labels_of(inputs))
