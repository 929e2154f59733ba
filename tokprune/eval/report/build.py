"""From a run folder to a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune.eval.report.analysis import Analysis, analyse
from tokprune.eval.report.compare import Contest, Differences, contest, differences
from tokprune.eval.report.data import RunData, load_run
from tokprune.eval.report.document import Gallery, Section
from tokprune.eval.report.groups import (
    GroupTable,
    check_groups,
    group_tables,
    make_groups,
    read_groups,
    write_groups,
)
from tokprune.eval.report.oracle_variants import VariantOracle, oracles

if TYPE_CHECKING:
    from tokprune.eval.benchmarks.base import Benchmark


@dataclass
class Report:
    """The files, and the numbers behind them."""

    html: Path
    markdown: Path
    analysis: Analysis
    differences: Differences
    contest: Contest | None
    groups: list[GroupTable]
    oracles: list[VariantOracle]


def build_report(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    groups_from: str | Path | None = None,
    at: float | None = None,
    further: Sequence[Callable[[Analysis], Section | None]] = (),
    benchmark: Benchmark | None = None,
    draws: int = 4000,
    seed: int = 0,
) -> Report:
    """Write ``report.html``, ``report.md``, ``plots/*.svg`` and ``groups/*.json``.

    Args:
        folder: run folder of ``tokprune sweep``.
        out: where to; default ``report/`` inside the run folder.
        groups_from: take the groups A and B from the answers of another model: its group files,
            report or run folder.
        at: budget for pairwise comparisons, heat map and gallery: a count, or a fraction of the
            visual tokens; default 11 %.
        further: make sections of the page from the numbers of the run (None: no section), for
            example
            :func:`tokprune.eval.published.section.published_section`.
        benchmark: for the images of the gallery; default: by the name in run.json.
        draws, seed: of the bootstrap.

    Raises:
        RunFolderError: the run folder or the groups cannot be used; says why.
        ValueError: ``at`` is no positive number, or what a further section raises.
        OSError: the report cannot be written.
        ImportError: an optional library is missing.
    """
    data = load_run(folder)
    analysis = analyse(data, at=at, draws=draws, seed=seed)
    groups_here = make_groups(analysis)
    groups, whose = groups_here, f"this run's model ({data.run['model']['name']})"
    if groups_from is not None:
        groups = read_groups(groups_from)
        check_groups(groups, analysis, groups_from)
        whose = f"another run's model ({groups[0].model.get('name')})"
        if groups[0].model.get("hash") == data.run["model"]["hash"]:
            whose = "another run of the same model"
    tables = group_tables(analysis, groups)
    found, against = differences(analysis), contest(analysis)
    best = oracles(analysis)
    gallery, notes = _gallery(analysis, data, benchmark)
    others = [section for make in further if (section := make(analysis)) is not None]

    from tokprune.eval.report.html import write_html
    from tokprune.eval.report.markdown import write_markdown
    from tokprune.eval.report.sections import document

    pages = document(analysis, found, against, tables, whose, gallery, notes, others, best)
    target = Path(out) if out is not None else Path(folder) / "report"
    target.mkdir(parents=True, exist_ok=True)
    write_groups(groups_here, target / "groups")
    markdown = write_markdown(pages, target)
    html = write_html(pages, target / "report.html")
    return Report(html, markdown, analysis, found, against, tables, best)


def _gallery(
    analysis: Analysis, data: RunData, benchmark: Benchmark | None
) -> tuple[Gallery | None, list[str]]:
    if not data.overlays:
        return None, ["the run holds no overlays, so there is no gallery"]
    name: Any = data.run["benchmark"]["name"]
    if benchmark is None:
        from tokprune.eval.benchmarks.load import FILE_OPTIONS, load_benchmark

        # a benchmark in a file is known by the path that the sweep was given
        settings = data.run["settings"]
        source: Any = settings.get("benchmark")
        options = {option: settings.get(option) for option in FILE_OPTIONS}
        try:
            benchmark = load_benchmark(
                source if isinstance(source, str) else name, lazy=True, **options
            )
        except (ValueError, OSError, ImportError) as error:
            return None, [f"benchmark {name!r} cannot be loaded, so there is no gallery ({error})"]
    asked = (data.run["settings"].get(name) for name in ("split", "tasks", "limit"))
    try:
        version = benchmark.version_of(benchmark.items(*asked))
    except (ValueError, OSError) as error:
        return None, [f"the items of benchmark {name!r} are not there any more ({error})"]
    if version != data.run["benchmark"]["version"]:
        return None, [
            f"benchmark {name!r} is version {version!r} by now, the run is of "
            f"{data.run['benchmark']['version']!r}: its images may differ, so there is no gallery"
        ]
    from tokprune.eval.report.gallery import make_gallery

    try:
        return make_gallery(analysis, benchmark)
    except (ValueError, OSError) as error:
        return None, [f"there is no gallery ({error})"]
