"""Argument checks that operators share: each names the argument, its value and what is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor


def check_mask(name: str, mask: Tensor, shape: Sequence[int]) -> None:
    """``mask`` is bool of this shape."""
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"{name} is {mask.dtype} {tuple(mask.shape)}; it should be torch.bool {tuple(shape)}"
        )


def check_choice(name: str, value: object, literal: object) -> None:
    """``value`` is one of the values of a ``Literal``."""
    if value not in get_args(literal):
        raise ValueError(f"{name}={value!r} is unknown; use one of {get_args(literal)}")


def check_points(x: Tensor) -> None:
    """``x`` is [*, n, d]."""
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; it should be [*, n, d]")


def check_square(name: str, matrix: Tensor) -> None:
    """``matrix`` is [*, n, n]."""
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}; it should be [*, n, n]")


def check_number(name: str, value: int, most: int, of: str = "tokens") -> None:
    """1 ≤ ``value`` ≤ ``most``, the number of ``of`` there are."""
    if not 1 <= value <= most:
        raise ValueError(
            f"{name} is {value}; it should be between 1 and the number of {of}, {most}"
        )


def check_selection(shape: torch.Size, k: int, candidates: Tensor | None) -> None:
    """``k`` of the n tokens of ``shape`` [*, n] can be chosen among ``candidates``."""
    check_number("k", k, shape[-1])
    if candidates is not None:
        check_mask("candidates", candidates, shape)


def check_segment(segment: Tensor, name: str, value: Tensor) -> None:
    """``segment`` and the argument ``name`` are [B, L]."""
    if value.dim() != 2 or segment.shape != value.shape:
        raise ValueError(
            f"segment has shape {tuple(segment.shape)} and {name} {tuple(value.shape)}; both "
            "should be [B, L]"
        )


def checked_grid(grid: tuple[int, int] | None, tokens: int) -> tuple[int, int]:
    """``grid`` (h, w), whose product is ``tokens``; None: the square."""
    if grid is None:
        side = math.isqrt(max(0, tokens))
        if side * side != tokens:
            raise ValueError(f"grid is None but {tokens} tokens are no square; give grid=(h, w)")
        grid = (side, side)
    if min(grid) < 1 or grid[0] * grid[1] != tokens:
        raise ValueError(f"grid is {grid}; its product should be the {tokens} tokens of x")
    return grid
