"""A float and its index in one int64, so that one maximum gives both as ``torch.max`` would."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["index_of", "pack", "power_of_two", "smaller", "value_of"]


@triton.jit
def pack(value, index):
    """int64 that orders float32 values (NaN above all, −0 as 0), of equal ones the lower index.

    Bits of a positive float rise with its value; those of a negative one fall, so all but the sign
    are flipped. The index is int32, from 0.
    """
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ordered = tl.where(value == value, ordered, 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def index_of(key):
    """The index (int64) that was packed."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The value (float32) that was packed."""
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def smaller(a, b):
    """Minimum that is NaN where one of the two is, as ``torch.minimum``."""
    return tl.where((b < a) | (b != b), b, a)


def power_of_two(number: int, least: int = 16) -> int:
    """The next power of two that is not below ``number``, at least ``least``."""
    return max(least, 1 << (number - 1).bit_length())
