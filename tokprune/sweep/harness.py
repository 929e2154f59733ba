"""Who puts the questions to the model: the sweep itself, or lmms-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from evals.base import Benchmark, Item
from tokprune.sweep.cells import Cell, CellMaker
from tokprune.sweep.settings import Settings
from tokprune.sweep.subject import Subject

if TYPE_CHECKING:
    from tokprune.sweep.runner import Sweep


class Harness(Protocol):
    """A way to get the cells of a sweep answered.

    ``benchmark``, ``items``: what is asked; ``split``: name for run.json; ``runtime``: versions
    beside torch's and transformers' that can change an answer.
    """

    benchmark: Benchmark
    items: list[Item]
    split: str | None
    runtime: dict[str, str]

    def meet(self, subject: Subject, settings: Settings) -> dict[str, Any] | None:
        """Check the settings against the model. Returns the ``harness`` entry of run.json, None
        for the own harness.

        Raises:
            ValueError: they do not fit each other.
        """

    def noise_cells(self, maker: CellMaker, dtype: str, batch_size: int) -> list[Cell]:
        """Repetitions of the unpruned model that are possible here."""

    def answer(self, sweep: Sweep) -> None:
        """Answer what is open in all cells; rows go to ``sweep.add``.

        Raises:
            CellsFailedError: some cells could not be answered; all others have been.
        """

    def time_cells(self, sweep: Sweep) -> dict[str, Any] | None:
        """The object of latency.json, None where nothing is to be written."""


class CellsFailedError(RuntimeError):
    """Some cells of a sweep have no answers; says which, and why."""


def open_harness(settings: Settings) -> Harness:
    """The harness that the settings name, with its benchmark loaded.

    Raises:
        ValueError: unknown benchmark, task or split, no item, or lmms-eval is not installed.
        OSError: unreadable files.
    """
    if settings.harness == "lmms-eval":
        from tokprune.sweep.lmms import LmmsHarness

        return LmmsHarness.open(settings)
    from tokprune.sweep.own import OwnHarness

    return OwnHarness.open(settings)
