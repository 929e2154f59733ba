"""The oracle over budgets: for each question the fewest tokens that still answer it correctly.

The analysis is that of Matryoshka multimodal models (M3, arXiv 2405.17430) for nested scales, here
for the budgets of any method. The oracle has seen the answers, so it is a bound on what choosing a
budget per question could reach, not a method; :func:`chance` tells how much of it luck explains.

Everything takes plain arrays, so it can be used without a run folder.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choices:
    """What the oracle takes for each question.

    ``score`` [items]: the best score, NaN where no budget has an answer; ``column`` [items]: the
    budget taken, -1 where none has an answer; ``tokens`` [items]: its tokens; ``never`` [items]
    bool: answered, but correct (above 0) at no budget.
    """

    score: Floats
    column: NDArray[np.int64]
    tokens: Floats
    never: NDArray[np.bool_]


@dataclass(frozen=True)
class Oracle:
    """The oracle over some questions.

    ``n``: questions with an answer; ``accuracy``: mean of their best scores; ``tokens``: mean of
    the tokens taken; ``counts`` [budgets]: questions for which this is the smallest budget that
    answers correctly; ``never``: questions that no budget answers correctly. NaN where nothing is
    counted.
    """

    n: int
    accuracy: float
    tokens: float
    counts: tuple[int, ...]
    never: int


def choose(correct: ArrayLike, tokens: ArrayLike) -> Choices:
    """Take for each question the fewest tokens among the budgets that answer it correctly.

    Args:
        correct: [items, budgets] correct (1) or incorrect (0), or scores in 0…1: then the fewest
            tokens that reach the question's best score. NaN = no answer: it cannot be taken.
        tokens: [budgets], or [items, budgets] as measured for each question. Where two budgets
            cost the same, the first is taken.

    A question that no budget answers correctly is counted at the fewest tokens.

    Raises:
        ValueError: no matrix, no budget, a score outside 0…1, or tokens that do not fit, are
            negative or not finite where there is an answer.
    """
    score, cost = _checked(correct, tokens)
    answered = ~np.isnan(score)
    any_given = answered.any(1)
    best = np.where(answered, score, -1.0).max(1, initial=-1.0)
    # a score of 0 is the best of a question that is never correct: all of its budgets compete
    column = np.where(answered & (score == best[:, None]), cost, np.inf).argmin(1)
    return Choices(
        score=np.where(any_given, best, np.nan),
        column=np.where(any_given, column, -1),
        tokens=np.where(any_given, cost[np.arange(len(cost)), column], np.nan),
        never=any_given & (best == 0),
    )


def oracle(correct: ArrayLike, tokens: ArrayLike, exclude: bool = False) -> Oracle:
    """Accuracy and mean tokens of the oracle, and how many questions need which budget.

    Args:
        correct, tokens: as for :func:`choose`.
        exclude: leave questions that no budget answers correctly out of the mean of tokens, instead
            of counting them at the fewest tokens. (The paper does not say what its figures do;
            they are too low for counting them at all tokens.)

    Raises:
        ValueError: as for :func:`choose`.
    """
    taken = choose(correct, tokens)
    answered = taken.column >= 0
    counted = answered & ~taken.never if exclude else answered
    solved = taken.column[answered & ~taken.never]
    return Oracle(
        n=int(answered.sum()),
        accuracy=float(taken.score[answered].mean()) if answered.any() else float("nan"),
        tokens=float(taken.tokens[counted].mean()) if counted.any() else float("nan"),
        counts=tuple(np.bincount(solved, minlength=np.shape(correct)[1]).tolist()),
        never=int(taken.never.sum()),
    )


def chance(
    correct: ArrayLike, tokens: ArrayLike, strata: ArrayLike | None = None
) -> tuple[float, float]:
    """What the oracle would show if budgets were correct on questions drawn at random.

    Within each stratum the scores of each budget are handed out anew to the questions, at random
    and independently of the other budgets: every budget keeps its accuracy, but no question has a
    budget of its own. With the unpruned model's correct and incorrect answers as strata, every
    budget also keeps how many answers it loses and gains against that model. The oracle takes the
    best of several tries after seeing the answers, so it gains on the best fixed budget even then.

    Args:
        correct, tokens: as for :func:`choose`.
        strata: [items] labels; default: all questions are one stratum.

    Returns:
        Expected accuracy and expected mean tokens: exact, nothing is drawn. Where tokens are
        measured per question, the mean of each budget in the stratum is taken. Questions without
        any answer are left out; NaN where there are no others.

    Raises:
        ValueError: as for :func:`choose`, or ``strata`` is not [items].
    """
    score, cost = _checked(correct, tokens)
    labels = np.zeros(len(score)) if strata is None else np.asarray(strata)
    if labels.shape != (len(score),):
        raise ValueError(f"strata of shape {labels.shape} should be ({len(score)},): one per item")
    answered = ~np.isnan(score).all(1)
    total = np.zeros(2)
    for label in np.unique(labels[answered]):
        rows = answered & (labels == label)
        total += rows.sum() * np.array(_independent(score[rows], cost[rows]))
    accuracy, mean = total / answered.sum() if answered.any() else (np.nan, np.nan)
    return float(accuracy), float(mean)


def _independent(score: Floats, cost: Floats) -> tuple[float, float]:
    """Expected best score and its tokens if columns [items, budgets] are shuffled on their own."""
    answered = ~np.isnan(score)
    means = [float(c[g].mean()) if g.any() else np.inf for c, g in zip(cost.T, answered.T)]
    order = [int(j) for j in np.argsort(means, kind="stable") if answered[:, j].any()]
    values = np.unique(np.append(score[answered], 0.0))
    # [budgets, values]: chance of exactly this score, and of at most this, cheapest budget first
    exactly = np.array([[(score[answered[:, j], j] == v).mean() for v in values] for j in order])
    most = exactly.cumsum(1)
    accuracy = mean = 0.0
    for j, column in enumerate(order):
        # taken with score v: all cheaper ones are below v, no dearer one is above it
        cheaper, dearer = (most - exactly)[:j].prod(0), most[j + 1 :].prod(0)
        taken = exactly[j] * cheaper * dearer
        accuracy += float(taken @ values)
        mean += float(taken.sum()) * means[column]
    return accuracy, mean


def _checked(correct: ArrayLike, tokens: ArrayLike) -> tuple[Floats, Floats]:
    """Both as [items, budgets]."""
    score, cost = np.asarray(correct, float), np.asarray(tokens, float)
    if score.ndim != 2 or not score.shape[1]:
        raise ValueError(f"correct of shape {score.shape} should be [items, budgets], budgets ≥ 1")
    if ((score < 0) | (score > 1)).any():
        raise ValueError(
            f"correct goes from {np.nanmin(score):g} to {np.nanmax(score):g}; scores should be "
            "in 0…1"
        )
    if cost.shape not in (score.shape, score.shape[1:]):
        raise ValueError(
            f"tokens of shape {cost.shape} should be {score.shape[1:]}, one per budget, or "
            f"{score.shape}, one per item and budget"
        )
    cost = np.broadcast_to(cost, score.shape)
    bad = ~np.isnan(score) & ~(np.isfinite(cost) & (cost >= 0))
    if bad.any():
        item, budget = np.argwhere(bad)[0]
        raise ValueError(
            f"tokens of item {item} at budget {budget} are {cost[item, budget]}; they should be a "
            "finite number, 0 or more"
        )
    return score, cost
