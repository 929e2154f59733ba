"""A look for every variant: colour, marker and line together, none by colour alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Look:
    """How a variant is drawn."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]
    #: methods are, controls are hollow and grey
    filled: bool


#: after Okabe & Ito and P. Tol, darkened to at least 3 : 1 against white; neighbours differ in
#: lightness as well as in hue
COLOURS = (
    "#0072b2", "#c44e00", "#008a65", "#b5578f", "#2e9ad0", "#332288", "#a67c00", "#882255",
    "#117733", "#5a5a00", "#aa4499", "#7a1f00", "#3d8f8a", "#5566bb", "#cc3311", "#111111",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", ">", "*", "d", "8", "H", "o")
_LINES = ("-", "-", "-", "-", "-", "-", "-", "-", "--", "--", "--", "--", "--", "--", "--", "-.")
#: controls that show the model less
_REDUCED = {
    "downsample": Look("#555555", "D", (0, (1, 1)), False),
    "frames": Look("#555555", "v", (0, (4, 1, 1, 1)), False),
}
#: other controls, in the order of their names
_CONTROLS = (("+", "--"), ("s", "-."), ("x", ":"), ("1", ":"), ("2", "--"), ("3", "-."))
UNPRUNED = "#111111"


def looks(variants: Iterable[str], controls: Iterable[str]) -> dict[str, Look]:
    """A look per variant; methods get theirs in the order of their names.

    Up to 16 methods differ in both colour and marker; beyond, combinations go on being distinct.
    """
    found: dict[str, Look] = {}
    grey = set(controls)
    for number, variant in enumerate(sorted(grey - set(_REDUCED))):
        marker, line = _CONTROLS[number % len(_CONTROLS)]
        found[variant] = Look("#555555", marker, line, False)
    for number, variant in enumerate(sorted(set(variants) - grey)):
        turn, n = divmod(number, len(COLOURS))
        found[variant] = Look(COLOURS[n], MARKERS[(n + 5 * turn) % len(MARKERS)], _LINES[n], True)
    return found | {name: look for name, look in _REDUCED.items() if name in grey}
