"""A layer run for single rows of its attention: no other queries are projected, and no values.

Nothing of the model is touched: a mode of this thread sees the projections as they are called, and
gives them fewer rows. A model whose projections go other ways (fused, quantised by kernels of their
own) runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tokprune.operators.rows import take_rows


class OnlyRows(TorchFunctionMode):
    """While it is on, an attention module's queries are right at ``rows`` [B, R] and 0 elsewhere,
    and its values are those of one token."""

    def __init__(self, attention: Any, rows: Tensor) -> None:
        super().__init__()
        self.attention, self.rows = attention, rows

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear or len(args) < 2 or type(args[0]) is not Tensor:
            return func(*args, **kwargs)
        x, weight, *rest = args
        if x.dim() == 3 and self._is("v_proj", weight):
            return func(x[:, :1], weight, *rest, **kwargs).expand(-1, x.shape[1], -1)
        if x.dim() == 3 and self._is("q_proj", weight):
            few = func(take_rows(x, self.rows), weight, *rest, **kwargs)
            place = self.rows[..., None].expand_as(few)
            return few.new_zeros(*x.shape[:2], few.shape[-1]).scatter_(1, place, few)
        return func(*args, **kwargs)

    def _is(self, name: str, weight: Any) -> bool:
        return getattr(getattr(self.attention, name, None), "weight", None) is weight
