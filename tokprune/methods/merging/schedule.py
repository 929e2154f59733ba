"""Schedules of merges: how many tokens go in which encoder layer. Host arithmetic only, so that
every tile of a batch keeps the same number and nothing is read back from the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from tokprune.operators.bipartite import removed_by_ratio

Matching = Literal["bsm", "protect", "energy_bsm"]


@dataclass(frozen=True)
class Step:
    """One merge inside or after an encoder layer."""

    #: encoder layer, 0-based
    layer: int
    matching: Matching = "bsm"
    #: of the energy matchings
    margin: float = 0.0
    #: tokens that go (0 also where that is not yet known)
    r: int = 0


Steps = tuple[Step, ...]


def merging_layers(last_layer: int, variant: str, odd: bool) -> range:
    """Encoder layers that a variant merges in: all up to ``last_layer``, or the odd ones of them.

    Raises:
        ValueError: there are none.
    """
    layers = range(1, last_layer + 1, 2) if odd else range(last_layer + 1)
    if not layers:
        raise ValueError(
            f"variant={variant!r} merges after odd layers only, and this model reads its features "
            f"after layer {last_layer}; use a variant that merges in every layer"
        )
    return layers


def removable(tokens: int, class_token: bool) -> int:
    """The most tokens that one merge of ``tokens`` can remove: half, the class token excluded."""
    return (tokens - class_token) // 2


def steps_removing(
    rules: Steps, tokens: int, class_token: bool, wanted: Callable[[Step, int], int]
) -> Steps:
    """Steps that each remove ``wanted(rule, tokens found)``, or as many as one merge can."""
    steps = []
    for rule in rules:
        r = min(wanted(rule, tokens), removable(tokens, class_token))
        steps.append(replace(rule, r=r))
        tokens -= r
    return tuple(steps)


def steps_by_ratio(rules: Steps, tokens: int, class_token: bool, ratio: float) -> Steps:
    """Steps that each keep a fraction ``ratio`` of the tokens they find: ``bsm`` of all of them,
    the energy matchings of those that are no class token, as published."""

    def wanted(rule: Step, found: int) -> int:
        return removed_by_ratio(found if rule.matching == "bsm" else found - class_token, ratio)

    return steps_removing(rules, tokens, class_token, wanted)


def steps_down_to(rules: Steps, tokens: int, class_token: bool, left: int) -> Steps:
    """Steps of the largest ratio (at least 0.5) that leaves no more than ``left`` tokens; the last
    of them trimmed, so that exactly ``left`` remain.

    Raises:
        ValueError: that many cannot be reached.
    """
    check_reachable(rules, tokens, class_token, left)

    def steps(ratio: float) -> Steps:
        return steps_by_ratio(rules, tokens, class_token, ratio)

    low, high = 0.5, 1.0
    while low < (middle := (low + high) / 2) < high:
        enough = rows_left(steps(middle), tokens) <= left
        low, high = (middle, high) if enough else (low, middle)
    return trim(steps(low), tokens, left)


def rows_left(steps: Steps, tokens: int) -> int:
    """Tokens, class token included, after the last step."""
    return tokens - sum(step.r for step in steps)


def trim(steps: Steps, tokens: int, left: int) -> Steps:
    """Let the last steps remove fewer tokens, so that exactly ``left`` remain."""
    spare, trimmed = left - rows_left(steps, tokens), []
    for step in reversed(steps):
        fewer = min(spare, step.r)
        trimmed.append(replace(step, r=step.r - fewer))
        spare -= fewer
    return tuple(reversed(trimmed))


def check_reachable(rules: Steps, tokens: int, class_token: bool, left: int) -> None:
    """Every layer can halve its tokens at best.

    Raises:
        ValueError: not even that gets down to ``left``; names the smallest budget that works.
    """
    smallest = tokens
    for _ in rules:
        smallest -= removable(smallest, class_token)
    if smallest > left:
        cls = int(class_token)
        raise ValueError(
            f"keep={left - cls} tokens of {tokens - cls} cannot be reached: {len(rules)} merging "
            f"layers, each of which halves the tokens at best, leave {smallest - cls}; keep should "
            f"be at least {smallest - cls}"
        )
