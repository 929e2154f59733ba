"""The same rows of several tensors, gathered by one kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokprune.operators.kernels.door import on_device, options

__all__ = ["gathered"]

#: words copied at once
WORDS = 1024


@triton.jit(do_not_specialize=["count", "length"])
def gather_kernel(
    index, sources, targets, widths, batches, strides, count, length,
    TENSORS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One output row of every tensor."""
    row = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    place = tl.load(index + b * count + row)
    place = tl.minimum(tl.maximum(place, 0), length - 1)  # never reads outside a tensor
    for i in tl.static_range(TENSORS):
        source = sources[i] + b * batches[i] + place * strides[i]
        target = targets[i] + (b * count + row) * widths[i]
        for start in range(0, widths[i], WORDS):
            word = start + tl.arange(0, WORDS)
            inside = word < widths[i]
            tl.store(target + word, tl.load(source + word, mask=inside), mask=inside)


def gathered(tensors: Sequence[Tensor], index: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` [B, T, *] at ``index`` [B, n] long, entries below 0 read as 0: [B, n, *] each.

    Tensors may be views with any strides of batch and row, as a table that a batch shares.
    """
    batch, count = index.shape
    out = tuple(x.new_empty(batch, count, *x.shape[2:]) for x in tensors)
    pairs = [_words(x, y) for x, y in zip(tensors, out)]
    with on_device(index):
        gather_kernel[(count, batch)](
            index.contiguous(), tuple(x for x, _ in pairs), tuple(y for _, y in pairs),
            tuple(x.shape[2] for x, _ in pairs), tuple(x.stride(0) for x, _ in pairs),
            tuple(x.stride(1) for x, _ in pairs), count, tensors[0].shape[1],
            TENSORS=len(pairs), WORDS=WORDS, **options(4),
        )  # fmt: skip
    return out


def _words(x: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Both as [B, rows, W] integers, of the largest of 8, 4, 2 and 1 bytes that fits rows of
    ``x`` and where they start."""
    width = math.prod(x.shape[2:])
    x = x.reshape(*x.shape[:2], width)
    if width > 1 and x.stride(2) != 1:
        x = x.contiguous()
    starts = (width, x.storage_offset(), x.stride(0), x.stride(1))
    size = math.gcd(8, *(start * x.element_size() for start in starts))
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size]
    flat = torch.as_strided(x, x.shape, (x.stride(0), x.stride(1), 1))
    return _as(flat, word), _as(out.view(*out.shape[:2], width), word)


def _as(x: Tensor, word: torch.dtype) -> Tensor:
    return x.view(torch.uint8).view(word)
