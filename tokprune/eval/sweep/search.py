"""Turn one whole-numbered knob until a rising measurement hits a target, in few measurements."""

from __future__ import annotations

from collections.abc import Callable

#: differences up to this are no reason to go on
CLOSE = 0.5


def nearest(
    measure: Callable[[int], float],
    possible: Callable[[int], bool],
    low: int,
    high: int,
    target: float,
) -> tuple[int, float] | None:
    """The setting in [low, high] whose measurement comes nearest to ``target``.

    Starts at the target itself (most methods keep what they are told), then interpolates and
    bisects between settings that are known to lie below and above.

    Args:
        measure: does not fall when the setting rises; called at most once a setting.
        possible: whether there is such a setting (cheap).
        low, high: range of settings.
        target: wanted measurement.

    Returns:
        (setting, measurement), within ``CLOSE`` of the target or the nearest there is; None where
        no setting is possible.
    """
    least = next((k for k in range(low, high + 1) if possible(k)), None)
    if least is None:
        return None
    most = next(k for k in range(high, least - 1, -1) if possible(k))
    seen: dict[int, float] = {}

    def at(k: int) -> float:
        if k not in seen:
            seen[k] = measure(k)
        return seen[k]

    def best() -> tuple[int, float]:
        return min(seen.items(), key=lambda pair: (abs(pair[1] - target), pair[0]))

    guess = _towards(possible, min(max(round(target), least), most), least, most)
    assert guess is not None
    if abs(at(guess) - target) <= CLOSE:
        return best()
    # one more measurement shows whether the target lies within reach at all
    end = least if at(guess) > target else most
    below, above = (end, guess) if end == least else (guess, end)
    if abs(at(end) - target) <= CLOSE or (at(end) > target) == (at(guess) > target):
        return best()
    turn = 0
    while above - below > 1:
        rise = at(above) - at(below)
        part = (target - at(below)) / rise if rise > 0 and turn % 2 == 0 else 0.5
        turn += 1
        middle = min(max(below + round(part * (above - below)), below + 1), above - 1)
        k = _towards(possible, middle, below + 1, above - 1)
        if k is None:
            break
        if abs(at(k) - target) <= CLOSE:
            break
        below, above = (below, k) if at(k) > target else (k, above)
    return best()


def _towards(possible: Callable[[int], bool], start: int, low: int, high: int) -> int | None:
    """The possible setting in [low, high] nearest to ``start``."""
    for step in range(high - low + 1):
        for k in (start - step, start + step):
            if low <= k <= high and possible(k):
                return k
    return None
