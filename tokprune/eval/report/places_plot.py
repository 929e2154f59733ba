"""Where kept tokens stand, as a heat map: variants by bands of the image, and of the video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokprune.eval.report.analysis import Result
from tokprune.eval.report.legible import short
from tokprune.eval.report.plots import Plot, figure_of, svg_text

#: blocks of bands, and the words for their ends
_BLOCKS = {"rows": ("top", "bottom"), "columns": ("left", "right"), "frames": ("first", "last")}
#: the colours end where a band has this many times its even share, or the inverse
_MOST = 3.0


def placed(results: Sequence[Result]) -> list[Result]:
    """Those of which the places of kept tokens are known."""
    return [r for r in results if r.point.places]


def places_plot(results: Sequence[Result]) -> Plot | None:
    """Each variant's tokens per band, against an even spread; None where nothing is known."""
    known = placed(results)
    if not known:
        return None
    blocks = [name for name in _BLOCKS if any(name in r.point.places for r in known)]
    values = {
        name: np.array([_against_even(r.point.places.get(name, ())) for r in known])
        for name in blocks
    }

    def draw(narrow: bool) -> str:
        names = [short(r.point.variant) for r in known]
        left = 0.2 + 0.085 * max(map(len, names))
        down = len(blocks) if narrow else 1
        across = 1 if narrow else len(blocks)
        width = 4.3 if narrow else 9.0
        each = 0.3 * len(known) + 0.55
        figure = figure_of(width, each * down + 0.1)
        size = figure.get_size_inches()
        span = (width - left - 0.1) / across
        for n, name in enumerate(blocks):
            row, column = (n, 0) if narrow else (0, n)
            area = figure.add_axes((
                (left + column * span) / size[0], 1 - ((row + 1) * each - 0.05) / size[1],
                (span - 0.12) / size[0], 0.3 * len(known) / size[1],
            ))  # fmt: skip
            _heat(area, values[name], names if narrow or not n else [""] * len(names), name)
        return svg_text(figure, f"places-{'narrow' if narrow else 'wide'}")

    return Plot(
        "places",
        draw(False),
        draw(True),
        f"Kept tokens of {len(known)} variants by {', '.join(blocks)} of the image, against an "
        "even spread.",
    )


def _against_even(counts: Sequence[int]) -> list[float]:
    """Tokens of each band ÷ the mean over the bands; NaN where there are none."""
    total = sum(counts)
    return [len(counts) * n / total if total else np.nan for n in counts] or [np.nan] * 8


def _heat(area: Any, table: Any, names: Sequence[str], block: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    # two hues that differ in lightness to either side: blue is less, orange more than even
    colours = ["#1f5a94", "#9cc3e4", "#ffffff", "#f6bd8b", "#c2570c"]
    shades = LinearSegmentedColormap.from_list("spread", colours)
    area.set_facecolor("#eeeeee")
    shown = np.ma.masked_invalid(np.clip(table, 1 / _MOST, _MOST))
    edges = np.arange(table.shape[1] + 1) - 0.5, np.arange(table.shape[0] + 1) - 0.5
    norm = LogNorm(1 / _MOST, _MOST)
    area.pcolormesh(*edges, shown, cmap=shades, norm=norm, edgecolors="white", linewidth=1.2)
    area.set_ylim(table.shape[0] - 0.5, -0.5)
    for (r, c), value in np.ndenumerate(table):
        if not np.isnan(value):
            dark = not 0.5 < value < 2
            area.text(c, r, f"{value:.1f}", ha="center", va="center", fontsize=8,
                      color="white" if dark else "#111111")  # fmt: skip
    first, last = _BLOCKS[block]
    area.set_xticks([0, table.shape[1] - 1], [first, last])
    area.set_yticks(range(len(names)), names)
    area.xaxis.tick_top()
    area.tick_params(length=0, pad=3)
    for side in area.spines.values():
        side.set_visible(False)
