"""Our curves per task with published points on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokprune.eval.report.analysis import Analysis
from tokprune.eval.report.legible import short
from tokprune.eval.report.palette import COLOURS, MARKERS, UNPRUNED, Look
from tokprune.eval.report.plots import (
    Plot,
    axis_ticks,
    figure_of,
    legend_style,
    svg_text,
    variant_handle,
    variant_looks,
)


@dataclass(frozen=True)
class Mark:
    """A published point on the plot of a task: ``tokens`` as the mean over the decoder's layers, or
    as printed where a paper does not say what it counts; ``accuracy`` in [0, 1]."""

    task: str
    paper: str
    method: str
    tokens: float
    accuracy: float


def published_plot(analysis: Analysis, marks: Sequence[Mark]) -> Plot | None:
    """Accuracy against tokens, one panel a task that has published points: our variants as lines,
    the points of papers as hollow markers, one shape a paper, in the colour of their method. None
    without points."""
    tasks = [t for t in analysis.data.tasks if any(m.task == t for m in marks)]
    if not tasks:
        return None
    look = variant_looks(analysis)
    papers = sorted({mark.paper for mark in marks})
    shape = {paper: MARKERS[n % len(MARKERS)] for n, paper in enumerate(papers)}
    colour = _colours(marks, look)

    def draw(narrow: bool) -> str:
        handles = [variant_handle(variant, look[variant]) for variant in analysis.series()]
        handles += _published_handles(marks, shape, colour)
        across = 1 if narrow else min(3, len(tasks))
        down = math.ceil(len(tasks) / across)
        legend = 0.15 + 0.2 * math.ceil(len(handles) / (1 if narrow else 3))
        height = 2.5 * down + 0.35 + legend
        figure = figure_of(4.3 if narrow else 9, height)
        grid = figure.subplots(down, across, squeeze=False)
        width = figure.get_size_inches()[0]
        figure.subplots_adjust(
            left=0.62 / width, right=1 - 0.1 / width, bottom=(legend + 0.55) / height,
            top=1 - 0.28 / height, wspace=0.22, hspace=0.38,
        )  # fmt: skip
        for area in grid.flat[len(tasks) :]:
            area.set_visible(False)
        for area, task in zip(grid.flat, tasks):
            _panel(area, analysis, task, marks, shape, look, colour)
        figure.supxlabel("visual tokens, mean over layers", fontsize=10, y=(legend + 0.06) / height)
        figure.supylabel("accuracy, %", fontsize=10, x=0.06 / width)
        figure.legend(
            handles=handles, loc="lower center", ncols=1 if narrow else 3, **legend_style()
        )
        return svg_text(figure, f"published-{'narrow' if narrow else 'wide'}")

    return Plot(
        "published",
        draw(False),
        draw(True),
        f"Accuracy against tokens on {', '.join(tasks)}: our variants as lines, {len(marks)} "
        f"published points of {', '.join(papers)} as hollow markers; every value is in the table.",
    )


def _panel(
    area: Any, analysis: Analysis, task: str, marks: Sequence[Mark], shape: Mapping[str, str],
    look: Mapping[str, Look], colour: Mapping[str, str],
) -> None:  # fmt: skip
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    here = [mark for mark in marks if mark.task == task]
    base = analysis.unpruned
    xs = [mark.tokens for mark in here]
    if not math.isnan(base.tasks[task].accuracy):
        area.axhline(100 * base.tasks[task].accuracy, color=UNPRUNED, lw=1.0)
    for variant, results in analysis.series().items():
        known = [
            (r.cost("tokens"), 100 * r.tasks[task].accuracy) for r in results
            if r.cost("tokens") > 0 and not math.isnan(r.tasks[task].accuracy)
        ]  # fmt: skip
        style = look[variant]
        xs += [x for x, _ in known]
        if known:
            area.plot(*zip(*known), color=style.colour, ls=style.line, lw=1.2, marker=style.marker,
                      ms=4, zorder=3)  # fmt: skip
    for mark in here:
        area.plot(
            [mark.tokens], [100 * mark.accuracy], ls="", marker=shape[mark.paper], ms=7.5,
            mfc="white", mec=colour[mark.method], mew=1.5, zorder=5, clip_on=False,
        )  # fmt: skip
    area.set_title(short(task), fontsize=10, loc="left", pad=3)
    area.set_xscale("log")
    low, high = min(xs), max(xs)
    area.set_xlim(low / 1.15, high * 1.15)
    area.set_xticks(axis_ticks(low, high, 4, None))
    area.xaxis.set_minor_locator(NullLocator())
    area.xaxis.set_minor_formatter(NullFormatter())
    area.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    area.grid(True, color="#e3e3e3", lw=0.7)
    area.set_axisbelow(True)
    area.tick_params(labelsize=8.5, length=3)


def _colours(marks: Sequence[Mark], look: Mapping[str, Look]) -> dict[str, str]:
    """The colour of each published method: that of its first variant, or one that none has."""
    used = {style.colour for style in look.values()}
    spare = [colour for colour in COLOURS if colour not in used and colour != UNPRUNED] or COLOURS
    found = {"none": UNPRUNED}
    absent = 0
    for method in sorted({mark.method for mark in marks} - {"none"}):
        variants = [variant for variant in look if variant.partition("+")[0] == method]
        found[method] = look[variants[0]].colour if variants else spare[absent % len(spare)]
        absent += not variants
    return found


def _published_handles(
    marks: Sequence[Mark], shape: Mapping[str, str], colour: Mapping[str, str]
) -> list[Any]:
    from matplotlib.lines import Line2D

    found = dict.fromkeys((mark.paper, mark.method) for mark in marks)
    return [
        Line2D([], [], ls="", marker=shape[paper], ms=7.5, mfc="white", mec=colour[method],
               mew=1.5, label=f"{'unpruned' if method == 'none' else method}, published: {paper}")
        for paper, method in sorted(found)
    ]  # fmt: skip
