"""All checks of a method in one call, with a report in words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from tokprune.families import bind
from tokprune.methods import Method, make_method
from tokprune.testing.case import RAGGED, SEVERAL, SIZES, VIDEOS, Case, dropped
from tokprune.testing.checks import conversation, decisions, declaration, leftovers, numbers
from tokprune.testing.checks.host_reads import can_find_host_reads, host_read
from tokprune.testing.families import default_families
from tokprune.testing.report import Check, Report
from tokprune.testing.tiny import Builder, TinyFamily, tiny_family


def check_method(
    method: str | Method | type[Method],
    *,
    families: Sequence[str | TinyFamily | Builder] | None = None,
    keep_all: dict[str, Any] | None = None,
    raise_: bool = False,
    **options: Any,
) -> Report:
    """Run everything that must hold for a method, on tiny models, with its answers validated.

    Args:
        method: a method object, or a class or registered name with ``options``.
        families: names of families with a tiny model (:func:`tokprune.testing.tiny_families`), or
            builders of tiny models. Default: a handful that exercises everything, and those that
            you registered (:func:`tokprune.testing.default_families`).
        keep_all: options with which the method keeps every token (default: ``{"keep": 1.0}`` where
            it has such an option).
        raise_: raise if a check fails.
        options: of the method.

    Returns:
        The report. What the method refuses by an ``UnsupportedModelError`` or
        ``UnsupportedVideoError``, or by a ``ValueError`` of ``plan``, is no failure; the report
        says so. Neither is a read of the host, which stands there as "adaptive".

    Raises:
        AssertionError: with ``raise_``, what failed, in words.
        TypeError, ValueError: no such method, family or option.

    Example::

        report = check_method(LargestNorm, keep=9, families=["llava-1.5", "llava-next"])
        print(report)
        report.raise_for_failures()
    """
    if isinstance(method, type):
        if not issubclass(method, Method):
            raise TypeError(f"method={method!r} should be derived from tokprune.methods.Method")
        made = method(**options)
    else:
        made = make_method(method, **options)
    chosen = [tiny_family(f) for f in (default_families() if families is None else families)]
    report = Report(repr(made))
    for name, check in (
        ("declared", declaration.is_declared),
        ("documented", declaration.is_documented),
        ("comes back from its options", declaration.comes_back),
        ("presets", declaration.presets_are_valid),
    ):
        report.run(name, "", functools.partial(check, made))
    runs = [_OnFamily(report, made, family, keep_all) for family in chosen]
    for run in runs:
        run.check()
    if any(run.compared for run in runs) and not any(run.lost for run in runs):
        report.checks.append(
            Check(
                "drops something", "", False,
                "it kept every visual token everywhere, so that the comparisons show nothing; "
                "check it with options that drop some",
            )
        )  # fmt: skip
    if raise_:
        report.raise_for_failures()
    return report


@dataclass
class _OnFamily:
    """The checks of a method on one family."""

    report: Report
    method: Method
    family: TinyFamily
    keep_all: dict[str, Any] | None
    #: prefills that were compared with the oracle, and visual tokens that they dropped
    compared: int = 0
    lost: int = 0

    def run(self, name: str, check: Callable[[Case], str], case: Case) -> None:
        self.report.run(name, self.family.name, functools.partial(check, case))

    def check(self) -> None:
        models = {name: self.family.build(attention=name) for name in ("eager", "sdpa")}
        facts = bind(models["sdpa"]).facts
        if not self.report.run("plan", self.family.name, lambda: plans(self.method, facts)):
            return
        if self.method.videos_only and not facts.videos:
            words = "refused: it drops of videos, and the model takes none"
            self.report.checks.append(Check("prompts", self.family.name, True, words))
            return
        batch = VIDEOS if self.method.videos_only else RAGGED
        case = Case(self.method, self.family, models["sdpa"], batch)
        for attention, model in models.items():
            for words, prompts in (("one prompt", batch[:1]), ("left-padded batch", batch)):
                own = case.having(model=model, prompts=prompts)
                self.run(f"oracle, {words}, {attention}", self.equals_oracle, own)
        for side in ("left", "right"):
            check = functools.partial(decisions.batch_equals_singles, pad_side=side)
            self.run(f"batch as alone, {side} padding", check, case)
        if not self.method.videos_only:
            for words, prompts in (
                ("several images", SEVERAL), *([("videos", VIDEOS)] if facts.videos else []),
            ):  # fmt: skip
                own = case.having(prompts=prompts)
                self.run(f"oracle, {words}", self.equals_oracle, own)
                self.run(f"{words} as alone", decisions.batch_equals_singles, own)
        self.run("other images", decisions.ignores_other_images, case)
        self.run("no state between forwards", decisions.repeats, case)
        self.run("keep everything", self.keeps_everything, case)
        self.run("second turn", conversation.second_turn, case)
        self.run("generate", conversation.generates, case)
        self.run("text only", conversation.passes_text, case)
        self.run("hidden states", numbers.hidden_states_fit, case)
        self.run("bfloat16", lambda own: numbers.runs_in(own)[0], case)
        self.run("unpatch leaves nothing", leftovers.leaves_nothing, case)
        if has_keep(self.method):
            self.run("bad budgets", declaration.refuses_budgets, case)
        if can_find_host_reads():
            self.run("host reads", reads_host, case)

    def equals_oracle(self, case: Case) -> str:
        found = numbers.equals_oracle(case)
        self.compared += found.want is not None
        self.lost += dropped(found.prefill)
        return found.said

    def keeps_everything(self, case: Case) -> str:
        return keeps_everything(case, self.keep_all)


def plans(method: Method, facts: Any) -> str:
    """The stages of a method on a model, in words."""
    plan = method.plan(facts)
    stages = [
        f"{len(part)} {name} stage{'s' * (len(part) > 1)}"
        for name, part in (
            ("encoder", plan.encoder), ("prompt", plan.prompt), ("decoder", plan.decoder),
        )
        if part
    ]  # fmt: skip
    return ", ".join(stages) or "no stages: it compresses nothing"


def has_keep(method: Method) -> bool:
    return "keep" in {f.name for f in fields(method)}


def keeps_everything(case: Case, keep_all: dict[str, Any] | None = None) -> str:
    """:func:`~tokprune.testing.checks.numbers.keeps_everything` with ``keep_all``, or with
    ``keep=1.0`` where that keeps everything."""
    if keep_all is not None:
        made = make_method(case.method, **keep_all)
        return numbers.keeps_everything(case.having(method=made))
    why = "it has no option keep"
    if has_keep(case.method):
        try:
            everything = case.having(method=replace(case.method, keep=1.0))  # type: ignore[call-arg]
            everything.method.plan(bind(case.model).facts)
        except (ValueError, TypeError) as error:
            why = f"keep=1.0 is refused ({error})"
        else:
            lost = dropped(everything.prefill(case.inputs())[1])
            if not lost:
                return numbers.keeps_everything(everything)
            why = f"keep=1.0 drops {lost} tokens all the same"
    return f"not checked: {why}; say with keep_all={{...}} what keeps everything"


def reads_host(case: Case) -> str:
    """Whether the method reads values of the device in a forward, and where first."""
    model, prompt = case.family.build(attention="sdpa"), case.prompts[0]
    twice = case.having(model=model, prompts=[prompt, prompt], sizes=[SIZES[0]] * 2)
    place = host_read(twice)
    if place is None:
        return "no value of the device is read in prefill and steps"
    return f"adaptive: reads the host in {place}"
