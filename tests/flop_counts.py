"""MACs that a model really runs, by PyTorch's own counter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _bmm(a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of batched products [n, rows, sum] × [n, sum, columns]; none of outer products, which
    rotary tables are made of."""
    return 0 if a[2] == 1 else 2 * a[0] * a[1] * a[2] * b[2]


@dataclass(frozen=True)
class Counted:
    """MACs of all matrix products that ran, and those of the head among them."""

    total: int
    head: int

    @property
    def rest(self) -> int:
        return self.total - self.head


def counts(run: Any) -> Counted:
    """Run and count; rotary tables left out, attention as the "eager" backend spells it out (what
    "sdpa" runs on a CPU the counter does not know)."""
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: _bmm})
    with counter, torch.no_grad():
        run()
    by_module = counter.get_flop_counts()
    head = sum(sum(n.values()) for name, n in by_module.items() if name.endswith(".lm_head"))
    return Counted(counter.get_total_flops() // 2, head // 2)


def counted(run: Any) -> int:
    """MACs of all matrix products that ran."""
    return counts(run).total
