"""All checks of a family in one call, with a report in words."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from tokprune.families import bind
from tokprune.methods import make_method
from tokprune.testing.case import RAGGED, SEVERAL, SIZES, VIDEOS, Case
from tokprune.testing.checks import conversation, decisions, layouts, leftovers, numbers
from tokprune.testing.checks.host_reads import can_find_host_reads
from tokprune.testing.method import keeps_everything, plans, reads_host
from tokprune.testing.report import Report
from tokprune.testing.tiny import Builder, TinyFamily, tiny_family

#: methods of every stage: name, budget, what they show
PROBES = (
    ("grid", 11, "drops at the language-model input"),
    ("fastv", 7, "drops inside the decoder"),
    ("todre", 10, "reads the tower's [CLS] attention, where it has a class token"),
    ("flowcut", 12, "drops inside the tower"),
    ("pitome", 13, "merges inside the tower"),
)
#: (height, width) of single images: also square, and far from any tile's shape
_SHAPES = [*SIZES, (24, 24), (48, 31), (7, 70)]


def check_family(
    family: str | TinyFamily | Builder, *, raise_: bool = False, **build: Any
) -> Report:
    """Run everything that must hold for a family, on a tiny model of it.

    Args:
        family: name of a family with a tiny model (:func:`tokprune.testing.register_tiny`), or a
            function that builds one: ``build(attention="sdpa")`` gives a model in eval mode.
        raise_: raise if a check fails.
        build: options of the builder, for example ``tower="siglip"``.

    Returns:
        The report: parts, facts and layouts against what the model itself does, then methods of
        every stage against the masked oracle. What a method refuses is no failure.

    Raises:
        AssertionError: with ``raise_``, what failed, in words.
        ValueError: no such family.
    """
    tiny = tiny_family(family)
    if build:
        tiny = replace(tiny, build=functools.partial(tiny.build, **build))
    report = Report(f"family {tiny.name}")
    model = tiny.build(attention="sdpa")
    if report.run("bind", tiny.name, lambda: layouts.binds(model)):
        _check(report, Case(make_method("grid", keep=11), tiny, model, RAGGED))
    if raise_:
        report.raise_for_failures()
    return report


def _check(report: Report, case: Case) -> None:
    name, facts = case.family.name, bind(case.model).facts
    report.run("facts", name, lambda: layouts.facts_are_true(case))
    report.run("tokens per image", name, lambda: layouts.layouts_fit(case, _SHAPES))
    report.run("order of the tokens", name, lambda: layouts.packs_in_order(case))
    if facts.videos:
        videos = case.having(prompts=VIDEOS)
        report.run("tokens per video", name, lambda: layouts.layouts_fit(videos, []))
        report.run("videos: oracle", name, lambda: _oracle(videos))
        report.run("videos as alone", name, lambda: decisions.batch_equals_singles(videos))
    report.run("text only", name, lambda: conversation.passes_text(case))
    report.run("generate", name, lambda: conversation.generates(case))
    report.run("unpatch leaves nothing", name, lambda: leftovers.leaves_nothing(case))
    if can_find_host_reads():
        report.run("host reads", name, lambda: reads_host(case))
    for method, keep, stage in PROBES:
        own = case.having(method=make_method(method, keep=keep))
        if report.run(f"{method}: plan", name, functools.partial(_plans, own, stage)):
            _probe(report, own, method)


def _plans(case: Case, stage: str) -> str:
    return f"{stage}: {plans(case.method, bind(case.model).facts)}"


def _oracle(case: Case) -> str:
    return numbers.equals_oracle(case).said


def _probe(report: Report, case: Case, method: str) -> None:
    name = case.family.name
    for words, prompts in (("batch", RAGGED), ("several images", SEVERAL)):
        own = case.having(prompts=prompts)
        alone = functools.partial(decisions.batch_equals_singles, own)
        report.run(f"{method}: oracle, {words}", name, functools.partial(_oracle, own))
        report.run(f"{method}: {words} as alone", name, alone)
    report.run(f"{method}: keep everything", name, lambda: keeps_everything(case))
