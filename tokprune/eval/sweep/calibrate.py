"""Match a method to a budget: find the ``keep`` whose measured tokens come nearest to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokprune.api import compress
from tokprune.errors import UnsupportedModelError, UnsupportedVideoError
from tokprune.eval.sweep.budgets import Budget, tolerance
from tokprune.eval.sweep.loaded_model import Subject
from tokprune.eval.sweep.reduced_input import Smaller, downsample_factor
from tokprune.eval.sweep.search import nearest
from tokprune.eval.sweep.variants import Arm
from tokprune.methods import Method

#: steps of the pixels that a smaller picture keeps, and the share of a budget that it may miss
_SIZES, _MISS = 512, 0.1

#: steps of a share per patch of a tile, where images differ in their number of tokens
_STEPS = 4


@dataclass(frozen=True)
class Measured:
    """Visual tokens per image, or per video, mean over them: after the last pruning, and over the
    layers."""

    last: float
    mean: float

    def to_dict(self) -> dict[str, float]:
        return {"tokens_last": round(self.last, 3), "tokens_mean": round(self.mean, 3)}


@dataclass(frozen=True)
class Matched:
    """A method at a budget. ``reason``: why the budget cannot be reached (None: it is);
    ``method``, ``measured``: the nearest there is, None where the method cannot run at all."""

    method: Method | None
    measured: Measured | None
    reason: str | None = None


@dataclass(frozen=True)
class Shrunk:
    """Pictures or videos at a budget: what makes them ``smaller``, visual tokens ``measured``, and
    why they are not those of the budget (None: they are); ``reached``: whether the control stands
    for the budget all the same."""

    smaller: Smaller
    measured: Measured
    reason: str | None = None
    reached: bool = True


class Calibrator:
    """Runs prefills over a few items and remembers what it measured.

    Args:
        subject: the model, not patched.
        inputs: a batch of prompts with one picture or one video each.
        match: "mean" or "last".
        shrunk: mean visual tokens of the same pictures or videos made smaller.
    """

    def __init__(
        self, subject: Subject, inputs: Any, match: str, shrunk: Callable[[Smaller], float]
    ) -> None:
        self.subject, self.inputs, self.match, self.shrunk = subject, inputs, match, shrunk
        visual = subject.parts.visual(inputs["input_ids"]).sum(1)
        #: mean visual tokens of the unpruned images
        self.visual_tokens = float(visual.float().mean())
        frames = inputs.get("pixel_values_videos")
        #: frames of every video, None for pictures
        self.frames = None if frames is None else int(frames.shape[1])
        facts = subject.facts
        self._tiled = facts.tiled and frames is None
        #: a setting has to fit the model, and the grid of what is asked about
        self._fit = [facts]
        if frames is not None and facts.frame_grid is not None:
            self._fit.append(replace(facts, grid=facts.frame_grid, frame_grid=None))
        #: the most that one of them can have
        self.most = facts.max_visual_tokens if frames is None else int(visual.max())
        self._equal = bool((visual == visual[0]).all()) and not self._tiled
        self._known: dict[str, Measured] = {}

    def measure(self, method: Method) -> Measured:
        """Tokens that a method leaves on the calibration items (one prefill, remembered)."""
        name = repr(method)
        if name not in self._known:
            with compress(self.subject.model, method) as trace, torch.inference_mode():
                self.subject.model(**self.inputs, use_cache=False, logits_to_keep=1)
            assert trace.last is not None
            totals = [sum(map(sum, layer.counts)) for layer in trace.last.layers]
            rows = len(trace.last.original_lengths)
            self._known[name] = Measured(totals[-1] / rows, sum(totals) / len(totals) / rows)
        return self._known[name]

    def match_budget(self, arm: Arm, budget: Budget, seed: int = 0) -> Matched:
        """The setting of an arm whose tokens come nearest to a budget."""
        target = budget.tokens(self.visual_tokens)
        keep_of: Callable[[int], int | float]
        if budget.share is not None and not self._equal:
            # a share of each image's own tokens; whole patches of a tile are among the steps
            knobs = _STEPS * self.subject.facts.patches
            scale, keep_of = self.visual_tokens / knobs, lambda k: k / knobs
        else:
            scale, knobs, keep_of = 1.0, self.most, lambda k: k
        refused: list[str] = []

        def method_at(knob: int) -> Method:
            return arm.at(keep_of(knob), self.subject.facts.decoder_layers, seed)

        def possible(knob: int) -> bool:
            try:
                for facts in self._fit:
                    method_at(knob).plan(facts)
            except UnsupportedModelError:
                raise
            except ValueError as error:
                refused.append(str(error))
                return False
            return True

        def measured(knob: int) -> float:
            return self._value(self.measure(method_at(knob))) / scale

        try:
            found = nearest(measured, possible, 1, knobs, target / scale)
        except (UnsupportedModelError, UnsupportedVideoError) as error:
            return Matched(None, None, str(error))
        if found is None:
            return Matched(None, None, refused[0] if refused else "no setting fits the model")
        method = method_at(found[0])
        seen = self.measure(method)
        value = self._value(seen)
        if abs(value - target) <= tolerance(target) + 1e-9:
            return Matched(method, seen)
        return Matched(method, seen, self._reason(keep_of(found[0]), value, target))

    def match_smaller(self, control: str, budget: Budget) -> Shrunk:
        """The setting of the control ``downsample`` or ``frames`` for a budget."""
        return self._match_frames(budget) if control == "frames" else self._match_pictures(budget)

    def _match_frames(self, budget: Budget) -> Shrunk:
        """The number of frames whose tokens come nearest to a budget; at least one."""
        assert self.frames is not None
        target = budget.tokens(self.visual_tokens)
        number = max(1, min(self.frames, round(self.frames * target / self.visual_tokens)))
        smaller = Smaller(frames=number)
        tokens = self.shrunk(smaller)
        reason = None
        if abs(tokens - target) > tolerance(target):
            reason = (
                f"whole frames come to {tokens:.4g} tokens (frames={number}), not to the "
                f"{target:.4g} asked for"
            )
        return Shrunk(smaller, Measured(tokens, tokens), reason, reason is None)

    def _match_pictures(self, budget: Budget) -> Shrunk:
        """The largest pictures whose own tokens stay within a budget.

        Where no smaller picture has about that many tokens (a tower of fixed resolution, tiles that
        come in few sizes), pixels are matched instead: the factor is √(N / budget).
        """
        target = budget.tokens(self.visual_tokens)
        nominal = downsample_factor(self.visual_tokens, target)
        if not self._tiled:
            return Shrunk(Smaller(nominal), Measured(self.visual_tokens, self.visual_tokens))

        def sized(size: int) -> Smaller:
            return Smaller(math.sqrt(_SIZES / size))

        low, high = 0, _SIZES  # the largest size that fits: not found yet, and all there is
        while high > low:
            middle = (low + high + 1) // 2
            fits = self.shrunk(sized(middle)) <= target + tolerance(target)
            low, high = (middle, high) if fits else (low, middle - 1)
        tokens = self.shrunk(sized(low)) if low else math.inf
        if tokens >= (1 - _MISS) * target and low:
            return Shrunk(sized(low), Measured(tokens, tokens))
        seen = self.shrunk(Smaller(nominal))
        near = f"the nearest have {tokens:.4g}" if low else "all have more"
        return Shrunk(
            Smaller(nominal), Measured(seen, seen),
            f"no smaller pictures have about {target:.4g} tokens ({near}): pixels are matched, and "
            f"{seen:.4g} tokens are left",
        )  # fmt: skip

    def _value(self, seen: Measured) -> float:
        return seen.mean if self.match == "mean" else seen.last

    def _reason(self, keep: int | float, value: float, target: float) -> str:
        what = (
            "visual tokens per decoder layer on average"
            if self.match == "mean"
            else "visual tokens after its last pruning"
        )
        side = "above" if value > target else "below"
        return (
            f"the nearest it can do is {value:.4g} {what} (keep={keep:.4g}), {side} the "
            f"{target:.4g} asked for"
        )
