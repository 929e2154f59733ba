"""Golden checks of divprune: selection from features and from a distance matrix."""

import torch

from golden_checks.case import Case, assert_close, assert_equal
from tokprune.operators.diversity import cosine_distance, divprune, divprune_from_distance


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


CHECKS = {
    "divprune.select": check_select,
    "divprune.select_from_distance": check_select_from_distance,
}
