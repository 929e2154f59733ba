"""Plots as SVG text: a wide one for a desk, a narrow one for a phone."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from tokprune.eval.report.analysis import Analysis, Result
from tokprune.eval.report.legible import short
from tokprune.eval.report.palette import UNPRUNED, Look, looks

_GRID = "#e3e3e3"
_FRONTIER = "#c9d6e8"
_STYLE: dict[str, Any] = {
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "svg.fonttype": "none",  # text stays text: small files, readable by machines
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"],
    "font.size": 10.5,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
}


_TAG = re.compile(r"<[^>]*>")
#: characters of a variant's name that fit the title of a panel, and a line of the legend
_TITLE, _LEGEND = 19, 20


@dataclass(frozen=True)
class Axis:
    """A cost: what to plot, in which unit, and what to call it."""

    kind: str
    label: str
    scale: float
    title: str

    def about(self, media: str) -> Axis:
        """The same where questions are about an "image" or a "video"."""
        return replace(self, label=self.label.replace("per image", f"per {media}"))


AXES = (
    Axis("tokens", "visual tokens per image, mean over decoder layers", 1, "tokens"),
    Axis("flops", "FLOPs of one prefill, ×10⁹", 1e-9, "FLOPs"),
    Axis("latency", "measured time of one answer, ms", 1e3, "latency"),
)


@dataclass(frozen=True)
class Plot:
    """``name``: file name without suffix; ``wide``, ``narrow``: SVG elements; ``alt``: the plot
    in words."""

    name: str
    wide: str
    narrow: str
    alt: str
    caption: str = ""


def pareto(analysis: Analysis, axis: Axis) -> Plot | None:
    """Accuracy against a cost, every variant, the unpruned model and the frontier; None where fewer
    than two points have that cost."""
    series = _series(analysis, axis)
    if sum(map(len, series.values())) < 2:
        return None
    look = variant_looks(analysis)

    def draw(narrow: bool) -> str:
        handles = [
            variant_handle(variant, look[variant]) for variant in _ranked(series)
        ] + _extra_handles(analysis)
        if narrow:
            legend = 0.15 + 0.225 * math.ceil(len(handles) / 2)
            height = 4.1 + legend
            figure = figure_of(4.3, height)
            area = figure.add_axes((0.14, (legend + 0.55) / height, 0.84, 3.45 / height))
        else:
            figure = figure_of(9, 5.2)
            area = figure.add_axes((0.075, 0.115, 0.67, 0.865))
        _background(area, analysis, axis)
        for variant, results in series.items():
            _line(area, results, axis, look[variant])
        _scales(area, analysis, axis, series)
        _error_size(area, series)
        if narrow:
            area.set_xlabel(axis.label.replace(", mean", ",\nmean"))
            figure.legend(handles=handles, loc="lower center", ncols=2, **legend_style())
        else:
            figure.legend(
                handles=handles, loc="center left", bbox_to_anchor=(0.755, 0.54), **legend_style()
            )
        return svg_text(figure, f"{axis.kind}-{'narrow' if narrow else 'wide'}")

    best = max((r for rs in series.values() for r in rs), key=lambda r: _known(r.accuracy))
    return Plot(
        f"accuracy-vs-{axis.kind}",
        draw(False),
        draw(True),
        f"Macro accuracy against {axis.label}, {len(series)} variants; unpruned "
        f"{100 * analysis.unpruned.accuracy:.1f} %, highest {best.point.name} "
        f"{100 * best.accuracy:.1f} %.",
    )


def panels(analysis: Analysis) -> Plot | None:
    """Accuracy against tokens, one panel per variant before all others in grey, with its 95 %
    interval."""
    axis = AXES[0].about(analysis.data.media)
    series = _series(analysis, axis)
    if not series:
        return None
    look = variant_looks(analysis)

    def draw(narrow: bool) -> str:
        across = 2 if narrow else min(5, max(3, math.ceil(math.sqrt(1.5 * len(series)))))
        down = math.ceil(len(series) / across)
        figure = figure_of(4.3 if narrow else 9, (1.55 if narrow else 1.75) * down + 0.45)
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        size = figure.get_size_inches()
        figure.subplots_adjust(
            left=0.62 / size[0], right=1 - 0.08 / size[0], bottom=0.62 / size[1],
            top=1 - 0.28 / size[1], wspace=0.1, hspace=0.3,
        )  # fmt: skip
        used = list(zip(grid.flat, series))
        for area in grid.flat[len(series) :]:
            area.set_visible(False)
        for area, variant in used:
            for other, results in series.items():
                if other != variant:
                    area.plot(*_xy(results, axis), color="#d5d5d5", lw=0.9, zorder=1)
            area.axhline(100 * analysis.unpruned.accuracy, color=UNPRUNED, lw=0.8, zorder=2)
            x, _ = _xy(series[variant], axis)
            bounds = 100 * np.array([r.interval for r in series[variant]])
            area.fill_between(x, *bounds.T, color=look[variant].colour, alpha=0.18, lw=0)
            _line(area, series[variant], axis, look[variant], size=5)
            size_ = 10 * min(1, _TITLE / len(short(variant)))
            area.set_title(short(variant), fontsize=size_, loc="left", pad=3)
            _scales(area, analysis, axis, series, small=True, labels=False)
        for n, (area, _) in enumerate(used):
            if n + across >= len(used):  # the lowest panel of its column
                area.tick_params(labelbottom=True)
        figure.supxlabel("visual tokens, mean over layers", fontsize=10, y=0.08 / size[1])
        figure.supylabel("macro accuracy, %", fontsize=10, x=0.06 / size[0])
        return svg_text(figure, f"panels-{'narrow' if narrow else 'wide'}")

    return Plot(
        "accuracy-per-variant",
        draw(False),
        draw(True),
        "Accuracy against tokens, one panel for each of "
        f"{', '.join(series)}, with 95 % intervals and the other variants in grey.",
    )


def retention(analysis: Analysis, results: Sequence[Result]) -> Plot | None:
    """Heat map of accuracy ÷ unpruned accuracy: variants by tasks at one budget, best on top."""
    tasks = analysis.data.tasks
    if not results or not tasks:
        return None
    values = np.array([[r.tasks[t].retention for t in tasks] for r in results])

    def draw(narrow: bool) -> str:
        table = values.T if narrow else values
        names = [r.point.variant for r in results]
        rows, columns = (tasks, names) if narrow else (names, tasks)
        rows, columns = [short(row) for row in rows], [short(column) for column in columns]
        cell = (0.42, 0.34) if narrow else (0.78, 0.34)
        left = 0.2 + 0.085 * max(map(len, rows))
        top = 0.25 + 0.085 * max(map(len, columns)) * (1 if narrow else 0.6)
        width = max(4.3, left + cell[0] * len(columns) + 0.3) if narrow else max(
            6.0, left + cell[0] * len(columns) + 0.5
        )  # fmt: skip
        height = top + cell[1] * len(rows) + 0.15
        figure = figure_of(width, height)
        area = figure.add_axes(
            (left / width, 0.1 / height, cell[0] * len(columns) / width,
             cell[1] * len(rows) / height)
        )  # fmt: skip
        _heat(area, table, rows, columns, upright=narrow)
        return svg_text(figure, f"retention-{'narrow' if narrow else 'wide'}")

    return Plot(
        "retention",
        draw(False),
        draw(True),
        f"Retention of {len(results)} variants on {len(tasks)} tasks; every value is in the table "
        "of tasks.",
    )


# ------------------------------------------------------------------------------ parts


def _heat(
    area: Any, table: Any, rows: Sequence[str], columns: Sequence[str], upright: bool
) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    # light = kept, dark = lost; one hue, so lightness alone carries the value
    shades = LinearSegmentedColormap.from_list("kept", ["#08306b", "#4f8fc4", "#bdd7ec", "#f7fbff"])
    area.set_facecolor("#eeeeee")  # what has no value
    least = np.nanmin(table) if not np.isnan(table).all() else 0.0
    low = max(0.0, min(0.5, math.floor(10 * least) / 10))
    shown = np.ma.masked_invalid(np.clip(table, low, 1))
    edges = np.arange(table.shape[1] + 1) - 0.5, np.arange(table.shape[0] + 1) - 0.5
    area.pcolormesh(*edges, shown, cmap=shades, vmin=low, vmax=1, edgecolors="white", linewidth=1.5)
    area.set_ylim(table.shape[0] - 0.5, -0.5)
    for (r, c), value in np.ndenumerate(table):
        text = "–" if math.isnan(value) else f"{100 * value:.0f}"
        red, green, blue = shades((min(max(value, low), 1) - low) / (1 - low))[:3]
        dark = not math.isnan(value) and 0.3 * red + 0.59 * green + 0.11 * blue < 0.56
        area.text(c, r, text, ha="center", va="center", fontsize=9.5,
                  color="white" if dark else "#111111")  # fmt: skip
    turned: dict[str, Any] = {"rotation": 35, "ha": "left", "rotation_mode": "anchor"}
    if upright:
        turned = {"rotation": 90, "ha": "center"}
    area.set_xticks(range(len(columns)), columns, **turned)
    area.set_yticks(range(len(rows)), rows)
    area.xaxis.tick_top()
    area.tick_params(length=0, pad=3)
    for side in area.spines.values():
        side.set_visible(False)


def _series(analysis: Analysis, axis: Axis) -> dict[str, list[Result]]:
    """Points per variant that have this cost. A nominal budget is no cost in FLOPs or time."""
    found = {}
    for variant, results in analysis.series().items():
        known = [
            r for r in results
            if not math.isnan(r.cost(axis.kind)) and r.cost(axis.kind) > 0
            and not math.isnan(r.accuracy) and (axis.kind == "tokens" or not r.point.nominal)
        ]  # fmt: skip
        if known:
            found[variant] = known  # by budget, so that a noisy cost does not tie knots
    return found


def variant_looks(analysis: Analysis) -> Mapping[str, Look]:
    variants = analysis.series()
    return looks(
        variants, [variant for variant, results in variants.items() if results[0].point.control]
    )


def _xy(results: Sequence[Result], axis: Axis) -> tuple[list[float], list[float]]:
    return [r.cost(axis.kind) * axis.scale for r in results], [100 * r.accuracy for r in results]


def _line(area: Any, results: Sequence[Result], axis: Axis, look: Look, size: float = 6.5) -> None:
    inert = [r for r in results if not r.point.engaged]
    if inert:  # a cross, off the line: no result
        area.plot(*_xy(inert, axis), "x", color=look.colour, ms=size + 1, mew=1.4, zorder=3)
    x, y = _xy([r for r in results if r.point.engaged], axis)
    area.plot(
        x, y, color=look.colour, ls=look.line, lw=1.5 if look.filled else 1.2, marker=look.marker,
        ms=size, mfc=look.colour if look.filled else "white", mec="white" if look.filled else
        look.colour, mew=0.7 if look.filled else 1.3, zorder=4 if look.filled else 3,
    )  # fmt: skip


def _background(area: Any, analysis: Analysis, axis: Axis) -> None:
    """The unpruned model with its interval, the blind baseline, and the frontier."""
    base = analysis.unpruned
    area.axhspan(100 * base.interval[0], 100 * base.interval[1], color="#000000", alpha=0.06, lw=0)
    area.axhline(100 * base.accuracy, color=UNPRUNED, lw=1.1)
    for blind in analysis.blind[:1]:
        area.axhline(100 * blind.accuracy, color="#777777", lw=1.1, ls=(0, (6, 3)))
    on = sorted(
        (r for r in analysis.results if axis.kind in r.on and r.cost(axis.kind) > 0),
        key=lambda r: r.cost(axis.kind),
    )
    area.plot(*_xy(on, axis), color=_FRONTIER, lw=9, solid_capstyle="round",
              solid_joinstyle="round", zorder=1.5)  # fmt: skip


def _scales(
    area: Any, analysis: Analysis, axis: Axis, series: Mapping[str, list[Result]],
    small: bool = False, labels: bool = True,
) -> None:  # fmt: skip
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    every = [r for results in series.values() for r in results]
    xs = [r.cost(axis.kind) * axis.scale for r in every]
    base = analysis.unpruned.cost(axis.kind) * axis.scale
    if not math.isnan(base):
        xs.append(base)
    low, high = min(xs), max(xs)
    area.set_xscale("log")
    area.set_xlim(low / (high / low) ** 0.04 / 1.02, high * (high / low) ** 0.04 * 1.02)
    wanted = analysis.budgets if axis.kind == "tokens" else None
    area.set_xticks(axis_ticks(low, high, 3 if small else 6, wanted))
    area.xaxis.set_minor_locator(NullLocator())
    area.xaxis.set_minor_formatter(NullFormatter())
    area.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:.3g}" if v < 1000 else f"{v:.0f}")
    )
    bottom = min([r.interval[0] for r in every] + [b.accuracy for b in analysis.blind])
    top = max([r.interval[1] for r in every] + [analysis.unpruned.interval[1]])
    margin = 0.04 * max(top - bottom, 0.05)
    # a little beyond 0 and 100, so that markers there are not cut
    area.set_ylim(100 * max(-0.02, bottom - margin), 100 * min(1.02, max(top, 0.05) + margin))
    area.grid(True, color=_GRID, lw=0.7)
    area.set_axisbelow(True)
    if labels:
        area.set_xlabel(axis.label)
        area.set_ylabel("macro accuracy, %")
    area.tick_params(labelsize=8.5 if small else 10, length=3)


def axis_ticks(low: float, high: float, most: int, wanted: Sequence[float] | None) -> list[float]:
    """Round numbers on a log axis: the budgets where they fit, else 1, 2, 5 × 10ⁿ."""
    if wanted:
        ticks = [b for b in wanted if low * 0.98 <= b <= high * 1.02]
        if not any(math.isclose(t, high, rel_tol=0.05) for t in ticks):
            ticks.append(round(high))
        while len(ticks) > most:
            gaps = [math.log(b / a) for a, b in pairwise(ticks)]
            del ticks[min(range(1, len(ticks) - 1), key=lambda n: gaps[n - 1] + gaps[n])]
        return ticks
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [s * 10**d for d in decades for s in steps]
        ticks = [t for t in ticks if low * 0.97 <= t <= high * 1.03]
        if len(ticks) <= most:
            break
    return ticks if len(ticks) > 1 else [low, high] if high > low else [low]


def _error_size(area: Any, series: Mapping[str, list[Result]]) -> None:
    """One bar that shows how wide intervals are, instead of a bar on every point."""
    widths = [r.interval[1] - r.interval[0] for rs in series.values() for r in rs]
    half = 50 * float(np.median(widths))
    low, high = area.get_ylim()
    if not 0 < 2 * half < 0.4 * (high - low):
        return
    # curves rise to the right, so the lower right corner is free
    at, place = low + half + 0.03 * (high - low), area.get_yaxis_transform()
    area.errorbar([0.975], [at], yerr=[half], transform=place, color="#444444", lw=1.2, capsize=3)
    area.text(0.95, at, "typical\n95 % interval", transform=place, fontsize=8.5, va="center",
              ha="right", color="#444444")  # fmt: skip


def _ranked(series: Mapping[str, list[Result]]) -> list[str]:
    """Variants as the legend lists them: methods, then controls, each by how far they are above the
    mean of all variants at their budgets."""
    at: dict[float, list[float]] = {}
    for results in series.values():
        for r in results:
            at.setdefault(r.point.budget, []).append(r.accuracy)
    lead = {
        variant: np.mean([r.accuracy - np.mean(at[r.point.budget]) for r in results])
        for variant, results in series.items()
    }
    return sorted(
        series, key=lambda variant: (series[variant][0].point.control, -lead[variant], variant)
    )


def variant_handle(variant: str, look: Look) -> Any:
    from matplotlib.lines import Line2D

    name = short(variant)
    label = name if len(name) <= _LEGEND else name.replace("+", "\n+", 1)
    if label.startswith("_"):  # which would keep it out of the legend
        label = f"\u200b{label}"
    return Line2D(
        [], [], color=look.colour, ls=look.line, lw=1.5, marker=look.marker, ms=6.5, label=label,
        mfc=look.colour if look.filled else "white",
        mec="white" if look.filled else look.colour, mew=0.7 if look.filled else 1.3,
    )  # fmt: skip


def _extra_handles(analysis: Analysis) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=UNPRUNED, lw=1.1, label="unpruned")]
    if not all(r.point.engaged for r in analysis.results):
        handles.append(
            Line2D([], [], color="#777777", ls="", marker="x", ms=7, mew=1.4, label="no result")
        )
    if analysis.blind:
        handles.append(
            Line2D([], [], color="#777777", lw=1.1, ls=(0, (6, 3)), label="blind (no image)")
        )
    handles.append(Line2D([], [], color=_FRONTIER, lw=7, label="frontier"))
    return handles


def legend_style() -> dict[str, Any]:
    return {
        "frameon": False, "fontsize": 10, "handlelength": 2.8, "labelspacing": 0.45,
        "columnspacing": 1.2, "borderaxespad": 0.3,
    }  # fmt: skip


def figure_of(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def svg_text(figure: Any, salt: str) -> str:
    """The figure as an SVG element that scales with its container. ``salt`` keeps the ids of
    several plots on one page apart, and the same from run to run."""
    target = io.StringIO()
    figure.savefig(target, format="svg", metadata={"Date": None}, transparent=True)
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1, flags=re.S)
    widest = round(100 * figure.get_size_inches()[0])
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="width:100%;max-width:{widest}px"', text,
        count=1, flags=re.S,
    )  # fmt: skip
    tags = "".join(_TAG.findall(text))
    names = sorted(set(re.findall(r'\bid="([^"]+)"', tags)), key=len, reverse=True)
    return _renamed(text, {name: f"{salt}-{n}" for n, name in enumerate(names)})


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """With other ids, in tags alone: a text may look like one."""

    def tag(found: re.Match[str]) -> str:
        own = re.sub(r'\bid="([^"]+)"', lambda m: f'id="{names[m[1]]}"', found[0])
        own = re.sub(r"url\(#([^)]+)\)", lambda m: f"url(#{names[m[1]]})", own)
        return re.sub(r'href="#([^"]+)"', lambda m: f'href="#{names[m[1]]}"', own)

    return _TAG.sub(tag, text)


def styled(draw: Callable[..., Plot | None], *arguments: Any) -> Plot | None:
    """``draw(*arguments)`` with the look of the report; matplotlib's settings stay as they were."""
    import matplotlib

    style: Any = {**_STYLE, "svg.hashsalt": "tokprune"}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # only its width is guessed then: the text itself is in the file
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        return draw(*arguments)


def _known(value: float) -> float:
    return -math.inf if math.isnan(value) else value
