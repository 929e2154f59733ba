"""What was tried at a budget and what came of it, kept by Optuna in a file.

A study proposes (by tree-structured Parzen estimators, and by changes to the best) and remembers;
races decide how far each proposal gets. Every proposal is drawn from a generator of its own, seeded
by its number, so a study that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from tokprune.eval.sweep.trials import Trial
from tokprune.eval.tune.candidate import Candidate, Part
from tokprune.eval.tune.race import Runner
from tokprune.eval.tune.space import STRUCTURE, Choice, Number, Space
from tokprune.eval.tune.target import Target

#: proposals that may come to nothing, for each that is tried
_MISSES = 10
#: how many of the best may have neighbours
_PARENTS = 5
#: choices of a setting that stands alone, and the share of what is new that is not as published
_ALONE, _VARIED = ("with_prompt", "with_decoder"), 0.4
#: the round of published settings
PUBLISHED = -1


class _NoLock:
    """The run folder is locked already, and a killed process leaves no lock of this kind."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None: ...


def open_storage(path: Path) -> JournalStorage:
    """The studies of a run folder; half a last line, which a killed process leaves, is cut off."""
    if path.exists():
        data = path.read_bytes()
        if not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
    lock: Any = _NoLock()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


@contextmanager
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            yield
        finally:
            optuna.logging.set_verbosity(before)


