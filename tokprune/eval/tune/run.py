"""Tune: try settings at every budget on some questions, and report the best on others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokprune.eval.sweep.budgets import check_budgets
from tokprune.eval.sweep.builtin import sharing
from tokprune.eval.sweep.calibrate import Calibrator
from tokprune.eval.sweep.evaluator import Batch
from tokprune.eval.sweep.progress import Progress
from tokprune.eval.sweep.runner import Sweep, interruptible, run_sweep
from tokprune.eval.sweep.store import Store
from tokprune.eval.sweep.trials import Trial, TrialMaker
from tokprune.eval.sweep.variants import Variant, build_variants
from tokprune.eval.tune.answers import Answers
from tokprune.eval.tune.candidate import Part
from tokprune.eval.tune.questions import Questions
from tokprune.eval.tune.race import Runner, race, stages
from tokprune.eval.tune.result import Finalists, Tuned, report_on
from tokprune.eval.tune.settings import TuneSettings
from tokprune.eval.tune.space import Space
from tokprune.eval.tune.study import Study, open_storage
from tokprune.eval.tune.target import LatencyTarget, Target, TokenTarget
from tokprune.methods import available_methods, image_methods

#: in the run folder: Optuna's journal, and the run on the questions that were held out
STUDY_FILE, HELD_OUT = "study.jsonl", "held-out"


def run_tune(
    settings: TuneSettings, *, command: Sequence[str] = (), progress: Progress | None = None
) -> Tuned:
    """Tune, and report.

    The folder is a run folder of everything that was tried; a study that was stopped goes on where
    it was, with more trials or budgets if wanted.

    Args:
        settings: what to do.
        command: how this was started, for the record.
        progress: shows how far it is.

    Raises:
        ValueError: a setting that does not fit model or benchmark; a folder of another study, or
            one that other code has answered; no setting that reaches a budget.
        OSError: model, benchmark or folder cannot be read or written.
        KeyboardInterrupt: after an interruption; the folder is valid.
    """
    progress = Progress() if progress is None else progress
    questions = Questions.of(settings)
    with Store(settings.out, settings.fresh) as store, interruptible(), progress:
        if settings.fresh:
            (store.folder / STUDY_FILE).unlink(missing_ok=True)
        sweep = Sweep(settings.sweeping("none"), questions.choosing, store, progress)
        sweep.prepare(command)
        try:
            tuning = Tuning(settings, questions, sweep)
            tuning.published()
            tuning.search()
            sweep.info["finished"] = True
        finally:
            sweep.save()
        finalists = tuning.finalists()
    held = Path(settings.out) / HELD_OUT
    run_sweep(
        settings.sweeping(
            *(spec for one in finalists for spec in one.methods()), out=str(held),
            latency=settings.sweep.get("latency", True), limit=settings.held_out_limit,
        ),
        command=command, progress=progress, harness=questions.held_out,
    )  # fmt: skip
    return report_on(held, finalists, questions.how, settings)


class Tuning:
    """All studies of one call. ``sweep``: prepared, of the unpruned model alone."""

    def __init__(self, settings: TuneSettings, questions: Questions, sweep: Sweep) -> None:
        self.settings, self.sweep = settings, sweep
        self.items, self.how = questions.choosing.items, questions.how
        self.tasks = len({item.task for item in self.items})
        self.courses = stages(self.items, self.tasks)
        self.answers = Answers(sweep, questions.choosing)
        sample = [one.items[0] for one in sweep.sample]
        self.batch = Batch(sweep.loaded, questions.choosing.benchmark, sample)
        with self._shared():
            calibrator = Calibrator(sweep.loaded, self.batch, sweep.settings.match)
        check_budgets(settings.budgets(), calibrator.most)
        none = self.answers.trials["none"].entry
        common = {name: none[name] for name in ("match", "dtype", "batch_size")}
        maker = TrialMaker(calibrator, common)
        media = questions.choosing.benchmark.media
        every = available_methods() if media == "video" else image_methods()
        names = [name for name in every if not settings.methods or name in settings.methods]
        space = Space.of(sweep.loaded.facts, names)
        self.variants = [
            variant
            for variant in build_variants([(n, {}) for n in space.alone], False, True, media)
            if variant.method is not None and not variant.as_published
        ]
        longest = questions.choosing.benchmark.max_new_tokens
        targets: list[Target] = [TokenTarget(maker, budget) for budget in settings.budgets()]
        targets += [LatencyTarget(maker, s, sweep.sample[0], longest) for s in settings.latency]
        self.space, self.targets = space, targets
        self.studies: list[Study] = []

    def published(self) -> None:
        """All methods as published, and the controls, race at every budget."""
        progress, settings = self.sweep.progress, self.settings
        storage = open_storage(self.sweep.store.folder / STUDY_FILE)
        parts: dict[str, Part] = {}
        runners: list[Runner] = []
        for target in self.targets:
            progress.start(f"matching to {target.text}", len(self.variants))
            made = []
            for variant in self.variants:
                trial = self._published(target, variant)
                assert variant.method is not None
                parts[trial.id] = Part(variant.method, variant.options)
                made.append(trial)
                progress.advance(1)
            self.answers.add(made)
            runners += [Runner(trial.id, target.name) for trial in made if trial.runs]
            reached = {trial.entry["method"] for trial in made if trial.runs}
            self.studies.append(Study(
                storage, target, self._within(target, reached), settings.trials,
                settings.population, settings.seed, self._identity(),
            ))  # fmt: skip
        self._race(runners, {}, settings.rivals)
        for study in self.studies:
            for runner in runners:
                if runner.group == study.target.name:
                    study.add_published(self.answers.trials[runner.id], parts[runner.id], runner)

    def _published(self, target: Target, variant: Variant) -> Trial:
        name = f"{variant.name}@{target.name}"
        if name in self.answers.trials:
            return self.answers.trials[name]
        with self._shared():
            trial = target.match(variant)
        trial.entry["trial"] = trial.entry["variant"] = name
        return trial

    def _within(self, target: Target, reached: set[str]) -> Space:
        """The space without methods that reach the budget on their own neither as published nor
        with the earliest schedule there is; as later stages they stay."""

        def reaches(name: str) -> bool:
            if name in reached or name not in self.space.decoder:
                return True
            early = self.space.earliest(name)
            with self._shared():
                return early is not None and target.match(early).runs

        return replace(self.space, alone=tuple(filter(reaches, self.space.alone)))

    def _identity(self) -> dict[str, Any]:
        """What a study that goes on has in common with how it was begun."""
        info = self.sweep.info
        return {
            **self.settings.identity(), "code": info["code"], "model": info["model"]["hash"],
            "questions": [len(self.items), info["benchmark"]["split"], self.how],
        }  # fmt: skip

    @contextmanager
    def _shared(self) -> Iterator[None]:
        """The encoder runs once for the questions that budgets are matched on."""
        with sharing(self.sweep.loaded, self.sweep.settings) as shared:
            if shared is not None:
                shared.remember(self.batch.pixels)
            yield

    def search(self) -> None:
        """Rounds of all studies, until each has tried what it may."""
        progress = self.sweep.progress
        while True:
            runners: list[Runner] = []
            best: dict[str, dict[str, float]] = {}
            for study in self.studies:
                name = study.target.name
                progress.start(f"proposals for {study.target.text}", self.settings.population)
                with self._shared():
                    number, trials = study.next_round(lambda trial: progress.advance(1))
                self.answers.add(trials)
                runners += [Runner(trial.id, name) for trial in trials]
                if trials and (known := study.complete(before=number)):
                    leader = known[0].user_attrs["entry"]
                    self.answers.ask([leader["trial"]], self.items)  # known, so nothing is asked
                    best[name] = self.answers.scores(leader["trial"])
                    progress.say(
                        f"{study.target.text}: {len(trials)} to try; the best so far is "
                        f"{known[0].value:.1%}, {leader['repr']}"
                    )
            if not runners:
                return
            self._race(runners, best, 1)
            for study in self.studies:
                for runner in runners:
                    if runner.group == study.target.name:
                        study.tell(runner)

    def _race(
        self, runners: Sequence[Runner], best: dict[str, dict[str, float]], through: int
    ) -> None:
        race(
            runners, self.courses, self.answers.ask, self.answers.scores, self.answers.fault, best,
            through,
        )  # fmt: skip

    def finalists(self) -> list[Finalists]:
        """What is answered on the questions held out, for every budget.

        Raises:
            ValueError: nothing reaches a budget.
        """
        found = []
        for study in self.studies:
            complete = study.complete()
            if not complete:
                raise ValueError(
                    f"{study.target.text}: no setting that reaches it and is a result; try a "
                    "larger budget, or more methods"
                )
            found.append(Finalists.of(study, self.settings.rivals, self._text(study)))
        return found

    def _text(self, study: Study) -> dict[str, Any]:
        return {"target": study.target.name, "text": study.target.text, **study.counts()}
