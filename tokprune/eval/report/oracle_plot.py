"""How many questions need how many tokens: a bar per variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokprune.eval.report.analysis import Analysis
from tokprune.eval.report.oracle_variants import VariantOracle
from tokprune.eval.report.palette import UNPRUNED
from tokprune.eval.report.plots import Plot, figure_of, legend_style, svg_text

#: a share gets its number from here on: less has no room for it
_LABELLED = {False: 0.045, True: 0.09}


def oracle_plot(analysis: Analysis, found: Sequence[VariantOracle]) -> Plot | None:
    """Stacked bars: share of the questions by the smallest budget that answers them correctly, and
    a tick at the accuracy of the best fixed budget. None without oracles."""
    if not found:
        return None
    full = analysis.unpruned.point.budget
    colours = _colours(analysis.budgets)

    def draw(narrow: bool) -> str:
        handles = _handles(colours)
        across = 2 if narrow else 1
        legend = 0.22 * -(-len(handles) // across)
        row, bar = (0.52, 0.26) if narrow else (0.36, 0.26)
        left = 0.14 if narrow else 0.2 + 0.085 * max(len(o.name) for o in found)
        width = 4.3 if narrow else 9.0
        right = 0.16 if narrow else 2.05
        below = 0.62 + (legend + 0.1 if narrow else 0.0)
        height = row * len(found) + below + 0.1
        if not narrow:
            height = max(height, legend + 0.3)
        figure = figure_of(width, height)
        area = figure.add_axes(
            (left / width, below / height, (width - left - right) / width,
             (height - below - 0.1) / height)
        )  # fmt: skip
        for n, oracle in enumerate(found):
            _bar(area, n, oracle, full, colours, bar / row, narrow)
        area.set_ylim(len(found) - (0.5 if not narrow else 0.45), -0.5 - (0.25 if narrow else 0))
        area.set_xlim(0, 100)
        area.set_xlabel("share of the questions, %")
        area.tick_params(axis="y", length=0)
        area.spines["left"].set_visible(False)
        if narrow:
            area.set_yticks([])
            figure.legend(handles=handles, loc="lower center", ncols=2, **legend_style())
        else:
            area.set_yticks(range(len(found)), [o.name for o in found])
            place = (width - right + 0.1) / width
            figure.legend(
                handles=handles, loc="upper left", bbox_to_anchor=(place, 1.0), **legend_style()
            )
        return svg_text(figure, f"oracle-{'narrow' if narrow else 'wide'}")

    return Plot(
        "oracle",
        draw(False),
        draw(True),
        "Share of the questions by the smallest budget that still answers them correctly, one bar "
        f"for each of {', '.join(o.name for o in found)}; every oracle's accuracy is in the table.",
    )


def _colours(budgets: Sequence[float]) -> dict[float, Any]:
    """One hue, dark for few tokens: lightness alone tells the order."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    shades = LinearSegmentedColormap.from_list("few", ["#08306b", "#3b7fb8", "#cfe1f0"])
    last = max(1, len(budgets) - 1)
    return {b: to_hex(shades(n / last)) for n, b in enumerate(sorted(budgets))}


_PLAIN: dict[str, Any] = {"facecolor": "#f4c98b", "edgecolor": "white", "linewidth": 0.8}
_NEVER: dict[str, Any] = {
    "facecolor": "white",
    "edgecolor": "#999999",
    "linewidth": 0.6,
    "hatch": "////",
}


def _bar(
    area: Any, at: int, oracle: VariantOracle, full: float, colours: dict[float, Any], size: float,
    narrow: bool,
) -> None:  # fmt: skip
    start = 0.0
    for budget, share in oracle.shares:
        look = _PLAIN if budget == full else {**_PLAIN, "facecolor": colours[budget]}
        area.barh(at, 100 * share, size, left=100 * start, **look)
        # neither in too little room nor under the tick
        if share >= _LABELLED[narrow] and abs(start + share / 2 - oracle.best.accuracy) > 0.02:
            area.text(100 * (start + share / 2), at, f"{100 * share:.0f}", ha="center",
                      va="center", fontsize=9, color=_ink(look["facecolor"]))  # fmt: skip
        start += share
    if oracle.never > 0:
        area.barh(at, 100 * oracle.never, size, left=100 * start, **_NEVER)
    area.plot([100 * oracle.best.accuracy] * 2, [at - 0.62 * size, at + 0.62 * size],
              color=UNPRUNED, lw=2, solid_capstyle="butt", zorder=4, clip_on=False)  # fmt: skip
    if narrow:
        area.text(0, at - 0.55 * size, oracle.name, ha="left", va="bottom", fontsize=9.5)


def _ink(colour: Any) -> str:
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(colour)
    return "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.56 else "#111111"


def _handles(colours: dict[float, Any]) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=colour, label=f"{budget:g} tokens") for budget, colour in colours.items()
    ]
    return [
        *handles,
        Patch(facecolor=_PLAIN["facecolor"], label="unpruned only"),
        Patch(**_NEVER, label="never correct"),
        Line2D([], [], color=UNPRUNED, lw=2, label="best fixed budget"),
    ]
