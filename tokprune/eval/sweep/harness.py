"""Who puts the questions to the model: the sweep itself, or lmms-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from tokprune.eval.benchmarks.base import Benchmark, Item
from tokprune.eval.sweep.loaded_model import Subject
from tokprune.eval.sweep.settings import Settings
from tokprune.eval.sweep.trials import Cell, CellMaker
from tokprune.plugins import plugins

if TYPE_CHECKING:
    from tokprune.eval.sweep.runner import Sweep


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
    if settings.harness == "own":
        from tokprune.eval.sweep.builtin import OwnHarness

        return OwnHarness.open(settings)
    found = {name: harness for name, harness, _ in plugins("harnesses")}
    if settings.harness not in found:
        raise ValueError(
            f"harness={settings.harness!r} should be one of {', '.join(['own', *found])}"
        )
    harness: Harness = found[settings.harness].open(settings)
    return harness
