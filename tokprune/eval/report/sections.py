"""The document: sections in the order in which they are read."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokprune.eval.report import plots, tables
from tokprune.eval.report.analysis import Analysis
from tokprune.eval.report.compare import Contest, Differences
from tokprune.eval.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Figure,
    Gallery,
    Section,
    Text,
)
from tokprune.eval.report.formatting import number, percent
from tokprune.eval.report.groups import GroupTable
from tokprune.eval.report.highlights import highlights, versus_random, warnings
from tokprune.eval.report.oracle_section import oracle_section
from tokprune.eval.report.oracle_variants import VariantOracle
from tokprune.eval.report.places_plot import placed, places_plot

_WHERE = {
    "tokens": "Accuracy against visual tokens. Hollow grey markers are controls; a down-sampled "
    "image that saves no tokens stands at its nominal budget.",
    "flops": "Accuracy against the FLOPs of one prefill, encoder included (2 × "
    "multiply-accumulates; what a method spends on its scores is not in them).",
    "latency": "Accuracy against the measured time of one answer, what the method itself costs "
    "included.",
}


def document(
    analysis: Analysis,
    found: Differences,
    against: Contest | None,
    groups: Sequence[GroupTable],
    groups_of: str,
    gallery: Gallery | None,
    notes: Sequence[str],
    further: Sequence[Section] = (),
    oracles: Sequence[VariantOracle] = (),
) -> Document:
    """Everything that goes into the page.

    Args:
        groups_of: whose answers made the groups, in words.
        notes: on parts that were left out.
        further: sections to stand between the run's tasks and its differences.
        oracles: of the run's variants.
    """
    run, data = analysis.data.run, analysis.data
    model, benchmark = run["model"], run["benchmark"]
    sections = [
        _summary(analysis, found, against, oracles),
        _plots(analysis),
        _results(analysis),
        _tasks(analysis),
        oracle_section(analysis, oracles),
        *further,
        _differences(analysis, found, against),
        _groups(groups, groups_of),
        _noise(analysis),
        _gallery(gallery, notes, analysis),
        _exceptions(analysis),
        _environment(analysis),
    ]
    return Document(
        title=f"{model['name']} on {benchmark['name']}",
        subtitle="Visual-token compression: accuracy, cost and how sure we are",
        facts=(
            ("model", f"{model['class']}, {model['parameters'] / 1e6:,.1f} M parameters"),
            ("visual tokens", f"{data.tokens} in {model['decoder_layers']} layers"),
            ("benchmark", f"{benchmark['name']} {benchmark['version'][:12]}"
             + (f", {benchmark['split']}" if benchmark["split"] else "")
             + (f", scored by {rule}" if (rule := benchmark.get("scoring", "exact")) != "exact"
                else "")),
            ("questions", f"{len(data.items)} on {len({i.image for i in data.items})} "
             + ("videos" if data.media == "video" else "images")),
            ("points", f"{len(data.points)}, {len(analysis.series())} variants"),
            ("updated", run["updated"][:16].replace("T", " ") + " UTC"),
        ),
        sections=tuple(s for s in sections if s is not None),
    )  # fmt: skip


def _summary(
    analysis: Analysis,
    found: Differences,
    against: Contest | None,
    oracles: Sequence[VariantOracle],
) -> Section:
    blocks: list[Block] = [Bullets(tuple(highlights(analysis, found, against, oracles)))]
    blocks += [Text(line, warning=True) for line in warnings(analysis)]
    return Section("summary", "Summary", blocks)


def _plots(analysis: Analysis) -> Section:
    blocks: list[Block] = []
    for axis in (a.about(analysis.data.media) for a in plots.AXES):
        plot = plots.styled(plots.pareto, analysis, axis)
        if plot is not None:
            blocks.append(Figure(plot, _WHERE[axis.kind]))
        else:
            blocks.append(Text(f"Accuracy against {axis.title}: not measured in this run."))
    plot = plots.styled(plots.panels, analysis)
    if plot is not None:
        blocks.append(
            Figure(
                plot,
                "One variant with its 95 % interval, the others in grey; black: unpruned.",
            )
        )
    return Section("plots", "Accuracy against cost", blocks, "Plots")


def _results(analysis: Analysis) -> Section:
    return Section(
        "results",
        "Results",
        [
            tables.frontier_table(analysis),
            tables.results_table(analysis),
            *([] if (table := tables.gate_table(analysis)) is None else [table]),
        ],
    )


def _tasks(analysis: Analysis) -> Section:
    here = analysis.at_budget()
    blocks: list[Block] = []
    plot = plots.styled(plots.retention, analysis, here)
    if plot is not None:
        blocks.append(
            Figure(
                plot,
                f"Retention in % (accuracy ÷ unpruned accuracy) at {analysis.at:g} tokens; darker "
                "is more lost.",
            )
        )
    if analysis.data.groups:
        blocks.append(tables.group_averages(analysis, here))
    if (table := tables.harness_metrics(analysis, here)) is not None:
        blocks.append(table)
    if (table := tables.yes_no_table(analysis, here)) is not None:
        blocks.append(table)
    blocks.append(tables.task_table(analysis, here, f"By task, at {analysis.at:g} tokens"))
    for budget in analysis.budgets:
        if budget != analysis.at:
            title = f"By task, at {budget:g} tokens"
            blocks.append(
                tables.task_table(analysis, analysis.at_budget(budget), title, folded=True)
            )
    return Section("tasks", "Tasks", blocks)


def _differences(analysis: Analysis, found: Differences, against: Contest | None) -> Section:
    blocks: list[Block] = []
    if found.pairs:
        blocks += [tables.differences_table(found), tables.wins_table(found)]
    else:
        blocks.append(Text(f"Fewer than two finished methods at {analysis.at:g} tokens."))
    if against is None:
        blocks.append(Text("Best method against random: one of the two is not there."))
    else:
        blocks.insert(0, Text(f"Best method against random: {versus_random(against)}"))
    return Section(
        "differences", f"Which methods differ at {analysis.at:g} tokens", blocks, "Differences"
    )


def _groups(groups: Sequence[GroupTable], model: str) -> Section:
    blocks: list[Block] = [
        Text(
            "Of the questions that the unpruned model answers correctly, A (hard) are those that "
            "it answers incorrectly on an image shrunk to the same budget, B (easy) those that it "
            "still answers correctly. A shows what a method keeps that shrinking loses. It ranks "
            "methods against each other only: by definition down-sampling scores 0 % there and the "
            "unpruned model 100 %. The lists are in groups/ beside this page."
        )
    ]
    if groups:
        blocks += [tables.hard_easy_table(table, model) for table in groups if table.rows]
    else:
        blocks = [Text("The run has no down-sampling control, so there are no groups A and B.")]
    return Section("groups", "Down-sampling control", blocks, "Groups A and B")


def _noise(analysis: Analysis) -> Section:
    blocks: list[Block] = []
    if analysis.noise:
        blocks += [
            Text(
                "The unpruned model against itself: what changes with batch size and dtype alone, "
                "through rounding."
                + (
                    f" Up to {percent(analysis.noise_gap, 2)} points between variants are noise."
                    if analysis.noise_gap
                    else " Accuracy does not."
                )
            ),
            tables.noise_table(analysis),
        ]
    else:
        blocks.append(Text("The noise floor was not measured in this run."))
    for r in analysis.blind:
        blocks.append(
            Text(f"Blind baseline (the questions without the image): {percent(r.accuracy)} %.")
        )
    seeds = tables.seeds_table(analysis)
    if seeds is not None:
        blocks.append(seeds)
    return Section("noise", "Noise floor and baselines", blocks, "Noise")


def _gallery(gallery: Gallery | None, notes: Sequence[str], analysis: Analysis) -> Section:
    blocks: list[Block] = []
    here = placed(analysis.at_budget())
    if here and (plot := plots.styled(places_plot, here)) is not None:
        blocks.append(
            Figure(
                plot,
                f"Where kept tokens stand, at {analysis.at:g} tokens: tokens in each eighth of the "
                "image (and of the video's frames), 1 = an even spread. Of tiled images, the tile "
                "that shows all of it.",
            )
        )
    if gallery is not None:
        blocks += [
            Text(
                "Patches alive in the last decoder layer that holds any: kept ones are clear with "
                "an orange outline, dropped ones grey; patches merged into one token share a tint. "
                f"Budget nearest to {analysis.at:g}. Images are cropped to their central square."
            ),
            gallery,
        ]
    blocks += [Text(f"{note[0].upper()}{note[1:]}.") for note in notes]
    return Section("gallery", "Gallery", blocks)


def _exceptions(analysis: Analysis) -> Section:
    found = (
        tables.unreachable_table(analysis),
        tables.failed_table(analysis),
        tables.missing_table(analysis),
    )
    blocks: list[Block] = [table for table in found if table is not None]
    if not blocks:
        blocks.append(
            Text("Every variant reached every budget, no question failed, none is missing.")
        )
    return Section("exceptions", "Unreachable, failed, missing", blocks, "Exceptions")


def _environment(analysis: Analysis) -> Section:
    run = analysis.data.run
    model, benchmark = run["model"], run["benchmark"]
    settings = json.dumps(run["settings"], indent=1, ensure_ascii=False, sort_keys=True)
    facts = [
        *run["environment"].items(),
        ("model hash", model["hash"]),
        ("code hash", run["code"]),
        ("benchmark", f"{benchmark['name']} {benchmark['version']}"),
        ("run dtype", analysis.data.unpruned.dtype),
        ("batch size", analysis.data.unpruned.batch_size),
        ("bootstrap", f"{number(analysis.resampler.draws)} resamples of images"),
    ]
    blocks: list[Block] = [
        Code(run["command"]),
        tables.Table(
            ("", ""), [[str(k), str(v)] for k, v in facts], "Environment", words=frozenset(range(2))
        ),
    ]
    timed = tables.latency_table(analysis)
    if timed is not None:
        blocks.append(timed)
    blocks += [
        tables.options_table(analysis),
        tables.Table(("settings of the sweep",), [[line] for line in settings.splitlines()],
                     "Settings", folded=True),
    ]  # fmt: skip
    return Section("environment", "Command and environment", blocks, "Environment")
