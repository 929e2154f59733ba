"""Which tokens stay: the same in a batch, beside other images, after other prompts."""

from __future__ import annotations

from typing import Any

import torch

from tokprune.families import bind
from tokprune.testing.case import Case, last_of
from tokprune.testing.numbering import prompt_positions
from tokprune.testing.oracle import assert_same_logits
from tokprune.testing.report import Fault
from tokprune.trace import PrefillTrace


def _columns(prefill: PrefillTrace, row: int, offset: int) -> list[list[int]]:
    """Per layer the prompt columns alive, in order, counted from the row's first real token."""
    found = []
    for layer in prefill.layers:
        own = layer.column[row]
        found.append([column - offset for column in own[own >= 0].tolist()])
    return found


def _groups(prefill: PrefillTrace, row: int) -> list[Any]:
    """Per image of a row which token each patch went to, in the tower and after it."""
    found: list[Any] = []
    for image in prefill.images:
        if image.row == row:
            group = image.selection.group if image.selection is not None else None
            found.append(None if group is None else group.tolist())
            group = image.record.group if image.record is not None else None
            found.append(None if group is None else group.tolist())
    return found


def _difference(got: list[list[int]], want: list[list[int]], names: tuple[str, str]) -> str | None:
    """First layer whose columns differ, in words."""
    for layer, (a, b) in enumerate(zip(got, want)):
        if a != b:
            here, there = sorted(set(a) - set(b)), sorted(set(b) - set(a))
            if not here and not there:
                return f"decoder layer {layer}: the same tokens in another order"
            return (
                f"decoder layer {layer}: only {names[0]} it keeps prompt columns {here}, only "
                f"{names[1]} {there}"
            )
    return None


def batch_equals_singles(case: Case, pad_side: str = "left") -> str:
    """What is kept of each row, and its logits, are the same in a padded batch and alone."""
    inputs = case.inputs(pad_side=pad_side)
    out, together = case.prefill(inputs)
    for row in range(len(case.prompts)):
        one = case.row(inputs, row)
        mask = inputs["attention_mask"][row]
        where = f"row {row} of the {pad_side}-padded batch"
        if "image" not in case.prompts[row] and "video" not in case.prompts[row]:
            with torch.no_grad():
                single = case.model(**one, **prompt_positions(case.model, one))
        else:
            single, alone = case.prefill(one)
            columns = _columns(together, row, int(mask.nonzero()[0]))
            words = _difference(columns, _columns(alone, 0, 0), ("in the batch", "alone"))
            if words is None and _groups(together, row) != _groups(alone, 0):
                words = "other patches are merged in the batch than alone"
            if words is not None:
                raise Fault(f"{where} is compressed in another way than alone; {words}")
        assert_same_logits(
            out.logits[row : row + 1, -1], single.logits[:, -1], f"against the row alone, {where}:",
            tolerance=2 * case.family.tolerance,  # kernels for other shapes round differently
        )  # fmt: skip
    return f"each of {len(case.prompts)} rows keeps what it keeps alone ({pad_side} padding)"


def ignores_other_images(case: Case) -> str:
    """What enters the decoder of one image does not depend on another image of the same prompt."""
    plan = case.method.plan(bind(case.model).facts)
    if not plan.prompt and not any(stage.reduces for stage in plan.encoder):
        return "does not apply: nothing is dropped before the decoder"
    pair = case.having(prompts=[[4, "image", 2, "image", 6]], sizes=[(14, 40), (14, 40)])
    inputs = pair.inputs()
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.shape[0] != 2:
        return "not checked: pixel_values do not have one entry per image"
    _, before = pair.prefill(inputs)
    for other in (0, 1):
        changed = pixels.clone()
        changed[other] = -pixels[other].flip(-1)
        _, after = pair.prefill({**inputs, "pixel_values": changed})
        kept = [_entered(prefill, 1 - other) for prefill in (before, after)]
        if kept[0] != kept[1]:
            raise Fault(
                f"what is kept of image {1 - other} changes when the pixels of image {other} of "
                f"the same prompt do (prompt columns {kept[0]} become {kept[1]}): its score reads "
                "another image's tokens"
            )
    return "what enters the decoder of an image does not depend on the other one"


def _entered(prefill: PrefillTrace, image: int) -> list[int]:
    first = prefill.layers[0]
    return first.column[0][first.segment[0] == image].tolist()


def repeats(case: Case) -> str:
    """A forward gives the same after another prompt ran in between: no state is left over."""
    inputs, other = case.inputs(), case.inputs(seed=2)
    results = []
    with case.compress() as trace, torch.no_grad():
        for given in (inputs, other, inputs):
            numbers = prompt_positions(case.model, given)
            logits = case.model(**given, **numbers).logits
            results.append((logits, last_of(trace)))
    (first, before), _, (again, after) = results
    for row in range(len(case.prompts)):
        words = _difference(
            _columns(after, row, 0), _columns(before, row, 0), ("the second time", "the first time")
        )
        if words is not None:
            raise Fault(
                "the same inputs are compressed in another way after another prompt ran in between "
                f"(state is kept from one forward to the next); batch row {row}, {words}"
            )
    if not torch.equal(first, again):
        raise Fault(
            "the same inputs give other logits after another prompt ran in between, by up to "
            f"{(first - again).abs().max().item():.3g}: state is kept from one forward to the next"
        )
    return "the same to the bit after another prompt ran in between"
