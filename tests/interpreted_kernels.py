"""Kernels against plain code in Triton's interpreter, on the CPU.

``test_kernels.py`` runs this file in a process of its own: Triton reads ``TRITON_INTERPRET`` when
kernels are decorated.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from kernel_cases import CASES, extremes

from tokprune.operators.kernels.ordered import index_of, pack, value_of


@pytest.mark.parametrize("case", CASES)
def test_kernel_equals_plain_code(case: str) -> None:
    check, examples = CASES[case]

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate],  # to shrink a failure here takes minutes
    )  # fmt: skip
    @given(st.data())
    def compare(data: st.DataObject) -> None:
        check(data.draw, "cpu")

    with np.errstate(all="ignore"):  # the interpreter computes with numpy, NaN and all
        compare()


def test_smallest_and_largest_sets() -> None:
    extremes("cpu")


@triton.jit
def best_kernel(values, value, index, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    found = tl.load(values + at, mask=at < n, other=float("-inf"))
    key = tl.max(pack(found, at), 0)
    tl.store(value, value_of(key))
    tl.store(index, index_of(key))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=16))
@example([float("nan"), float("inf"), float("nan")])
@example([float("-inf"), float("-inf")])
@example([-0.0, 0.0])
@example([-1.0, -0.0, 0.0])
@example([-2.0, -1.0, -1.0])
def test_packed_keys_order_as_torch(numbers: list[float]) -> None:
    values = torch.tensor(numbers)
    value, index = torch.empty(1), torch.empty(1, dtype=torch.long)
    best_kernel[(1,)](values, value, index, len(numbers), BLOCK=16)
    want = values.max(0)
    assert index.item() == want.indices.item()
    torch.testing.assert_close(value[0], want.values, rtol=0, atol=0, equal_nan=True)
