"""Golden checks of divprune: selection from features, from a distance matrix, whole models."""

from typing import Any

import torch
from reference.diversity import cosine_distance, divprune_from_distance

import tokprune
from golden_checks.case import Case, assert_equal
from golden_checks.models import Watched, greedy_tokens, image_inputs, load_llava, run, suffixes
from tokprune.methods.divprune import DivPrune
from tokprune.operators.diversity import divprune


def _compare(order: torch.Tensor, case: Case) -> None:
    """Exactly equal; where the prompt has equal newline rows, whichever of them was taken."""
    keep = order.sort(-1).values
    want_order, want_keep = case.output("order"), case.output("keep")
    assert all(len(set(row.tolist())) == row.numel() for row in keep.reshape(-1, keep.shape[-1]))
    if "is_newline" in case:
        newline = case["is_newline"].bool()

        def anonymous(index: torch.Tensor) -> torch.Tensor:
            flags = newline.expand(*index.shape[:-1], -1).gather(-1, index)
            return index.masked_fill(flags, -1)

        order, keep = anonymous(order), anonymous(keep).sort(-1).values
        want_order = None if want_order is None else anonymous(want_order)
        want_keep = None if want_keep is None else anonymous(want_keep).sort(-1).values
    for got, want, what in ((order, want_order, "order"), (keep, want_keep, "keep")):
        if want is not None:
            assert_equal(got, want, what)


def check_select(case: Case) -> None:
    _compare(divprune(case["x"], case.parameters["k"]), case)
    if "distance" in case:
        case.close(cosine_distance(case["x"]), "distance")
        _compare(divprune_from_distance(case["distance"], case.parameters["k"]), case)


def check_select_from_distance(case: Case) -> None:
    _compare(divprune_from_distance(case["distance"], case.parameters["k"]), case)


def check_e2e(case: Case) -> None:
    """Each sample alone, and all of them as one left-padded batch."""
    tails = suffixes(case, "hf_input_ids")
    for attention in ("eager", "sdpa"):
        model = load_llava(case.weights(), case.parameters["config"], attention)
        for name, order in (("logits", "spatial"), ("logits_unsorted", "published")):
            for group in [[tail] for tail in tails] + ([tails] if len(tails) > 1 else []):
                _check_run(case, model, group, name, order)


def _recorded(case: Case, order: str, tail: str) -> torch.Tensor | None:
    """The recorded selection in the order of a run, from whichever output has it."""
    if order == "published":
        return case.output("order" + tail)
    keep, picked = case.output("keep" + tail), case.output("order" + tail)
    return picked.sort().values if keep is None and picked is not None else keep


def _same_but_for_newlines(before: Any, images: Any, wanted: list[Any]) -> bool:
    """Whether selections differ from the wanted ones, but only in which newline row they took."""
    same = True
    for image, tokens, want in zip(images, before, wanted):
        got = image.selection.index
        if want is None:
            continue
        assert_equal(
            got.masked_fill(tokens.newline[got], -1).sort().values,
            want.masked_fill(tokens.newline[want], -1).sort().values,
            "keep, newlines aside",
        )
        same &= got.tolist() == want.tolist()
    return not same


def _check_run(case: Case, model: Any, tails: list[str], name: str, order: Any) -> None:
    p = case.parameters
    case.aside(*("input_ids" + tail for tail in tails))  # hf_input_ids, otherwise put
    method = Watched(DivPrune(p["ratio"], order=order))
    tokens = greedy_tokens(case, tails, "tokens" if name == "logits" else "tokens_unsorted", name)
    inputs = image_inputs(case, tails, "hf_input_ids")
    with tokprune.compress(model, method) as trace:
        got = run(model, inputs, tokens)
        last: Any = trace.last
        wanted = [_recorded(case, order, tail) for tail in tails]
        if _same_but_for_newlines(method.images, last.images, wanted):
            # equal newline rows: go on with the ones that were recorded
            own = [image.selection.index for image in last.images]
            method.forced[:] = [x if want is None else want for want, x in zip(wanted, own)]
            got = run(model, inputs, tokens)
            last = trace.last
    for b, tail in enumerate(tails):
        where = f"of sample {tail or 'alone'} ({order}, batch of {len(tails)})"
        case.close(method.images[b].features, "features" + tail, where=where)
        kept = last.images[b].selection.index
        assert len(kept) == max(1, round(p["ratio"] * method.images[b].count)), f"k {where}"
        case.equal(method.images[b].newline, "is_newline" + tail, where=where)
        columns = last.layers[0].column[b]
        columns = columns[columns >= 0] - inputs["attention_mask"].shape[1]
        columns = columns + last.original_lengths[b]
        want = case.output("prompt_kept" + tail)
        rows = last.layers[0].lengths[b]
        assert [layer.lengths[b] for layer in last.layers] == [rows] * len(last.layers)
        case.equal(torch.ones(rows), "attention_mask" + tail, where=where)
        if order == "published":
            case.equal(kept, "order" + tail, where=where)
            if want is not None:
                assert_equal(columns.sort().values, want.sort().values, f"prompt_kept {where}")
        else:
            case.equal(kept, "keep" + tail, where=where)
            case.equal(columns, "prompt_kept" + tail, where=where)
            case.close(got.entered[b, -rows:], "inputs_embeds" + tail, where=where)
            case.close(got.hidden[b, -rows:], "hidden_last" + tail, where=where)
            if tokens is not None:
                greedy = got.logits[b, : tokens.shape[1]].argmax(-1)
                case.equal(greedy, "tokens" + tail, where=where)
        case.close(got.logits[b], name + tail, where=where)


CHECKS = {
    "divprune.e2e_llava": check_e2e,
    "divprune.e2e_llava_next": check_e2e,
    "divprune.select": check_select,
    "divprune.select_from_distance": check_select_from_distance,
}
