"""The noise floor: the unpruned model against itself, before any method is judged."""

from __future__ import annotations

from tokprune.eval.sweep.trials import Cell, CellMaker

#: batch size of the repetition, and the one for sweeps that run at that size themselves
_BATCHES = (1, 8)


def noise_cells(maker: CellMaker, dtype: str, batch_size: int) -> list[Cell]:
    """``none`` at another batch size, and at another dtype."""
    other_batch = next(n for n in _BATCHES if n != batch_size)
    other_dtype = "bfloat16" if dtype == "float32" else "float32"
    return [
        maker.none(f"none.batch{other_batch}", noise=True, batch_size=other_batch),
        maker.none(f"none.{other_dtype}", noise=True, dtype=other_dtype),
    ]
