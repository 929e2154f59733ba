"""SCOPE's budgets: of each image, and shared by the tiles that it makes."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import llava, llava_next, make_inputs

import tokprune
from tokprune.methods import SCOPE
from tokprune.testing.oracle import compressed_logits, continuation_tokens


def kept(model: Any, method: SCOPE, prompts: Any, **inputs: Any) -> Any:
    """Rows kept of every tile, image by image."""
    batch = make_inputs(model, prompts, **inputs)
    with tokprune.compress(model, method) as trace:
        compressed_logits(model, batch, continuation_tokens(len(prompts), 1))
    return [(record.history[-1][1] >= 0).sum(1).tolist() for record in trace.last.records]


def test_images_do_not_share_a_budget() -> None:
    assert kept(llava(), SCOPE(keep=9), [[4, "image", 6], [2, "image", 3, "image", 5]]) == [[9]] * 3


@pytest.mark.parametrize(("size", "tiles"), [((20, 40), 3), ((30, 30), 5)])
def test_the_total_is_shared_by_the_tiles_of_each_image(size: tuple[int, int], tiles: int) -> None:
    """Padding among the candidates, as published: every tile has its whole share."""
    method = SCOPE(keep=32, scope="image", order="published")
    model = llava_next()
    assert kept(model, method, [[4, "image", 6]], sizes=[size]) == [[32 // tiles] * tiles]


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"alpha=-1 should be in \[0, inf\]"):
        SCOPE(keep=4, alpha=-1)
    with pytest.raises(ValueError, match="combine='mean' should be one of 'multi', 'add'"):
        SCOPE(keep=4, combine="mean")  # type: ignore[arg-type]
