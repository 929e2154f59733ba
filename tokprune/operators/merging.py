"""The merge plan: which tokens stay, which join which, and what that does to any tensor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokprune.operators.checks import check_choice

__all__ = ["MergePlan", "proportional_bias"]

MergeMode = Literal["mean", "sum", "amax", "prune"]


@dataclass(frozen=True, eq=False)
class MergePlan:
    """One merge of T tokens into T' = K + M rows, per sample, as index lists.

    Output rows are the kept tokens followed by the destinations; where ``distill`` is set, the
    first kept token and the first destination lead (class token, distillation token), then the
    other kept tokens, then the other destinations. A token in none of the lists is dropped.

    Source: Bolya et al. 2023, arXiv 2210.09461, section 3; Tran et al. 2024, arXiv 2405.16148,
    section 3.2.
    """

    #: [B, K] long, tokens passed on unchanged
    keep: Tensor
    #: [B, r] long, tokens that join a destination
    src: Tensor
    #: [B, M] long, tokens that receive others (or none)
    dst: Tensor
    #: [B, r] long in 0 … M−1, the destination of each source
    slot: Tensor
    #: T, the number of input tokens
    tokens: int
    #: output order, see above
    distill: bool = False
    #: what several tensors are merged by: :meth:`representatives` and ``_source_rows``
    _made: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        keep, dst, rows = self.keep, self.dst, self.slot + self.keep.shape[1]
        if self.distill:
            first = torch.cat([keep[:, :1], dst[:, :1], keep[:, 1:], dst[:, 1:]], dim=1)
            made = first, rows.masked_fill(self.slot == 0, 1)
        else:
            made = torch.cat([keep, dst], dim=1), rows
        object.__setattr__(self, "_made", made)

    @property
    def kept(self) -> int:
        """T', the number of output rows."""
        return self.keep.shape[1] + self.dst.shape[1]

    def apply(self, x: Tensor, mode: MergeMode = "mean") -> Tensor:
        """Merge the rows of any tensor.

        Args:
            x: [B, T, C]; never changed.
            mode: ``sum``; ``mean`` = (destination + its sources) / (1 + their number); ``amax``;
                ``prune`` = sources are dropped, destinations stay as they are.

        Returns:
            [B, T', C] in the dtype of ``x``; sums are taken in float32 (or wider).

        Raises:
            ValueError: unknown mode, or ``x`` does not fit the plan.
        """
        check_choice("mode", mode, MergeMode)
        self._check(x, "x", self.tokens)
        base = _rows(x, self.representatives())
        if mode == "prune":
            return base
        extra = _rows(x, self.src)
        if mode == "amax":
            index = self._source_rows[..., None].expand_as(extra)
            return base.scatter_reduce(1, index, extra, "amax", include_self=True)
        total = self._add(base.to(_wide(x)), extra.to(_wide(x)))
        if mode == "mean":
            total = total / self.counts()[..., None]
        return total.to(x.dtype)

    def weighted(self, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Average merged rows by the number of original tokens that each one stands for.

        Args:
            x: [B, T, C].
            size: [B, T, 1] sizes before the merge; None means all ones.

        Returns:
            x' [B, T', C] in the dtype of ``x`` and size' [B, T', 1] in float32 (or wider).

        Raises:
            ValueError: ``x`` or ``size`` does not fit the plan.

        Source: Bolya et al. 2023, arXiv 2210.09461, section 3 (tracking token sizes).
        """
        if size is None:
            return self.apply(x, "mean"), self.counts()[..., None].float()
        self._check(x, "x", self.tokens)
        self._check(size, "size", self.tokens)
        if size.shape[-1] != 1:
            raise ValueError(f"size has shape {tuple(size.shape)}; it must be [B, T, 1]")
        size = size.to(_wide(size))
        own, joined = _rows(size, self.representatives()), _rows(size, self.src)
        base = _rows(x, self.representatives()).to(_wide(x)) * own
        extra = _rows(x, self.src).to(_wide(x)) * joined
        total = self._add(own.clone(), joined)
        return (self._add(base, extra) / total).to(x.dtype), total

    def unmerge(self, y: Tensor) -> Tensor:
        """Give every input token the output row that holds it.

        Args:
            y: [B, T', C].

        Returns:
            [B, T, C]; rows of dropped tokens are zero.

        Raises:
            ValueError: ``y`` does not fit the plan.
        """
        self._check(y, "y", self.kept)
        group = self.group()
        if self.kept + self.src.shape[1] == self.tokens:
            return _rows(y, group)
        return _rows(y, group.clamp_min(0)).masked_fill(group[..., None] < 0, 0)

    def group(self) -> Tensor:
        """[B, T] long: the output row that holds each input token, −1 for dropped tokens."""
        rows = torch.arange(self.kept, device=self.dst.device).expand(self.dst.shape[0], -1)
        group = self.dst.new_full((self.dst.shape[0], self.tokens), -1)
        group = group.scatter(1, self.representatives(), rows)
        return group.scatter(1, self.src, self._source_rows)

    def representatives(self) -> Tensor:
        """[B, T'] long: the input token that stands for each output row.

        A kept row's own index, a merged row's destination: the place of the row in the image.
        """
        return self._made[0]

    def counts(self) -> Tensor:
        """[B, T'] long: the number of input tokens in each output row."""
        ones = torch.ones_like(self.representatives())
        return ones.scatter_add(1, self._source_rows, torch.ones_like(self.slot))

    @property
    def _source_rows(self) -> Tensor:
        """[B, r]: the output row that each source joins."""
        return self._made[1]

    def _add(self, base: Tensor, extra: Tensor) -> Tensor:
        """Add each source's row to its output row, in place: ``base`` is the caller's own copy."""
        index = _flat(self._source_rows, self.kept)
        base.view(-1, base.shape[-1]).index_add_(0, index, extra.flatten(0, 1))
        return base

    def _check(self, x: Tensor, name: str, rows: int) -> None:
        batch = self.dst.shape[0]
        if x.ndim != 3 or x.shape[0] != batch or x.shape[1] != rows:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; this plan needs [{batch}, {rows}, C]"
            )


def proportional_bias(size: Tensor) -> Tensor:
    """Additive attention bias that makes a key of size s count as s equal keys.

    Args:
        size: [B, T, 1] or [B, T], positive.

    Returns:
        [B, 1, 1, T] float32, log size: a mask for ``scaled_dot_product_attention``.

    Raises:
        ValueError: ``size`` has another shape.

    Source: Bolya et al. 2023, arXiv 2210.09461, Eq. 1.
    """
    if size.ndim == 3 and size.shape[-1] == 1:
        size = size.squeeze(-1)
    if size.ndim != 2:
        raise ValueError(f"size has shape {tuple(size.shape)}; it must be [B, T, 1] or [B, T]")
    return size.float().log()[:, None, None, :]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _flat(index: Tensor, rows: int) -> Tensor:
    """[B, n] indices into B blocks of ``rows`` rows, as [B·n] indices into all of them."""
    start = torch.arange(index.shape[0], device=index.device) * rows
    return (index + start[:, None]).flatten()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows [B, n, C] of ``x`` [B, T, C] at ``index`` [B, n], always a new tensor."""
    taken = x.flatten(0, 1).index_select(0, _flat(index, x.shape[1]))
    return taken.view(*index.shape, x.shape[-1])
