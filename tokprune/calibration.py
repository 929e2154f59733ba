"""Match a method to a number of visual tokens: turn its knob until the measured mean is nearest."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from tokprune.api import compress, is_patched
from tokprune.engine.model import ModelFacts
from tokprune.errors import UnsupportedModelError
from tokprune.families import bind
from tokprune.methods.base import Knob, Method
from tokprune.methods.options import check_choice, check_range
from tokprune.methods.registry import available_methods, make_method

Count = Literal["mean", "last", "leaving"]

#: differences up to this many tokens are no reason to go on
CLOSE = 0.5


def calibrate(
    model: nn.Module,
    method: str | Method,
    batches: Sequence[Mapping[str, Any]],
    target: float,
    *,
    turn: str | None = None,
    count: Count = "mean",
    tolerance: float = 0.01,
    steps: int = 24,
    **options: Any,
) -> Method:
    """The setting of a method that leaves a wanted mean number of visual tokens per image.

    Every step of the search runs one prefill per batch, without decoding. Where the steps of the
    knob are coarse, the nearest setting is returned.

    Args:
        model: a supported model, not patched.
        method: a method name with ``options``, or a method object. ``keep`` need not be given where
            it is what is turned.
        batches: model inputs (``model(**batch)``) with images or videos.
        target: mean number wanted, of all tiles of an image together.
        turn: one of the method's ``knobs``; None: the first, which is "keep" for most.
        count: which number of :class:`MeanTokens` is meant.
        tolerance: accepted relative difference.
        steps: most bisection steps of a knob that is no whole number of tokens.

    Returns:
        A new method object.

    Raises:
        ValueError: the model is patched, a batch list without images, an unknown knob, or a target
            that no setting comes near to (names what the nearest comes to).
        UnsupportedModelError: the method does not run on the model.

    Example::

        fastv = tokprune.calibrate(model, "fastv", [inputs], target=128)
        with tokprune.compress(model, fastv):
            ...
    """
    check_range(target, "target", 0, math.inf, low_open=True)
    check_choice(count, "count", get_args(Count))
    if isinstance(batches, Mapping) or not (batches := list(batches)):
        raise ValueError(
            "batches should hold at least one batch with images: a list of model inputs"
        )
    made, turn = _made(method, turn, options)
    knob = made.knob(turn)
    if is_patched(model):
        raise ValueError("calibrate: the model is patched; unpatch it first")
    seen: dict[float, float] = {}

    def measured(value: float) -> float:
        seen[value] = getattr(mean_tokens(model, knob.at(value), batches), count)
        return seen[value]

    if knob.between is not None:
        value, _ = bisect(measured, *knob.between, target, tolerance=tolerance, steps=steps)
    else:
        value = _whole_tokens(model, knob, batches, measured, target, tolerance * target)
    least, highest = min(seen.values()), max(seen.values())
    if target < least * (1 - tolerance):
        raise ValueError(
            f"target={target} is below the floor of {least:.1f} tokens per image that "
            f"{made.name} comes to with any {turn}" + (f"; {knob.hint}" if knob.hint else "")
        )
    if target > highest * (1 + tolerance):
        raise ValueError(
            f"target={target} is above the {highest:.1f} tokens per image that {made.name} leaves "
            "at most; it should not be larger"
        )
    return knob.at(value)


def _made(method: str | Method, turn: str | None, options: dict[str, Any]) -> tuple[Method, str]:
    """The method to start with, and the knob; a budget stands in where it is what is sought."""
    named = available_methods().get(method.lower()) if isinstance(method, str) else None
    knobs = getattr(named or method, "knobs", Method.knobs)
    check_choice(turn, "turn", (None, *knobs))
    turn = turn or knobs[0]
    if named is not None and turn == "keep" and not named.budget_options & options.keys():
        options = {**options, "keep": 1}
    return make_method(method, **options), turn


def _whole_tokens(
    model: nn.Module,
    knob: Knob,
    batches: Sequence[Mapping[str, Any]],
    measure: Callable[[int], float],
    target: float,
    close: float,
) -> int:
    """The number of tokens, among those that the model can have, that comes nearest."""
    bound = bind(model)
    tokens = (bound.family.placeholders(bound.parts, batch) > 0 for batch in batches)
    most = max(int(visual.sum(1).max()) for visual in tokens)
    if not most:
        raise ValueError(_NO_IMAGE)
    refused: list[str] = []
    videos = any(bound.family.video_pixels in batch for batch in batches)
    possible = fitting(bound.facts, videos, knob.at, refused)
    found = nearest(measure, possible, 1, most, target, close)
    if found is None:
        raise ValueError(refused[0])
    return found[0]


def fitting(
    facts: ModelFacts, videos: bool, at: Callable[[int], Method], refused: list[str]
) -> Callable[[int], bool]:
    """Whether the setting ``at`` a number fits a model, and the grid of its videos' frames where
    ``videos`` are asked about; why one does not is added to ``refused``.

    Raises:
        UnsupportedModelError: (when asked) the method does not run on the model at all.
    """
    every = [facts]
    if videos and facts.tower is not None and facts.frame_grid is not None:
        frame = replace(facts.tower, grid=facts.frame_grid)
        every.append(replace(facts, tower=frame, frame_grid=None))

    def possible(number: int) -> bool:
        try:
            for own in every:
                at(number).on(own).plan(own)
        except UnsupportedModelError:
            raise
        except ValueError as error:
            refused.append(str(error))
            return False
        return True

    return possible


# -------------------------------------------------------------------------- measurement

_NO_IMAGE = "batches hold no image: pass pixel_values and image placeholder tokens"


@dataclass(frozen=True)
class MeanTokens:
    """Visual tokens that a method leaves of an image or a video, mean over all of them."""

    #: entering a decoder layer, mean over the layers
    mean: float
    #: entering the last layer, after the last pruning
    last: float
    #: leaving a layer, mean over the layers (the official counter of MustDrop)
    leaving: float


def mean_tokens(
    model: nn.Module, method: Method, batches: Sequence[Mapping[str, Any]]
) -> MeanTokens:
    """Measure a method: one prefill per batch, without decoding.

    Args:
        model: a supported model.
        method: a method object.
        batches: model inputs with images or videos.

    Raises:
        ValueError: no image in any of them.
    """
    mean = last = leaving = 0.0
    images = 0
    with compress(model, method) as trace, torch.no_grad():
        for batch in batches:
            seen = trace.prefills
            model(**without_steps(model, batch))
            prefill = trace.last
            if prefill is None or trace.prefills == seen:
                continue  # a batch of text
            counts = [sum(map(sum, layer.counts)) for layer in prefill.layers]
            mean += sum(counts) / len(counts)
            leaving += (sum(counts[1:]) + counts[-1]) / len(counts)
            last += counts[-1]
            images += sum(len(prefill.visuals(b)) for b in range(len(prefill.original_lengths)))
    if not images:
        raise ValueError(_NO_IMAGE)
    return MeanTokens(mean / images, last / images, leaving / images)


def without_steps(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Model inputs for a prefill after which nothing is decoded."""
    short: dict[str, Any] = {"use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        short["logits_to_keep"] = 1
    return {**batch, **short}


# ------------------------------------------------------------------------------- search


def bisect(
    measure: Callable[[float], float],
    low: float,
    high: float,
    target: float,
    *,
    tolerance: float = 0.01,
    steps: int = 24,
) -> tuple[float, float]:
    """The setting in [low, high] whose measurement comes nearest to ``target``; halves the range on
    a logarithmic scale.

    Args:
        measure: rises all the way, or falls; called once a setting.
        low, high: range of settings, above 0.
        target: wanted measurement.
        tolerance: accepted relative difference.
        steps: most measurements beside those of ``low`` and ``high``.

    Returns:
        (setting, measurement), within the tolerance or the nearest one found; ``low`` or ``high``
        where the target lies beyond them.
    """
    seen = {low: measure(low), high: measure(high)}

    def best() -> tuple[float, float]:
        return min(seen.items(), key=lambda pair: (abs(pair[1] - target), pair[0]))

    rises = seen[high] > seen[low]
    if (seen[low] > target) == (seen[high] > target):
        return best()
    for _ in range(steps):
        if abs(best()[1] - target) <= tolerance * target:
            break
        middle = math.sqrt(low * high)
        seen[middle] = measure(middle)
        low, high = (low, middle) if (seen[middle] > target) == rises else (middle, high)
    return best()


def nearest(
    measure: Callable[[int], float],
    possible: Callable[[int], bool],
    low: int,
    high: int,
    target: float,
    close: float = CLOSE,
) -> tuple[int, float] | None:
    """The whole-numbered setting in [low, high] whose measurement comes nearest to ``target``.

    Starts at the target itself (most methods keep what they are told), then interpolates and
    bisects between settings that are known to lie below and above.

    Args:
        measure: does not fall when the setting rises; called at most once a setting.
        possible: whether there is such a setting (cheap).
        low, high: range of settings.
        target: wanted measurement.
        close: accepted difference.

    Returns:
        (setting, measurement), within ``close`` of the target or the nearest there is; None where
        no setting is possible. Where the target is out of reach, all that was measured lies on one
        side of it.
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
    if abs(at(guess) - target) <= close:
        return best()
    # one more measurement shows whether the target lies within reach at all
    end = least if at(guess) > target else most
    below, above = (end, guess) if end == least else (guess, end)
    if abs(at(end) - target) <= close or (at(end) > target) == (at(guess) > target):
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
        if abs(at(k) - target) <= close:
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
