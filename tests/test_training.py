"""Training on compressed prompts: loss at the tokens that are left, gradients, checkpointing."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_cases import FAMILIES, METHODS, SHAPES, case_of
from torch import Tensor
from torch.nn import functional as F

import tokprune
from tokprune.errors import UnsupportedModelError
from tokprune.methods import make_method
from tokprune.testing import Case, tiny_family
from tokprune.testing.numbering import prompt_positions

IGNORED = -100
#: tokens from here on stand for images, or for their ends and breaks
SPECIAL = 90
PLACES = ["llava-1.5", "llava-next", "qwen2.5-vl", "gemma3"]


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """The text of every row, as a training script masks it: no image, no padding."""
    ids = inputs["input_ids"]
    return ids.masked_fill((ids >= SPECIAL) | (inputs["attention_mask"] == 0), IGNORED)


def given(case: Case, side: str = "left") -> dict[str, Any]:
    inputs = case.inputs(pad_side=side)
    return {**inputs, **prompt_positions(case.model, inputs)}


def expected(logits: Tensor, columns: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the tokens that are left, row by row and token by token."""
    total: list[Tensor] = []
    for b, row in enumerate(columns.tolist()):
        real = [i for i, c in enumerate(row) if c >= 0]
        for before, now in itertools.pairwise(real):
            label = int(labels[b, row[now]])
            if label != IGNORED:
                total.append(-F.log_softmax(logits[b, before].float(), -1)[label])
    return torch.stack(total).mean()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_that_of_the_tokens_left(family: str, side: str) -> None:
    case = case_of("random", family, SHAPES["ragged"])
    inputs = given(case, side)
    labels = labels_of(inputs)
    with torch.no_grad(), case.compress() as trace:
        out = case.model(**inputs, labels=labels)
        first = case.model(**inputs, labels=labels, return_dict=False)[0]
    assert trace.last is not None
    want = expected(out.logits, trace.last.layers[-1].column, labels)
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-6)
    assert next(iter(out.keys())) == "loss"
    assert torch.equal(first, out.loss)
    assert "_loss_function" not in case.model.__dict__


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_everything_is_that_of_the_unpatched_model(family: str, side: str) -> None:
    case = case_of(make_method("random", keep=1.0), family, SHAPES["ragged"])
    inputs = given(case, side)
    labels = labels_of(inputs)
    with torch.no_grad():
        want = case.model(**inputs, labels=labels).loss
        with case.compress():
            got = case.model(**inputs, labels=labels).loss
    assert torch.equal(got, want)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("family", ["llava-1.5", "gemma3"])
def test_threads_take_their_losses_side_by_side(family: str, last: int) -> None:
    """Either of two forwards ends while the other one runs."""
    case = case_of("fastv", family, SHAPES["ragged"])
    both = [{**given(case, side), "labels": None} for side in ("left", "right")]
    for inputs in both:
        inputs["labels"] = labels_of(inputs)
    with case.compress(), torch.no_grad():
        want = [case.model(**inputs).loss for inputs in both]
        inside, ended, got = threading.Barrier(2), threading.Event(), [None, None]

        def wait(*_: Any) -> None:
            inside.wait(60)
            if threading.current_thread().name == str(last):
                assert ended.wait(60)

        def run(number: int) -> None:
            with torch.no_grad():
                got[number] = case.model(**both[number]).loss
            ended.set()

        watch = case.model.lm_head.register_forward_pre_hook(wait)
        threads = [threading.Thread(target=run, args=(n,), name=str(n)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        watch.remove()
    assert "_loss_function" not in case.model.__dict__
    assert got == want


def gradients(case: Case, inputs: dict[str, Any], checkpointing: bool | None) -> dict[str, Tensor]:
    """Gradients by parameter, after a backward pass from the loss. ``checkpointing``: whether it is
    reentrant, None: none."""
    model = case.model
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    try:
        with case.compress():
            loss = model(**inputs, labels=labels_of(inputs), use_cache=False).loss
        loss.backward()  # after the block: nothing of a patch is needed there
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad(set_to_none=True)
        if checkpointing is not None:
            model.gradient_checkpointing_disable()
            if checkpointing:
                model.disable_input_require_grads()
        model.eval()


def compared(case: Case, checkpointing: bool) -> None:
    inputs = given(case)
    try:
        want = gradients(case, inputs, None)
    except (UnsupportedModelError, ValueError) as refusal:
        pytest.skip(str(refusal))
    got = gradients(case, inputs, checkpointing)
    assert len(want) > 20
    assert got.keys() == want.keys()
    for name, own in want.items():
        assert torch.isfinite(own).all(), name
        # rectified attention takes another form in a checkpoint, which rounds differently
        torch.testing.assert_close(got[name], own, rtol=1e-4, atol=5e-6, msg=name)


@pytest.mark.parametrize(
    "family", [PLACES[0], *(pytest.param(f, marks=pytest.mark.full) for f in PLACES[1:])]
)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "evs"])
def test_checkpointing_gives_the_same_gradients(method: str, family: str) -> None:
    compared(case_of(method, family, SHAPES["ragged"]), checkpointing=False)


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("method", [pytest.param("random", marks=pytest.mark.full), "fastv"])
def test_checkpointing_on_all_families(method: str, family: str) -> None:
    compared(case_of(method, family, SHAPES["ragged"]), checkpointing=False)


@pytest.mark.parametrize("method", ["divprune", "fastv", "transprune", "visionzip", "tome"])
def test_reentrant_checkpointing(method: str) -> None:
    compared(case_of(method, "llava-1.5", SHAPES["ragged"]), checkpointing=True)


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_trainer(method: str, tmp_path: Path) -> None:
    """transformers' Trainer, its evaluation included, with accumulated gradients."""
    pytest.importorskip("accelerate")
    tiny = tiny_family("llava-1.5")
    model = tiny.build(attention="sdpa", layers=4)
    case = case_of(method, "llava-1.5", [[4, "image", 6]] * 4, model)
    inputs = case.inputs()
    rows = [{k: v[i] for k, v in {**inputs, "labels": labels_of(inputs)}.items()} for i in range(4)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=1, use_cpu=True,
        gradient_accumulation_steps=2, learning_rate=3e-3, logging_steps=1, report_to=[],
        remove_unused_columns=False, per_device_eval_batch_size=2, save_strategy="no",
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    tokprune.patch(model, case.method)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(before, rel=0.5)  # per token, whatever is accumulated
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
