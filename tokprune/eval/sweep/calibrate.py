"""Match a method to a budget: find the ``keep`` whose measured tokens come nearest to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tokprune.calibration import MeanTokens, calibrate, fitting, mean_tokens, nearest
from tokprune.errors import UnsupportedModelError, UnsupportedVideoError
from tokprune.eval.sweep.budgets import Budget, tolerance
from tokprune.eval.sweep.loaded_model import LoadedModel
from tokprune.eval.sweep.reduced_input import ReducedInput, downsample_factor
from tokprune.eval.sweep.variants import Turnable
from tokprune.methods import Method

if TYPE_CHECKING:
    from tokprune.eval.sweep.evaluator import Batch

#: steps of the pixels that a smaller image keeps, and the share of a budget that it may miss
_SIZES, _MISS = 512, 0.1

#: steps of a share per patch of a tile (where no stage works in the tower: per token of the largest
#: image), where images differ in their number of tokens
_STEPS = 4


@dataclass(frozen=True)
class Matched:
    """A method at a budget."""

    #: the nearest there is, and what it leaves; None where the method cannot run at all
    method: Method | None
    measured: MeanTokens | None
    #: why the budget cannot be reached; None: it is
    reason: str | None = None


@dataclass(frozen=True)
class Reduced:
    """Images or videos that are made smaller to meet a budget."""

    reduced_input: ReducedInput
    #: their visual tokens
    tokens: float
    #: why these are not those of the budget; None: they are
    reason: str | None = None
    #: whether the control stands for the budget all the same
    reached: bool = True


class Calibrator:
    """Runs prefills over a few items and remembers what it measured.

    Args:
        loaded: the model, not patched.
        batch: questions about images, or about one video each.
        match: "mean" or "last".
    """

    def __init__(self, loaded: LoadedModel, batch: Batch, match: str) -> None:
        self.loaded, self.inputs, self.match = loaded, batch.inputs, match
        self.tokens_at = batch.tokens_at
        whole = (loaded.family.placeholders(loaded.parts, self.inputs) > 0).sum(1)
        shown = torch.tensor(batch.shown, device=whole.device)
        #: mean visual tokens of an unpruned image
        self.visual_tokens = float(whole.sum()) / int(shown.sum())
        #: of the images of a question, in the mean
        visual = whole / shown
        video, facts = batch.benchmark.media == "video", loaded.facts
        #: frames of every video, None for images
        self.frames = len(batch.visuals[0]) if video else None
        most = int(visual.max())
        #: whether images of other sizes have other numbers of tokens
        self._varied = not video and (
            facts.tower.tiled if facts.tower is not None
            else bool((visual != facts.max_visual_tokens).any())
        )  # fmt: skip
        #: the most that one of them can have
        self.most = most if video or facts.tower is None else facts.max_visual_tokens
        self._equal = bool((visual == most).all()) and not self._varied
        self._measured: dict[str, MeanTokens] = {}

    def measure(self, method: Method) -> MeanTokens:
        """Tokens that a method leaves on the calibration items (one prefill, remembered)."""
        name = repr(method)
        if name not in self._measured:
            self._measured[name] = mean_tokens(self.loaded.model, method, [self.inputs])
        return self._measured[name]

    def match_budget(self, variant: Turnable, budget: Budget, seed: int = 0) -> Matched:
        """The setting of a variant whose tokens come nearest to a budget."""
        target = budget.tokens(self.visual_tokens)
        if variant.turn is not None:
            return self._turned(variant, target, seed)
        keep_of: Callable[[int], int | float]
        if budget.share is not None and not self._equal:
            # a share of each image's own tokens; whole patches of a tile are among the steps
            tower = self.loaded.facts.tower
            knobs = _STEPS * (self.most if tower is None else tower.patches)
            scale, keep_of = self.visual_tokens / knobs, lambda k: k / knobs
        else:
            scale, knobs, keep_of = 1.0, self.most, lambda k: k
        refused: list[str] = []

        def method_at(knob: int) -> Method:
            return variant.at(keep_of(knob), self.loaded.facts.decoder_layers, seed)

        def measured(knob: int) -> float:
            return self._value(self.measure(method_at(knob))) / scale

        try:
            possible = fitting(self.loaded.facts, self.frames is not None, method_at, refused)
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
        what = f"keep={keep_of(found[0]):.4g}"
        return Matched(method, seen, self._reason(what, value, target))

    def _turned(self, variant: Turnable, target: float, seed: int) -> Matched:
        """A variant that meets a budget by a knob of its own, on the mean over the items."""
        start = variant.to_turn(self.loaded.facts.decoder_layers, seed)
        try:
            method = calibrate(
                self.loaded.model, start, [self.inputs], target, turn=variant.turn,
                count="mean" if self.match == "mean" else "last",
            )  # fmt: skip
            seen = self.measure(method)
        except (UnsupportedModelError, UnsupportedVideoError, ValueError) as error:
            return Matched(None, None, str(error))
        value = self._value(seen)
        if abs(value - target) <= tolerance(target) + 1e-9:
            return Matched(method, seen)
        what = f"{variant.turn}={getattr(method, variant.turn or '', None)!r}"
        return Matched(method, seen, self._reason(what, value, target))

    def match_reduced_input(self, control: str, budget: Budget) -> Reduced:
        """The setting of the control ``downsample`` or ``frames`` for a budget."""
        return self._match_frames(budget) if control == "frames" else self._match_sizes(budget)

    def _match_frames(self, budget: Budget) -> Reduced:
        """The number of frames whose tokens come nearest to a budget; at least one."""
        assert self.frames is not None
        target = budget.tokens(self.visual_tokens)
        number = max(1, min(self.frames, round(self.frames * target / self.visual_tokens)))
        reduced = ReducedInput(frames=number)
        tokens = self.tokens_at(reduced)
        reason = None
        if abs(tokens - target) > tolerance(target):
            reason = (
                f"whole frames come to {tokens:.4g} tokens (frames={number}), not to the "
                f"{target:.4g} asked for"
            )
        return Reduced(reduced, tokens, reason, reason is None)

    def _match_sizes(self, budget: Budget) -> Reduced:
        """The largest images whose own tokens stay within a budget.

        Where no smaller image has about that many tokens (a tower of fixed resolution, tiles that
        come in few sizes), pixels are matched instead: the factor is √(N / budget).
        """
        target = budget.tokens(self.visual_tokens)
        nominal = downsample_factor(self.visual_tokens, target)
        if not self._varied:
            return Reduced(ReducedInput(nominal), self.visual_tokens)

        def sized(size: int) -> ReducedInput:
            return ReducedInput(math.sqrt(_SIZES / size))

        low, high = 0, _SIZES  # the largest size that fits: not found yet, and all there is
        while high > low:
            middle = (low + high + 1) // 2
            fits = self.tokens_at(sized(middle)) <= target + tolerance(target)
            low, high = (middle, high) if fits else (low, middle - 1)
        tokens = self.tokens_at(sized(low)) if low else math.inf
        if tokens >= (1 - _MISS) * target and low:
            return Reduced(sized(low), tokens)
        seen = self.tokens_at(ReducedInput(nominal))
        near = f"the nearest have {tokens:.4g}" if low else "all have more"
        return Reduced(
            ReducedInput(nominal), seen,
            f"no smaller images have about {target:.4g} tokens ({near}): pixels are matched, and "
            f"{seen:.4g} tokens are left",
        )  # fmt: skip

    def _value(self, seen: MeanTokens) -> float:
        return seen.mean if self.match == "mean" else seen.last

    def _reason(self, setting: str, value: float, target: float) -> str:
        what = (
            "visual tokens per decoder layer on average"
            if self.match == "mean"
            else "visual tokens after its last pruning"
        )
        side = "above" if value > target else "below"
        return (
            f"the nearest it can do is {value:.4g} {what} ({setting}), {side} the "
            f"{target:.4g} asked for"
        )