class Study:
    """The study of one target.

    Args:
        storage: of :func:`open_storage`.
        target: the budget.
        space: what is tried.
        trials: how many things, beside the published settings.
        population: tried together.
        seed: of the draws.
        identity: what has to be the same to go on.

    Raises:
        ValueError: the study of this target was begun otherwise; says in what.
    """

    def __init__(
        self, storage: JournalStorage, target: Target, space: Space, trials: int, population: int,
        seed: int, identity: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.target, self.space = target, space
        self.trials, self.population, self.seed = trials, population, seed
        with _quiet():
            self.study = optuna.create_study(
                storage=storage, study_name=target.name, direction="maximize", load_if_exists=True
            )
            before = self.study.user_attrs.get("identity")
            if before is None:
                self.study.set_user_attr("identity", dict(identity))
            if before is not None and before.get("code") != identity.get("code"):
                raise ValueError(
                    f"the study of {target.text} was begun with other code or libraries; choose "
                    "another --out, or start over with --fresh"
                )
            for name, value in (before or {}).items():
                if value != identity.get(name):
                    raise ValueError(
                        f"the study of {target.text} was begun with {name}={value!r}, and now it "
                        f"is {identity.get(name)!r}; use the same, choose another --out, or start "
                        "over with --fresh"
                    )
            for left in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if "entry" not in left.user_attrs:  # killed before it was decided what to try
                    self.study.tell(left.number, state=TrialState.FAIL)

    # ------------------------------------------------------------------ what there is

    def tried(self) -> list[FrozenTrial]:
        """Trials with a setting at the budget, published ones among them, in order."""
        every = self.study.get_trials(deepcopy=False)
        return [t for t in every if t.user_attrs.get("entry", {}).get("status") == "ok"
                and "same_as" not in t.user_attrs]  # fmt: skip

    def complete(self, before: int | None = None) -> list[FrozenTrial]:
        """Those that have answered everything, the best first; ``before``: of earlier rounds."""
        found = [
            trial for trial in self.tried()
            if trial.state is TrialState.COMPLETE
            and (before is None or trial.user_attrs["round"] < before)
        ]  # fmt: skip
        return sorted(found, key=lambda trial: (-(trial.value or 0.0), trial.number))

    def counts(self) -> dict[str, int]:
        """What became of all that was proposed."""
        every = self.study.get_trials(deepcopy=False)
        tried = self.tried()
        published = [t for t in tried if t.user_attrs["round"] == PUBLISHED]
        return {
            "published": len(published),
            "tried": len(tried) - len(published),
            "complete": sum(
                t.state is TrialState.COMPLETE and t.user_attrs["round"] != PUBLISHED for t in tried
            ),
            "no_result": sum("fault" in t.user_attrs for t in tried),
            "unreachable": sum(
                t.user_attrs.get("entry", {}).get("status") == "unreachable" for t in every
            ),
            "repeated": sum("same_as" in t.user_attrs for t in every),
        }

    # ------------------------------------------------------------------ published settings

    def add_published(self, trial: Trial, part: Part, runner: Runner) -> None:
        """Put down what became of a published setting, once."""
        if any(t.user_attrs["entry"]["trial"] == trial.id for t in self.tried()):
            return
        known = Known(Candidate((part,), None))
        self.space.walk(known, known.candidate)
        done = runner.out is None
        attrs: dict[str, Any] = {"entry": trial.entry, "round": PUBLISHED}
        if runner.fault is not None:
            attrs["fault"] = runner.fault
        with _quiet():
            self.study.add_trial(create_trial(
                state=TrialState.COMPLETE if done else TrialState.PRUNED,
                value=runner.steps[-1] if done else None,
                params=known.params, distributions=known.distributions, user_attrs=attrs,
                intermediate_values={} if runner.fault is not None
                else dict(enumerate(runner.steps)),
            ))  # fmt: skip

    # ------------------------------------------------------------------ rounds

    def next_round(self, made: Callable[[Trial], object]) -> tuple[int, list[Trial]]:
        """The number of the round that is due, and what runs in it: what an interruption has left
        of it, and new proposals; nothing where all has been tried. ``made``: called with each of
        the new ones."""
        tried = [t for t in self.tried() if t.user_attrs["round"] != PUBLISHED]
        last = max((t.user_attrs["round"] for t in tried), default=PUBLISHED)
        members = [t for t in tried if t.user_attrs["round"] == last]
        wanted = members[0].user_attrs["of"] if members else 0
        over = all(t.state.is_finished() for t in members) and len(members) >= wanted
        if over:
            wanted = min(self.population, self.trials - len(tried))
            if wanted <= 0:
                return last, []
            last, members = last + 1, []
        found = [Trial.stored(t.user_attrs["entry"]) for t in members]
        misses = 0
        while len(found) < wanted and misses < _MISSES * self.population:
            trial = self._propose(last, wanted)
            if trial is None:
                misses += 1
                continue
            made(trial)
            found.append(trial)
        fresh = len(found) > len(members) or not all(t.state.is_finished() for t in members)
        return last, found if fresh else []  # the space may be exhausted

    def _propose(self, number: int, of: int) -> Trial | None:
        """Something new at the budget; None where it cannot be, or is known."""
        every = self.study.get_trials(deepcopy=False)
        made = sum("entry" in t.user_attrs and t.user_attrs["round"] >= 0 for t in every)
        with _quiet():
            self.study.sampler = self._sampler(made)
            asked = self.study.ask()
            candidate = self.space.walk(Sampled(asked, self.study.sampler))
            trial = self.target.match(candidate)
            trial.entry["trial"] = trial.entry["variant"] = f"{self.target.name}.{made:04d}"
            same = next((t for t in self.tried() if _text(t) == trial.entry["repr"]), None)
            asked.set_user_attr("round", number)
            asked.set_user_attr("of", of)
            if trial.runs and same is not None:
                asked.set_user_attr("same_as", same.user_attrs["entry"]["trial"])
            asked.set_user_attr("entry", trial.entry)
            if not trial.runs:
                self.study.tell(asked, state=TrialState.PRUNED)
            elif same is not None:
                # its outcome again would count twice, and draw ever more of the same
                self.study.tell(asked, state=TrialState.FAIL)
            else:
                return trial
        return None

    def _sampler(self, made: int) -> optuna.samplers.BaseSampler:
        """Who decides on a proposal: by turns a model of all that is known, and chance, in the
        neighbourhood of one of the best."""
        seed = _seed(self.seed, self.target.name, made)
        best = self.complete()[:_PARENTS]
        if made % 2 and best:
            rng = random.Random(seed)
            weights = [1 / (place + 1) for place in range(len(best))]
            return Neighbour(rng.choices(best, weights)[0].params, rng)
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True,
            n_startup_trials=2 * self.population,
        )  # fmt: skip

    def tell(self, runner: Runner) -> None:
        """Put down what became of a runner of a round; what was told before stays."""
        frozen = next(t for t in self.tried() if t.user_attrs["entry"]["trial"] == runner.id)
        if frozen.state.is_finished():
            return
        with _quiet():
            trial = optuna.trial.Trial(self.study, frozen._trial_id)
            if runner.fault is not None:
                # no result: nothing that it scored may draw the search there
                trial.set_user_attr("fault", runner.fault)
                self.study.tell(trial, state=TrialState.PRUNED)
                return
            for step, value in enumerate(runner.steps):
                trial.report(value, step)
            if runner.out is None:
                self.study.tell(trial, runner.steps[-1])
            else:
                trial.set_user_attr("out", runner.out)
                self.study.tell(trial, state=TrialState.PRUNED)


