"""HiPrune's anchors: a slow twin, neighbours that are real ones, small budgets, layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_tensors import few, generator, normal, seeds
from tiny import llava

from tokprune.families import bind
from tokprune.methods import HiPrune
from tokprune.operators.hiprune import anchors_and_registers


def slowly(
    middle: list[float], deep: list[float], keep: int, alpha: float, grid: tuple[int, int],
    cells: list[int], strict: bool,
) -> list[int]:  # fmt: skip
    """One image, patch by patch."""
    height, width = grid
    anchors = sorted(range(len(middle)), key=lambda i: -middle[i])[: round(keep * alpha / 5)]
    chosen = list(anchors)
    for anchor in anchors:
        y, x = divmod(cells[anchor], width)
        for dy, dx in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            if strict and not (0 <= y + dy < height and 0 <= x + dx < width):
                continue
            cell = min(max(cells[anchor] + dy * width + dx, 0), height * width - 1)
            if cell in cells and cells.index(cell) not in chosen:
                chosen.append(cells.index(cell))
    rest = sorted(range(len(deep)), key=lambda i: -deep[i])
    chosen += [i for i in rest if i not in chosen]
    return sorted(chosen[:keep])


@few
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.booleans(), st.data())
def test_choice_equals_the_slow_twin(
    seed: int, height: int, width: int, strict: bool, data: st.DataObject
) -> None:
    """Grids of any shape, some cells without a patch, and budgets below the anchors' crosses."""
    n = data.draw(st.integers(1, height * width))
    keep, alpha = data.draw(st.integers(1, n)), data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    cells = torch.randperm(height * width, generator=generator(seed))[:n].sort().values
    middle, deep = normal(seed, 2, n), normal(seed + 1, 2, n)
    got = anchors_and_registers(
        middle, deep, keep, alpha, (height, width), cells.expand(2, n), strict
    )
    for i in range(2):
        want = slowly(
            middle[i].tolist(), deep[i].tolist(), keep, alpha, (height, width), cells.tolist(),
            strict,
        )  # fmt: skip
        assert got[i].tolist() == want


def test_neighbours_behind_a_row_end() -> None:
    """The anchor is the last patch of the first row of 3×4."""
    middle, deep = torch.zeros(1, 12), torch.zeros(1, 12)
    middle[0, 3] = 1
    kept = [
        anchors_and_registers(middle, deep, 5, 1.0, (3, 4), strict_neighbours=strict).tolist()
        for strict in (False, True)
    ]
    assert kept == [[[0, 2, 3, 4, 7]], [[0, 1, 2, 3, 7]]]  # 0, 1: the first of the deep scores


def test_published_layers_and_those_of_other_towers() -> None:
    facts = bind(llava()).facts
    assert facts.tower is not None
    layers, deep = facts.tower.encoder_layers, facts.tower.feature_layer
    assert HiPrune(keep=4).layers(facts.tower) == (round(layers * 9 / 24) - 1, deep)
    with pytest.raises(ValueError, match=f"object_layer={deep + 1} should be at most {deep}, "):
        HiPrune(keep=4, object_layer=deep + 1).plan(facts)


def test_numbers_out_of_range_are_named() -> None:
    score = torch.zeros(1, 6)
    with pytest.raises(ValueError, match=r"alpha is 2; it should be in \[0, 1\]"):
        anchors_and_registers(score, score, 2, 2, (2, 3))
    with pytest.raises(ValueError, match=r"grid is \(2, 2\); its product should be the 6 tokens"):
        anchors_and_registers(score, score, 2, 0.5, (2, 2))
    with pytest.raises(ValueError, match=r"deep \(1, 5\); both should be \[B, N\]"):
        anchors_and_registers(score, score[:, 1:], 2, 0.5, (2, 3))
