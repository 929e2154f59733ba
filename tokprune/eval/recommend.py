"""From a sweep to one setting: the cheapest that is accurate enough, or the best that is cheap
enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokprune import __version__

if TYPE_CHECKING:
    from tokprune.eval.report.analysis import Analysis, Result
    from tokprune.eval.report.data import RunData

Cost = Literal["flops", "latency", "tokens"]
COSTS: tuple[Cost, ...] = ("flops", "latency", "tokens")


@dataclass(frozen=True)
class Limits:
    """What a setting must keep to; None = no limit."""

    #: of macro accuracy against the unpruned model, in [0, 1]
    max_drop: float | None = None
    #: seconds, median of one answer
    max_latency: float | None = None
    #: visual tokens per image, mean over decoder layers; a float up to 1: of the unpruned ones
    max_tokens: float | None = None
    #: macro accuracy in [0, 1]
    min_accuracy: float | None = None
    #: limits on accuracy hold for the 95 % interval, not just for the estimate
    confident: bool = False


@dataclass
class Recommendation:
    """The best setting under limits."""

    #: the JSON object
    setting: dict[str, Any]
    #: what it does on the questions to report on
    result: Result
    #: what it did on those that it was chosen by
    chosen: Result
    #: what to know before using it
    warnings: list[str] = field(default_factory=list)


def recommend(
    folder: str | Path,
    *,
    max_drop: float | None = None,
    max_latency: float | None = None,
    max_tokens: float | None = None,
    min_accuracy: float | None = None,
    minimise: Cost | None = None,
    confident: bool = False,
    report_on: str | Path | None = None,
    same_questions: bool = False,
    draws: int = 4000,
    seed: int = 0,
) -> Recommendation:
    """The best setting of a run under limits.

    It is chosen by one half of the images (drawn at random, with their questions) and reported on
    the other: of many settings the best on some questions owes a part of its lead to these
    questions, so what it scores there is too much (the winner's curse).

    With a limit on accuracy (``max_drop``, ``min_accuracy``): the one of least cost. With limits
    on cost alone: the one of highest accuracy. Either way no other setting of the run is better in
    both, so it lies on the Pareto frontier. Points whose answers are not complete, or whose method
    cannot be seen to have acted (:mod:`tokprune.eval.sweep.gate`), do not compete; the controls
    ``none``, ``downsample``, ``frames`` and ``blind`` are no settings and are never recommended.

    Args:
        folder: run folder of ``tokprune sweep``.
        max_drop, max_latency, max_tokens, min_accuracy, confident: see :class:`Limits`.
        minimise: which cost counts: ``"flops"`` of the prefill (default), measured ``"latency"``
            or ``"tokens"``.
        report_on: run folder of the same model on other images, in place of halves: all of
            ``folder`` is chosen by.
        same_questions: choose and report on all questions, as if there were no such curse.
        draws, seed: of the bootstrap behind the intervals; the halves are of the same seed.

    Raises:
        ValueError: no limit at all, one out of range, a latency that was not measured, an
            unreadable run folder, or nothing meets the limits (says what comes nearest); too few
            images for halves; ``report_on`` of another model or of the same images, or without
            that setting.
        ImportError: an optional library is missing.
    """
    limits = Limits(max_drop, max_latency, max_tokens, min_accuracy, confident)
    _check(limits, minimise)
    if report_on is not None and same_questions:
        raise ValueError(f"report_on={str(report_on)!r} and same_questions exclude each other")
    from tokprune.eval.report import analyse, load_run

    data = load_run(folder)
    whole = analyse(data, draws=draws, seed=seed)
    if report_on is not None:
        other = _other(data, report_on)
        analysis, reported = whole, analyse(other, draws=draws, seed=seed)
    elif same_questions:
        analysis = reported = whole
    else:
        halves = _halves(data, seed)
        analysis, reported = (analyse(half, draws=draws, seed=seed) for half in halves)
    if isinstance(max_tokens, float) and max_tokens <= 1:
        limits = replace(limits, max_tokens=max_tokens * analysis.data.tokens)
    eligible = {r.point.trials for r in whole.results if _eligible(r, whole)}
    candidates = [r for r in analysis.results if r.point.trials in eligible]
    if not candidates:
        raise ValueError(
            f"{folder}: no method has all its answers, can be seen to have acted, and needs fewer "
            "FLOPs than the unpruned model; resume or extend the sweep"
        )
    by: Cost = minimise or "flops"
    if (max_latency is not None or by == "latency") and not any(
        _known(r.cost("latency")) for r in candidates
    ):
        raise ValueError(
            f"{folder}: latency was not measured, so it can be no limit; run the sweep with latency"
        )
    fitting = [r for r in candidates if not _excess(r, limits)]
    if not fitting:
        nearest = min(candidates, key=lambda r: (sum(_excess(r, limits).values()), -r.accuracy))
        over = " and ".join(_excess(nearest, limits))
        raise ValueError(
            f"{folder}: no setting meets the limits; the nearest misses {over}: "
            f"{_describe(nearest, confident)}"
        )
    if max_drop is not None or min_accuracy is not None:
        best = min(fitting, key=lambda r: (_cost(r, by), -r.accuracy, _cost(r, "flops")))
    else:
        best = min(fitting, key=lambda r: (-r.accuracy, _cost(r, by), _cost(r, "flops")))
    where = folder if report_on is None else report_on
    result = _same_setting(best, reported, str(where))
    setting = setting_from(result, reported, str(where))
    setting["evidence"]["chosen_on"] = {
        "run": str(folder), "questions": best.n, "accuracy": best.accuracy, "drop": best.drop,
        "same_questions": same_questions,
    }  # fmt: skip
    return Recommendation(setting, result, best, _warnings(result, whole, limits))


# ------------------------------------------------------------------------------ parts


def _halves(data: RunData, seed: int) -> tuple[RunData, RunData]:
    """The questions of a run about one half of the images, and about the other.

    Raises:
        ValueError: too few images.
    """
    from tokprune.eval.halves import share_of_images
    from tokprune.eval.report.data import part_of

    counted = [(i.image, i.task) for i in data.items if i.task in data.headline]
    try:
        aside = share_of_images(counted, 0.5, seed)
    except ValueError as error:
        raise ValueError(
            f"{data.folder}: {error}; report on a run of other images (report_on), or choose and "
            "report on the same questions (same_questions)"
        ) from None
    others = {item.image for item in data.items} - aside
    return part_of(data, others), part_of(data, aside)


def _other(data: RunData, folder: str | Path) -> RunData:
    """A run to report on.

    Raises:
        ValueError: of another model, or about the same images.
    """
    from tokprune.eval.report import load_run

    other = load_run(folder)
    if other.run["model"]["hash"] != data.run["model"]["hash"]:
        raise ValueError(
            f"report_on={str(folder)!r} is of model {other.run['model']['name']}, and "
            f"{data.folder} of {data.run['model']['name']}; both should be of the same weights"
        )
    shared = {item.image for item in other.items} & {item.image for item in data.items}
    if shared:
        raise ValueError(
            f"report_on={str(folder)!r} has {len(shared)} images in common with {data.folder}; it "
            "should be of another split"
        )
    return other


def _same_setting(best: Result, reported: Analysis, folder: str) -> Result:
    """A setting in another analysis.

    Raises:
        ValueError: it has no answers there, or none that are a result.
    """
    for r in reported.results:
        if (r.point.method, r.point.options) == (best.point.method, best.point.options):
            if not r.counts:
                break
            return r
    raise ValueError(
        f"{folder}: has no complete answers of {best.point.text}, which was chosen; sweep exactly "
        "this there (as_published=true among its options)"
    )


def _check(limits: Limits, minimise: str | None) -> None:
    values = {
        "max_drop": limits.max_drop,
        "max_latency": limits.max_latency,
        "max_tokens": limits.max_tokens,
        "min_accuracy": limits.min_accuracy,
    }
    if all(value is None for value in values.values()):
        raise ValueError(f"give at least one limit: {', '.join(values)}")
    tests: dict[str, tuple[Callable[[float], bool], str]] = {
        "max_drop": (lambda v: 0 <= v < 1, "in [0, 1), for example 0.02 for 2 points"),
        "max_latency": (lambda v: v > 0, "above 0 seconds"),
        "max_tokens": (lambda v: v > 0, "above 0 tokens"),
        "min_accuracy": (lambda v: 0 <= v <= 1, "in [0, 1], for example 0.8"),
    }
    for name, value in values.items():
        fits, right = tests[name]
        if value is not None and not (math.isfinite(value) and fits(value)):
            raise ValueError(f"{name}={value!r} should be {right}")
    if minimise is not None and minimise not in COSTS:
        raise ValueError(f"minimise={minimise!r} should be one of {', '.join(COSTS)}")


def _eligible(r: Result, analysis: Analysis) -> bool:
    return (
        r.point.method is not None  # a control that is no setting of a patched model
        and r.counts
        and not math.isnan(r.accuracy)
        and r.cost("flops") < analysis.unpruned.cost("flops")
    )


def _excess(r: Result, limits: Limits) -> dict[str, float]:
    """Limits that a result breaks, and by how much of the limit."""
    drop = r.drop_interval[1] if limits.confident else r.drop
    accuracy = r.interval[0] if limits.confident else r.accuracy
    pairs = {
        "max-drop": (drop, limits.max_drop, 0.01),
        "max-latency": (r.cost("latency"), limits.max_latency, limits.max_latency),
        "max-tokens": (r.cost("tokens"), limits.max_tokens, limits.max_tokens),
        "min-accuracy": (
            -accuracy, None if limits.min_accuracy is None else -limits.min_accuracy, 0.01,
        ),
    }  # fmt: skip
    broken = {}
    for name, (value, limit, unit) in pairs.items():
        # NaN (not measured) meets no limit; a rounding error breaks none
        if limit is not None and not value <= limit + 1e-12:
            broken[name] = (value - limit) / (unit or 1) if _known(value) else math.inf
    return broken


def _cost(r: Result, kind: Cost) -> float:
    value = r.cost(kind)
    return value if _known(value) else math.inf


def _known(value: float) -> bool:
    return not math.isnan(value)


def _describe(r: Result, confident: bool) -> str:
    from tokprune.eval.report.formatting import between, milliseconds, number, percent, signed

    text = (
        f"{r.point.name}, accuracy {percent(r.accuracy)} % (drop {signed(r.drop)} points"
        + (f", interval {between(r.drop_interval, sign=True)}" if confident else "")
        + f"), {number(r.cost('tokens'))} tokens"
    )
    return text + (
        f", {milliseconds(r.cost('latency'))} ms" if _known(r.cost("latency")) else ""
    )  # fmt: skip


def setting_from(r: Result, analysis: Analysis, folder: str) -> dict[str, Any]:
    """The JSON object of a setting, with what it did in the run of a folder."""
    run, point, base = analysis.data.run, r.point, analysis.unpruned
    from tokprune.methods.setting import SCHEMA

    return {
        # a run of the release before has that release's names of options
        "schema": min(SCHEMA, run["schema"]),
        "tokprune": __version__,
        "method": point.method,
        "options": dict(point.options),
        "repr": point.text,
        "model": {key: run["model"][key] for key in ("name", "class", "family", "hash")},
        "evidence": {
            "run": folder,
            "trial": point.trials[0],
            "control": point.control,
            "benchmark": {k: run["benchmark"][k] for k in ("name", "version", "split")},
            "questions": r.n,
            "accuracy": r.accuracy,
            "accuracy_interval": list(r.interval),
            "unpruned": base.accuracy,
            "drop": r.drop,
            "drop_interval": list(r.drop_interval),
            "loyalty": _or_none(r.loyalty),
            "tokens_mean": _or_none(point.measured["tokens_mean"]),
            "tokens_last": _or_none(point.measured["tokens_last"]),
            "macs": _or_none(point.measured["macs"]),
            "macs_unpruned": _or_none(base.point.measured["macs"]),
            "latency": _or_none(r.cost("latency")),
            "latency_unpruned": _or_none(base.cost("latency")),
            "dtype": point.dtype,
            "batch_size": point.batch_size,
        },
    }


def _or_none(value: float) -> float | None:
    return value if _known(value) else None


def _warnings(r: Result, analysis: Analysis, limits: Limits) -> list[str]:
    from tokprune.eval.report.formatting import between, percent, signed

    lines = []
    if r.point.control:
        lines.append(
            f"the best setting is the control {r.point.variant!r}: under these limits no method of "
            "this run beats it"
        )
    if limits.max_drop is not None and r.drop > limits.max_drop + 1e-12:
        lines.append(
            f"the drop is {signed(r.drop)} points on the questions that it was not chosen by, "
            f"above the limit of {percent(limits.max_drop)}"
        )
    elif limits.max_drop is not None and r.drop_interval[1] > limits.max_drop:
        lines.append(
            f"the drop of {signed(r.drop)} points is within the limit, but its 95 % interval "
            f"{between(r.drop_interval, sign=True)} is not; 'confident' asks for that"
        )
    if limits.min_accuracy is not None and r.accuracy < limits.min_accuracy - 1e-12:
        lines.append(
            f"the accuracy is {percent(r.accuracy)} % on the questions that it was not chosen by, "
            f"below the limit of {percent(limits.min_accuracy)} %"
        )
    elif limits.min_accuracy is not None and r.interval[0] < limits.min_accuracy:
        lines.append(
            f"the accuracy of {percent(r.accuracy)} % is within the limit, but its 95 % interval "
            f"{between(r.interval)} is not; 'confident' asks for that"
        )
    gap = analysis.noise_gap
    if limits.max_drop is not None and gap is not None and limits.max_drop < gap:
        lines.append(
            f"the limit is below the noise floor: another batch size or dtype alone changes the "
            f"unpruned model by {percent(gap, 2)} points"
        )
    if not analysis.data.run["finished"]:
        lines.append("the sweep has not finished: other settings may turn out better")
    return lines