def _text(trial: FrozenTrial) -> str:
    return str(trial.user_attrs["entry"]["repr"])


def _seed(seed: int, name: str, number: int) -> int:
    text = f"{seed}/{name}/{number}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")


class Neighbour(optuna.samplers.BaseSampler):
    """Changes one or two choices of a setting. What follows from a change (the options of a method
    that joins) is as published more often than not.

    Args:
        params: of the setting.
        rng: decides.
    """

    def __init__(self, params: Mapping[str, Any], rng: random.Random) -> None:
        self.params: dict[str, Any] = {**dict.fromkeys(_ALONE, False), "rectify": None, **params}
        self.rng = rng
        #: the published value of what is decided next
        self.usual: Any = None
        names = sorted(self.params.keys() - {"method"})
        self.changed = set(rng.sample(names, min(len(names), rng.choice((1, 2)))))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:  # fmt: skip
        before = self.params.get(param_name, self.usual)
        if isinstance(param_distribution, CategoricalDistribution):
            others = [v for v in param_distribution.choices if repr(v) != repr(before)]
            inside = len(others) < len(param_distribution.choices)
        else:
            assert isinstance(param_distribution, FloatDistribution | IntDistribution)
            low, high = param_distribution.low, param_distribution.high
            others, inside = [], isinstance(before, int | float) and low <= before <= high
        new = param_name not in self.params and self.rng.random() < _VARIED
        if inside and param_name not in self.changed and not new:
            return before
        if isinstance(param_distribution, CategoricalDistribution):
            return self.rng.choice(others or list(param_distribution.choices))
        if param_distribution.log:
            value = math.exp(self.rng.uniform(math.log(low), math.log(high)))
        else:
            value = self.rng.uniform(low, high)
        if isinstance(param_distribution, IntDistribution):
            return max(low, min(high, round(value)))
        return max(low, min(high, value))


class Sampled:
    """A chooser that has the sampler decide."""

    def __init__(self, trial: optuna.Trial, sampler: optuna.samplers.BaseSampler) -> None:
        self.trial, self.sampler = trial, sampler

    def __call__(self, name: str, dimension: Choice | Number, usual: Any) -> Any:
        if isinstance(self.sampler, Neighbour):
            self.sampler.usual = usual
        if isinstance(dimension, Choice):
            return self.trial.suggest_categorical(name, dimension.values)
        if dimension.whole:
            return self.trial.suggest_int(
                name, int(dimension.low), int(dimension.high), log=dimension.log
            )
        return self.trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log)


class Known:
    """A chooser that takes what a published setting has, and notes it as parameters of the study,
    where it lies in what is searched."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def __call__(self, name: str, dimension: Choice | Number, usual: Any) -> Any:
        if name in STRUCTURE:  # that they stand alone is no hint that this is best
            return usual
        distribution: BaseDistribution
        if isinstance(dimension, Choice):
            distribution = CategoricalDistribution(dimension.values)
            inside = usual in dimension.values
        else:
            number = isinstance(usual, int | float) and not isinstance(usual, bool)
            inside = number and dimension.low <= usual <= dimension.high
            low, high = dimension.low, dimension.high
            distribution = (
                IntDistribution(int(low), int(high), log=dimension.log) if dimension.whole
                else FloatDistribution(low, high, log=dimension.log)
            )  # fmt: skip
        if inside:
            self.params[name], self.distributions[name] = usual, distribution
        return usual
