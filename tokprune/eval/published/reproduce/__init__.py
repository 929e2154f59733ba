"""Published figures beside ours: which rows of the ledger a run repeats, and how far it is off."""

from tokprune.eval.published.reproduce.comparison import Comparison, compare
from tokprune.eval.published.reproduce.execution import execute
from tokprune.eval.published.reproduce.figures import Ours, RunFigures, read_figures
from tokprune.eval.published.reproduce.selection import select, why_not

__all__ = ["Comparison", "Ours", "RunFigures", "compare", "execute", "read_figures", "select",
           "why_not"]  # fmt: skip
