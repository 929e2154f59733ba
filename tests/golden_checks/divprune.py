"""Golden checks of divprune: selection from features, from a distance matrix, whole models."""

from typing import Any

import torch
from reference.diversity import cosine_distance, divprune_from_distance

import tokprune
from golden_checks.case import Case, assert_close, assert_equal
from golden_checks.models import Watched, image_inputs, load_llava, run, suffixes
from tokprune.methods.divprune import DivPrune
from tokprune.operators.diversity import divprune


def _compare(order: torch.Tensor, case: Case) -> None:
    """Exactly equal; where the prompt has equal newline rows, whichever of them was taken."""
    keep = order.sort(-1).values
    want_order, want_keep = case["order"], case["keep"]
    assert all(len(set(row.tolist())) == row.numel() for row in keep.reshape(-1, keep.shape[-1]))
    if "is_newline" in case:
        newline = case["is_newline"].bool()

        def anonymous(index: torch.Tensor) -> torch.Tensor:
            flags = newline.expand(*index.shape[:-1], -1).gather(-1, index)
            return index.masked_fill(flags, -1)

        order, want_order = anonymous(order), anonymous(want_order)
        keep, want_keep = (anonymous(i).sort(-1).values for i in (keep, want_keep))
    assert_equal(order, want_order, "order")
    assert_equal(keep, want_keep, "keep")


def check_select(case: Case) -> None:
    _compare(divprune(case["x"], case.parameters["k"]), case)
    if "distance" in case:
        assert_close(cosine_distance(case["x"]), case["distance"], "distance")
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
                if all(name + tail in case for tail in group):
                    _check_run(case, model, group, name, order)


def _same_but_for_newlines(before: Any, images: Any, wanted: list[torch.Tensor]) -> bool:
    """Whether selections differ from the wanted ones, but only in which newline row they took."""
    same = True
    for image, tokens, want in zip(images, before, wanted):
        got = image.selection.index
        assert_equal(
            got.masked_fill(tokens.newline[got], -1).sort().values,
            want.masked_fill(tokens.newline[want], -1).sort().values,
            "keep, newlines aside",
        )
        same &= got.tolist() == want.tolist()
    return not same


def _check_run(case: Case, model: Any, tails: list[str], name: str, order: Any) -> None:
    p = case.parameters
    method = Watched(DivPrune(p["ratio"], order=order))
    tokens = torch.stack([case[name + tail][:-1].argmax(-1) for tail in tails])
    inputs = image_inputs(case, tails, "hf_input_ids")
    with tokprune.compress(model, method) as trace:
        got = run(model, inputs, tokens)
        last: Any = trace.last
        wanted = [case[("order" if order == "published" else "keep") + tail] for tail in tails]
        if _same_but_for_newlines(method.images, last.images, wanted):
            # equal newline rows: go on with the ones that were recorded
            method.forced[:] = wanted
            got = run(model, inputs, tokens)
            last = trace.last
    for b, tail in enumerate(tails):
        where = f"of sample {tail or 'alone'} ({order}, batch of {len(tails)})"
        assert_close(method.images[b].features, case["features" + tail], f"features {where}")
        kept = last.images[b].selection.index
        assert len(kept) == max(1, round(p["ratio"] * method.images[b].count)), f"k {where}"
        columns = last.layers[0].column[b]
        columns = columns[columns >= 0] - inputs["attention_mask"].shape[1]
        columns = columns + last.original_lengths[b]
        want = case["prompt_kept" + tail]
        if order == "published":
            assert_equal(kept, case["order" + tail], f"order {where}")
            assert_equal(columns.sort().values, want.sort().values, f"prompt_kept {where}")
        else:
            assert_equal(kept, case["keep" + tail], f"keep {where}")
            assert_equal(columns, want, f"prompt_kept {where}")
            embeds, hidden = case["inputs_embeds" + tail], case["hidden_last" + tail]
            assert_close(got.entered[b, -len(embeds) :], embeds, f"inputs_embeds {where}")
            assert_close(got.hidden[b, -len(hidden) :], hidden, f"hidden_last {where}")
            greedy = got.logits[b, :-1].argmax(-1)
            assert_equal(greedy, case["tokens" + tail], f"tokens {where}")
        lengths = [layer.lengths[b] for layer in last.layers]
        assert lengths == [len(want)] * len(lengths)
        assert_close(got.logits[b], case[name + tail], f"{name} {where}")


CHECKS = {
    "divprune.e2e_llava": check_e2e,
    "divprune.select": check_select,
    "divprune.select_from_distance": check_select_from_distance,
}
