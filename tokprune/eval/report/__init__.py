"""Reports on finished (or running) sweeps: statistics, plots, tables, gallery.

The package needs the extra ``tokprune[sweep]``; importing it checks that.
"""

# ruff: noqa: E402
from __future__ import annotations

from tokprune.eval.extra import check_extra

check_extra("reports")

from tokprune.eval.report.analysis import Analysis, Result, analyse
from tokprune.eval.report.build import Report, build_report
from tokprune.eval.report.data import RunData, RunFolderError, load_run
from tokprune.eval.report.frontier import frontier
from tokprune.eval.report.statistics import Flips, flips, holm, mcnemar, wilson

__all__ = [
    "Analysis", "Flips", "Report", "Result", "RunData", "RunFolderError", "analyse",
    "build_report", "flips", "frontier", "holm", "load_run", "mcnemar", "wilson",
]  # fmt: skip
