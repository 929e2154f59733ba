"""What the best settings do on questions that tuning never saw, beside the best published ones."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokprune.eval.recommend import setting_from
from tokprune.eval.report import analyse, load_run
from tokprune.eval.report.analysis import Analysis, Interval, Result, difference
from tokprune.eval.report.compare import ALPHA
from tokprune.eval.report.statistics import Flips, flips, holm
from tokprune.eval.sweep.trials import Trial
from tokprune.eval.sweep.variants import AS_PUBLISHED, Variant
from tokprune.eval.tune.settings import TuneSettings
from tokprune.methods.setting import as_tuples, save_setting, setting_of

if TYPE_CHECKING:
    from tokprune.eval.tune.study import Study

#: in the run folder
REPORT_FILE, RESULT_FILE, SETTINGS = "tune.md", "tune.json", "settings"


@dataclass(frozen=True)
class Finalist:
    """A setting with its accuracy on the questions to choose by."""

    entry: Mapping[str, Any]
    accuracy: float
    published: bool

    @property
    def spec(self) -> dict[str, Any]:
        """For a sweep: exactly this."""
        method = Trial.stored(dict(self.entry)).method
        assert method is not None
        setting = setting_of(method)
        options = {name: as_tuples(value) for name, value in setting["options"].items()}
        return {"name": setting["method"], AS_PUBLISHED: True, **options}

    @property
    def trial(self) -> str:
        """Its id in that sweep."""
        spec = self.spec
        return Variant(spec.pop("name"), False, spec).name


@dataclass(frozen=True)
class Finalists:
    """Of one budget: the best of all, and the best published ones; ``study``: what was tried."""

    best: Finalist
    rivals: tuple[Finalist, ...]
    study: Mapping[str, Any]

    @classmethod
    def of(cls, study: Study, rivals: int, text: Mapping[str, Any]) -> Finalists:
        every = [
            Finalist(t.user_attrs["entry"], float(t.value or 0.0), t.user_attrs["round"] < 0)
            for t in study.complete()
        ]
        return cls(every[0], tuple([f for f in every if f.published][:rivals]), text)

    def methods(self) -> list[dict[str, Any]]:
        return [one.spec for one in (self.best, *self.rivals)]


@dataclass(frozen=True)
class Contest:
    """The best setting of a budget against the published ones, on the questions held out.

    ``gap``: in macro accuracy on the strongest of the published ones *there*, with its 95 %
    interval and the flips; ``p``: McNemar's, the largest over all published finalists (it has to
    beat each), then adjusted for the number of budgets (Holm). None where the best setting is a
    published one itself.
    """

    finalists: Finalists
    tuned: Result
    rivals: tuple[Result, ...]
    gap: float | None = None
    interval: Interval | None = None
    flips: Flips | None = None
    p: float | None = None

    @property
    def rival(self) -> Result | None:
        """The published setting that is the strongest on the questions held out."""
        return max(self.rivals, key=lambda r: r.accuracy, default=None)

    @property
    def beats(self) -> bool:
        return (
            self.p is not None and self.p < ALPHA and self.interval is not None
            and self.interval[0] > 0
        )  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """The outcome of a call, which is written to ``folder`` as well."""

    folder: Path
    analysis: Analysis
    contests: tuple[Contest, ...]
    #: which questions were held out
    how: str
    settings: Mapping[str, Path]

    @property
    def verdict(self) -> str:
        """One sentence."""
        won = [c for c in self.contests if c.beats]
        n = len(self.contests)
        names = ", ".join(c.finalists.study["text"] for c in won or self.contests)
        where = "none" if not won else str(len(won))
        return (
            f"The tuned settings {'beat' if won else 'do not beat'} the best published setting "
            f"significantly: at {where} of {n} budget{'s' if n > 1 else ''} ({names}), on "
            "questions that tuning never saw."
        )


def report_on(held: Path, every: Sequence[Finalists], how: str, settings: TuneSettings) -> Tuned:
    """Read the run on the questions held out, compare, and write settings and report.

    Raises:
        ValueError, OSError: the run cannot be read, or the folder not be written.
    """
    from tokprune.eval.tune.show import markdown

    analysis = analyse(load_run(held), seed=settings.seed)
    contests = _adjusted([_contest(analysis, finalists) for finalists in every])
    folder = Path(settings.out)
    (folder / SETTINGS).mkdir(exist_ok=True)
    paths = {}
    for contest in contests:
        name = contest.finalists.study["target"]
        paths[name] = folder / SETTINGS / f"{name}.json"
        setting = setting_from(contest.tuned, analysis, str(held))
        best = contest.finalists.best
        setting["evidence"]["chosen_on"] = {
            "run": str(folder), "trial": best.entry["trial"], "accuracy": best.accuracy,
            "tried": contest.finalists.study["tried"],
        }  # fmt: skip
        save_setting(setting, paths[name])
    tuned = Tuned(folder, analysis, tuple(contests), how, paths)
    (folder / RESULT_FILE).write_text(json.dumps(to_dict(tuned), indent=1) + "\n", encoding="utf-8")
    (folder / REPORT_FILE).write_text(markdown(tuned), encoding="utf-8")
    return tuned


def _contest(analysis: Analysis, finalists: Finalists) -> Contest:
    by_trial = {result.point.trials[0]: result for result in analysis.results}
    tuned = by_trial[finalists.best.trial]
    rivals = tuple(by_trial[f.trial] for f in finalists.rivals if f.trial in by_trial)
    found = Contest(finalists, tuned, rivals)
    rival = found.rival
    if finalists.best.published or rival is None or not tuned.counts:
        return found
    counted = analysis.data.in_tasks(analysis.data.headline)
    against = {id(r): flips(r.point.first[counted], tuned.point.first[counted]) for r in rivals}
    gap, bounds = difference(analysis, tuned, rival)
    return Contest(
        finalists, tuned, rivals, gap, bounds, against[id(rival)],
        max(one.p for one in against.values()),
    )  # fmt: skip


def _adjusted(contests: Sequence[Contest]) -> list[Contest]:
    adjusted = holm([math.nan if c.p is None else c.p for c in contests])
    return [
        contest if contest.p is None else replace(contest, p=float(p))
        for contest, p in zip(contests, adjusted)
    ]


def to_dict(tuned: Tuned) -> dict[str, Any]:
    """The outcome in JSON types."""
    analysis = tuned.analysis

    def of(result: Result, chosen: float | None) -> dict[str, Any]:
        return {
            "trial": result.point.trials[0], "repr": result.point.text,
            "accuracy": result.accuracy, "interval": list(result.interval),
            "chosen_by": chosen, "tokens_mean": _known(result.point.measured["tokens_mean"]),
            "macs": _known(result.point.measured["macs"]),
            "latency": _known(result.point.seconds()),
            "result": result.counts,
        }  # fmt: skip

    return {
        "questions": len(analysis.data.items),
        "images": analysis.resampler.groups,
        "held_out": tuned.how,
        "unpruned": of(analysis.unpruned, None),
        "budgets": [
            {
                **c.finalists.study,
                "tuned": of(c.tuned, c.finalists.best.accuracy),
                "published": [
                    of(r, f.accuracy) for r, f in zip(c.rivals, c.finalists.rivals)
                ],
                "best_is_published": c.finalists.best.published,
                "gap": c.gap,
                "interval": None if c.interval is None else list(c.interval),
                "gained": None if c.flips is None else c.flips.gained,
                "lost": None if c.flips is None else c.flips.lost,
                "p": c.p,
                "beats": c.beats,
            }
            for c in tuned.contests
        ],
        "verdict": tuned.verdict,
    }  # fmt: skip


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
