"""A look for every arm: colour, marker and line together, so that none depends on colour alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How an arm is drawn. ``filled``: methods are, controls are hollow and grey."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]
    filled: bool


#: after Okabe & Ito and P. Tol, darkened to at least 3 : 1 against white; neighbours differ in
#: lightness as well as in hue
COLOURS = (
    "#0072b2", "#c44e00", "#008a65", "#b5578f", "#2e9ad0", "#332288", "#a67c00", "#882255",
    "#117733", "#5a5a00", "#aa4499", "#7a1f00", "#3d8f8a", "#5566bb", "#cc3311", "#111111",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", ">", "*", "d", "8", "H", "o")
_LINES = ("-", "-", "-", "-", "-", "-", "-", "-", "--", "--", "--", "--", "--", "--", "--", "-.")
#: controls are always drawn alike, whichever were run
CONTROLS = {
    "random": Look("#555555", "x", ":", False),
    "grid": Look("#555555", "+", "--", False),
    "pool": Look("#555555", "s", "-.", False),
    "downsample": Look("#555555", "D", (0, (1, 1)), False),
    "frames": Look("#555555", "v", (0, (4, 1, 1, 1)), False),
}
UNPRUNED = "#111111"


def looks(arms: Iterable[str], controls: Iterable[str]) -> dict[str, Look]:
    """A look per arm; methods get theirs in the order of their names.

    Up to 16 methods differ in both colour and marker; beyond, combinations go on being distinct.
    """
    grey = set(controls)
    found: dict[str, Look] = {}
    number = spare = 0
    for arm in sorted(arms):
        if arm in grey:
            if arm in CONTROLS:
                found[arm] = CONTROLS[arm]
            else:
                found[arm] = Look("#777777", ("1", "2", "3", "4", "|", "_")[spare % 6], ":", False)
                spare += 1
            continue
        turn, n = divmod(number, len(COLOURS))
        found[arm] = Look(COLOURS[n], MARKERS[(n + 5 * turn) % len(MARKERS)], _LINES[n], True)
        number += 1
    return found
